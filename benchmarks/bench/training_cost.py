"""Launches, operations, traffic and memory of a training step on a GPU, counted on tensors without memory.

OneBase's own trainer, and transformers with PEFT as TRL runs them, both at the shape of an 8B in NF4. What a
GPU would take for it is predicted from what is counted; nothing of it was measured on one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import random_base as bases
from bench.gpu_report import Findings, shown
from onebase_adapters.training import kernels, objectives
from onebase_adapters.training.batches import MicroBatch
from onebase_adapters.training.data.dataset import Sample
from onebase_adapters.training.events import OpenGate
from onebase_adapters.training.objectives import Supervised
from onebase_adapters.training.recipe import Recipe
from onebase_adapters.training.trainable import Trainable
from onebase_engine.base.attach import quantized_module
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import NESTED_BLOCKSIZE
from onebase_engine.base.manifest import QuantizedLayer
from onebase_engine.kernels import cuda_training
from onebase_server.routing.capacity import BANDWIDTHS, BEST, LAUNCH, REACHED, WORST

META = torch.device("meta")
ROWS, TOKENS, RANK = 16, 512, 16
"""Size of a step: rows, tokens of each, all of them supervised, and the adapter's rank, on all linear
layers."""
RATES = {
    "bf16": (0.7 * 989e12, 0.5 * 989e12),
    "fp32": (0.7 * 67e12, 0.35 * 67e12),
    "attention": (0.4 * 989e12, 0.25 * 989e12),
}
"""Operations a second of an H100, at best and at worst: parts of its data sheet's, as products of such sizes
reach them elsewhere. PyTorch computes products in fp32 without tensor cores."""
_CHUNK, _TILE = 4096, 32768
"""Tokens and words of a tile of logits, as TRL 1.16 has them."""


@dataclass(frozen=True)
class Op:
    """kind: a key of RATES, `unpack` or `other`. launches: kernels."""

    name: str
    kind: str
    launches: int
    flops: float
    moved: float

    def seconds(self, case: int) -> float:
        """Return the seconds on an H100, BEST or WORST; kernels follow each other as in a CUDA graph, or the
        host is late."""
        computed = self.flops / RATES[self.kind][case] if self.flops else 0.0
        bandwidth = BANDWIDTHS["h100"] * 1e9 * REACHED[case]
        return max(computed, self.moved / bandwidth) + self.launches * LAUNCH[case][0]


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators and the memory of what they make, while it is active. answer: to what is asked of a tensor,
    which has no numbers; each time a GPU is waited for."""

    def __init__(self, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.live = self.peak = self.syncs = 0
        self._answer = answer
        self._known: set[int] = set()

    def add(self, name: str, kind: str, flops: float, tensors: Sequence[Any], launches: int = 1) -> None:
        self.ops.append(Op(name, kind, launches, flops, sum(map(_moved, tensors))))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += 1
            return self._answer
        made = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if _is_meta(one)]
        results = [one for one in tree_leaves(made) if _is_meta(one)]
        if not results or func.is_view:
            return made
        name = func._schema.name.partition("::")[2]
        for one in results:
            self._hold(one, given)
        if name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "detach", "lift_fresh"):
            return made
        if name == "gemm_4bit":
            self._gemm_4bit(args, results[0])
        elif name == "dequantize_4bit":
            self.add(name, "unpack", 0.0, [*given, *results])
        elif name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = [one for one in given if one.dim() > 1][-2:]
            kind = "fp32" if left.dtype == torch.float32 else "bf16"
            self.add(name, kind, 2.0 * left.numel() * right.shape[-1], [*given, *results])
        else:
            same = {one.untyped_storage()._cdata for one in given}
            if name in ("zero_", "fill_"):
                given = []
            elif name.startswith("copy_"):
                given, results = given[1:], results
            elif name.endswith("_"):  # read and written
                results = [one for one in results if one.untyped_storage()._cdata in same]
            self.add(name, "other", 0.0, [*given, *results])
        return made

    def _gemm_4bit(self, args: Any, result: torch.Tensor) -> None:
        """bitsandbytes on a GPU, from 1,536 rows on: statistics and weights unpacked, then cuBLAS."""
        x, packed, shape = args[:3]
        out, size = shape
        weight = torch.empty(out, size, dtype=x.dtype, device=META)
        statistics = torch.empty(out * size // bases.BLOCKSIZE, device=META)
        self.add("dequantize_blockwise", "unpack", 0.0, [statistics, statistics])
        self.add("absmax + offset", "unpack", 0.0, [statistics, statistics])
        self.add("dequantize_4bit", "unpack", 0.0, [packed, statistics, weight])
        self.add("mm", "bf16", 2.0 * x.numel() * out, [x, weight, result])
        self.peak = max(self.peak, self.live + weight.nbytes)

    def _hold(self, tensor: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or any(one.untyped_storage()._cdata == key for one in given):
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _moved(tensor: torch.Tensor) -> float:
    """Bytes that a kernel reads or writes of it; what is broadcast it reads once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in pairs:
        count *= size if stride else 1
    return count * tensor.element_size()


class _Flash(torch.autograd.Function):
    """Attention as PyTorch's flash kernels compute it: one kernel, and backwards three, and 2.5 times the
    work. k and v may have fewer heads, whose gradients are then summed from those of all."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counted: Counted
    ) -> torch.Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        ctx.counted, ctx.flops = counted, 2.0 * q.numel() * q.shape[-2]  # two products, half of each masked
        counted.add("attention", "attention", ctx.flops, [q, k, v, output])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output = ctx.saved_tensors
        wide, exact = torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
        ctx.counted.add(
            "attention backwards", "attention", 2.5 * ctx.flops,
            [q, k, v, output, gradient, q, wide, wide, exact, exact], 3,
        )  # fmt: skip
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if k.shape != q.shape:
            for _ in range(2):
                ctx.counted.add("sum over heads", "other", 0.0, [wide, k])
        return (*made, None)


class _Norm(torch.autograd.Function):
    """One kernel, and one backwards, as `fuse_norms` has them on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counted: Counted) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.counted = counted
        y = torch.empty_like(x)
        counted.add("norm", "other", 0.0, [x, y])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        made = torch.empty_like(x)
        ctx.counted.add("norm backwards", "other", 0.0, [x, gradient, made])
        return made, None


class _Gate(torch.autograd.Function):
    """Gates as `fuse_gates` computes them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, counted: Counted) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.counted = counted
        y = torch.empty_like(gate)
        counted.add("gate", "other", 0.0, [gate, up, y])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = ctx.saved_tensors
        made = tuple(torch.empty_like(one) for one in given)
        ctx.counted.add("gate backwards", "other", 0.0, [*given, gradient, *made])
        return (*made, None)


