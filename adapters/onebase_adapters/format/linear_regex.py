"""Match a regular expression from an untrusted file in bounded time.

Python's `re` backtracks, so that a short expression can run for years. Here an expression becomes an
automaton whose states all advance together (https://swtch.com/~rsc/regexp/regexp1.html): the work for each
character is at most the number of states, which is limited. The syntax is the part of `re`'s that needs no
backtracking.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

MOST_CHARACTERS = 1000
MOST_STATES = 2000
"""Limits of one expression: its length, and the states of its automaton."""
_DEEPEST = 30
_MOST_REPEATS = 1000
_DIGITS, _SPACES = frozenset(string.digits), frozenset(string.whitespace)
_CATEGORIES = {"d": _DIGITS, "s": _SPACES, "w": frozenset(string.ascii_letters) | _DIGITS | {"_"}}
"""Categories in ASCII: names of modules have no other characters."""


class RegexError(ValueError):
    """The expression is malformed, too large, or of a kind that is not matched here."""


@dataclass(frozen=True)
class _Set:
    """One character of a set, or one that is not in it."""

    characters: frozenset[str]
    negated: bool = False

    def has(self, character: str) -> bool:
        return (character in self.characters) != self.negated


_Test = _Set | str | None
"""Condition of a step: a set for the next character; `^` or `$`; or None, if nothing is asked."""
_Node = Callable[["LinearRegex", int], int]
"""Part of an expression: builds its steps behind a state, and returns the state behind them."""
_ANY = _Set(frozenset("\n"), negated=True)


class LinearRegex:
    """An expression that is matched against whole texts, as by `re.fullmatch`.

    Groups, alternatives, sets, `.`, `\\d`, `\\w`, `\\s`, quantifiers, `^` and `$` are read. Raises RegexError
    for anything else: references, lookarounds, flags, possessive quantifiers.
    """

    def __init__(self, expression: str) -> None:
        if len(expression) > MOST_CHARACTERS:
            raise RegexError(f"is over {MOST_CHARACTERS} characters")
        self.work = 0
        """Number of states that all matches so far went through, a measure of time."""
        self._steps: list[list[tuple[_Test, int]]] = []
        self._begin = self.state()
        self._final = _Reader(expression).read()(self, self._begin)

    def matches(self, text: str) -> bool:
        """Return True if the expression matches the whole text."""
        states = self._reached({self._begin}, 0, len(text))
        for place, character in enumerate(text, 1):
            self.work += len(states)
            found = {
                target
                for state in states
                for test, target in self._steps[state]
                if isinstance(test, _Set) and test.has(character)
            }
            states = self._reached(found, place, len(text))
        return self._final in states

    def state(self) -> int:
        """Add a state. Raises RegexError if there are too many."""
        if len(self._steps) >= MOST_STATES:
            raise RegexError(f"has over {MOST_STATES} states: shorten it, or repeat less")
        self._steps.append([])
        return len(self._steps) - 1

    def step(self, begin: int, test: _Test = None, end: int | None = None) -> int:
        """Add a step to a state, a new one by default. Returns that state."""
        end = self.state() if end is None else end
        self._steps[begin].append((test, end))
        return end

    def _reached(self, states: set[int], place: int, length: int) -> set[int]:
        """Return the states that are reached without a further character."""
        waiting = list(states)
        while waiting:
            for test, target in self._steps[waiting.pop()]:
                holds = test is None or (test == "^" and place == 0) or (test == "$" and place == length)
                if holds and target not in states:
                    states.add(target)
                    waiting.append(target)
        return states


def _one(test: _Test) -> _Node:
    return lambda automaton, begin: automaton.step(begin, test)


def _sequence(nodes: list[_Node]) -> _Node:
    def build(automaton: LinearRegex, begin: int) -> int:
        for node in nodes:
            begin = node(automaton, begin)
        return begin

    return build


def _alternatives(nodes: list[_Node]) -> _Node:
    def build(automaton: LinearRegex, begin: int) -> int:
        end = automaton.state()
        for node in nodes:
            automaton.step(node(automaton, automaton.step(begin)), None, end)
        return end

    return build


def _repeated(node: _Node, least: int, most: int | None) -> _Node:
    def build(automaton: LinearRegex, begin: int) -> int:
        for _ in range(least):
            begin = node(automaton, automaton.step(begin))
        begin = automaton.step(begin)
        if most is None:
            automaton.step(node(automaton, automaton.step(begin)), None, begin)
            return automaton.step(begin)
        end = automaton.state()
        for _ in range(most - least):
            automaton.step(begin, None, end)
            begin = node(automaton, automaton.step(begin))
        return automaton.step(begin, None, end)

    return build


class _Reader:
    """Reads an expression. Raises RegexError."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0

    def read(self) -> _Node:
        node = self._alternatives(0)
        if self._next():
            raise RegexError("closes a group that it does not open")
        return node

    def _next(self) -> str:
        return self._text[self._place : self._place + 1]

    def _skip(self, text: str) -> bool:
        """Return True, and go on behind it, if `text` comes next."""
        found = self._text.startswith(text, self._place)
        self._place += len(text) if found else 0
        return found

    def _character(self) -> str:
        if not self._next():
            raise RegexError("ends too early")
        self._place += 1
        return self._text[self._place - 1]

    def _alternatives(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise RegexError(f"is nested deeper than {_DEEPEST}")
        nodes = [self._items(depth)]
        while self._skip("|"):
            nodes.append(self._items(depth))
        return _alternatives(nodes) if len(nodes) > 1 else nodes[0]

    def _items(self, depth: int) -> _Node:
        nodes: list[_Node] = []
        while self._next() not in ("", "|", ")"):
            anchor = self._next() in ("^", "$")
            node = self._atom(depth)
            quantifier = self._quantifier()
            if quantifier is not None and anchor:
                raise RegexError("repeats an anchor")
            nodes.append(node if quantifier is None else _repeated(node, *quantifier))
        return _sequence(nodes)

    def _atom(self, depth: int) -> _Node:
        character = self._character()
        if character == "(":
            if self._next() == "?" and not self._skip("?:"):
                raise RegexError("has a group that is not a plain one, as (?:...) or (...)")
            node = self._alternatives(depth + 1)
            if not self._skip(")"):
                raise RegexError("opens a group that it does not close")
            return node
        if character in ("*", "+", "?", "{"):
            raise RegexError(f"has a {character} that repeats nothing")
        if character in ("^", "$"):
            return _one(character)
        if character == ".":
            return _one(_ANY)
        if character == "[":
            return _one(self._set())
        return _one(self._escaped() if character == "\\" else _Set(frozenset(character)))

    def _escaped(self) -> _Set:
        character = self._character()
        if character.lower() in _CATEGORIES:
            return _Set(_CATEGORIES[character.lower()], negated=character.isupper())
        if character.isalnum() or not character.isascii():
            raise RegexError(f"has \\{character}, which is not read here")
        return _Set(frozenset(character))

    def _set(self) -> _Set:
        """Read a set behind its opening bracket."""
        negated, characters, first = self._skip("^"), set[str](), True
        while first or not self._skip("]"):
            first = False
            low = self._member()
            if self._next() != "-" or self._text.startswith("-]", self._place):
                characters |= low
                continue
            self._place += 1
            high = self._member()
            if len(low) != 1 or len(high) != 1 or min(low) > min(high):
                raise RegexError("has a range in a set that is none")
            characters |= {chr(code) for code in range(ord(min(low)), ord(min(high)) + 1)}
        return _Set(frozenset(characters), negated)

    def _member(self) -> frozenset[str]:
        character = self._character()
        if character == "\\":
            found = self._escaped()
            if found.negated:
                raise RegexError("has a negated category in a set")
            return found.characters
        if (
            character == "["
            or not character.isascii()
            or self._text[self._place - 1 : self._place + 1] in _PAIRS
        ):
            raise RegexError("has a set in a set, or a character that no name has")
        return frozenset(character)

    def _quantifier(self) -> tuple[int, int | None] | None:
        found = self._count()
        if found is not None:
            self._skip("?")  # whether as few as possible are taken does not change what matches whole
            if self._next() in ("*", "+", "?", "{"):
                raise RegexError("has a quantifier behind another one")
        return found

    def _count(self) -> tuple[int, int | None] | None:
        if self._skip("*"):
            return 0, None
        if self._skip("+"):
            return 1, None
        if self._skip("?"):
            return 0, 1
        if not self._skip("{"):
            return None
        inside, closed, _ = self._text[self._place :].partition("}")
        self._place += len(inside) + 1
        low, comma, high = inside.partition(",")
        if not closed or not (low or high) or not all(_is_number(one) for one in (low, high) if one):
            raise RegexError("has a { that is no quantifier")
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > _MOST_REPEATS or (most is not None and most < least):
            raise RegexError(f"has a quantifier that is none, or is over {_MOST_REPEATS}")
        return least, most


_PAIRS = frozenset(["--", "&&", "~~", "||"])
"""Operators of sets, which `re` reserves."""


def _is_number(text: str) -> bool:
    return len(text) <= 5 and text.isascii() and text.isdigit()
