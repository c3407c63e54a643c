"""`onebase adapters rm`: delete a version, or an adapter with all of them."""

from __future__ import annotations

from ..._client import Client
from ..actions import perform, print_json
from ..exits import OK
from .common import Reference, parser, reference

_DESCRIPTION = """\
Delete one version, or an adapter with all its versions. It cannot be undone. The server refuses while
requests run on it, and for the version that is active; --force deletes it all the same, and those requests
end with an error.
"""
_EXAMPLES = """\
  onebase adapters rm acme-support@3f2a9c41
  onebase adapters rm acme-support
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action; gives its exit status."""
    made = parser(action, _DESCRIPTION, _EXAMPLES)
    made.add_argument("adapter", metavar="NAME[@VERSION]")
    made.add_argument("--force", action="store_true", help="even if it is the active one, or in use")
    args = made.parse_args(argv)
    try:
        wanted = reference(args.adapter)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _remove(client, wanted, args.force, args.json))


def _remove(client: Client, wanted: Reference, force: bool, as_json: bool) -> int:
    client.adapters.delete(wanted.name, wanted.version, force=force)
    if as_json:
        print_json({"name": wanted.name, "version": wanted.version, "deleted": True})
    else:
        print(f"Deleted {wanted}" + ("." if wanted.version else ", with all its versions."))
    return OK
