"""`onebase adapters`: bring adapters to a server, look at them, let them answer. One module an action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..actions import dispatch

HELP: Final = """\
usage: onebase adapters ACTION [options]

Bring adapters to a server, look at them, and let them answer. A name has
versions, one for each content that was brought under it. A request that asks
for the name gets the active one.

Bring
  push FOLDER           send a folder that PEFT saved, and have it proven
  pull ORG/REPO[@REV]   let the server fetch one from the Hugging Face Hub

Look
  list                  all adapters
  show NAME[@VERSION]   one with its versions, or one version with its proof
  diff A B              two side by side: targets, ranks, norms layer by layer

Let answer
  activate NAME VERSION from now on; what has begun ends on the version before
  rollback NAME         go back to the version that was active before
  deactivate NAME       let none of its versions answer
  pin NAME, unpin NAME  keep it in memory, or let it leave it again

Remove
  rm NAME[@VERSION]     one version, or the adapter with all of them

VERSION is a digest as `show` prints it; its first 8 digits are enough.
`onebase adapters ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = {
    "push": "bring",
    "pull": "bring",
    "list": "listing",
    "show": "show",
    "diff": "diff",
    "activate": "switch",
    "rollback": "switch",
    "deactivate": "switch",
    "pin": "switch",
    "unpin": "switch",
    "rm": "remove",
}


def run(argv: list[str]) -> int:
    """Run the command; gives its exit status."""
    return dispatch("adapters", HELP, ACTIONS, argv)
