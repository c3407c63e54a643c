"""transformers and PEFT on an NF4 base: what OneBase's texts, speed and losses are compared with.

TRL's environment imports `load_base` too, so nothing of OneBase is needed for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, StoppingCriteria


def load_base(folder: str, attention: str) -> Any:
    """Return the base in NF4 with double quantization and bf16 compute, on a GPU if there is one.

    A mixture is in bf16: bitsandbytes leaves its experts alone.
    """
    routed = getattr(AutoConfig.from_pretrained(folder), "num_experts_per_tok", None)
    quantization = (
        None
        if routed
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        attn_implementation=attention,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The packed CPU layout rounds the weights, has no backward pass, and breaks on PEFT's next
            # state_dict().
            module.support_avx512bf16_for_cpu = False
    return model


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each token of the batch was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def session(base: str, adapters: dict[str, str], threads: int, attention: str) -> Callable[..., Any]:
    """Return what answers a list of requests with a sample of each, as a server with a static batch would: a
    worker's function."""
    torch.set_num_threads(threads)
    (first, folder), *others = adapters.items()
    bare = load_base(base, attention)
    model: Any = PeftModel.from_pretrained(bare, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    model.generation_config.eos_token_id = None  # ignore_eos
    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def generate(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        wanted = [request["adapter"] for request in requests]
        extra: dict[str, Any] = {}
        if len(set(wanted)) > 1:
            extra["adapter_names"] = [name or "__base__" for name in wanted]
        elif wanted[0] is not None and model.active_adapter != wanted[0]:
            model.set_adapter(wanted[0])
        inputs = tokenizer([request["prompt"] for request in requests], return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        clock = Clock()
        with model.disable_adapter() if set(wanted) == {None} else nullcontext():
            output = model.generate(
                **inputs,
                **extra,
                max_new_tokens=requests[0]["tokens"],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[clock],
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        times = {"started": started, "ttft": clock.times[0] - started, "ended": clock.times[-1]}
        return [{**times, "tokens": len(clock.times), "text": text} for text in texts]

    return generate


@torch.inference_mode()
def loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Return the mean over all supervised tokens of all rows, in nats; one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"][1:], device=model.device)
        wanted = labels != -100
        logits = model(input_ids=ids).logits[0, :-1][wanted].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


def losses(base: str, threads: int, rows: str, adapters: list[str]) -> dict[str, float]:
    """Return the loss of each adapter folder on a file of rows, and that of the base under "": a worker's
    function. Nothing of OneBase's own training code is used."""
    torch.set_num_threads(threads)
    tokenized = json.loads(Path(rows).read_text())
    model = load_base(base, "eager").eval()
    found = {"": loss(model, tokenized)}
    for folder in adapters:
        peft = PeftModel.from_pretrained(model, folder)
        found[folder] = loss(peft.eval(), tokenized)
        model = peft.unload()
    return found
