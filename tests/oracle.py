"""The reference: what `PeftModel.from_pretrained` with eager attention gives for one row alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from onebase_adapters.proof.texts import WHOLE_TEXTS, activation, activation_options
from onebase_engine.kernels.interface import TILE


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """A row's greedy tokens from the model's own forward pass: PEFT's model, or the bare base.

    Read in pieces of TILE tokens, as the proof reads (`onebase_adapters.proof.texts`); the model numbers
    positions itself.
    """
    device = next(model.parameters()).device
    tokens, acts_from = list(prompt), activation(model, prompt)
    if type(model.config).model_type in WHOLE_TEXTS:
        while len(tokens) < len(prompt) + max_tokens:
            output = model(
                input_ids=torch.tensor([tokens], device=device),
                use_cache=False,
                **activation_options(acts_from, 0, len(tokens)),
            )
            tokens.append(int(output.logits[0, -1].float().argmax()))
        return tokens[len(prompt) :]
    cache = DynamicCache(config=model.config)
    start = 0
    while len(tokens) < len(prompt) + max_tokens:
        for first in range(start, len(tokens), TILE):
            piece = tokens[first : first + TILE]
            output = model(
                input_ids=torch.tensor([piece], device=device),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
                **activation_options(acts_from, first, len(piece)),
            )
        start = len(tokens)
        tokens.append(int(output.logits[0, -1].float().argmax()))
    return tokens[len(prompt) :]
