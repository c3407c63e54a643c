"""Process that talks to the Hub: one request on stdin, lines of JSON on stdout. See `pull.py`.

huggingface_hub derives file names from the commit and the ETag that the Hub reports. Both are checked
first, and the process is confined to its repository's part of the cache.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, file_download, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache as cached_path
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from tqdm import tqdm

from onebase_adapters.format.added_tokens import TOKENIZER_FILES, has_token_rows
from onebase_adapters.format.config import MAX_CONFIG_BYTES, MLX_WEIGHTS_FILE, MODEL_CONFIG_FILE, names_labels
from onebase_adapters.format.defaults import DEFAULTS_FILES
from onebase_adapters.hub.confinement import confine
from onebase_adapters.hub.reference import cached_repo, is_commit, shared_blobs
from onebase_adapters.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_FILE
from onebase_adapters.store.blobs import ADAPTER_FILES, CONFIG_FILE, FULL, WEIGHTS_FILE
from onebase_engine.base.hub_access import hub_silence
from onebase_engine.redaction import redacted

_CHUNK = 256 << 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=~-]{0,127}")
"""ETags that are safe as a file name: they cannot leave their folder."""
_SPARE_BYTES = 1 << 20
"""Bytes that one file may exceed the adapter's limit by; the transfer itself enforces the limit."""
_TRIES = 3
_LAST_SECONDS = 5.0
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

Say = Callable[[dict[str, Any]], None]


class _SilentHubError(Exception):
    """The Hub does not answer, and the cache does not have the revision."""


class _WrongAnswerError(Exception):
    """The Hub gave an answer that no Hub gives; the message describes it."""


class _TooLargeError(Exception):
    """The adapter is too large; the argument is its size, or the bytes received so far."""


def main() -> None:
    # What a shell starts in the background inherits Ctrl-C as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = json.loads(sys.stdin.buffer.readline())
    _confine(request)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whatever a library prints must not look like one of our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    # The default of 10 MB hides for minutes that a slow transfer moves at all.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    try:
        answer = _resolve(request) if request["do"] == "resolve" else _pull(request, say)
    except Exception as error:
        code, message = _explain(error, request)
        answer = {"error": code, "message": message}
    say(answer)


def _confine(request: dict[str, Any]) -> None:
    """Confine the process (see `confinement.py`), before a thread starts and data comes from outside."""
    folders = cached_repo(Path(constants.HF_HUB_CACHE), request["repo"])
    for folder in folders:
        with suppress(OSError):  # a cache that can only be read may have what is wanted
            folder.mkdir(parents=True, exist_ok=True)
    confine(
        folders,
        [Path(constants.HF_TOKEN_PATH), shared_blobs(Path(constants.HF_HUB_CACHE))],
        file_bytes=request.get("max_bytes", 0) + _SPARE_BYTES,
    )


def _end_with_parent() -> None:
    """Stop as by Ctrl-C when the parent is gone, so that no half-written file stays in the cache."""
    # Not through sys.stdin: an interpreter that ends waits a second for the lock of a reader.
    while os.read(sys.stdin.fileno(), 1 << 10):
        pass
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(_LAST_SECONDS)
    os._exit(1)


def _resolve(request: dict[str, Any]) -> dict[str, Any]:
    repo, revision = request["repo"], request["revision"]
    silence = None if constants.is_offline_mode() else hub_silence(repo)
    try:
        found = _CheckedApi().resolve_revision(repo, revision=revision, local_files_only=silence is not None)
    except Exception as error:  # the client's exceptions share no base class
        if silence is None:
            raise
        raise _SilentHubError(silence) from error
    return {"commit": _checked_commit(found.resolved)}


class _CheckedApi(HfApi):
    """Checks a commit before it is written into the cache."""

    def repo_info(self, *args: Any, **settings: Any) -> Any:
        info = super().repo_info(*args, **settings)
        _checked_commit(info.sha)
        return info


def _checked_commit(commit: object, wanted: str | None = None) -> str:
    """Return the commit. Raises _WrongAnswerError if it is none, or another than `wanted`."""
    if not isinstance(commit, str) or not is_commit(commit) or commit != (wanted or commit):
        raise _WrongAnswerError(f"it calls its commit {str(commit)[:80]!r}")
    return commit


