"""The fields of a row: read by name and type, and none that a row is made of lost in silence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from onebase_adapters.training.conversation import Chat, Choice, Parsed
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import Message, check_messages, check_tools

KNOWN_FIELDS = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "text",
    "question",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
)
"""Every field that some shape has."""

_REMEDIES = {
    "system": "put it into the prompt, or bring the row as messages",
    "tools": "bring the row as messages",
}
_LIKE = 0.84


class RowFields:
    """Fields of one row that are not null. Which ones were read is remembered.

    Every method raises RowError with the field. inside: what stands before a field's name there.
    """

    def __init__(self, row: Mapping[str, Any], inside: str = "") -> None:
        self.given = {key: value for key, value in row.items() if value is not None}
        self._inside = inside
        self._read: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.given

    def is_text(self, key: str) -> bool:
        """Whether a field is there and is a text."""
        return isinstance(self.given.get(key), str)

    def says(self, key: str) -> bool:
        """Whether a field is there and is more than a blank text."""
        return key in self.given and not (self.is_text(key) and not self.given[key].strip())

    def read(self, key: str) -> Any:
        """A field as it is; it must be there."""
        if key not in self.given:
            raise RowError(f"{self._inside}{key}", "missing")
        self._read.append(key)
        return self.given[key]

    def text(self, key: str, *, empty: bool = False) -> str:
        """A text; a blank one only if it may be `empty`."""
        value = self.read(key)
        if not isinstance(value, str):
            raise RowError(f"{self._inside}{key}", f"a text is wanted, not {type(value).__name__}")
        if not empty and not value.strip():
            raise RowError(f"{self._inside}{key}", "the text is empty")
        return value

    def messages(self, key: str) -> list[Message]:
        """A list of messages, each of them checked."""
        return check_messages(self.read(key), f"{self._inside}{key}")

    def tools(self) -> list[dict[str, Any]] | None:
        """The tools, if there are any."""
        return check_tools(self.read("tools"), f"{self._inside}tools") if "tools" in self else None

    def after_system(self, messages: list[Message]) -> list[Message]:
        """Messages after the one of `system`, if the row has that field beside them."""
        if not self.says("system"):
            return messages
        system = self.text("system")
        if messages and _says_the_same(messages[0], system):
            return messages
        if any(message["role"] in ("system", "developer") for message in messages):
            raise RowError("system", "the messages have a system message already: leave one of the two out")
        return [{"role": "system", "content": system}, *messages]

    def check_spelling(self, names: Sequence[str]) -> None:
        """Refuse a field that is none of any shape, but looks like one of `names`."""
        for key in self.given:
            near = misspelled(key, names) if key not in KNOWN_FIELDS else None
            if near is not None and near not in self:
                raise RowError(key[:60], f"an unknown field: did you mean {near}?")

    def check_nothing_lost(self, parsed: Parsed) -> None:
        """Refuse a system message or tools that were not read, unless they stand in what was."""
        texts = _texts(parsed)
        for key, remedy in _REMEDIES.items():
            if key not in self or key in self._read or _is_said(self.given[key], texts):
                continue
            if key == "tools" and self.is_text(key):
                continue  # a column of that name: tools are a list
            beside = " and ".join(dict.fromkeys(self._read))
            raise RowError(key, f"would be lost beside {beside}: {remedy}")


def _says_the_same(message: Message, system: str) -> bool:
    told: str = message["content"]
    return message["role"] in ("system", "developer") and told.strip() == system.strip()


def misspelled(key: str, names: Sequence[str]) -> str | None:
    """Which of `names` a key was meant to be, if it looks like one; `prompt_id` is no prompt."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=_LIKE)
    return near[0] if near and not key.startswith(f"{near[0]}_") else None


def _texts(parsed: Parsed) -> list[str]:
    if isinstance(parsed, Choice):
        return [*_texts(parsed.chosen), *_texts(parsed.rejected)]
    if isinstance(parsed, Chat):
        return [message["content"] for message in parsed.messages]
    return [parsed.prompt or "", parsed.reply]


def _is_said(value: Any, texts: Sequence[str]) -> bool:
    """Whether a field is empty, or a text that is part of what was read: a template may have put it there."""
    if isinstance(value, str):
        return any(value.strip() in text for text in texts)
    return not value
