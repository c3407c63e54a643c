"""Mixtures: bitsandbytes' numbers in each expert's matrices, rows of their own beside any, PEFT's texts."""

from __future__ import annotations

import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import bitsandbytes.nn as bnb_nn
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.harness import Lab, LiveBytes, Request, run
from tests.oracle import greedy
from tests.tiny import ATTENTION, MIXTURES, MLP, load_folder, randomize, save_adapter, save_base, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from onebase_adapters.proof.texts import served_regrets, tie_of
from onebase_engine import machine
from onebase_engine.base import quantized_cache
from onebase_engine.base.experts import (
    ExpertStack,
    Int8Stack,
    expert_matrices,
    expert_modules,
    own_code,
)
from onebase_engine.base.load import (
    BaseSettings,
    UnsupportedBaseError,
    base_bytes,
    base_tensors,
    fingerprint,
    load_base,
    needed_memory,
    parameter_count,
)
from onebase_engine.base.quantized_cache import load_kept_base
from onebase_engine.base.quantizers import plain_from_fp8
from onebase_engine.base.view import peft_view, view
from onebase_engine.engine.base_check import check_base
from onebase_engine.engine.base_proof import prove_base, rounded_once_more
from onebase_engine.engine.experts import UnsupportedExpertsError, attach_experts
from onebase_engine.engine.model import ServedModel
from onebase_engine.kernels.cpu import CpuKernels, load_library
from onebase_engine.kernels.interface import Contexts, Kernels, RowMap
from onebase_engine.kernels.recorded_calls import Arena, Fixed, Recording
from onebase_engine.kernels.reference import ReferenceKernels

