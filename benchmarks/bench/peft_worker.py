"""transformers + PEFT in NF4, in a process of its own so that its memory goes when it ends.

Reads one JSON job a line from stdin and answers with one JSON line on the stdout it was started
with; whatever the libraries print goes to stderr. `targets.PeftTarget` is the other end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, StoppingCriteria


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each token of the batch was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load(base: str, adapters: dict[str, str], attention: str) -> tuple[Any, Any]:
    """The base in NF4 with double quantization and bf16 compute, with every adapter, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map=device,
        attn_implementation=attention,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The packed CPU layout rounds the weights and breaks on PEFT's next state_dict().
            module.support_avx512bf16_for_cpu = False
    names = list(adapters)
    peft = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(adapters[name], adapter_name=name)
    peft.eval()
    peft.generation_config.eos_token_id = None  # ignore_eos
    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return peft, tokenizer


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One batch, as a server with a static batch would run it; one sample a request."""
    started = time.perf_counter()
    wanted = [request["adapter"] for request in requests]
    extra: dict[str, Any] = {}
    if len(set(wanted)) > 1:
        extra["adapter_names"] = [name or "__base__" for name in wanted]
    elif wanted[0] is not None and model.active_adapter != wanted[0]:
        model.set_adapter(wanted[0])
    inputs = tokenizer([request["prompt"] for request in requests], return_tensors="pt", padding=True)
    inputs = inputs.to(model.device)
    clock, count = Clock(), requests[0]["tokens"]
    with model.disable_adapter() if set(wanted) == {None} else nullcontext():
        output = model.generate(
            **inputs,
            **extra,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[clock],
        )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ttft, ended = clock.times[0] - started, clock.times[-1]
    return [
        {"started": started, "ttft": ttft, "ended": ended, "tokens": len(clock.times), "text": text}
        for text in texts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", required=True, help="JSON object: name to folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.base, json.loads(options.adapters), options.attention)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(generate(model, tokenizer, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
