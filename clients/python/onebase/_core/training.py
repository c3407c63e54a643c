"""Training: what is sent about files and jobs, and what the answers mean."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from msgspec.structs import replace

from ..adapter_types import Progress, ProgressCallback
from ..errors import APIStatusError, InvalidResponseError
from ..training_types import (
    Activate,
    CurvePoint,
    Purpose,
    TrainingEvent,
    TrainingFile,
    TrainingMethod,
    TrainingProgress,
    TrainingSettings,
)
from ..types import Model
from .requests import Body, Call, UploadForm, encode

FILES: Final = "/v1/files"
JOBS: Final = "/v1/fine_tuning/jobs"

NO_FILE: Final = "file-none"
"""The id of no file: a server's ids are hexadecimal."""
FILE_NOT_FOUND: Final = "file_not_found"

KINDS: Final = ".jsonl, .json, .csv or .parquet"
_SAME: Final = 100
_FILE_ID: Final = re.compile(r"file-[A-Za-z0-9_-]+")


# ---- files -------------------------------------------------------------------------------------------


def source(given: str | Path, argument: str, kinds: str = KINDS) -> str | Path:
    """Return the id of a file that the server has, or the path of one to send.

    Raises:
        ValueError: it is neither.
    """
    path = Path(given).expanduser()
    if isinstance(given, str) and _FILE_ID.fullmatch(given) and not path.is_file():
        return given
    return existing(path, argument, kinds, ", or the id of an uploaded one (file-...)")


