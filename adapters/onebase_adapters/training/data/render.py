"""A report on training data as a terminal shows it, with colours or without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from onebase_adapters.training.cli.printable import printable

if TYPE_CHECKING:
    from onebase_adapters.training.data.report import DataReport, Example


_BAR = 40
_SHOWN_ROWS = 8
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:bos|eos|pad|(?:start|end)_of_turn)>|\[/?[A-Z_]{3,20}\]"
)


def render(report: DataReport, console: Console) -> None:
    """Print the report: a table, the lengths, what is odd, and the examples."""
    both = [report, *([report.evaluation] if report.evaluation else [])]
    console.print(_table(both))
    for each, title in zip(both, ("Lengths, in tokens", "Lengths of the evaluation data"), strict=False):
        if len(each.histogram) > 1:
            console.print(Text(f"\n{title}", "bold"))
            console.print(_histogram(each, _unicode(console)))
    for each in both:
        for line in _warnings(each):
            console.print(Text(f"! {line}", "yellow"))
    _print_examples(report, console)


def _table(reports: Sequence[DataReport]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for each, title in zip(reports, ("train", "evaluation"), strict=False):
        table.add_column(Text(f"{title}\n{printable(each.source)}"), justify="right", overflow="fold")
    rows = {
        "rows": [f"{each.rows:,}" for each in reports],
        "samples": [f"{each.samples:,}" for each in reports],
        "tokens": [f"{each.tokens:,}" for each in reports],
        "learned": [f"{each.supervised:,} ({_share(each)})" for each in reports],
        "median length": [f"{each.median:,}" for each in reports],
        "longest": [f"{each.longest:,}" for each in reports],
        "truncated": [_count(each.truncated) for each in reports],
        "dropped": [_count(each.dropped) for each in reports],
        "duplicates": [_count(each.duplicates) for each in reports],
    }
    if len(reports) > 1:
        rows["also in evaluation"] = [_count(reports[0].leakage), ""]
        rows["same prompt there"] = [_count(reports[0].same_prompt), ""]
    if all(each.samples == each.rows for each in reports):
        del rows["samples"]
    for name, cells in rows.items():
        table.add_row(Text(name, "dim"), *(Text(cell) for cell in cells))
    return table


def _share(report: DataReport) -> str:
    return f"{report.supervised / max(1, report.tokens):.0%}"


def _count(lines: Sequence[object]) -> str:
    return f"{len(lines):,}" if lines else "none"


def _histogram(report: DataReport, unicode: bool) -> Table:
    most = max(count for _, _, count in report.histogram)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    dash, block = ("–", "█") if unicode else ("-", "#")
    for low, high, count in report.histogram:
        length = round(_BAR * count / most) or (1 if count else 0)
        label = f"{low:,}{dash}{high:,}" if high > low else f"{low:,}"
        table.add_row(label, Text(block * length, "cyan").append(f" {count:,}" if count else "", "default"))
    return table


def _warnings(report: DataReport) -> Iterable[str]:
    source, word = printable(report.source), report.named_by

    def named(rows: Sequence[int]) -> str:
        shown = ", ".join(f"{row}" for row in rows[:_SHOWN_ROWS])
        return f"{word if len(rows) == 1 else f'{word}s'} {shown}{_more(rows)}"

    if report.leakage:
        yield f"{source}: also in the evaluation data, which proves nothing then: {named(report.leakage)}"
    if report.same_prompt:
        yield f"{source}: the same prompt is in the evaluation data: {named(report.same_prompt)}"
    if report.duplicates:
        pairs = [f"{word} {row} repeats {first}" for row, first in report.duplicates[:_SHOWN_ROWS]]
        yield f"{source}: duplicates: {', '.join(pairs)}{_more(report.duplicates)}"
    if report.truncated:
        yield f"{source}: truncated: {named(report.truncated)}"
    if report.dropped:
        yield f"{source}: dropped as too long: {named(report.dropped)}"


def _more(rows: Sequence[object]) -> str:
    more = len(rows) - _SHOWN_ROWS
    return f" and {more:,} more" if more > 0 else ""


def _print_examples(report: DataReport, console: Console) -> None:
    unicode = _unicode(console)
    marks = ("«", "»") if unicode else (">>", "<<")
    key = Text("\nAs the model sees it: ").append(f"{marks[0]}learned{marks[1]}", "bold green")
    console.print(key.append(", ").append("only read", "dim"))
    for example in report.examples:
        side = f", {example.side}" if example.side else ""
        number = example.row if report.named_by == "row" else example.line
        title = Text(f"{report.named_by} {number}{side}", "bold")
        console.print(Rule(title, align="left", style="dim", characters="─" if unicode else "-"))
        console.print(Padding(_example(example, marks, unicode), (0, 0, 0, 2)), soft_wrap=False)


def _example(example: Example, marks: tuple[str, str], unicode: bool) -> Text:
    made = Text()
    for text, learned in example.segments:
        begin = len(made)
        shown = printable(text).replace("\n", "↵\n" if unicode else "\n")
        made.append(f"{marks[0]}{shown}{marks[1]}" if learned else shown, "bold green" if learned else "dim")
        for token in _CONTROL_TOKEN.finditer(made.plain, begin):
            made.stylize("underline" if learned else "not dim cyan", *token.span())
    made.rstrip()
    return made


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
