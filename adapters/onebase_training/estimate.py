"""Estimate parameters, memory by part and time of a run from the base's config alone. Nothing is loaded.

It also decides the settings that depend on memory: `micro_tokens` and `gradient_checkpointing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from onebase_engine.base.experts import expert_matrices, experts_per_token
from onebase_engine.base.layers import LayerShape, empty_base
from onebase_engine.base.load import Quantization, estimate_memory
from onebase_training.attention import SHORT
from onebase_training.losses import CHUNK
from onebase_training.recipe import Recipe, RecipeError
from onebase_training.trainable import target_layers, target_parameters

MICRO_TOKENS = (8192, 4096, 2048, 1024)
"""Choices of "auto", in tokens; on the CPU the largest ones gain nothing."""
_CPU_MICRO_TOKENS = 2048
_SHARE = 0.85
"""Part of the memory that "auto" plans with; the rest is a margin for what no estimate covers."""
_PROCESS = {"cpu": 600_000_000, "cuda": 700_000_000}
"""Bytes of a process that has loaded torch (CUDA: of its context), and of its kernels' own buffers."""
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0625, "paged_adamw": 8.0, "paged_adamw_8bit": 2.0625}
"""Bytes of a parameter's two moments: fp32, or one byte each and an fp32 scale for 256 of them."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a run takes.

    adapter_bytes: of the file, fp32. base_bytes: 0 if the base is resident already. adapter_memory:
    weights and gradients. process_bytes: the interpreter, torch, kernels. memory_limit: None if unknown.
    seconds: of the training steps; None if the amount of data or the machine is unknown.
    """

    parameters: int
    adapter_bytes: int
    base_parameters: int
    base_bytes: int
    adapter_memory: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    process_bytes: int
    micro_tokens: int
    gradient_checkpointing: bool
    flops_per_token: int
    total_tokens: int | None = None
    seconds: float | None = None
    memory_limit: int | None = None
    advice: str = ""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        adapter = self.adapter_memory + self.optimizer_bytes
        return self.base_bytes + adapter + self.activation_bytes + self.logits_bytes + self.process_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit; True if no limit is known."""
        return self.memory_limit is None or self.total <= self.memory_limit

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and `total` and `fits`."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the settings decided here."""
        return replace(
            recipe, micro_tokens=self.micro_tokens, gradient_checkpointing=self.gradient_checkpointing
        )


def estimate(
    config: Any,
    recipe: Recipe,
    *,
    quantization: Quantization = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    longest_row: int,
    total_tokens: int | None = None,
    supervised_part: float = 1.0,
    labels: int = 0,
    memory_limit: int | None = None,
    base_resident: bool = False,
    rate: float | None = None,
) -> Estimate:
    """Estimate a run with this recipe, and decide the settings that are "auto" because of memory.

    Args:
        config: the base's, from transformers. recipe: resolved but for memory.
        longest_row: tokens of the longest row; of a preference, of both its replies with the prompt.
        total_tokens: of the whole run, all epochs.
        supervised_part: of the tokens; all, if nothing is known.
        labels: of a classifier, which computes no logits of the vocabulary; 0 for text.
        memory_limit: bytes that the process may take.
        base_resident: the base is in memory already, of another process, and costs nothing.
        rate: FLOP/s of the machine, as `machine.measured_rate`.

    Raises:
        RecipeError: a target is not a linear layer of this base.
    """
    shapes = _Shapes.of(config, recipe, quantization, dtype, torch.device(device).type, base_resident)
    shapes = replace(shapes, row=max(1, longest_row), supervised_part=supervised_part, limit=memory_limit)
    if labels:
        shapes = shapes.of_classifier(labels, config.get_text_config().hidden_size)
    found = _decide(shapes, recipe)
    seconds = None
    if rate and total_tokens is not None:
        seconds = total_tokens * found.flops_per_token / rate
    advice = "" if found.fits else _advice(shapes, recipe)
    return replace(found, total_tokens=total_tokens, seconds=seconds, advice=advice)


