"""Triton kernels for training on a GPU: norms, gates, rotations and losses, each with its gradient.

A gradient is one kernel, too, and a function stores what it needs. Matrices in fp32 are split into sums of
some in bf16. A function that replaces a module's own is first compared with it in a trial.
"""

# ruff: noqa: N803 (what Triton compiles into a kernel is written in capitals)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from onebase_engine.kernels.cuda import PLAIN, norm_of, normed, on_device

_WORDS = 4096
"""Number of logits that a program reads at once."""
_NUMBERS, _HEADS = 1024, 16
"""Numbers of elements that a gate or split program processes, and of heads that are rotated at once."""


@triton.jit
def _norm_gradient(x, weight, gradient, y, size, eps, SIZE: tl.constexpr, AROUND_ONE: tl.constexpr):
    """Compute the gradient at the input of `_norm` from the one at its result."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    there = place < size
    own = tl.load(x + row * size + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own) / size + eps)
    w = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * size + place, mask=there, other=0.0).to(tl.float32)
    given = given * (1.0 + w) if AROUND_ONE else given * w
    along = tl.sum(given * own) / size * scale * scale
    tl.store(y + row * size + place, (scale * (given - own * along)).to(tl.bfloat16), mask=there)


@triton.jit
def _log_sum(x, y, size, SIZE: tl.constexpr):
    """Compute the logarithm of the sum of a row's exponentials, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    most, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    for first in range(0, size, SIZE):
        place = first + tl.arange(0, SIZE)
        own = tl.load(x + row * size + place, mask=place < size, other=float("-inf")).to(tl.float32)
        above = tl.maximum(most, tl.max(own))
        by = tl.where(above == float("-inf"), 0.0, above)  # where all so far is -inf
        total = total * tl.exp(most - by) + tl.sum(tl.exp(own - by))
        most = above
    tl.store(y + row, most + tl.log(total))


@triton.jit
def _log_gradient(x, targets, log_sums, upstream, size, SIZE: tl.constexpr):
    """Overwrite a row with the gradient of its log_sum less its target's logit."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = place < size
    own = tl.load(x + row * size + place, mask=there, other=0.0).to(tl.float32)
    part = tl.exp(own - tl.load(log_sums + row))
    part = tl.where(place == tl.load(targets + row), part - 1.0, part) * tl.load(upstream + row)
    tl.store(x + row * size + place, part.to(tl.bfloat16), mask=there)


@triton.jit
def _gate(gate, up, y, count, SIZE: tl.constexpr):
    """Compute silu(gate) * up, where silu(gate) is rounded too."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < count
    own = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
    opened = tl.div_rn(own, 1.0 + tl.exp(-own)).to(tl.bfloat16).to(tl.float32)
    opened *= tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, opened.to(tl.bfloat16), mask=there)


