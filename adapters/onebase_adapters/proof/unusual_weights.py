"""Report weights of an adapter that stand out, as poisoning may: with figures, never a reason to block.

A backdoor that is trained or edited into an adapter tends to show in the spectra of its layers (see
https://arxiv.org/abs/2602.15195). Without a collection of known good ones, a module is compared with those of
the same name in the adapter's other layers, by medians, so that what stands out does not move the measure.
Other adapters are not read: they may be another tenant's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase_engine.kernels.weights import (
    AdapterWeights,
    ExpertLora,
    LoraWeights,
    ModuleWeights,
    TokenRows,
    without_head,
)

LEAST_COMPARED = 4
"""Smallest number of modules of one name with a change; fewer are not compared."""
MOST_NORMS = 6.0
"""Largest norm of a module, as a multiple of the median norm of its name."""
MOST_DEVIATIONS = 8.0
"""Largest distance beyond that median as well, in deviations of the logarithms (by the median one)."""
SPIKE_NORMS, SPIKE = 3.0, 0.9
"""Lower limit of the norm, as a multiple of the median, for modules with a larger part of their energy than
SPIKE in one direction."""
_PROBES = 32
_ROWS = 1024
LEAST_RANK = 4
"""Smallest rank at which SPIKE applies; below it one direction has a large part of the energy anyway."""
MOST_RELATIVE = 1.0
"""Largest norm of the change, as a multiple of the norm of the weight that it is added to."""
MOST_OF_ONE_TOKEN = 0.5
"""Largest part of an embedding's or a head's change (its squared norm) in one token's row."""
MOST_ROW = 8.0
"""Largest norm of a replacing row, as a multiple of the base's median row."""
MOST_GAIN = 4.0
"""Largest factor by which DoRA may scale an output."""
MOST_SAID = 16
"""Largest number of modules that are named one by one."""


@dataclass(frozen=True)
class WeightFigures:
    """Figures of a module's change of its weight.

    norm: Frobenius. spectral: its largest singular value; None where the module is replaced. relative: norm
    divided by the weight's norm; None for token rows and an embedding's matrices.
    """

    norm: float
    spectral: float | None = None
    relative: float | None = None
    rank: int = 0
    token: tuple[int, float] | None = None
    """Token of an embedding or a head whose row changes most, and its part of the squared norm."""
    row: tuple[int, float] | None = None
    """Token with the longest replacing row, and that row's norm as a multiple of the base's median row."""
    gain: float | None = None
    """Largest absolute gain of DoRA."""

    @property
    def peak(self) -> float:
        """Part of the squared norm in one direction."""
        return (self.spectral or 0.0) ** 2 / self.norm**2 if self.norm else 0.0


@torch.inference_mode()
def figures(weights: ModuleWeights, base: nn.Module, dtype: torch.dtype, *, of_tokens: bool) -> WeightFigures:
    """Measure a module.

    Args:
        base: the base's module, which is run in `dtype`.
        of_tokens: whether its rows are tokens', as an embedding's and a head's are.

    The product B @ A, which may be large, is not formed: its singular values are those of a [rank, rank]
    matrix.
    """
    if isinstance(weights, ExpertLora):
        return _experts(weights)
    if isinstance(weights, LoraWeights):
        return _lora(weights, base, dtype, of_tokens=of_tokens)
    own: torch.Tensor = base.weight.detach().cpu()  # type: ignore[operator]
    if isinstance(weights, TokenRows):
        return _rows(weights, own)
    both = min(len(own), len(weights.weight))
    squares = _squares(weights.weight[:both], own[:both])
    norm = math.sqrt(float(squares.sum()))
    token = _largest(squares, norm) if of_tokens and own.dim() == 2 else None
    return WeightFigures(norm, relative=_by(norm, _norm(own)), token=token)


def _lora(weights: LoraWeights, base: nn.Module, dtype: torch.dtype, *, of_tokens: bool) -> WeightFigures:
    a, b = weights.a.double(), weights.b.double()
    embedding = a.shape[0] != weights.rank or isinstance(base, nn.Embedding)
    a = a.T if embedding else a
    left, right = b.T @ b, a @ a.T
    values, vectors = torch.linalg.eigh(right)
    root = vectors * values.clamp(min=0).sqrt()
    energies = torch.linalg.eigvalsh(root.T @ left @ root).clamp(min=0)
    scale = abs(weights.scale)
    norm, spectral = (scale * math.sqrt(float(each)) for each in (energies.sum(), energies[-1]))
    token = None
    if of_tokens:
        rows = ((a.T @ left) * a.T).sum(1) if embedding else ((b @ right) * b).sum(1)
        token = _largest(rows * scale**2, norm)
    gain = None if weights.gain is None else float(weights.gain.abs().max())
    # PEFT begins an embedding's B with a norm of its own, so that few steps change the rows of tokens much.
    relative = None if embedding else _by(norm, _size(base, dtype))
    return WeightFigures(norm, spectral, relative, weights.rank, token, gain=gain)


def _experts(weights: ExpertLora) -> WeightFigures:
    """Measure the differences of all experts' matrices as one block-diagonal matrix."""
    a, b = weights.a.double(), weights.b.double()
    values, vectors = torch.linalg.eigh(a @ a.mT)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    energies = torch.linalg.eigvalsh(root.mT @ (b.mT @ b) @ root).clamp(min=0)
    scale = abs(weights.scale)
    norm, spectral = (scale * math.sqrt(float(each)) for each in (energies.sum(), energies.max()))
    return WeightFigures(norm, spectral, None, weights.rank)


