"""`onebase files`: the files on a server that jobs and batches read, and those that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HELP: Final = """\
usage: onebase files ACTION [options]

The files on a server: examples and requests, curves and answers. `jobs create`
and `batches create` send theirs by themselves.

  list                  all files, the newest first
  show ID               one file's name, size and purpose
  upload FILE           send one; the same content is stored once
  download ID           get what is in one
  rm ID...              delete some

`onebase files ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = dict.fromkeys(("list", "show", "upload", "download", "rm"), "actions")
"""The module of each action."""