class _Rotation(torch.autograd.Function):
    """Rotations as `fuse_rotations` computes them."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, counted: Counted
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.counted = counted
        made = torch.empty_like(q), torch.empty_like(k)
        counted.add("rotation", "other", 0.0, [q, k, cos, sin, *made])
        return made

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In memory a token's heads come one after the other.
        made = tuple(
            one.new_empty_strided(one.shape, (one.numel(), one.shape[3], one.shape[1] * one.shape[3], 1))
            for one in (q, k)
        )
        ctx.counted.add("rotation backwards", "other", 0.0, [q, k, *ctx.saved_tensors, *made])
        return (*made, None, None, None)


class _Kernels:
    """Stand-ins for Triton's kernels, which have nothing to try on tensors without memory."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def trained_norm(self, module: nn.Module) -> Any:
        norm: Any = _Norm.apply
        return (lambda x: norm(x, self._counted)) if type(module).__name__ == "LlamaRMSNorm" else None

    def trained_gate(self, own: Any, device: torch.device) -> Any:
        gate: Any = _Gate.apply
        return lambda *given: gate(*given, self._counted)

    def trained_rotation(self, own: Any, device: torch.device) -> Any:
        rotation: Any = _Rotation.apply
        return lambda *given: rotation(*given, self._counted)


def _fuse(model: nn.Module, counted: Counted) -> None:
    own = _Kernels(counted)
    functions = {name: getattr(own, name) for name in ("trained_norm", "trained_gate", "trained_rotation")}
    with mock.patch.multiple(cuda_training, **functions):
        for fuse_parts in (kernels.fuse_norms, kernels.fuse_gates, kernels.fuse_rotations):
            if not fuse_parts(model):
                raise RuntimeError(f"{fuse_parts.__name__} finds nothing in this model")


