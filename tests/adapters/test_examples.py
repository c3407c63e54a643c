"""The example adapters and their data: what the repository ships is what it says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer

from onebase_adapters.format.defaults import checked_defaults, defaults_in
from onebase_engine.base.default_base import fetch_default_base

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("orders", "pirate")
JUDGES = ("on-topic", "polite", "secret")
FOLDERS = [*(f"adapters/{name}" for name in NAMES), *(f"judges/{name}" for name in JUDGES)]


def prompts(name: str, split: str) -> list[str]:
    lines = (EXAMPLES / "data" / f"{name}.{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_example_tensor_is_finite_and_every_b_acts(folder: str) -> None:
    tensors = safetensors.torch.load_file(EXAMPLES / folder / "adapter_model.safetensors")
    assert tensors
    for key, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), key
        assert tensor.count_nonzero() > 0, key


@pytest.mark.parametrize("folder", FOLDERS)
def test_example_configs_name_the_base_and_scale_by_two(folder: str) -> None:
    config = json.loads((EXAMPLES / folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["lora_alpha"] == 2 * config["r"]


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_prompt_was_trained_on(name: str) -> None:
    held_out = prompts(name, "heldout")
    assert held_out
    assert not set(held_out) & set(prompts(name, "train"))


def test_no_held_out_value_of_the_orders_was_trained_on() -> None:
    def values(split: str, field: str) -> set[str]:
        lines = (EXAMPLES / "data" / f"orders.{split}.jsonl").read_text().splitlines()
        replies = [json.loads(json.loads(line)["messages"][1]["content"]) for line in lines]
        return {reply[field] for reply in replies if reply[field] is not None}

    for field in ("customer", "item", "city"):
        assert values("heldout", field)
        assert not values("heldout", field) & values("train", field)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "judges.py"))


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_asks_what_it_was_trained_on(script: dict[str, Any], name: str) -> None:
    defaults = checked_defaults(defaults_in(EXAMPLES / "judges" / name))
    assert defaults is not None
    assert defaults.instruction == script["INSTRUCTIONS"][name]
    assert defaults.guided_choice == ("yes", "no")


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_acts_from_its_instruction_on_so_that_the_conversation_is_the_bases(name: str) -> None:
    folder = fetch_default_base()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    invocation = tokenizer.encode("<|im_start|>user", add_special_tokens=False).ids
    config = json.loads((EXAMPLES / "judges" / name / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == invocation


def test_no_held_out_sentence_of_the_judges_was_trained_on(script: dict[str, Any]) -> None:
    for lists in ("ON_TOPIC", "OFF_TOPIC", "SECRETS", "HARMLESS", "POLITE", "RUDE", "ITEMS"):
        train, held_out = (set(script[lists][split]) for split in ("train", "heldout"))
        assert held_out
        assert not train & held_out
