"""LoRA adapter on a view of the base, ready to be trained: PEFT's own modules in fp32, on the layers that a
recipe's `targets` select."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from onebase_adapters.format.config import AdapterFormatError, Task
from onebase_adapters.proof.experts import apart, give_places, take_places
from onebase_adapters.proof.extract import extract
from onebase_adapters.proof.loader import classifier_with
from onebase_engine.base.layers import LayerShape, adaptable_layers, is_linear, left_out
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import HEAD, AdapterWeights, Head, SavedModule
from onebase_training import recurrence
from onebase_training.activation import ActivatedTokens
from onebase_training.attention import PackedAttention, UnsupportedTrainingError
from onebase_training.batches import MicroBatch, Packed
from onebase_training.events import Gate
from onebase_training.kernels import fuse, fuse_gates, fuse_norms, fuse_rotations
from onebase_training.losses import token_losses
from onebase_training.parent import Parent, copied, load_parent, load_version
from onebase_training.recipe import Recipe, RecipeError, decided

ADAPTER = "default"
_BYPASSING = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Types of models whose `out_proj` PEFT refuses (`peft.tuners.tuners_utils`)."""
_PROBED = (8, 5)
"""Numbers of tokens of the two rows by which packing is checked."""
_PACKED_ERROR = 0.02
"""Largest deviation of a packed row's logits from those of the row alone, relative to the largest of them:
what bf16 products in other shapes bring about."""


