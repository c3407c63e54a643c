"""Match the module names of a config as PEFT does, in bounded time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from onebase_adapters.format.linear_regex import LinearRegex, RegexError

MAX_KEYS = 1 << 13
MAX_FORMS = 128
"""Limits of a pattern: number of keys, and of different forms (length and places of the dots). A form costs
one lookup per module; real configs have about ten."""
MAX_EXPRESSIONS = 256
MAX_WORK = 10_000_000
"""Limits of a pattern's regular expressions: their number, and the states that they go through for all names,
some seconds."""

_NUMBER = re.compile(r"[0-9]{1,9}")
_LITERAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


class PatternError(ValueError):
    """A key of a pattern cannot be matched in bounded time, or there are too many."""


@dataclass(frozen=True)
class _Form:
    """Keys of one form: their text, with a dot where PEFT takes any character, to position and value."""

    length: int
    anyhow: tuple[int, ...]
    whole: bool
    values: dict[str, tuple[int, float]] = field(default_factory=dict)


class NamePattern:
    """`rank_pattern` or `alpha_pattern`: the first key that matches, as by PEFT's `(.*\\.)?({key})$`.

    Most keys are literal names: letters, digits, `_` and `.`, in which PEFT takes a dot as any character;
    `\\.` is a dot only, a leading `^` requires the whole name, and a final `$` changes nothing. Of these any
    number takes one lookup. Other keys are matched as regular expressions.

    Raises:
        PatternError: a key needs more of Python's expressions than `LinearRegex` has, or there are too many.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        if len(values) > MAX_KEYS:
            raise PatternError(f"more than {MAX_KEYS} keys")
        self.values = dict(values)
        forms: dict[tuple[int, tuple[int, ...], bool], _Form] = {}
        expressions: list[tuple[int, LinearRegex, float]] = []
        for place, (key, value) in enumerate(values.items()):
            literal = _taken_apart(key)
            if literal is None:
                expressions.append((place, _expression(key), value))
                if len(expressions) > MAX_EXPRESSIONS:
                    raise PatternError(f"more than {MAX_EXPRESSIONS} regular expressions")
                continue
            text, anyhow, whole = literal
            form = forms.setdefault((len(text), anyhow, whole), _Form(len(text), anyhow, whole))
            form.values.setdefault(text, (place, value))
            if len(forms) > MAX_FORMS:
                raise PatternError(f"keys of more than {MAX_FORMS} forms")
        self._forms = tuple(forms.values())
        self._expressions = tuple(expressions)

    def lookup(self, name: str, default: float) -> float:
        """Return the value of the first key that matches the module `name`.

        Raises PatternError if the regular expressions took too long for this name and those before.
        """
        first = min((hit for form in self._forms if (hit := _hit(form, name)) is not None), default=None)
        for place, regex, value in self._expressions:
            if first is not None and place > first[0]:
                break
            if regex.matches(name):
                first = place, value
                break
        if sum(regex.work for _, regex, _ in self._expressions) > MAX_WORK:
            raise PatternError("the regular expressions take too long. Write names of modules instead.")
        return default if first is None else first[1]


def _expression(key: str) -> LinearRegex:
    try:
        LinearRegex(key)  # which a key that closes PEFT's own group is not
        return LinearRegex(rf"(.*\.)?({key})$")
    except RegexError as error:
        raise PatternError(
            f"the regular expression {key!r:.80} {error}. Write names of modules instead."
        ) from None


def _taken_apart(key: str) -> tuple[str, tuple[int, ...], bool] | None:
    """Parse a literal key: its text, the positions of dots that match any character, whether it is a whole
    name.

    Returns None for any other key.
    """
    whole = key.startswith("^")
    rest = key.removeprefix("^").removesuffix("$")
    text: list[str] = []
    anyhow: list[int] = []
    escaped = False
    for character in rest:
        if character == "\\" and not escaped:
            escaped = True
            continue
        if character not in _LITERAL or (escaped and character != "."):
            return None
        if character == "." and not escaped:
            anyhow.append(len(text))
        text.append(character)
        escaped = False
    if not text or escaped:
        return None
    return "".join(text), tuple(anyhow), whole


def _hit(form: _Form, name: str) -> tuple[int, float] | None:
    start = len(name) - form.length
    if start < 0 or (start > 0 and (form.whole or name[start - 1] != ".")):
        return None
    text = name[start:]
    if any(text[place] != "." for place in form.anyhow):
        letters = list(text)
        for place in form.anyhow:
            letters[place] = "."
        text = "".join(letters)
    return form.values.get(text)


def endings(name: str) -> Iterator[str]:
    """Yield the name and each dotted end of it: a.b.c, b.c, c."""
    yield name
    for place, character in enumerate(name):
        if character == ".":
            yield name[place + 1 :]


def layer_numbers(name: str) -> frozenset[int]:
    """Return the numbers among the parts of a module's name; numbers longer than any layer's are left out."""
    return frozenset(int(part) for part in name.split(".") if _NUMBER.fullmatch(part))


@dataclass(frozen=True)
class Targets:
    """Modules that PEFT would wrap by `target_modules`, if no regular expression is needed to decide."""

    names: frozenset[str]
    excluded: frozenset[str]
    layers: frozenset[int] | None
    patterns: Mapping[str, int] | None
    """Names that precede a layer's number, with their order of preference; None if any name may."""

    @classmethod
    def of(
        cls,
        names: tuple[str, ...] | str | None,
        excluded: tuple[str, ...] | str | None,
        layers: frozenset[int] | None,
        patterns: tuple[str, ...],
    ) -> Targets | None:
        """Return the targets; None if a field is a regular expression, or PEFT chooses by architecture."""
        if names is None or isinstance(names, str) or (isinstance(excluded, str) and excluded):
            return None
        if layers is not None and not all(p and _LITERAL.issuperset(p) and "." not in p for p in patterns):
            return None
        order = {pattern: place for place, pattern in reversed(list(enumerate(patterns)))}
        return cls(frozenset(names), frozenset(excluded or ()), layers, order)

    @classmethod
    def at_most(cls, names: tuple[str, ...], layers: frozenset[int] | None) -> Targets:
        """Return the largest set of targets, whatever regular expressions in other fields leave out.

        A module counts as being in each layer whose number stands in its name.
        """
        return cls(frozenset(names), frozenset(), layers, None)

    def means(self, name: str) -> bool:
        """Return True if the module `name` is a target."""
        ends = set(endings(name))
        if ends & self.excluded:
            return False
        if name in self.names:
            return True
        return bool(ends & self.names) and (self.layers is None or self._is_in_layers(name, self.layers))

    def _is_in_layers(self, name: str, layers: frozenset[int]) -> bool:
        if self.patterns is None:
            return not layers.isdisjoint(layer_numbers(name))
        return self._layer(name, self.patterns) in layers

    @staticmethod
    def _layer(name: str, patterns: Mapping[str, int]) -> int | None:
        """Return the number behind `layers.`; without patterns, behind any name but the first part."""
        parts = name.split(".")
        numbered = [place for place in range(len(parts) - 2) if _NUMBER.fullmatch(parts[place + 1])]
        if patterns:
            known = [place for place in numbered if parts[place] in patterns]
            found = min(known, key=lambda place: patterns[parts[place]], default=None)
        else:
            found = next((place for place in numbered if place > 0), None)
        return None if found is None else int(parts[found + 1])
