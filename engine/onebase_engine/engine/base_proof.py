"""Proof of the bare base: compares what the engine serves with the model's own forward pass.

An adapter's proof compares greedy texts with PEFT's on the same base: ties forgive small deviations, and a
base without adapters is never tested. So two texts, prefilled side by side in one packed batch and continued,
are compared with the model's own result for each alone, computed from nothing but its tokens. Where the model
attends within a window, a third text is longer than that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, described, quantized_statistics
from onebase_engine.base.quantized_cache import quantized_id
from onebase_engine.base.view import view
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.sampling import score_tokens
from onebase_engine.kernels.interface import TILE
from onebase_engine.machine import is_out_of_memory
from onebase_engine.user_cache import keep, recall

logger = logging.getLogger(__name__)

LENGTHS = (2 * TILE + 7, TILE + 13)
"""Tokens of the two texts: longer than a tile and a KV block, multiples of neither."""
LONGEST_WINDOW = 1024
"""Longest window or chunk of attention, in tokens, beyond which a text is read: longer ones would take
minutes on a CPU."""
BEYOND_WINDOW = 40
"""Tokens of that text beyond the window."""
GENERATED = 8
"""Tokens that follow each text, decoded one by one."""
MARGIN = 2.0
"""Largest ratio of the served texts' deviation to the one that rounding each product once more brings about.

Of tiny random models of all types that load, sound ones had 0.8 at most, and those that numbered
positions wrongly 16 at least.
"""
PART_MARGIN = 4.0
"""The same for a few tokens alone: those that were generated, and those beyond the window."""
CLOSE = 1e-5
"""Deviation of log-probabilities (nats, root mean square) that needs no further explanation."""
SILENT_SECONDS = 2.0
"""Time, in seconds, after which the log explains why a proof makes the start take longer."""
_PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum}
    | {functional.linear, functional.embedding}
)


def prove_once(engine: Engine, base: nn.Module, settings: BaseSettings, cpu_weights: str) -> None:
    """Prove the base, unless the user's cache says that it passed with the same code, settings and libraries.

    Raises:
        UnsupportedBaseError: the engine does not serve what the model computes.
    """
    key = _proof_key(engine, base, settings, cpu_weights)
    if key is not None and recall("proved-bases", key) is not None:
        return
    began = time.monotonic()
    waiting = "proving the base at its first start with these settings and libraries: later ones skip it"
    timer = threading.Timer(SILENT_SECONDS, logger.info, [waiting])
    timer.daemon = True
    timer.start()
    try:
        deviation = prove_base(engine, base)
    finally:
        timer.cancel()
    seconds = time.monotonic() - began
    logger.info("the base is proved: %.2g nats off its own forward pass (%.1f s)", deviation, seconds)
    if key is not None:
        keep("proved-bases", key, {"deviation": deviation, "seconds": seconds})


def prove_base(engine: Engine, base: nn.Module) -> float:
    """Return how far served texts are from the model's own (nats, root mean square over their tokens).

    Raises:
        UnsupportedBaseError: farther than rounding explains, or one of the two cannot be computed.
    """
    name = f"{type(base).__name__} ({getattr(base.config, 'model_type', 'unknown type')})"
    try:
        texts = _texts(engine, base)
        served = _served(engine, texts)
        tree = view(base)
        own = [_own(tree, tokens) for tokens, _ in served]
        errors = [logprobs - expected for (_, logprobs), expected in zip(served, own, strict=True)]
        deviation = _mean(errors)
        if deviation <= CLOSE:
            return deviation
        with rounded_once_more(
            tree, rounding_unit(engine.model.dtype, engine.model.kv_dtype, engine.model.device)
        ):
            rounded = [
                _own(tree, tokens) - expected for (tokens, _), expected in zip(served, own, strict=True)
            ]
    except UnsupportedBaseError:
        raise
    except Exception as error:
        reason = f"fails ({described(error)}): choose another --quantization, or another base"
        if is_out_of_memory(error):
            reason = (
                "over a short text, at this first start, finds no memory: lower --kv-memory or --slot-memory"
            )
        raise _unproved(name, f"its own forward pass {reason}") from error
    noise = _mean(rounded)
    if math.isfinite(deviation) and deviation <= MARGIN * noise:
        parts = [[len(text) - 1 for text in texts]]  # where what was generated begins
        parts += [[len(text) - BEYOND_WINDOW for text in texts[2:]]]
        if all(
            _mean(_from(errors, part)) <= PART_MARGIN * max(noise, _mean(_from(rounded, part)))
            for part in parts
        ):
            return deviation
    raise _unproved(name, _difference(errors, noise))


def _from(errors: Sequence[torch.Tensor], starts: Sequence[int]) -> list[torch.Tensor]:
    """Return the errors of the last texts, each from a place on."""
    return [one[start:] for one, start in zip(errors[len(errors) - len(starts) :], starts, strict=True)]


def _unproved(name: str, reason: str) -> UnsupportedBaseError:
    return UnsupportedBaseError(f"{name} cannot be served, because it cannot be proved: {reason}")


def _difference(errors: Sequence[torch.Tensor], noise: float) -> str:
    """Say where served log-probabilities differ most; `errors` are those of each text [tokens]."""
    sizes = [float(one.abs().nan_to_num(torch.inf).max()) for one in errors]
    text = sizes.index(max(sizes))
    own = errors[text]
    worst = int(own.abs().nan_to_num(torch.inf).argmax())
    at = f"{abs(float(own[worst])):.2g} at token {worst + 2} of {len(own) + 1} in text {text + 1}"
    return (
        f"in one batch the log-probabilities of {len(errors)} texts are {_mean(errors):.2g} nats off those "
        f"of its own forward pass, which is given nothing but tokens (worst: {at}); rounding explains "
        f"{noise:.2g}. OneBase does not know how it numbers positions, or how it attends. Choose another base"
    )


def _mean(errors: Sequence[torch.Tensor]) -> float:
    """Return the root mean square of all texts; infinity if one error is not finite, 0 if there is none."""
    every = torch.cat([torch.zeros(0, dtype=torch.float64), *errors])
    if not torch.isfinite(every).all():
        return float("inf")
    return float(every.square().mean().sqrt()) if len(every) else 0.0


def _texts(engine: Engine, base: Any) -> list[list[int]]:
    """Return two texts of random words, without tokens that the config gives a meaning, that fit together.

    A third one is longer than the window of attention, if there is a window and room for the text.
    """
    text = base.config.get_text_config()
    fields = [*base.config.to_dict().items(), *text.to_dict().items()]
    ids = [value for name, value in fields if name.endswith(("token_id", "token_ids", "token_index"))]
    special = {one for value in ids for one in (value if isinstance(value, list) else [value])}
    words = [token for token in range(text.vocab_size) if token not in special] or [0]
    blocks = engine.pool.capacity // len(engine.model.groups)
    room = min(engine.scheduler.limits.max_length, blocks * engine.pool.block_size // 2)
    longest = max(1, room - _generated(engine))
    lengths = [min(length, longest) for length in LENGTHS]
    windows = (getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
    window = max((one for one in windows if one <= LONGEST_WINDOW), default=0)
    beyond = window + BEYOND_WINDOW
    if lengths[0] < beyond <= longest:
        lengths.append(beyond)
    chosen = random.Random(0)
    return [[chosen.choice(words) for _ in range(length)] for length in lengths]


def _generated(engine: Engine) -> int:
    return max(1, min(GENERATED, engine.scheduler.limits.max_length // 4))


def _served(engine: Engine, texts: Sequence[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Let the engine continue the texts, all in one batch.

    Returns:
        Of each text all its tokens, and the log-probabilities [tokens - 1] fp64 of all but the first.
    """
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=_generated(engine), ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    for number, prompt in enumerate(texts):
        engine.submit(
            protocol.Submit(id=f"base {number}", prompt=prompt, sampling=sampling, tenant="base proof")
        )
    tokens = {f"base {number}": list(prompt) for number, prompt in enumerate(texts)}
    scores: dict[str, list[float]] = {name: [] for name in tokens}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.finish == "error":
                raise UnsupportedBaseError(f"the base cannot generate: {output.error_message}")
            scored = [*(output.prompt_logprobs or ()), *(output.logprobs or ())]
            scores[output.id] += [one.logprob for one in scored]
            tokens[output.id] += output.tokens
    return [(tokens[name], torch.tensor(scores[name], dtype=torch.float64)) for name in tokens]


