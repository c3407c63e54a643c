"""Text from a model on its way to a terminal."""

from __future__ import annotations

import re
import sys
from typing import Final

from ..types import AdapterWeight, Generation

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(text: str) -> None:
    """Write to stdout at once. On a terminal without control characters: a model must not steer it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return _CONTROL.sub("", text)


def note(text: str) -> None:
    """Tell the person something that is not part of the answer."""
    print(printable(text), file=sys.stderr, flush=True)


def speed(result: Generation) -> str:
    """One line about an answer: who gave it, how long it is and how fast it came."""
    rate = result.tokens_per_second
    parts = [
        f"{result.usage.completion_tokens} tokens",
        f"first after {result.timing.ttft_s:.2f} s",
        "" if rate is None else f"{rate:.1f} tokens/s",
        "cut off by max-tokens" if result.choices[0].finish_reason == "length" else "",
        describe(result.adapter),
    ]
    return ", ".join(part for part in parts if part)


def describe(adapter: str | tuple[AdapterWeight, ...] | None) -> str:
    """An adapter, or a weighted sum, or the base, in words."""
    if adapter is None:
        return "base"
    if isinstance(adapter, str):
        return adapter
    return " + ".join(f"{term.weight:g}*{term.name}" for term in adapter)
