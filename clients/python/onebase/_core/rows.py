"""Rows of training files as the client reads them: problems of shape before a file is sent, and held-out rows
to ask adapters with. The server checks much more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from onebase_protocol.common import Json
from onebase_protocol.training import MEANT

from ..adapter_types import SliceScore

MOST_PROBLEMS: Final = 20
_MOST_ROW_BYTES: Final = 4 << 20
_SHAPES: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "supervised": (("messages",), ("prompt", "completion"), ("instruction", "output"), ("text",)),
    "dpo": (("chosen", "rejected"), ("preferred_output", "non_preferred_output")),
    "classification": (("text", "label"), ("prompt", "label"), ("messages", "label")),
    "reinforcement": (("messages",), ("prompt",)),
}
"""Fields of the shapes that each method reads; a row needs all of one."""


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RowProblem:
    """Reason why a row cannot be read."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class HeldOutRow:
    """A prompt and the reply that is wanted, if the row has one."""

    line: int
    asked: Mapping[str, Any]
    """`messages` (with `tools`), or `prompt`, as arguments of a request."""
    reference: str | None
    slice: str = ""
    """The row's field `slice`."""

    @property
    def question(self) -> str:
        """Text of the prompt's last turn."""
        messages = self.asked.get("messages")
        return str(self.asked.get("prompt", "")) if messages is None else _text(messages[-1].get("content"))


def shape_problems(path: Path, method: str) -> tuple[RowProblem, ...]:
    """Return the first problems of a JSON Lines file whose rows have no shape that a method reads; none for
    files in other formats. Raises OSError."""
    if path.suffix not in (".jsonl", ".ndjson"):
        return ()
    found: list[RowProblem] = []
    for line, row in _rows(path):
        message = row if isinstance(row, str) else _shape_problem(row, method)
        if message:
            found.append(RowProblem(line, message))
            if len(found) == MOST_PROBLEMS:
                break
    return tuple(found)


def held_out_rows(path: str | Path, limit: int | None = None) -> tuple[HeldOutRow, ...]:
    """Return the prompts of a JSON Lines file: conversations (`messages`) without their last reply, or
    `prompt` with `completion`.

    Args:
        limit: the first N rows; None: all.

    Raises:
        ValueError: a row has no prompt, or there are none.
        OSError: the file cannot be read.
    """
    made = []
    for line, row in _rows(Path(path).expanduser()):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {line}: {row}")
        made.append(_held_out(path, line, row))
        if len(made) == limit:
            break
    if not made:
        raise ValueError(f"{path} has no rows")
    return tuple(made)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line and row, or line and what is wrong with it."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(_MOST_ROW_BYTES):
            number += 1
            text = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, f"it is not JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else "it is not a JSON object"


def _shape_problem(row: Mapping[str, Any], method: str) -> str:
    given = {name for name, value in row.items() if value is not None}
    shapes = _SHAPES[method]
    if any(given.issuperset(shape) for shape in shapes):
        messages = row.get("messages")
        if method == "supervised" and isinstance(messages, list) and not any(map(_is_reply, messages)):
            return "messages: there is no message of the assistant to learn"
        return ""
    begun = [shape for shape in shapes if given.intersection(shape)]
    for shape in begun or shapes:
        for name in shape:
            if name not in given and (
                meant := next((one for one in MEANT.get(name, ()) if one in given), "")
            ):
                return f"{name}: missing; did you mean {name} for {meant[:40]}?"
    if begun:
        return f"{next(name for name in begun[0] if name not in given)}: missing"
    wanted = ", or ".join(" and ".join(shape) for shape in shapes)
    has = ", ".join(sorted(str(name)[:40] for name in given)[:8]) or "nothing"
    return f"the row has {has}; give {wanted}"


def _is_reply(message: object) -> bool:
    return not isinstance(message, dict) or message.get("role") == "assistant"


