"""Fetch adapters from the Hub with huggingface_hub, in a process of its own.

huggingface_hub has requests without a time limit, and it reads its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE) once, at import. A process can be stopped at any time, whatever it waits for, and it can be
confined. Its answers are checked like any input from outside.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from onebase_adapters.format.added_tokens import TOKENIZER_FILES, BaseVocabulary, has_token_rows, with_tokens
from onebase_adapters.format.config import (
    MAX_CONFIG_BYTES,
    MODEL_CONFIG_FILE,
    AdapterFormatError,
    names_labels,
    with_labels,
)
from onebase_adapters.format.conversion import convert, needs_conversion
from onebase_adapters.format.defaults import (
    DEFAULTS_FILES,
    read_defaults,
    read_limited,
    too_large,
    with_defaults,
)
from onebase_adapters.hub.reference import (
    HubError,
    HubErrorCode,
    HubReference,
    cached_repo,
    hub_cache,
    hub_token_state,
    is_commit,
    parse_hub_reference,
    shared_blobs,
)
from onebase_adapters.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, SentFiles
from onebase_adapters.store.blobs import ADAPTER_FILES, AdapterFiles, Blob
from onebase_adapters.store.store import Store, StoreFullError
from onebase_engine.environment import fetching_environment
from onebase_engine.machine import BESIDE_SERVING, step_aside

__all__ = [
    "HubError",
    "HubReference",
    "PullCancelledError",
    "hub_token_state",
    "is_commit",
    "parse_hub_reference",
    "pull",
    "resolve",
]

Progress = Callable[[int, int], None]
"""Called with the bytes fetched so far and the bytes in all."""

_COMMAND = (sys.executable, "-P", "-m", "onebase_adapters.hub.child")
"""Command of the process. -P: nothing is imported from the current folder."""

_MOST_LINE = 64 << 10
"""Limit of a message, in bytes; the longest holds three paths and their sums."""
_LOOK_SECONDS = 0.2
_LAST_SECONDS = 2.0


_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Message(msgspec.Struct, frozen=True):
    """Message of the process, which has the fields of one kind: progress, an answer or an error."""

    total: _Size | None = None
    done: _Size | None = None
    """Bytes."""
    commit: str | None = None
    paths: list[str] | None = None
    more: dict[str, str] = {}
    """Paths of further files by their names: a classifier's config, and those of a tokenizer."""
    large: frozenset[str] = frozenset()
    """Names of files beside the adapter that are too large to be fetched."""
    unknown: tuple[str, ...] = ()
    """Names of files with defaults of which nothing is known, because of HF_HUB_OFFLINE."""
    sha256: tuple[str | None, ...] = ()
    error: HubErrorCode | Literal["store_full"] | None = None
    message: str = "The process that asks the Hub failed."


_log = logging.getLogger(__name__)
_MORE_FILES = frozenset({MODEL_CONFIG_FILE, *TOKENIZER_FILES, *DEFAULTS_FILES, SIGNATURE_FILE})
_messages = msgspec.json.Decoder(_Message)


class PullCancelledError(Exception):
    """The caller's event was set; nothing was stored."""


def resolve(
    repo: str,
    revision: str | None = None,
    *,
    timeout: float = 30.0,
    cancel: threading.Event | None = None,
) -> str:
    """Return the commit (40 hexadecimal digits) of a branch or tag; None: of the default branch.

    While the Hub is offline or down, this is the commit in the cache. Blocks for at most `timeout` seconds.
    Raises HubError, PullCancelledError.
    """
    HubReference(repo, revision)
    if is_commit(revision):
        return str(revision)
    request = {"do": "resolve", "repo": repo, "revision": revision}
    with closing(_talk(request, timeout, cancel)) as messages:
        for message in messages:
            if message.commit is None or not is_commit(message.commit):
                raise _wrong_answer("has another message than the commit")
            return message.commit
    raise HubError("hub_unreachable", f"The process that asks the Hub for {repo} ended without an answer.")