def adapter_parameters(targets: Mapping[str, nn.Linear], ranks: Mapping[str, int], *, dora: bool) -> int:
    """Return the number of an adapter's parameters.

    A is [r, in] and B is [out, r] (Hu et al. 2021, section 4.1); DoRA has a magnitude for each output.
    """
    return sum(
        ranks[name] * (layer.in_features + layer.out_features) + (layer.out_features if dora else 0)
        for name, layer in targets.items()
    )


def adapted_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear | LayerShape]:
    """Return the linear layers and the parameters of experts that `targets` mean, by full name.

    Raises RecipeError: a target means neither.
    """
    return {**target_layers(model, targets), **target_parameters(model, targets)}


def expert_parameters(experts: Mapping[str, LayerShape], ranks: Mapping[str, int]) -> int:
    """Return the number of an adapter's parameters on those of experts: each has an A and a B of its own."""
    return sum(
        ranks[name] * layer.count * (layer.size_in + layer.size_out) for name, layer in experts.items()
    )


def ranks_of(targets: Mapping[str, nn.Linear | LayerShape], recipe: Recipe) -> dict[str, int]:
    """Return each target's rank: that of the first name in `rank_pattern` that its own name ends with, else
    r.

    Raises RecipeError: a pattern's name is that of no target.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for end in getattr(recipe, field):
            if not any(f".{name}".endswith(f".{end}") for name in targets):
                known = sorted({name.rpartition(".")[2] for name in targets})
                raise RecipeError(field, f"{field}: {end!r} is not a target; there are {', '.join(known)}")
    return {
        name: next(
            (rank for end, rank in recipe.rank_pattern.items() if f".{name}".endswith(f".{end}")), recipe.r
        )
        for name in targets
    }


@dataclass(frozen=True)
class _Shapes:
    """Shapes of an estimate except the size of a micro-batch. row: tokens of the longest row. limit:
    bytes."""

    parameters: int
    base_parameters: int
    base_bytes: int
    activations: Activations
    optimizer: str
    device: str
    linear_weights: int
    head_weights: int
    row: int = 1
    supervised_part: float = 1.0
    limit: int | None = None

    @classmethod
    def of(
        cls,
        config: Any,
        recipe: Recipe,
        quantization: Quantization,
        dtype: torch.dtype,
        device: str,
        base_resident: bool,
    ) -> _Shapes:
        with torch.device("meta"):  # otherwise each parameter takes memory until it is moved there
            model = empty_base(config)
        memory = estimate_memory(model, quantization, dtype=dtype)
        targets = target_layers(model, recipe.targets)
        experts = target_parameters(model, recipe.targets)
        ranks = ranks_of({**targets, **experts}, recipe)
        fused, on_cpu = quantization == "nf4", device == "cpu"
        head: Any = model.get_output_embeddings()
        layers = target_layers(model, ["all-linear"]).values()
        return cls(
            parameters=adapter_parameters(targets, ranks, dora=recipe.use_dora)
            + expert_parameters(experts, ranks),
            base_parameters=memory.parameters,
            base_bytes=0 if base_resident else memory.total,
            activations=activations_of(
                model, targets, ranks, recipe, dtype, fused=fused, on_cpu=on_cpu, experts=experts
            ),
            optimizer=recipe.optimizer,
            device=device,
            linear_weights=sum(layer.in_features * layer.out_features for layer in layers)
            + experts_per_token(model.config.get_text_config())
            * sum(one.sizes[1] * one.sizes[2] for one in expert_matrices(model)),
            head_weights=head.weight.numel(),
        )

    def of_classifier(self, labels: int, hidden: int) -> _Shapes:
        """Return the same with a trained head [labels, hidden] in the place of the output head."""
        parameters = self.parameters + labels * hidden
        return replace(self, parameters=parameters, supervised_part=0.0, head_weights=labels * hidden)

    def with_micro_batch(self, tokens: int, checkpointing: bool) -> Estimate:
        """Return the estimate for micro-batches of `tokens` tokens."""
        return Estimate(
            parameters=self.parameters,
            adapter_bytes=4 * self.parameters,
            base_parameters=self.base_parameters,
            base_bytes=self.base_bytes,
            adapter_memory=8 * self.parameters,
            optimizer_bytes=round(_OPTIMIZER_BYTES[self.optimizer] * self.parameters),
            activation_bytes=self.activations.kept(tokens, self.row, checkpointing),
            logits_bytes=self.activations.of_logits(max(1, round(tokens * self.supervised_part))),
            process_bytes=_PROCESS.get(self.device, _PROCESS["cuda"]),
            micro_tokens=tokens,
            gradient_checkpointing=checkpointing,
            flops_per_token=self._flops_per_token(checkpointing),
            memory_limit=self.limit,
        )

    def _flops_per_token(self, checkpointing: bool) -> int:
        """Return the FLOPs a token: two a weight forwards, two backwards to the inputs, two for the adapter's
        gradients."""
        passes = 3 if checkpointing else 2
        head = self.head_weights * self.supervised_part
        return round(2 * passes * self.linear_weights + 4 * head + 2 * (passes + 1) * self.parameters)

    def choices(self, recipe: Recipe) -> Iterator[tuple[int, bool]]:
        """Return the choices from the fastest to the smallest. Keeping activations saves a third of the work,
        so that it comes first."""
        if isinstance(recipe.micro_tokens, int):
            sizes = [max(recipe.micro_tokens, self.row)]
        else:
            rows = recipe.batch_size if isinstance(recipe.batch_size, int) else 16
            most = _CPU_MICRO_TOKENS if self.device == "cpu" else MICRO_TOKENS[0]
            most = min(most, max(1024, rows * self.row))
            given = {max(self.row, size) for size in MICRO_TOKENS if size <= most or size == 1024}
            sizes = sorted(given, reverse=True)
        modes = [False, True] if recipe.gradient_checkpointing == "auto" else [recipe.gradient_checkpointing]
        return ((size, bool(checkpointing)) for checkpointing in modes for size in sizes)


def _decide(shapes: _Shapes, recipe: Recipe) -> Estimate:
    """Return the first plan that fits easily, else the smallest one."""
    for tokens, checkpointing in shapes.choices(recipe):
        found = shapes.with_micro_batch(tokens, checkpointing)
        if shapes.limit is None or found.total <= _SHARE * shapes.limit:
            break
    return found


def _advice(shapes: _Shapes, recipe: Recipe) -> str:
    """Return a sentence with the memory needed, and changes each of which makes the run fit."""

    def fits(settings: Recipe, longest: int = shapes.row, rank: int = recipe.r) -> bool:
        parameters = shapes.parameters * rank // recipe.r
        smaller = replace(shapes, parameters=parameters, optimizer=settings.optimizer, row=longest)
        return _decide(smaller, settings).fits

    pinned = []
    if recipe.gradient_checkpointing is False:
        pinned.append("gradient_checkpointing = true")
    if isinstance(recipe.micro_tokens, int) and recipe.micro_tokens > shapes.row:
        pinned.append("micro_tokens = auto")
    free = replace(recipe, gradient_checkpointing="auto", micro_tokens="auto")
    small = replace(free, optimizer="adamw_8bit")
    ways = []
    if pinned and fits(free):
        ways.append(" and ".join(pinned))
    else:
        if shorter := next((size for size in _halves(shapes.row, 64) if fits(free, size)), None):
            ways.append(f"max_length = {shorter}")
        if not recipe.optimizer.endswith("8bit") and fits(small):
            ways.append("optimizer = adamw_8bit")
        if rank := next((rank for rank in _halves(recipe.r, 1) if fits(free, rank=rank)), None):
            ways.append(f"r = {rank}")
        ways = [" and ".join([*pinned, way]) for way in ways]
        if not ways and fits(small, 64, 1):
            ways.append("a smaller max_length, a smaller r and optimizer = adamw_8bit together")
    least, limit = _decide(shapes, recipe).total, shapes.limit or 0
    remedy = f"Set {', or '.join(ways)}" if ways else "Choose a smaller base, or a machine with more memory"
    return f"the run would take {least / 1e9:.1f} GB of memory and may take {limit / 1e9:.1f} GB. {remedy}"


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


_FP32 = 4
_CHUNK_COPIES = 3
"""Copies of a chunk of the loss: its logits, their exponentials, and the temporary between."""
_WORK_COPIES = 6
"""fp32 copies of a layer's widest states while its gradient is computed, as measured on the CPU."""


