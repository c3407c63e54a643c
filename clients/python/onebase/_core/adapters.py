"""Adapters: which folder can be sent, what is sent, what the answers mean, how to wait for a version."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal
from urllib.parse import quote, urlencode

from msgspec import to_builtins

from ..adapter_types import (
    FAILED,
    Activation,
    AdapterVersion,
    Progress,
    ProgressCallback,
    RolloutJudge,
    RolloutRules,
    SliceScore,
    VersionFile,
    VersionFiles,
)
from ..errors import AdapterRejectedError, InvalidResponseError, UnprocessableError
from ..types import AdapterWeight
from .config import UNSET, Unset
from .requests import Body, Call, UploadForm, encode

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MLX_WEIGHTS: Final = "adapters.safetensors"
PICKLE: Final = "adapter_model.bin"
MODEL_CONFIG: Final = "config.json"
TOKENIZER: Final = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
}
"""Files of a tokenizer, and the largest size of each, in bytes, that the server reads."""
SIGNATURE: Final = "model.sig"
DEFAULTS: Final = ("onebase.json", "io.yaml", "Modelfile")
"""Files with an adapter's defaults, of which the server reads the first one."""
MOST_CONFIG_BYTES: Final = 1 << 20
MOST_HEADER_BYTES: Final = 2 << 20
_OF_TOKENS: Final = re.compile(rb"embed|head|wte|tok|output")
"""Part of the name of an embedding or a head."""
_CLASSIFIERS: Final = ("SEQ_CLS", "TOKEN_CLS")

LIST: Final = Call("GET", "/v1/adapters")

FIRST_POLL_S: Final = 0.1
LONGEST_POLL_S: Final = 2.0

# ---- a folder ----------------------------------------------------------------------------------------

_WANTED: Final = "give a folder with both files, as `PeftModel.save_pretrained` writes them."


