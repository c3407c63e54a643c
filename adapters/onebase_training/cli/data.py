"""`onebase data check`: look at training data before anything is trained on it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from onebase_engine.base.default_base import DEFAULT_BASE, BaseError, resolve_base
from onebase_engine.imports import quick_imports
from onebase_protocol.command_line import OptionParser, add_validation
from onebase_training.cli.options import UsageError, add_recipe_options, print_error, printable, recipe_from
from onebase_training.data.dataset import DataError, Dataset, check_labels
from onebase_training.recipe import Recipe

if TYPE_CHECKING:
    from onebase_training.data.report import DataReport, Example

_SOUND, _PROBLEMS, _USAGE = 0, 1, 2
_BAR = 40
_SHOWN_ROWS = 8
_SHOWN_LABELS = 40
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:bos|eos|pad|(?:start|end)_of_turn)>|\[/?[A-Z_]{3,20}\]"
)

_EPILOG = """\
Files end in .jsonl, .json, .csv, .tsv or .parquet; org/name[:split][@revision] is a data set on the
Hub. A row is a chat (messages), prompt and completion, instruction and output, or text; with
--method dpo chosen and rejected; with --method classification text and label. The formats:
docs/training-data.md.

Exit status: 0 sound, 1 problems found, 2 wrong options.
"""


def main(argv: Sequence[str]) -> int:
    """`onebase data`. Exit status: 0 sound, 1 problems found, 2 wrong options."""
    options = _parser().parse_args(list(argv))
    console = Console(stderr=True)
    try:
        return _check(options, console)
    except UsageError as error:
        print_error(console, str(error))
        return _USAGE


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="onebase data", description="Look at training data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ACTION")
    check = commands.add_parser(
        "check",
        help="find every bad line, count tokens, show what would be learned",
        description="Read training data as a training run would: name every bad line, count the tokens,\n"
        "find duplicates and leakage, and show three rows with what is learned of them.",
        epilog=_EPILOG,
    )
    check.add_argument("data", metavar="FILE", help="examples: a file, or a data set on the Hub")
    add_validation(check, "held-out examples to compare with (default: none)")
    check.add_argument(
        "--base",
        default=DEFAULT_BASE,
        help="whose tokenizer and chat template to use: the default's name, org/repo[@revision] on the Hub, "
        f"or a folder (default: {DEFAULT_BASE})",
    )
    check.add_argument("--json", action="store_true", help="print the report, or the problems, as JSON")
    add_recipe_options(check, ("method", "data"), leave_out=("beta", "packing", "eval_split"))
    return parser


def _check(options: argparse.Namespace, console: Console) -> int:
    recipe = recipe_from(options)
    from onebase_training.data.report import report

    sources = [("train", options.data), *([("eval", options.validation)] if options.validation else [])]
    loaded: list[Dataset] = []
    problems: list[dict[str, Any]] = []
    with _bar(console) as bar:
        tokenizer = _tokenizer(options.base, bar)
        for part, source in sources:
            _load(part, source, tokenizer, recipe, bar, loaded, problems)
    if problems:
        _print_problems(problems, options.json, console)
        return _PROBLEMS
    evaluation = loaded[1] if len(loaded) > 1 else None
    if recipe.method == "classification":
        try:
            check_labels(loaded[0], evaluation)
        except DataError as error:
            source = (
                options.data
                if evaluation is None or error.source != evaluation.source
                else options.validation
            )
            _print_problems(_problems(source, error), options.json, console)
            return _PROBLEMS
    made = report(loaded[0], evaluation, tokenizer)
    if options.json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        render(made, Console())
    return _SOUND


def _load(
    part: str,
    source: str,
    tokenizer: Any,
    recipe: Recipe,
    bar: Progress,
    loaded: list[Dataset],
    problems: list[dict[str, Any]],
) -> None:
    """Add the source's rows to `loaded`, or its problems to `problems`."""
    from onebase_training.data.reader import load_dataset

    task = bar.add_task(f"reading {escape(printable(Path(source).name))}", total=1.0)
    try:
        loaded.append(
            load_dataset(
                source,
                tokenizer,
                recipe,
                part=part,
                on_progress=lambda done: bar.update(task, completed=done),
            )
        )
    except DataError as error:
        problems += _problems(source, error)


