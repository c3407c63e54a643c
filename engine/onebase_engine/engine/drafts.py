"""Guesses of a sequence's next tokens: what its grammar forces, or what followed the same tokens in its own
text (prompt lookup, arXiv 2304.04487).

A step computes them with the sequence's last token, as a chunk of a prompt is computed, and draws from each
position's logits what it would have drawn step by step: as long as that is the draft, one step has given
several tokens. A sequence's bits do not depend on how it is cut into chunks, and the noise of a draw only on
the token's index: the text, sampled or not, is the one without drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence

MATCHED = 3
"""Number of last tokens for which an earlier occurrence is searched."""
LOOKED_AT = 8192
"""Largest number of a prompt's last tokens that are indexed; the index takes 100 bytes a token."""
PRIOR = 0.5
"""Assumed part of drafts that are right, for a sequence without a history."""
LEARNED = 0.15
"""Weight of the newest draft in the running mean of right drafts."""
_TOKEN_BITS = 24


class Drafts:
    """Draft source of one sequence, with the part of its drafts that were right."""

    def __init__(self) -> None:
        self.right = PRIOR
        self._draft: list[int] = []
        self._sure = False
        self._ends: dict[int, int] = {}
        """Index behind the last occurrence of each MATCHED tokens."""
        self._read = 0

    def propose(
        self, tokens: Sequence[int], most: int, forced: Sequence[int] = (), *, drawing: bool = False
    ) -> list[int]:
        """Return up to `most` tokens: forced ones, or those that followed the same tokens earlier.

        drawing: whether a token is being drawn that comes before the draft; then only forced ones are known.
        """
        length = len(tokens) + drawing
        for end in range(max(self._read, MATCHED, length - LOOKED_AT), length):
            self._ends[_key(tokens, end)] = end
        self._read = length
        self._sure = bool(forced)
        if forced:
            self._draft = []
            return list(forced[:most])
        start = self._ends.get(_key(tokens, length)) if length > MATCHED and not drawing else None
        draft: list[int] = []
        for place in range(start or 0, (start or 0) + most if start else 0):
            # A text that repeats itself continues within the draft.
            draft.append(tokens[place] if place < len(tokens) else draft[place - len(tokens)])
        self._draft = draft
        return draft

    def observe(self, drawn: Sequence[int]) -> None:
        """Update the part of right drafts with the tokens drawn, even if the last draft was not computed."""
        for guess, token in zip(self._draft, drawn, strict=False):
            self.right += LEARNED * ((guess == token) - self.right)
            if guess != token:
                break

    def worth(self, rows: int, cost: float) -> int:
        """Return the largest useful draft, in tokens, for a step of `rows` rows.

        Its last token is as likely right as its share of the step's cost, in parts of what a token costs
        without drafts. Forced tokens are always useful, since they must come anyway.
        """
        if self._sure:
            return LOOKED_AT
        if self.misses(rows, cost):
            return 0
        if self.right >= 0.999:
            return LOOKED_AT
        return int(math.log(_least(rows, cost)) / math.log(self.right))

    def misses(self, rows: int, cost: float) -> bool:
        """Return True if drafts that are not forced are right too seldom for a step of this many rows.

        cost: what each further row adds to a step, as a part of a step of one row.
        """
        return self.right < _least(rows, cost)


def _least(rows: int, cost: float) -> float:
    """Return the part of drafts that must be right for a step of this many rows to gain by them."""
    return cost * rows / (1 + cost * (rows - 1))


def _key(tokens: Sequence[int], end: int) -> int:
    key = 0
    for token in tokens[end - MATCHED : end]:
        key = key << _TOKEN_BITS | token
    return key
