"""What a row means, whatever its shape: a chat, a text, or a choice between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import Message


@dataclass(frozen=True)
class Chat:
    """A conversation for the base's chat template. supervised: indices of the replies to learn, ascending."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    supervised: Sequence[int]


@dataclass(frozen=True)
class Text:
    """Plain text without a template. prompt None: everything is to be learned."""

    prompt: str | None
    reply: str


@dataclass(frozen=True)
class Choice:
    """Two replies to the same prompt."""

    chosen: Chat | Text
    rejected: Chat | Text


Parsed = Chat | Text | Choice


def make_chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, field: str, *, first: int = 0
) -> Chat:
    """A chat whose replies from message `first` on are learned, but for those of weight 0.

    Raises RowError for `field` if that leaves nothing.
    """
    plain, supervised = [], []
    for index, message in enumerate(messages):
        weight = message.get("weight", 1)
        plain.append({key: value for key, value in message.items() if key != "weight"})
        if message["role"] == "assistant" and index >= first and weight:
            supervised.append(index)
    if not supervised:
        replies = any(message["role"] == "assistant" for message in messages)
        why = "every reply has weight 0" if replies else "there is no message of the assistant"
        raise RowError(field, f"nothing to learn: {why}")
    return Chat(plain, tools, supervised)