class Trainable:
    """Model that a run trains. Base tensors are shared and frozen, the adapter's are its own and fp32.

    Args:
        base: as `load_base` or `attach` returns it.
        recipe: resolved, gradient checkpointing decided.
        gate: passed through by every layer, forwards and backwards.
        eva: micro-batches that EVA reads, for `init="eva"`.
        parent: the adapter whose weights training continues; the recipe must agree with it.
        labels: of a classifier, in the order of its head's rows; none for text.
        keeps_start: whether `at_start` can restore the parent's weights, for which a copy of them is kept.
        version: an adapter that is only measured. It may be of any kind that is served, with labels of its
            own, and the recipe only decides how rows are computed.

    Raises:
        RecipeError: a target is not a linear layer of this base, or there is no classifier for it.
        AdapterFormatError: `version` is no adapter of this base.
    """

    def __init__(
        self,
        base: nn.Module,
        recipe: Recipe,
        gate: Gate,
        *,
        eva: Iterable[MicroBatch] = (),
        parent: Parent | None = None,
        labels: Sequence[str] = (),
        keeps_start: bool = True,
        version: Parent | None = None,
    ) -> None:
        self.base = base
        self.labels = tuple(labels)
        self._loaded_head: nn.Linear | None = None
        self.device = next(base.parameters()).device
        self._packed = PackedAttention(gate)
        tree: Any = peft_view(base)
        self._packed.attach(tree)
        recurrence.attach(tree, self._packed)
        if version is None:
            _check_rows(tree, self._packed)
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(recipe.seed)
            self.model: Any
            places = give_places(tree)
            if version is not None:
                loaded = load_version(base, tree, version, ADAPTER)
                self.model, self.labels, self._loaded_head = loaded.model, loaded.labels, loaded.head
            elif labels:
                self.model = _classifier(tree, recipe, self.labels)
            elif parent is None:
                self.model = _with_adapter(tree, recipe)
            else:
                self.model = _from(parent, self, tree, recipe)
            take_places(tree, places, ADAPTER, apart)
            if recipe.init == "eva" and version is None:
                self._initialize_by_data(eva)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self._parent = copied(self.named_parameters()) if parent is not None and keeps_start else None
        self._invocation = tuple(self.model.peft_config[ADAPTER].alora_invocation_tokens or ())
        self._activation = ActivatedTokens()
        if self._invocation:
            self._activation.attach(self.model, ADAPTER)
        fuse(self.model, ADAPTER)
        if self.device.type == "cuda":
            for fuse_parts in (fuse_norms, fuse_gates, fuse_rotations):
                fuse_parts(self.model)
        if recipe.gradient_checkpointing is True:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapter's parameters, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of every supervised token, [n] fp32 nats, and the number of its sample,
        [n]."""
        packed = batch.tensors(self.device, self._invocation)
        return token_losses(self.logits(packed), packed.targets), packed.owner

    def logits(self, packed: Packed) -> torch.Tensor:
        """Return logits [n, vocabulary] in the base's dtype, at the positions that predict the supervised
        tokens."""
        self._packed.set_lengths(packed.lengths, self.device)
        self._activation.set_tokens(packed)
        # PEFT's own model would look for one invocation in the whole packed sequence.
        model = self.model.get_base_model() if self._invocation else self.model
        output = model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            logits_to_keep=packed.keep,
            use_cache=False,
        )
        # Not [0]: its gradient would be copied into zeros of the same size.
        logits: torch.Tensor = output.logits.squeeze(0)
        return logits

    def class_logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return a classifier's logits [samples, labels] fp32, at each sample's last token."""
        packed = batch.tensors(self.device)
        states = self._states(packed.ids, packed.positions, packed.lengths)
        ends = torch.tensor(packed.lengths, device=self.device).cumsum(0) - 1
        # The head is served in the base's dtype: what is learned, and measured, is that one.
        exact, bias = self._head.weight, self._head.bias
        rounded = exact + (exact.to(states.dtype).float() - exact).detach()
        return nn.functional.linear(states[ends].float(), rounded, bias)

    def _states(self, ids: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return a classifier's hidden states behind the last norm, [T, hidden]."""
        self._packed.set_lengths(lengths, self.device)
        decoder = self.model.get_base_model().base_model
        output = decoder(input_ids=ids, position_ids=positions, use_cache=False)
        states: torch.Tensor = output.last_hidden_state.squeeze(0)
        return states

    @property
    def _head(self) -> nn.Linear:
        """The classifier's head: the one that is trained, or that of the version that is measured."""
        if self._loaded_head is not None:
            return self._loaded_head
        head: nn.Linear = self.model.get_base_model().score.modules_to_save[ADAPTER]
        return head

    def weights(self) -> AdapterWeights:
        """Return the adapter as it is now, for a slot. On the CPU these are the tensors that training
        changes."""
        found = dict(extract(self.model, ADAPTER))
        if isinstance(head := found.get(HEAD), SavedModule):
            dtype = self.base.get_output_embeddings().weight.dtype  # type: ignore[operator]
            found[HEAD] = Head(head.weight.to(dtype))
        return found

    def lora_layers(self) -> dict[str, Any] | None:
        """Return PEFT's layers by their names in the base; None if one is no plain LoRA of a linear layer, or
        acts on a part of the tokens."""
        from peft.tuners.lora import LoraLayer

        named = self.model.get_base_model().named_modules()
        found = {name: layer for name, layer in named if isinstance(layer, LoraLayer)}
        return found if not self._invocation and all(map(_is_plain, found.values())) else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn off gradients and dropout."""
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

    @property
    def has_parent(self) -> bool:
        """Whether training continues an adapter whose weights are kept."""
        return self._parent is not None

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Restore the start of training, as a reference: the parent's weights, or without one the base
        alone."""
        if self._parent is None:
            with self.without_adapter():
                yield
            return
        parameters = self.named_parameters()
        now = copied(parameters)
        self._set(parameters, self._parent)
        try:
            yield
        finally:
            self._set(parameters, now)

    @staticmethod
    def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])

    def _initialize_by_data(self, batches: Iterable[MicroBatch]) -> None:
        """Initialize by EVA (Paischer et al. 2024): A from the inputs' singular vectors, ranks where they
        explain most."""
        from peft import initialize_lora_eva_weights

        def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
            if self.labels:
                self._states(inputs["input_ids"], inputs["position_ids"], inputs["lengths"].tolist())
                return
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


def _is_plain(layer: Any) -> bool:
    """Return True for a LoRA that adds its product to a linear layer's, and does nothing else."""
    if ADAPTER not in layer.lora_A or hasattr(layer, "parameter_name") or ADAPTER in layer.lora_variant:
        return False
    has_bias = layer.lora_A[ADAPTER].bias is not None or layer.lora_B[ADAPTER].bias is not None
    return not has_bias and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)


