"""Parse the name of an adapter on the Hub: `hub:org/repo[@revision][:subfolder]`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = "hub:"

_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,249}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUBFOLDER_LIMIT = 250


HubErrorCode = Literal[
    "hub_invalid", "hub_unreachable", "hub_not_found", "hub_gated", "hub_too_large", "hub_offline",
    "hub_no_adapter", "hub_damaged", "hub_wrong_answer",
]  # fmt: skip


class HubError(Exception):
    """An adapter cannot be fetched from the Hub. `code` is stable:

    hub_invalid        the reference is malformed
    hub_unreachable    the Hub does not answer, too slowly, or with an error; the transfer broke
    hub_not_found      no such repository or revision (the Hub says so of private ones too)
    hub_gated          it exists, but access must be granted, or the token is not accepted
    hub_too_large      the files are larger than allowed
    hub_offline        HF_HUB_OFFLINE is set, and the files are not in the cache
    hub_no_adapter     the repository has no `adapter_config.json` and `adapter_model.safetensors` there
    hub_damaged        the files received do not match the Hub's hash
    hub_wrong_answer   the Hub named a commit or a file as no Hub does; nothing of it was used
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class HubReference:
    """Location of an adapter on the Hub; without a revision, on the repository's default branch."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self) -> None:
        _check_repo(self.repo)
        if self.revision is not None:
            _check_revision(self.revision)
        if self.subfolder is not None:
            _check_subfolder(self.subfolder)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        subfolder = f":{self.subfolder}" if self.subfolder is not None else ""
        return f"{PREFIX}{self.repo}{revision}{subfolder}"


def parse_hub_reference(text: str) -> HubReference:
    """Parse `hub:org/repo[@revision][:subfolder]`. Raises HubError (`hub_invalid`)."""
    if not text.startswith(PREFIX):
        raise HubError("hub_invalid", f"{text[:80]!r}: an adapter on the Hub is named hub:org/repo.")
    place, colon, subfolder = text.removeprefix(PREFIX).partition(":")
    repo, at, revision = place.partition("@")
    return HubReference(repo, revision if at else None, subfolder if colon else None)


def is_commit(revision: str | None) -> bool:
    """Return True if a revision is a commit's full hash, which need not be resolved."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _check_repo(repo: str) -> None:
    parts = repo.split("/")
    allowed = all(_SEGMENT.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
    if len(parts) != 2 or not allowed or len(repo) > 96 or repo.endswith(".git"):
        raise HubError(
            "hub_invalid", f"repo {repo[:120]!r}: use org/name, each of letters, digits, '.', '_' and '-'."
        )


def _check_revision(revision: str) -> None:
    # It becomes part of a URL and of a path in the Hub's cache.
    parts = revision.split("/")
    if not _REVISION.fullmatch(revision) or ".." in revision or "" in parts or "." in parts:
        raise HubError(
            "hub_invalid", f"revision {revision[:120]!r}: use the name of a branch or a tag, or a commit."
        )


def _check_subfolder(subfolder: str) -> None:
    parts = subfolder.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or "\\" in subfolder or not subfolder.isprintable()
    if odd or len(subfolder) > _SUBFOLDER_LIMIT:
        raise HubError(
            "hub_invalid", f"subfolder {subfolder[:120]!r}: use a path inside the repository, such as a/b."
        )


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder of the Hub's cache, by the same variables in the same order as huggingface_hub."""
    chosen = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{_home(environ)}/hub"
    return Path(os.path.expandvars(chosen)).expanduser().absolute()


def hub_token_state(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return a state that changes when another token for the Hub is stored for huggingface_hub.

    It is the inode, the size in bytes and the time of the last write, in nanoseconds; empty without a token.
    """
    token = environ.get("HF_TOKEN_PATH") or f"{_home(environ)}/token"
    try:
        found = Path(os.path.expandvars(token)).expanduser().stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _home(environ: Mapping[str, str]) -> str:
    return environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"


def cached_repo(cache: Path, repo: str) -> tuple[Path, Path]:
    """Return a repository's own folders in the Hub's cache: its content, and its locks."""
    name = f"models--{repo.replace('/', '--')}"
    return cache / name, cache / ".locks" / name


def shared_blobs(cache: Path) -> Path:
    """Return the folder of blobs that several repositories of the cache share; other programs may use it."""
    return cache / "blobs"
