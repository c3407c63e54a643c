"""`onebase batches list | show | results | cancel`: look at batches, get their answers, end them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..._sync.client import Client
from ..._terminal.batches import doing, figures
from ..._terminal.ui import Column, console, line, note, print_table, when
from ...batch_types import Batch
from ..command import OK, action_parser, count, perform, plain, print_json, short_id, whole_id

if TYPE_CHECKING:
    from rich.console import Console

PREFIX: Final = "batch_"
_DESCRIPTIONS: Final = {
    "list": "List the batches of a server, the newest first.",
    "show": "Show one batch: how far it is, how it ended, and the lines of its file that are wrong.",
    "results": """\
Print what a batch that has ended has answered, then the rows that failed: one JSON object a line,
with custom_id, the HTTP status and the body that a live request would have got.
""",
    "cancel": "End a batch. What is answered stays, in its results.",
}
_EXAMPLES: Final = {
    "show": "  onebase batches show batch_3f2a9c41\n",
    "results": "  onebase batches results batch_3f2a9c41 --output answers.jsonl\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"batches {action}", _DESCRIPTIONS[action], _EXAMPLES.get(action, ""))
    if action == "list":
        made.add_argument("--limit", type=count, default=50, metavar="N", help="the newest N (default: 50)")
    else:
        made.add_argument("batch", metavar="ID")
    if action == "results":
        made.add_argument("--output", metavar="FILE", help="write them here (default: print them)")
    args = made.parse_args(argv)
    work = {"list": _list, "show": _show, "results": _results, "cancel": _cancel}[action]
    return perform(made, args, lambda client: work(client, args))


def find(client: Client, wanted: str) -> Batch:
    """Return the batch of an id, or of the first digits of one.

    Raises:
        NotFoundError: there is no such batch.
        ValueError: there are several, or too few digits.
    """
    known = whole_id(wanted, PREFIX, "batches", lambda: (batch.id for batch in client.batches.list()))
    return client.batches.retrieve(known)


def short(batch_id: str) -> str:
    """Return the part of an id that is shown."""
    return short_id(batch_id, PREFIX)


def _list(client: Client, args: argparse.Namespace) -> int:
    found = client.batches.list(limit=args.limit)
    if args.json:
        print_json(found)
    elif found:
        print_table(_COLUMNS, found)
    else:
        note("There are no batches. Begin one: onebase batches create requests.jsonl")
    return OK


def _colour(batch: Batch) -> str:
    return {"completed": "green", "failed": "red", "in_progress": "cyan"}.get(batch.status, "")


_COLUMNS: Final[tuple[Column[Batch], ...]] = (
    Column("id", lambda batch: short(batch.id), style=lambda _: "dim"),
    Column("status", lambda batch: batch.status, style=_colour),
    Column("rows", lambda batch: f"{batch.total:,}", right=True),
    Column("answered", lambda batch: f"{batch.completed:,}", right=True),
    Column("failed", lambda batch: f"{batch.failed:,}", right=True),
    Column("endpoint", lambda batch: batch.endpoint, spare=1, shrink=True),
    Column("created", lambda batch: when(batch.created_at), spare=2),
)


def _show(client: Client, args: argparse.Namespace) -> int:
    batch = find(client, args.batch)
    if args.json:
        print_json(batch)
    else:
        print_batch(console(), batch)
    return OK


def print_batch(out: Console, batch: Batch) -> None:
    """Print the batch, and what is wrong with it."""
    out.print(line(batch.id, "bold") + line("  ") + line(doing(batch), _colour(batch)), soft_wrap=True)
    texts = [f"{batch.endpoint}, from {batch.input_file_id}, created {when(batch.created_at)}"]
    if batch.total:
        used = f"{batch.input_tokens:,} tokens read, {batch.output_tokens:,} generated"
        texts.append(f"{figures(batch)}; {used}")
    elif batch.waiting:
        texts.append(f"waiting: {batch.waiting}")
    for text in texts:
        out.print(line(f"  {text}", "dim"), soft_wrap=True)
    for error in batch.errors:
        place = f"line {error.line}: " if error.line is not None else ""
        out.print(line(f"  {place}{error.message}", "red"), soft_wrap=True)
    if batch.ended and batch.done:
        note(f"Its answers: onebase batches results {short(batch.id)}")


def _results(client: Client, args: argparse.Namespace) -> int:
    batch = find(client, args.batch)
    if not batch.ended:
        raise ValueError(f"{short(batch.id)} is {batch.status}: it has results once it has ended")
    rows = client.batches.results(batch)
    if args.json:
        print_json(rows)
        return OK
    texts = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    if args.output is None:
        sys.stdout.write(texts)
        return OK
    Path(args.output).expanduser().write_text(texts, encoding="utf-8")
    note(f"{len(rows):,} rows in {args.output}")
    return OK


def _cancel(client: Client, args: argparse.Namespace) -> int:
    batch = client.batches.cancel(find(client, args.batch).id)
    if args.json:
        print_json(batch)
    else:
        print(f"{short(batch.id)}  {batch.status}")
    return OK
