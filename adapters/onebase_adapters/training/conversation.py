"""The shapes that a row may have, each brought to a chat, a text, or a choice between two of them.

Every function raises RowError with the field, as in `messages[2].content`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase_adapters.training.data_json import parse_strict
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import Message, check_messages, check_tools
from onebase_adapters.training.recipe import Method


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

_SUPERVISED_SHAPES = "messages, prompt and completion, instruction and output, or text"
_DPO_SHAPES = "chosen and rejected (with prompt), or input, preferred_output and non_preferred_output"
KNOWN = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "text",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
)
"""Every key that some shape has."""


def parse_row(row: Mapping[str, Any], method: Method) -> Parsed:
    """What a row means by its own keys. Keys that no shape has are left alone; misspelled ones are not."""
    given = {key: value for key, value in row.items() if value is not None}
    parsed = _preference(given) if method == "dpo" else _supervised(given)
    if parsed is None:
        raise RowError("", _unknown_shape(given, method))
    return parsed


def _supervised(row: Mapping[str, Any]) -> Parsed | None:
    if "messages" in row:
        _no_misspelling(row, ("messages", "tools"))
        return _chat(_messages(row, "messages"), _tools(row, "tools"), "messages")
    if "completion" in row or ("prompt" in row and "chosen" not in row):
        return _completion(row)
    if "instruction" in row:
        return _instruction(row)
    if "text" in row:
        return Text(None, _text(row, "text"))
    return None


def _preference(row: Mapping[str, Any]) -> Choice | None:
    if "preferred_output" in row or "non_preferred_output" in row:
        return _openai_choice(row)
    if "chosen" not in row and "rejected" not in row:
        return None
    _need(row, "chosen")
    _need(row, "rejected")
    if isinstance(_parsed(row, "chosen"), str) and isinstance(_parsed(row, "rejected"), str):
        return _text_choice(row)
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if "prompt" not in row:
        prompt = _shared_prefix(chosen, rejected)
    elif isinstance(_parsed(row, "prompt"), str):
        prompt = [{"role": "user", "content": _text(row, "prompt")}]
    else:
        prompt = _messages(row, "prompt")
    # Some data sets repeat the prompt in both conversations, some do not.
    sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)]
    return _choice(prompt, sides, _tools(row, "tools"), ("chosen", "rejected"))


def _openai_choice(row: Mapping[str, Any]) -> Choice:
    for key in ("input", "preferred_output", "non_preferred_output"):
        _need(row, key)
    given = _parsed(row, "input")
    if not isinstance(given, dict):
        raise RowError("input", "an object with messages is wanted")
    names = ("preferred_output", "non_preferred_output")
    sides = [_messages(row, name) for name in names]
    return _choice(_messages(given, "messages", "input."), sides, _tools(given, "tools", "input."), names)


def _choice(
    prompt: list[Message],
    sides: Sequence[list[Message]],
    tools: list[dict[str, Any]] | None,
    names: tuple[str, str],
) -> Choice:
    if not prompt:
        raise RowError("prompt", f"{names[0]} and {names[1]} begin differently, and there is no prompt")
    if sides[0] == sides[1]:
        raise RowError(names[1], f"the same as {names[0]}: there is nothing to prefer")
    made = []
    for name, reply in zip(names, sides, strict=True):
        if not reply or reply[-1]["role"] != "assistant":
            raise RowError(name, "the last message must be the assistant's reply to the prompt")
        made.append(_chat([*prompt, *reply], tools, name, first=len(prompt)))
    return Choice(*made)


def _text_choice(row: Mapping[str, Any]) -> Choice:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise RowError("rejected", "the same as chosen: there is nothing to prefer")
    if "prompt" in row:
        prompt = _text(row, "prompt")
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        cut = _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt:
            raise RowError("prompt", "chosen and rejected begin differently, and there is no prompt")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply.strip():
            raise RowError(name, "no reply is left after the prompt")
    return Choice(Text(prompt, chosen), Text(prompt, rejected))


def _completion(row: Mapping[str, Any]) -> Chat | Text:
    _no_misspelling(row, ("prompt", "completion", "tools"))
    _need(row, "prompt")
    _need(row, "completion")
    prompt, completion = _parsed(row, "prompt"), _parsed(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(row, "prompt"), _messages(row, "completion")
        return _chat([*before, *after], _tools(row, "tools"), "completion", first=len(before))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError("completion", "prompt and completion are both texts or both lists of messages")
    return Text(_text(row, "prompt", empty=True), _text(row, "completion"))


def _instruction(row: Mapping[str, Any]) -> Chat:
    _no_misspelling(row, ("instruction", "input", "output", "system"))
    _need(row, "output")
    question = _text(row, "instruction")
    if "input" in row and (more := _text(row, "input", empty=True)).strip():
        question = f"{question}\n\n{more}"
    messages: list[Message] = []
    if "system" in row and (system := _text(row, "system", empty=True)):
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Chat(messages, None, [len(messages) - 1])


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None, field: str, *, first: int = 0) -> Chat:
    """A chat whose replies from message `first` on are learned, but for those of weight 0."""
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


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    # A conversation that goes on from the other still needs a reply of its own.
    return chosen[: min(count, len(chosen) - 1, len(rejected) - 1)]


def _shared_text(one: str, other: str) -> int:
    """Where the shared beginning ends, before the word (and its space) in which the two part."""
    pairs = zip(one, other, strict=False)
    cut = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    while cut and not one[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut and one[cut - 1] == " " else cut


def _messages(row: Mapping[str, Any], key: str, inside: str = "") -> list[Message]:
    _need(row, key, inside)
    return check_messages(_parsed(row, key), f"{inside}{key}")


def _tools(row: Mapping[str, Any], key: str, inside: str = "") -> list[dict[str, Any]] | None:
    return check_tools(_parsed(row, key), f"{inside}{key}") if row.get(key) is not None else None


def _parsed(row: Mapping[str, Any], key: str) -> Any:
    """The value of a key; tables hold lists and objects as JSON text."""
    value = row[key]
    if isinstance(value, str) and value.lstrip()[:2].rstrip() in ("[", "[{", "{", '{"') and key != "text":
        try:
            parsed = parse_strict(value)
        except RowError:
            return value
        return parsed if _is_structure(parsed) else value
    return value


def _is_structure(value: Any) -> bool:
    """Whether it was meant as messages or tools: a text to learn may be JSON as well."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(part, dict) and ("role" in part or "function" in part) for part in value
        )
    return isinstance(value, dict) and "messages" in value


