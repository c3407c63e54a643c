"""Transcripts of the command, compared with the files in `golden/`. ONEBASE_GOLDEN=write rewrites those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onebase.cli import main

FOLDER = Path(__file__).parent / "golden"


class Transcript:
    """What a command printed, run by run. `2>` begins a line of stderr, `=` an exit status other than 0."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *places: tuple[str, str]) -> None:
        self._capsys = capsys
        self._places = places
        """Texts that differ from one run to the next, such as a URL, and what stands for each."""
        self._text = ""

    def run(self, *arguments: str) -> None:
        """Run `onebase` with these arguments."""
        try:
            status = main(list(arguments))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        out, err = self._capsys.readouterr()
        shown = " ".join(f"'{word}'" if " " in word or not word else word for word in arguments)
        lines = [f"$ onebase {shown}".rstrip(), *out.splitlines()]
        lines += [f"2> {line}" for line in err.splitlines()]
        lines += [f"= {status}"] * bool(status)
        self._text += "".join(f"{line.rstrip(' ')}\n" for line in lines) + "\n"

    def check(self, name: str) -> None:
        """Compare everything so far with the golden file of this name."""
        text = self._text
        for found, place in self._places:
            text = text.replace(found, place)
        path = FOLDER / f"{name}.txt"
        if os.environ.get("ONEBASE_GOLDEN") == "write":
            path.write_text(text)
        assert text == path.read_text(), "if that is meant: ONEBASE_GOLDEN=write"
