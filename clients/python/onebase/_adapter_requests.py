"""From what the caller wants done with adapters to what is sent: pure functions, shared by both clients."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from ._adapter_folder import AdapterFolder
from ._config import UNSET, Unset
from ._multipart import Multipart
from ._requests import Body, Call, encode
from .adapter_types import Progress, ProgressCallback

LIST = Call("GET", "/v1/adapters")


def retrieve(name: str) -> Call:
    return Call("GET", _path(name))


def versions(name: str) -> Call:
    return Call("GET", _path(name, "versions"))


def version(name: str, digest: str) -> Call:
    return Call("GET", _path(name, "versions", digest))


def history(name: str) -> Call:
    return Call("GET", _path(name, "history"))


def upload(
    folder: AdapterFolder,
    name: str,
    *,
    activate: bool,
    allow_noop: bool,
    any_base: bool,
    progress: ProgressCallback | None,
) -> Call:
    """The call that sends a folder. The same content makes the same version, so it can be sent twice."""
    flags = _flags(activate=activate, allow_noop=allow_noop, any_base=any_base)
    form = Multipart(
        [("name", name), *((flag, "true") for flag in flags)],
        "files",
        (folder.config, folder.weights),
        None if progress is None else lambda done, total: progress(_sent(done, total)),
    )
    return Call("POST", "/v1/adapters", form, idempotent=True)


def pull(
    repo: str,
    revision: str | None,
    subfolder: str | None,
    name: str | None,
    *,
    activate: bool,
    allow_noop: bool,
    any_base: bool,
) -> Call:
    """The call that lets the server fetch a Hub repository.

    Raises:
        ValueError: `repo` is not `org/repo`, or the name is empty.
    """
    organization, _, short = repo.partition("/")
    if not organization or not short or "/" in short or "@" in repo or ":" in repo:
        raise ValueError(f"repo must be org/repo, such as acme/support-lora, not {repo!r}")
    hub: Body = {"repo": repo, "revision": revision, "subfolder": subfolder}
    body: Body = {"name": short if name is None else name}
    body["hub"] = {key: value for key, value in hub.items() if value is not None}
    body |= _flags(activate=activate, allow_noop=allow_noop, any_base=any_base)
    return Call("POST", "/v1/adapters", encode(body), idempotent=True)


def activate(name: str, digest: str, expected: str | Unset | None) -> Call:
    return _post({"version": digest} | _expected(expected), name, "activate")


def rollback(name: str, expected: str | Unset | None) -> Call:
    return _post(_expected(expected), name, "rollback")


def deactivate(name: str) -> Call:
    return _post({}, name, "deactivate")


def pin(name: str, pinned: bool) -> Call:
    """Saying twice that something is pinned does no more than saying it once."""
    return Call("POST", _path(name, "pin"), encode({"pinned": pinned}), idempotent=True)


def delete(name: str, digest: str | None, *, force: bool) -> Call:
    path = _path(name) if digest is None else _path(name, "versions", digest)
    return Call("DELETE", f"{path}?{urlencode({'force': 'true'})}" if force else path)


def _post(body: Body, *path: str) -> Call:
    return Call("POST", _path(*path), encode(body))


def _path(*parts: str) -> str:
    if not all(parts):
        raise ValueError("the name of an adapter, or its version, is empty")
    return "/".join(["/v1/adapters", *(quote(part, safe="") for part in parts)])


def _expected(expected: str | Unset | None) -> Body:
    return {} if expected is UNSET else {"expected": expected}


def _flags(**flags: bool) -> Body:
    """Those that are set; the others are the server's defaults."""
    return {name: True for name, value in flags.items() if value}


def _sent(done: int, total: int) -> Progress:
    return Progress("uploading", done / total, done, total)