def _text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    _need(row, key)
    value = row[key]
    if not isinstance(value, str):
        raise RowError(key, f"a text is wanted, not {type(value).__name__}")
    if not empty and not value.strip():
        raise RowError(key, "the text is empty")
    return value


def _need(row: Mapping[str, Any], key: str, inside: str = "") -> None:
    if row.get(key) is None:
        raise RowError(f"{inside}{key}", "missing")


def _no_misspelling(row: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in row:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.84) if key not in KNOWN else []
        if near and near[0] not in row:
            raise RowError(key[:60], f"an unknown field: did you mean {near[0]}?")


def _unknown_shape(row: Mapping[str, Any], method: Method) -> str:
    keys = ", ".join(str(key)[:40] for key in list(row)[:8]) or "nothing"
    if method == "supervised" and ("chosen" in row or "preferred_output" in row):
        return "a preference row among rows to learn: set method to dpo, or bring messages"
    if method == "dpo" and any(key in row for key in ("messages", "completion", "instruction", "text")):
        return f"the method is dpo, which takes {_DPO_SHAPES}; for this row set method to supervised"
    if "conversations" in row:
        return "conversations is not read: write it as messages, each with role and content"
    wanted = _DPO_SHAPES if method == "dpo" else _SUPERVISED_SHAPES
    return f"the row has {keys}; wanted is {wanted}"
