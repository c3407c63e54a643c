"""Following a job: connections that break, servers that are started again, and all the ways a job can end."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest
from tests.clients.registry_double import RefusalError
from tests.clients.training_double import FAILURE, Trainer, cut, event, job_id, sse, step, succeeded

from onebase import (
    APIConnectionError,
    AsyncClient,
    AsyncTrainingJob,
    Client,
    InvalidResponseError,
    NotFoundError,
    ServerUnavailableError,
    Timeout,
    TrainingFailedError,
    TrainingJob,
    TrainingJobInfo,
    TrainingStoppedError,
)
from onebase._core.retry import RECONNECTS

pytestmark = pytest.mark.usefixtures("slept")
ID = job_id(1)
TOLD = [event(number, f"message {number}") for number in range(1, 8)]


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def url(serve: Callable[..., Any], trainer: Trainer) -> str:
    return str(serve(trainer.script).url)


@pytest.fixture
def follow(sdk: Any, url: str) -> Callable[..., Any]:
    """Reads the events of the job to their end; gives their messages, and the job as it ended."""

    def read(client: Client, job: TrainingJob, after: str | None, seen: list[str]) -> Any:
        events = job.stream_events(after=after)
        for one in events:
            seen.append(one.message)
        return seen, events.job

    async def aread(client: AsyncClient, after: str | None, seen: list[str]) -> Any:
        job = await client.training.get(ID)
        async with job.stream_events(after=after) as events:
            async for one in events:
                seen.append(one.message)
        return seen, events.job

    def run(after: str | None = None, seen: list[str] | None = None, **options: Any) -> Any:
        found = [] if seen is None else seen
        if sdk.asynchronous:
            return sdk.call(lambda client: aread(client, after, found), url=url, **options)
        return sdk.call(
            lambda client: read(client, client.training.get(ID), after, found), url=url, **options
        )

    return run


@pytest.fixture
def wait(sdk: Any, url: str) -> Callable[..., Any]:
    """Waits for the job; gives its handle."""

    def action(client: Any, progress: Any) -> Any:
        found = client.training.get(ID)
        if not sdk.asynchronous:
            return found.wait(progress=progress)

        async def go() -> AsyncTrainingJob:
            return await (await found).wait(progress=progress)

        return go()

    def run(progress: Any = False, **options: Any) -> Any:
        return sdk.call(lambda client: action(client, progress), url=url, **options)

    return run


# ---- connections that break --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [cut(0), cut(3), cut(0), cut(2)],
        [cut(2, cleanly=True), cut(0, cleanly=True), cut(1)],
        [cut(2, sse(TOLD[2])[:-1]), cut(0, b": a comment\n\n"), cut(1, sse(TOLD[3])[:25])],
        [cut(3, b"data: half an eve", cleanly=True)],
        [cut(1)] * 7,
    ],
)
def test_a_connection_that_breaks_loses_and_repeats_nothing(
    follow: Callable[..., Any], trainer: Trainer, cuts: list[Any]
) -> None:
    trainer.add(1, "running", *TOLD)
    trainer.jobs[ID] |= succeeded()
    trainer.cuts = list(cuts)
    seen, ended = follow()
    assert seen == [f"message {number}" for number in range(1, 8)]
    assert (ended.id, ended.status) == (ID, "succeeded")
    assert trainer.cuts == []
    assert len(trainer.followed) == len(cuts) + 1


def test_each_connection_goes_on_after_the_last_whole_event(
    follow: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "cancelled", *TOLD)
    trainer.cuts = [cut(0), cut(3), cut(1, sse(TOLD[4])[:-1])]
    follow()
    assert trainer.followed == [None, None, TOLD[2]["id"], TOLD[3]["id"]]


def test_what_was_had_before_is_left_out(follow: Callable[..., Any], trainer: Trainer) -> None:
    trainer.add(1, "cancelled", *TOLD)
    assert follow(after=TOLD[4]["id"])[0] == ["message 6", "message 7"]


def test_an_event_that_a_server_sends_twice_is_given_once(
    follow: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "cancelled", *TOLD)
    trainer.cuts = [cut(2, sse(TOLD[1]))]
    assert follow()[0] == [f"message {number}" for number in range(1, 8)]


def test_what_happens_meanwhile_comes_as_it_happens(follow: Callable[..., Any], trainer: Trainer) -> None:
    trainer.add(1, "running", *TOLD[:1])
    trainer.live = [(TOLD[1], {}), (TOLD[2], {"status": "cancelled"})]
    seen, ended = follow()
    assert seen == ["message 1", "message 2", "message 3"]
    assert ended.status == "cancelled"


def test_a_server_that_is_started_again_is_borne(
    follow: Callable[..., Any], trainer: Trainer, slept: list[float]
) -> None:
    trainer.add(1, "cancelled", *TOLD)

    def away(request: Any) -> None:
        request.reply(503, RefusalError(503, "starting", "starting").body)

    def gone(request: Any) -> None:
        request.hang_up()

    def first(request: Any, events: Any) -> None:
        trainer.first = [away, gone, away, away, gone, away]
        cut(2)(request, events)

    trainer.cuts = [first]
    assert follow()[0] == [f"message {number}" for number in range(1, 8)]
    assert trainer.followed == [None, TOLD[1]["id"]]
    assert slept


def test_one_that_stays_away_is_given_up(
    follow: Callable[..., Any], trainer: Trainer, slept: list[float]
) -> None:
    trainer.add(1, "running", *TOLD)
    trainer.cuts = [cut(2)] + [cut(0)] * 100
    seen: list[str] = []
    with pytest.raises(APIConnectionError):
        follow(seen=seen, max_retries=0)
    assert seen == ["message 1", "message 2"]
    assert len(trainer.followed) == RECONNECTS + 1
    assert 20 < sum(slept) < 80


def test_an_answer_that_is_no_stream_does_not_keep_one_busy_for_ever(
    follow: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", *TOLD)
    trainer.cuts = [cut(0, b"<html>hello</html>", cleanly=True)] * 100
    with pytest.raises(APIConnectionError, match="always ends at once"):
        follow()
    assert len(trainer.followed) == RECONNECTS + 1


def test_a_job_that_tells_nothing_for_long_is_followed_all_the_same(
    follow: Callable[..., Any], trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase._core.retry.RECONNECTS", 1)
    trainer.add(1, "cancelled", *TOLD)

    def silent(request: Any, events: Any) -> None:
        request.wait_for_hang_up()
        request.hang_up()

    trainer.cuts = [silent] * 3
    assert len(follow(timeout=Timeout(read=0.4), max_retries=0)[0]) == len(TOLD)
    assert len(trainer.followed) == 4


def test_a_job_that_is_gone_is_not_asked_for_again(follow: Callable[..., Any], trainer: Trainer) -> None:
    trainer.add(1, "running", *TOLD)

    def deleted(request: Any, events: Any) -> None:
        del trainer.jobs[ID]
        cut(1)(request, events)

    trainer.cuts = [deleted]
    with pytest.raises(NotFoundError):
        follow()
    assert len(trainer.followed) == 1


def test_a_server_that_never_answered_is_no_broken_connection(
    follow: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", *TOLD)
    refuse = RefusalError(503, "starting", "starting")

    def first_then_away(request: Any) -> None:
        request.reply(200, trainer.jobs[ID])
        trainer.first = [lambda request: request.reply(503, refuse.body)] * 50

    trainer.first = [first_then_away]
    with pytest.raises(ServerUnavailableError):
        follow(max_retries=1)
    assert len(trainer.asked) == 3


@pytest.mark.parametrize(
    "data", [b"no JSON", b"[]", b'{"id": "ftevent-2"}', b'{"error": {"message": "broken"}}']
)
def test_what_is_no_event_is_an_error_and_not_skipped(
    follow: Callable[..., Any], trainer: Trainer, data: bytes
) -> None:
    trainer.add(1, "running", *TOLD)
    trainer.cuts = [cut(1, b"data: " + data + b"\n\n")]
    seen: list[str] = []
    with pytest.raises(InvalidResponseError):
        follow(seen=seen)
    assert seen == ["message 1"]


def test_leaving_closes_the_connection_and_can_be_gone_on_from(sdk: Any, trainer: Trainer, url: str) -> None:
    trainer.add(1, "running", *TOLD)
    left: queue.Queue[bool] = queue.Queue()

    def endless(request: Any, events: Any) -> None:
        for one in events[:2]:
            request.send(sse(one))
        left.put(request.wait_for_hang_up())
        request.hang_up()

    trainer.cuts = [endless]

    def leave(client: Any) -> Any:
        with client.training.get(ID).stream_events() as events:
            assert next(events).message == "message 1"
            assert next(iter(events)).message == "message 2"
        assert left.get(timeout=120)
        return events.last_id

    async def aleave(client: Any) -> Any:
        async with (await client.training.get(ID)).stream_events() as events:
            assert (await anext(events)).message == "message 1"
            assert (await anext(aiter(events))).message == "message 2"
        assert left.get(timeout=120)
        return events.last_id

    assert sdk.call(aleave if sdk.asynchronous else leave, url=url) == TOLD[1]["id"]


# ---- waiting -----------------------------------------------------------------------------------------


def test_waiting_ends_with_the_adapter(wait: Callable[..., Any], trainer: Trainer) -> None:
    trainer.add(1, "validating_files", event(1, "created"))
    trainer.live = [
        (event(2, "sound"), {"status": "queued"}),
        (event(3, "training"), {"status": "running", "progress": {"phase": "training"}}),
        *((step(3 + at, at, seconds_left=4.0 - at), {}) for at in (1, 2, 3, 4)),
        (event(8, type="metrics", data={"step": 4, "valid_loss": 1.25}), {}),
        (event(9, "proven"), succeeded()),
    ]
    seen: list[TrainingJobInfo] = []
    ended = wait(seen.append)
    assert (ended.status, ended.report.loss_after) == ("succeeded", 1.25)
    assert trainer.followed == [event(1)["id"]]
    assert seen[0].status == "validating_files"
    steps = [
        (one.progress.step, one.progress.loss, one.progress.seconds_left) for one in seen if one.progress
    ]
    assert steps[-2:] != []
    assert seen[-1].status == "succeeded"


def test_figures_come_with_the_events_and_cost_no_further_request(
    wait: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", event(1, "created"), progress={"phase": "training", "tokens": 7})
    trainer.live = [
        *((step(1 + at, at, 20, seconds_left=20.0 - at), {}) for at in range(1, 21)),
        (event(22, type="metrics", data={"step": 20, "valid_loss": 1.25}), {}),
        (None, succeeded()),
    ]
    seen: list[TrainingJobInfo] = []
    wait(seen.append)
    progress = seen[-2].progress
    assert progress is not None
    assert (progress.step, progress.steps, progress.loss, progress.eval_loss) == (20, 20, 0.1, 1.25)
    assert (progress.tokens_per_second, progress.seconds_left) == (1234.5, 0.0)
    assert (progress.phase, progress.tokens) == ("training", 7)
    assert [one.progress.step for one in seen[1:-1] if one.progress] == [*range(1, 21), 20]
    assert len(trainer.asked) == 4


def test_progress_never_falls_behind_what_the_server_has_answered_since(
    wait: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", event(1, "created"), progress={"step": 3, "steps": 6})
    trainer.live = [*((step(1 + at, at, 6), {}) for at in range(2, 7)), (None, succeeded())]
    seen: list[TrainingJobInfo] = []
    wait(seen.append)
    assert [one.progress.step for one in seen[:-1] if one.progress] == [3, 3, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"status": "failed", "error": FAILURE, "resumable": True},
            TrainingFailedError,
            rf"job {ID} \(acme\) failed \(out_of_memory\): The job needed more memory\.",
        ),
        ({"status": "failed"}, TrainingFailedError, "does not say why"),
        ({"status": "cancelled"}, TrainingStoppedError, "is cancelled"),
        ({"status": "paused", "resumable": True}, TrainingStoppedError, "paused: resume it to continue"),
    ],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_waiting_for_what_brings_no_adapter_raises(
    wait: Callable[..., Any],
    trainer: Trainer,
    when: str,
    changes: dict[str, Any],
    error: type[TrainingStoppedError],
    says: str,
) -> None:
    trainer.add(1, "running", event(1, "created"))
    if when == "before":
        trainer.jobs[ID] |= changes
    else:
        trainer.live = [(event(2, "something"), changes)]
    with pytest.raises(error, match=says) as caught:
        wait()
    assert type(caught.value) is error
    assert caught.value.job.status == changes["status"]
    code = "out_of_memory" if "error" in changes else "unknown" if changes["status"] == "failed" else None
    assert caught.value.code == (code or changes["status"])


def test_a_job_that_has_succeeded_before_is_waited_for_without_following_it(
    wait: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", *TOLD)
    trainer.jobs[ID] |= succeeded()
    assert wait().activated
    assert trainer.followed == []


def test_waiting_bears_a_server_that_goes_away_while_it_tells_so(
    wait: Callable[..., Any], trainer: Trainer
) -> None:
    trainer.add(1, "running", event(1, "created"))

    def ends(request: Any, events: Any) -> None:
        told = event(2, "Interrupted: the server stops.")
        trainer.events[ID].append(told)
        trainer.first = [lambda request: request.hang_up()] * 4
        trainer.live = [(event(3, "proven"), succeeded())]
        request.send(sse(told))
        request.hang_up()

    trainer.cuts = [ends]
    assert wait(max_retries=0).status == "succeeded"
    assert trainer.followed == [event(1)["id"], event(2)["id"]]


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_waiting_bears_a_server_that_is_away_when_it_begins(
    wait: Callable[..., Any], trainer: Trainer, answered: int
) -> None:
    trainer.add(1, "running", event(1, "created"))
    trainer.live = [(event(2, "proven"), succeeded())]
    refusal = RefusalError(503, "starting", "starting")

    def go_away(request: Any) -> None:
        trainer.first = [right] * answered
        trainer.first += [lambda request: request.reply(503, refusal.body), lambda request: request.hang_up()]
        trainer.first += trainer.first[-2:] * 3
        request.reply(200, trainer.jobs[ID])

    def right(request: Any) -> None:
        wait_for = trainer.first[:]
        trainer.first = []
        trainer.script(request)
        trainer.asked.pop()
        trainer.first = wait_for

    trainer.first = [go_away]
    assert wait(max_retries=0).status == "succeeded"
    assert trainer.first == []
    assert trainer.followed == [event(1)["id"]]


def test_waiting_gives_up_a_server_that_stays_away_after_about_a_minute(
    wait: Callable[..., Any], trainer: Trainer, slept: list[float]
) -> None:
    trainer.add(1, "running", event(1, "created"))

    def go_away(request: Any) -> None:
        trainer.first = [lambda request: request.hang_up()] * 100
        request.reply(200, trainer.jobs[ID])

    trainer.first = [go_away]
    with pytest.raises(APIConnectionError):
        wait(max_retries=0)
    assert len(trainer.asked) == 1 + 1 + RECONNECTS
    assert 20 < sum(slept) < 80


def test_waiting_without_a_word_draws_nothing(
    wait: Callable[..., Any], trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, "running", event(1, "created"))
    trainer.live = [(step(2, 1), {}), (event(3, "proven"), succeeded())]
    wait(False)
    assert capsys.readouterr() == ("", "")


def test_waiting_draws_on_stderr(
    wait: Callable[..., Any], trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.add(1, "running", event(1, "created"), progress={"phase": "training"})
    trainer.live = [(step(2, 1, seconds_left=3.0), {}), (event(3, "proven"), succeeded())]
    wait(True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 1/4  loss 2.0000  1,234 tokens/s  3 s left\n" in err
    assert err.endswith("proven\n")