KERNELS: dict[str, Callable[[], Kernels | None]] = {"torch": ReferenceKernels, "library": load_library}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a mixture, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_base(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = KERNELS[request.param]()
    if found is None:
        pytest.skip("the library is not built")
    return found


def plain_matrices(folder: Path) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Each parameter of experts as the base's files have it, in bf16, with its name and orientation."""
    for place in expert_matrices(load_base(BaseSettings(folder, quantization="none"))):
        yield place.path, getattr(place.module, place.name).detach(), place.transposed


@pytest.mark.parametrize("changes", [{}, {"double_quant": False}, {"blocksize": 32}], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_matrix_has_the_numbers_that_bitsandbytes_gives_it_alone(
    kind: str, changes: dict[str, Any], folders: Callable[[str], Path]
) -> None:
    settings = BaseSettings(folders(kind), **changes)
    base = load_base(settings)
    for path, plain, transposed in plain_matrices(folders(kind)):
        stack = base.get_submodule(path)
        assert isinstance(stack, ExpertStack)
        assert stack.shape == plain.shape
        for number, matrix in enumerate(plain):
            packed, state = bnb.quantize_4bit(
                (matrix.T if transposed else matrix).contiguous(),
                blocksize=settings.blocksize,
                compress_statistics=settings.double_quant,
                quant_type="nf4",
            )
            assert torch.equal(stack.weight[number], packed.flatten())
            assert torch.equal(stack.absmax[number], state.absmax)
            wanted = bnb.dequantize_4bit(packed, state)
            assert torch.equal(stack[number], wanted.T if transposed else wanted)
            assert torch.equal(stack.layer(number)(torch.eye(stack.size_in).bfloat16()).T, wanted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_matrix_in_int8_has_the_numbers_that_bitsandbytes_gives_a_linear_layer(
    kind: str, folders: Callable[[str], Path]
) -> None:
    base = load_base(BaseSettings(folders(kind), quantization="int8"))
    assert type(base.get_submodule("model.layers.0.self_attn.q_proj")).__name__ == "Linear8bitLt"
    for path, plain, transposed in plain_matrices(folders(kind)):
        stack = base.get_submodule(path)
        assert isinstance(stack, Int8Stack)
        assert stack.shape == plain.shape
        for number, matrix in enumerate(plain):
            own = (matrix.T if transposed else matrix).contiguous()
            layer: Any = bnb_nn.Linear8bitLt(own.shape[1], own.shape[0], bias=False, has_fp16_weights=False)
            layer.weight = bnb_nn.Int8Params(own, requires_grad=False, has_fp16_weights=False)
            layer = layer.to("cpu")
            assert torch.equal(stack.weight[number], layer.weight.CB)
            assert torch.equal(stack.absmax[number], layer.weight.SCB)
            wanted = bnb.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB).bfloat16()
            assert torch.equal(stack[number], wanted.T if transposed else wanted)
            assert torch.equal(stack.layer(number)(torch.eye(stack.size_in).bfloat16()).T, wanted)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_takes_the_memory_that_its_config_says(kind: str, folders: Callable[[str], Path]) -> None:
    settings = BaseSettings(folders(kind))
    base = load_base(settings)
    stacked = [module for module in base.modules() if isinstance(module, ExpertStack)]
    assert stacked, "experts are quantized"
    found = check_base(tf.AutoConfig.from_pretrained(folders(kind)))
    assert found.refusal is None
    assert found.parameters == parameter_count(base)
    for quantization in found.memory:
        settings = replace(settings, quantization=quantization)
        base = load_base(settings)
        assert found.memory[quantization] == pytest.approx(base_bytes(base), rel=0.03)
        assert needed_memory(settings) == pytest.approx(base_bytes(base), rel=0.03)
    assert list(found.memory) == ["nf4", "int8", "none"]


MOST_WHILE_LOADING = 1.25
"""Memory that loading takes beyond what the base takes, in the largest parameter of experts in bf16."""


def test_a_mixture_of_30_billion_weights_is_loaded_in_18_gb() -> None:
    config = tf.Qwen3MoeConfig(  # Qwen3-30B-A3B
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, max_position_embeddings=40_960,
    )  # fmt: skip
    found = check_base(config)
    assert found.parameters is not None
    assert found.parameters > 30e9
    assert found.memory["nf4"] + MOST_WHILE_LOADING * 2 * 128 * 2 * 768 * 2048 < 18e9


def test_loading_holds_no_more_than_the_largest_parameter_in_full(tmp_path: Path) -> None:
    config = MIXTURES["qwen3_moe"]()
    config.num_hidden_layers, config.num_experts, config.moe_intermediate_size = 12, 16, 256
    settings = BaseSettings(save_model(config, tmp_path / "base"))
    loaded: list[nn.Module] = []
    most = LiveBytes.measure(lambda: loaded.append(load_base(settings)))
    largest = max(2 * math.prod(place.sizes) for place in expert_matrices(loaded[0]))
    whole = 2 * parameter_count(loaded[0])
    allowed = base_bytes(loaded[0]) + MOST_WHILE_LOADING * largest
    assert 2 * allowed < whole, "else this shows nothing"
    assert most < allowed


@pytest.mark.parametrize(
    ("kind", "quantization"), [("deepseek_v3", "nf4"), ("gpt_oss", "nf4"), ("gpt_oss", "int8")]
)
def test_a_second_start_reads_the_quantized_experts(
    kind: str,
    quantization: Any,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    monkeypatch.setattr(quantized_cache, "LEAST", 0)
    monkeypatch.setattr(quantized_cache, "SPARED", 0)
    settings = BaseSettings(folders(kind), quantization=quantization)
    first = load_kept_base(settings)
    monkeypatch.setattr(quantized_cache, "load_base", None)
    second = load_kept_base(settings)
    ours, theirs = base_tensors(first), base_tensors(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    ids = torch.arange(40)[None] + 3
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind != "llama4_text"])
def test_experts_have_the_bits_of_the_models_own_code(
    kind: str, quantization: Any, folders: Callable[[str], Path], kernels: Kernels
) -> None:
    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    served = view(base)
    assert len(attach_experts(served, kernels)) == len(list(expert_matrices(base)))
    draw = torch.Generator().manual_seed(0)
    for path, own in expert_modules(base):
        count = len(own.down_proj if quantization == "none" else own.down_proj.weight)
        for rows in (1, 7, 32):
            x = torch.randn(rows, 128, generator=draw).bfloat16()
            scores = torch.rand(rows, count, generator=draw)
            weights, chosen = scores.topk(2)
            for factors in (weights, weights.bfloat16()):
                with torch.inference_mode():
                    expected = own_code(own)(own, x, chosen, factors)
                    assert torch.equal(served.get_submodule(path)(x, chosen, factors), expected)


def library() -> CpuKernels:
    found = load_library()
    if found is None:
        pytest.skip("the library is not built")
    return found


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("mixtral", "nf4"), ("mixtral", "none"), ("qwen3_moe", "nf4"), ("olmoe", "nf4"), ("minimax_m2", "nf4")],
)
def test_a_mixtures_layers_run_as_one_call_with_the_bits_of_single_ones(
    kind: str, quantization: Any, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    lab = Lab(load_base(BaseSettings(folders(kind), quantization=quantization)), [], [], [])
    asked = [Request(tuple(range(5 + at, 40 + 19 * at)), None, 8) for at in range(3)]
    engine = lab.engine(step_tokens=60)
    layers = engine.model._recorded
    assert [len(layer.chain) for layer in layers] == [len(layers)] + [0] * (len(layers) - 1)
    texts = run(engine, asked)
    monkeypatch.setitem(sys.modules, "onebase_engine.engine.fusion", None)
    plain = lab.engine(step_tokens=60)
    assert not plain.model._recorded
    assert run(plain, asked) == texts


def test_recorded_calls_call_a_router_for_the_rows_of_each_step_and_raise_its_errors() -> None:
    kernels = library()
    asked: list[int] = []

    def choose(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        asked.append(len(rows))
        if rows.isnan().any():
            raise ZeroDivisionError("no expert will do")
        return rows.argmax(-1), rows + rows

    place = Fixed(torch.zeros(1, 8, 32, dtype=torch.bfloat16))
    nothing = np.zeros(0, np.int32)
    step = Contexts(nothing, nothing, nothing[None], nothing[None, None])
    with Recording(kernels, Arena(), [place]) as recording:
        _, doubled = kernels.route(choose, place.tensor[0])
        program = recording.program(kernels.add(place.tensor, doubled[None]))

    def given(x: torch.Tensor) -> torch.Tensor:
        some = program if x.shape[1] == 8 else program.first_rows(x.shape[1])
        return some.run_calls([x], RowMap(), step)

    for rows in (8, 3):
        x = torch.randn(1, rows, 32).bfloat16()
        assert torch.equal(given(x), x + (x + x))
    with pytest.raises(ZeroDivisionError, match="no expert will do"):
        given(torch.full((1, 8, 32), torch.nan).bfloat16())
    assert torch.equal(given(torch.ones(1, 8, 32).bfloat16()), torch.full((1, 8, 32), 3.0).bfloat16())
    assert asked == [8, 8, 3, 8, 8]


def test_an_expert_that_there_is_not_is_refused(folders: Callable[[str], Path]) -> None:
    served = view(load_base(BaseSettings(folders("mixtral"))))
    attach_experts(served, library())
    path, _ = next(expert_modules(served))
    x, weights = torch.zeros(3, 128).bfloat16(), torch.ones(3, 2)
    for number in (-1, 6):
        with pytest.raises(ValueError, match="an expert that there is not"):
            served.get_submodule(path)(x, torch.tensor([[0, 1], [2, number], [4, 5]]), weights)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_a_router_gives_each_row_what_it_gives_by_itself(
    kind: str, folders: Callable[[str], Path], kernels: Kernels
) -> None:
    base = load_base(BaseSettings(folders(kind)))
    served = view(base)
    routers = [path for path, one in base.named_modules() if "router" in type(one).__name__.lower()]
    attach_experts(served, kernels)
    assert routers
    draw = torch.Generator().manual_seed(0)
    for path in routers:
        for rows in (1, 31, 32, 70):
            x = torch.randn(rows, 128, generator=draw).bfloat16()
            tiles = torch.split(nn.functional.pad(x, (0, 0, 0, -rows % 32)), 32)
            with torch.inference_mode():
                expected = [
                    torch.cat(some)[:rows] for some in zip(*map(base.get_submodule(path), tiles), strict=True)
                ]
                found = served.get_submodule(path)(x)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("experts", [1, 2])
def test_llama_4_computes_only_the_experts_that_rows_have_chosen(experts: int, tmp_path: Path) -> None:
    config = MIXTURES["llama4_text"]()
    config.num_experts_per_tok = experts
    folder = save_model(config, tmp_path)
    settings = BaseSettings(folder, quantization="none", dtype=torch.float32, compute_dtype=torch.float32)
    ours: Any = load_base(settings)
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    path = "model.layers.1.feed_forward"
    products: list[int] = []
    act = ours.get_submodule(path).experts.act_fn
    act.register_forward_hook(lambda module, args, result: products.append(len(result)))
    for rows in (1, 9, 40):
        x = torch.randn(1, rows, 128)
        with torch.inference_mode():
            found, expected = ours.get_submodule(path)(x), theirs.get_submodule(path)(x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert sum(products) == rows * experts
        products.clear()


@given(data=st.data())
@pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((kind, "nf4") for kind in MIXTURES), ("qwen3_moe", "int8"), ("gpt_oss", "int8"), ("mixtral", "none")],
)
def test_a_row_has_its_bits_beside_neighbours_that_choose_other_experts(
    kind: str,
    quantization: Any,
    folders: Callable[[str], Path],
    kernels: Kernels,
    data: st.DataObject,
) -> None:
    mixture = _served_layer(folders(kind), quantization, kernels)
    rows = data.draw(st.integers(1, 90))
    own = data.draw(st.integers(0, rows - 1))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    x = 2 * torch.randn(1, rows, 128, generator=draw).bfloat16()
    alone = x[:, own : own + 1]
    if data.draw(st.booleans()):  # as many as have chosen the row's experts
        x = alone + (x - alone) * (torch.rand(1, rows, 1, generator=draw) < 0.5)
    with torch.inference_mode():
        assert torch.equal(mixture(x)[:, own], mixture(alone)[:, 0])


_layers: dict[tuple[Path, str, str], Callable[[torch.Tensor], torch.Tensor]] = {}


def _served_layer(
    folder: Path, quantization: Any, kernels: Kernels
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Everything that a served layer does with its rows after attention."""
    key = folder, quantization, kernels.name
    if key not in _layers:
        base = load_base(BaseSettings(folder, quantization=quantization))
        model = ServedModel(base, 1, kernels=kernels)
        layer = model._view.model.layers[-1]
        for module in layer.modules():
            if type(module).__name__.endswith(("Attention", "MLA")):
                module.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)

        def rows(x: torch.Tensor) -> torch.Tensor:
            # As the engine packs them.
            padding = -x.shape[1] % model.row_multiple
            padded = nn.functional.pad(x, (0, 0, 0, padding))
            result: torch.Tensor = layer(hidden_states=padded)[:, : x.shape[1]]
            return result

        _layers[key] = rows
    return _layers[key]


ADAPTED: dict[str, list[str]] = {
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj", *MLP],
    "gpt_oss": ATTENTION,
    "llama4_text": [*ATTENTION, *MLP],
    "longcat_flash": ["q_b_proj", "kv_b_proj", "o_proj", *MLP],
    "gemma4_moe": [*ATTENTION, *MLP],
    "olmoe": ATTENTION,
    "qwen3_5_moe": [*ATTENTION, *MLP, "in_proj_qkv", "in_proj_z", "out_proj"],
    "granite_h_moe": [*ATTENTION, "in_proj", "input_linear", "output_linear"],
    "glm4_moe": [*ATTENTION, *MLP],
    "ernie4_5_moe": [*ATTENTION, *MLP],
}


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        *((kind, "nf4") for kind in ADAPTED),
        ("qwen3_moe", "int8"),
        ("gpt_oss", "int8"),
        ("qwen3_moe", "none"),
    ],
)
def test_a_mixed_batch_over_a_mixture_is_pefts(
    kind: str, quantization: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    before = fingerprint(base)
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    saved = []
    for number, ends in enumerate((ADAPTED[kind], ADAPTED[kind][:2])):
        names = [name for name in linear if name.rpartition(".")[2] in ends]
        settings = {"r": 4 + number, "lora_alpha": 16, "target_modules": names}
        saved.append(_save_exactly(base, settings, tmp_path / str(number), number))
    loaded = [load_folder(base, folder) for folder in saved]
    lab = Lab(base, saved, [one.reference for one in loaded], [one.weights for one in loaded])
    prompts = [tuple(range(5 + at, 40 + 19 * at)) for at in range(3)]
    asked = [Request(prompt, adapter, 6) for prompt in prompts for adapter in (None, 0, 1)]
    together = run(lab.engine(step_tokens=60), asked)
    assert not lab.disagreements(asked, together)
    assert len({tuple(text) for text in together[:3]}) == 3, "adapters act"
    for number in (1, 5):
        assert run(lab.engine(step_tokens=23), [asked[number]]) == [together[number]]
    assert fingerprint(base) == before


def _save_exactly(base: nn.Module, settings: dict[str, Any], folder: Path, seed: int) -> Path:
    """An adapter on layers of full names; `save_adapter` chooses them by their ends."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(peft_view(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    randomize(model, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


_LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
GPT_OSS_ADAPTERS: dict[str, dict[str, Any]] = {
    "Unsloth": {
        "base_model_name_or_path": "unsloth/gpt-oss-20b-unsloth-bnb-4bit",
        "auto_mapping": {
            "base_model_class": "GptOssForCausalLM",
            "parent_library": "transformers.models.gpt_oss.modeling_gpt_oss",
            "unsloth_fixed": True,
        },
        "target_modules": rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|mlp)\.(?:(?:{_LINEAR})))",
    },
    "Unsloth's list": {"target_modules": _LINEAR.split("|"), "task_type": "CAUSAL_LM"},
    "TRL": {"base_model_name_or_path": "openai/gpt-oss-20b", "target_modules": "all-linear"},
}
"""Fields of an adapter's config as Unsloth and TRL write them for gpt-oss's attention."""