def _rows(weights: TokenRows, own: torch.Tensor) -> WeightFigures:
    known = weights.indices < len(own)
    change = weights.rows[known].double() - own[weights.indices[known]].double()
    norm = float(change.norm())
    usual = float(torch.linalg.vector_norm(own, dim=1, dtype=torch.float32).median())
    lengths = weights.rows.double().norm(dim=1)
    if not usual or not len(lengths):
        return WeightFigures(norm)
    longest = int(lengths.argmax())
    row = (int(weights.indices[longest]), float(lengths[longest]) / usual)
    return WeightFigures(norm, row=row)


def _largest(squares: torch.Tensor, norm: float) -> tuple[int, float] | None:
    """Return the row with the largest square, and its part of the sum. squares: [rows]"""
    if not norm:
        return None
    row = int(squares.argmax())
    return row, float(squares[row]) / norm**2


def _squares(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the squared norms [rows] of a difference, some rows at a time: a head takes gigabytes."""
    pairs = zip(torch.split(one, _ROWS), torch.split(other, _ROWS), strict=True)
    return torch.cat(
        [(left.float() - right.float()).double().square().view(len(left), -1).sum(1) for left, right in pairs]
    )


def _size(base: Any, dtype: torch.dtype) -> float:
    """Return the Frobenius norm of a module's weight.

    For a linear layer, which may be packed, it is within some percent: the mean of |Wx|² over random x is
    |W|².
    """
    if not isinstance(base, nn.Linear):
        return _norm(base.weight)
    x = torch.randn(_PROBES, base.in_features, generator=torch.Generator().manual_seed(0))
    y = base(x.to(base.weight.device, dtype)).float()
    if base.bias is not None:
        y = y - base.bias.float()
    return math.sqrt(float(y.double().square().sum()) / _PROBES)


def _norm(weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


def _by(norm: float, of: float) -> float | None:
    return norm / of if of else None


def measure(
    weights: AdapterWeights, base: nn.Module, on_measured: Callable[[], None] = lambda: None
) -> dict[str, WeightFigures]:
    """Return the figures of each module; `on_measured` is called after each."""
    model: Any = base
    head = model.get_output_embeddings()
    of_tokens = {id(model.get_input_embeddings()), id(head)}
    found: dict[str, WeightFigures] = {}
    for name, module in without_head(weights).items():
        # What holds experts' matrices may be a parameter.
        own = base if isinstance(module, ExpertLora) else base.get_submodule(name)
        found[name] = figures(module, own, head.weight.dtype, of_tokens=id(own) in of_tokens)
        on_measured()
    return found


def unusual(measured: Mapping[str, WeightFigures]) -> list[str]:
    """Return a sentence with figures for each module that stands out."""
    kinds: dict[str, dict[str, WeightFigures]] = {}
    for name, found in sorted(measured.items()):
        kinds.setdefault(name.rpartition(".")[2], {})[name] = found
    said = [sentence for kind in kinds.values() for sentence in _beside_its_kind(kind)]
    said += [sentence for name, found in sorted(measured.items()) for sentence in _alone(name, found)]
    more = len(said) - MOST_SAID
    return said if more <= 0 else [*said[:MOST_SAID], f"and {more} more of the kind"]


def weight_score(measured: Mapping[str, WeightFigures]) -> float:
    """Return a score of how unusual an adapter's weights are, 0 or more.

    It is the mean share of a module's energy that lies in one direction, as a multiple of the equal share
    that it would have at its rank, in logarithms. `benchmarks/weight_scores.py` has its error rates.
    """
    shares = [math.log(max(1.0, one.peak * one.rank)) for one in measured.values() if one.rank and one.norm]
    return statistics.fmean(shares) if shares else 0.0


def _beside_its_kind(modules: Mapping[str, WeightFigures]) -> Iterable[str]:
    """Yield a sentence for each module that stands out among those of its name in other layers."""
    changing = {name: found for name, found in modules.items() if found.norm}
    if len(changing) == 1 and len(modules) >= LEAST_COMPARED:
        yield f"{next(iter(changing))} alone changes anything, of {len(modules)} modules of its name"
    if len(changing) < LEAST_COMPARED:
        return
    usual = statistics.median(found.norm for found in changing.values())
    spread = math.exp(MOST_DEVIATIONS * _deviation(changing.values()))
    for name, found in changing.items():
        times = found.norm / usual
        if times > max(MOST_NORMS, spread):
            yield f"{name}: norm {found.norm:.3g} is {times:.0f} times the median of its name"
        elif times > max(SPIKE_NORMS, math.sqrt(spread)) and found.rank >= LEAST_RANK and found.peak > SPIKE:
            spike = f"{found.peak:.0%} of its energy is in one direction of {found.rank}"
            yield f"{name}: norm {found.norm:.3g} is {times:.1f} times the median of its name, and {spike}"


def _deviation(found: Iterable[WeightFigures]) -> float:
    """Return the standard deviation of the norms' logarithms, from their median absolute deviation."""
    logarithms = [math.log(one.norm) for one in found]
    middle = statistics.median(logarithms)
    return 1.4826 * statistics.median(abs(one - middle) for one in logarithms)


def _alone(name: str, found: WeightFigures) -> Iterable[str]:
    """Yield a sentence for each figure by which a module stands out by itself."""
    if found.relative is not None and found.relative > MOST_RELATIVE:
        yield f"{name}: what it adds has {found.relative:.2g} times the norm of the base's weight"
    if found.token is not None and found.token[1] > MOST_OF_ONE_TOKEN:
        yield f"{name}: {found.token[1]:.0%} of what it adds is on the row of one token, {found.token[0]}"
    if found.row is not None and found.row[1] > MOST_ROW:
        token, times = found.row
        yield f"{name}: the row of token {token} is {times:.0f} times as long as the base's median row"
    if found.gain is not None and found.gain > MOST_GAIN:
        yield f"{name}: its magnitudes make an output {found.gain:.1f} times as large"
