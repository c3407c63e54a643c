"""Which registries a training folder was used with: what one of them does not know may be another one's."""

from __future__ import annotations

import secrets
import time
from collections.abc import Container, Iterable
from pathlib import Path

from onebase_adapters.registry import TrainingFile, TrainingRecords
from onebase_adapters.store.atomic_files import write_atomically

TENANT = "registry"
"""Whose files the marks are: no caller sees them."""


class KnownRegistries:
    """Tells registries apart by a mark in each: the row of an empty file, whose id the folder keeps.

    Args:
        path: the folder's list of marks, one a line.
        server: the folder's id.
    """

    def __init__(self, path: Path, records: TrainingRecords, server: str) -> None:
        self.path = path
        self._records = records
        self._server = server

    def at_hand_alone(self, file_ids: Container[str]) -> bool:
        """Whether the folder was never used with another registry than this one. Blocks.

        Args:
            file_ids: the files of this server that the registry knows, marks among them.

        Raises RegistryError, OSError.
        """
        marks = self.path.read_text().split() if self.path.exists() else []
        if not any(mark in file_ids for mark in marks):
            marks.append(self._leave_mark())
            self._keep(marks)
        return len(marks) == 1

    def _keep(self, marks: Iterable[str]) -> None:
        # Empty after a power cut, it would know of no other registry.
        write_atomically(self.path, "".join(f"{mark}\n" for mark in marks))

    def _leave_mark(self) -> str:
        mark = f"registry-{secrets.token_hex(8)}"
        row = TrainingFile(mark, TENANT, self._server, "fine-tune-results", mark, 0, time.time())
        return self._records.add_file(row).id
