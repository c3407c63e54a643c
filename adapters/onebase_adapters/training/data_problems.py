"""What is wrong with training data: each bad line with its number, the field and the reason.

Fields, reasons and names of files are valid Unicode, whatever the data held: they go through JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """A row that cannot be used; its reader knows the line."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def valid_unicode(text: str) -> str:
    """`text` with what no encoding takes written out, as bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
