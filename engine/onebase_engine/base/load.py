"""Load the one frozen base: quantized once, never written again.

The base is loaded plain (`load_base`). Serving, proof and training each work on a `view` of it
(`onebase_engine.base.view`); nothing is ever attached to the loaded tree itself.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from onebase_engine import machine
from onebase_engine.base.experts import (
    ExpertStack,
    Int8Stack,
    expert_matrices,
    place_stacks,
    quantize_stack,
    use_own_code,
)
from onebase_engine.base.layers import base_class, decoder_of, empty_base, is_linear, transformers_class

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "none"]

CHUNKED = "chunked_attention"
"""Value of a config's `layer_types` of layers that attend within chunks of positions."""
PAGED_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", CHUNKED})
"""Values of a config's `layer_types` whose state is a KV cache that blocks can hold."""

RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "mamba2", "hybrid"})
"""The same of layers that keep a recurrent state, some of them next to a KV cache. The probe of the served
view decides whether the kernels know it."""
STATELESS_LAYERS = frozenset({"mlp", "moe"})
"""The same of layers that compute each token by itself."""

_SIZES = re.compile(r"(num|n)_.*|.*_(size|dim|rank)|max_position_embeddings")
"""Pattern of the fields of a config that are sizes."""
MOST_PLAIN = 0.05
"""Largest part of a base's weights that may lie outside its linear layers, embeddings and head: room for
routers, and for the convolutions of a part that sees or hears."""

NESTED_BLOCKSIZE = 256
"""bitsandbytes' block for the second quantization (QLoRA, section 3): one fp32 per 256 absmax bytes."""

_STORED_BLOCKSIZE = 64
"""Weights per absmax value in files of 4-bit weights, which transformers' config cannot change."""
_LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
"""Classes of bitsandbytes' layers."""
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Blocksizes, in weights, that bitsandbytes supports."""
_QUANTIZED_AT_ONCE = 1 << 17
"""Weights whose fp32 copy stays in a core's cache; a multiple of every blocksize."""
_LEAST_ABSMAX = 1e-38

MOST_CONFIG_BYTES = 16 << 20
"""Largest size of a base's `config.json`, in bytes."""
MOST_MODULES = {"layers": 4096, "layer": 4096, "depth": 4096, "experts": 16_384}
"""Largest numbers that fields of a config may ask for, by the ends of their names: several times any base's,
and as many experts as Doge has."""

_LONGEST_REASON = 500
"""Characters of a dependency's error in a message of ours."""
_ROTARY_BY_LENGTH = ("longrope", "dynamic")


class UnsupportedBaseError(Exception):
    """The folder holds a model that cannot be served; the message says why."""


class BaseChangedError(RuntimeError):
    """Something wrote to the shared base. The process must stop: nothing it serves is right any more."""


@dataclass(frozen=True)
class BaseSettings:
    """Settings by which the base is loaded. `blocksize` counts weights per absmax value."""

    folder: Path
    quantization: Quantization = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a base in memory, from its config alone."""

    parameters: int
    quantized_bytes: int
    plain_bytes: int

    @property
    def total(self) -> int:
        return self.quantized_bytes + self.plain_bytes


def described(error: BaseException) -> str:
    """Return an error of a dependency in one line, with its class."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_REASON]}"


def check_servable(config: Any) -> None:
    """Raise UnsupportedBaseError for architectures that cannot be paged or quantized, with the reason."""
    try:
        _check_architecture(config)
        stored_quantization(config)
        model = _empty(config)
        _check_modules(model)
        _check_linear(model)
    except UnsupportedBaseError:
        raise
    except Exception as error:
        kind = f"{type(config).__name__} ({getattr(config, 'model_type', 'unknown type')})"
        raise UnsupportedBaseError(
            f"transformers cannot make a model of this {kind} ({described(error)}). Choose a base whose "
            "config.json is complete, or another one."
        ) from error


def _empty(config: Any) -> Any:
    """Build the modules of a base without memory, not even for buffers."""
    # A parameter takes memory until it is moved to meta, and one of a large mixture 77 GB.
    try:
        with _ParametersOnMeta():
            return empty_base(copy.deepcopy(config))
    except Exception:  # it computes with a parameter and a number, which are on two devices then
        with torch.device("meta"):
            return empty_base(copy.deepcopy(config))


