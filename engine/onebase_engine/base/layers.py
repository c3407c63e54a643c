"""Modules of a base: the class that builds them, and those that an adapter may target.

Many bases are composites: a language model with a tower that sees or hears, and a projector between them.
Only the language model and its head are built; they keep the names that they have in the composite.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from onebase_engine.base.experts import expert_matrices, is_usual, takes_rows_in_order

_BUILDING = threading.Lock()
"""Guards a function of transformers that is replaced while a composite is built."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of a possible target: a linear layer, an embedding or a norm of the base.

    `size_in` of an embedding is its vocabulary; of a norm both sizes are the hidden size. `bias`: whether
    the module has one. Of the kind `experts` it is a parameter that holds `count` matrices of these sizes,
    one for each expert of a mixture; `transposed`: they are [in, out]; `gate_first`: the first half of the
    outputs is the gate's, and the second is what it gates.
    """

    size_in: int
    size_out: int
    kind: Literal["linear", "embedding", "norm", "experts"] = "linear"
    bias: bool = False
    count: int = 1
    transposed: bool = False
    gate_first: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the module's own weight, not quantized."""
        if self.kind == "norm":
            return (self.size_out,)
        return (self.size_in, self.size_out) if self.kind == "embedding" else (self.size_out, self.size_in)


def transformers_class(config: Any) -> Any:
    """Return the class of transformers that generates text by a config, or None if there is none."""
    found = _mapped(config)
    return None if found is None else found[1]


def whole_class(config: Any) -> Any:
    """Return transformers' automatic class that builds all of a model, towers included.

    Raises:
        ValueError: transformers has no class that generates text by this config.
    """
    found = _mapped(config)
    if found is None:
        raise ValueError(f"transformers has no model that generates text by {type(config).__name__}")
    return found[0]


