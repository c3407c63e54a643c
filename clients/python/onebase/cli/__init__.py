"""The `onebase` command. A subcommand is imported only when it is used, so that every one starts fast."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Final, NoReturn

from onebase_protocol.command_line import OptionParser, end_process

from .._core.config import sdk_version
from .command import FAILED, INTERRUPTED, OK, USAGE, add_server_options, run_action

HELP: Final = """\
usage: onebase [--url URL] [--key KEY] [--timeout SECONDS] [--json] COMMAND [options]

One base model in memory, and a LoRA adapter of its own for every request.

A server (needs: pip install 'onebase[server]')
  serve      load a base and serve it, with its adapters, over HTTP
  route      one address for several servers of one base
  cluster    several servers on Ray Serve (needs: pip install 'onebase[server,ray]')
  base       check a base, or download it ahead of time: onebase base check
  keys       make, list, change and revoke API keys, on the server's machine
  tenants    limit what tenants may ask for and keep, on the server's machine
  backup     copy what a server keeps, while it serves, on its machine

Training (needs: pip install 'onebase[train]')
  train      make an adapter from examples, in a process of its own
  data       check examples: every bad line, lengths, what is learned
  estimate   say what a training run needs
  sweep      try settings on one base, and compare the results

Talking to a server
  generate   answer one prompt
  chat       have a conversation; change the adapter at any time
  judge      ask several adapters about one conversation, at once
  adapters   send adapters to the server, look at them, activate them, roll back
  jobs       let the server train adapters; watch, pause, resume, cancel
  migrate    train again here what was fine-tuned at OpenAI
  batches    have a file of requests answered when the server has room
  files      what jobs and batches read, and what they leave
  top        watch the server: sequences, tokens, adapters, jobs, tenants
  usage      who used how many requests, tokens and hours of training
  models     list the base and the adapters that the server has
  gates      say what a version must pass before it answers under a name
  requests   look at the server's log of requests, or erase what it has
  replay     answer logged requests again, and compare the answers
  audit      list who changed what: adapters, files, jobs, batches, keys
  conform    find out whether a server, of any make, applies the right adapter
  version    show the version of this command and of the server

First steps
  onebase serve                      in one terminal: fetches a small base the first time
  onebase chat                       in another
  onebase generate "Tell me a joke"  or just this

`onebase COMMAND --help` explains one command. The server is at http://127.0.0.1:8000, unless --url or
ONEBASE_URL in the environment names another. ONEBASE_API_KEY is sent if it is set, or --key. These options
and --json may stand before the command or after it.

Exit status: 0 done, 1 failed, 2 wrong arguments, 3 no server answers, 130 interrupted.
"""

COMMANDS: Final[Mapping[str, str]] = {
    "generate": "generate",
    "chat": "chat",
    "judge": "judge",
    "adapters": "adapters",
    "jobs": "jobs",
    "migrate": "migrate",
    "batches": "batches",
    "files": "files",
    "top": "top",
    "usage": "usage",
    "requests": "request_log",
    "replay": "request_log",
    "audit": "audit",
    "gates": "gates",
    "conform": "conform",
    "models": "server",
    "version": "server",
}
"""The module of each command. Its `run(command, argv)` gives the exit status, or one of its ACTIONS does."""

PLUGINS: Final = "onebase.commands"
"""Other packages bring commands as entry points of this group: `command(argv: list[str]) -> int | None`.
The SDK itself imports neither server nor torch."""

EXTRA_COMMANDS: Final[Mapping[str, str]] = {
    "serve": "server",
    "route": "server",
    "cluster": "server,ray",
    "base": "server",
    "keys": "server",
    "tenants": "server",
    "backup": "server",
    "train": "train",
    "data": "train",
    "estimate": "train",
    "sweep": "train",
}
"""The extra of this distribution that brings each of these commands."""

_OWN_PACKAGES: Final = frozenset(
    {
        "onebase",
        "onebase_server",
        "onebase_route",
        "onebase_edge",
        "onebase_training",
        "onebase_adapters",
        "onebase_engine",
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Gives its exit status.

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
        # The reader, such as `head`, wants no more. Without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


_HELP_WORDS = ("-h", "--help", "help")


def run_process() -> NoReturn:
    """Run the command line of this process, and end it with the command's status."""
    end_process(main())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(HELP)
        return USAGE
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(f"onebase {sdk_version()}")
        return OK
    if command.startswith("-") and command not in _HELP_WORDS:
        command, rest = _command_first(arguments)
    if command in _HELP_WORDS:
        sys.stdout.write(HELP)
        return OK
    if command in COMMANDS:
        module = importlib.import_module(f".{COMMANDS[command]}", __package__)
        if not hasattr(module, "run"):
            return run_action(command, module.HELP, module.ACTIONS, rest)
        status: int = module.run(command, rest)
        return status
    plugin = find_plugin(command)
    if plugin is not None:
        return run_plugin(plugin, rest)
    return _unknown(command)


def _command_first(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments, to which the options that stood before it are added."""
    made = OptionParser(prog="onebase", add_help=False)
    add_server_options(made)
    made.add_argument("--json", action="store_true")
    place = 0
    while place < len(arguments) and arguments[place].startswith("-") and arguments[place] not in _HELP_WORDS:
        place += 1 if arguments[place] == "--json" or "=" in arguments[place] else 2
    made.parse_args(arguments[:place])
    if place >= len(arguments):
        made.error("a command is missing after these options.")
    command, *rest = arguments[place:]
    end = rest.index("--") if "--" in rest else len(rest)
    return command, [*rest[:end], *arguments[:place], *rest[end:]]


def _unknown(command: str) -> int:
    if command in EXTRA_COMMANDS:
        print(f"onebase: `onebase {command}` is not installed here.", file=sys.stderr)
        print(_install_hint(command), file=sys.stderr)
        return FAILED
    print(f"onebase: there is no command {command!r}.", file=sys.stderr)
    near = difflib.get_close_matches(command, (*COMMANDS, *EXTRA_COMMANDS), n=1)
    hint = f"Did you mean `onebase {near[0]}`?" if near else "`onebase --help` lists them."
    print(hint, file=sys.stderr)
    return USAGE


def find_plugin(command: str) -> EntryPoint | None:
    """Return the entry point of a command of another package, or None."""
    return next(iter(entry_points(group=PLUGINS, name=command)), None)


def run_plugin(plugin: EntryPoint, argv: list[str]) -> int:
    """Run a command of another package with its arguments untouched. Gives its exit status."""
    try:
        command: Callable[[list[str]], int | None] = plugin.load()
        status = command(argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in _OWN_PACKAGES:
            raise
        print(f"onebase: `onebase {plugin.name}` needs the package {missing!r}.", file=sys.stderr)
        print(_install_hint(plugin.name), file=sys.stderr)
        return FAILED
    return OK if status is None else status


def _install_hint(command: str) -> str:
    """Return a hint how to install what a command needs. Unknown packages are taken to need the server."""
    if EXTRA_COMMANDS.get(command) == "train":
        return "Training is an extra of this package. Install it with: pip install 'onebase[train]'"
    extra = EXTRA_COMMANDS.get(command, "server")
    return f"The server is an extra of this package. Install it with: pip install 'onebase[{extra}]'"


def _tolerate_narrow_encodings() -> None:
    """Replace characters that an encoding lacks, and piped bytes that are no text, instead of failing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