def _held_out(path: str | Path, line: int, row: Mapping[str, Any]) -> HeldOutRow:
    messages, prompt, completion = (row.get(name) for name in ("messages", "prompt", "completion"))
    slice = row["slice"] if isinstance(row.get("slice"), str) else ""
    if isinstance(prompt, list):
        messages = [*prompt, *(completion if isinstance(completion, list) else ())]
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
        try:
            wanted = _reply_of(messages[-1]) if messages[-1].get("role") == "assistant" else None
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        asked: Json = {
            "messages": [_plain(one) for one in (messages[:-1] if wanted is not None else messages)]
        }
        if asked["messages"]:
            if isinstance(row.get("tools"), list) and row["tools"]:
                asked["tools"] = row["tools"]
            return HeldOutRow(line, asked, wanted, slice)
    elif isinstance(prompt, str) and prompt.strip():
        reply = completion if isinstance(completion, str) else None
        return HeldOutRow(line, {"prompt": prompt}, reply, slice)
    raise ValueError(f"{path}, line {line}: there is no prompt: give messages, or prompt and completion")


def _plain(message: Mapping[str, Any]) -> Json:
    return {name: value for name, value in message.items() if name != "weight" and value is not None}


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _reply_of(message: Mapping[str, Any]) -> str:
    """Return a reply's text, or its tool calls as JSON: name and arguments."""
    calls = message.get("tool_calls") or ()
    return calls_text(function_calls(calls)) if calls else _text(message.get("content"))


def function_calls(calls: object) -> list[tuple[str, Any]]:
    """Return name and arguments of the tool calls of a message.

    Raises ValueError if one calls no function, as calls of custom tools.
    """
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not {"name", "arguments"} <= function.keys():
            raise ValueError(
                f"a tool call is no call of a function, but {json.dumps(call)[:80]}: leave the row out"
            )
        found.append((function["name"], function["arguments"]))
    return found


def calls_text(calls: Sequence[tuple[str, Any]]) -> str:
    """Return tool calls as JSON that is equal for equal calls."""
    made = []
    for name, arguments in calls:
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            value = arguments
        made.append({"name": name, "arguments": value})
    return json.dumps(made, ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class ComparedAnswer:
    """Answers of two adapters to one prompt."""

    line: int
    prompt: str
    """Text of its last turn."""
    reference: str | None
    a: str
    b: str
    slice: str = ""

    @property
    def same(self) -> bool:
        """Whether both answers are the same text."""
        return self.a.strip() == self.b.strip()


@dataclass(frozen=True)
class AnswerComparison:
    """Answers of two adapters to the same prompts, each the likeliest one (temperature 0)."""

    a: str
    """`name@digest`, or the name that was asked for."""
    b: str
    rows: tuple[ComparedAnswer, ...] = field(repr=False)
    agreement: float = field(init=False)
    """Share of prompts with the same answer, 0 to 1."""
    exact_match_a: float | None = field(init=False)
    """Share of answers of `a` that are the row's own reply. None if no row has one."""
    exact_match_b: float | None = field(init=False)
    json_valid_a: float | None = field(init=False)
    """Share of answers of `a` that are JSON. None unless all replies in the file are."""
    json_valid_b: float | None = field(init=False)

    def __post_init__(self) -> None:
        known = [row for row in self.rows if row.reference is not None]
        is_json = bool(known) and all(_is_json(row.reference or "") for row in known)
        facts: dict[str, float | None] = {"agreement": _mean([row.same for row in self.rows])}
        for side in ("a", "b"):
            answers = [getattr(row, side).strip() for row in known]
            right = [text == (row.reference or "").strip() for text, row in zip(answers, known, strict=True)]
            facts[f"exact_match_{side}"] = _mean(right) if known else None
            facts[f"json_valid_{side}"] = _mean([_is_json(text) for text in answers]) if is_json else None
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def exact_by_slice(self) -> tuple[SliceScore, ...]:
        """Return, for each slice, how the exact matches of `a` differ from those of `b`.

        Raises:
            ValueError: a row has no reply that an answer could match.
        """
        parts: dict[str, list[int]] = {}
        for row in self.rows:
            if row.reference is None:
                raise ValueError(f"line {row.line} has no reply: an answer can match none")
            wanted = row.reference.strip()
            difference = int(row.a.strip() == wanted) - int(row.b.strip() == wanted)
            parts.setdefault(row.slice, []).append(difference)
        return tuple(
            SliceScore(slice=name, rows=len(some), sum=sum(some), squares=sum(map(abs, some)))
            for name, some in parts.items()
        )

    @property
    def differing(self) -> tuple[ComparedAnswer, ...]:
        """The rows whose answers differ."""
        return tuple(row for row in self.rows if not row.same)


def _mean(found: Sequence[bool]) -> float:
    return sum(found) / len(found) if found else 0.0


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
