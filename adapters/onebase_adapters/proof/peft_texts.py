"""Greedy texts of adapters as PEFT makes them on the whole base, for those who compare a server with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def texts(
    base: Path, adapters: Mapping[str, Path], prompts: Sequence[str], tokens: int
) -> dict[str, list[str]]:
    """Return the continuations of prompts by each adapter, and under "" by the base alone.

    base: a folder as transformers saves it, which is loaded in fp32. adapters: PEFT's folders by name.
    tokens: length of a continuation.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    plain = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32).eval()

    def continued(model: Any) -> list[str]:
        found = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    num_beams=1,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    pad_token_id=tokenizer.eos_token_id,
                )
            found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return found

    made = {"": continued(plain)}
    for name, folder in adapters.items():
        model = PeftModel.from_pretrained(plain, folder).eval()
        made[name] = continued(model)
        plain = model.unload()
    return made
