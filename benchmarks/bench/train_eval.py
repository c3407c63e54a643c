"""Held-out loss of adapters, whoever trained them: plain transformers and PEFT, one row at a time.

`python -m bench.train_eval BASE DEVICE THREADS ROWS ADAPTER...` prints a JSON object, folder to loss, with
the base's under "". Nothing of OneBase's own training code is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(base: str, device: str) -> Any:
    """The base in NF4 with double quantization and bf16 compute, eager attention as it is served."""
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
        device_map={"": device},
        attn_implementation="eager",
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.inference_mode()
def loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Mean over all supervised tokens of all rows, nats."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"][1:], device=model.device)
        wanted = labels != -100
        logits = model(input_ids=ids).logits[0, :-1][wanted].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


def main() -> None:
    base, device, threads, rows_file, *adapters = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    rows = json.loads(Path(rows_file).read_text())
    model = load(base, device)
    losses = {"": loss(model, rows)}
    for folder in adapters:
        peft = PeftModel.from_pretrained(model, folder)
        losses[folder] = loss(peft.eval(), rows)
        model = peft.unload()
    print(json.dumps(losses), file=answers)


if __name__ == "__main__":
    main()
