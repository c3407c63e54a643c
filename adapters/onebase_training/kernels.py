"""Autograd functions of training: LoRA on 4-bit layers, and short attention.

Forwards, LoRA's products stay PEFT's own, in its order, so that a trained adapter gives the logits that it is
served with. PEFT keeps an fp32 copy of each layer's input for the backward pass; here the input itself is
kept, which layers with the same input share. The fp32 products of the backward pass are computed by oneDNN on
the CPU: MKL is half as fast on processors that are not Intel's.

On a GPU, long micro-batches in bf16 are multiplied on tensor cores by bf16 parts that sum to the fp32
matrices. This is as exact as fp32, without fp32 copies of inputs and gradients, whose transfer would take
half as long as all else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from onebase_engine.base.view import ROTARY, called_by, forward_with
from onebase_engine.kernels.reference import attention_weights

logger = logging.getLogger(__name__)

_ONEDNN: Any = None
if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    _ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


LONG = 2048
"""Tokens of a micro-batch from which on parts are worth their launches."""


def fuse(model: nn.Module, adapter: str) -> int:
    """Fuse the layers of a PeftModel that are plain LoRA on 4-bit weights. Returns their number."""
    count = 0
    layer: Any
    for layer in model.modules():
        if _is_plain(layer, adapter):
            layer.forward = _Forward(layer, adapter)
            count += 1
    return count


def fuse_norms(model: nn.Module) -> int:
    """Replace the norms of a model on a GPU by one kernel each, forwards and backwards, instead of ten.

    They keep nothing but the norm's input. Returns their number; 0 if Triton does not compile here.
    """
    return _replace(model, "the norms", lambda own, module: own.trained_norm(module))


def fuse_gates(model: nn.Module) -> int:
    """Fuse the work of gated MLPs between their products, keeping its two inputs; otherwise as
    `fuse_norms`."""
    return _replace(model, "what MLPs' gates let through", _gating)


def fuse_rotations(model: nn.Module) -> int:
    """Fuse the rotation of queries and keys by their positions, keeping neither; otherwise as
    `fuse_norms`."""
    return _replace(model, "rotary embeddings", _rotating)


def _replace(model: nn.Module, what: str, find: Callable[[Any, Any], Callable[..., Any] | None]) -> int:
    """Replace `forward` of modules. Returns the number of replaced ones.

    find: called with Triton's kernels and a module, returns the new `forward`, or None to leave the module. A
    view holds itself by these functions until the garbage collector runs.
    """
    found = []
    try:
        from onebase_engine.kernels import cuda_training

        for module in model.modules():
            if (forward := find(cuda_training, module)) is not None:
                found.append((module, forward))
    except Exception as error:
        logger.warning("PyTorch computes %s: %s: %s", what, type(error).__name__, error)
        return 0
    for module, forward in found:
        module.forward = forward
    return len(found)


def _gating(kernels: Any, module: Any) -> Callable[..., Any] | None:
    """Return a fused `forward` for a module that is down_proj(act(gate_proj(x)) * up_proj(x)) and no more, or
    None."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, nn.Module) for layer in layers) or not hasattr(module, "act_fn"):
        return None
    plain, act, weight = type(module).forward, module.act_fn, next(module.parameters(), None)
    if weight is None:
        return None

    def between(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute what the module itself computes between its products."""
        alone = SimpleNamespace(
            gate_proj=lambda x: gate, up_proj=lambda x: up, down_proj=lambda x: x, act_fn=act
        )
        result: torch.Tensor = plain(alone, gate)
        return result

    try:
        gated = kernels.trained_gate(between, weight.device)
    except AttributeError:  # it does something else too
        return None
    if gated is None:
        return None

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if args or options:
            return plain(module, x, *args, **options)
        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))

    return forward


def _rotating(kernels: Any, module: nn.Module) -> Callable[..., Any] | None:
    turn = called_by(module, ROTARY)
    device = next((one.device for one in module.parameters()), None)
    if turn is None or device is None:
        return None
    turned = kernels.trained_rotation(turn, device)
    return None if turned is None else forward_with(module, {ROTARY: turned})


def _is_plain(layer: Any, adapter: str) -> bool:
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(layer, LoraLayer)
        and adapter in layer.lora_A
        and type(layer.get_base_layer()).__name__ == "Linear4bit"
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and adapter not in layer.lora_variant
        and layer.lora_A[adapter].bias is None
        and layer.lora_B[adapter].bias is None
    )


class _Forward:
    """Replaces a layer's `forward`. Without gradients, or with the adapter off, PEFT's own runs."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self._layer = layer
        self._adapter = adapter
        self._plain = type(layer).forward

    def __call__(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        layer = self._layer
        if layer.disable_adapters or not torch.is_grad_enabled() or args or options:
            plain: torch.Tensor = self._plain(layer, x, *args, **options)
            return plain
        output: torch.Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            x,
            layer.lora_A[self._adapter].weight,
            layer.lora_B[self._adapter].weight,
            layer.scaling[self._adapter],
            layer.base_layer,
        )
        return output


class _FusedLora(torch.autograd.Function):
    """Computes y = base(x) + (scale * (x32 @ A.T) @ B.T).to(base dtype)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, base: Any
    ) -> torch.Tensor:
        """Compute x [..., in], a [r, in], b [out, r] -> [..., out] in the base's dtype."""
        output: torch.Tensor = base(x)
        ctx.parts = _takes_parts(x, a)
        if ctx.parts:
            hidden = _parts(_by_parts(x.flatten(0, -2), _parts(a)) * scale)
            output += _of_parts(hidden, _parts(b)).view_as(output)
        else:
            hidden = nn.functional.linear(x.to(a.dtype), a)
            output += (nn.functional.linear(hidden, b) * scale).to(output.dtype)
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scale, ctx.weight = scale, base.weight
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden, a, b = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        if ctx.parts:
            parts = _parts(_with_parts(rows, _parts(b)) * ctx.scale)
            b_gradient = _with_parts(rows.T, hidden)
            a_gradient = _parts_with(parts, flat)
        else:
            hidden = hidden.view(-1, hidden.shape[-1])
            rows32, x32 = rows.to(b.dtype), flat.to(a.dtype)
            hidden_gradient = _product(rows32, (b.T * ctx.scale).contiguous())
            b_gradient = _product((hidden.T * ctx.scale).contiguous(), rows32.T).T
            a_gradient = _product(hidden_gradient.T.contiguous(), x32.T)
        if not ctx.needs_input_grad[0]:
            return None, a_gradient, b_gradient, None, None
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(ctx.weight.data.view(-1, 1), ctx.weight.quant_state).to(rows.dtype)
        x_gradient = rows @ weight
        if ctx.parts:
            x_gradient = _of_parts(parts, _parts(a).permute(2, 1, 0), onto=x_gradient)
        else:
            x_gradient += _product(hidden_gradient, a.T.contiguous()).to(x_gradient.dtype)
        return x_gradient.view(x.shape), a_gradient, b_gradient, None, None


def _takes_parts(x: torch.Tensor, a: torch.Tensor) -> bool:
    long = x.numel() >= LONG * x.shape[-1]
    fits = long and (x.dtype, a.dtype) == (torch.bfloat16, torch.float32)
    return fits and _has_products_by_parts(x.device)


@functools.cache
def _has_products_by_parts(device: torch.device) -> bool:
    """Return True if a trial shows that a device multiplies bf16 on tensor cores with fp32 sums."""
    if device.type in ("cpu", "meta"):
        return device.type == "meta"
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return False
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(16, 64, generator=draw).to(device) for _ in range(2))
        product = _by_parts(left.bfloat16(), _parts(right))
        error = (product - left.bfloat16().double() @ right.double().T).abs().max()
    except (RuntimeError, NotImplementedError) as why:
        logger.warning("training multiplies in fp32: %s", str(why).partition("\n")[0][:300])
        return False
    if not (exact := float(error) < 1e-4):
        logger.warning("training multiplies in fp32: the trial's products are %g away", float(error))
    return exact