@dataclass(frozen=True)
class Activations:
    """Memory that a step keeps, by cause, from the shapes of the base's layers.

    Counted are the tensors that autograd saves for the backward pass over frozen quantized weights; a frozen
    product keeps nothing. docs/training-plans.md compares this with measurements. A micro-batch has T
    tokens, n of them supervised.

    layers: bytes a token of each decoder layer in the backward pass, in fp32 and bf16.
    boundary: bytes a token between two layers, which is all that gradient checkpointing keeps of a layer.
    pairs: bytes a token and a token of its row, in all layers, if attention keeps its matrix. short: as
    pairs, but only for rows of at most SHORT tokens.
    after: bytes a token from the last layer to the head.
    work: bytes a token while one layer is computed. fixed: bytes whatever T is.
    logits: bytes a supervised token. chunk: bytes of the loss's fp32 copies of at most CHUNK of them.
    """

    layers: tuple[int, ...]
    boundary: int
    pairs: int
    short: int
    after: int
    work: int
    fixed: int
    logits: int
    chunk: int

    def kept(self, tokens: int, longest_row: int, checkpointing: bool) -> int:
        """Return the bytes of a micro-batch, without the logits."""
        row = min(longest_row, tokens)
        one = max(self.layers, default=0)
        pairs = self.pairs + (self.short if row <= SHORT else 0)
        if checkpointing and self.layers:
            per_token = self.boundary * len(self.layers) + one
            pairs = pairs // len(self.layers)
        else:
            per_token = sum(self.layers)
        per_token += one  # one layer's gradients are there together with what it has kept
        return tokens * (per_token + self.after + self.work + pairs * row) + self.fixed

    def of_logits(self, supervised: int) -> int:
        """Return the bytes of the logits of `supervised` tokens and of the loss's work on them."""
        return supervised * self.logits + min(supervised, CHUNK) * self.chunk


