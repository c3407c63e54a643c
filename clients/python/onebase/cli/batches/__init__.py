"""`onebase batches`: have a file of requests answered when the server has room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HELP: Final = """\
usage: onebase batches ACTION [options]

Have a file of requests answered when the server has room: rows fill places
that nobody else needs. A batch continues without this command.

  create FILE           send requests and begin: one JSON object a line
  list                  all batches, the newest first
  show ID               one batch: how far it is, or what is wrong with its file
  results ID            the answers, one JSON object a line
  cancel ID             end it; what is answered stays

ID is a batch's id as `list` prints it, or the beginning of it.
`onebase batches ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = {
    "create": "create",
    "list": "show",
    "show": "show",
    "results": "show",
    "cancel": "show",
}
"""The module of each action."""
