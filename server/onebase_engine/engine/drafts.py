"""Tokens that a row will perhaps go on with: what its grammar says comes next, or what came next before in
its own text (prompt lookup, arXiv 2304.04487).

A step computes them with the row's last token, as a chunk of a prompt is computed, and draws from each
position's logits what it would have drawn step by step: as long as that is the draft, one step has given
several tokens. A row's bits do not depend on how it is cut into chunks, and the noise of a draw only on the
token's index: the text, sampled or not, is the one without drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MATCHED = 3
"""Last tokens of a row that are looked for further up."""
LOOKED_AT = 8192
"""Of a long prompt, how many of its last tokens are looked at: what is remembered takes 100 bytes a token."""
COST = 0.15
"""What one row more adds to a step, in parts of a step of one row (measured with AVX512-BF16)."""
PRIOR = 0.5
"""Part of the drafts that are right, for a row of which nothing is known yet."""
LEARNED = 0.15
"""Part of what is known that one more draft replaces."""
_TOKEN_BITS = 24


class Drafts:
    """What one row might go on with, and how often that was right."""

    def __init__(self) -> None:
        self.right = PRIOR
        self._draft: list[int] = []
        self._sure = False
        self._ends: dict[int, int] = {}
        """Where each MATCHED tokens ended last."""
        self._read = 0

    def propose(self, tokens: Sequence[int], most: int, forced: Sequence[int] = ()) -> list[int]:
        """What is forced, or what came after the last tokens when they were last seen; up to `most` of it."""
        for end in range(max(self._read, MATCHED, len(tokens) - LOOKED_AT), len(tokens)):
            self._ends[_key(tokens, end)] = end
        self._read = len(tokens)
        self._sure = bool(forced)
        if forced:
            self._draft = []
            return list(forced[:most])
        start = self._ends.get(_key(tokens, len(tokens))) if len(tokens) > MATCHED else None
        draft: list[int] = []
        for place in range(start or 0, (start or 0) + most if start else 0):
            # A text that repeats itself goes on within the draft.
            draft.append(tokens[place] if place < len(tokens) else draft[place - len(tokens)])
        self._draft = draft
        return draft

    def observe(self, drawn: Sequence[int]) -> None:
        """Learn from what was drawn at the places of the last draft, whether it was computed or not."""
        for guess, token in zip(self._draft, drawn, strict=False):
            self.right += LEARNED * ((guess == token) - self.right)
            if guess != token:
                break

    def worth(self, rows: int) -> int:
        """How many tokens of a draft a step of `rows` rows gains by: the last is as likely right as what it
        adds to the step, in parts of what a token costs without drafts. What is forced must come anyway."""
        if self._sure:
            return LOOKED_AT
        if self.misses(rows):
            return 0
        return int(math.log(_least(rows)) / math.log(self.right)) if self.right < 0.999 else LOOKED_AT

    def misses(self, rows: int) -> bool:
        """Whether what is not forced is too seldom right for a step of so many rows."""
        return self.right < _least(rows)


def _least(rows: int) -> float:
    """Part of the drafts that must be right for a step of so many rows to gain by them."""
    return COST * rows / (1 + COST * (rows - 1))


def _key(tokens: Sequence[int], end: int) -> int:
    key = 0
    for token in tokens[end - MATCHED : end]:
        key = key << _TOKEN_BITS | token
    return key
