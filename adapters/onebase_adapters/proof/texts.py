"""Compare greedy texts of a real, small engine with PEFT's own forward pass."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from onebase_adapters.format.config import Task
from onebase_adapters.proof.report import ProofError
from onebase_engine.base.experts import expert_modules
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.base_proof import rounded_once_more, rounding_unit
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.interface import TILE
from onebase_engine.kernels.weights import HEAD, AdapterWeights, Head

WHOLE_TEXTS = frozenset({"bamba", "falcon_mamba", "jamba", "mamba", "zamba"})
"""Types of models that, in transformers 5.24, do not go on from a cache with several tokens: they number them
from 0 again (Bamba), or begin with a state of zeros."""
TIE_ROUNDINGS = 4
"""Number of roundings of the largest logit within which a token's logit ties with it. Attention over padded
blocks sums in another order than transformers', and in bf16 two logits are often the same number."""
TIE_FP32 = 1e-4
ROUTED_TRIES = 8
"""Number of passes of a mixture with other roundings, in which a token is looked for that its own does not
choose. Where two experts tie, one last bit chooses between them, and with the expert another text."""
_BLOCK = 16
_STEP_TOKENS = 256


@dataclass(frozen=True)
class TextProof:
    texts: int
    tokens: int
    changed: int
    """Number of texts that differ from the bare base's."""


