"""Tokens into text, piece by piece: valid UTF-8 at any boundary, and stop strings that never leak."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_MOST_HELD_TOKENS = 32


class PieceDecoder(Protocol):
    """Pieces of text whose concatenation, `flush()` included, is the text of all tokens together."""

    def push(self, token: int) -> str:
        """Return text that this token makes certain; empty while a character is incomplete."""

    def flush(self) -> str:
        """Return the text that is left at the end: an incomplete character becomes U+FFFD."""


class TokenBytes(Protocol):
    """The bytes behind each token id; empty for special tokens."""

    def __call__(self, token: int) -> bytes: ...


class TokensToText(Protocol):
    """The tokenizer's own decoding of a whole sequence, special tokens skipped."""

    def __call__(self, tokens: Sequence[int]) -> str: ...


class BytePieces:
    """Decoder for byte-level tokenizers, whose text is the UTF-8 decoding of their tokens' bytes.

    Constant work per token. Invalid bytes become U+FFFD by the maximal-subpart rule of the Unicode
    standard (section 3.9), in Python as in the tokenizers library, so the pieces add up exactly.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowPieces:
    """Decoder for other tokenizers: it decodes a sliding window twice and sends what the new token added.

    The window starts at the previous boundary, since many decoders treat a first token differently.
    Text that ends in U+FFFD may be an incomplete character and waits, for a bounded number of tokens.
    """

    def __init__(self, decode: TokensToText, before: Sequence[int] = ()) -> None:
        """before: tokens whose text is sent already."""
        self._decode = decode
        self._window = list(before)
        self._sent_tokens = len(before)
        self._sent_text = decode(before) if before else ""

    def push(self, token: int) -> str:
        self._window.append(token)
        held = len(self._window) - self._sent_tokens
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and held < _MOST_HELD_TOKENS:
            return ""
        return self._send(text)

    def flush(self) -> str:
        if len(self._window) == self._sent_tokens:
            return ""
        return self._send(self._decode(self._window))

    def _send(self, text: str) -> str:
        piece = text[len(self._sent_text) :]
        if not piece and len(self._window) - self._sent_tokens < _MOST_HELD_TOKENS:
            return ""
        del self._window[: self._sent_tokens]
        self._sent_tokens = len(self._window)
        self._sent_text = self._decode(self._window)
        return piece


class ShownPieces:
    """`WindowPieces` with the names of some special tokens in the text, which decoders leave out."""

    def __init__(self, decode: TokensToText, names: Mapping[int, str], before: Sequence[int]) -> None:
        """before: any text: after it, decoders do not take a first space away."""
        self._decode = decode
        self._names = names
        self._before = before
        self._between = WindowPieces(decode)

    def push(self, token: int) -> str:
        if token not in self._names:
            return self._between.push(token)
        rest, self._between = self._between.flush(), WindowPieces(self._decode, self._before)
        return rest + self._names[token]

    def flush(self) -> str:
        return self._between.flush()


class StopStrings:
    """Holds back exactly the text that may be the beginning of a stop string.

    One Knuth-Morris-Pratt automaton per stop string: its state is the length of the longest prefix of
    the stop string that the text ends with. The text ends before the stop string that is complete
    first, whatever the pieces were; of two that end together, before the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Return text that can no longer be part of a stop string. After a match: empty."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        position = len(self._held)
        for character in piece:
            position += 1
            longest = self._advance(character)
            if longest:
                self.matched = text[position - longest : position]
                self._held = ""
                return text[: position - longest]
        keep = max(self._states)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the rest: the end came before any stop string was complete."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Length of the longest stop string that this character completes, or 0."""
        longest = 0
        for index, stop in enumerate(self._stops):
            state, failure = self._states[index], self._failures[index]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                longest = max(longest, state)
                state = failure[state - 1]
            self._states[index] = state
        return longest


def _failure_function(pattern: str) -> list[int]:
    """Return, for each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table
