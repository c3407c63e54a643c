"""The events of a run in its folder, one JSON object a line, whatever ends the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from onebase_adapters.training import events
from onebase_adapters.training.checkpoint import CheckpointError
from onebase_adapters.training.loop import Listen
from onebase_adapters.training.ranks import Ranks

EVENTS = "events.jsonl"


@contextmanager
def recorded(folder: Path, listen: Listen, ranks: Ranks) -> Iterator[Listen]:
    """A listener that also keeps the events, but for those that only move a bar, in `events.jsonl`.

    Nothing is kept of a run that is refused because the folder is another one's.
    """
    if not ranks.first:
        yield lambda event: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EVENTS).open("ab+") as file:
        before = file.tell()
        if before and not _ends_a_line(file):
            file.write(b"\n")  # a process that was killed may have left half a line

        begun = False

        def tell(event: events.Event) -> None:
            nonlocal begun
            begun = begun or isinstance(event, events.Planned)
            if not isinstance(event, events.Progress):
                file.write(msgspec.json.encode(event) + b"\n")
                file.flush()
            listen(event)

        try:
            yield tell
        except CheckpointError:
            if not begun:
                file.truncate(before)
            raise


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
