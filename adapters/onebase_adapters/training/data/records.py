"""Records of JSON Lines and JSON files, parsed strictly, and what is wrong with a bad one.

Each record and each problem has the line on which it begins. Fields, reasons and names of files are valid
Unicode, whatever the data held: they go through JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One bad line.

    line: 1-based, as an editor counts; of the record where a file has no lines; 0: the file as a whole.
    field: as in `messages[2].content`; "" where the whole line is bad.
    reason: what is wrong, and what to do about it.
    """

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{place}{self.field}: {self.reason}" if self.field else f"{place}{self.reason}"


class DataError(ValueError):
    """A file that cannot be trained on. `problems` has every bad line; the text shows the first 20."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        source = self.source = valid_unicode(source)
        self.problems = [
            Problem(each.line, valid_unicode(each.field), valid_unicode(each.reason)) for each in problems
        ]
        shown = [f"  {problem}" for problem in self.problems[:_SHOWN]]
        more = len(self.problems) - len(shown)
        if more:
            shown.append(f"  and {more} more")
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *shown]))

    @classmethod
    def of_file(cls, source: str, reason: str) -> DataError:
        """The file as a whole cannot be used."""
        return cls(source, [Problem(0, "", reason)])


class RowError(ValueError):
    """A row that cannot be used. Its reader adds the line."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def valid_unicode(text: str) -> str:
    """`text` with what UTF-8 cannot encode written out, such as odd bytes of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


MOST_LINE_BYTES = 4 << 20
MOST_JSON_BYTES = 512 << 20
MOST_DEPTH = 64
"""Levels of lists and objects in a row."""

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One row as the file has it. line: 1-based. size: bytes, roughly."""

    line: int
    value: dict[str, Any]
    size: int


Item = Record | Problem


def parse_strict(text: str) -> Any:
    """Plain JSON. Raises RowError for what parsers read differently, or not at all: NaN, numbers
    beyond a double, a key twice, nesting deeper than MOST_DEPTH, text that is no Unicode."""
    value = _parse(text)
    _check_depth(value)
    return value


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that occurs a second time; None if there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def json_lines(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Item]:
    """A record per line; blank lines are skipped. on_bytes: gets how many were read."""
    line = 0
    while raw := file.readline(MOST_LINE_BYTES + 1):
        line += 1
        on_bytes(len(raw))
        if len(raw) > MOST_LINE_BYTES:
            yield Problem(line, "", f"the line is longer than {MOST_LINE_BYTES >> 20} MB")
            _skip_line(file, on_bytes)
            continue
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if not raw.strip():
            continue
        yield _record(line, raw)


def json_array(file: BinaryIO, on_bytes: Callable[[int], None], source: str) -> Iterator[Item]:
    """The records of a `.json` file: a list of objects, one object, or JSON Lines after all."""
    raw = file.read(MOST_JSON_BYTES + 1)
    on_bytes(len(raw))
    if len(raw) > MOST_JSON_BYTES:
        reason = f"a .json file may have {MOST_JSON_BYTES >> 20} MB: write it as JSON Lines (.jsonl)"
        raise DataError.of_file(source, reason)
    try:
        text = raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Problem(line, "", f"not UTF-8 (byte {error.start} of the file): save the file as UTF-8")
        return
    if text.lstrip(_SPACE).startswith("["):
        yield from _elements(text)
    else:
        yield from _objects(text)


def _elements(text: str) -> Iterator[Item]:
    """The values of one list, with the line on which each begins."""
    rest = _Rest(text)
    rest.take("[")
    expect_value = False
    while expect_value or not rest.take("]"):
        try:
            yield rest.row()
        except RowError as error:
            yield rest.problem(f"{error.reason}; what follows was not read")
            return
        expect_value = rest.take(",")
        if not expect_value and not rest.begins_with("]"):
            yield rest.problem("not JSON: ',' or ']' expected; what follows was not read")
            return
    if not rest.is_empty:
        yield rest.problem("there is more after the end of the list")


def _objects(text: str) -> Iterator[Item]:
    """Objects one after the other, each on any number of lines."""
    rest = _Rest(text)
    while not rest.is_empty:
        try:
            yield rest.row()
        except RowError as error:
            yield rest.problem(f"{error.reason}; what follows was not read")
            return


class _Rest:
    """The part of a JSON text that is still to be read; it never begins with white space."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._escapes = "\\u" in text
        self._line = 1
        self._at = 0
        self._go_to(0)

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._text)

    def begins_with(self, character: str) -> bool:
        return self._text.startswith(character, self._at)

    def take(self, character: str) -> bool:
        """Skip a character; False if another one is there."""
        found = self.begins_with(character)
        if found:
            self._go_to(self._at + 1)
        return found

    def row(self) -> Item:
        """Read a value. Raises RowError if there is none: the end is unknown then."""
        line, start = self._line, self._at
        value, end = _strict(partial(_DECODER.raw_decode, self._text, start), self._escapes)
        self._go_to(end)
        return _as_record(line, value, end - start)

    def problem(self, reason: str) -> Problem:
        """A problem at this place."""
        return Problem(self._line, "", reason)

    def _go_to(self, position: int) -> None:
        while position < len(self._text) and self._text[position] in _SPACE:
            position += 1
        self._line += self._text.count("\n", self._at, position)
        self._at = position


def _record(line: int, raw: bytes) -> Item:
    try:
        return _as_record(line, _parse(raw.decode()), len(raw))
    except UnicodeDecodeError as error:
        return Problem(line, "", f"not UTF-8 (byte {error.start} of the line): save the file as UTF-8")
    except RowError as error:
        return Problem(line, error.field, error.reason)


def _as_record(line: int, value: Any, size: int) -> Item:
    if size > MOST_LINE_BYTES:
        return Problem(line, "", f"the row is longer than {MOST_LINE_BYTES >> 20} MB")
    try:
        _check_depth(value)
    except RowError as error:
        return Problem(line, error.field, error.reason)
    if isinstance(value, dict):
        return Record(line, value, size)
    return Problem(line, "", f'a row is an object, as in {{"messages": ...}}, not {_kind(value)}')


def _skip_line(file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    while raw := file.readline(1 << 20):
        on_bytes(len(raw))
        if raw.endswith(b"\n"):
            return


def _parse(text: str) -> Any:
    return _strict(partial(_DECODER.decode, text), "\\u" in text)


def _strict(parse: Callable[[], Any], escapes: bool) -> Any:
    try:
        value = parse()
        if escapes:
            _check_unicode(value)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise RowError("", f"not JSON: {error.msg.lower()} ({line}column {error.colno})") from None
    except ValueError as error:
        raise RowError("", f"not JSON: {error}") from None
    return value


def _check_depth(value: Any) -> None:
    """Raise RowError for what is too deep for recursion later."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    raise _too_deep()


def _too_deep() -> RowError:
    return RowError("", f"nested too deep: at most {MOST_DEPTH} levels of lists and objects are read")


def _check_unicode(value: Any) -> None:
    """Refuse half a surrogate pair: Python takes it as text, a tokenizer does not."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff alone) is not a character") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = first_twice(name for name, _ in pairs) or ""
        raise ValueError(f"the key {twice[:60]!r} occurs twice")
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_no_constants
)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
