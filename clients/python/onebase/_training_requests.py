"""From what the caller wants of training to what is sent: pure functions, shared by both clients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

from ._multipart import Multipart
from ._requests import Body, Call, encode
from .adapter_types import Progress, ProgressCallback
from .errors import InvalidResponseError
from .training_types import Activate, TrainingMethod, TrainingSettings
from .types import Model

FILES: Final = "/v1/files"
JOBS: Final = "/v1/fine_tuning/jobs"

_FILE_ID: Final = re.compile(r"file-[A-Za-z0-9_-]+")


# ---- files -------------------------------------------------------------------------------------------


def source(given: str | Path, argument: str) -> str | Path:
    """The id of a file that the server has, or the path of one to send.

    Raises:
        ValueError: it is neither; the message says what is wanted.
    """
    path = Path(given).expanduser()
    if isinstance(given, str) and _FILE_ID.fullmatch(given) and not path.is_file():
        return given
    return existing(path, argument, "; or the id of one that was uploaded (file-...)")


def existing(given: str | Path, argument: str, otherwise: str = "") -> Path:
    """The path of a file to send.

    Raises:
        ValueError: there is none; the message says what is wanted.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    found = "is a folder" if path.is_dir() else "is not there"
    wanted = "give the path of a .jsonl, .json, .csv or .parquet file"
    raise ValueError(f"{argument}: {path} {found}: {wanted}{otherwise}")


def upload(path: Path, progress: ProgressCallback | None) -> Call:
    """The call that sends a file. It is not idempotent: done twice it makes two."""

    def sent(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("uploading", done / total, done, total))

    return Call("POST", FILES, Multipart([("purpose", "fine-tune")], "file", (path,), sent))


def list_files(purpose: str | None, after: str | None, limit: int) -> Call:
    return Call("GET", _query(FILES, purpose=purpose, after=after, limit=str(limit)))


def file(file_id: str, *rest: str) -> Call:
    return Call("GET", _path(FILES, file_id, *rest))


def delete_file(file_id: str) -> Call:
    return Call("DELETE", _path(FILES, file_id))


# ---- jobs --------------------------------------------------------------------------------------------


def base_of(models: Sequence[Model]) -> str:
    """The name of the base, which a server lists first.

    Raises:
        InvalidResponseError: it lists nothing.
    """
    if not models:
        raise InvalidResponseError("the server lists no models: there must at least be its base")
    return models[0].id


def check_settings(settings: TrainingSettings) -> Body:
    """The settings as JSON, looked at before anything is sent.

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


def create(
    model: str,
    training_file: str,
    validation_file: str | None,
    *,
    name: str | None,
    activate: Activate,
    method: TrainingMethod,
    seed: int | None,
    metadata: Mapping[str, str] | None,
    settings: Body,
) -> Call:
    """The call that makes a job. It is not idempotent: done twice it makes two."""
    body: Body = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "name": name,
        "activate": activate,
        "method": {"type": method, method: {"hyperparameters": settings}},
        "seed": seed,
        "metadata": None if metadata is None else dict(metadata),
    }
    return Call("POST", JOBS, encode({key: value for key, value in body.items() if value is not None}))


def list_jobs(metadata: Mapping[str, str] | None, after: str | None, limit: int) -> Call:
    labels = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
    return Call("GET", _query(JOBS, after=after, limit=str(limit), **labels))


def job(job_id: str) -> Call:
    return Call("GET", _path(JOBS, job_id))


def change(job_id: str, action: str) -> Call:
    """`cancel`, `pause` or `resume`. Asked for twice, each does no more than once."""
    return Call("POST", _path(JOBS, job_id, action), idempotent=True)


def events(job_id: str, after: str | None, limit: int) -> Call:
    return Call("GET", _query(_path(JOBS, job_id, "events"), after=after, limit=str(limit)))


def checkpoints(job_id: str, after: str | None, limit: int) -> Call:
    return Call("GET", _query(_path(JOBS, job_id, "checkpoints"), after=after, limit=str(limit)))


def stream_events(job_id: str, after: str | None) -> Call:
    """The call for events as they happen, from the one behind `after` on."""
    headers = [("Accept", "text/event-stream"), ("Cache-Control", "no-store")]
    if after is not None:
        headers.append(("Last-Event-ID", after))
    return Call("GET", _path(JOBS, job_id, "events"), headers=tuple(headers))


def _path(*parts: str) -> str:
    if not all(parts):
        raise ValueError("the id of a job or a file is empty")
    first, *rest = parts
    return "/".join([first, *(quote(part, safe="") for part in rest)])


def _query(path: str, **fields: str | None) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