def existing(given: str | Path, argument: str, kinds: str = KINDS, otherwise: str = "") -> Path:
    """Return the path of a file to send, of one of these kinds.

    Raises:
        ValueError: there is none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    found = "is a folder" if path.is_dir() else "is not there"
    raise ValueError(f"{argument}: {path} {found}: give the path of a {kinds} file{otherwise}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_content(digest: str, purpose: Purpose) -> Call:
    """Return the call for the files that have this content, the oldest first."""
    return Call("GET", query_of(FILES, purpose=purpose, sha256=digest, order="asc", limit=str(_SAME)))


def one_of(files: Sequence[TrainingFile], digest: str, filename: str) -> TrainingFile | None:
    """Return the first that has this content and this name. A server that cannot look by content lists
    others."""
    return next((one for one in files if one.sha256 == digest and one.filename == filename), None)


def upload(path: Path, purpose: Purpose, progress: ProgressCallback | None) -> Call:
    """Return the call that sends a file. It is not idempotent: sent twice, it makes two files."""

    size = path.stat().st_size

    def sent(done: int, total: int) -> None:
        if progress is not None:
            # What is sent has a form around the file, whose own bytes nobody asks for.
            progress(Progress("uploading", done / total, min(done, size), size, path.name))

    return Call("POST", FILES, UploadForm({"purpose": purpose}, "file", (path,), sent))


def list_files(purpose: str | None, after: str | None, limit: int) -> Call:
    return Call("GET", query_of(FILES, purpose=purpose, after=after, limit=str(limit)))


def file(file_id: str, *rest: str) -> Call:
    return Call("GET", path_of(FILES, file_id, *rest))


def delete_file(file_id: str) -> Call:
    return Call("DELETE", path_of(FILES, file_id))


# ---- jobs --------------------------------------------------------------------------------------------


def base_of(models: Sequence[Model]) -> str:
    """Return the name of the base. A server lists it first.

    Raises:
        InvalidResponseError: it lists nothing.
    """
    if not models:
        raise InvalidResponseError("the server lists no models, not even its base")
    return models[0].id


def check_settings(settings: TrainingSettings) -> Body:
    """Return the settings as JSON, checked before anything is sent.

    Raises:
        TypeError: a name is no setting; a value cannot be sent.
        ValueError: a number is not finite.
    """
    known = TrainingSettings.__annotations__
    for name in settings:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}; there are: {', '.join(known)}")
    plain = {name: _plain(value) for name, value in settings.items()}
    encode(plain)
    return plain


def was_refused(error: BaseException | None) -> bool:
    """Return True if there is certainly no job. After a lost connection there may be one that needs its
    files."""
    return isinstance(error, APIStatusError | TypeError | ValueError)


def job_body(
    model: str,
    *,
    name: str | None,
    activate: Activate,
    method: TrainingMethod,
    seed: int | None,
    metadata: Mapping[str, str] | None,
    hold: bool,
    settings: Body,
    grader: Mapping[str, Any] | None = None,
) -> Body:
    """Return the request for a job, without its files."""
    chosen = {"hyperparameters": settings} | ({} if grader is None else {"grader": dict(grader)})
    return {
        "model": model,
        "name": name,
        "activate": activate,
        "method": {"type": method, method: chosen},
        "seed": seed,
        "metadata": None if metadata is None else dict(metadata),
        "hold": True if hold else None,
    }


def create(body: Body, training_file: str, validation_file: str | None) -> Call:
    """Return the call that makes a job. It is not idempotent: sent twice, it makes two jobs."""
    whole = {**body, "training_file": training_file, "validation_file": validation_file}
    return Call("POST", JOBS, encode({key: value for key, value in whole.items() if value is not None}))


def list_jobs(metadata: Mapping[str, str] | None, after: str | None, limit: int) -> Call:
    labels = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
    return Call("GET", query_of(JOBS, after=after, limit=str(limit), **labels))


def job(job_id: str) -> Call:
    return Call("GET", path_of(JOBS, job_id))


def change(job_id: str, action: str) -> Call:
    """Return the call for `cancel`, `pause`, `resume` or `stop`. Each is idempotent."""
    return Call("POST", path_of(JOBS, job_id, action), idempotent=True)


def events(job_id: str, after: str | None, limit: int) -> Call:
    return Call("GET", query_of(path_of(JOBS, job_id, "events"), after=after, limit=str(limit)))


def checkpoints(job_id: str, after: str | None, limit: int) -> Call:
    return Call("GET", query_of(path_of(JOBS, job_id, "checkpoints"), after=after, limit=str(limit)))


def stream_events(job_id: str, after: str | None) -> Call:
    """Return the call for events as they happen, beginning after the event `after`."""
    headers = [("Accept", "text/event-stream"), ("Cache-Control", "no-store")]
    if after is not None:
        headers.append(("Last-Event-ID", after))
    return Call("GET", path_of(JOBS, job_id, "events"), headers=tuple(headers))


def path_of(*parts: str) -> str:
    if not all(parts):
        raise ValueError("the id of a job, a batch or a file is empty")
    first, *rest = parts
    return "/".join([first, *(quote(part, safe="") for part in rest)])


def query_of(path: str, **fields: str | None) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# ---- answers -----------------------------------------------------------------------------------------


def progressed(progress: TrainingProgress | None, event: TrainingEvent) -> TrainingProgress | None:
    """Return the progress after an event: its figures replace those that were known, unless they are older.

    They are where the job was looked at since: the server's answer has what later events will say.
    """
    names = {
        "step": "step",
        "total_steps": "steps",
        "train_loss": "loss",
        "valid_loss": "eval_loss",
        "tokens_per_second": "tokens_per_second",
        "seconds_left": "seconds_left",
    }
    new = {ours: event.data[theirs] for theirs, ours in names.items() if event.data.get(theirs) is not None}
    if event.type != "metrics" or not new or (progress and new.get("step", progress.step) < progress.step):
        return progress
    return replace(progress or TrainingProgress(), **new)


def curve_of_file(content: bytes) -> tuple[CurvePoint, ...]:
    """Return the losses in a result file.

    Raises:
        InvalidResponseError: it is no such file.
    """
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        return tuple(
            CurvePoint(int(row["step"]), _number(row["train_loss"]), _number(row["valid_loss"]))
            for row in rows
        )
    except (KeyError, ValueError, csv.Error) as error:
        raise InvalidResponseError(f"the result file is no curve: {error}") from error


def curve_of_events(events: Sequence[TrainingEvent]) -> tuple[CurvePoint, ...]:
    """Return the losses in events of any order. Of a step that was done twice, the newer ones."""
    found: dict[int, CurvePoint] = {}
    for one in sorted(events, key=lambda event: event.id):
        if one.type != "metrics" or "step" not in one.data:
            continue
        step = int(one.data["step"])
        known = found.get(step, CurvePoint(step, None, None))
        train, valid = one.data.get("train_loss"), one.data.get("valid_loss")
        found[step] = CurvePoint(
            step,
            known.train_loss if train is None else float(train),
            known.valid_loss if valid is None else float(valid),
        )
    return tuple(found[step] for step in sorted(found))


def _number(text: str | None) -> float | None:
    return float(text) if text else None