class _ParametersOnMeta(TorchFunctionMode):
    """Makes on meta what parameters are made of. Of what else a model computes when it is built, PyTorch has
    no kernels for meta but in Python, which import its compiler: a second, and 80 MB."""

    _made = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in self._made and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def _check_architecture(config: Any) -> None:
    """Raise UnsupportedBaseError unless it is a decoder with a KV cache."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedBaseError(
            f"{name} is an encoder-decoder; OneBase serves decoder-only models. "
            "Choose a causal language model."
        )
    encoder = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    model = transformers_class(config)
    if model is None or encoder:
        raise UnsupportedBaseError(
            f"{name} has no causal language model in transformers; OneBase serves decoder-only text models."
        )
    # Of a model that also sees or hears, the layers are those of its text part.
    text = config.get_text_config()
    _check_sizes(name, text)
    layer_types = set(getattr(text, "layer_types", None) or ())
    foreign = sorted(layer_types - PAGED_ATTENTION_LAYERS - RECURRENT_LAYERS - STATELESS_LAYERS)
    if foreign:
        raise UnsupportedBaseError(
            f"{name} has layers of type {', '.join(foreign)}, whose state OneBase does not know. Choose a "
            "base whose layers attend, or keep a state by convolutions, delta rules or state spaces."
        )
    if getattr(text, "num_kv_shared_layers", None) and text.num_kv_shared_layers >= text.num_hidden_layers:
        raise UnsupportedBaseError(
            f"{name} drafts for another model, whose keys and values all its layers read. Choose that one."
        )


def _check_sizes(name: str, text: Any) -> None:
    """Raise UnsupportedBaseError for a size below zero, of which transformers may make a smaller model."""
    for size, value in text.to_dict().items():
        if type(value) is int and value < 0 and _SIZES.fullmatch(size):
            raise UnsupportedBaseError(
                f"{name}.{size} is {value}, and no size is below zero. Choose a base whose config.json is "
                "complete, or another one."
            )


def _check_modules(model: Any) -> None:
    """Raise UnsupportedBaseError unless decoder and head are named, and attention is replaceable."""
    name, text = type(model).__name__, model.config.get_text_config()
    fields = ("hidden_size", "num_hidden_layers", "vocab_size")
    if unnamed := [field for field in fields if not isinstance(getattr(text, field, None), int)]:
        raise UnsupportedBaseError(
            f"the config of {name} has no {unnamed[0]}: it is no language model over tokens. Choose another "
            "base."
        )
    if decoder_of(model) is model or model.get_output_embeddings() is None:
        raise UnsupportedBaseError(
            f"transformers does not say which part of {name} is the decoder, and which its head. Choose "
            "another base."
        )
    # Some classes lack the flag, though they call the interface. The served view's probe has the last word.
    decoder = decoder_of(model)
    flagged = getattr(decoder, "_supports_attention_backend", True) or getattr(decoder, "_is_stateful", False)
    if not (flagged or getattr(decoder, "_can_set_attn_implementation", lambda: True)()):
        raise UnsupportedBaseError(
            f"{type(model.config).__name__} brings its own attention, which transformers cannot replace by "
            "the paged one. Choose another base."
        )


def stored_quantization(config: Any) -> Quantization:
    """Return how the weights in a base's files are quantized: "none" where they are plain.

    MXFP4, in which gpt-oss has its experts, and fp8 with scales by block count as plain: they are unpacked
    while they are read.

    Raises:
        UnsupportedBaseError: in a format that OneBase does not read.
    """
    if not (fields := _stored_format(config)) or unpacked_format(config):
        return "none"
    kind = fields.get("quant_method") or "a format without a name"
    if fields.get("load_in_8bit"):
        return "int8"
    if fields.get("load_in_4bit"):
        kind = fields.get("bnb_4bit_quant_type") or "fp4"  # bitsandbytes' own default
    if kind == "nf4":
        return "nf4"
    raise UnsupportedBaseError(
        f"the files of this {type(config).__name__} hold weights in {kind}, which OneBase does not read. "
        "Choose the repository with plain weights (often BF16): OneBase quantizes them itself, as "
        "--quantization says."
    )


def unpacked_format(config: Any) -> str | None:
    """Return the format of a base's files that is unpacked while they are read: `mxfp4` or `fp8`."""
    fields = _stored_format(config)
    kind = fields.get("quant_method")
    if kind == "mxfp4" and any(expert_matrices(_empty(config))):
        return "mxfp4"
    # DeepSeek-V4's experts are packed otherwise.
    return "fp8" if kind == "fp8" and fields.get("expert_dtype", "fp8") == "fp8" else None


