"""The example adapters and their data: what the repository ships is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("orders", "pirate")


def prompts(name: str, split: str) -> list[str]:
    lines = (EXAMPLES / "data" / f"{name}.{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_every_example_tensor_is_finite_and_every_b_acts(name: str) -> None:
    tensors = safetensors.torch.load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")
    assert tensors
    for key, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), key
        assert tensor.count_nonzero() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_example_configs_name_the_base_and_scale_by_two(name: str) -> None:
    config = json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())
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
