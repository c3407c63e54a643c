"""Parser of all command lines."""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import re
import sys
import textwrap
import threading
from collections.abc import Sequence
from typing import Any, NoReturn


def end_process(status: int) -> NoReturn:
    """End the process with a status, after all that Python's own end does for the user.

    Threads that are no daemons are waited for, functions of `atexit` run and output is written. Left out is
    that memory is given back piece by piece: this takes half a second once PyTorch is imported, and Triton's
    bindings write a page there about what they left allocated.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 1  # whoever read it is gone
    os._exit(status)


class OptionParser(argparse.ArgumentParser):
    """Reports wrong options as every command of `onebase` reports a failure: a sentence, the next step.

    repeated: the last value of a repeated option counts, for commands to which a unit, an image or a cluster
    adds options. Otherwise a repeated option is refused.
    """

    def __init__(self, *, repeated: bool = False, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)
        self.given: set[str] = set()
        """Options that already have their one value."""
        self._arguments: list[str] = []
        if not repeated:
            self.register("action", None, _Once)
            self.register("action", "store", _Once)

    def parse_known_args(self, *given: Any, **more: Any) -> Any:
        self.given.clear()
        arguments = given[0] if given else more.get("args")
        self._arguments = list(sys.argv[1:] if arguments is None else arguments)
        return super().parse_known_args(*given, **more)

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): ", r"\1: ", message)
        text = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", text)
        text = re.sub(r"invalid float value: (.*)", r"\1 is not a number", text)
        if unknown := re.fullmatch(r"unrecognized arguments: (.*)", text, re.DOTALL):
            text = self._unknown(unknown[1].split(" ")) or text
        elif text.startswith("the following arguments are required") and (
            mistyped := self._unknown(self._arguments)
        ):
            text = mistyped
        print(f"onebase: {text}\n`{self.prog} --help` explains the command.", file=sys.stderr)
        raise SystemExit(2)

    def _unknown(self, arguments: Sequence[str]) -> str:
        """Return a sentence on the options that do not exist, with those that were probably meant; "" if all
        exist."""
        found, actions = [], self._all_options()
        for argument in arguments:
            if argument == "--":
                break
            name = argument.partition("=")[0]
            if not re.fullmatch(r"--?[A-Za-z][\w-]*", name) or name in actions:
                continue
            known = [option for option in actions if option.startswith("--")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
            meant = near[0] if near else ""
            meant = VALIDATION[0] if meant in VALIDATION else meant  # an old name still works
            found.append(f"there is no option {name[:60]}" + (f"; did you mean {meant}?" if meant else ""))
        return "; ".join(found)

    def _all_options(self) -> dict[str, argparse.Action]:
        """Return the options, with those of the commands inside."""
        found = dict(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inside in action.choices.values():
                    found |= inside._option_string_actions
        return found


_LIKE = 0.6
"""Least likeness of a mistyped option to one that it is taken for."""
VALIDATION = ("--validation", "--eval-data", "--validation-file")
"""Names of the option for held-out data; the first is shown, the others were its names."""


def add_validation(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the option for held-out data, as `validation`. text: its help."""
    shown, *others = VALIDATION
    parser.add_argument(shown, dest="validation", metavar="FILE", help=text)
    for name in others:
        parser.add_argument(name, dest="validation", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Once(argparse.Action):
    """Stores the value of an option that may be given once: of two, one would be lost silently."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None and isinstance(parser, OptionParser):
            if self.dest in parser.given:
                raise argparse.ArgumentError(self, "it is given twice. Give it once.")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # all-linear is one word
