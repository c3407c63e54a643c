"""`onebase adapters`: send adapters to a server, look at them, choose which version answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HELP: Final = """\
usage: onebase adapters ACTION [options]

Send adapters to a server, look at them, and choose which version answers. A
name has versions, one for each content that was sent under it. A request for
the name gets the active version.

Send
  push FOLDER           send a folder that PEFT saved, and have it proven
  pull ORG/REPO[@REV]   let the server fetch one from the Hugging Face Hub
  merge A:0.7 B:0.3     let the server make one of several

Look
  list                  all adapters
  show NAME[@VERSION]   one with its versions, or one version with its proof
  diff A B              two side by side: targets, ranks, norms layer by layer
  bom NAME[@VERSION]    its bill of materials, as CycloneDX 1.6 JSON
  gates NAME[@VERSION]  what it must pass before it answers, and what it has

Take elsewhere
  export NAME[@VERSION] as a PEFT folder, a merged model, or GGUF

Change
  evaluate NAME@VERSION compare its answers with the active one's, for gates
  approve NAME@VERSION  let another person activate it
  activate NAME VERSION make a version the active one
  rollback NAME         go back to the version that was active before
  rollout NAME@VERSION  let a version answer a share of requests, and compare
  deactivate NAME       leave the name without an active version
  pin NAME, unpin NAME  keep it in memory, or no longer
  share NAME            let all tenants use it; unshare NAME ends that
  rm NAME[@VERSION]     delete one version, or the adapter with all of them

VERSION is a digest as `show` prints it; its first 8 digits are enough.
`onebase adapters ACTION --help` explains an action. All of them take --json.
"""

ACTIONS: Final[Mapping[str, str]] = {
    "push": "push",
    "pull": "push",
    "merge": "push",
    "list": "show",
    "show": "show",
    "diff": "diff",
    "export": "export",
    "bom": "gates",
    "gates": "gates",
    "approve": "gates",
    "evaluate": "gates",
    "activate": "change",
    "rollback": "change",
    "rollout": "rollout",
    "deactivate": "change",
    "pin": "change",
    "unpin": "change",
    "share": "change",
    "unshare": "change",
    "rm": "change",
}
"""The module of each action."""
