"""Rows of any shape into samples: tokenized in bulk, and held to the longest length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onebase_adapters.training.base_tokens import BaseTokens
from onebase_adapters.training.chat_tokens import ChatTokens, Piece
from onebase_adapters.training.conversation import Chat, Text
from onebase_adapters.training.data_problems import RowError
from onebase_adapters.training.recipe import TooLong
from onebase_adapters.training.samples import Sample


@dataclass(frozen=True)
class Tokenized:
    """A row's samples, one unless its chat template rewrites earlier replies; none if it was dropped.

    reply: where in the last sample the reply stands that the row ends in, up to the token that ends its
    generation; None if the row ends in none, or if it was cut.
    """

    samples: Sequence[Sample]
    reply: slice | None
    truncated: bool


class RowTokens:
    """Turns chats and texts into samples of at most `limit` tokens."""

    def __init__(self, base: BaseTokens, *, everything: bool, limit: int, too_long: TooLong) -> None:
        self._base = base
        self._chats = ChatTokens(base, everything=everything)
        self._everything = everything
        self._limit = limit
        self._too_long = too_long

    def tokenize(self, rows: Sequence[tuple[int, Chat | Text]]) -> list[Tokenized | RowError]:
        """Of each row with its line: its samples, or why it has none."""
        texts: list[str | RowError] = [self._whole(row) for _, row in rows]
        ids = iter(self._base.encode([text for text in texts if isinstance(text, str)]))
        prompts = iter(self._base.encode([prompt for _, row in rows if (prompt := _prompt(row)) is not None]))
        made: list[Tokenized | RowError] = []
        for (line, row), text in zip(rows, texts, strict=True):
            if isinstance(text, RowError):
                made.append(text)
                continue
            whole = next(ids)
            try:
                if isinstance(row, Text):
                    pieces = [self._text(row, whole, None if row.prompt is None else next(prompts))]
                elif self._is_kept(len(whole)):
                    pieces = self._chats.pieces(row, text, whole)
                else:
                    pieces = []
                made.append(self._bounded(line, pieces))
            except RowError as error:
                made.append(error)
        return made

    def _whole(self, row: Chat | Text) -> str | RowError:
        if isinstance(row, Text):
            return (row.prompt or "") + row.reply
        try:
            return self._chats.render(row)
        except RowError as error:
            return error

    def _text(self, row: Text, ids: list[int], prompt: list[int] | None) -> Piece:
        """Plain text, and its end. Prompt and completion are tokenized together, as TRL does, unless a
        token would reach over the border between them: serving sends the prompt by itself."""
        whole = self._base.begin(ids)
        start = 0
        if prompt is not None:
            before = self._base.begin(prompt)
            if whole[: len(before)] != before:
                whole = [*before, *self._base.go_on(row.reply)]
            start = len(before)
        if self._base.end is not None and whole[-1:] != [self._base.end]:
            whole = [*whole, self._base.end]
        first = 1 if self._everything else max(1, start)
        return Piece(whole, [(first, len(whole))], None if prompt is None else start)

    def _is_kept(self, length: int) -> bool:
        """Whether the labels of a row are worth finding. Raises RowError for a row that is refused."""
        if length <= self._limit or self._too_long == "truncate":
            return True
        if self._too_long == "drop":
            return False
        reason = f"{length:,} tokens, where {self._limit:,} is the most: shorten the row, raise max_length"
        raise RowError("", f"{reason} (if the base reads more), or set too_long to truncate or drop")

    def _bounded(self, line: int, pieces: Sequence[Piece]) -> Tokenized:
        samples = []
        truncated = False
        dropped = not pieces
        for piece in pieces:
            if not self._is_kept(len(piece.ids)):
                dropped = True
                continue
            truncated = truncated or len(piece.ids) > self._limit
            sample = _sample(piece, self._limit, line)
            if sample.targets:
                samples.append(sample)
        if not samples and not dropped:
            cut = f" within the first {self._limit} tokens (max_length)" if truncated else ""
            raise RowError("", f"nothing to learn{cut}: no token of a reply is left")
        whole = bool(samples) and len(pieces[-1].ids) <= self._limit
        return Tokenized(samples, self._last_reply(pieces[-1]) if whole else None, truncated)

    def _last_reply(self, piece: Piece) -> slice | None:
        if piece.prompt is None:
            return None
        end = piece.spans[-1][1]
        places = range(piece.prompt, end)
        return slice(piece.prompt, next((at for at in places if piece.ids[at] in self._base.stops), end))


def _prompt(row: Chat | Text) -> str | None:
    return row.prompt if isinstance(row, Text) else None


def _sample(piece: Piece, limit: int, line: int) -> Sample:
    ids = np.array(piece.ids[:limit], dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in piece.spans:
        supervised[max(1, start) : stop] = True
    return Sample(ids, supervised, line)
