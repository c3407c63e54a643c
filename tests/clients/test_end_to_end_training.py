"""An adapter is trained through the SDK, against the real server: a small base, a tiny job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.clients.real_server import Server

from onebase import (
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    TrainingFailedError,
    TrainingJobInfo,
    TrainingStoppedError,
)

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(12)]
TINY: dict[str, Any] = {
    "r": 4, "targets": "q_proj,v_proj", "batch_size": 2, "max_length": 64, "eval_every": 2, "eval_split": 0.2,
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Path:
    file = tmp_path / 'rows "é".jsonl'
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


def test_a_job_is_followed_paused_resumed_and_ends_as_an_adapter_that_answers(
    client: Client, train: Path
) -> None:
    name = "sums"
    metadata = {"team": "arithmetic"}
    # 200 steps: it is not over before it is paused.
    settings = TINY | {"epochs": 40, "eval_every": 100}
    job = client.training.create(train, name=name, activate="always", seed=3, metadata=metadata, **settings)
    assert (job.name, job.status, job.info.seed) == (name, "validating_files", 3)
    assert client.files.get(job.info.training_file).filename == "rows %22é%22.jsonl"
    with pytest.raises(ConflictError):
        client.files.delete(job.info.training_file)

    told = []
    with job.stream_events() as events:
        for event in events:
            told.append(event)
            if "train_loss" in event.data:
                job.pause()
                break
    assert told[0].message == "The job is created; its files are checked."
    with pytest.raises(TrainingStoppedError) as stopped:
        job.wait(progress=False)
    assert stopped.value.code == "paused"
    assert job.resumable

    seen: list[TrainingJobInfo] = []
    job.resume().wait(progress=seen.append)
    assert (job.status, job.activated, job.progress and job.progress.step) == ("succeeded", True, 200)
    assert job.report is not None
    assert (job.report.steps, job.report.parameters) == (200, 1792)
    assert job.report.loss_before is not None
    assert job.report.loss_after is not None
    steps = [one.progress.step for one in seen if one.progress and one.status == "running"]
    assert steps == sorted(steps)

    told = list(job.stream_events())
    assert [event.id for event in told] == [event.id for event in job.events(limit=None)[::-1]]
    assert [event.id for event in job.stream_events(after=told[4].id)] == [event.id for event in told[5:]]
    curve = job.curve()
    assert [point.step for point in curve] == list(range(201))
    assert curve[0].valid_loss == pytest.approx(job.report.loss_before)
    found = client.training.list(metadata=metadata)
    assert [one.id for one in found] == [job.id]

    answer = client.generate("What is 2 and 2?", adapter=name, max_tokens=4)
    assert answer.adapter == job.fine_tuned_model
    client.files.delete(job.info.training_file)
    client.adapters.delete(name, force=True)


@pytest.mark.parametrize("sdk", ["async"], indirect=True)
def test_a_file_with_bad_lines_fails_with_each_of_them(sdk: Any, server: Server, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ROWS[0]) + '\n{"prompt": 3}\nno json\n')

    async def run(client: AsyncClient) -> Any:
        job = await client.training.create(bad, name="bad")
        with pytest.raises(TrainingFailedError) as caught:
            await job.wait(progress=False)
        return caught.value, await job.events()

    error, events = sdk.call(run, url=server.url)
    assert (error.code, error.param) == ("invalid_file", "training_file")
    assert "line 2" in error.message
    assert "line 3" in error.message
    assert not error.job.resumable
    (problems,) = [event.data["problems"] for event in events if "problems" in event.data]
    assert [problem["line"] for problem in problems] == [2, 3]


def test_a_setting_that_the_server_refuses_leaves_no_file_behind(
    sdk: Any, server: Server, train: Path
) -> None:
    def files() -> Any:
        return sdk.call(lambda client: client.files.list(), url=server.url)

    before = files()
    with pytest.raises(BadRequestError) as caught:
        sdk.call(lambda client: client.training.create(train, r=0), url=server.url)
    assert caught.value.param == "method.supervised.hyperparameters.r"
    assert files() == before
