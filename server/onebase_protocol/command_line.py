"""Parser of all command lines."""

from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
import textwrap
import threading
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
        if not repeated:
            self.register("action", None, _Once)
            self.register("action", "store", _Once)

    def parse_known_args(self, *given: Any, **more: Any) -> Any:
        self.given.clear()
        return super().parse_known_args(*given, **more)

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): ", r"\1: ", message)
        text = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", text)
        text = re.sub(r"invalid float value: (.*)", r"\1 is not a number", text)
        print(f"onebase: {text}\n`{self.prog} --help` explains the command.", file=sys.stderr)
        raise SystemExit(2)


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