def _parts(matrix: torch.Tensor) -> torch.Tensor:
    """Split an fp32 matrix [m, n] into three bf16 parts, of eight bits each, that sum to it: [m, 3, n]."""
    split = _splitter(matrix.device)
    if split is not None:
        made: torch.Tensor = split(matrix.contiguous())
        return made
    return _split(matrix)


def _split(matrix: torch.Tensor) -> torch.Tensor:
    first = matrix.bfloat16()
    rest = matrix - first
    second = rest.bfloat16()
    return torch.stack([first, second, (rest - second).bfloat16()], 1)


def _splitter(device: torch.device) -> Any:
    """Return Triton's splitter for a GPU; None if PyTorch splits by six operators."""
    return _tried_splitter(device) if device.type == "cuda" else None


@functools.cache
def _tried_splitter(device: torch.device) -> Any:
    """Return Triton's splitter; None if it does not compile here, or differs from PyTorch."""
    try:
        from onebase_engine.kernels import cuda_training

        draw = torch.Generator().manual_seed(0)
        matrix = torch.randn(30, 50, generator=draw).to(device)
        same = torch.equal(cuda_training.split(matrix), _split(matrix))
    except Exception as error:
        logger.warning("PyTorch splits matrices: %s: %s", type(error).__name__, error)
        return None
    if not same:
        logger.warning("PyTorch splits matrices: the trial's parts are others")
    return cuda_training.split if same else None


