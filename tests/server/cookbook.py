"""A recipe of tinker-cookbook, as it is installed: `python cookbook.py RECIPE SETTING=VALUE ...`.

The recipe's code is the package's own, and begins as `python -m tinker_cookbook.recipes.RECIPE` does.
Replaced are the data sets that it would read from the Hub: by a few rows with the same columns. Of the
recipes in test_cookbook.py none imports tml-renderers, which the package requires for other models.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import datasets


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What comes after {number}?"},
        {"role": "assistant", "content": f"It is {number + 1}."},
    ]


def preference(number: int) -> dict[str, str]:
    asked = f"\n\nHuman: What comes after {number}?\n\nAssistant: "
    return {"chosen": f"{asked}It is {number + 1}.", "rejected": f"{asked}Who knows?"}


def choice(number: int) -> dict[str, Any]:
    return {
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-4-choices",
        "question": f"Which is number {number}?",
        "choices": {"label": ["A", "B"], "text": ["this", "that"]},
        "answerKey": "AB"[number % 2],
    }


ROWS: dict[str, Any] = {
    "HuggingFaceH4/no_robots": lambda number: {"messages": chat(number)},
    "openai/gsm8k": lambda number: {"question": f"{number} + 1?", "answer": f"#### {number + 1}"},
    "Anthropic/hh-rlhf": preference,
    "zwhe99/DeepMath-103K": lambda number: {"question": f"What comes after {number}?"},
    "hicai-zju/SciKnowEval": choice,
    "Salesforce/wikitext": lambda number: {
        "text": f"It was {number} times after the war , and before it . " * 4
    },
}
"""A row of each data set that recipes read, by its number."""


def load_dataset(name: str, *_: Any, split: str | None = None, **__: Any) -> Any:
    """Stands for `datasets.load_dataset`."""
    rows = datasets.Dataset.from_list([ROWS[name](number) for number in range(64)])
    return rows if split else datasets.DatasetDict({"train": rows, "test": rows})


if __name__ == "__main__":
    datasets.load_dataset = load_dataset
    recipe, *settings = sys.argv[1:]
    sys.argv = [recipe, *settings]
    runpy.run_module(f"tinker_cookbook.recipes.{recipe}", run_name="__main__", alter_sys=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at the end of the interpreter, the client's HTTP threads call abort() now and then