def pull(
    ref: HubReference,
    commit: str,
    store: Store,
    max_bytes: int,
    progress: Progress | None = None,
    *,
    cancel: threading.Event | None = None,
    stall_seconds: float = 60.0,
    vocabulary: Callable[[], BaseVocabulary | None] = lambda: None,
    on_files: Callable[[SentFiles], None] | None = None,
) -> AdapterFiles:
    """Fetch an adapter's two files of one commit into the store, with the names of a classifier's labels and
    the tokens that its tokenizer adds, and nothing else of the repository.

    Args:
        max_bytes: for both files together; compared before the transfer, and again while it lasts.
        cancel: event that stops the pull.
        stall_seconds: raise HubError (`hub_unreachable`) when nothing arrives for so long.
        on_files: called with the sums of the files as they are in the repository, and with their signature,
            which is fetched only if this is given. The caller verifies it; what is stored until then has no
            name.
    Raises HubError, PullCancelledError, StoreFullError, StoreError.
    """
    request = {
        "do": "pull",
        "repo": ref.repo,
        "commit": commit,
        "subfolder": ref.subfolder,
        "max_bytes": max_bytes,
        "signature": on_files is not None,
    }
    for again in (False, True):
        answer = _fetch({**request, "force": again}, progress, cancel, stall_seconds)
        places = [_of_repo(path, ref.repo) for path in answer.paths or ()]
        more = {name: _of_repo(path, ref.repo) for name, path in answer.more.items()}
        blobs = [store.add_file(place) for place in places]
        if all(map(_is_right, blobs, answer.sha256)):
            own, weights = _beginning(places[0]), store.local(blobs[1].sha256)
            if on_files is not None:
                beside = SentFiles.of(more)
                names = [Path(path).name for path in answer.paths or ()]
                own_sums = {name: blob.sha256 for name, blob in zip(names, blobs, strict=True)}
                bundle = beside.bundle
                if SIGNATURE_FILE in answer.large:  # left on the Hub; this many bytes are refused too
                    bundle = bytes(MAX_SIGNATURE_BYTES + 1)
                takes = names_labels(own), has_token_rows(own, weights)
                on_files(SentFiles(own_sums | dict(beside.sums), bundle, *takes))
            more.pop(SIGNATURE_FILE, None)
            found = _Found(store, more, answer.large, vocabulary)
            if answer.unknown:
                _log.warning(
                    "%s is pulled without defaults: the Hub's cache does not know whether it has %s, and "
                    "HF_HUB_OFFLINE is set",
                    ref,
                    " or ".join(answer.unknown),
                )
            if needs_conversion(own, weights):
                return _converted(found, own, weights)
            return AdapterFiles(found.whole_config(own, weights) or blobs[0], blobs[1])
    raise HubError(
        "hub_damaged", f"What the Hub sent for {ref} is not what its own hash says: try again later."
    )


def _fetch(
    request: dict[str, Any], progress: Progress | None, cancel: threading.Event | None, stall_seconds: float
) -> _Message:
    """Return the message with paths in the Hub's cache, and the SHA-256 sums that the Hub reports for
    them."""
    total = 0
    with closing(_talk(request, stall_seconds, cancel)) as messages:
        for message in messages:
            if message.total is not None:
                total = message.total
            if message.done is not None and progress is not None:
                progress(message.done, total)
            if message.paths is not None:
                counts = {len(message.paths), len(message.sha256)}
                if counts != {len(ADAPTER_FILES)} or not message.more.keys() <= _MORE_FILES:
                    raise _wrong_answer("names other files than an adapter's")
                return message
    raise HubError("hub_unreachable", f"The process that fetches {request['repo']} ended without an answer.")


@dataclass(frozen=True)
class _Found:
    """The files beside an adapter's two, by their names, and the store for what is made of them."""

    store: Store
    more: Mapping[str, Path]
    large: frozenset[str]
    vocabulary: Callable[[], BaseVocabulary | None]

    def whole_config(self, own: bytes, weights: Path) -> Blob | None:
        """Store the config with what the other files say, or return None if they add nothing.

        Raises HubError, StoreError.
        """
        model = self.more.get(MODEL_CONFIG_FILE)
        try:
            found = with_labels(own, None if model is None else _beginning(model))
            found = with_defaults(found, read_defaults(self._read_defaults))
            found = with_tokens(found, weights, self._read, self.vocabulary)
        except AdapterFormatError as error:
            raise HubError(error.code, f"The adapter cannot be served: {error}.") from error
        return None if found == own else self.store.add_bytes(found)

    def _read_defaults(self, name: str) -> bytes | None:
        if name in self.large:
            raise too_large(name)
        place = self.more.get(name)
        return None if place is None else read_limited(place, name)

    def _read(self, name: str) -> bytes | None:
        place = self.more.get(name)
        if place is None or place.stat().st_size > TOKENIZER_FILES[name]:
            return None
        return place.read_bytes()


