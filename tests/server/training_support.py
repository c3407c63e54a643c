"""Jobs for tests: what to upload, how to wait, what was told."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai import OpenAI

from .support import PATIENCE, Server

BASE = "smollm2-135m-instruct"


def job_folder(data_dir: Path, job_id: str) -> Path:
    """Where a job's run writes, on a data folder that was used with one registry."""
    (registry,) = (data_dir / "training").glob("registry-*")
    return registry / job_id


def blobs(data_dir: Path) -> dict[str, Path]:
    """What the store of a data folder holds, and its temporary files."""
    return {path.name: path for part in ("blobs", "tmp") for path in (data_dir / "store" / part).iterdir()}


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def openai_client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def add_file(client: OpenAI, content: str, name: str = "rows.jsonl") -> str:
    """A training file; returns its id."""
    return client.files.create(file=(name, io.BytesIO(content.encode())), purpose="fine-tune").id


def make_job(client: OpenAI, content: str, **body: Any) -> Any:
    """A job on a file of this content, under OpenAI's fields and, as `extra`, ours."""
    extra = body.pop("extra", None)
    file = add_file(client, content)
    model = body.pop("model", BASE)
    return client.fine_tuning.jobs.create(model=model, training_file=file, extra_body=extra, **body)


def wait_job(
    server: Server, client: OpenAI, job_id: str, until: Callable[[Any], bool], seconds: float = PATIENCE
) -> Any:
    """The job once `until` holds for it."""
    found: list[Any] = []

    def look() -> bool:
        found.append(client.fine_tuning.jobs.retrieve(job_id))
        if until(found[-1]):
            return True
        assert found[-1].status != "failed", found[-1].error  # nothing more will come
        return False

    server.wait_for(look, seconds)
    return found[-1]


def ended(job: Any) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


def run_job(server: Server, client: OpenAI, content: str, **body: Any) -> Any:
    """A job from beginning to end."""
    return wait_job(server, client, make_job(client, content, **body).id, ended)


def step_of(job: Any) -> int:
    """The step that a job has come to."""
    return int((getattr(job, "progress", None) or {}).get("step") or 0)


def messages(client: OpenAI, job_id: str) -> list[str]:
    """All that a job told, oldest first."""
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))
    return [event.message for event in reversed(events)]


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
