"""Options of `onebase route` and `onebase cluster`."""

from __future__ import annotations

import argparse
import re
from urllib.parse import urlsplit

from onebase_edge.options import add_all_settings, add_settings, checked
from onebase_edge.settings import SettingsError
from onebase_engine.redaction import redacted
from onebase_protocol.command_line import OptionParser

_ROUTE = """\
One address for several servers of one base: each request goes where its adapter is, or belongs.

The servers share a registry (PostgreSQL) and a store (S3, or a folder that all of them see). They
check the keys of requests themselves: on another --host than loopback, only servers are used that
need keys, unless --insecure.
"""
ROUTE_SETTINGS = (
    "host", "insecure", "port", "log_level", "log_format", "access_log", "drain_timeout", "allowed_host",
    "allowed_origin", "trusted_proxy", "max_connections", "max_connections_per_host", "max_header",
    "max_header_lines", "header_timeout", "body_timeout", "min_body_rate", "keep_alive_timeout",
    "write_timeout", "max_body",
)  # fmt: skip
_CLUSTER = """\
Several servers of one base on Ray Serve, behind one address: started, watched, replaced, scaled.

Without --address, `up` starts Ray on this machine and serves until Ctrl-C; with it, the servers run
on a cluster that `ray start` has made. Servers on several machines share a registry (PostgreSQL)
and a store (S3, or a folder that all of them see).
"""
_UP = """\
Start the servers, or change those that run. Options of `onebase serve` go to each of them; --host,
--port and what is about connections to the address that they have together.
"""
REPLICA_KEY = "ONEBASE_REPLICA_KEY"


def route_parser() -> argparse.ArgumentParser:
    """Return the parser of `onebase route`: its own options, and those of `onebase serve` about
    connections."""
    parser = OptionParser(
        prog="onebase route", repeated=True, usage="onebase route --replica URL [options]", description=_ROUTE
    )
    parser.add_argument(
        "--replica",
        action="append",
        type=checked(replica_url),
        metavar="URL",
        help="a server of the base, as in http://10.0.0.7:8000; once for each",
    )
    parser.add_argument(
        "--replicas",
        metavar="FILE",
        help="a file with such addresses, one a line, that is read again when it changes: servers come and "
        "go without a restart",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        help="how long a request waits for a server where none answers (default: 15 within a minute after "
        "one was ready, as while it is replaced, and else 0)",
    )
    parser.add_argument(
        "--resume",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a stream whose server has gone waits for one that resumes it (default: 60)",
    )
    parser.add_argument(
        "--take-over",
        type=_positive_id,
        metavar="PID",
        help="begin at the address of another route of this user, the process with this id, and stop it once "
        "this one serves: no connection is refused or broken (default: none)",
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"a file with an admin key of the servers (or {REPLICA_KEY} in the environment), which reads "
        "their metrics, and the secret without which no stream continues at another server",
    )
    add_settings(parser, *ROUTE_SETTINGS)
    return parser


def cluster_parser() -> argparse.ArgumentParser:
    """Return the parser of `onebase cluster`."""
    parser = OptionParser(prog="onebase cluster", description=_CLUSTER)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="start the servers, or change those that run", description=_UP)
    actions.add_parser("status", help="the address, and the servers behind it")
    scale = actions.add_parser("scale", help="have another number of servers")
    scale.add_argument("replicas", type=_positive, metavar="N", help="servers")
    actions.add_parser(
        "restart",
        help="replace the servers, a few at a time, and then the route: each starts the release that is "
        "installed now",
    )
    actions.add_parser("drain", help="take nothing new, let running requests end, then end the servers")
    actions.add_parser("down", help="end the servers now, and what runs on them")
    own = up.add_argument_group("cluster")
    own.add_argument("--replicas", type=_positive, default=1, metavar="N", help="servers (default: 1)")
    own.add_argument(
        "--min-replicas",
        type=_whole,
        metavar="N",
        help="scale by itself, by tokens that wait, with --max-replicas; 0: none while nobody asks "
        "(default: none)",
    )
    own.add_argument("--max-replicas", type=_positive, metavar="N", help="see --min-replicas (default: none)")
    own.add_argument(
        "--replica-gpus",
        type=_share,
        metavar="N",
        help="a server's GPUs, or its part of one (default: 1, where there are GPUs)",
    )
    own.add_argument(
        "--replica-cpus",
        type=_share,
        metavar="N",
        help="a server's share of a machine's CPUs, by which Ray places it (default: 1)",
    )
    own.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"a file with an admin key, by which servers' metrics are read (or {REPLICA_KEY} in the "
        "environment)",
    )
    own.add_argument(
        "--config", action="store_true", help="print the config file for `serve deploy`, and start nothing"
    )
    add_all_settings(up)
    for action in actions.choices.values():
        action.add_argument(
            "--address",
            metavar="HOST:PORT",
            help="the head node of a cluster that `ray start` has made (default: this machine's own)",
        )
        if action is not up:
            add_settings(action, "data_dir")
    return parser


def replica_url(text: str) -> str:
    """Return scheme, host and port of a server's address. Raises SettingsError."""
    try:
        parts = urlsplit(text)
        wrong = parts.port == 0 or not parts.hostname or re.search(r"[\s%*]", text) is not None
    except ValueError:
        wrong = True
    if (
        wrong
        or parts.scheme not in ("http", "https")
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise SettingsError(f"{redacted(text)!r} is no address of a server: give one as http://host:8000.")
    if parts.username or parts.password:
        raise SettingsError("an address has no password in it: give the key with --key-file.")
    return f"{parts.scheme}://{parts.netloc}"


def _whole(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10000")
    return number


def _positive(text: str) -> int:
    if not _whole(text):
        raise argparse.ArgumentTypeError("0 is too few: one at least")
    return int(text)


def _positive_id(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no process id")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1024")
    return share


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400")
    return seconds
