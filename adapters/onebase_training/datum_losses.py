"""Losses of a client's own rows: cross-entropy and policy gradients, each summed over all tokens.

They are those of the Tinker API (https://tinker-docs.thinkingmachines.ai/tinker/losses/), by the same names,
with the same inputs. What a client computes itself comes as cross-entropy: with weights -dC/dlogprob its
gradient is that of any differentiable loss C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onebase_training.live_operations import Datum, RefusedError
from onebase_training.losses import CHUNK, token_losses

Config = Mapping[str, float | str]
_IGNORED = frozenset({"mask"})
"""Inputs that recipes send along for their own use."""
_HIGHEST = float(np.finfo(np.float32).max)
_CLIPS = ("clip_low_threshold", "clip_high_threshold")
_INSTEAD = {
    "stable_reinforce": "its formula is not published: use importance_sampling, ppo, cispo or gspo",
    "custom": "a loss runs at the client: call forward_backward_custom with a function, not with a handle",
}


@dataclass(frozen=True)
class Row:
    """One checked row. tokens: [N] int64. targets: [N] or [N, K] int64. inputs: fp32, of the same shape."""

    tokens: torch.Tensor
    targets: torch.Tensor
    inputs: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Loss:
    """A loss. required, optional: names of its inputs besides target_tokens. config: settings with defaults.

    elementwise: computes it from the targets' logprobs, in nats, the inputs and the settings.
    """

    name: str
    elementwise: Callable[[torch.Tensor, Mapping[str, torch.Tensor], Mapping[str, float]], torch.Tensor]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = ()  # type: ignore[assignment]
    wide: bool = False
    """Whether it takes K targets a position."""

    @property
    def compares(self) -> bool:
        """Return True if it compares the learner's logprobs with the sampler's."""
        return "logprobs" in self.required

    def settings(self, given: Config) -> dict[str, float]:
        """Return the settings with defaults. Raises RefusedError."""
        found = dict(self.config)
        for name, value in given.items():
            if name not in found:
                known = ", ".join(found) or "none"
                raise RefusedError(f"loss_fn_config: {self.name} has no setting {name!r} (there is {known})")
            if isinstance(value, str) or not abs(value) <= _HIGHEST:
                raise RefusedError(f"loss_fn_config: {name} is {value!r}: write a finite number of fp32")
            found[name] = float(value)
        return found


def cross_entropy(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return the weighted negative log-likelihood; weights may be any numbers, and are 1 by default."""
    weights = inputs.get("weights")
    return -logprobs if weights is None else -logprobs * weights