def _stored_format(config: Any) -> dict[str, Any]:
    """Return the fields by which files say how their weights are quantized; none if they are plain."""
    stored = (
        getattr(config, "quantization_config", None)
        or getattr(config, "compression_config", None)  # an older name of compressed-tensors
        or getattr(config.get_text_config(), "quantization_config", None)
    )
    return stored if isinstance(stored, dict) else stored.to_dict() if stored else {}


def _check_linear(model: nn.Module) -> None:
    """Raise UnsupportedBaseError if much of the base lies outside its linear layers and experts."""
    from transformers.pytorch_utils import Conv1D

    experts = {one.path for one in expert_matrices(model)}
    part, largest = _left_plain(
        model, lambda module: type(module) is nn.Linear or isinstance(module, Conv1D), experts
    )
    if part > MOST_PLAIN:
        name, _, _ = largest.partition(" ")
        owner = model.get_submodule(name.rpartition(".")[0])
        reason = (
            f"OneBase does not quantize layers of class {type(owner).__name__}. Choose another base"
            if "expert" not in f"{name}{type(owner).__name__}".lower()
            else f"{type(owner).__name__} computes a mixture's experts in a way that OneBase does not know. "
            "Choose a mixture whose experts transformers computes through its interface, or a dense base"
        )
        raise UnsupportedBaseError(
            f"{type(model).__name__} has {part:.0%} of its weights outside linear layers, for instance in "
            f"{largest}. {reason}."
        )


def check_quantized(model: nn.Module, settings: BaseSettings) -> None:
    """Raise UnsupportedBaseError if a loaded base is not what its settings say."""
    kinds = {type(module).__name__ for module in model.modules() if any(quantized_statistics(module))}
    if other := kinds - {_LAYERS[settings.quantization]}:
        raise UnsupportedBaseError(
            f"{type(model).__name__} has layers of class {', '.join(sorted(other))}, which --quantization "
            f"{settings.quantization} does not make. Choose the quantization of its files."
        )
    part, largest = _left_plain(model, is_quantized)
    if part > MOST_PLAIN:
        raise UnsupportedBaseError(
            f"{settings.quantization} with blocksize {settings.blocksize} leaves {part:.0%} of the weights "
            f"of {type(model).__name__} in {settings.dtype}, for instance {largest}. Choose blocksize 64, "
            "quantization none, or another base."
        )
    for name, layer in model.named_modules():
        if (found := _block_and_inputs(layer)) is None or found[1] % found[0] == 0:
            continue
        # Quantized, blocks run on over a row's end; bitsandbytes' CPU kernel begins one with each row.
        blocksize, inputs = found
        fitting = [str(size) for size in _BLOCKSIZES if not inputs % size]
        raise UnsupportedBaseError(
            f"{name} has {inputs} inputs, no multiple of blocksize {blocksize}: on a CPU "
            "bitsandbytes may compute with wrong weights. Choose a blocksize that divides it "
            f"({', '.join(fitting) or 'none does'}), or quantization none."
        )


def is_quantized(module: nn.Module) -> bool:
    """Return True for a quantized linear layer, or a stack of quantized experts."""
    return isinstance(module, ExpertStack) or any(quantized_statistics(module))