@torch.inference_mode()
def _own(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities [tokens - 1] fp64 of a text's tokens but the first, by the model alone."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.tensor([one.logprob for one in score_tokens(logits, tokens[1:], 0)], dtype=torch.float64)


def rounding_unit(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> float:
    """Return how far, relative to it, one rounding may move a number that the engine computes."""
    unit = torch.finfo(dtype).eps / 2
    if kv_dtype == torch.int8:
        return max(unit, 2.0**-7)
    # In fp32 orders of summation differ by more than one rounding, and a GPU's tensor cores by TF32.
    return max(unit, 2.0**-16 if device.type == "cpu" else 2.0**-11)


@contextlib.contextmanager
def rounded_once_more(model: nn.Module, unit: float, seed: int = 0) -> Iterator[None]:
    """Let each product in a model's passes be off by one rounding at random, as another kernel's may be."""
    rounding = _Rounding(unit, seed)
    hooks = [
        module.register_forward_hook(lambda module, given, output: rounding.moved(output))
        for module in model.modules()
        if any(quantized_statistics(module))
    ]
    try:
        with rounding:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Rounding(TorchFunctionMode):
    """Moves each element of each product by up to `unit` of itself."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self._unit = unit
        self._random = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        return self.moved(output) if func in _PRODUCTS else output

    def moved(self, output: torch.Tensor) -> torch.Tensor:
        parts = torch.rand(output.shape, generator=self._random).to(output.device)
        return (output.float() * (1 + self._unit * (2 * parts - 1))).to(output.dtype)


def _proof_key(engine: Engine, base: nn.Module, settings: BaseSettings, cpu_weights: str) -> object:
    """Return all that a proof depends on, as JSON can hold it; None where the base has no identity."""
    identity = quantized_id(settings)
    if identity is None:
        return None
    model = engine.model
    return {
        "base": identity,
        "code": _code_digest(),
        "kernels": model.kernels.name,
        "device": str(model.device),
        "cuda": torch.version.cuda,
        "cpu_weights": cpu_weights,
        "kv_dtype": str(model.kv_dtype),
        "block_size": engine.pool.block_size,
        "step_tokens": engine.scheduler.limits.step_tokens,
        "lengths": [len(one) for one in _texts(engine, base)],
    }


def _code_digest() -> str:
    """Return the SHA-256 of this package's code and its library in C."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
