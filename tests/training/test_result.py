"""The model card: what is in it, and that no name writes Markdown or HTML of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.training.runs import finished_report

from onebase_training.checkpoint import DataLine, RunReport, model_card
from onebase_training.recipe import Recipe

REPORT = finished_report(
    name="acme-support",
    base="small",
    metrics_before={"contains:|": 0.25},
    metrics_after={"contains:|": 0.5},
    losses=[(1, 2.0), (2, 1.0)],
    held_out=[(0, 2.0), (2, 1.0)],
    recipe=Recipe().to_json(),
)
EVIL = "![x](https://evil.example/a.png)<img src=x onerror=alert(1)>`|\n# Owned"


def card(report: RunReport = REPORT, file: str = "train.jsonl", **more: Any) -> str:
    settings = {"repo": None, "commit": None, "data": [DataLine("train", file, 3, 30, 9, "ab" * 32)], **more}
    return model_card(report, **settings)


def outside_of_code(text: str) -> str:
    """What Markdown takes for more than letters: neither code spans nor blocks."""
    blocks = text.split("```")
    return "".join("".join(block.split("`")[::2]) for block in blocks[::2])


def test_names_write_no_markdown_and_no_html() -> None:
    text = card(replace(REPORT, name=EVIL, base=EVIL, metrics_after={EVIL: 1.0}), file=EVIL)
    plain = outside_of_code(text)
    assert "evil" not in plain
    assert "<img" not in plain
    assert "\n# Owned" not in text
    heads = [line for line in text.splitlines() if line.startswith("| train")]
    assert [head.replace("\\|", "").count("|") for head in heads] == [7]


@pytest.mark.parametrize(
    ("quantization", "tags", "says"),
    [
        ("nf4", "[lora, qlora, onebase]", "4-bit (NF4)"),
        ("int8", "[lora, onebase]", "in int8"),
        ("none", "[lora, onebase]", '"org/base")\nmodel'),
    ],
)
def test_it_says_how_the_base_was_quantized(quantization: Any, tags: str, says: str) -> None:
    text = card(replace(REPORT, quantization=quantization), repo="org/base", commit="abc")
    assert f"tags: {tags}" in text
    assert says in text
    assert "[org/base](https://huggingface.co/org/base) at commit `abc`" in text


def test_a_plain_name_is_the_heading_as_it_is() -> None:
    assert "\n# acme-support\n" in card()
