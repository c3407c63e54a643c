"""`onebase version`: the version of this command and of the server."""

from __future__ import annotations

import json

from .._version import sdk_version
from ..errors import OneBaseError
from . import options
from .exits import OK, report

_DESCRIPTION = "Show the version of this command and of the server."


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = options.parser("version", _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print both as JSON")
    args = parser.parse_args(argv)
    try:
        client = options.client(args)
    except ValueError as error:
        parser.error(str(error))
    if not args.json:
        print(f"client {sdk_version()}", flush=True)
    with client:
        try:
            server = client.with_options(max_retries=0).version()
        except OneBaseError as error:
            return report(error, client.url)
    if args.json:
        print(json.dumps({"client": sdk_version(), "server": server.version, "url": client.url}))
    else:
        print(f"server {server.version} at {client.url}")
    return OK
