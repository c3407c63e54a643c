"""What a run will take, from the base's config alone: parameters, memory by part, time. Nothing is loaded.

It also decides what depends on memory: `micro_tokens` and `gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from onebase_adapters.training.activations import Activations, activations_of
from onebase_adapters.training.recipe import Recipe, RecipeError
from onebase_adapters.training.targets import target_layers
from onebase_engine.base.load import Quantization, estimate_memory

MICRO_TOKENS = (8192, 4096, 2048, 1024)
"""What "auto" chooses from; on the CPU the largest ones gain nothing."""
_CPU_MICRO_TOKENS = 2048
_SHARE = 0.85
"""Part of the memory that "auto" plans with; the rest is for what no estimate sees."""
_PROCESS = {"cpu": 600_000_000, "cuda": 700_000_000}
"""Bytes of a process that has loaded torch (CUDA: of its context), and of its kernels' own buffers."""
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0625, "paged_adamw": 8.0, "paged_adamw_8bit": 2.0625}
"""A parameter's two moments: fp32, or one byte each and an fp32 scale for 256 of them."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a run will take.

    adapter_bytes: of the file, fp32. base_bytes: 0 where the base is resident already. adapter_memory:
    weights and gradients. process_bytes: the interpreter, torch, kernels. memory_limit: None is unknown.
    seconds: of the training steps; None where the amount of data or the machine is unknown.
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
        return (
            self.base_bytes
            + self.adapter_memory
            + self.optimizer_bytes
            + self.activation_bytes
            + self.logits_bytes
            + self.process_bytes
        )

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit; True where no limit is known."""
        return self.memory_limit is None or self.total <= self.memory_limit

    def to_json(self) -> dict[str, Any]:
        """All fields, and `total` and `fits`."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with what was decided here."""
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
    memory_limit: int | None = None,
    base_resident: bool = False,
    rate: float | None = None,
) -> Estimate:
    """What a run with this recipe takes; what is "auto" in it for memory's sake is decided.

    Args:
        config: the base's, from transformers. recipe: resolved but for memory.
        longest_row: tokens of the longest row; of a preference, of both its replies with the prompt.
        total_tokens: of the whole run, all epochs.
        supervised_part: of the tokens; all, if nothing is known.
        memory_limit: bytes that the process may take.
        base_resident: the base is in memory already, of another process, and costs nothing.
        rate: FLOP/s of the machine, as `machine.measured_rate`.

    Raises:
        RecipeError: a target is no linear layer of this base.
    """
    plan = _Plan.of(config, recipe, quantization, dtype, torch.device(device).type, base_resident)
    row = max(1, longest_row)
    found = _decide(plan, recipe, row, supervised_part, memory_limit)
    seconds = None
    if rate and total_tokens is not None:
        seconds = total_tokens * plan.flops_per_token(found.gradient_checkpointing, supervised_part) / rate
    advice = "" if found.fits else _advice(plan, recipe, row, supervised_part, memory_limit or 0)
    return replace(found, total_tokens=total_tokens, seconds=seconds, advice=advice)


def adapter_parameters(targets: Mapping[str, nn.Linear], ranks: Mapping[str, int], *, dora: bool) -> int:
    """A is [r, in] and B is [out, r] (Hu et al. 2021, section 4.1); DoRA has a magnitude for each output."""
    return sum(
        ranks[name] * (layer.in_features + layer.out_features) + (layer.out_features if dora else 0)
        for name, layer in targets.items()
    )


