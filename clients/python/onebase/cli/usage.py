"""`onebase usage`: what tenants used, by day, tenant, base and adapter."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Final

from .._sync.client import Client
from .._terminal.ui import Column, duration, note, print_table
from ..types import TenantUsage
from .command import OK, count, dollars, money, parser, perform, price, print_json

_DESCRIPTION: Final = """\
Show requests, tokens and training by day and adapter. A key with the scope admin sees all tenants,
others see their own. Days are UTC. The base itself is the adapter "-".
"""
_EXAMPLES: Final = """\
  onebase usage --days 7
  onebase usage --by tenant --csv > bill.csv
  onebase usage --by tenant --price 0.10/0.40
"""
_COLUMNS: Final = ("day", "tenant", "base", "adapter")


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    made.add_argument(
        "--days",
        type=count,
        default=30,
        metavar="N",
        help="today and the days before it, N in all (default: 30)",
    )
    made.add_argument(
        "--by",
        default="day,tenant,adapter",
        metavar="COLUMN,...",
        help=f"what is told apart: {', '.join(_COLUMNS)} (default: day,tenant,adapter)",
    )
    made.add_argument("--tenant", metavar="NAME", help="only this one (default: all that the key may see)")
    made.add_argument(
        "--price",
        metavar="IN/OUT",
        type=price,
        help="dollars for a million tokens of prompts and of answers: adds what was used in dollars "
        "(default: tokens alone)",
    )
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON")
    form.add_argument("--csv", action="store_true", help="print it as CSV, for a spreadsheet")
    args = made.parse_args(argv)
    if args.price and (args.json or args.csv):
        made.error("--price: --json and --csv have tokens alone, for prices of your own")
    by = tuple(name.strip() for name in args.by.split(","))
    today = datetime.now(UTC).date()
    start = today - timedelta(days=args.days - 1)

    def work(client: Client) -> int:
        if args.csv:
            sys.stdout.write(client.usage_csv(start=start, end=today, group_by=by, tenant=args.tenant))
            return OK
        rows = client.usage(start=start, end=today, group_by=by, tenant=args.tenant)
        if args.json:
            print_json(rows)
        elif rows:
            columns = [column for column in COLUMNS if column.title in by or column.title not in _COLUMNS]
            if args.price:
                columns.append(Column("price", lambda row: money(_cost(args.price, row)), right=True))
            print_table(columns, rows)
            if args.price:
                note(f"Together {money(sum(_cost(args.price, row) for row in rows))}")
        else:
            note("Nothing was used in these days.")
        return OK

    return perform(made, args, work)


def _cost(price: tuple[float, float], row: TenantUsage) -> float:
    return dollars(price, row.prompt_tokens, row.completion_tokens)


def _trained(row: TenantUsage) -> str:
    return duration(row.training_seconds) if row.training_seconds else ""


COLUMNS: Final[tuple[Column[TenantUsage], ...]] = (
    Column("day", lambda row: row.day or ""),
    Column("tenant", lambda row: row.tenant or "", shrink=True),
    Column("base", lambda row: row.base or "", shrink=True),
    Column("adapter", lambda row: row.adapter or "-", shrink=True),
    Column("requests", lambda row: f"{row.requests:,}", right=True),
    Column("prompt", lambda row: f"{row.prompt_tokens:,}", right=True),
    Column("cached", lambda row: f"{row.cached_tokens:,}", right=True),
    Column("completion", lambda row: f"{row.completion_tokens:,}", right=True),
    Column("trained", _trained, right=True),
)