def _by_parts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] bf16 @ right.T in fp32, [m, n]; right: parts of [n, k]. left is read once, as it
    is."""
    return _multiplied(left, right.flatten(0, 1).T).view(len(left), -1, 3).sum(2)


def _with_parts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] bf16 @ right in fp32, [m, n]; right: parts of [k, n]."""
    return _multiplied(left, right.flatten(1, 2)).view(len(left), 3, -1).sum(1)


def _parts_with(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left.T @ right [k, n] bf16 in fp32, [m, n]; left: parts of [k, m]."""
    return _multiplied(left.flatten(1, 2).T, right).view(3, -1, right.shape[1]).sum(0)


def _multiplied(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] @ right [k, n], both bf16, summed and returned in fp32, which PyTorch has for GPUs
    alone."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _of_parts(left: torch.Tensor, right: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """Return left @ right.T (added to `onto`) rounded to bf16, [m, n], from parts of [m, k] and [n, k].

    Only six of the nine pairs are multiplied; the others are too small for fp32.
    """
    first, second, third = left.unbind(1)
    one, two, three = right.unbind(1)
    wide = torch.cat([first, first, second, second, first, third], 1)
    other = torch.cat([one, two, one, two, three, one], 1)
    return wide @ other.T if onto is None else onto.addmm_(wide, other.T)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] @ right.T, right [n, k], in fp32."""
    if _ONEDNN is not None and left.device.type == "cpu":
        product: torch.Tensor = _ONEDNN(left, right, None, "none", [], "")
        return product
    return left @ right.T


class ShortAttention(torch.autograd.Function):
    """Causal attention by plain products in the order of transformers' eager attention: scores in the model's
    dtype, softmax in fp32, weights rounded back. Grouped heads share their keys."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend: q [n, heads, L, d], k [n, kv heads, L, d], v [n, kv heads, L, e] -> [n, heads, L, e]."""
        n, heads, length, size = q.shape
        shared = k.shape[1]
        groups = heads // shared
        q = q.reshape(n * shared, groups * length, size)
        k, v = k.reshape(n * shared, length, size), v.reshape(n * shared, length, -1)
        raw = torch.bmm(q, k.transpose(1, 2)).view(-1, groups, length, length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        weights = attention_weights(raw, hidden, scale).view(n * shared, groups * length, length)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape, ctx.scale = (n, heads, length), scale
        return torch.bmm(weights, v).view(n, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        n, heads, length = ctx.shape
        shared = len(k) // n
        gradient = gradient.reshape(n * shared, -1, v.shape[-1])
        v_gradient = torch.bmm(weights.transpose(1, 2), gradient)
        inner = torch.bmm(gradient, v.transpose(1, 2)).float()
        weights32 = weights.float()
        inner = (inner - (inner * weights32).sum(-1, keepdim=True)).mul_(weights32)
        scores = inner.mul_(ctx.scale).to(q.dtype)
        q_gradient = torch.bmm(scores, k).view(n, heads, length, -1)
        k_gradient = torch.bmm(scores.transpose(1, 2), q).view(n, shared, length, -1)
        return q_gradient, k_gradient, v_gradient.view(n, shared, length, -1), None