@contextmanager
def joined(adapters: Sequence[tuple[Trainable, slice]]) -> Iterator[None]:
    """Let the first adapter's model compute with each adapter on tokens of its own: forwards, and backwards,
    in which layers may be computed again.

    Args:
        adapters: in the order of their tokens, which are all. All of them have `lora_layers`.

    Raises RuntimeError in the pass: a layer gets other tokens than the pass has.
    """
    count = adapters[-1][1].stop
    layers: dict[str, list[tuple[slice, Any]]] = {}
    for trainable, tokens in adapters:
        for name, layer in (trainable.lora_layers() or {}).items():
            layers.setdefault(name, []).append((tokens, layer))
    modules = dict(adapters[0][0].model.get_base_model().named_modules())
    own = {name: vars(modules[name]).get("forward") for name in layers}
    try:
        for name, adapted in layers.items():
            module = modules[name]
            module.forward = _Joined(getattr(module, "base_layer", module.forward), adapted, count)
        yield
    finally:
        for name, forward in own.items():
            if forward is None:
                del modules[name].forward
            else:
                modules[name].forward = forward


class _Joined:
    """Replaces the `forward` of a linear layer by one with several adapters, each on tokens of its own.

    count: tokens of the pass.
    """

    def __init__(
        self, plain: Callable[..., torch.Tensor], adapted: Sequence[tuple[slice, Any]], count: int
    ) -> None:
        self._plain = plain
        self._adapted = adapted
        self._count = count

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] != self._count:
            raise RuntimeError(f"a layer gets {x.shape[-2]} tokens of a pass of {self._count}")
        output = self._plain(x)
        parts, end = [], 0
        for tokens, layer in self._adapted:
            own = _with_lora(output[..., tokens, :], x[..., tokens, :], layer)
            parts += [output[..., end : tokens.start, :], own]
            end = tokens.stop
        return torch.cat([*parts, output[..., end:, :]], dim=-2)