@pytest.mark.parametrize("trainer", GPT_OSS_ADAPTERS)
def test_an_adapter_of_gpt_oss_is_served_as_its_trainer_saves_it(
    trainer: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders("gpt_oss")))
    folder = save_adapter(base, {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}, tmp_path, 0)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | GPT_OSS_ADAPTERS[trainer]))
    loaded = load_folder(base, folder)
    assert len(loaded.weights) == 2 * len(ATTENTION)
    lab = Lab(base, [folder], [loaded.reference], [loaded.weights])
    asked = [Request(tuple(range(5, 45 + at)), adapter, 8) for at in range(2) for adapter in (None, 0)]
    texts = run(lab.engine(step_tokens=60), asked)
    assert not lab.disagreements(asked, texts)
    assert texts[0] != texts[1], "it acts"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", [*MIXTURES, "minimax_m2"])
def test_a_bare_mixture_is_proved(kind: str, quantization: Any, folders: Callable[[str], Path]) -> None:
    lab = Lab(load_base(BaseSettings(folders(kind), quantization=quantization)), [], [], [])
    assert prove_base(lab.engine(), lab.base) < 0.5


@pytest.mark.parametrize(
    ("kind", "quantization"), [("mixtral", "nf4"), ("gpt_oss", "nf4"), ("mixtral", "int8")]
)
def test_a_backward_has_the_gradients_of_the_dequantized_matrices_and_keeps_none_of_them(
    kind: str, quantization: Any, folders: Callable[[str], Path]
) -> None:
    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    _, own = next(expert_modules(base))
    plain = view(base).get_submodule(next(path for path, _ in expert_modules(base)))
    for name in ("gate_up_proj", "down_proj"):
        stack: Any = plain._modules.pop(name)
        matrices = torch.stack([stack[number].detach() for number in range(stack.count)])
        plain.register_parameter(name, nn.Parameter(matrices, requires_grad=False))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=draw).bfloat16()
    weights, chosen = torch.rand(40, 4, generator=draw).topk(2)
    kept: list[torch.Tensor] = []
    gradients: list[Any] = []
    for module in (own, plain):
        row = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(_noted(kept), lambda tensor: tensor):
            result = (module if module is own else lambda *given: own_code(plain)(plain, *given))(
                row, chosen, weights
            )
        if module is own:
            assert kept, "gradient checkpointing sees nothing of what is kept besides"
            assert not any(one.shape[-1] == 128 and one.shape[0] in (64, 128) for one in kept), "a matrix"
        result.float().square().sum().backward()
        gradients.append(row.grad)
    assert torch.equal(*gradients)