def _check_metadata(commit: str) -> None:
    """Make huggingface_hub refuse wrong metadata of this commit's files before it derives names from them."""
    ask = file_download.get_hf_file_metadata

    def checked(*args: Any, **settings: Any) -> Any:
        try:
            found = ask(*args, **settings)
        except HfHubHTTPError as error:
            said = error.response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
            if said is not None:
                _checked_commit(said, commit)
            raise
        if found.commit_hash is not None:  # without one it is no Hub, which huggingface_hub says itself
            _checked_commit(found.commit_hash, commit)
        if found.etag is not None and not _ETAG.fullmatch(found.etag):
            raise _WrongAnswerError(f"it gives a file the ETag {found.etag[:80]!r}")
        if found.size is not None and found.size < 0:
            raise _WrongAnswerError(f"it says that a file has {found.size} bytes")
        return found

    file_download.get_hf_file_metadata = checked


def _pull(request: dict[str, Any], say: Say) -> dict[str, Any]:
    _check_metadata(request["commit"])
    folder = f"{request['subfolder']}/" if request["subfolder"] else ""
    names = [folder + CONFIG_FILE, _weights_name(request, folder)]
    sizes = [_size(request, name) for name in names]
    labels = folder + MODEL_CONFIG_FILE
    total = sum(sizes)
    if total > request["max_bytes"]:
        raise _TooLargeError(total)
    say({"total": total})
    done = 0
    paths = []
    for name in names:
        path = hf_hub_download(
            request["repo"],
            name,
            revision=request["commit"],
            force_download=request["force"],
            tqdm_class=_reporter(say, done, request["max_bytes"]),
        )
        paths.append(path)
        done += Path(path).stat().st_size
        if done > request["max_bytes"]:
            raise _TooLargeError(done)
        say({"done": done})
    more, unused = _defaults(request, folder)
    wanted = {labels: MAX_CONFIG_BYTES} if _names_labels(Path(paths[0])) else {}
    if _has_token_rows(Path(paths[0]), Path(paths[1])):
        wanted |= {folder + name: most for name, most in TOKENIZER_FILES.items()}
    if request.get("signature"):
        wanted[folder + SIGNATURE_FILE] = MAX_SIGNATURE_BYTES
    for name, most in wanted.items():
        size = _size_if_there(request, name)
        if size is not None and size <= most:
            more[name.removeprefix(folder)] = _file(request, name)
        elif size is not None and name == folder + SIGNATURE_FILE:
            unused["large"] = [*unused.get("large", ()), SIGNATURE_FILE]
    sums = [_expected_sum(path) for path in paths]
    return {"paths": paths, "sha256": sums, "more": more, **unused}


def _weights_name(request: dict[str, Any], folder: str) -> str:
    """Return the name of the weights in the repository: PEFT's, or mlx-lm's if it has those alone."""
    own, other = folder + WEIGHTS_FILE, folder + MLX_WEIGHTS_FILE
    cached = [_is_cached(request, name) for name in (own, other)]
    if any(cached):
        return own if cached[0] else other
    try:
        _size(request, own)
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            _size(request, other)
            return other
    return own


def _is_cached(request: dict[str, Any], name: str) -> bool:
    return isinstance(cached_path(request["repo"], name, revision=request["commit"]), str)