_PROJECTS_OUT = ("o_proj", "out", "dense", "c_proj", "wo")
"""Prefixes of the names of attention's last layer."""


def activations_of(
    model: Any,
    targets: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    fused: bool = True,
    on_cpu: bool = True,
    experts: Mapping[str, LayerShape] | None = None,
) -> Activations:
    """Return the activations of a model on meta with an adapter on `targets`, of these ranks (by the same
    names).

    fused: the layers are 4-bit ones, and `kernels.fuse` replaces those without dropout and DoRA.
    on_cpu: short rows are computed by plain products, and shared keys are repeated for each head.
    experts: parameters of experts that are adapted as well.
    """
    experts = experts or {}
    fused = fused and not recipe.dropout and not recipe.use_dora
    config = model.config.get_text_config()
    hidden, size = config.hidden_size, dtype.itemsize
    blocks = _blocks(model)
    first = next(
        (at for at, block in enumerate(blocks) if any(_inside(block, name) for name in (*targets, *experts))),
        None,
    )
    taking_part = blocks[first:] if first is not None else []
    head = model.get_output_embeddings()
    body = [layer for layer in targets.values() if layer is not head]
    widths = [max(layer.in_features, layer.out_features) for layer in body]
    widths += [max(layer.size_in, layer.size_out) for layer in experts.values()]
    logits = size * config.vocab_size
    if len(body) < len(targets):
        # PEFT adds to a layer that is not quantized in fp32: the delta, the sum and its gradient.
        logits += 2 * _FP32 * config.vocab_size
    if recipe.method == "reinforcement" and recipe.temperature != 1.0:
        logits += size * config.vocab_size  # they are divided by the temperature, and so is their gradient
    return Activations(
        layers=tuple(
            _layer_bytes(model, block, targets, ranks, recipe, config, size, fused, on_cpu)
            + experts_per_token(config)
            * sum(
                # fp32 copies of the inputs, and what is between A and B
                _FP32 * (layer.size_in + ranks[name])
                for name, layer in experts.items()
                if _inside(block, name)
            )
            for block in taking_part
        ),
        boundary=size * hidden,
        pairs=_pair_bytes(model, config, recipe, size) * len(taking_part),
        short=size * config.num_attention_heads * len(taking_part) if on_cpu else 0,
        after=_FP32 * hidden,
        work=_WORK_COPIES * _FP32 * max(widths, default=0),
        fixed=_fixed_bytes(model, targets, recipe, size),
        logits=logits,
        chunk=_CHUNK_COPIES * _FP32 * config.vocab_size,
    )


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of the decoder's layers, in order: the longest list of modules in the tree."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    inside = {id(module) for module in decoder.modules()}
    name, found = max(
        ((name, module) for name, module in lists if id(module) in inside), key=lambda item: len(item[1])
    )
    return [f"{name}.{number}" for number in range(len(found))]