def _converted(beside: _Found, config: bytes, weights: Path) -> AdapterFiles:
    """Store PEFT's own form of an adapter. Raises HubError."""
    with beside.store.writer() as writer:
        try:
            found = convert(config, weights, writer.write)
        except AdapterFormatError as error:
            raise HubError(error.code, f"The adapter cannot be served: {error}.") from error
        whole = beside.whole_config(found, writer.path) or beside.store.add_bytes(found)
        return AdapterFiles(whole, writer.commit())


def _beginning(place: Path) -> bytes:
    with place.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _of_repo(path: str, repo: str) -> Path:
    """Return a file in the Hub's cache, links resolved, after the process that named it has ended.

    Raises HubError unless it is the repository's.
    """
    cache = hub_cache(os.environ)
    with suppress(OSError, RuntimeError, ValueError):  # no path at all, or a loop of links
        found = Path(path).resolve()
        for folder in (cached_repo(cache, repo)[0], shared_blobs(cache)):
            if found.is_relative_to(folder.resolve()) and found.is_file():
                return found
    raise HubError("hub_wrong_answer", f"The process that fetched {repo} named a file that is not its own.")


def _is_right(blob: Blob, expected: str | None) -> bool:
    return expected is None or blob.sha256 == expected


def _talk(
    request: dict[str, Any], silence_seconds: float, cancel: threading.Event | None
) -> Generator[_Message]:
    """Yield the messages of the process one by one, and raise the error that it reports."""
    with _child(request) as child:
        for line in _lines(child, silence_seconds, cancel):
            try:
                message = _messages.decode(line)
            except msgspec.ValidationError as error:
                raise _wrong_answer(f"sent a message that is no JSON object of its kind ({error})") from None
            except (ValueError, RecursionError):
                raise _wrong_answer("sent a message that is no JSON") from None
            if message.error == "store_full":
                raise StoreFullError(message.message)
            if message.error is not None:
                raise HubError(message.error, message.message)
            yield message


def _wrong_answer(what: str) -> HubError:
    return HubError("hub_wrong_answer", f"The process that asks the Hub {what}.")


@contextmanager
def _child(request: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the process. It ends with this block, or with this process, because it watches its stdin."""
    child = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=fetching_environment() | {"HF_HUB_CACHE": str(hub_cache(os.environ)), "HF_HUB_DISABLE_XET": "1"},
    )
    step_aside(child.pid, BESIDE_SERVING)
    if child.stdin is None or child.stdout is None:
        raise HubError("hub_unreachable", "The process that asks the Hub has no pipes.")
    with child.stdin, child.stdout:
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            yield child
        except BrokenPipeError:
            raise HubError("hub_unreachable", "The process that asks the Hub did not start.") from None
        finally:
            child.stdin.close()
            try:
                child.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _lines(
    child: subprocess.Popen[bytes], silence_seconds: float, cancel: threading.Event | None
) -> Iterator[bytes]:
    stdout = child.stdout
    if stdout is None:
        return
    heard = time.monotonic()
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while True:
            if cancel is not None and cancel.is_set():
                raise PullCancelledError("The pull was given up.")
            if selector.select(_LOOK_SECONDS):
                data = stdout.read(1 << 16)
                if not data:
                    return
                heard = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > _MOST_LINE:
                    raise _wrong_answer(f"sent a message of over {_MOST_LINE} bytes")
                yield from lines
            elif time.monotonic() - heard > silence_seconds:
                raise HubError(
                    "hub_unreachable",
                    f"Nothing came from the Hub for {silence_seconds:g} s: try again later.",
                )
