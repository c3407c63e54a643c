"""Refuse docstrings that are fragments: their first word answers a question that nobody has asked yet."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_WORDS = {
    "As", "By", "From", "How", "Its", "More", "Most", "None", "Of", "So", "That", "Those",
    "Until", "What", "When", "Where", "Which", "Who", "Whom", "Whose", "Why",
}  # fmt: skip
"""First words of fragments. A sentence begins with a verb, or with a noun phrase and its unit."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring, those of attributes and constants too."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str) and text.strip():
                    yield statement.lineno, text.strip()


def is_fragment(text: str) -> bool:
    """Return True if the text's first word is one of FIRST_WORDS, whatever marks are around it."""
    return text.split(maxsplit=1)[0].strip("`,.:;") in FIRST_WORDS


def sources() -> list[Path]:
    """Return git's Python files, without tests and the generated `_sync` client."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    names = [Path(name) for name in listed.split("\0") if name]
    return [ROOT / name for name in names if name.parts[0] != "tests" and "_sync" not in name.parts]


def main(files: Sequence[Path]) -> int:
    """Print each fragment and how many docstrings were read. Returns 1 for fragments, or if none was read."""
    count = fragments = 0
    for file in sorted(files):
        if not file.is_file():
            continue  # deleted, but not in the index yet
        for line, text in docstrings(file.read_text(encoding="utf-8")):
            count += 1
            if is_fragment(text):
                fragments += 1
                print(f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    print(f"{count} docstrings checked, {fragments} fragments")
    return 1 if fragments or not count else 0


if __name__ == "__main__":
    sys.exit(main(sources()))
