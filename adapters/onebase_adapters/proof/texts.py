"""Greedy texts of a real, small engine beside PEFT's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from onebase_adapters.proof.verify import ProofError, regrets
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.scheduler import Limits
from onebase_engine.lora.weights import AdapterWeights

TIE_ROUNDINGS = 4
"""A token ties with PEFT's where its logit is within this many roundings of the largest. Attention over
padded blocks sums in another order than transformers', and in bf16 two logits are often the same number."""
TIE_FP32 = 1e-4
_BLOCK = 16
_STEP_TOKENS = 256
_VERSION = "version"


@dataclass(frozen=True)
class TextProof:
    texts: int
    tokens: int
    changed: int
    """Texts that differ from the bare base's."""


def prove_texts(
    base: nn.Module,
    reference: nn.Module,
    weights: AdapterWeights,
    probes: Sequence[list[int]],
    tokens: int,
    on_progress: Callable[[float], None],
) -> TextProof:
    """Let an engine serve each probe with and without the version, all in one batch, and compare.

    Each token must be PEFT's, or tie with it after the same tokens (`TIE_ROUNDINGS`).

    Args:
        tokens: of each text.
        on_progress: called with the part that is done; what it raises ends the proof.

    Raises:
        ProofError: a text is not PEFT's, or one without the version not the base's.
    """
    if not probes or tokens < 1:
        return TextProof(0, 0, 0)
    served, bare = _served(base, weights, probes, tokens, lambda part: on_progress(part / 2))
    tolerance = _tie(base.get_output_embeddings().weight.dtype)  # type: ignore[operator]
    changed = 0
    for number, probe in enumerate(probes):
        _check(base, probe, bare[number], tolerance, f"text {number + 1} of the bare base")
        _check(reference, probe, served[number], tolerance, f"text {number + 1}")
        changed += served[number] != bare[number]
        on_progress(0.5 + (number + 1) / len(probes) / 2)
    return TextProof(len(probes), len(probes) * tokens, changed)


def _served(
    base: nn.Module,
    weights: AdapterWeights,
    probes: Sequence[list[int]],
    tokens: int,
    on_progress: Callable[[float], None],
) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's texts with the version, and without."""
    rows = 2 * len(probes)
    length = max(map(len, probes)) + tokens
    blocks = rows * -(-length // _BLOCK) + RESERVED_BLOCKS
    limits = Limits(max_rows=rows, step_tokens=max(_STEP_TOKENS, rows), max_length=length)
    engine = Engine(base, name="verifier", limits=limits, kv_blocks=blocks, block_size=_BLOCK, slots=2)
    engine.put_adapter(_VERSION, weights)
    sampling = protocol.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    texts: dict[str, list[int]] = {}
    for number, probe in enumerate(probes):
        for name, adapters in ((f"+{number}", [protocol.AdapterRef(_VERSION)]), (f"-{number}", [])):
            texts[name] = []
            engine.submit(protocol.Submit(id=name, prompt=probe, sampling=sampling, adapters=adapters))
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.finish == "error":
                raise ProofError(output.id, 1.0, f"the engine cannot serve it: {output.error_message}")
            texts[output.id] += output.tokens
        on_progress(sum(map(len, texts.values())) / (rows * tokens))
    count = range(len(probes))
    return [texts[f"+{n}"] for n in count], [texts[f"-{n}"] for n in count]


def _tie(dtype: torch.dtype) -> float:
    return max(TIE_ROUNDINGS * torch.finfo(dtype).eps, TIE_FP32)


def _check(model: nn.Module, probe: list[int], tokens: list[int], tolerance: float, title: str) -> None:
    """Raise ProofError for a token that `model` would not have chosen after the same tokens."""
    for place, regret in enumerate(regrets(model, probe, tokens)):
        if regret > tolerance or math.isnan(regret):
            message = f"{title} differs from PEFT's at token {place + 1}: {tokens[place]} is served there"
            raise ProofError(title, regret, message)