@dataclass(frozen=True)
class AdapterFolder:
    """The two files of an adapter, as PEFT or mlx-lm saves them. labels: of a classifier, a file that names
    them. tokenizer: files of an adapter that may have tokens of its own. defaults: file with its defaults.
    signature: by OpenSSF Model Signing."""

    config: Path
    weights: Path
    labels: Path | None = None
    tokenizer: tuple[Path, ...] = ()
    defaults: Path | None = None
    signature: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are sent, the weights last."""
        small = (file for file in (self.labels, self.defaults, self.signature) if file is not None)
        return (self.config, *small, *self.tokenizer, self.weights)


def adapter_folder(path: str | Path) -> AdapterFolder:
    """Return the adapter in a folder.

    Raises:
        ValueError: the folder holds none. The message says what is missing and what to do.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: give a folder that holds {CONFIG} and {WEIGHTS}")
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / MLX_WEIGHTS).is_file():
        weights = folder / MLX_WEIGHTS  # which the server converts
    missing = [name for name in (CONFIG, weights.name) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {' and '.join(missing)}{_remedy(folder, missing)}")
    config = _config_of(folder)
    labels = folder / MODEL_CONFIG
    named = labels if config.get("task_type") in _CLASSIFIERS and labels.is_file() else None
    found = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    tokenizer = _small_enough(found) if found and _has_token_rows(config, weights) else ()
    defaults = next((folder / name for name in DEFAULTS if (folder / name).is_file()), None)
    signature = folder / SIGNATURE if (folder / SIGNATURE).is_file() else None
    return AdapterFolder(folder / CONFIG, weights, named, tokenizer, defaults, signature)


def _small_enough(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files of a tokenizer that the server reads, and warn about others."""
    large = [file for file in files if file.stat().st_size > TOKENIZER[file.name]]
    for file in large:
        warnings.warn(f"{file} is over {TOKENIZER[file.name]} bytes and is not sent", stacklevel=4)
    return tuple(file for file in files if file not in large)


def _config_of(folder: Path) -> Mapping[str, object]:
    """Return the fields of the config; none if it is no object, which the server will say."""
    if (folder / CONFIG).stat().st_size > MOST_CONFIG_BYTES:
        return {}
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _has_token_rows(config: Mapping[str, object], weights: Path) -> bool:
    """Return True if the adapter may have rows of its own for tokens, so that the server reads its
    tokenizer."""
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        return True
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MOST_HEADER_BYTES else b""
    return _OF_TOKENS.search(header) is not None


def _remedy(folder: Path, missing: list[str]) -> str:
    if WEIGHTS in missing and (folder / PICKLE).is_file():
        return f", it only has {PICKLE}.\n{_conversion(folder)}"
    found = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]
    inside = sorted(str(one.parent.relative_to(folder)) for one in found)
    if inside:
        return f". Did you mean a folder in it? {', '.join(inside[:5])}"
    if any(folder.glob("model*.safetensors")):
        return f".\nIt holds a whole model. To send an adapter, {_WANTED}"
    return f".\nTo send an adapter, {_WANTED}"


def _conversion(folder: Path) -> str:
    old, new = str(folder / PICKLE), str(folder / WEIGHTS)
    program = (
        f"import torch, safetensors.torch as s; s.save_file(torch.load({old!r}, weights_only=True), {new!r})"
    )
    return (
        "OneBase opens no pickle files, since they can run code. Convert it once, where torch is installed:\n"
        f"  python -c {shlex.quote(program)}"
    )


# ---- a download --------------------------------------------------------------------------------------


class Download:
    """Writes a version's files into a new folder as they arrive, and checks that they are that version's.

    For a `with` block, which closes what is open. `next` begins a file; `write` takes its bytes.
    """

    def __init__(self, listing: VersionFiles, folder: Path, progress: ProgressCallback | None) -> None:
        self._listing = listing
        self._folder = folder
        self._progress = progress
        self._done = 0
        self._sum = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Download:
        self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def next(self, file: VersionFile) -> None:
        """Begin one file, under its own name."""
        if file.name not in (CONFIG, WEIGHTS):  # the server must not choose where this process writes
            raise InvalidResponseError(f"the server names a file {file.name[:80]!r}, which no adapter has")
        self._sum, self._file = hashlib.sha256(), (self._folder / file.name).open("wb")

    def write(self, chunk: bytes) -> None:
        """Take more of it. Raises InvalidResponseError beyond the length that was announced."""
        self._done += len(chunk)
        if self._file is None or self._done > self._listing.bytes:
            raise InvalidResponseError("the server sent more than it announced")
        self._file.write(chunk)
        self._sum.update(chunk)
        if self._progress is not None:
            total = self._listing.bytes
            self._progress(Progress("downloading", self._done / total, self._done, total))

    def add_signature(self) -> None:
        """Write the version's signature, if it has one."""
        if self._listing.signature is not None:
            (self._folder / SIGNATURE).write_text(self._listing.signature, encoding="utf-8")

    def finish(self, file: VersionFile) -> None:
        """End it. Raises InvalidResponseError if it is not what the server announced."""
        if self._file is not None:
            self._file.close()
        if self._sum.hexdigest() != file.sha256:
            raise InvalidResponseError(f"{file.name} arrived damaged: try again")


def check_listing(listing: VersionFiles) -> VersionFiles:
    """Return the listing, if its sums are those that its version is named by. Raises InvalidResponseError."""
    total = hashlib.sha256()
    sums = {file.name: file.sha256 for file in listing.files}
    try:
        for name in (CONFIG, WEIGHTS):
            total.update(name.encode() + b"\0" + bytes.fromhex(sums[name]))
    except (KeyError, ValueError) as error:
        raise InvalidResponseError(f"the server does not list {CONFIG} and {WEIGHTS}") from error
    if total.hexdigest() != listing.version or len(listing.files) != len(sums):
        raise InvalidResponseError(f"the files that the server lists are not those of {listing.version[:12]}")
    return listing


# ---- requests ----------------------------------------------------------------------------------------


def retrieve(name: str) -> Call:
    return Call("GET", _path(name))


def versions(name: str) -> Call:
    return Call("GET", _path(name, "versions"))


def version(name: str, digest: str, wait: float = 0.0) -> Call:
    """`wait`: seconds that the server may take until the version is ready, or has failed."""
    query = f"?{urlencode({'wait_seconds': round(wait, 3)})}" if wait else ""
    return Call("GET", _path(name, "versions", digest) + query)


def files(name: str, digest: str) -> Call:
    return Call("GET", _path(name, "versions", digest, "files"))


def file(name: str, digest: str, file: str) -> Call:
    return Call("GET", _path(name, "versions", digest, "files", file))


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
    defaults: Mapping[str, object] | None = None,
) -> Call:
    """Return the call that sends a folder. The same content makes the same version, so it may be sent twice.

    Raises:
        TypeError, ValueError: JSON cannot carry a default.
    """
    flags = _flags(activate=activate, allow_noop=allow_noop, any_base=any_base)
    own = {"defaults": encode(dict(defaults)).decode()} if defaults else {}
    form = UploadForm(
        {"name": name} | own | dict.fromkeys(flags, "true"),
        "files",
        folder.files,
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
    """Return the call that makes the server fetch a Hub repository.

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


def merge(
    parents: Mapping[str, float] | Sequence[AdapterWeight],
    name: str,
    *,
    method: str,
    density: float | None,
    sign: str | None,
    seed: int | None,
    activate: bool,
    allow_noop: bool,
) -> Call:
    """Return the call that makes one version of several. The same call makes the same version.

    Raises:
        ValueError: fewer than two adapters, or a value that JSON cannot carry.
    """
    if isinstance(parents, Mapping):
        parents = [AdapterWeight(parent, weight) for parent, weight in parents.items()]
    terms = [{"name": parent.name, "weight": parent.weight} for parent in parents]
    if len(terms) < 2:
        raise ValueError("parents: give at least two to be merged, each with its weight")
    body: Body = {"name": name, "adapters": terms, "method": method}
    given = {"density": density, "sign": sign, "seed": seed}
    body |= {key: value for key, value in given.items() if value is not None}
    body |= _flags(activate=activate, allow_noop=allow_noop)
    return Call("POST", "/v1/adapters/merge", encode(body), idempotent=True)


def activate(name: str, digest: str, expected: str | Unset | None) -> Call:
    return _post({"version": digest} | _expected(expected), name, "activate")


def rollback(name: str, expected: str | Unset | None) -> Call:
    return _post(_expected(expected), name, "rollback")


def deactivate(name: str) -> Call:
    return _post({}, name, "deactivate")


def pin(name: str, pinned: bool) -> Call:
    """Idempotent: it says what shall be, not what shall change."""
    return Call("POST", _path(name, "pin"), encode({"pinned": pinned}), idempotent=True)


def share(name: str, shared: bool) -> Call:
    """Idempotent, as `pin`."""
    return Call("POST", _path(name, "share"), encode({"shared": shared}), idempotent=True)


def start_rollout(
    name: str,
    version: str,
    *,
    percent: float,
    shadow: float,
    by: str,
    promote: bool,
    rules: RolloutRules | Mapping[str, object] | None,
    judge: RolloutJudge | Mapping[str, object] | None,
    refusal_phrases: Sequence[str] | None,
) -> Call:
    body: Body = {"version": version, "percent": percent, "shadow": shadow, "by": by, "promote": promote}
    for field, value in (("rules", rules), ("judge", judge)):
        if value is not None:
            body[field] = to_builtins(value)
    if refusal_phrases is not None:
        body["refusal_phrases"] = list(refusal_phrases)
    return _post(body, name, "rollout")


def rollout(name: str) -> Call:
    return Call("GET", _path(name, "rollout"))


def rollouts(name: str) -> Call:
    return Call("GET", _path(name, "rollouts"))


def change_rollout(name: str, percent: float | None, shadow: float | None) -> Call:
    """Idempotent, as `pin`."""
    given = {"percent": percent, "shadow": shadow}
    body: Body = {field: value for field, value in given.items() if value is not None}
    if not body:
        raise ValueError("give percent, shadow, or both")
    return Call("POST", _path(name, "rollout", "share"), encode(body), idempotent=True)


def end_rollout(name: str, how: Literal["promote", "rollback"]) -> Call:
    return _post({}, name, "rollout", how)


def feedback(answer: str, score: float | None, thumb: str | None) -> Call:
    """Idempotent: the last score of an answer counts."""
    if (score is None) == (thumb is None):
        raise ValueError("give either score (0 to 1) or thumb (up or down)")
    given = {"score": score} if thumb is None else {"thumb": thumb}
    return Call("POST", "/v1/feedback", encode({"id": answer, **given}), idempotent=True)


def bom(name: str, digest: str) -> Call:
    return Call("GET", _path(name, "versions", digest, "bom"))


def gates(name: str, digest: str) -> Call:
    return Call("GET", _path(name, "versions", digest, "gates"))


def approve(name: str, digest: str, approved: bool) -> Call:
    """Idempotent, as `pin`."""
    path = _path(name, "versions", digest, "approval")
    return Call("POST" if approved else "DELETE", path, encode({}) if approved else None, idempotent=True)


def evaluation(
    name: str,
    digest: str,
    against: str | None,
    metric: str,
    slices: Sequence[SliceScore],
    data: str | None = None,
) -> Call:
    body: Body = {"against": against, "metric": metric, "slices": [to_builtins(one) for one in slices]}
    if data is not None:
        body = {**body, "data": data}
    return _post(body, name, "versions", digest, "evaluation")


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
    """Return the flags that are set. The server's default is false."""
    return {name: True for name, value in flags.items() if value}


def _sent(done: int, total: int) -> Progress:
    return Progress("uploading", done / total, done, total)


# ---- waiting -----------------------------------------------------------------------------------------


class Waiting:
    """Waits for one version: how often to ask, and what each answer means. The caller asks and sleeps.

    The server holds each answer back until the next question would be due, or there is nothing to wait for.
    """

    def __init__(self, version: AdapterVersion, progress: ProgressCallback | None) -> None:
        self.version = version
        self._progress = progress
        self._shown: Progress | None = None
        self._delay = FIRST_POLL_S
        self._due = 0.0
        """Time at which the next question may be asked, on the monotonic clock."""
        self._show()

    @property
    def over(self) -> bool:
        """Return True if the version is ready.

        Raises:
            AdapterRejectedError: the version failed.
        """
        if self.version.state == FAILED:
            raise rejected(self.version)
        return self.version.finished

    def note_answer(self, version: AdapterVersion) -> None:
        """Record the server's newest answer. After a new state the next question comes soon."""
        if version.state != self.version.state:
            self._delay = FIRST_POLL_S
        self.version = version
        self._show()

    def question(self) -> Call:
        """Return the next request. The time that it may take grows from one to the next."""
        delay, self._delay = self._delay, min(LONGEST_POLL_S, self._delay * 1.5)
        self._due = time.monotonic() + delay
        return version(self.version.name, self.version.version, delay)

    def rest(self) -> float:
        """Return the seconds until the next question: more than none where the server did not wait."""
        return 0.0 if self.version.finished else max(0.0, self._due - time.monotonic())

    def _show(self) -> None:
        now, known = Progress(self.version.state), self.version.progress
        if known is not None and not self.version.finished:
            now = Progress(known.stage, known.fraction)
        if self._progress is not None and now != self._shown:
            self._progress(now)
        self._shown = now


def was_active(version: AdapterVersion, history: Sequence[Activation]) -> bool:
    """Return True if the version was ever active, even if another one is now."""
    return any(entry.version == version.version for entry in history)


def rejected(version: AdapterVersion) -> AdapterRejectedError:
    """Return the error for a version that failed."""
    what = version.name if version.is_pull else version.id
    failure = version.error
    if failure is None:
        message = f"{what} failed, and the server does not say why"
        return AdapterRejectedError(message, code=None, version=version)
    return AdapterRejectedError(f"{what}: {failure.message}", code=failure.code, version=version)


def refused(error: UnprocessableError) -> AdapterRejectedError:
    """Return the error for files that the server refused before they became a version."""
    return AdapterRejectedError(error.message, code=error.code, version=None)