def _inside(block: str, name: str) -> bool:
    return name.startswith(f"{block}.")


def _layer_bytes(
    model: nn.Module,
    block: str,
    targets: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    recipe: Recipe,
    config: Any,
    size: int,
    fused: bool,
    on_cpu: bool,
) -> int:
    """Return the bytes a token that one decoder layer keeps."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    repeated = on_cpu or size > 2 or width > 256 or _pair_bytes(model, config, recipe, size)
    shared = heads if repeated else getattr(config, "num_key_value_heads", None) or heads
    queries = heads * width
    kept: int = 2 * size * (queries + shared * width)  # queries, keys and values, the output
    for module in model.get_submodule(block).modules():
        if "norm" in type(module).__name__.lower():
            weight = getattr(module, "weight", None)
            width = weight.numel() if weight is not None else config.hidden_size
            kept += _FP32 * (queries if width < config.hidden_size else width)
    inside = {name: layer for name, layer in targets.items() if _inside(block, name)}
    if fused:
        held = _FP32 if on_cpu or size > 2 else 3 * size  # what is between A and B, or its parts
        kept += held * sum(ranks[name] for name in inside) + size * _shared_inputs(inside, config)
    else:
        kept += sum(_adapted_bytes(layer, ranks[name], recipe, size) for name, layer in inside.items())
    return kept + _between_bytes(model.get_submodule(block), config, size)


def _shared_inputs(layers: Mapping[str, nn.Linear], config: Any) -> int:
    """Return the width of the inputs that are kept once for all layers of a module that share them.

    The output projection of attention is left out: attention keeps its input.
    """
    found = set()
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        if not ("attn" in parent or "attention" in parent) or not last.startswith(_PROJECTS_OUT):
            found.add((parent, layer.in_features))
    return sum(width for _, width in found)


def _adapted_bytes(layer: nn.Linear, rank: int, recipe: Recipe, size: int) -> int:
    """Return PEFT's own: fp32 copies of the input and of A's product; dropout's mask; DoRA's two products."""
    kept = _FP32 * (layer.in_features + rank)
    if recipe.dropout:
        kept += _FP32 * layer.in_features
    if recipe.use_dora:
        kept += (_FP32 + size) * layer.out_features
    return kept


def _between_bytes(block: nn.Module, config: Any, size: int) -> int:
    """Return the bytes a token that the MLP keeps between its products: a gate's input and output, and its
    factor."""
    hidden = config.hidden_size
    names = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    outside = {name: layer for name, layer in names.items() if "attn" not in name and "attention" not in name}
    widened = sum(layer.out_features for layer in outside.values() if layer.in_features <= hidden)
    inner = max((layer.in_features for layer in outside.values()), default=0)
    kept = size * (3 * inner if inner and widened >= 2 * inner else widened)
    experts = experts_per_token(config)
    if experts:
        each = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        kept += experts * size * (3 * each + 2 * hidden)
    return kept


def _pair_bytes(model: nn.Module, config: Any, recipe: Recipe, size: int) -> int:
    """Return the bytes of attention's weights, kept in fp32 and in the base's dtype without the fused
    kernel."""
    longest = recipe.max_length if isinstance(recipe.max_length, int) else 2048
    seen = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if softcap is None and not sinks and all(one is None or one >= longest for one in seen):
        return 0
    heads: int = config.num_attention_heads
    return heads * (_FP32 + size * (3 if softcap else 1))


def _fixed_bytes(model: Any, targets: Mapping[str, nn.Linear], recipe: Recipe, size: int) -> int:
    """Return the bytes of the largest weight, unpacked for its product; DoRA unpacks in fp32 and needs its
    norm."""
    head = model.get_output_embeddings()
    body = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    sizes = [layer.in_features * layer.out_features for layer in body]
    sizes += [one.sizes[1] * one.sizes[2] for one in expert_matrices(model)]
    largest = max(sizes, default=0)
    if not recipe.use_dora:
        return size * largest
    adapted = max((layer.in_features * layer.out_features for layer in targets.values()), default=0)
    return max(size * largest, 3 * _FP32 * adapted)


_PROBE_SECONDS = 0.3
_PROBE = (256, 576, 1536, 16)
"""Tokens, inputs, outputs and rank of the layer that is timed."""
_STEP_SHARE = 0.35
"""Part of one layer's rate that a whole step has: attention, norms and unpacking count no FLOPs here.