def test_gradient_checkpointing_keeps_nothing_within_a_mixture(folders: Callable[[str], Path]) -> None:
    _, experts = next(expert_modules(load_base(BaseSettings(folders("mixtral")))))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=draw).bfloat16()
    weights, chosen = torch.rand(40, 4, generator=draw).topk(2)
    inner: list[Any] = []
    experts.act_fn.register_forward_hook(lambda module, args, result: inner.append(weakref.ref(result)))
    gradients, alive = [], []
    for compute in (experts, partial(checkpoint, experts, use_reentrant=False)):
        row = x.clone().requires_grad_()
        inner.clear()
        result = compute(row, chosen, weights)
        alive.append(sum(one() is not None for one in inner))
        result.float().square().sum().backward()
        gradients.append(row.grad)
    assert torch.equal(*gradients)
    assert alive[0] > 0
    assert alive[1] == 0


def _noted(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    return note


@pytest.mark.parametrize(
    ("quantization", "fields"),
    [("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}), ("int8", {"load_in_8bit": True})],
)
def test_files_of_a_mixture_that_bitsandbytes_has_quantized_are_refused(
    quantization: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = MIXTURES["mixtral"]()
    config.quantization_config = {"quant_method": "bitsandbytes", **fields}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBaseError, match=r"mixture of experts that is quantized.*plain weights"):
        load_base(BaseSettings(tmp_path, quantization=quantization))


def test_experts_whose_inputs_no_block_divides_are_refused_on_a_cpu(tmp_path: Path) -> None:
    config = tf.MixtralConfig(**vars(MIXTURES["mixtral"]()) | {"intermediate_size": 96})
    with pytest.raises(UnsupportedBaseError, match=r"down_proj has 96 inputs, no multiple of blocksize 64"):
        load_base(BaseSettings(save_model(config, tmp_path)))
    assert "down_proj (96)" in " ".join(check_base(config).notes)


def test_products_that_are_not_known_are_refused(folders: Callable[[str], Path]) -> None:
    base = load_base(BaseSettings(folders("gpt_oss")))
    served = view(base)
    attach_experts(served, ReferenceKernels())
    _, module = next((path, one) for path, one in served.named_modules() if path.endswith("experts"))
    matrix = module.down_proj[0]
    with pytest.raises(UnsupportedExpertsError, match="linear"):
        nn.functional.linear(torch.zeros(1, 64), matrix)
    with pytest.raises(UnsupportedExpertsError):
        torch.einsum("ij,jk->ik", torch.zeros(1, 64), matrix)


def save_mxfp4(folder: Path) -> Path:
    """A gpt-oss whose files hold experts as the published ones do: two values a byte, a scale for 32."""
    from safetensors.torch import load_file, save_file

    save_base("gpt_oss", folder)
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, size_in, size_out = tensors.pop(name).shape
        shape = experts, size_out, size_in // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, shape, generator=draw).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = tf.AutoConfig.from_pretrained(folder)
    config.quantization_config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    config.save_pretrained(folder)
    return folder


def test_experts_in_mxfp4_are_unpacked_and_quantized_again(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path)
    assert any("MXFP4" in note for note in check_base(tf.AutoConfig.from_pretrained(folder)).notes)
    base = load_base(BaseSettings(folder))
    wide = load_base(BaseSettings(folder, blocksize=32))
    eight = load_base(BaseSettings(folder, quantization="int8"))
    found = list(plain_matrices(folder))
    assert len(found) == 4
    for path, plain, _ in found:
        assert plain.dtype == torch.bfloat16
        assert len(set(plain.flatten().tolist())) > 20, "16 values, times scales"
        stack: Any = base.get_submodule(path)
        for number, matrix in enumerate(plain):
            rounded = bnb.quantize_4bit(matrix.T.contiguous(), compress_statistics=True, quant_type="nf4")
            assert torch.equal(stack[number].T, bnb.dequantize_4bit(*rounded))
            assert wide.get_submodule(path).blocksize == 32
            codes, largest, _ = bnb.int8_vectorwise_quant(matrix.T.to(torch.float16).contiguous())
            assert torch.equal(eight.get_submodule(path).weight[number], codes)  # type: ignore[index]
            assert torch.equal(eight.get_submodule(path).absmax[number], largest)  # type: ignore[index]
    assert type(base.get_submodule("model.layers.0.self_attn.q_proj")).__name__ == "Linear4bit"


def save_fp8(kind: str, folder: Path, block: tuple[int, int] | None) -> Path:
    """A mixture whose files hold linear layers and experts as DeepSeek's and Qwen's: fp8, scaled by blocks.

    block: rows and columns of one; None: one scale for a matrix.
    """
    from safetensors.torch import load_file, save_file

    save_base(kind, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        plain = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router")
        if weight.dim() != 2 or any(part in name for part in plain):
            continue
        rows, columns = block or weight.shape
        grid = [
            [weight[top : top + rows, left : left + columns].abs().max() / 448 for left in
             range(0, weight.shape[1], columns)]
            for top in range(0, weight.shape[0], rows)
        ]  # fmt: skip
        scales = torch.tensor(grid)
        spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        tensors[name] = (weight / spread[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales if block else scales.reshape(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = tf.AutoConfig.from_pretrained(folder)
    config.quantization_config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"],
    }
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "block"),
    [("qwen3_moe", (64, 32)), ("deepseek_v3", (32, 32)), ("mixtral", (32, 64)), ("qwen3_moe", None)],
    ids=str,
)
def test_weights_in_fp8_are_those_that_transformers_makes_of_them_and_are_quantized_again(
    kind: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    folder = save_fp8(kind, tmp_path, block)
    found = check_base(tf.AutoConfig.from_pretrained(folder))
    assert any("fp8" in note and "unless --quantization none" in note for note in found.notes)
    oracle = tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=tf.FineGrainedFP8Config(dequantize=True)
    )
    expected = oracle.state_dict()
    plain, base, eight = (
        load_base(BaseSettings(folder, quantization=one)) for one in ("none", "nf4", "int8")
    )
    assert plain.state_dict().keys() == expected.keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype
    for place in expert_matrices(plain):
        stack: Any = base.get_submodule(place.path)
        for number, matrix in enumerate(expected[place.path]):
            rounded = bnb.quantize_4bit(matrix.contiguous(), compress_statistics=True, quant_type="nf4")
            assert torch.equal(stack[number], bnb.dequantize_4bit(*rounded))
            codes, _, _ = bnb.int8_vectorwise_quant(matrix.to(torch.float16).contiguous())
            assert torch.equal(eight.get_submodule(place.path).weight[number], codes)  # type: ignore[index]
    weight: Any = base.get_submodule("model.layers.0.self_attn.o_proj").weight
    rounded = bnb.quantize_4bit(
        expected["model.layers.0.self_attn.o_proj.weight"], compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(bnb.dequantize_4bit(weight, weight.quant_state), bnb.dequantize_4bit(*rounded))
    others = {name: tensor for name, tensor in base.state_dict().items() if tensor.dtype != torch.uint8}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in others.items() if name in expected)


def test_blocks_of_fp8_that_are_cut_at_the_end_have_their_own_scale(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save_fp8("deepseek_v3", tmp_path, (64, 48))
    tensors = load_file(folder / "model.safetensors")
    plain = load_base(BaseSettings(folder, quantization="none")).state_dict()
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weight, scales = tensors[name], tensors[f"{name}_scale_inv"]
    assert weight.shape[0] % 64
    for row in (0, 63, 64, 95):
        for column in (0, 47, 48, 127):
            wanted = weight[row, column].float() * scales[row // 64, column // 48]
            assert plain[name][row, column] == wanted.bfloat16()


def _reader_of_fp8(*block: int) -> Any:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    config = plain_from_fp8(
        {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    )
    reader: Any = AUTO_QUANTIZER_MAPPING[config.quant_method](config)
    return reader.get_load_operations()["dequantize"](reader)._dequantize_one


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_scales_of_fp8_that_are_exponents_are_powers_of_two(stored: torch.dtype) -> None:
    weight = torch.full((5, 64), 3.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[126], [127], [130]], dtype=torch.uint8).expand(3, 2).view(stored)
    plain = _reader_of_fp8(2, 32)(weight, scales, torch.float32)
    assert plain.tolist() == [[3.0 * scale] * 64 for scale in (0.5, 0.5, 1.0, 1.0, 8.0)]


def test_matrices_of_fp8_in_one_tensor_are_each_cut_into_blocks() -> None:
    weight = torch.ones(2, 6, 4).to(torch.float8_e4m3fn)
    scales = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    plain = _reader_of_fp8(4, 4)(weight, scales, torch.float32)
    assert plain[:, :, 0].tolist() == [[1.0] * 4 + [2.0] * 2, [3.0] * 4 + [4.0] * 2]


def test_fp8_that_cannot_be_read_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_fp8("qwen3_moe", tmp_path, (64, 32))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"] = torch.ones(8, 2, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedBaseError, match=r"place of the scales, such as .*gate_up_proj_scale_inv"):
        load_base(BaseSettings(folder))


def test_a_text_that_another_choice_of_tied_experts_gives_is_told_from_a_wrong_one(
    folders: Callable[[str], Path],
) -> None:
    base = load_base(BaseSettings(folders("mixtral")))
    prompt, unit, tie = list(range(60, 80)), torch.finfo(torch.bfloat16).eps / 2, tie_of(torch.bfloat16)
    found = set()
    for seed in range(40, 60):  # as other kernels might, whose roundings nobody knows
        with rounded_once_more(base, unit, seed):
            found.add(tuple(greedy(base, prompt, 8)))
    assert len(found) > 1, "roundings decide between texts"
    assert all(max(served_regrets(base, prompt, list(text), tie, unit)) <= tie for text in found)
    (first, *_) = found
    for place in range(len(first)):
        wrong = [*first[:place], (first[place] + 1) % 320, *first[place + 1 :]]
        assert max(served_regrets(base, prompt, wrong, tie, unit)) > tie


def test_pages_of_a_mapped_file_are_let_go_and_what_was_written_in_memory_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1 << 20, dtype=torch.int32)}, file)
    storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
    mapped = torch.empty(0, dtype=torch.uint8).set_(storage)
    before = mapped.clone()
    mapped[-4:] = before[-4:] = 7

    def resident() -> int:
        found = Path("/proc/self/smaps").read_text().partition(str(file))[2]
        return int(found.partition("\nRss:")[2].split()[0])

    read = resident()
    machine.release_mapped_files(".safetensors")
    assert resident() < read / 2
    assert torch.equal(mapped, before)