def _problems(source: str, error: DataError) -> list[dict[str, Any]]:
    return [
        {"file": source, "line": problem.line, "field": problem.field, "reason": problem.reason}
        for problem in error.problems
    ]


def _tokenizer(base: str, bar: Progress) -> Any:
    """Return the base's tokenizer. Raises UsageError."""
    task = bar.add_task("looking for the base", total=1.0)
    try:
        folder = resolve_base(
            base, lambda what, part: bar.update(task, description=escape(printable(what)), completed=part)
        ).folder
    except BaseError as error:
        raise UsageError(f"--base: {error}") from error
    bar.update(task, description="loading the tokenizer", completed=0.5)
    with quick_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--base: {folder} has no tokenizer that can be read: {error}") from error
    bar.remove_task(task)
    return tokenizer


def _print_problems(problems: Sequence[dict[str, Any]], as_json: bool, console: Console) -> None:
    """Print each problem on a line of its own, as `file:line: field: reason`, so that editors find the
    place."""
    if as_json:
        print(json.dumps({"problems": problems}, indent=2))
        return
    out = Console(soft_wrap=True, highlight=False)
    for problem in problems:
        line = f":{problem['line']}" if problem["line"] else ""
        text = Text().append(f"{_on_one_line(problem['file'])}{line}", "cyan").append(": ")
        if problem["field"]:
            text.append(_on_one_line(problem["field"]), "bold").append(": ")
        out.print(text.append(_on_one_line(problem["reason"])))
    word = "problem" if len(problems) == 1 else "problems"
    sys.stdout.flush()
    console.print(f"[bold red]{len(problems):,} {word}[/]: correct them before you train")


def _on_one_line(text: str) -> str:
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def render(report: DataReport, console: Console) -> None:
    """Print the report: a table, the lengths, the warnings and the examples.

    A pipe gets whole lines, their columns separated by tabs, and no bars.
    """
    both = [report, *([report.evaluation] if report.evaluation else [])]
    _print_table(both, console)
    for each, title in zip(both, ("Lengths, in tokens", "Lengths of the evaluation data"), strict=False):
        if len(each.histogram) > 1:
            console.print(Text(f"\n{title}", "bold"))
            _print_bars([(_range(low, high, console), count) for low, high, count in each.histogram], console)
    for each, title in zip(both, ("Labels", "Labels of the evaluation data"), strict=False):
        if each.labels:
            console.print(Text(f"\n{title}", "bold"))
            _print_labels(each, console)
    for each in both:
        for line in _warnings(each):
            console.print(Text(f"! {line}", "yellow"), soft_wrap=not console.is_terminal)
    _print_examples(report, console)


def _print_table(reports: Sequence[DataReport], console: Console) -> None:
    titles = ("train", "evaluation")[: len(reports)]
    if not console.is_terminal:
        _print_line(console, "", *titles)
        _print_line(console, "source", *(_on_one_line(each.source) for each in reports))
        for name, cells in _facts(reports).items():
            _print_line(console, name, *cells)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for each, title in zip(reports, titles, strict=True):
        table.add_column(Text(f"{title}\n{printable(each.source)}"), justify="right", overflow="fold")
    for name, cells in _facts(reports).items():
        table.add_row(Text(name, "dim"), *(Text(cell) for cell in cells))
    console.print(table)


def _print_line(console: Console, *cells: str) -> None:
    """Print a line for a pipe; rich would expand the tabs."""
    print(*cells, sep="\t", file=console.file)


def _facts(reports: Sequence[DataReport]) -> dict[str, list[str]]:
    """Return the table's rows by name, each with a cell for each of the reports."""
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
    if reports[0].labels:
        rows["learned"] = [f"one of {len(each.labels):,} labels a row" for each in reports]
    return rows


def _share(report: DataReport) -> str:
    return f"{report.supervised / max(1, report.tokens):.0%}"


