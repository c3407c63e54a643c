"""Options that several benchmarks have. The standard library alone, since the GPU check reads them too."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
COMMON: dict[str, dict[str, Any]] = {
    "base": {"type": Path, "help": "folder of a base model (default: the small default base)"},
    "vllm-python": {"type": Path, "help": "the python of a virtual environment that has vLLM"},
    "install-peers": {"action": "store_true", "help": "install vLLM and llama.cpp, and measure them"},
    "llama-server": {"type": Path, "help": "llama.cpp's llama-server"},
    "gguf": {"type": Path, "help": "the base for it: by default the file that the default base is made from"},
    "llama-args": {"default": "", "metavar": "ARGS", "help": "more options for llama-server"},
    "onebase-args": {"default": "", "metavar": "ARGS", "help": "more options for `onebase serve`"},
    "vllm-args": {"default": "", "metavar": "ARGS", "help": "more options for `vllm serve`"},
    "busy": {"action": "store_true", "help": "measure although other work runs on this machine"},
}
"""Options that are the same wherever they are, by name."""


class Options:
    """A parser of options. Numbers of things are at least 1."""

    def __init__(self, description: str | None) -> None:
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add = self.parser.add_argument

    def common(self, *names: str) -> None:
        for name in names:
            self.add(f"--{name}", **COMMON[name])

    def count(self, name: str, default: int, help: str) -> None:
        self.add(f"--{name}", type=positive, default=default, help=f"{help} (default: {default})")

    def number(self, name: str, default: float, help: str) -> None:
        self.add(f"--{name}", type=float, default=default, help=f"{help} (default: {default:g})")

    def threads(self) -> None:
        self.count("threads", os.cpu_count() or 1, "CPU threads of each target, all unless told otherwise")

    def seed(self, what: str) -> None:
        self.add("--seed", type=int, default=0, help=f"of {what} (default: 0)")

    def output(self, files: str) -> None:
        self.add("--output", type=Path, default=RESULTS, help=f"folder for {files} (default: {RESULTS})")


def positive(text: str) -> int:
    """Return the number. Raises ArgumentTypeError if it is less than 1, or none."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def names(*known: str) -> Callable[[str], list[str]]:
    """Return a reader of names that are separated by commas; `all` are all of those that are known."""

    def read(text: str) -> list[str]:
        found = list(known) if text == "all" else [name.strip() for name in text.split(",")]
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}, or all")
        return found

    return read


def base_of(options: argparse.Namespace) -> Path:
    """Return the folder of the base that was asked for, or of the default base, fetched if need be."""
    if options.base is None:
        from onebase_engine.base.default_base import fetch_default_base

        options.base = fetch_default_base()
    folder: Path = options.base
    return folder