class TextProver:
    """Serves greedy texts with a real, small engine, and compares them with PEFT.

    The engine is kept from proof to proof: starting it takes longer than the texts.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._engine: Engine | None = None
        self._room = (0, 0)
        """Number of sequences, and tokens of each, that the engine has room for."""
        self._proofs = itertools.count()
        self._bare: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        """Probes and texts of the bare base that were proved to be its own."""

    def prove(
        self,
        reference: nn.Module,
        weights: AdapterWeights,
        probes: Sequence[list[int]],
        tokens: int,
        on_progress: Callable[[float], None],
    ) -> TextProof:
        """Serve each probe with and without the version, all in one batch, and compare.

        Each token must be PEFT's, or tie with it after the same tokens (`TIE_ROUNDINGS`).

        Args:
            reference: PEFT's model of the version, on a view of the same base.
            tokens: of each text.
            on_progress: called with the part that is done; what it raises ends the proof.

        Raises:
            ProofError: a text is not PEFT's, or one without the version not the base's.
        """
        if not probes or tokens < 1:
            return TextProof(0, 0, 0)
        tolerance = tie_of(self._base.get_output_embeddings().weight.dtype)  # type: ignore[operator]
        changed = 0
        try:
            served, bare = self._served(weights, probes, tokens, lambda part: on_progress(part / 2))
            model = self._engine_for(0, 0).model
            unit = rounding_unit(model.dtype, model.kv_dtype, model.device)
            for number, probe in enumerate(probes):
                known = tuple(probe), tuple(bare[number])
                if known not in self._bare and bare[number]:
                    _check(
                        self._base,
                        probe,
                        bare[number],
                        tolerance,
                        unit,
                        f"text {number + 1} of the bare base",
                    )
                    self._bare.add(known)
                _check(reference, probe, served[number], tolerance, unit, f"text {number + 1}")
                changed += served[number] != bare[number]
                on_progress(0.5 + (number + 1) / len(probes) / 2)
        except BaseException:
            # It may have rows left, or prefixes of the base that were computed wrong.
            self._engine = None
            raise
        return TextProof(len(probes), len(probes) * tokens, changed)

    def prove_classes(
        self,
        classifier: nn.Module,
        weights: AdapterWeights,
        probes: Sequence[list[int]],
        task: Task,
    ) -> int:
        """Classify the probes in one batch with the engine, and compare with `classifier`. Returns their
        number.

        For the same hidden state the version's head must give the classifier's logits, except for their last
        bit; for the engine's own states, logits as near as rounding may bring these.

        Raises:
            ProofError: classes are not the classifier's.
        """
        head = weights.get(HEAD)
        if not probes or not isinstance(head, Head):
            return 0
        kind: Literal["each", "last"] = "last" if task == "SEQ_CLS" else "each"
        try:
            found = self._read(weights, probes, protocol.Pooling(kind, head=True))
        except BaseException:
            self._engine = None
            raise
        weight = head.weight.double()
        bias = torch.zeros(()) if head.bias is None else head.bias.double()
        unit, tie = float(torch.finfo(head.weight.dtype).eps), tie_of(head.weight.dtype)
        for number, probe in enumerate(probes):
            logits, hidden = _classes(classifier, probe, kind)
            values = torch.frombuffer(bytearray(found[number]), dtype=torch.float32).double()
            if values.numel() != logits.numel():
                raise ProofError(f"text {number + 1}", math.inf, "there are not as many classes as PEFT has")
            products = hidden.abs() @ weight.abs().T
            for got, allowed in (
                (hidden @ weight.T + bias, unit * logits.abs() + 2.0**-20 * products),
                (values.view(logits.shape), tie * (products + logits.abs())),
            ):
                most = float((got - logits).abs().max())
                if not bool(((got - logits).abs() <= allowed).all()):
                    message = f"the classes of text {number + 1} differ from PEFT's by {most:.2g}"
                    raise ProofError(f"text {number + 1}", most, message)
        return len(probes)

    def _read(
        self, weights: AdapterWeights, probes: Sequence[list[int]], pooling: protocol.Pooling
    ) -> list[bytes]:
        engine = self._engine_for(len(probes), max(map(len, probes)))
        version = f"version {next(self._proofs)}"
        engine.put_adapter(version, weights)
        for number, probe in enumerate(probes):
            engine.submit(
                protocol.Submit(
                    id=str(number),
                    prompt=probe,
                    sampling=protocol.Sampling(max_tokens=0),
                    adapters=[protocol.AdapterRef(version)],
                    pooling=pooling,
                )
            )
        found: dict[str, bytes] = {}
        while engine.busy:
            engine.step()
            for output in engine.take_outputs():
                if output.vector is None:
                    raise ProofError(output.id, 1.0, f"the engine cannot classify: {output.error_message}")
                found[output.id] = output.vector
        engine.unload_adapter(version)
        engine.step()
        return [found[str(number)] for number in range(len(probes))]

    def _served(
        self,
        weights: AdapterWeights,
        probes: Sequence[list[int]],
        tokens: int,
        on_progress: Callable[[float], None],
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the engine's texts with the version, and without; these are empty where a probe has tokens
        that the base has not."""
        words = len(self._base.get_output_embeddings().weight)  # type: ignore[operator]
        engine = self._engine_for(2 * len(probes), max(map(len, probes)) + tokens)
        # Of its own for each proof: what the engine keeps of prefixes is by version.
        version = f"version {next(self._proofs)}"
        engine.put_adapter(version, weights)
        sampling = protocol.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        texts: dict[str, list[int]] = {}
        for number, probe in enumerate(probes):
            for name, adapters in ((f"+{number}", [protocol.AdapterRef(version)]), (f"-{number}", [])):
                texts[name] = []
                if not adapters and max(probe) >= words:
                    continue
                engine.submit(protocol.Submit(id=name, prompt=probe, sampling=sampling, adapters=adapters))
        while engine.busy:
            engine.step()
            for output in engine.take_outputs():
                if output.finish == "error":
                    raise ProofError(output.id, 1.0, f"the engine cannot serve it: {output.error_message}")
                texts[output.id] += output.tokens
            on_progress(sum(map(len, texts.values())) / (len(texts) * tokens))
        engine.unload_adapter(version)
        engine.step()  # which empties its slot
        count = range(len(probes))
        return [texts[f"+{n}"] for n in count], [texts[f"-{n}"] for n in count]

    def _engine_for(self, rows: int, length: int) -> Engine:
        """Return an engine with room for so many sequences of this length."""
        if self._engine is None or rows > self._room[0] or length > self._room[1]:
            rows, length = max(rows, self._room[0]), max(length, self._room[1])
            self._engine, self._room = None, (rows, length)
            model = ServedModel(self._base, slots=2, max_length=length)
            blocks = rows * -(-length // _BLOCK) * len(model.groups) + RESERVED_BLOCKS
            limits = SchedulerLimits(
                max_sequences=rows, step_tokens=max(_STEP_TOKENS, rows), max_length=length
            )
            self._engine = Engine(
                self._base,
                name="verifier",
                limits=limits,
                kv_blocks=blocks,
                block_size=_BLOCK,
                state_places=1 + 2 * rows,
                slots=2,
                model=model,
            )
        return self._engine


def tie_of(dtype: torch.dtype) -> float:
    """Return the largest distance below the largest logit, relative to it, at which a logit ties with it."""
    return max(TIE_ROUNDINGS * torch.finfo(dtype).eps, TIE_FP32)


def _check(
    model: nn.Module, probe: list[int], tokens: list[int], tolerance: float, unit: float, title: str
) -> None:
    """Raise ProofError for a token that `model` would not have chosen after the same tokens.

    unit: of the roundings that are told apart, relative to what is rounded.
    """
    for place, regret in enumerate(served_regrets(model, probe, tokens, tolerance, unit)):
        if regret > tolerance or math.isnan(regret):
            message = f"{title} differs from PEFT's at token {place + 1}: {tokens[place]} is served there"
            raise ProofError(title, regret, message)


@torch.inference_mode()
def _classes(
    classifier: Any, probe: list[int], kind: Literal["each", "last"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [tokens, labels] and hidden states [tokens, hidden], fp64, of the classified tokens."""
    ids = torch.tensor([probe], device=next(classifier.parameters()).device)
    hidden = classifier.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].double().cpu()
    logits = classifier(input_ids=ids, use_cache=False).logits[0].double().cpu()
    return logits.view(-1, logits.shape[-1]), hidden if kind == "each" else hidden[-1:]


def served_regrets(
    model: nn.Module, prompt: list[int], tokens: list[int], tolerance: float, unit: float
) -> list[float]:
    """Return the `regrets` of a text; of a mixture's tokens the least of several passes.

    Each pass but the first has every product rounded once more at random, as other kernels may round it. They
    are made where the first does not give the text.
    """
    least = regrets(model, prompt, tokens)
    if next(expert_modules(model), None) is None:
        return least
    for seed in range(ROUTED_TRIES):
        if max(least) <= tolerance or any(map(math.isnan, least)):
            break
        with rounded_once_more(model, unit, seed):
            least = list(map(min, least, regrets(model, prompt, tokens)))
    return least


@torch.inference_mode()
def regrets(model: nn.Module, prompt: list[int], tokens: list[int]) -> list[float]:
    """Return each token's distance below the model's best logit after the same tokens; all 0 for a greedy
    text.

    It is relative to the largest logit of its place.
    """
    logits = _logits(model, [*prompt, *tokens[:-1]], len(tokens), activation(model, prompt))
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    largest = logits.abs().amax(1).clamp(min=torch.finfo(logits.dtype).tiny)
    below: list[float] = ((logits.amax(1) - chosen) / largest).tolist()
    return below


def activation(model: Any, prompt: list[int]) -> int | None:
    """Return the position from which on PEFT's activated LoRA acts after a prompt; None for any other model.

    It is beyond every text if the prompt does not invoke the adapter.
    """
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if not getattr(config, "alora_invocation_tokens", None):
        return None
    from peft.tuners.lora.variants import calculate_alora_offsets

    (offset,) = calculate_alora_offsets(model.peft_config, model.active_adapter, torch.tensor([prompt]))
    return sys.maxsize if offset is None else len(prompt) - offset


def activation_options(acts_from: int | None, first: int, count: int) -> dict[str, Any]:
    """Return PEFT's options for a pass over `count` tokens from position `first` on.

    PEFT's `generate` passes the prompt's offset in the same way. acts_from: as `activation` returns it.
    """
    if acts_from is None:
        return {}
    return {"alora_offsets": [min(max(first + count - acts_from, 0), count)]}


def _logits(model: Any, ids: list[int], keep: int, acts_from: int | None) -> torch.Tensor:
    """Return the logits after each of the last `keep` tokens, [keep, vocab] fp32, by the model's own pass.

    The model numbers positions itself: the engine's positions must not judge the engine.

    The tokens pass in pieces of TILE through transformers' own cache: from 33 rows on oneDNN sums bf16
    products in another order, and one flipped last bit may tip a near tie between two tokens.
    """
    device = next(model.parameters()).device
    whole = type(model.config).model_type in WHOLE_TEXTS
    cache = None if whole else DynamicCache(config=model.config)
    size = len(ids) if whole else TILE
    kept = []
    for first in range(0, len(ids), size):
        piece = ids[first : first + size]
        wanted = min(len(piece), keep - (len(ids) - first - len(piece)))
        output = model(
            input_ids=torch.tensor([piece], device=device),
            use_cache=not whole,
            logits_to_keep=max(wanted, 1),
            cache=cache,
            **activation_options(acts_from, first, len(piece)),
        )
        if wanted > 0:
            kept.append(output.logits[0].float())
    return torch.cat(kept)
