"""The `onebase` command. Each subcommand is imported only when it is used, so that all start fast."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from ._cli import plugins
from ._cli.exits import FAILED, INTERRUPTED, OK, USAGE
from ._version import sdk_version

HELP: Final = """\
usage: onebase COMMAND [options]

One base model in memory, and a LoRA adapter of its own for every request.

A server (needs: pip install 'onebase[server]')
  serve      load a base and serve it, with its adapters, over HTTP
  base       download a base ahead of time: onebase base fetch

Training (needs: pip install 'onebase[train]')
  train      make an adapter from examples, in a process of its own
  data       check examples: every bad line, lengths, what is learned
  estimate   say what a training run takes, before anything is loaded
  sweep      try settings on one base, and compare what comes out

Talking to a server
  generate   answer one prompt
  chat       have a conversation; change the adapter while it goes on
  adapters   bring adapters to the server, look at them, let them answer, roll back
  jobs       let the server train adapters; watch, pause, resume, cancel
  models     list the base and the adapters that the server has
  version    show the version of this command and of the server

First steps
  onebase serve                      in one terminal: fetches a small base the first time
  onebase chat                       in another
  onebase generate "Tell me a joke"  or just this

`onebase COMMAND --help` explains one command. The server is taken to be at http://127.0.0.1:8000;
--url, or ONEBASE_URL in the environment, names another. ONEBASE_API_KEY is sent when it is set.

Exit status: 0 done, 1 failed, 2 wrong arguments, 3 no server answers, 130 interrupted.
"""

COMMANDS: Final[Mapping[str, str]] = {
    "generate": "onebase._cli.generate",
    "chat": "onebase._cli.chat",
    "adapters": "onebase._cli.adapters",
    "jobs": "onebase._cli.jobs",
    "models": "onebase._cli.models",
    "version": "onebase._cli.version",
}
EXTRA_COMMANDS: Final = tuple(plugins.EXTRAS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status.

    Args:
        argv: The arguments without the program's name; by default the process's own.
    """
    _tolerate_narrow_encodings()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(HELP)
        return USAGE
    command, *rest = arguments
    if command in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return OK
    if command in ("-V", "--version"):
        print(f"onebase {sdk_version()}")
        return OK
    if command in COMMANDS:
        status: int = importlib.import_module(COMMANDS[command]).run(rest)
        return status
    plugin = plugins.find(command)
    if plugin is not None:
        return plugins.run(plugin, rest)
    return _unknown(command)


def _unknown(command: str) -> int:
    if command in EXTRA_COMMANDS:
        print(f"onebase: `onebase {command}` is not installed here.", file=sys.stderr)
        print(plugins.install_hint(command), file=sys.stderr)
        return FAILED
    print(f"onebase: there is no command {command!r}.", file=sys.stderr)
    near = difflib.get_close_matches(command, (*COMMANDS, *EXTRA_COMMANDS), n=1)
    hint = f"Did you mean `onebase {near[0]}`?" if near else "`onebase --help` lists them."
    print(hint, file=sys.stderr)
    return USAGE


def _tolerate_narrow_encodings() -> None:
    """Replace what an encoding lacks, and piped bytes that are no text, instead of failing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
