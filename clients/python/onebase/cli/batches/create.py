"""`onebase batches create`: send requests and begin a batch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, console, note
from ...batch_types import Batch
from ..command import FAILED, INTERRUPTED, OK, action_parser, perform, print_json
from ..jobs.create import parse_labels
from .show import print_batch, short

_DESCRIPTION: Final = """\
Send a file of requests (.jsonl) and have each answered when the server has room. Each line is
{"custom_id": "...", "method": "POST", "url": ENDPOINT, "body": {...}}; the body's `model` may be
another adapter in each line. With --wait, the command stays and shows how far the batch is.
"""
_EXAMPLES: Final = """\
  onebase batches create requests.jsonl --wait
  onebase batches create prompts.jsonl --endpoint /v1/completions --window 3d
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = action_parser(f"batches {action}", _DESCRIPTION, _EXAMPLES)
    made.add_argument("file", metavar="FILE", help="requests, or the id of an uploaded file (file-...)")
    made.add_argument(
        "--endpoint",
        default="/v1/chat/completions",
        metavar="PATH",
        help="the route that answers the rows (default: /v1/chat/completions)",
    )
    made.add_argument(
        "--window",
        default="24h",
        metavar="TIME",
        help="rows without an answer by then are given up: 1h to 30d (default: 24h)",
    )
    made.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a label of the batch; may be repeated",
    )
    made.add_argument("--wait", action="store_true", help="stay until the batch ends, and show it meanwhile")
    args = made.parse_args(argv)
    try:
        args.labels = parse_labels(args.metadata)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _create(client, args))


def _create(client: Client, args: argparse.Namespace) -> int:
    with ProgressDisplay() as display:
        batch = client.batches.create(
            args.file,
            endpoint=args.endpoint,
            completion_window=args.window,
            metadata=args.labels,
            progress=display,
        )
    if args.wait:
        return _wait(client, batch, args.json)
    if args.json:
        print_json(batch)
        return OK
    print(f"{batch.id}: {Path(args.file).name} is being checked.")
    note(f"See how far it is: onebase batches show {short(batch.id)}")
    return OK


def _wait(client: Client, batch: Batch, as_json: bool) -> int:
    try:
        ended = client.batches.wait(batch.id)
    except KeyboardInterrupt:
        note(f"\nThe batch continues. To see it: onebase batches show {short(batch.id)}")
        note(f"To end it: onebase batches cancel {short(batch.id)}")
        return INTERRUPTED
    if as_json:
        print_json(ended)
    else:
        print_batch(console(), ended)
    return OK if ended.status == "completed" else FAILED
