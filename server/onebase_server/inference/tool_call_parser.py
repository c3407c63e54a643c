"""Parse tool calls from the text of an answer as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from onebase_engine.engine.messages import Grammar
from onebase_server.inference.thoughts import held
from onebase_server.inference.tool_format import (
    COUNT,
    HOLE,
    ID_CHARACTERS,
    ArgumentFormat,
    Bare,
    Pythonic,
    ToolDefinition,
    ToolFormat,
    kinds,
)


@dataclass(slots=True)
class ToolCallDelta:
    """Next part of a call; the first part of each has its id and name."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Said:
    """Part of an answer that became certain: text, and one delta of each call."""

    content: str
    calls: list[ToolCallDelta]


@dataclass(frozen=True)
class CallFormat:
    """Format of an answer that may call tools. named: whether the caller named the tool to call."""

    format: ToolFormat
    tools: Mapping[str, ToolDefinition]
    grammar: Grammar
    named: bool = False
    required: bool = False
    """Whether it has to call one."""
    at_once: bool = False
    """Whether calls begin the answer, or there are none."""


class CallReader:
    """Finds the calls in one answer's text as it comes.

    What may become a call is held back. An answer follows the format's grammar; one that does not, say
    because it was cut, loses nothing that is readable.

    answer: which one it is, from which its calls have their ids.
    """

    def __init__(self, calls: CallFormat, answer: str) -> None:
        self._as_asked = calls
        self._answer = answer
        self._format = calls.format
        self._tools = calls.tools
        self._rest = ""
        self._ended = False
        self._content: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._ids: set[str] = set()
        self.count = 0
        """Calls so far."""
        self.whole = True
        """Whether the last one has all its arguments."""
        self._steps = self._read()

    def finish_reason(self, reason: str | None) -> str | None:
        """Return `tool_calls` for an answer with calls that ends with `stop`, but `stop` where the caller
        named the tool, as OpenAI does."""
        called = self.count > 0 and self.whole and not self._as_asked.named
        return "tool_calls" if reason == "stop" and called else reason

    def feed(self, text: str, *, end: bool = False) -> Said:
        """Return what is certain with this text. end: whether the text ends with it."""
        self._rest += text
        self._ended = self._ended or end
        next(self._steps, None)
        said = Said("".join(self._content), self._calls)
        self._content, self._calls = [], []
        return said

    def _read(self) -> Generator[None]:
        if not (yield from self._text()):
            return
        while True:
            yield from self._call()
            if not (yield from self._goes_on()):
                break
        while True:  # what follows calls is no part of the answer
            self._rest = ""
            yield

    def _text(self) -> Generator[None, None, bool]:
        """Read up to the first call. False: there is none."""
        format = self._format
        while self._as_asked.at_once or not format.trigger:
            stop = _match(format.opening, self._rest)
            if stop is not None and stop >= 0:
                return self._skip(stop)
            if self._ended and self._as_asked.required:
                return False
            if self._ended or stop is None:
                yield from self._all_text()
                return False
            yield
        while True:
            at = self._rest.find(format.trigger)
            if at < 0:
                unsure = held(self._rest, format.trigger)
                if self._ended and self._as_asked.required:
                    return False  # a call that was cut before it had a name
                if self._ended:
                    self._say(len(self._rest))
                    return False
                self._say(len(self._rest) - unsure)
                yield
                continue
            said = len(self._rest[:at].rstrip())  # the white space is a part of how a call is written
            self._say(said)
            at -= said
            while (stop := _match(format.opening, self._rest, at)) == _CUT and not self._ended:
                yield
            if stop == _CUT:
                return False  # a call that was cut before it had a name
            if stop is not None:
                return self._skip(stop)
            self._say(at + len(format.trigger))

    def _all_text(self) -> Generator[None]:
        while True:
            self._say(len(self._rest))
            if self._ended:
                return
            yield

    def _call(self) -> Generator[None]:
        """Read a call's name and arguments."""
        made = self._format.arguments
        while (found := self._name()) is None:
            if self._ended:
                return
            yield
        at, stop = found
        name, index = self._rest[:at], self.count
        call_id = self._format.id_of(f"{self._answer}.{index}")
        if self._format.ids_name_calls:
            number = re.search("[0-9]+", self._rest[at:stop])
            written = self._format.naming_id(name, number[0] if number else "")
            call_id = call_id if written in self._ids else written
            self._ids.add(written)
        self._skip(stop)
        self.count += 1
        self.whole = False
        self._calls.append(ToolCallDelta(index, id=call_id, name=name))
        if made is None:
            yield from self._object(index)
        elif isinstance(made, Bare):
            yield from self._bare(index, made.mark)
        elif isinstance(made, Pythonic):
            yield from self._python(index)
        else:
            yield from self._one_by_one(index, name, made)

    def _name(self) -> tuple[int, int] | None:
        """Return where the name ends and what stands between it and the arguments; None if they are not
        there yet."""
        middle = self._format.middle
        if not middle:
            after = _NAME.match(self._rest)
            end = after.end() if after else 0
            return (end, end) if end < len(self._rest) else None
        begins = re.split(f"[{HOLE}{COUNT}]", middle, maxsplit=1)[0]
        at = self._rest.find(begins)
        while at >= 0 and (stop := _match(middle, self._rest, at)) != _CUT:
            if stop is not None:
                return at, stop
            at = self._rest.find(begins, at + 1)
        return None

    def _object(self, index: int) -> Generator[None]:
        depth, quoted, escaped = 0, False, False
        while True:
            for place, character in enumerate(self._rest):
                if quoted:
                    quoted = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                elif character == '"':
                    quoted = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                    if depth == 0:
                        self._argue(index, self._rest[: place + 1])
                        self.whole = True
                        self._skip(place + 1)
                        return
            self._argue(index, self._rest)
            self._rest = ""
            if self._ended:
                return
            yield

    def _one_by_one(self, index: int, name: str, made: ArgumentFormat) -> Generator[None]:
        tool = self._tools.get(name)
        properties = tool.properties if tool else {}
        before = "{"
        while True:
            while not self._rest.startswith(made.opening):
                if not made.opening.startswith(self._rest):
                    self._argue(index, "{}" if before == "{" else "}")
                    self.whole = True
                    return
                if self._ended:
                    return
                yield
            while not (found := self._key(made)):
                if self._ended:
                    return
                yield
            at, mark = found
            key = self._rest[len(made.opening) : at]
            self._skip(at + len(mark))
            begun = f"{before}{_json(key)}: "
            its_kinds = kinds(properties.get(key, {}))
            if made.other:
                its_kinds = frozenset(("string" if mark == made.middle else "other",))
            if not (yield from self._value(index, begun, its_kinds, made)):
                return
            before = ", "

    def _key(self, made: ArgumentFormat) -> tuple[int, str] | None:
        """Return where the name of an argument ends, and what follows it; None if that is not there yet."""
        marks = (made.middle, made.other) if made.other else (made.middle,)
        places = ((self._rest.find(mark, len(made.opening)), mark) for mark in marks)
        return min((place for place in places if place[0] >= 0), default=None)

    def _value(
        self, index: int, before: str, kinds: frozenset[str], made: ArgumentFormat
    ) -> Generator[None, None, bool]:
        """Read a value that ends with `made.closing`, as JSON. False: it was cut."""
        if kinds >= {"string"} and len(kinds) > 1:  # it is known at its end what it is
            while (at := self._rest.find(made.closing)) < 0 and not self._ended:
                yield
            if at < 0:
                return False
            value = self._rest[:at]
            self._argue(index, before + (value if _is_other(value, kinds) else _json(value)))
            return self._skip(len(value) + len(made.closing))
        quote = '"' if "string" in kinds else ""
        self._argue(index, before + quote)
        if not (yield from self._up_to(index, made.closing, text=bool(quote))):
            return False
        self._argue(index, quote)
        return True

    def _up_to(self, index: int, mark: str, *, text: bool) -> Generator[None, None, bool]:
        """Hand out what stands before a mark, and skip that. False: it did not come."""
        while True:
            at = self._rest.find(mark)
            ready = at if at >= 0 else len(self._rest) - held(self._rest, mark, space=False)
            value = self._rest[:ready]
            self._argue(index, _json(value)[1:-1] if text else value)
            self._skip(ready)
            if at >= 0:
                return self._skip(len(mark))
            if self._ended:
                return False
            yield

    def _bare(self, index: int, mark: str) -> Generator[None]:
        within: list[str] = []
        key = False
        while True:
            while not self._rest or (mark.startswith(self._rest) and self._rest != mark):
                if self._ended:
                    return
                yield
            if self._rest.startswith(mark):
                self._skip(len(mark))
                self._argue(index, '"')
                if (yield from self._up_to(index, mark, text=True)):
                    self._argue(index, '"')
                key = False
            elif key and self._rest[0] not in "}:":
                while (at := self._rest.find(":")) < 0:
                    if self._ended:
                        return
                    yield
                self._argue(index, _json(self._rest[:at]))
                self._skip(at)
                key = False
            else:
                character = self._rest[0]
                self._skip(1)
                if character in "{[":
                    within.append(character)
                elif character in "}]" and within:
                    within.pop()
                self._argue(index, {",": ", ", ":": ": "}.get(character, character))
                key = character in "{," and within[-1:] == ["{"]
                if not within:
                    self.whole = True
                    return

    def _python(self, index: int) -> Generator[None]:
        self._argue(index, "{")
        depth = 0
        while True:
            found = _PYTHON.match(self._rest)
            if found is None:
                if self._ended:
                    return
                yield
                continue
            self._skip(found.end())
            kind, text = found.lastgroup, found[0]
            if kind == "end" and not depth:
                self._argue(index, "}")
                self.whole = True
                return
            if kind == "quote":
                self._argue(index, '"')
                if not (yield from self._python_text(index, text)):
                    return
                self._argue(index, '"')
            elif kind == "key":
                self._argue(index, f"{_json(found['key'])}: ")
            elif kind == "mark":
                depth += (text in "[{") - (text in "]}")
                self._argue(index, text + " " * (text in ",:"))
            elif kind == "word":
                self._argue(index, _AS_JSON.get(text, text))

    def _python_text(self, index: int, mark: str) -> Generator[None, None, bool]:
        """Hand out what stands before the mark, and skip that. False: it did not come."""
        while True:
            if self._rest.startswith(mark):
                return self._skip(1)
            if found := re.match(rf"[^{mark}\\]+", self._rest):
                self._argue(index, _json(found[0])[1:-1])
                self._skip(found.end())
            elif found := _ESCAPE.match(self._rest):
                code = f"\\u00{found[1]}" if found[1] else found[0]
                self._argue(index, "'" if code == "\\'" else code)
                self._skip(found.end())
            elif self._ended:
                return False
            else:
                yield

    def _goes_on(self) -> Generator[None, None, bool]:
        """Return True if another call follows; then up to its name."""
        between = self._format.between
        if between is None:
            return False
        while (stop := _match(between, self._rest)) == _CUT:
            if self._ended:
                return False
            yield
        return stop is not None and self._skip(stop)

    def _skip(self, characters: int) -> bool:
        self._rest = self._rest[characters:]
        return True

    def _say(self, characters: int) -> None:
        if characters > 0:
            self._content.append(self._rest[:characters])
            self._skip(characters)

    def _argue(self, index: int, text: str) -> None:
        if text and self._calls and self._calls[-1].index == index:
            self._calls[-1].arguments += text
        elif text:
            self._calls.append(ToolCallDelta(index, text))