Measured on the CPU with the default base: 0.2 to 0.6, on a machine that others used too.
"""


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of training on a machine that does nothing else, as `measured_rates`."""
    return measured_rates(device, dtype)[0]


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOP/s of training, the best and the mean: the rate of one layer with an adapter, both ways,
    less the loss in a whole step.

    On a machine that others use too, the mean is the lower the more they take. It takes less than a second on
    any processor. The base's weights are plain: unpacking is in the loss.
    """
    layer = _Layer(device, dtype)
    layer.pass_both_ways()  # the first one loads the kernels
    spent, best, count = 0.0, float("inf"), 0
    while count < 3 or (spent < _PROBE_SECONDS and count < 50):
        started = time.perf_counter()
        layer.pass_both_ways()
        seconds = max(time.perf_counter() - started, 1e-9)
        spent, best, count = spent + seconds, min(best, seconds), count + 1
    whole_step = layer.flops * _STEP_SHARE
    return whole_step / best, whole_step * count / spent


class _Layer:
    """A frozen product and an adapter in fp32, of the size `_PROBE`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        rows, size_in, size_out, rank = _PROBE
        self._x = torch.ones(rows, size_in, dtype=dtype, device=device, requires_grad=True)
        self._weight = torch.ones(size_in, size_out, dtype=dtype, device=device)
        self._a = torch.ones(size_in, rank, device=device, requires_grad=True)
        self._b = torch.ones(rank, size_out, device=device, requires_grad=True)
        self._gradient = torch.ones(rows, size_out, dtype=dtype, device=device)
        self.flops = 2 * rows * (2 * size_in * size_out + 3 * rank * (size_in + size_out))

    def pass_both_ways(self) -> None:
        y = self._x @ self._weight + (self._x.float() @ self._a @ self._b).to(self._x.dtype)
        torch.autograd.grad(y, [self._x, self._a, self._b], self._gradient)
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