def ranks_of(targets: Mapping[str, nn.Linear], recipe: Recipe) -> dict[str, int]:
    """Each target's rank: that of the first name in `rank_pattern` that its own name ends with, else r.

    Raises RecipeError: a pattern's name is that of no target.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for end in getattr(recipe, field):
            if not any(f".{name}".endswith(f".{end}") for name in targets):
                known = sorted({name.rpartition(".")[2] for name in targets})
                raise RecipeError(field, f"{field}: {end!r} is no target; there are {', '.join(known)}")
    return {
        name: next(
            (rank for end, rank in recipe.rank_pattern.items() if f".{name}".endswith(f".{end}")), recipe.r
        )
        for name in targets
    }


@dataclass(frozen=True)
class _Plan:
    """All of an estimate that does not depend on the size of a micro-batch."""

    parameters: int
    base_parameters: int
    base_bytes: int
    activations: Activations
    optimizer: str
    device: str
    linear_weights: int
    head_weights: int

    @classmethod
    def of(
        cls,
        config: Any,
        recipe: Recipe,
        quantization: Quantization,
        dtype: torch.dtype,
        device: str,
        base_resident: bool,
    ) -> _Plan:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        memory = estimate_memory(config, quantization, dtype=dtype)
        targets = target_layers(model, recipe.targets)
        ranks = ranks_of(targets, recipe)
        head: Any = model.get_output_embeddings()
        linear = sum(
            layer.in_features * layer.out_features for layer in target_layers(model, ["all-linear"]).values()
        )
        return cls(
            parameters=adapter_parameters(targets, ranks, dora=recipe.use_dora),
            base_parameters=memory.parameters,
            base_bytes=0 if base_resident else memory.total,
            activations=activations_of(
                model,
                targets,
                ranks,
                recipe,
                dtype,
                fused=quantization == "nf4",
                on_cpu=device == "cpu",
            ),
            optimizer=recipe.optimizer,
            device=device,
            linear_weights=linear,
            head_weights=head.weight.numel(),
        )

    def with_micro_batch(
        self, tokens: int, row: int, checkpointing: bool, supervised_part: float, limit: int | None
    ) -> Estimate:
        """The estimate for micro-batches of so many tokens."""
        supervised = max(1, round(tokens * supervised_part))
        return Estimate(
            parameters=self.parameters,
            adapter_bytes=4 * self.parameters,
            base_parameters=self.base_parameters,
            base_bytes=self.base_bytes,
            adapter_memory=8 * self.parameters,
            optimizer_bytes=round(_OPTIMIZER_BYTES[self.optimizer] * self.parameters),
            activation_bytes=self.activations.kept(tokens, row, checkpointing),
            logits_bytes=self.activations.of_logits(supervised),
            process_bytes=_PROCESS.get(self.device, _PROCESS["cuda"]),
            micro_tokens=tokens,
            gradient_checkpointing=checkpointing,
            flops_per_token=self.flops_per_token(checkpointing, supervised_part),
            memory_limit=limit,
        )

    def flops_per_token(self, checkpointing: bool, supervised_part: float) -> int:
        """Two FLOPs a weight forwards, two backwards to the inputs; two more for the adapter's gradients."""
        passes = 3 if checkpointing else 2
        head = self.head_weights * supervised_part
        return round(2 * passes * self.linear_weights + 4 * head + 2 * (passes + 1) * self.parameters)


def _decide(plan: _Plan, recipe: Recipe, row: int, supervised_part: float, limit: int | None) -> Estimate:
    """The first plan that fits easily, else the smallest one there is."""
    found = None
    for tokens, checkpointing in _choices(plan, recipe, row):
        found = plan.with_micro_batch(tokens, row, checkpointing, supervised_part, limit)
        if limit is None or found.total <= _SHARE * limit:
            return found
    assert found is not None
    return found


def _choices(plan: _Plan, recipe: Recipe, row: int) -> Iterator[tuple[int, bool]]:
    """From the fastest to the smallest. Keeping activations saves a third of the work: it comes first."""
    sizes: list[int]
    if isinstance(recipe.micro_tokens, int):
        sizes = [max(recipe.micro_tokens, row)]
    else:
        rows = recipe.batch_size if isinstance(recipe.batch_size, int) else 16
        most = min(_CPU_MICRO_TOKENS if plan.device == "cpu" else MICRO_TOKENS[0], max(1024, rows * row))
        sizes = sorted(
            {max(row, size) for size in MICRO_TOKENS if size <= most or size == 1024}, reverse=True
        )
    modes = [False, True] if recipe.gradient_checkpointing == "auto" else [recipe.gradient_checkpointing]
    for checkpointing in modes:
        for size in sizes:
            yield size, bool(checkpointing)


def _advice(plan: _Plan, recipe: Recipe, row: int, supervised_part: float, limit: int) -> str:
    """What it would take, and the changes of which each makes it fit."""

    def fits(settings: Recipe, longest: int = row, rank: int = recipe.r) -> bool:
        smaller = replace(plan, parameters=plan.parameters * rank // recipe.r, optimizer=settings.optimizer)
        return _decide(smaller, settings, longest, supervised_part, limit).fits

    pinned = []
    if recipe.gradient_checkpointing is False:
        pinned.append("gradient_checkpointing = true")
    if isinstance(recipe.micro_tokens, int) and recipe.micro_tokens > row:
        pinned.append("micro_tokens = auto")
    free = replace(recipe, gradient_checkpointing="auto", micro_tokens="auto")
    small = replace(free, optimizer="adamw_8bit")
    ways = []
    if pinned and fits(free):
        ways.append(" and ".join(pinned))
    else:
        if shorter := next((size for size in _halves(row, 64) if fits(free, size)), None):
            ways.append(f"max_length = {shorter}")
        if not recipe.optimizer.endswith("8bit") and fits(small):
            ways.append("optimizer = adamw_8bit")
        if rank := next((rank for rank in _halves(recipe.r, 1) if fits(free, rank=rank)), None):
            ways.append(f"r = {rank}")
        ways = [" and ".join([*pinned, way]) for way in ways]
        if not ways and fits(small, 64, 1):
            ways.append("a smaller max_length, a smaller r and optimizer = adamw_8bit together")
    least = _decide(plan, recipe, row, supervised_part, limit).total
    remedy = f"Set {', or '.join(ways)}" if ways else "Choose a smaller base, or a machine with more memory"
    return f"the run would take {least / 1e9:.1f} GB of memory and may take {limit / 1e9:.1f} GB. {remedy}"


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value
