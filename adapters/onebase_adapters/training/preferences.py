"""Rows of preferences: two replies, and the prompt that they share, written in one of several ways.

Every function raises RowError with the field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from onebase_adapters.training.conversation import Choice, Text, make_chat
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import Message
from onebase_adapters.training.row_fields import RowFields

_NO_PROMPT = "begin differently, and there is no prompt: name it prompt, or question if it is a chat's"
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Scripts that put no space between words."""


def parse_preference(row: RowFields) -> Choice | None:
    """The choice that a row is; None if it has no two replies."""
    if "preferred_output" in row or "non_preferred_output" in row:
        return _openai_choice(row)
    if "chosen" not in row and "rejected" not in row:
        return None
    asked = () if "prompt" in row else ("question",)
    row.check_spelling(("prompt", *asked, "system", "chosen", "rejected", "tools"))
    row.read("chosen")
    row.read("rejected")
    if not (row.is_text("chosen") and row.is_text("rejected")):
        return _chat_choice(row, row.messages("chosen"), row.messages("rejected"))
    asked_apart = "question" in row and "prompt" not in row
    if asked_apart or ("prompt" in row and row.says("system")):
        sides = [[{"role": "assistant", "content": row.text(name)}] for name in ("chosen", "rejected")]
        return _chat_choice(row, *sides)
    return _text_choice(row)


def _openai_choice(row: RowFields) -> Choice:
    row.check_spelling(("input", "preferred_output", "non_preferred_output"))
    given = row.read("input")
    names = ("preferred_output", "non_preferred_output")
    for name in names:
        row.read(name)
    if not isinstance(given, dict):
        raise RowError("input", "an object with messages is wanted")
    fields = RowFields(given, "input.")
    prompt, tools = fields.messages("messages"), fields.tools()
    return _choice(prompt, [row.messages(name) for name in names], tools, names)


def _chat_choice(row: RowFields, chosen: list[Message], rejected: list[Message]) -> Choice:
    shared = _shared_prefix(chosen, rejected)
    given = _given_prompt(row, shared)
    prompt = shared if given is None or _ends_in(shared, given) else given
    sides = [_reply("chosen", chosen, prompt), _reply("rejected", rejected, prompt)]
    return _choice(row.after_system(prompt) if prompt else [], sides, row.tools(), ("chosen", "rejected"))


def _reply(name: str, messages: list[Message], prompt: list[Message]) -> list[Message]:
    """What follows the prompt, which some data sets repeat in both conversations."""
    reply = messages[len(prompt) :] if _same(messages[: len(prompt)], prompt) else messages
    asked = bool(prompt) and prompt[-1]["role"] == "user"
    if asked and reply and reply[0]["role"] in ("system", "developer", "user"):
        raise RowError("prompt", f"{name} begins with another one: leave prompt out, or make both the same")
    return reply


def _given_prompt(row: RowFields, shared: Sequence[Message]) -> list[Message] | None:
    """The prompt beside the replies; a question only where the replies begin with none."""
    if row.is_text("prompt"):
        return [{"role": "user", "content": row.text("prompt")}]
    if "prompt" in row:
        return row.messages("prompt")
    if "question" in row and not shared:
        return [{"role": "user", "content": row.text("question")}]
    return None


def _choice(
    prompt: list[Message],
    sides: Sequence[list[Message]],
    tools: list[dict[str, Any]] | None,
    names: tuple[str, str],
) -> Choice:
    if not prompt:
        raise RowError("prompt", f"{names[0]} and {names[1]} {_NO_PROMPT}")
    if sides[0] == sides[1]:
        raise RowError(names[1], f"the same as {names[0]}: there is nothing to prefer")
    made = []
    for name, reply in zip(names, sides, strict=True):
        if not reply or reply[-1]["role"] != "assistant":
            raise RowError(name, "the last message must be the assistant's reply to the prompt")
        made.append(make_chat([*prompt, *reply], tools, name, first=len(prompt)))
    return Choice(*made)


def _text_choice(row: RowFields) -> Choice:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen == rejected:
        raise RowError("rejected", "the same as chosen: there is nothing to prefer")
    if "prompt" in row:
        prompt = row.text("prompt")
        if _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        for name in ("input", "instruction"):
            if row.says(name):
                raise RowError(name, "would be lost: name it prompt, or question if it is a chat's")
        cut = _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt:
            raise RowError("prompt", f"chosen and rejected {_NO_PROMPT}")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply.strip():
            raise RowError(name, "no reply is left after the prompt")
    return Choice(Text(prompt, chosen), Text(prompt, rejected))


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    # A conversation that goes on from the other still needs a reply of its own.
    return chosen[: min(count, len(chosen) - 1, len(rejected) - 1)]


def _ends_in(messages: Sequence[Message], last: Sequence[Message]) -> bool:
    return len(last) <= len(messages) and _same(messages[len(messages) - len(last) :], last)


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether messages are the same but for white space at their ends."""

    def stripped(message: Message) -> Message:
        return {**message, "content": message["content"].strip()}

    return list(map(stripped, some)) == list(map(stripped, others))


def _begins_with(text: str, prompt: str) -> bool:
    """Whether a text repeats the prompt: "A" is not the beginning of "Apples"."""
    if not text.startswith(prompt):
        return False
    last, following = prompt[-1:], text[len(prompt) : len(prompt) + 1]
    return not (last.isalnum() and following.isalnum()) or bool(_NO_SPACES.match(last))


def _shared_text(one: str, other: str) -> int:
    """Where the shared beginning ends, before the word (and its space) in which the two part."""
    pairs = zip(one, other, strict=False)
    cut = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    while cut and not one[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut and one[cut - 1] == " " else cut