_PYTHON = re.compile(
    r"""\s+|(?P<key>[^\s=(),:'"{}\[\]]+)=|(?P<word>[^\s=(),:'"{}\[\]]+)(?=[\s,:)}\]])"""
    r"""|(?P<mark>[\[\]{},:])|(?P<end>\))|(?P<quote>['"])"""
)
"""Pattern of the pieces of which arguments in Python consist."""
_ESCAPE = re.compile(r"""\\(?:['"\\nrtbf]|x([0-9a-fA-F]{2})|u[0-9a-fA-F]{4})""")
_AS_JSON = {"True": "true", "False": "false", "None": "null"}


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_other(value: str, kinds: frozenset[str]) -> bool:
    """Return True if a value that may be a text is JSON of another kind."""
    try:
        made = json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return False
    if isinstance(made, str):
        return False
    found = {"null" if made is None else _KIND_OF[type(made)]}
    if isinstance(made, int | float) and not isinstance(made, bool):
        found |= {"number"} | ({"integer"} if isinstance(made, int) or made.is_integer() else set())
    return "other" in kinds or not kinds.isdisjoint(found)


_KIND_OF = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def _no_number(name: str) -> None:
    raise ValueError(name)


class TextReader:
    """Reads an answer that calls nothing, as CallReader one that may."""

    count = 0
    whole = True

    def feed(self, text: str, *, end: bool = False) -> Said:
        return Said(text, [])

    def finish_reason(self, reason: str | None) -> str | None:
        return reason


AnswerReader = CallReader | TextReader


def answer_reader(calls: CallFormat | None, answer: str) -> AnswerReader:
    """Return the reader of one answer. answer: its request's id and its choice."""
    return TextReader() if calls is None else CallReader(calls, answer)


def _match(written: str, text: str, at: int = 0) -> int | None:
    """Return where a part of a format ends that begins at a place of a text; None if it is not there, _CUT
    if the text ends before that is known."""
    for part in _PARTS.split(written):
        if part == COUNT:
            found = _DIGITS.match(text, at)
            stop = found.end() if found else at
            if stop == len(text):
                return _CUT
            if found is None:
                return None
        elif part == HOLE:
            stop = at + ID_CHARACTERS
            piece = text[at:stop]
            if piece and not (piece.isascii() and piece.isalnum()):
                return None
        else:
            stop = at + len(part)
            if not part.startswith(text[at:stop]):
                return None
        if stop > len(text):
            return _CUT
        at = stop
    return at


_CUT = -1
_PARTS = re.compile(f"([{HOLE}{COUNT}])")
_DIGITS = re.compile("[0-9]+")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
"""Pattern of the names that functions may have."""