def _with_lora(output: torch.Tensor, x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return the layer's output with its adapter's, added in PEFT's order."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    delta = nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * layer.scaling[ADAPTER]
    rounds_once = layer.get_base_layer().weight.is_floating_point()
    total: torch.Tensor = output.to(delta.dtype) + delta if rounds_once else output + delta.to(output.dtype)
    return total.to(output.dtype)


def _eva_inputs(packed: Packed) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(packed.lengths)
    return {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        "keep": packed.keep,
        "lengths": lengths,
    }


def _flat_inputs(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """Return a layer's input as [tokens, size]; the output head gets fewer tokens than other layers."""
    states: torch.Tensor = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    return states.flatten(0, -2)


def _from(parent: Parent, trainable: Trainable, tree: nn.Module, recipe: Recipe) -> Any:
    targets = resolve_targets(tree, recipe.targets)
    _check_parameters(tree, recipe)
    model = load_parent(trainable.base, tree, parent, recipe, ADAPTER)
    config = model.peft_config[ADAPTER]
    config.target_modules = targets  # as another run would write them
    config.target_parameters = resolve_parameters(tree, recipe.targets) or None
    config.rank_pattern, config.alpha_pattern = dict(recipe.rank_pattern), dict(recipe.alpha_pattern)
    return model


def _classifier(tree: Any, recipe: Recipe, labels: Sequence[str]) -> Any:
    """Return transformers' classifier of texts with a new head, over the tree's decoder, and PEFT's adapter
    on it.

    Raises RecipeError: there is none for this base.
    """
    if head_name(tree) in target_layers(tree, recipe.targets):
        raise RecipeError("targets", "lm_head is in no classifier: leave it out")
    targets = resolve_targets(tree, recipe.targets)
    config = tree.config.get_text_config()
    head = nn.Linear(config.hidden_size, len(labels), bias=False)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", None) or 0.02)
    try:
        model: Any = classifier_with(tree, "SEQ_CLS", head.to(next(tree.parameters()).device))
    except AdapterFormatError as error:
        raise RecipeError("method", f"classification: {error}; choose another base") from error
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise RecipeError("method", f"{type(model).__name__} calls its head otherwise; choose another base")
    # Its own for a while had no padding, which is only right for a row alone.
    model.config = copy.deepcopy(tree.config)
    model.config.architectures = [type(model).__name__]
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    return _with_adapter(model, recipe, targets, "SEQ_CLS")


@torch.no_grad()
def _check_rows(tree: Any, packed: PackedAttention) -> None:
    """Raise UnsupportedTrainingError for a base that does not compute packed rows as each of them alone.

    Packed rows get their positions from here, and a state that a base keeps in a way of its own would go on
    from one row to the next.
    """
    device, words = next(tree.parameters()).device, int(tree.config.get_text_config().vocab_size)
    rows = [torch.arange(1, count + 1, device=device) % words for count in _PROBED]
    positions = torch.cat([torch.arange(count, device=device) for count in _PROBED])
    tree.eval()
    own = []
    for row in rows:
        packed.set_lengths([len(row)], device)
        own.append(tree(input_ids=row[None], use_cache=False).logits[0])
    packed.set_lengths(_PROBED, device)
    given = tree(input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False).logits[0]
    alone = torch.cat(own)
    if not torch.allclose(alone, given, rtol=_PACKED_ERROR, atol=_PACKED_ERROR * float(alone.abs().max())):
        raise UnsupportedTrainingError(
            f"{type(tree).__name__} computes a row behind another one in its own way, with positions or a "
            "state that training does not know: choose another base"
        )


def _with_adapter(
    tree: nn.Module, recipe: Recipe, targets: Sequence[str] | None = None, task: Task = "CAUSAL_LM"
) -> Any:
    from peft import LoraConfig, get_peft_model

    _check_parameters(tree, recipe)
    config = LoraConfig(
        task_type=task,
        r=recipe.r,
        lora_alpha=decided(recipe.alpha),
        target_modules=list(targets) if targets is not None else resolve_targets(tree, recipe.targets),
        target_parameters=resolve_parameters(tree, recipe.targets) or None,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        lora_dropout=recipe.dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init_lora_weights={"true": True, "false": False}.get(recipe.init, recipe.init),
        alora_invocation_tokens=list(recipe.alora_invocation_tokens) or None,
    )
    return get_peft_model(tree, config, adapter_name=ADAPTER)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PEFT's advice on what is intended here: a tied head as a target, quantized layers with DoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


_ATTENTION_WORDS = ("attn", "attention")
_MLP_WORDS = ("mlp", "feed_forward", "feedforward", "ffn", "experts")


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names for LoraConfig's `target_modules` that mean exactly the layers of `target_layers`.

    They are last names such as `q_proj` if those mean nothing else in the whole model, else full names: a
    tower that is not loaded may have layers of these names too.

    Raises:
        RecipeError: as `target_layers`.
    """
    chosen = set(target_layers(model, targets))
    short = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == chosen and not left_out(model) else chosen)


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers that `targets` mean, by full name, in the model's order.

    Args:
        model: a causal language model without adapters; it may be on meta, its layers quantized.
        targets: `attention`, `mlp`, `all-linear` (all but the output head), or names of linear layers: the
            last part (`q_proj`), more of them (`self_attn.q_proj`) or all. Those of experts are left out.

    Raises:
        RecipeError: a target means no linear layer of this model; the message lists those that exist.
    """
    layers = _linear_layers(model)
    head = head_name(model)
    body = {name: layer for name, layer in layers.items() if name != head}
    chosen = set[str]()
    for target in targets:
        if target_parameters(model, [target]):
            continue
        group = _GROUPS.get(target)
        found = group(body) if group else {name for name in layers if f".{name}".endswith(f".{target}")}
        if not found:
            raise RecipeError("targets", _refusal(model, target, body, head))
        chosen |= found
    return {name: layer for name, layer in layers.items() if name in chosen}


_EXPERTS = "experts"
"""Group of targets: the matrices of a mixture's experts."""


def target_parameters(model: nn.Module, targets: Sequence[str]) -> dict[str, LayerShape]:
    """Return the parameters of a mixture's experts that `targets` mean, by full name.

    Args:
        targets: `experts`, or names with that of the module of experts (`experts.down_proj`). Others mean
            linear layers.
    """
    wanted = [target for target in targets if target == _EXPERTS or "." in target]
    if not wanted:
        return {}
    experts = {name: layer for name, layer in adaptable_layers(model).items() if layer.kind == "experts"}
    return {
        name: layer
        for name, layer in experts.items()
        if any(target == _EXPERTS or f".{name}".endswith(f".{target}") for target in wanted)
    }


def resolve_parameters(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names for LoraConfig's `target_parameters` that mean exactly those of `target_parameters`:
    short ones if these mean no others."""
    chosen = set(target_parameters(model, targets))
    short = {".".join(name.split(".")[-2:]) for name in chosen}
    return sorted(short if set(target_parameters(model, sorted(short))) == chosen else chosen)


def _check_parameters(model: nn.Module, recipe: Recipe) -> None:
    """Raise RecipeError for settings that PEFT does not know on parameters of experts."""
    if not target_parameters(model, recipe.targets):
        return
    for name, asked in (("dropout", recipe.dropout), ("use_dora", recipe.use_dora)):
        if asked:
            raise RecipeError(name, f"{name} is not known on experts: leave it out, or take other targets")
    if recipe.init == "eva":
        raise RecipeError("init", "EVA reads the inputs of linear layers, not of experts: leave init out")


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers that text passes through: the decoder's and the head, not an image
    encoder's."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else None
    if isinstance(decoder, nn.Module):
        inside = {id(module) for module in decoder.modules()}
    else:
        inside = {id(module) for module in model.modules()}
    head = head_name(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and name and (id(module) in inside or name == head)
        if not _is_bypassed(model, name)
    }


def _is_bypassed(model: Any, name: str) -> bool:
    """Return True for a layer on which PEFT puts no adapter, since kernels may compute it with the layer
    around it."""
    kind = getattr(type(getattr(model, "config", None)), "model_type", None)
    return kind in _BYPASSING and name.endswith(".out_proj")


def head_name(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head else None


def _all(body: dict[str, nn.Linear]) -> set[str]:
    return set(body)


def _attention(body: dict[str, nn.Linear]) -> set[str]:
    return {name for name in body if _within(name, _ATTENTION_WORDS)}


def _mlp(body: dict[str, nn.Linear]) -> set[str]:
    named = {name for name in body if _within(name, _MLP_WORDS)} - _attention(body)
    # OPT and others keep these layers directly in the decoder's: there it is what is not attention.
    return named or {name for name in body if _numbered(name)} - _attention(body)


def _within(name: str, words: tuple[str, ...]) -> bool:
    """Return True if the name of a module around the layer has one of these words."""
    return any(word in part.lower() for part in name.split(".")[:-1] for word in words)


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


_GROUPS: dict[str, Callable[[dict[str, nn.Linear]], set[str]]] = {
    "all-linear": _all,
    "attention": _attention,
    "mlp": _mlp,
}


def _refusal(model: nn.Module, target: str, body: dict[str, nn.Linear], head: str | None) -> str:
    if not body:
        return (
            f"target {target!r}: {type(model).__name__} has no linear layers to put an adapter on "
            "(its products are of another kind, such as GPT-2's Conv1D); choose another base"
        )
    other = [type(module) for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
    if target == _EXPERTS:
        kind = ": this base has no experts whose matrices are adapted"
    elif _is_bypassed(model, f".{target}"):
        kind = f": on {type(model).__name__} PEFT puts no adapter there"
    elif target in _GROUPS:
        kind = ": this base has no linear layers of that kind (the target experts means those of a mixture)"
    elif other:
        kind = f" is of type {other[0].__name__}, not a linear layer"
    else:
        kind = " is not a linear layer of this base"
    parts = [
        f"{group} ({', '.join(names)})"
        for group, find in (("attention", _attention), ("mlp", _mlp))
        if (names := _last_names(find(body)))
    ]
    rest = _last_names(set(body) - _attention(body) - _mlp(body)) + ([head] if head else [])
    return f"target {target!r}{kind}; there are {', '.join([*parts, *rest])}, or all-linear"


def _last_names(names: set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
