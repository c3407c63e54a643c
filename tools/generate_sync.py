#!/usr/bin/env python3
"""Writes the synchronous client of the SDK, `_sync`, from the asynchronous one, `_async`.

`tools/generate_sync.py` writes it; with --check it only says whether it is current, by its exit status.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "clients/python/onebase"
SOURCE, TARGET = PACKAGE / "_async", PACKAGE / "_sync"
HEADER = "# Generated from _async/{name} by tools/generate_sync.py; do not edit.\n"

# What only one of the two clients says.
PHRASES = {
    "The asynchronous client, written by hand. `tools/generate_sync.py` makes `_sync` from it.": (
        "The synchronous client. `tools/generate_sync.py` makes it from `_async`."
    ),
    "one OneBase server from asyncio or trio. Close it,": (
        "one OneBase server. Safe to share between threads. Close it,"
    ),
}
PATTERNS = [
    (r"\ban `async with`", "a `with`"),
    (r"\basync (?=def|with|for)", ""),
    (r"\bawait ", ""),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\b(_?)Async(?=[A-Z])", r"\1"),
    (r"\b__a(?=(enter|exit|iter|next)__)", "__"),
    (r"\ba(?=(next|closing)\b)", ""),
    (r"\.a(?=(close|read|iter_bytes)\()", "."),
    (r"\banyio\b", "time"),
]
LEFT = re.compile(r"\b(async|await|anyio|asyncio|trio)\b|Async", re.IGNORECASE)


def main() -> int:
    """Write or check the files; gives the exit status."""
    parser = argparse.ArgumentParser(description="Write _sync of the SDK from _async.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are not current")
    check = parser.parse_args().check
    sources = {path.name: path.read_text() for path in sorted(SOURCE.glob("*.py"))}
    unused = [phrase for phrase in PHRASES if not any(phrase in text for text in sources.values())]
    if unused:
        raise SystemExit(f"PHRASES: no file of _async says {unused[0]!r}")
    wanted = {TARGET / name: synchronous(name, text) for name, text in sources.items()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    surplus = [path for path in sorted(TARGET.glob("*.py")) if path not in wanted]
    for path in [*stale, *surplus]:
        print(f"{path.relative_to(PACKAGE)} {'is not current' if check else 'written or removed'}")
    if check:
        return 1 if stale or surplus else 0
    for path in stale:
        path.write_text(wanted[path])
    for path in surplus:
        path.unlink()
    return 0


def synchronous(name: str, text: str) -> str:
    """Return the synchronous file for the asynchronous file `name` of this text."""
    for phrase, other in PHRASES.items():
        text = text.replace(phrase, other)
    for pattern, other in PATTERNS:
        text = re.sub(pattern, other, text)
    left = LEFT.search(text.replace("`_async`", ""))
    if left is not None:
        line = text[: left.start()].count("\n") + 1
        raise SystemExit(f"_async/{name}: {left[0]!r} is left in line {line} of what is generated")
    return formatted(HEADER.format(name=name) + text, TARGET / name)


def formatted(text: str, path: Path) -> str:
    """Return the text in the project's style, with the imports sorted and only those that are used."""
    place = ["--stdin-filename", str(path), "-"]
    for command in (["check", "--fix-only", "--select=I,F401"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", *place]
        text = subprocess.run(ruff, input=text, text=True, stdout=subprocess.PIPE, check=True).stdout
    return text


if __name__ == "__main__":
    sys.exit(main())