def _mapped(config: Any) -> tuple[Any, Any] | None:
    """Return transformers' automatic class for a config and the class that it maps the config to.

    A causal language model comes first, then a composite, of which the language model is served.
    """
    import transformers

    for auto, mapping in (
        (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (transformers.AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return auto, found[0] if isinstance(found, list | tuple) else found
    return None


def base_class(config: Any) -> Any:
    """Return the class whose `from_config` and `from_pretrained` build a base from its config.

    Raises:
        ValueError: transformers has no class that generates text by this config.
    """
    whole, found = whole_class(config), transformers_class(config)
    text = config.get_text_config()
    # Where a config is mapped to the class of its text part, transformers takes that part by itself.
    composite = text is not config and found.config_class is not type(text)
    return _language_model(found) if composite else whole


@cache
def _language_model(composite: Any) -> Any:
    """Return a composite's class as one that builds its language model and head alone.

    It has the name of transformers' own, by which transformers finds how a checkpoint's tensors are renamed.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            composite.__init__(self, config, *args, **kwargs)
        except ImportError:  # a tower of another library
            with _empty_towers(config):
                composite.__init__(self, config, *args, **kwargs)
        _leave_out_towers(self)

    def from_config(cls: Any, config: Any, /, *, trust_remote_code: bool = False, **how: Any) -> Any:
        return cls._from_config(config, **how)

    own: dict[str, Any] = {
        "__init__": build,
        "__module__": composite.__module__,
        "from_config": classmethod(from_config),
    }
    if "logits_to_keep" not in inspect.signature(composite.forward).parameters:
        own["forward"] = _forward_of_kept_rows(composite)
    return type(composite.__name__, (composite,), own)


def _forward_of_kept_rows(composite: Any) -> Callable[..., Any]:
    """Return the forward of a class that computes all logits as one that knows `logits_to_keep`."""

    def forward(self: Any, *args: Any, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head: nn.Module = self.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, kept], *given[1:]))
        try:
            return composite.forward(self, *args, **kwargs)
        finally:
            hook.remove()

    return forward


@contextmanager
def _empty_towers(config: Any) -> Iterator[None]:
    """Let transformers build modules without content of all parts of a composite but its text part."""
    from transformers import AutoModel

    text, original = config.get_text_config(), AutoModel.from_config

    def from_config(part: Any, **how: Any) -> Any:
        return original(part, **how) if type(part) is type(text) else nn.Module()

    with _BUILDING:
        AutoModel.from_config = from_config
        try:
            yield
        finally:
            AutoModel.from_config = original


def decoder_of(model: Any) -> nn.Module:
    """Return the part of a language model without its head; the model itself if transformers does not say.

    The prefix in Llama 4's class is that of the composite around it (transformers 5.24).
    """
    decoder: nn.Module = model.base_model
    return decoder if decoder is not model else getattr(model, "model", model)


def _leave_out_towers(model: Any) -> None:
    """Remove what stands beside a composite's language model, and record it as `left_out`.

    Modules that the composite's forward names stay, since it calls them for text as well.
    """
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    prefix = path.rpartition(".")[0]
    parent: Any = model.get_submodule(prefix)
    model.left_out = {}
    if not path or parent.base_model is decoder:
        return
    needed = {model.get_input_embeddings(), model.get_output_embeddings(), decoder}
    named = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
    used = () if named is None else named.co_names
    removed = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in parent.named_children()
        if name not in used and needed.isdisjoint(module.modules())
    }
    for name in removed:
        delattr(parent, name)
    model.left_out = {f"{prefix}.{name}".lstrip("."): count for name, count in removed.items()}
    model.all_tied_weights_keys = {
        name: source
        for name, source in model.all_tied_weights_keys.items()
        if not is_left_out(model, name) and not is_left_out(model, source)
    }
    # Otherwise transformers warns of each of their tensors in the files.
    model._keys_to_ignore_on_load_unexpected |= {rf"^{re.escape(name)}(\.|$)" for name in model.left_out}


def left_out(base: Any) -> Mapping[str, int]:
    """Return the parts of a composite that are not built, by full name, and the number of their weights."""
    parts: Mapping[str, int] = getattr(base, "left_out", {})
    return parts


def is_left_out(base: Any, name: str) -> bool:
    """Return True if a module or parameter of this name belongs to a part that is not built."""
    return any(name == part or name.startswith(f"{part}.") for part in left_out(base))


def set_attention(model: Any, name: str) -> None:
    """Let a base's layers compute attention by a function that is registered with transformers as `name`."""
    text = model.config.get_text_config()
    parts = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    # Of a part that is not built transformers would say that it cannot be checked.
    model.set_attn_implementation({"": name, **dict.fromkeys(parts, name)} if left_out(model) else name)


def empty_base(config: Any, kind: Any = None, **how: Any) -> Any:
    """Build the modules of a base, with parameters on meta, which take no memory.

    `kind`: another class of transformers than the base's; `how`: more of its `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    # Random numbers for nothing are most of the time that building takes.
    with init_empty_weights(include_buffers=False), no_init_weights():
        tree = (kind or base_class(config)).from_config(config, **how)
    tree.tie_weights()
    return tree


def input_embedding(model: Any) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding


def output_head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def hidden_norms(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the norms over the hidden size, which an adapter may replace by its own."""
    hidden = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        named = (
            "norm" in type(module).__name__.lower() and "weight" in own and own.keys() <= {"weight", "bias"}
        )
        if (
            named
            and all(parameter.shape == (hidden,) for parameter in own.values())
            and takes_rows_alone(module)
        ):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer, plain or quantized, that returns its product.

    A router may be one that returns weights and experts instead (Phi-3.5-MoE).
    """
    return isinstance(module, nn.Linear) and "router" not in type(module).__name__.lower()


def takes_rows_alone(module: nn.Module) -> bool:
    """Return True unless `forward` has further arguments, as that of a gated norm has."""
    return len(inspect.signature(module.forward).parameters) == 1


def adaptable_layers(base: nn.Module) -> dict[str, LayerShape]:
    """Return every linear layer, the input embedding, the norms of hidden size and the parameters of experts,
    by full name."""
    layers: dict[str, LayerShape] = {}
    embedding = input_embedding(base)
    norms = {name for name, _ in hidden_norms(base)}
    module: Any
    for name, module in base.named_modules():
        bias = getattr(module, "bias", None) is not None
        if module is embedding:
            layers[name] = LayerShape(embedding.num_embeddings, embedding.embedding_dim, "embedding")
        elif is_linear(module):
            layers[name] = LayerShape(module.in_features, module.out_features, bias=bias)
        elif name in norms:
            layers[name] = LayerShape(len(module.weight), len(module.weight), "norm", bias)
    for place in expert_matrices(base):
        kind: Any = type(place.module)
        count, size_in, size_out = place.sizes
        # PEFT takes a parameter of one expert for a linear layer.
        if count > 1 and takes_rows_in_order(kind):
            layers[place.path] = LayerShape(
                size_in,
                size_out,
                "experts",
                count=count,
                transposed=place.transposed,
                gate_first=place.name == "gate_up_proj" and is_usual(kind),
            )
    return layers


def is_nf4(base: Any) -> bool:
    """Return True if a linear layer is in NF4 and computes in bf16."""
    if type(base).__name__ != "Linear4bit" or base.compute_dtype != torch.bfloat16:
        return False
    return bool(base.weight.quant_state.quant_type == "nf4" and base.weight.dtype == torch.uint8)


def plain_absmax(state: Any) -> torch.Tensor:
    """Return a 4-bit weight's absmax, fp32 [blocks], with double quantization undone.

    Unpacked once per layer on the CPU (1/16 byte a weight): bitsandbytes would do it on every call, a
    tenth of a decode step.
    """
    if not state.nested:
        plain: torch.Tensor = state.absmax
        return plain
    from bitsandbytes.functional import dequantize_blockwise

    unpacked: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return unpacked