def importance_sampling(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return REINFORCE with the ratio of learner and sampler as a weight."""
    return -torch.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]


def ppo(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return PPO's clipped objective, negated (Schulman et al. 2017, equation 7), of each token."""
    return _clipped(torch.exp(logprobs - inputs["logprobs"]), inputs, config)


def cispo(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return CISPO's objective, negated (MiniMax 2025, equation 4): the clipped ratio is a fixed weight."""
    ratio = torch.exp(logprobs - inputs["logprobs"]).detach()
    return -_clamped(ratio, inputs, config) * logprobs * inputs["advantages"]


def dro(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return DRO's objective, negated (Richemond et al. 2024), with its quadratic penalty."""
    penalty = (logprobs - inputs["logprobs"]).square()
    return 0.5 * config["beta"] * penalty - logprobs * inputs["advantages"]


def gspo(
    logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Return GSPO-token's objective, negated (Zheng et al. 2025, equation 13): the ratio is the sequence's,
    over the tokens that `sequence_ratio_mask` marks, and each token has the gradient of its own logprob."""
    fixed = logprobs.detach()
    sequence = (fixed - inputs["logprobs"])[inputs["sequence_ratio_mask"] != 0].mean()
    return _clipped(torch.exp(sequence + logprobs - fixed), inputs, config)


def _clipped(
    ratio: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clamped(ratio, inputs, config) * advantages)


def _clamped(
    ratio: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> torch.Tensor:
    """Clip ratios to the thresholds of each token, where the row gives them, or to those of the settings."""
    low, high = (inputs.get(name, ratio.new_tensor(config[name])) for name in _CLIPS)
    return torch.minimum(torch.maximum(ratio, low), high)


def _clips(low: float, high: float) -> dict[str, float]:
    return dict(zip(_CLIPS, (low, high), strict=True))


_POLICY = ("logprobs", "advantages")
LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", cross_entropy, (), ("weights",), {}, wide=True),
        Loss("importance_sampling", importance_sampling, _POLICY, (), {}),
        Loss("ppo", ppo, _POLICY, _CLIPS, _clips(0.8, 1.2)),
        Loss("cispo", cispo, _POLICY, _CLIPS, _clips(0.0, 4.0)),
        Loss("dro", dro, _POLICY, (), {"beta": 0.05}),
        Loss("gspo", gspo, (*_POLICY, "sequence_ratio_mask"), _CLIPS, _clips(0.8, 1.2)),
    )
}


def find_loss(name: str) -> Loss:
    """Return a loss by its name. Raises RefusedError, which says what works instead."""
    if name not in LOSSES:
        known = f"the losses here are {', '.join(LOSSES)}"
        raise RefusedError(f"loss_fn {name!r} is not supported: {_INSTEAD.get(name, known)}")
    return LOSSES[name]


def check_row(datum: Datum, loss: Loss, place: int, words: int, longest: int) -> Row:
    """Return a row as tensors.

    Args:
        place: its number in the request, for messages.
        words: size of the base's vocabulary. longest: most tokens of a row.

    Raises RefusedError: it does not have the loss's inputs, or they do not fit its tokens.
    """
    where, count = f"data[{place}]", len(datum)
    if len(datum.tokens) % 4 or not count:
        raise RefusedError(f"{where}.model_input has no tokens")
    if count > longest:
        raise RefusedError(f"{where}.model_input has {count} tokens: this server trains {longest} at most")
    tokens = np.frombuffer(datum.tokens, "<i4").astype(np.int64)
    try:
        arrays = {name: given.array() for name, given in datum.inputs.items() if name not in _IGNORED}
    except ValueError as error:
        raise RefusedError(f"{where}.loss_fn_inputs: {error}") from error
    targets = arrays.pop("target_tokens", None)
    if targets is None:
        raise RefusedError(f"{where}.loss_fn_inputs has no target_tokens")
    if targets.ndim not in ((1, 2) if loss.wide else (1,)) or len(targets) != count or not targets.size:
        shapes = f"({count},) or ({count}, K)" if loss.wide else f"({count},)"
        raise RefusedError(f"{where}: target_tokens has shape {targets.shape}: {loss.name} takes {shapes}")
    for name, ids in (("model_input", tokens), ("target_tokens", targets)):
        if ids.dtype != np.int64 or ids.min() < 0 or ids.max() >= words:
            raise RefusedError(f"{where}: {name} has a token outside of 0 to {words - 1}")
    return Row(
        torch.from_numpy(tokens),
        torch.from_numpy(targets.copy()),
        _check_inputs(arrays, loss, where, targets.shape),
    )


def _check_inputs(
    arrays: Mapping[str, Any], loss: Loss, where: str, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    known = (*loss.required, *loss.optional)
    for name in loss.required:
        if name not in arrays:
            raise RefusedError(f"{where}.loss_fn_inputs has no {name}, which {loss.name} needs")
    found = {}
    for name, array in arrays.items():
        if name not in known:
            inputs = ", ".join(("target_tokens", *known))
            raise RefusedError(f"{where}.loss_fn_inputs: {loss.name} takes {inputs}, not {name!r}")
        if array.shape != shape:
            raise RefusedError(f"{where}: {name} has shape {array.shape}, and target_tokens {shape}")
        if not np.isfinite(array).all():
            raise RefusedError(f"{where}: {name} has a number that is not finite")
        found[name] = torch.from_numpy(array.astype(np.float32))
    if "sequence_ratio_mask" in found and not found["sequence_ratio_mask"].count_nonzero():
        raise RefusedError(f"{where}: sequence_ratio_mask marks no token")
    return found


class _TargetLogprobs(torch.autograd.Function):
    """Logprobs of K targets a position; keeps no fp32 copy of the logits, which the gradient overwrites."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute [n, K] fp32 of logits [n, vocabulary] and targets [n, K]."""
        found = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        sums = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = logits[part].float()
            sums[part] = torch.logsumexp(chunk, dim=-1)
            found[part] = chunk.gather(1, targets[part]) - sums[part, None]
        ctx.save_for_backward(logits, targets, sums)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            given = gradient[part]
            chunk = torch.exp(logits[part].float() - sums[part, None]).mul_(-given.sum(1, keepdim=True))
            logits[part] = chunk.scatter_add_(1, targets[part], given).to(logits.dtype)
        return logits, None


def target_logprobs(logits: torch.Tensor, rows: list[Row]) -> list[torch.Tensor]:
    """Return the logprobs of each row's targets in nats, fp32, in the targets' shape.

    Args:
        logits: [tokens of all rows, vocabulary]. The backward pass overwrites them.
    """
    device, lengths = logits.device, [len(row) for row in rows]
    if all(row.targets.ndim == 1 for row in rows):
        targets = torch.cat([row.targets for row in rows]).to(device)
        return list(torch.split(-token_losses(logits, targets), lengths))
    most = max(row.targets.shape[1] if row.targets.ndim == 2 else 1 for row in rows)
    wide = torch.zeros(sum(lengths), most, dtype=torch.int64)
    for row, part in zip(rows, torch.split(wide, lengths), strict=True):
        flat = row.targets.view(len(row), -1)
        part[:, : flat.shape[1]] = flat
    found: torch.Tensor = _TargetLogprobs.apply(logits, wide.to(device))  # type: ignore[no-untyped-call]
    return [
        part[:, : row.targets.view(len(row), -1).shape[1]].view(row.targets.shape)
        for row, part in zip(rows, torch.split(found, lengths), strict=True)
    ]