class _Losses:
    """Two kernels over the logits, as Triton's are on a GPU."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        self._counted.add("log sums", "other", 0.0, [logits])
        return torch.empty(len(logits), dtype=torch.float32)

    def overwrite_with_gradient(self, logits: torch.Tensor, *others: torch.Tensor) -> None:
        self._counted.add("gradient of the loss", "other", 0.0, [logits, logits])


@contextlib.contextmanager
def counting(answer: bool) -> Iterator[Counted]:
    """answer: whether a batch is one row alone, and its mask hides nothing, as transformers asks."""
    functional: Any = nn.functional
    counted, own = Counted(answer), functional.scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
        return _Flash.apply(q, k, v, counted)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = attention
    try:
        with counted:
            yield counted
    finally:
        functional.scaled_dot_product_attention = own


def meta_base(layers: int) -> nn.Module:
    """An 8B's first layers in NF4, without memory."""
    from transformers import LlamaConfig

    shape = bases.SHAPES["8b"] | {"num_hidden_layers": layers}
    tree: Any = empty_base(LlamaConfig(**shape, tie_word_embeddings=False), dtype=torch.bfloat16)

    def octets(number: int) -> torch.Tensor:
        return torch.empty(number, dtype=torch.uint8, device=META)

    head = tree.get_output_embeddings()
    for name, module in list(tree.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        out, size = module.out_features, module.in_features
        blocks = out * size // bases.BLOCKSIZE
        described = QuantizedLayer(
            kind="Linear4bit", size_in=size, size_out=out, quant_type="nf4", blocksize=bases.BLOCKSIZE,
            shape=(out, size), nested_blocksize=NESTED_BLOCKSIZE,
        )  # fmt: skip
        statistics = {
            "absmax": octets(blocks),
            "code": torch.empty(16, device=META),
            "offset": torch.empty((), device=META),
            "nested_absmax": torch.empty(-(-blocks // NESTED_BLOCKSIZE), device=META),
            "nested_code": torch.empty(256, device=META),
        }
        quantized_module(tree, name, described, octets(out * size // 2)[:, None], statistics)
    for module in tree.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(META)
    tree.is_loaded_in_4bit = True
    tree.requires_grad_(False)
    tree.eval()
    made: nn.Module = tree
    return made


def onebase_step(layers: int, checkpointing: bool) -> Counted:
    """The trainer's own step, up to the gradients."""
    recipe = Recipe(
        r=RANK, alpha=2.0 * RANK, targets=("all-linear",), gradient_checkpointing=checkpointing,
        learning_rate=1e-4,
    )  # fmt: skip
    ids, taught = np.zeros(TOKENS, dtype=np.int32), np.ones(TOKENS, dtype=np.bool_)
    taught[0] = False
    sample = Sample(ids, taught, line=1)
    batch = MicroBatch((sample,) * ROWS, tuple(range(ROWS)))
    with META:
        trainable = Trainable(meta_base(layers), recipe, OpenGate())
        objective = Supervised(trainable)
        with counting(False) as counted:
            _fuse(trainable.model, counted)

            def own(logits: torch.Tensor) -> _Losses:  # a mock would keep the logits
                return _Losses(counted)

            def split(matrix: torch.Tensor) -> torch.Tensor:
                made = matrix.new_empty(len(matrix), 3, matrix.shape[1], dtype=torch.bfloat16)
                counted.add("parts", "other", 0.0, [matrix, made])
                return made

            with (
                mock.patch.object(objectives, "_kernels", own),
                mock.patch.object(kernels, "_splitter", return_value=split),
            ):
                loss, _ = objective.loss(batch)
                (loss / ROWS).backward()  # type: ignore[no-untyped-call]
    return counted


def trl_step(layers: int, checkpointing: bool, dtype: torch.dtype, liger: bool = False) -> Counted:
    """transformers and PEFT with an adapter of this dtype, and the head of TRL 1.16. liger: norms, gates and
    rotations are one kernel each way, as its `use_liger_kernel` has them by another package; their bytes are
    taken to be those of ours."""
    from peft import LoraConfig, get_peft_model

    with META:
        base: Any = meta_base(layers)
        base.set_attn_implementation("sdpa")
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(bases.ALL_LINEAR)
        )
        model: Any = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
        head = base.get_output_embeddings().weight
        with counting(True) as counted:
            if liger:
                _fuse(model, counted)
            states = base.model(input_ids=ids, use_cache=False).last_hidden_state
            taught = states[:, :-1].reshape(-1, states.shape[-1])
            losses = _TiledHead.apply(taught, head, counted)  # type: ignore[no-untyped-call]
            losses.sum().backward()
    return counted


class _TiledHead(torch.autograd.Function):
    """TRL's fused head: products by tiles and one kernel over each; backwards all of it again."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, head: torch.Tensor, counted: Counted) -> torch.Tensor:
        ctx.save_for_backward(states, head)
        ctx.counted = counted
        for part in torch.split(states, _CHUNK):
            for words in torch.split(head, _TILE):
                tile = part @ words.T
                counted.add("a tile's sums", "other", 0.0, [tile])
        return states.new_zeros(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        states, head = ctx.saved_tensors
        made = states.new_zeros(states.shape, dtype=torch.float32)
        parts = zip(torch.split(states, _CHUNK), torch.split(made, _CHUNK), strict=True)
        for part, own in parts:
            for words in torch.split(head, _TILE):
                tile = part @ words.T
                ctx.counted.add("a tile's gradient", "other", 0.0, [tile, tile])
                flops = 2.0 * tile.numel() * words.shape[1]
                ctx.counted.add("addmm", "bf16", flops, [tile, words, own, own])
        return made.to(states.dtype), None, None


@dataclass(frozen=True)
class Cost:
    """Cost of a step: kernels, and those of a layer among them; waits for the device; operations and bytes
    moved, by kind; bytes held at the peak beside base, adapter and optimizer. seconds: at best and at
    worst."""

    launches: float
    layer: float
    syncs: int
    flops: dict[str, float]
    moved: dict[str, float]
    held: float
    seconds: tuple[float, float]

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second, at best and at worst."""
        return ROWS * TOKENS / self.seconds[BEST], ROWS * TOKENS / self.seconds[WORST]


def cost(step: Callable[[int], Counted]) -> Cost:
    """Return the cost of the whole model from steps of two layers and of three. step: of so many layers."""
    layers: int = bases.SHAPES["8b"]["num_hidden_layers"]
    two, three = step(2), step(3)

    def whole(value: Callable[[Counted], float]) -> float:
        return value(two) + (layers - 2) * (value(three) - value(two))

    def launches(counted: Counted) -> int:
        return sum(op.launches for op in counted.ops)

    def seconds(case: int) -> float:
        late: float = LAUNCH[case][1]
        device = whole(lambda counted: sum(op.seconds(case) for op in counted.ops))
        return max(device, whole(launches) * late)

    def by_kind(value: Callable[[Op], float]) -> dict[str, float]:
        def of(kind: str) -> float:
            return whole(lambda counted: sum(value(op) for op in counted.ops if op.kind == kind))

        return {kind: of(kind) for kind in (*RATES, "unpack", "other")}

    return Cost(
        whole(launches),
        launches(three) - launches(two),
        three.syncs,
        by_kind(lambda op: op.flops),
        by_kind(lambda op: op.moved),
        whole(lambda counted: counted.peak),
        (seconds(BEST), seconds(WORST)),
    )


DEFAULT = "TRL, as it is by itself"
RUNS: dict[str, Callable[[int], Counted]] = {
    DEFAULT: lambda layers: trl_step(layers, True, torch.bfloat16),
    "TRL without checkpointing": lambda layers: trl_step(layers, False, torch.bfloat16),
    "TRL with adapters in fp32": lambda layers: trl_step(layers, True, torch.float32),
    "TRL with Liger's kernels": lambda layers: trl_step(layers, True, torch.bfloat16, liger=True),
    "TRL with Liger's kernels, without checkpointing": lambda layers: trl_step(
        layers, False, torch.bfloat16, liger=True
    ),
    "OneBase": lambda layers: onebase_step(layers, False),
    "OneBase with checkpointing": lambda layers: onebase_step(layers, True),
}
"""TRL by itself checkpoints activations, and trains adapters in bf16; OneBase does neither where there is
memory."""


def predict(found: Findings) -> None:
    """Predict a step on a GPU that nobody ran it on. The optimizer's 1 to 3 ms are left out."""
    title = (
        f"PREDICTED for an H100, not measured: steps of {ROWS} rows of {TOKENS} tokens, an 8B, rank {RANK}"
    )
    headings = ["training by", "launches", "a layer", "PFLOP", "TB moved", "GB held", "tokens/s", "to TRL's"]
    add = found.table(title, headings)
    plain = cost(RUNS[DEFAULT])
    for name, step in RUNS.items():
        one = plain if name == DEFAULT else cost(step)
        ratios = sorted(mine / its for mine, its in zip(one.rates, plain.rates, strict=True))
        add(
            name, one.launches, one.layer, sum(one.flops.values()) / 1e15, sum(one.moved.values()) / 1e12,
            one.held / 1e9, " to ".join(shown(rate) for rate in reversed(one.rates)),
            " to ".join(f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
