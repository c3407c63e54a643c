"""The reference: what `PeftModel.from_pretrained` with eager attention gives for one row alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

from onebase_adapters.rows import TILE


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """The row's greedy tokens from PEFT's own forward pass.

    The prompt is fed in pieces of TILE tokens through transformers' own cache: from 33 rows on oneDNN
    sums bf16 products in another order, and one flipped last bit may tip a near tie between two tokens.
    """
    cache = DynamicCache(config=model.config)
    pieces = [prompt[i : i + TILE] for i in range(0, len(prompt), TILE)]
    tokens: list[int] = []
    for piece in pieces:
        logits = _forward(model, piece, cache)
    while True:
        tokens.append(int(logits.argmax()))
        if len(tokens) == max_tokens:
            return tokens
        logits = _forward(model, tokens[-1:], cache)


def _forward(model: nn.Module, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    start = cache.get_seq_length()
    positions = torch.arange(start, start + len(ids))[None]
    output = model(
        input_ids=torch.tensor([ids]), position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[0, -1].float()