def _count(lines: Sequence[object]) -> str:
    return f"{len(lines):,}" if lines else "none"


def _range(low: int, high: int, console: Console) -> str:
    dash = "–" if _unicode(console) else "-"
    return f"{low:,}{dash}{high:,}" if high > low else f"{low:,}"


def _print_labels(report: DataReport, console: Console) -> None:
    bars = [(_on_one_line(label), rows) for label, rows in report.labels.items()]
    _print_bars(bars[:_SHOWN_LABELS], console)
    if len(bars) > _SHOWN_LABELS:
        rest = sum(rows for _, rows in bars[_SHOWN_LABELS:])
        console.print(Text(f"and {len(bars) - _SHOWN_LABELS:,} more labels of {rest:,} rows", "dim"))


def _print_bars(bars: Sequence[tuple[str, int]], console: Console) -> None:
    """Print names with their counts; with bars at a terminal."""
    most = max(count for _, count in bars)
    block = "█" if _unicode(console) else "#"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, count in bars:
        length = round(_BAR * count / most) or (1 if count else 0)
        if not console.is_terminal:
            _print_line(console, label, f"{count:,}")
            continue
        table.add_row(
            Text(label, "dim"), Text(block * length, "cyan").append(f" {count:,}" if count else "", "default")
        )
    if console.is_terminal:
        console.print(table)


def _warnings(report: DataReport) -> Iterable[str]:
    source, word = printable(report.source), report.named_by

    def named(rows: Sequence[int]) -> str:
        shown = ", ".join(f"{row}" for row in rows[:_SHOWN_ROWS])
        return f"{word if len(rows) == 1 else f'{word}s'} {shown}{_more(rows)}"

    if report.leakage:
        yield f"{source}: also in the evaluation data, which then proves nothing: {named(report.leakage)}"
    if report.same_prompt:
        yield f"{source}: the same prompt is in the evaluation data: {named(report.same_prompt)}"
    if report.duplicates:
        pairs = [f"{word} {row} repeats {first}" for row, first in report.duplicates[:_SHOWN_ROWS]]
        yield f"{source}: duplicates: {', '.join(pairs)}{_more(report.duplicates)}"
    if report.truncated:
        yield f"{source}: truncated: {named(report.truncated)}"
    if report.dropped:
        yield f"{source}: dropped as too long: {named(report.dropped)}"
    if report.uneven:
        counts = list(report.labels.items())
        (most, many), (least, few) = counts[0], counts[-1]
        yield (
            f"{source}: the labels are uneven: {many:,} rows of {printable(most)!r}, {few:,} of "
            f"{printable(least)!r}. Look at F1, which counts all labels alike"
        )
    if report.not_held_out:
        labels = [repr(printable(one)) for one in report.not_held_out[:_SHOWN_ROWS]]
        yield f"{source}: no row of the evaluation data has {', '.join(labels)}{_more(report.not_held_out)}"


def _more(rows: Sequence[object]) -> str:
    more = len(rows) - _SHOWN_ROWS
    return f" and {more:,} more" if more > 0 else ""


def _print_examples(report: DataReport, console: Console) -> None:
    unicode = _unicode(console)
    marks = ("«", "»") if unicode else (">>", "<<")
    learned = "the label is read here" if report.labels else "learned"
    key = Text("\nAs the model sees it: ").append(f"{marks[0]}{learned}{marks[1]}", "bold green")
    console.print(key.append(", ").append("only read", "dim"))
    for example in report.examples:
        side = f", {printable(example.side or example.label)}" if example.side or example.label else ""
        number = example.row if report.named_by == "row" else example.line
        title = Text(f"{report.named_by} {number}{side}", "bold")
        text = _example(example, marks, unicode)
        if console.is_terminal:
            console.print(Rule(title, align="left", style="dim", characters="─" if unicode else "-"))
            console.print(Padding(text, (0, 0, 0, 2)), soft_wrap=False)
            continue
        console.print(title)
        for line in text.plain.splitlines():
            _print_line(console, f"  {line}")


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