def _block_and_inputs(layer: Any) -> tuple[int, int] | None:
    """Return the blocksize and the inputs of a layer that is in 4 bits on the CPU, else None."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return None
    if isinstance(layer, ExpertStack):
        return None if isinstance(layer, Int8Stack) else (layer.blocksize, layer.size_in)
    state = getattr(weight, "quant_state", None)
    return None if state is None else (state.blocksize, layer.in_features)


def _left_plain(
    model: Any, quantized: Callable[[nn.Module], bool], but: Collection[str] = ()
) -> tuple[float, str]:
    """Return the part of all weights that stays plain though it multiplies rows, and the largest such weight.

    Vectors do not count, nor do embeddings, which are looked up, nor the output head, nor parameters whose
    full name is among `but`.
    """
    head = model.get_output_embeddings()
    plain = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if module is not head and not isinstance(module, nn.Embedding) and not quantized(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and f"{path}.{name}" not in but
    }
    if not plain:
        return 0.0, ""
    largest = max(plain, key=lambda name: plain[name].numel())
    shape = " x ".join(map(str, plain[largest].shape))
    return sum(p.numel() for p in plain.values()) / parameter_count(model), f"{largest} ({shape})"


@cache
def import_bitsandbytes() -> None:
    """Import bitsandbytes without torch's compiler, which it requests, and register `quantize_nf4` in it.

    bitsandbytes compiles only what has no kernel for a device; ours all have. To import the compiler takes a
    second of CPU and 40 MB in every process that works on the base.
    """
    compiler = torch.compile
    # It takes the function, or settings and then the function.
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        # Its warning is advice to install kernels.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
    # A release that brings a kernel of its own for the CPU keeps it.
    with contextlib.suppress(RuntimeError):
        torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu", quantize_nf4)


def quantize_nf4(
    weight: torch.Tensor, blocksize: int, quant_type: str = "nf4", quant_storage: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as bitsandbytes' `quantize_4bit` does on the CPU, bit for bit, in an eighth of its time.

    Its own way is to search the 16 values for each weight: 40 seconds of a core for a billion of them.

    Returns:
        Two values a byte, uint8 [ceil(n / 2), 1], and absmax, fp32 [ceil(n / blocksize)].
    """
    if quant_type != "nf4" or quant_storage != torch.uint8:
        raise NotImplementedError(f"{quant_type} in {quant_storage}: OneBase quantizes to nf4 in torch.uint8")
    weights = weight.reshape(-1)
    count = weights.numel()
    packed = np.empty(-(-count // 2), np.uint8)
    absmax = torch.empty(-(-count // blocksize))
    threads = torch.get_num_threads()
    part = -(-count // threads // _QUANTIZED_AT_ONCE) * _QUANTIZED_AT_ONCE

    def quantize(start: int) -> None:
        own = packed[start // 2 :], absmax[start // blocksize :]
        _quantize_part(weights[start : start + part], blocksize, *own)

    if part < count:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(quantize, range(0, count, part)))
    elif count:
        quantize(0)
    return torch.from_numpy(packed).unsqueeze(1), absmax


def _quantize_part(
    weights: torch.Tensor, blocksize: int, packed: npt.NDArray[np.uint8], absmax: torch.Tensor
) -> None:
    """Quantize `weights` [n] into the beginning of `packed` and `absmax`, a cache's worth at once."""
    code = _nf4_code()
    bounds = ((code[:-1] + code[1:]) / 2).numpy()
    size = min(_QUANTIZED_AT_ONCE, weights.numel() + 1)
    scaled = torch.empty(size)
    values, below = np.empty(size, np.uint8), np.empty(size, np.bool_)
    for start in range(0, weights.numel(), _QUANTIZED_AT_ONCE):
        some = weights[start : start + _QUANTIZED_AT_ONCE]
        count = some.numel()
        full = count - count % blocksize
        scaled[:count] = some
        largest = absmax[start // blocksize :]
        if full:
            blocks = scaled[:full].view(-1, blocksize)
            torch.amax(blocks.abs(), -1, out=largest[: len(blocks)])
            blocks.mul_(1.0 / largest[: len(blocks), None].clamp(min=_LEAST_ABSMAX))
        if full < count:
            # As bitsandbytes does: it divides by the largest of a last block that is not whole.
            rest = scaled[full:count]
            largest[full // blocksize] = rest.abs().max().clamp(min=_LEAST_ABSMAX)
            rest.div_(largest[full // blocksize])
        scaled[:count].clamp_(-1, 1)
        if count % 2:
            scaled[count] = 0
            count += 1
        chosen, found = values[:count], below[:count]
        chosen.fill(len(bounds))
        for bound in bounds:
            np.less_equal(scaled[:count].numpy(), bound, out=found)
            np.subtract(chosen, found.view(np.uint8), out=chosen)
        np.bitwise_or(chosen[::2] << 4, chosen[1::2], out=packed[start // 2 : (start + count) // 2])


@cache
def _nf4_code() -> torch.Tensor:
    """Return the 16 values of NF4, fp32, in ascending order."""
    from bitsandbytes.functional import get_4bit_type

    code: torch.Tensor = get_4bit_type("nf4", device="cpu")
    return code


def load_config(folder: Path) -> Any:
    """Load a base's config as `read_config` does. Raises UnsupportedBaseError if it is unservable."""
    config = read_config(folder)
    check_servable(config)
    return config


def read_config(folder: Path) -> Any:
    """Return transformers' config of the base in a folder, or in a config.json; it may be unservable.

    Raises:
        UnsupportedBaseError: transformers does not know such a base, or the config asks for more modules than
            any base has, which transformers would begin to make one by one.
    """
    from transformers import AutoConfig

    try:
        _check_counts(folder if folder.is_file() else folder / "config.json")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _tie_alone(config)
        return config
    except UnsupportedBaseError:
        raise
    except Exception as error:
        if machine.explain_refusal(error) is not None:
            raise
        raise UnsupportedBaseError(
            f"{folder} holds no base that transformers knows: {described(error)}"
        ) from error


def _tie_alone(config: Any) -> None:
    """Let a text model share its head's weight with its embedding where the composite around it does.

    transformers builds some composites' language models by the text part of the config alone (Qwen3.5), which
    need not repeat that.
    """
    text, found = config.get_text_config(), transformers_class(config)
    alone = found is not None and text is not config and found.config_class is type(text)
    if alone and getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True


def _check_counts(path: Path) -> None:
    """Raise UnsupportedBaseError if a config is too long, or has too many layers or experts somewhere."""
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise UnsupportedBaseError(
            f"{path} is over {MOST_CONFIG_BYTES >> 20} MiB, and no base's config is. Download the base again."
        )
    waiting = [json.loads(path.read_bytes())]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            for name, value in part.items():
                most = next((MOST_MODULES[end] for end in MOST_MODULES if name.endswith(end)), None)
                if most is not None and isinstance(value, int) and value > most:
                    raise UnsupportedBaseError(
                        f"{path} has {name:.80} = {value:.6g}, and OneBase builds no more than {most}. "
                        "Choose another base."
                    )


def config_for(settings: BaseSettings) -> Any:
    """Return transformers' config by which the base is loaded as its settings say.

    Raises:
        UnsupportedBaseError: it cannot be served, or its files hold what the settings do not say.
    """
    config = load_config(settings.folder)
    stored = stored_quantization(config)
    if stored == "none":
        return config
    if next(expert_matrices(_empty(config)), None) is not None:
        raise UnsupportedBaseError(
            f"the files in {settings.folder} hold a mixture of experts that is quantized to {stored} "
            "already, which OneBase does not read: choose the repository with plain weights"
        )
    if stored != settings.quantization:
        raise UnsupportedBaseError(
            f"the files in {settings.folder} hold weights that are quantized to {stored} already, and "
            f"--quantization is {settings.quantization}: start with --quantization {stored}, or choose a "
            "base with plain weights"
        )
    if stored == "nf4" and settings.blocksize != _STORED_BLOCKSIZE:
        raise UnsupportedBaseError(
            f"the files in {settings.folder} hold weights that are quantized to nf4 in blocks of "
            f"{_STORED_BLOCKSIZE} already, and --blocksize is {settings.blocksize}: leave it out"
        )
    # What is no part of the weights is the settings'. A threshold would treat columns by a batch's largest.
    compute = str(settings.compute_dtype).removeprefix("torch.")
    config.quantization_config |= {"llm_int8_threshold": 0.0, "bnb_4bit_compute_dtype": compute}
    return config


def load_base(settings: BaseSettings) -> nn.Module:
    """Load the base, frozen and in eval mode, on its device, with eager attention.

    Raises:
        UnsupportedBaseError: the model cannot be served, or its files are missing.
    """
    import_bitsandbytes()
    config = config_for(settings)
    by_hand = settings.quantization == "nf4" and settings.blocksize != _STORED_BLOCKSIZE
    how = None
    if not by_hand and stored_quantization(config) == "none":
        how = _quantization_config(settings, config)
    unpacked = unpacked_format(config)
    if unpacked is not None and how is not None:
        logger.info(
            "weights that the files hold in %s are unpacked, and quantized to %s",
            unpacked, settings.quantization,
        )  # fmt: skip
        _forget_format(config)
    elif unpacked == "mxfp4":
        from transformers import Mxfp4Config

        how = Mxfp4Config(dequantize=True)
    elif unpacked == "fp8":
        from onebase_engine.base.quantizers import plain_from_fp8

        how = plain_from_fp8(_stored_format(config))
        _forget_format(config)
    if settings.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
    try:
        model: nn.Module
        model, found = base_class(config).from_pretrained(
            settings.folder,
            config=config,
            output_loading_info=True,
            dtype=settings.dtype,
            quantization_config=how,
            device_map={"": "cpu" if by_hand else str(settings.device)},
            attn_implementation="eager",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:
        if machine.is_out_of_memory(error):
            raise
        name = type(config).__name__
        raise UnsupportedBaseError(f"cannot load {settings.folder} ({name}): {described(error)}") from error
    if missing := sorted(found["missing_keys"]):
        # transformers fills them with random numbers, and warns.
        raise UnsupportedBaseError(
            f"the files in {settings.folder} lack {len(missing)} of the tensors of {type(model).__name__}, "
            f"{missing[0]} among them: download the base again, or choose another one"
        )
    if scales := sorted(name for name in found["unexpected_keys"] if name.endswith("_scale_inv")):
        raise UnsupportedBaseError(
            f"the files in {settings.folder} hold weights in fp8 of which OneBase does not know the place of "
            f"the scales, such as {scales[0]}: choose the repository with plain weights (often BF16)"
        )
    if by_hand:
        _quantize_layers(model, settings)
        model.to(settings.device)
        # What transformers sets: by it PEFT chooses its layers for 4-bit weights, which add in another order.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    if settings.quantization != "none":
        check_quantized(model, settings)
    return freeze(model)


def _forget_format(config: Any) -> None:
    """Take from a config how its files hold their weights, which transformers would follow."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' line on each 8-bit layer of each forward when x is not fp16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def freeze(model: nn.Module) -> nn.Module:
    """Set eval mode without gradients, pin rotary frequencies, and keep bitsandbytes from repacking weights.

    With `support_avx512bf16_for_cpu` on, the first forward on a CPU rewrites the 4-bit weight and rounds its
    statistics: another base from then on, and one without a backward.
    """
    model.eval()
    model.requires_grad_(False)
    use_own_code(model)
    _pin_rotary(model)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        held = getattr(getattr(layer, "weight", None), "CB", None)
        if held is not None and hasattr(layer, "init_8bit_state"):
            # Else the first forward would move the statistics out of the parameter that every view shares.
            layer.init_8bit_state()
            layer.forward = partial(_int8_product, layer)
    return model


def _int8_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a layer of bitsandbytes in int8, which itself takes no rows of four dimensions, as latent
    attention has them."""
    product: torch.Tensor = type(layer).forward(layer, x.flatten(0, -2) if x.dim() > 3 else x)
    return product.view(*x.shape[:-1], layer.out_features)


def _pin_rotary(model: nn.Module) -> None:
    """Pin the rotary frequencies of a freshly loaded model, which hold up to `longest_row`.

    "longrope" (Phi-3 with 128k, Phi-4-mini) has two sets of frequencies, "dynamic" others for each length
    beyond `max_position_embeddings`. transformers chooses for all positions of a pass by the highest among
    them, and writes into the module's buffer: a long row would change its neighbours, a chunk the next one,
    and every pass the tensors of the shared base.
    """
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {
                layers: "default" if own in _ROTARY_BY_LENGTH else own for layers, own in kind.items()
            }
        elif kind in _ROTARY_BY_LENGTH:
            module.rope_type = "default"


def exact_length(config: Any) -> int | None:
    """Return the longest sequence, in tokens, with fixed rotary frequencies; None: what the config promises.

    Args:
        config: of the text part.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    limits = [
        int(part["original_max_position_embeddings"]) for part in sets if part.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def longest_row(config: Any) -> int | None:
    """Return the longest sequence, in tokens (prompt and reply), or None if the config names no limit."""
    text = config.get_text_config()
    limits = (getattr(text, "max_position_embeddings", None), exact_length(text))
    return min((limit for limit in limits if limit), default=None)


def eos_ids(base: Any) -> frozenset[int]:
    """Return the tokens that end a text: those of the base's generation config and of its config."""
    found: set[int] = set()
    for source in (getattr(base, "generation_config", None), base.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(found)


def _quantization_config(settings: BaseSettings, config: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if settings.quantization == "none":
        return None
    skipped = _skipped_modules(settings, config)
    if settings.quantization == "nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=settings.compute_dtype,
            llm_int8_skip_modules=skipped,
        )
    else:
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skipped)
    routed = next(expert_matrices(_empty(config)), None) is not None
    if not (routed or unpacked_format(config)):
        return how
    from onebase_engine.base.quantizers import with_experts

    return with_experts(how, _stored_format(config))


def _skipped_modules(settings: BaseSettings, config: Any) -> list[str] | None:
    """Return the names of the modules to leave unquantized, or None if transformers' own choice is enough."""
    from transformers.quantizers.base import get_keys_to_not_convert

    model = _empty(config)
    left = [
        name
        for name, module in model.named_modules()
        if _is_narrow(module, settings.blocksize)
        or (isinstance(module, nn.Linear) and not is_linear(module))
        or _is_read(name, model)
    ]
    return [*get_keys_to_not_convert(model), *left] if left else None


def quantized_layers(settings: BaseSettings, model: nn.Module) -> frozenset[str]:
    """Return the names of the linear layers of a model's tree that `load_base` quantizes.

    Args:
        model: it may be on meta.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    if settings.quantization == "none":
        return frozenset()
    plain = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_linear(module)
    }
    if settings.quantization == "nf4" and settings.blocksize != _STORED_BLOCKSIZE:
        output = cast(Any, model).get_output_embeddings()
        kept = [name for name, module in plain.items() if module is output]
    else:
        kept = get_keys_to_not_convert(model)
    return frozenset(
        name
        for name, module in plain.items()
        if should_convert_module(name, kept) and not _is_narrow(module, settings.blocksize)
    )


@torch.no_grad()
def rounded(weight: torch.Tensor, settings: BaseSettings) -> torch.Tensor:
    """Return a linear layer's weight as it is computed with once it is quantized, in the settings' dtype."""
    from bitsandbytes import functional

    with torch.inference_mode(False):  # the quantizer writes into parts of tensors
        found: torch.Tensor
        plain = weight.to(settings.dtype, copy=True)
        if settings.quantization == "nf4":
            packed, state = functional.quantize_4bit(
                plain,
                blocksize=settings.blocksize,
                compress_statistics=settings.double_quant,
                quant_type="nf4",
            )
            found = functional.dequantize_4bit(packed, state)
        elif settings.quantization == "int8":
            codes, largest, _ = functional.int8_vectorwise_quant(plain.to(torch.float16))
            found = functional.int8_vectorwise_dequant(codes, largest)
        else:
            found = plain
        return found.to(settings.dtype)


def _is_narrow(module: Any, blocksize: int) -> bool:
    """Return True for a linear layer with less inputs than a block, which is left unquantized.

    Such a layer is tiny (Gemma 3n: 4 inputs), and modelling code may use its weight as it is.
    """
    return type(module) is nn.Linear and module.in_features < min(blocksize, _STORED_BLOCKSIZE)


def _is_read(name: str, model: nn.Module) -> bool:
    """Return True for a linear layer of a router that multiplies by the layer's weight itself (LongCat's)."""
    owner, _, child = name.rpartition(".")
    return child == "classifier" and "router" in type(model.get_submodule(owner)).__name__.lower()


def _quantize_layers(model: Any, settings: BaseSettings) -> None:
    """Quantize to NF4 with a blocksize other than 64, which transformers' config cannot express."""
    import bitsandbytes as bnb

    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        left = module is output or _is_narrow(module, settings.blocksize) or _is_read(name, model)
        if type(module) is not nn.Linear or left:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=settings.compute_dtype,
            compress_statistics=settings.double_quant,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data,
            requires_grad=False,
            blocksize=settings.blocksize,
            compress_statistics=settings.double_quant,
            quant_type="nf4",
            module=layer,
        )
        layer.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(settings.device))
    for one in list(expert_matrices(model)):
        stack = quantize_stack(
            getattr(one.module, one.name).data,
            transposed=one.transposed,
            blocksize=settings.blocksize,
            double_quant=settings.double_quant,
        )
        place_stacks(model, {one.path: stack})


def quantized_statistics(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that belong to a quantized layer's weight but are no parameters of it."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield "absmax", state.absmax
        yield "code", state.code
        if state.nested:
            yield "offset", state.offset
            yield "nested_absmax", state.state2.absmax
            yield "nested_code", state.state2.code
    layer_state = getattr(module, "state", None)
    for owner, label in ((weight, ""), (layer_state, "state_")):
        for attribute in ("CB", "SCB"):
            tensor = getattr(owner, attribute, None)
            if isinstance(tensor, torch.Tensor):
                yield label + attribute, tensor


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of the base by name: parameters, all buffers, quantization statistics."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    for name, module in model.named_modules():
        for label, tensor in quantized_statistics(module):
            tensors[f"{name}.weight#{label}"] = tensor
    return tensors


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of the base's storages, each counted once however many names it has."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in base_tensors(model).values()
    }
    return sum(storages.values())


def parameter_count(model: nn.Module) -> int:
    """Count the weights of the model as published: a 4-bit weight counts by its unpacked shape."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    stacks = [module for module in model.modules() if isinstance(module, ExpertStack)]
    return total + sum(stack.weights - stack.weight.numel() for stack in stacks)


def fingerprint(model: nn.Module) -> dict[str, tuple[int, int, torch.dtype]]:
    """Return `(data_ptr, _version, dtype)` of each base tensor. If it changes, somebody wrote to the base."""
    return {name: (t.data_ptr(), t._version, t.dtype) for name, t in base_tensors(model).items()}


@torch.inference_mode()
def content_sum(model: nn.Module) -> int:
    """Return a sum over the bytes of the base's tensors, which reveals a write by any process.

    Made where they are by a few launches a tensor, and read once. Words are summed by columns and by rows of
    a square, with weights. A word's own is odd, so that no change of one is lost modulo 2^64; words that
    change places are seen, but for a rare chance.
    """
    sums: list[torch.Tensor] = []
    for tensor in base_tensors(model).values():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if content.storage_offset() % 8:
            content = content.clone()  # words begin at multiples of their size
        words = content[: len(content) // 8 * 8].view(torch.int64)
        side = math.isqrt(len(words))
        square = words[: side * side].view(side, side)
        sums += [_weighted(square.sum(0)) + 2 * _weighted(square.sum(1))]
        sums += [_weighted(part) for part in (words[side * side :], content[8 * len(words) :])]
    # Buffers may be on the host.
    found = sorted(sums, key=lambda one: one.device.type)
    return int(_weighted(torch.stack([one.to(found[0].device) for one in sums])))


def _weighted(words: torch.Tensor) -> torch.Tensor:
    """Return the sum of the words by odd weights, [] int64."""
    return (words * (2 * torch.arange(len(words), device=words.device) + 1)).sum(dtype=torch.int64)


def estimate_memory(
    model: Any,
    quantization: Quantization,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryEstimate:
    """Estimate the bytes that `load_base` takes for a `model` (from `empty_base`).

    Linear layers but the output head are quantized. NF4 stores half a byte a weight plus one absmax per
    block: fp32, or with double quantization one byte plus fp32 per 256 blocks (QLoRA, section 3).
    """
    output = model.get_output_embeddings()
    parameters = plain = quantized = 0
    experts = {(one.module, one.name): one for one in expert_matrices(model)}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            count = parameter.numel()
            tied = module is output and name == "weight" and _is_tied(model)
            if tied:
                continue
            parameters += count
            linear = type(module) is nn.Linear and module is not output and name == "weight"
            linear &= not _is_narrow(module, blocksize)
            if quantization != "none" and (module, name) in experts:
                number, size_in, size_out = experts[module, name].sizes
                if quantization == "int8":
                    quantized += count + 4 * number * size_out
                    continue
                statistics = _nf4_statistics(size_in * size_out, blocksize, double_quant, matrices=number)
                quantized += -(-count // 2) + statistics
            elif quantization == "none" or not linear:
                plain += count * dtype.itemsize
            elif quantization == "int8":
                quantized += count + 4 * parameter.shape[0]
            else:
                quantized += -(-count // 2) + _nf4_statistics(count, blocksize, double_quant)
        plain += sum(buffer.nbytes for _, buffer in module.named_buffers(recurse=False))
    return MemoryEstimate(parameters=parameters, quantized_bytes=quantized, plain_bytes=plain)


def needed_memory(settings: BaseSettings) -> int:
    """Return the bytes that the base in a folder will take, from its config alone.

    Raises:
        UnsupportedBaseError: it cannot be served, or its files hold what the settings do not say.
    """
    model = _empty(config_for(settings))
    return estimate_memory(
        model,
        settings.quantization,
        blocksize=settings.blocksize,
        double_quant=settings.double_quant,
        dtype=settings.dtype,
    ).total


def _nf4_statistics(count: int, blocksize: int, double_quant: bool, matrices: int = 1) -> int:
    """Return the bytes of a 4-bit weight's statistics: absmax of `count` values and the 16 fp32 of the code.

    Double quantization: one byte an absmax, their own fp32 absmax, the fp32 offset and a code of 256 fp32.
    `matrices`, of `count` values each, share their codes.
    """
    blocks = -(-count // blocksize)
    if not double_quant:
        return matrices * 4 * blocks + 4 * 16
    return matrices * (blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4) + 4 * 256 + 4 * 16


def _is_tied(model: Any) -> bool:
    """Return True if the head multiplies by the input embedding's weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
