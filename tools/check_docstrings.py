"""Refuse docstrings that are fragments, and public classes of the product that share a name.

A fragment's first word answers a question that nobody has asked yet. A function's docstring begins with a
verb, and so not with an article; a property's is a noun phrase, as an attribute's.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_WORDS = {
    "As", "By", "From", "How", "Its", "More", "Most", "None", "Of", "So", "That", "Those",
    "Until", "What", "When", "Where", "Which", "Who", "Whom", "Whose", "Why",
}  # fmt: skip
"""First words of fragments. A sentence begins with a verb, or with a noun phrase and its unit."""
ARTICLES = {"A", "An", "The"}
"""First words of noun phrases, which functions have no use for."""
PRODUCT = {"engine", "server", "adapters", "clients"}
"""Top-level folders in which a public class's name says which class it is."""


def docstrings(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and the text of each docstring, those of attributes and constants too, and whether it is
    a function's."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        called = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
            "property" in ast.unparse(decorator) for decorator in node.decorator_list
        )
        for place, statement in enumerate(body if isinstance(body, list) else ()):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str) and text.strip():
                    yield statement.lineno, text.strip(), called and place == 0


def is_fragment(text: str, called: bool) -> bool:
    """Return True if the text's first word is one that is refused, whatever marks are around it."""
    first = text.split(maxsplit=1)[0].strip("`,.:;")
    return first in FIRST_WORDS or (called and first in ARTICLES)


def classes(source: str) -> Iterator[str]:
    """Yield the names of the public classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def sources() -> list[Path]:
    """Return git's Python files, without tests and the generated `_sync` client."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    names = [Path(name) for name in listed.split("\0") if name]
    return [ROOT / name for name in names if name.parts[0] != "tests" and "_sync" not in name.parts]


def main(files: Sequence[Path]) -> int:
    """Print each fragment, each shared name, and how many docstrings were read. Returns 1 for any, or if no
    docstring was read."""
    count = fragments = 0
    places: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        if not file.is_file():
            continue  # deleted, but not in the index yet
        source = file.read_text(encoding="utf-8")
        if file.relative_to(ROOT).parts[0] in PRODUCT:
            for name in classes(source):
                places[name].append(str(file.relative_to(ROOT)))
        for line, text, called in docstrings(source):
            count += 1
            if is_fragment(text, called):
                fragments += 1
                print(f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    shared = {name: found for name, found in places.items() if len(found) > 1}
    for name, found in shared.items():
        print(f"class {name} has {len(found)} definitions: {', '.join(found)}")
    print(f"{count} docstrings checked, {fragments} fragments; {len(shared)} names of several classes")
    return 1 if fragments or shared or not count else 0


if __name__ == "__main__":
    sys.exit(main(sources()))
