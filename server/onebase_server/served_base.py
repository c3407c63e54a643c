"""The base that a server serves, as far as it is known before it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Base:
    """Its name, its folder on this disk, and its repository and commit on the Hub, if it has them."""

    name: str
    folder: Path
    repo: str | None = None
    commit: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What the config of an adapter for it may call it."""
        config = json.loads((self.folder / "config.json").read_text())
        own = config.get("_name_or_path")
        others = (self.folder.name, self.repo, own)
        return (self.name, *(name for name in others if isinstance(name, str) and name))