def _defaults(request: dict[str, Any], folder: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the path of the file with the adapter's defaults by its name, if the repository has one, and the
    names of files that are not used, by why.

    What the Hub does not answer about is not passed over: the adapter would become another version.
    """
    for name, most in DEFAULTS_FILES.items():
        try:
            size = _size_if_there(request, folder + name)
        except OfflineModeIsEnabled:
            return {}, {"unknown": list(DEFAULTS_FILES)[list(DEFAULTS_FILES).index(name) :]}
        if size is not None:
            return ({name: _file(request, folder + name)}, {}) if size <= most else ({}, {"large": [name]})
    return {}, {}


def _size_if_there(request: dict[str, Any], name: str) -> int | None:
    """Return the size of a file in bytes, or None if the repository has no such file.

    The cache remembers that for a commit, as huggingface_hub does: it serves while the Hub is down.
    """
    cached = cached_path(request["repo"], name, revision=request["commit"])
    if cached is not None and not isinstance(cached, str):
        return None
    try:
        return _size(request, name)
    except EntryNotFoundError:
        of_repo, _ = cached_repo(Path(constants.HF_HUB_CACHE), request["repo"])
        mark = of_repo / ".no_exist" / request["commit"] / name
        with suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return None


def _names_labels(config: Path) -> bool:
    """Return True if the config is a classifier's whose label names another file may have."""
    with config.open("rb") as file:
        return names_labels(file.read(MAX_CONFIG_BYTES + 1))


def _has_token_rows(config: Path, weights: Path) -> bool:
    """Return True if the adapter's tokenizer matters, since it may have rows of its own for tokens."""
    with config.open("rb") as file:
        return has_token_rows(file.read(MAX_CONFIG_BYTES + 1), weights)


def _file(request: dict[str, Any], name: str) -> str:
    """Download a small file and return its path in the cache."""
    return hf_hub_download(request["repo"], name, revision=request["commit"], force_download=request["force"])


def _size(request: dict[str, Any], name: str) -> int:
    """Return the size of a file in bytes, in the cache or on the Hub; 0 if the Hub does not report it."""
    cached = cached_path(request["repo"], name, revision=request["commit"])
    if isinstance(cached, str) and not request["force"]:
        return Path(cached).stat().st_size
    url = hf_hub_url(request["repo"], name, revision=request["commit"])
    for left in reversed(range(_TRIES)):
        try:
            return file_download.get_hf_file_metadata(url).size or 0
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if not left or not _may_pass(error):
                raise
            time.sleep(0.5)
    return 0


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return True


def _expected_sum(path: str) -> str | None:
    """Return the SHA-256 in a cached file's name; None for a small file, which is named by git's hash."""
    name = Path(path).resolve().name
    return name if _SHA256.fullmatch(name) else None


def _reporter(say: Say, before: int, limit: int) -> type[tqdm]:
    """Return a progress bar that draws nothing: it reports bytes, and stops a transfer above the limit."""

    class PullReporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            self.fetched = int(settings.get("initial") or 0)
            super().__init__(*args, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.fetched += int(n or 0)
            if before + self.fetched > limit:
                raise _TooLargeError(before + self.fetched)
            say({"done": before + self.fetched})
            return None

    return PullReporter


def _explain(error: Exception, request: dict[str, Any]) -> tuple[str, str]:
    """Return the error's code (see HubError) and a sentence, without a token or a signed address."""
    repo = request["repo"]
    at = f"{repo}@{request.get('commit') or request.get('revision') or 'main'}"
    if isinstance(error, _SilentHubError):
        return "hub_unreachable", f"{at} is not in the Hub's cache, and {error}."
    if isinstance(error, _WrongAnswerError):
        said = _first_line(error).partition(": ")[2]
        return "hub_wrong_answer", f"{redacted(constants.ENDPOINT)} is not to be trusted with {at}: {said}."
    if isinstance(error, _TooLargeError):
        limit = request["max_bytes"]
        return "hub_too_large", f"The adapter in {at} has {error} bytes or more; {limit} are allowed."
    if isinstance(error, OSError) and error.errno in FULL:
        return "store_full", "No space is left in the Hub's cache (HF_HOME): free some, then try again."
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return (
            "hub_unreachable",
            f"{at} has no place: this server may not write the Hub's cache (HF_HOME).",
        )
    if isinstance(error, GatedRepoError) or _status(error) == 403:
        return "hub_gated", f"{repo} is there, but this server has no access: ask for it, then set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return "hub_not_found", f"The Hub has no revision {at}."
    if _is_refused_token(error):
        return "hub_gated", f"The Hub did not accept this server's HF_TOKEN for {repo}."
    if _status(error) in (401, 404) and not _is_missing_file(error):
        return "hub_not_found", f"The Hub has no repository {repo}; if it is private, set HF_TOKEN."
    if isinstance(error, HFValidationError):
        return "hub_invalid", f"{at} is no name of a repository and a revision."
    if _is_offline(error):
        return "hub_offline", f"{at} is not in the Hub's cache, and HF_HUB_OFFLINE is set."
    if _is_missing_file(error):
        folder = request.get("subfolder") or "its main folder"
        return "hub_no_adapter", f"{at} has no {' and '.join(ADAPTER_FILES)} in {folder}."
    return "hub_unreachable", f"{redacted(constants.ENDPOINT)} gave no {at}: {_first_line(error)}"


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_refused_token(error: Exception) -> bool:
    """Return True if the Hub refused the token. It answers 401 for missing repositories too; huggingface_hub
    tells the two apart by this message."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code != 401:
        return False
    return "Invalid credentials" in error.response.headers.get("X-Error-Message", "")


def _is_missing_file(error: Exception) -> bool:
    return isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError)


def _is_offline(error: BaseException) -> bool:
    return constants.is_offline_mode() or isinstance(error, OfflineModeIsEnabled)


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without what may be secret: queries of addresses, and tokens."""
    first = (str(error).strip() or "no details").splitlines()[0]
    first = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", first)
    return f"{type(error).__name__}: {re.sub(r'hf_[A-Za-z0-9]+', '***', first)[:300]}"


if __name__ == "__main__":
    main()
