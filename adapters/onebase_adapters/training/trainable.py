"""A LoRA adapter on a view of the base, ready to be trained: PEFT's own modules in fp32."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from onebase_adapters.proof.extract import extract
from onebase_adapters.training.attention import PackedAttention
from onebase_adapters.training.batches import MicroBatch, Packed
from onebase_adapters.training.events import Gate
from onebase_adapters.training.kernels import fuse, token_losses
from onebase_adapters.training.recipe import Recipe, decided
from onebase_adapters.training.targets import resolve_targets
from onebase_engine.base.view import peft_view
from onebase_engine.lora.weights import AdapterWeights

ADAPTER = "default"


class Trainable:
    """The model that a run trains. Base tensors are shared and frozen, the adapter's are its own and fp32.

    Args:
        base: as `load_base` or `attach` gives it.
        recipe: resolved, gradient checkpointing decided.
        gate: passed through by every layer, forwards and backwards.
        eva: micro-batches that EVA looks at, for `init="eva"`.

    Raises:
        RecipeError: a target is not a linear layer of this base.
    """

    def __init__(
        self, base: nn.Module, recipe: Recipe, gate: Gate, *, eva: Iterable[MicroBatch] = ()
    ) -> None:
        self.base = base
        self.device = next(base.parameters()).device
        self._packed = PackedAttention(gate)
        tree: Any = peft_view(base)
        self._packed.attach(tree)
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(recipe.seed)
            self.model: Any = _with_adapter(tree, recipe)
            if recipe.init == "eva":
                self._initialize_by_data(eva)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        fuse(self.model, ADAPTER)
        if recipe.gradient_checkpointing is True:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of every supervised token, [n] fp32 nats, and which sample it is of, [n]."""
        packed = batch.tensors(self.device)
        return token_losses(self.logits(packed), packed.targets), packed.owner

    def logits(self, packed: Packed) -> torch.Tensor:
        """[n, vocabulary] in the base's dtype, at the places that predict the supervised tokens."""
        self._packed.set_lengths(packed.lengths, self.device)
        output = self.model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            logits_to_keep=packed.keep,
            use_cache=False,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def weights(self) -> AdapterWeights:
        """The adapter as it is now, for a slot. On the CPU these are the tensors that training changes."""
        return extract(self.model, ADAPTER)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Turn the adapter off: the base alone, as a reference."""
        with self.model.disable_adapter():
            yield

    def _initialize_by_data(self, batches: Iterable[MicroBatch]) -> None:
        """EVA (Paischer et al. 2024): A from the inputs' singular vectors, ranks where they explain most."""
        from peft import initialize_lora_eva_weights

        def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
            self._packed.set_lengths(inputs["lengths"].tolist(), self.device)
            model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                logits_to_keep=inputs["keep"],
                use_cache=False,
            )

        initialize_lora_eva_weights(
            self.model,
            [_eva_inputs(batch.tensors(self.device)) for batch in batches],
            forward_fn=forward,
            prepare_layer_inputs_fn=_flat_inputs,
            adapter_name=ADAPTER,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )


def _eva_inputs(packed: Packed) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(packed.lengths)
    return {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        "keep": packed.keep,
        "lengths": lengths,
    }


def _flat_inputs(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """A layer's input as [tokens, size]; the output head gets fewer tokens than other layers."""
    states: torch.Tensor = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    return states.flatten(0, -2)


def _with_adapter(tree: nn.Module, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=decided(recipe.alpha),
        target_modules=resolve_targets(tree, recipe.targets),
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init_lora_weights={"true": True, "false": False}.get(recipe.init, recipe.init),
    )
    return get_peft_model(tree, config, adapter_name=ADAPTER)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PEFT's advice on what is intended here: a tied head as a target, quantized layers with DoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
