"""`onebase files list | show | upload | download | rm`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from ..._sync.client import Client
from ..._terminal.ui import Column, ProgressDisplay, note, print_table, printable, size, when
from ...training_types import TrainingFile
from ..command import OK, action_parser, perform, print_json

_PURPOSES: Final = ("fine-tune", "fine-tune-results", "batch", "batch_output")
_DESCRIPTIONS: Final = {
    "list": "List the files of a server, the newest first.",
    "show": "Show one file's name, size and purpose.",
    "upload": """\
Send a file: examples to train on, or a batch's requests. If the server has a file of this content,
name and purpose, that one is given and nothing is sent.
""",
    "download": "Get what is in a file, under its name on the server unless --output says another.",
    "rm": "Delete files. One that a job or a batch still needs stays.",
}
_EXAMPLES: Final = {
    "upload": "  onebase files upload requests.jsonl --purpose batch\n",
    "download": "  onebase files download file-3f2a9c41 --output -\n",
}


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"files {action}", _DESCRIPTIONS[action], _EXAMPLES.get(action, ""))
    if action == "list":
        made.add_argument("--purpose", choices=_PURPOSES, help="only those of this purpose (default: all)")
    elif action == "upload":
        made.add_argument("file", metavar="FILE")
        made.add_argument(
            "--purpose", choices=("fine-tune", "batch"), default="fine-tune", help="(default: fine-tune)"
        )
    elif action == "rm":
        made.add_argument("file", metavar="ID", nargs="+")
    else:
        made.add_argument("file", metavar="ID")
    if action == "download":
        made.add_argument(
            "--output", metavar="FILE", help="where to write it; - prints it (default: its name)"
        )
    args = made.parse_args(argv)
    work = {"list": _list, "show": _show, "upload": _upload, "download": _download, "rm": _rm}[action]
    return perform(made, args, lambda client: work(client, args))


def _list(client: Client, args: argparse.Namespace) -> int:
    _print(client.files.list(purpose=args.purpose), args)
    return OK


def _show(client: Client, args: argparse.Namespace) -> int:
    file = client.files.get(args.file)
    if args.json:
        print_json(file)
    else:
        _print((file,), args)
    return OK


def _print(files: tuple[TrainingFile, ...], args: argparse.Namespace) -> None:
    if args.json:
        print_json(files)
    elif files:
        print_table(_COLUMNS, files)
    else:
        note("There are no files. Send one: onebase files upload FILE")


_COLUMNS: Final[tuple[Column[TrainingFile], ...]] = (
    Column("id", lambda file: file.id, style=lambda _: "dim"),
    Column("name", lambda file: file.filename, shrink=True),
    Column("size", lambda file: size(file.bytes), right=True),
    Column("purpose", lambda file: file.purpose),
    Column("created", lambda file: when(file.created_at), spare=1),
)


def _upload(client: Client, args: argparse.Namespace) -> int:
    with ProgressDisplay() as display:
        file = client.files.upload(args.file, purpose=args.purpose, progress=display)
    if args.json:
        print_json(file)
    else:
        print(f"{file.id}  {printable(file.filename)}, {size(file.bytes)}, for {file.purpose}")
    return OK


def _download(client: Client, args: argparse.Namespace) -> int:
    file = client.files.get(args.file)
    content = client.files.content(file.id)
    if args.output == "-":
        sys.stdout.buffer.write(content)
        return OK
    name = Path(file.filename.replace("\\", "/")).name or file.id
    target = Path(args.output).expanduser() if args.output else Path(name)
    if not args.output and target.exists():
        raise ValueError(f"{target} is there already: name another file with --output")
    target.write_bytes(content)
    if args.json:
        print_json(file)
    else:
        print(f"{printable(str(target))}  {size(len(content))}")
    return OK


def _rm(client: Client, args: argparse.Namespace) -> int:
    for file_id in args.file:
        client.files.delete(file_id)
        if not args.json:
            print(f"{file_id}  deleted")
    if args.json:
        print_json(tuple(args.file))
    return OK
