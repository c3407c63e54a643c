"""`onebase audit`: who changed what on a server, and when."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import asdict

from onebase_protocol.access import audit_chain

from .._sync.client import Client
from .._terminal.ui import Column, note, print_table, show
from ..types import AuditEntry
from .command import FAILED, OK, count, moment, parser, perform, print_json

_POLL_SECONDS: Final = 2.0
_DESCRIPTION: Final = """\
List who changed what, the newest first: adapters sent, activated, rolled back and deleted,
files, jobs, batches, API keys and quotas. With --follow the oldest first, and then new ones until
Ctrl-C.
"""
_EXAMPLES: Final = """\
  onebase audit --target acme-support
  onebase audit --action job --since 2026-11-01
  onebase audit --all --json > audit.json
  onebase audit --follow --json >> audit.jsonl
  onebase audit verify audit.json
"""
_VERIFY: Final = """\
Check that the entries of the audit log are as they were written, with none added or removed: each
holds a SHA-256 sum over itself and the entry before it. With a file, as `onebase audit --all
--json` prints it, no server is asked. All tenants' entries are needed, so the key must be an
admin's.

Prints the sum of the last entry. Keep it elsewhere: who owns the database can compute all sums
again. With --last it is checked that the log still has that one, so that nothing up to it was
changed and not even the end was cut off. Where the oldest entries were removed on purpose, --first
is the sum of the last one of them.
"""
_FIELDS: Final = tuple(name for name in AuditEntry.__struct_fields__ if name != "object")


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    if argv[:1] == ["verify"]:
        return _verify(argv[1:])
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    made.add_argument(
        "--tenant", metavar="NAME", help="of one tenant, for admins (default: all that you may see)"
    )
    made.add_argument(
        "--action",
        metavar="ACTION",
        help="such as adapter.activated, or a kind: adapter, file, job, batch, key, tenant (default: all)",
    )
    made.add_argument("--target", metavar="NAME", help="an adapter's name, or an id (default: all)")
    made.add_argument(
        "--since", type=moment, metavar="TIME", help="as in 90m, 12h, 7d, or 2026-11-01 (default: all)"
    )
    many = made.add_mutually_exclusive_group()
    many.add_argument("--limit", type=count, default=50, metavar="N", help="the newest N (default: 50)")
    many.add_argument("--all", action="store_true", help="all of them")
    many.add_argument("--follow", action="store_true", help="print new entries as they come")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON; with --follow, a line an entry")
    form.add_argument("--csv", action="store_true", help="print CSV")
    args = made.parse_args(argv)
    return perform(made, args, lambda client: (_follow if args.follow else _list)(client, args))


def _verify(argv: list[str]) -> int:
    made = parser("audit verify", _VERIFY)
    made.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="an exported log (default: the server's)"
    )
    made.add_argument(
        "--first",
        metavar="SUM",
        default="",
        help="the sum of the last removed entry (default: none was)",
    )
    made.add_argument("--last", metavar="SUM", help="the sum that an earlier check printed")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    args = made.parse_args(argv)

    def check(entries: Sequence[AuditEntry]) -> int:
        ordered = sorted(entries, key=lambda entry: _number(entry.id))
        error, last = _broken(ordered, args.first, args.last)
        if args.json:
            print_json({"entries": len(entries), "last": last, "error": error})
        elif error is None:
            show(f"{len(entries)} entries are as they were written. The last one's sum: {last}\n")
        if error is not None:
            note(f"onebase: {error}")
        return OK if error is None else FAILED

    def check_server(client: Client) -> int:
        if "admin" not in client.keys.own().scopes:
            note("onebase: the whole log is for keys with the scope admin; this key sees a part of it")
            return FAILED
        return check(client.audit(oldest_first=True, limit=None))

    if args.file is None:
        return perform(made, args, check_server)
    try:
        return check(_exported(args.file))
    except (OSError, ValueError) as error:
        made.error(f"{args.file}: {error}")


def _exported(file: Path) -> Sequence[AuditEntry]:
    """Return the entries of a JSON list, or of a file with one in each line. Raises OSError, ValueError."""
    content = file.read_bytes()
    if content.lstrip().startswith(b"["):
        return msgspec.json.decode(content, type=tuple[AuditEntry, ...])
    return msgspec.json.Decoder(AuditEntry).decode_lines(content)


def _number(entry: str) -> int:
    return int(entry.rpartition("-")[2])


def _broken(entries: Sequence[AuditEntry], first: str, known: str | None) -> tuple[str | None, str]:
    """Return what is wrong with the chain of entries, oldest first, if anything is, and the last sum.

    first: the sum of the entry before them.
    """
    before, number, seen = first, 0, known is None or known == first
    for entry in entries:
        found = {name: getattr(entry, name) for name in _CHAINED}
        if audit_chain(before, **found) != entry.chain:
            error = f"{entry.id} is not what was written after the entry before it"
            is_next = _number(entry.id) == number + 1
            return error + ("" if is_next else ", or entries are missing from this list"), before
        before, number = entry.chain, _number(entry.id)
        seen = seen or before == known
    return (None if seen else f"no entry has the sum {known}: the end of the log is missing"), before


_CHAINED: Final = tuple(name for name in inspect.signature(audit_chain).parameters if name != "before")


def _list(client: Client, args: argparse.Namespace) -> int:
    found = _asked(client, args, limit=None if args.all else args.limit)
    if args.json:
        print_json(found)
    elif args.csv:
        _print_csv(found, header=True)
    else:
        print_table(_COLUMNS, found)
    return OK


def _asked(
    client: Client,
    args: argparse.Namespace,
    *,
    limit: int | None,
    after: str | None = None,
    oldest_first: bool = False,
) -> tuple[AuditEntry, ...]:
    return client.audit(
        tenant=args.tenant,
        action=args.action,
        target=args.target,
        since=args.since,
        after=after,
        oldest_first=oldest_first,
        limit=limit,
    )


def _follow(client: Client, args: argparse.Namespace) -> int:
    after = None
    if args.csv:
        _print_csv((), header=True)
    while True:
        for entry in _asked(client, args, limit=None, after=after, oldest_first=True):
            after = entry.id
            if args.json:
                print_json(entry)
            elif args.csv:
                _print_csv((entry,), header=False)
            else:
                show("  ".join(filter(None, _words(entry))) + "\n")
        sys.stdout.flush()
        time.sleep(_POLL_SECONDS)


def _print_csv(entries: Sequence[AuditEntry], *, header: bool) -> None:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    if header:
        rows.writerow(_FIELDS)
    for entry in entries:
        values = {**asdict(entry), "details": json.dumps(entry.details, ensure_ascii=False)}
        rows.writerow([values[name] for name in _FIELDS])


def _who(entry: AuditEntry) -> str:
    """Return the key and what acted for it."""
    return ", ".join(part for part in (entry.key, entry.actor) if part) or "local"


def _time(entry: AuditEntry) -> str:
    return datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S")


def _words(entry: AuditEntry) -> tuple[str, ...]:
    return _time(entry), entry.tenant, entry.action, entry.target, _short(entry), f"by {_who(entry)}"


def _short(entry: AuditEntry) -> str:
    return (entry.version or "")[:12]


_COLUMNS: Final[Sequence[Column[AuditEntry]]] = (
    Column("when", _time),
    Column("tenant", lambda entry: entry.tenant, spare=1),
    Column("action", lambda entry: entry.action, style=lambda _: "bold"),
    Column("target", lambda entry: entry.target, shrink=True),
    Column("version", _short, spare=2),
    Column("by", _who, shrink=True),
)
