"""The shapes that a row may have, each brought to a chat, a text, or a choice between two of them.

Every function raises RowError with the field, as in `messages[2].content`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase_adapters.training.conversation import Chat, Parsed, Text, make_chat
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.messages import Message
from onebase_adapters.training.preferences import parse_preference
from onebase_adapters.training.recipe import Method
from onebase_adapters.training.row_fields import RowFields

_SUPERVISED_SHAPES = "messages, prompt and completion, instruction and output, or text"
_DPO_SHAPES = "chosen and rejected (with prompt), or input, preferred_output and non_preferred_output"


def parse_row(row: Mapping[str, Any], method: Method) -> Parsed:
    """What a row means by its own keys.

    Of several shapes in one row the first counts: messages, prompt and completion, instruction, text. Other
    keys are left alone; misspelled ones are refused, and so is a system message that would be lost, or tools.
    """
    fields = RowFields(row)
    parsed = parse_preference(fields) if method == "dpo" else _supervised(fields)
    if parsed is None:
        raise RowError("", _unknown_shape(fields.given, method))
    fields.check_nothing_lost(parsed)
    return parsed


def _supervised(row: RowFields) -> Parsed | None:
    if "messages" in row:
        row.check_spelling(("messages", "tools", "system"))
        return make_chat(row.after_system(row.messages("messages")), row.tools(), "messages")
    if "completion" in row or ("prompt" in row and "chosen" not in row):
        return _completion(row)
    if "instruction" in row:
        return _instruction(row)
    if "text" in row:
        return Text(None, row.text("text"))
    return None


def _completion(row: RowFields) -> Chat | Text:
    row.check_spelling(("prompt", "completion", "tools", "system"))
    prompt, completion = row.read("prompt"), row.read("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = row.after_system(row.messages("prompt"))
        messages = [*before, *row.messages("completion")]
        return make_chat(messages, row.tools(), "completion", first=len(before))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError("completion", "prompt and completion are both texts or both lists of messages")
    return Text(row.text("prompt", empty=True), row.text("completion"))


def _instruction(row: RowFields) -> Chat:
    row.check_spelling(("instruction", "input", "output", "system", "tools"))
    question, output = row.text("instruction"), row.text("output")
    if "input" in row and (more := row.text("input", empty=True)).strip():
        question = f"{question}\n\n{more}"
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]
    return make_chat(row.after_system(messages), row.tools(), "output")


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
