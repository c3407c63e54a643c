"""`onebase version`: the version of this command and of the server."""

from __future__ import annotations

from .._version import sdk_version
from ..errors import OneBaseError
from . import options
from .exits import OK, report

_DESCRIPTION = "Show the version of this command and of the server."


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    parser = options.parser("version", _DESCRIPTION)
    args = parser.parse_args(argv)
    try:
        client = options.client(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"client {sdk_version()}", flush=True)
    with client:
        try:
            server = client.with_options(max_retries=0).version()
        except OneBaseError as error:
            return report(error, client.url)
    print(f"server {server.version} at {client.url}")
    return OK