@triton.jit
def _gate_gradient(gate, up, gradient, y, y_1, count, SIZE: tl.constexpr):
    """Compute the gradients at gate and up from the one at the result of `_gate`."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < count
    own = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
    let = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    given = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    part = tl.div_rn(1.0, 1.0 + tl.exp(-own))
    slope = part * (1.0 + own * (1.0 - part))
    tl.store(y + place, (given * let * slope).to(tl.bfloat16), mask=there)
    tl.store(y_1 + place, (given * (own * part)).to(tl.bfloat16), mask=there)


@triton.jit
def _split(x, y, size, count, SIZE: tl.constexpr):
    """Split fp32 numbers into three bf16 rows that sum to them: all first parts, all second, all third."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < count
    own = tl.load(x + place, mask=there, other=0.0)
    at = y + place + 2 * size * (place // size)
    first = own.to(tl.bfloat16)
    own -= first.to(tl.float32)
    second = own.to(tl.bfloat16)
    tl.store(at, first, mask=there)
    tl.store(at + size, second, mask=there)
    tl.store(at + 2 * size, (own - second.to(tl.float32)).to(tl.bfloat16), mask=there)


@triton.jit
def _turn_heads(
    x, y, c, c_1, s, s_1, row, heads, half, x_row, x_head, HEADS: tl.constexpr, SIZE: tl.constexpr
):
    """Rotate one token's heads: the first halves by c and s, the second ones by c_1 and s_1."""
    place = tl.arange(0, SIZE)
    for begin in range(0, heads, HEADS):
        head = (begin + tl.arange(0, HEADS)).to(tl.int64)
        there = (head < heads)[:, None] & (place < half)[None, :]
        at = x + row * x_row + head[:, None] * x_head + place[None, :]
        first = tl.load(at, mask=there, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=there, other=0.0).to(tl.float32)
        by_c = (first * c[None, :]).to(tl.bfloat16).to(tl.float32)
        by_s = (second * s[None, :]).to(tl.bfloat16).to(tl.float32)
        to = y + (row * heads + head[:, None]) * (2 * half) + place[None, :]
        tl.store(to, (by_c - by_s).to(tl.bfloat16), mask=there)
        by_c = (second * c_1[None, :]).to(tl.bfloat16).to(tl.float32)
        by_s = (first * s_1[None, :]).to(tl.bfloat16).to(tl.float32)
        tl.store(to + half, (by_c + by_s).to(tl.bfloat16), mask=there)


@triton.jit
def _turn(
    q, k, cosines, sines, y, y_1, q_heads, k_heads, half, q_row, q_head, k_row, k_head,
    BACK: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Rotate a token's queries and keys by its position; with BACK, their gradients back."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    at, there = row * 2 * half + place, place < half
    c = tl.load(cosines + at, mask=there, other=0.0).to(tl.float32)
    c_1 = tl.load(cosines + at + half, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sines + at, mask=there, other=0.0).to(tl.float32)
    s_1 = tl.load(sines + at + half, mask=there, other=0.0).to(tl.float32)
    if BACK:
        s, s_1 = -s_1, -s
    _turn_heads(q, y, c, c_1, s, s_1, row, q_heads, half, q_row, q_head, HEADS, SIZE)
    _turn_heads(k, y_1, c, c_1, s, s_1, row, k_heads, half, k_row, k_head, HEADS, SIZE)


def log_sums(logits: torch.Tensor) -> torch.Tensor:
    """Compute the logarithm of each row's sum of exponentials: [n, vocabulary] bf16, contiguous -> [n]
    fp32."""
    y = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with on_device(logits.device):
        _log_sum[(len(logits),)](logits, y, logits.shape[1], SIZE=_WORDS, **PLAIN)
    return y


def overwrite_with_gradient(
    logits: torch.Tensor, targets: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Overwrite logits [n, vocabulary] bf16 with the gradient of the cross-entropy of `targets` [n].

    gradient: at each loss, [n] fp32; all contiguous.
    """
    grid = len(logits), triton.cdiv(logits.shape[1], _WORDS)
    with on_device(logits.device):
        _log_gradient[grid](logits, targets, sums, gradient, logits.shape[1], SIZE=_WORDS, **PLAIN)


def split(matrix: torch.Tensor) -> torch.Tensor:
    """Split [m, n] fp32, contiguous, into [m, 3, n] bf16, which sum to it."""
    rows, size = matrix.shape
    y = torch.empty(rows, 3, size, dtype=torch.bfloat16, device=matrix.device)
    grid = (triton.cdiv(matrix.numel(), _NUMBERS),)
    with on_device(matrix.device):
        _split[grid](matrix, y, size, matrix.numel(), SIZE=_NUMBERS, **PLAIN)
    return y


class _TrainedNorm(torch.autograd.Function):
    """A root mean square norm whose weight is not trained; stores its input unchanged."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, around_one: bool
    ) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.options = eps, around_one
        return normed((x, weight), *ctx.options)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), (eps, around_one) = ctx.saved_tensors, ctx.options
        return normed((x, weight, gradient.contiguous()), eps, around_one, _norm_gradient), None, None, None


class _TrainedGate(torch.autograd.Function):
    """Gate silu(gate) * up, both contiguous; stores only these two."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(_gate, (gate, up), 1)[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _gated(_gate_gradient, (*ctx.saved_tensors, gradient.contiguous()), 2)


def _gated(kernel: Any, given: tuple[torch.Tensor, ...], results: int) -> tuple[torch.Tensor, ...]:
    """Run a gate kernel. `given` are contiguous and of one shape, which the results have too."""
    ys = tuple(torch.empty_like(given[0]) for _ in range(results))
    count = given[0].numel()
    with on_device(given[0].device):
        kernel[(triton.cdiv(count, _NUMBERS),)](*given, *ys, count, SIZE=_NUMBERS, **PLAIN)
    return ys


class _TrainedRotation(torch.autograd.Function):
    """Rotation of queries and keys [1, heads, T, d] by cosines and sines [1, T, d]; stores only these."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cosines, sines)
        return _both_turned(q, k, cosines, sines, back=False)

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_both_turned(q, k, *ctx.saved_tensors, back=True), None, None


def _both_turned(
    q: torch.Tensor, k: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys with any strides. In memory, results have a token's heads one after the
    other."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    tokens, size = q.shape[2:]
    y, y_1 = (x.new_empty_strided(x.shape, (x.numel(), size, x.shape[1] * size, 1)) for x in (q, k))
    with on_device(q.device):
        _turn[(tokens,)](
            q, k, cosines, sines, y, y_1, q.shape[1], k.shape[1], size // 2,
            q.stride(2), q.stride(1), k.stride(2), k.stride(1),
            BACK=back, HEADS=_HEADS, SIZE=triton.next_power_of_2(size // 2), **PLAIN,
        )  # fmt: skip
    return y, y_1


# ---- in the place of modules -------------------------------------------------------------------


def trained_norm(base: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a root mean square norm in bf16 like `CudaKernels.norm`, with a gradient, or None.

    None if `base` is another norm; a trial compares both with PyTorch's.
    """
    found = norm_of(base)
    if found is None or base.weight.requires_grad:
        return None

    plain = type(base).forward

    def norm(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        fits = x.dtype == torch.bfloat16 and x.shape[-1:] == base.weight.shape
        if args or options or not fits:
            own: torch.Tensor = plain(base, x, *args, **options)
            return own
        y: torch.Tensor = _TrainedNorm.apply(x, *found)
        return y

    (x,) = _trial_inputs(base.weight.device, (8, base.weight.numel()))
    return norm if _same_gradients(norm, base, (x,)) else None


def trained_gate(
    own: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return a replacement for `own` if a trial shows that it is silu(gate) * up in bf16, else None.

    `own` takes a gate and an up projection, [..., size]. The trial covers gradients too.
    """

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if not gate.dtype == up.dtype == torch.bfloat16 or gate.shape != up.shape:
            return own(gate, up)
        y: torch.Tensor = _TrainedGate.apply(gate.contiguous(), up.contiguous())
        return y

    given = _trial_inputs(device, (8, 80), (8, 80))
    return gated if _same_gradients(gated, own, given) else None


def trained_rotation(own: Callable[..., Any], device: torch.device) -> Callable[..., Any] | None:
    """Return a replacement for `own` if a trial shows that it rotates each head's halves in bf16, else None.

    `own` takes q and k [1, heads, T, d], cosines and sines [1, T, d]. The trial covers gradients too. Other
    inputs are left to `own`.
    """

    def turned(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        fits = q.dim() == k.dim() == 4 and cos.shape == sin.shape == (1, *q.shape[2:])
        fits = fits and k.shape[2:] == q.shape[2:] and len(q) == len(k) == 1 and not q.shape[3] % 2
        plain = q.dtype == k.dtype == cos.dtype == sin.dtype == torch.bfloat16 and not (more or named)
        if not (fits and plain):
            return own(q, k, cos, sin, *more, **named)
        return _TrainedRotation.apply(q, k, cos.contiguous(), sin.contiguous())

    q, k, cos, sin = _trial_inputs(device, (1, 3, 5, 40), (1, 1, 5, 40), (1, 5, 40), (1, 5, 40))

    def both(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        return lambda *given: torch.cat(function(*given, cos.detach(), sin.detach()), 1)

    return turned if _same_gradients(both(turned), both(own), (q, k)) else None


def _trial_inputs(device: torch.device, *shapes: tuple[int, ...], seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Return random bf16 tensors that require gradients."""
    draw = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=draw).to(device, torch.bfloat16) for shape in shapes)
    return tuple(one.requires_grad_() for one in drawn)


def _same_gradients(
    one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...]
) -> bool:
    """Return True if two functions give nearly all the same bits, and nearly the same gradients."""
    got, wanted = one(*given), other(*given)
    if got.shape != wanted.shape or float((got == wanted).float().mean()) <= 0.95:
        return False
    (gradient,) = _trial_inputs(given[0].device, got.shape, seed=2)
    pairs = [
        (got, wanted),
        *zip(*(torch.autograd.grad(result, given, gradient) for result in (got, wanted)), strict=True),
    ]
    return all(
        bool((mine.float() - its.float()).abs().max() <= 0.02 * its.float().abs().max())
        for mine, its in pairs
    )
