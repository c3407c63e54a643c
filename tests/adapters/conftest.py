"""A tiny random Llama as a folder, loaded as each kind of base, and adapters on it saved by PEFT itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.device import DEVICE
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SaveAdapter = Callable[..., Path]
LoadBase = Callable[..., nn.Module]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load(llama_folder: Path) -> LoadBase:
    """`load(quantization, **settings)`: a new base at each call."""

    def _load(quantization: Any = "nf4", **settings: Any) -> nn.Module:
        settings = {"quantization": quantization, "device": DEVICE, **settings}
        return load_base(BaseSettings(folder=llama_folder, **settings))

    return _load


@pytest.fixture(scope="session")
def bases(load: LoadBase) -> dict[str, nn.Module]:
    """One shared base of each kind; no test may write to them."""
    return {
        "nf4": load("nf4"),
        "int8": load("int8"),
        "none": load("none"),
        "fp32": load("none", dtype=torch.float32),
    }


@pytest.fixture(scope="session")
def base(bases: dict[str, nn.Module]) -> nn.Module:
    return bases["nf4"]


@pytest.fixture
def save_adapter(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> SaveAdapter:
    """`save_adapter(seed=, std=, **LoraConfig fields)`: a folder that PEFT wrote, with random A and B."""

    def _save(seed: int = 1, std: float = 0.05, **fields: Any) -> Path:
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, **fields}
        torch.manual_seed(seed)
        model = get_peft_model(view(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, std)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return _save


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """`edit_config(folder, field=value)`: rewrite fields of a folder's adapter_config.json."""

    def _edit(folder: Path, **fields: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return _edit


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.fixture(autouse=True)
def quiet_loading() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
