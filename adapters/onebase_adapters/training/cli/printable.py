"""Text that is not ours on its way to a terminal: rows, file names, replies, what another process said."""

from __future__ import annotations

import re

from rich.markup import escape

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: they steer the terminal
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of writing
    r"\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f"  # line separators, annotations and invisible tags
    r"\ud800-\udfff]"  # halves of surrogate pairs: bytes of a name that are no UTF-8
)


def printable(text: str) -> str:
    """`text` with U+FFFD in the place of each character that a terminal would act on or cannot show.

    Tabs and newlines stay, as do letters, spaces and emoji of any script: one may print what comes back, but
    where a line must stay a line, newlines are the caller's.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def shown(text: str) -> str:
    """As `printable`, for a console that reads rich's markup: what looks like some is printed as it is."""
    return escape(printable(text))
