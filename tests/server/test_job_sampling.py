"""Samples and grading for jobs: refusals are refunded, failures stay alone, and waiting is said."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.registry import Quotas
from onebase_edge.errors import (
    ForbiddenError,
    InvalidRequestError,
    QuotaExceededError,
    QuotaSpentError,
    SequenceFailedError,
    SequencesFullError,
    UnavailableError,
)
from onebase_server.inference.stream import OutputPiece
from onebase_server.jobs import grading, sampling
from onebase_server.jobs.grading import GraderPool, GraderProcesses, Grading, PythonProcess, RoomWait
from onebase_server.jobs.sampling import JobSampler
from onebase_server.processes.trainer_protocol import DrawnReplies, NotDrawn
from onebase_server.tenancy.access import LOCAL
from onebase_server.tenancy.quotas import Limiter
from onebase_training.graders import Grade, Graded, GradingError, PythonGrader, parse_grader
from onebase_training.rollouts import RolloutOrder, RolloutPrompt

from .access import Keys, client_with
from .support import Starter

CALLER = replace(LOCAL, background=True)
CHECK = {"type": "string_check", "name": "c", "input": "a", "reference": "a", "operation": "eq"}
JUDGE = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "x"}]}
JOB: Any = SimpleNamespace(
    id="ftjob-1", tenant=LOCAL.tenant, key=LOCAL.key, settings={"grader": json.dumps(CHECK)}
)
ROLLOUT = RolloutOrder(prompts=[RolloutPrompt([1, 2], "{}", 1, 8)], n=2, temperature=1.0)


def limiter(**quotas: int) -> Limiter:
    return Limiter(lambda caller: (Quotas(), Quotas(**quotas)))


def used(counted: Limiter, rate: str) -> int:
    return counted.used("tenant", LOCAL.tenant, Quotas(requests=1, tokens=1))[rate]


def sampler(counted: Limiter, submit: Callable[[], Any]) -> JobSampler:
    base = SimpleNamespace(max_length=100, kv_longest=10)

    async def caller_of(key: str) -> Any:
        return CALLER

    parts: Any = SimpleNamespace(
        base=lambda: base,
        check_limits=lambda *_: None,
        caller_of=caller_of,
        doubt=lambda: None,
        end_tokens=(),
        submit=submit,
    )
    return JobSampler(
        planner=parts, supervisor=parts, tokenizer=parts, reading=parts, files=parts, residency=parts,
        keys=parts, limiter=counted, grading=Grading(counted, "off"), recorder=lambda *_: parts,
    )  # fmt: skip


def runs(monkeypatch: pytest.MonkeyPatch, collect: Callable[[Any], Any], start: Any = None) -> list[Any]:
    """Have rollouts run without an engine; the list gets their requests."""
    asked: list[Any] = []

    class Run:
        def __init__(
            self, supervisor: Any, tokenizer: Any, reading: Any, request: Any, recorder: Any
        ) -> None:
            self.request = request
            asked.append(request)

        async def start(self, residency: Any) -> None:
            if start is not None:
                start()

        async def collect(self) -> Any:
            return collect(self.request)

    monkeypatch.setattr(sampling, "GenerationRun", Run)
    return asked


def pieces(request: Any) -> list[OutputPiece]:
    return [OutputPiece(index, "a") for index in range(request.choices)]


def test_a_refused_rollout_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, pieces)
    counted = limiter(requests=60, tokens=10_000)
    made = sampler(counted, lambda: None)
    request: Any = SimpleNamespace(reserved_tokens=6000, choices=1)
    counted.enter(CALLER).admit(10, 1)
    with pytest.raises(QuotaSpentError):
        asyncio.run(made._run(request, CALLER))
    assert used(counted, "requests") == 1


def test_a_rollout_that_the_engine_does_not_take_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise SequencesFullError(1, 1, 1, 0.1)

    runs(monkeypatch, pieces, full)
    counted = limiter(requests=60, tokens=10_000)
    request: Any = SimpleNamespace(reserved_tokens=10, choices=1)
    with pytest.raises(SequencesFullError):
        asyncio.run(sampler(counted, lambda: None)._run(request, CALLER))
    assert (used(counted, "requests"), used(counted, "tokens")) == (0, 0)


def test_a_reply_is_as_long_as_the_engine_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs(monkeypatch, pieces)
    long = replace_prompt(tokens=[1] * 7)
    drawn = asyncio.run(sampler(limiter(), lambda: None).draw(JOB, long, lambda text: None))
    assert isinstance(drawn, DrawnReplies)
    assert [reply.reward for reply in drawn.groups[0]] == [1.0, 1.0]
    assert asked[0].sampling.max_tokens == 3


def replace_prompt(**fields: Any) -> RolloutOrder:
    given = {"tokens": [1], "item": "{}", "seed": 1, "max_tokens": 8, **fields}
    return RolloutOrder(prompts=[RolloutPrompt(**given), *ROLLOUT.prompts], n=2, temperature=1.0)


def test_a_prompt_that_fails_alone_gets_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(request: Any) -> Any:
        if len(request.prompts[0].tokens) == 1:
            raise SequenceFailedError("it needs more memory", code="kv_exhausted")
        return pieces(request)

    runs(monkeypatch, collect)
    made = sampler(limiter(), lambda: None)
    drawn = asyncio.run(made.draw(JOB, replace_prompt(), lambda text: None))
    assert isinstance(drawn, DrawnReplies)
    assert [[reply.reward for reply in group] for group in drawn.groups] == [[0.0, 0.0], [1.0, 1.0]]
    assert drawn.groups[0][0].errors == {"other_error": "the engine made no reply: it needs more memory"}
    drawn = asyncio.run(made.draw(JOB, replace_prompt(tokens=[1] * 10), lambda text: None))
    assert isinstance(drawn, DrawnReplies)
    assert "maximum context length is 10 tokens" in drawn.groups[0][0].errors["other_error"]


def test_a_failure_ends_the_grading_of_the_other_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, pieces)
    made, ended = sampler(limiter(), lambda: None), []

    async def grade(grader: Any, graded: Any, *_: Any) -> Grade:
        if not ended:
            ended.append("begun")
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("cancelled")
        raise ForbiddenError("no", code="judge_refused")

    monkeypatch.setattr(made._grading, "grade", grade)

    async def draw() -> Any:
        drawn = await made.draw(JOB, ROLLOUT, lambda text: None)
        return drawn, len(asyncio.all_tasks())

    drawn, tasks = asyncio.run(draw())
    assert isinstance(drawn, NotDrawn)
    assert (drawn.code, tasks, ended) == ("judge_refused", 1, ["begun", "cancelled"])


def test_a_job_says_that_it_waits_after_a_minute_and_once() -> None:
    said: list[str] = []
    now = [0.0]
    waiting = RoomWait(said.append, lambda: now[0])
    spent = QuotaSpentError("60 requests are used.", {}, retry_after=1.0)
    for now[0] in (0.0, 59.0, 60.0, 61.0, 90.0):
        waiting.refused(spent)
    assert said == ["The job waits for its quota: 60 requests are used."]
    waiting.admitted()
    for now[0] in (100.0, 159.0, 161.0):
        waiting.refused(UnavailableError("It restarts.", code="starting", retry_after=1.0))
    assert said[1:] == ["The job waits for the engine: It restarts."]


# ---- judges ----------------------------------------------------------------------------------------


def judged(answers: list[Any], waiting: RoomWait | None = None, counted: Limiter | None = None) -> Grade:
    made = Grading(counted or limiter(), "off")
    left = list(answers)

    async def post(*_: Any) -> Any:
        status, body, headers = left.pop(0)
        return SimpleNamespace(status=status, body=json.dumps(body).encode(), headers=headers)

    made.post = post
    grader = parse_grader(JUDGE)
    work = made.grade(grader, Graded("x", {}), CALLER, made.processes(LOCAL.tenant), "job", waiting)
    return asyncio.run(work)


def said(text: str) -> dict[str, Any]:
    return {"usage": {"total_tokens": 3}, "choices": [{"message": {"content": text}}]}


GOOD = 200, said('{"result": 0.5}'), dict[str, str]()
SPENT = 429, {"error": {"code": "rate_limit_exceeded", "message": "spent"}}, {"retry-after": "7"}


@pytest.mark.parametrize("status", [429, 503])
def test_a_judge_is_asked_again_after_the_time_that_its_answer_says(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(grading.asyncio, "sleep", sleep)
    counted = limiter(requests=60)
    found = judged([(status, *SPENT[1:]), GOOD], RoomWait(lambda text: None), counted)
    assert (found.reward, pauses) == (0.5, [7.0])
    assert used(counted, "requests") == 1  # the refused one is refunded


def test_a_quota_that_waiting_does_not_end_is_an_error() -> None:
    never = 429, {"error": {"code": "insufficient_quota", "message": "never"}}, {"x-should-retry": "false"}
    with pytest.raises(QuotaExceededError, match="The judge of grader 'j' cannot be asked: never"):
        judged([never], RoomWait(lambda text: None))


def test_one_run_of_a_grader_waits_for_nothing() -> None:
    with pytest.raises(QuotaSpentError, match="spent") as caught:
        judged([SPENT])
    assert caught.value.retry_after == 7.0
    with pytest.raises(UnavailableError, match="starts"):
        judged([(503, {"error": {"code": "starting", "message": "starts"}}, {})])


@pytest.mark.parametrize("text", ['{"result": 1' + "0" * 400 + "}", '{"result": true}', "[" * 100_000, "7"])
def test_a_judge_that_gives_no_number_of_use_gives_the_floor(text: str) -> None:
    found = judged([(200, said(text), {})])
    assert (found.reward, list(found.errors)) == (0.0, ["model_grader_parse_error"])


# ---- processes -------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Processes of the pool that were made and not closed; none is a process of the system."""
    alive: set[Any] = set()

    class Process:
        def __init__(self, source: str, *, confined: bool) -> None:
            alive.add(self)

        def grade(self, graded: Any) -> float:
            return 1.0

        def close(self) -> None:
            alive.discard(self)

    monkeypatch.setattr(grading, "PythonProcess", Process)
    return alive


def python(number: int) -> PythonGrader:
    return PythonGrader("p", f"{number}")


def test_processes_of_graders_are_few_for_a_tenant_and_for_the_server(started: set[Any]) -> None:
    pool = GraderPool(confined=True, most=3, each=2)
    for tenant in ("a", "b", "c"):
        processes = GraderProcesses(pool, tenant)
        for number in range(6):
            assert processes.grade(python(number), Graded("", {})) == 1.0
        assert len([key for key in pool._processes if key[0] == tenant]) == 2
        assert len(started) == len(pool._processes) <= 3


def test_a_process_that_grades_is_not_ended_for_another(started: set[Any]) -> None:
    pool = GraderPool(confined=True, most=3, each=2)
    busy = pool.acquire("a", 0, "busy")
    pool.acquire("a", 0, "idle")
    pool.release("a", 0, "idle")
    for number in range(3):
        GraderProcesses(pool, "a").grade(python(number), Graded("", {}))
    assert busy in started
    pool.release("a", 0, "busy")


def test_a_run_that_has_ended_starts_no_process(started: set[Any]) -> None:
    processes = GraderProcesses(GraderPool(confined=True), "a")
    processes.grade(python(1), Graded("", {}))
    processes.close()
    assert not started
    with pytest.raises(GradingError, match="the run has ended"):
        processes.grade(python(1), Graded("", {}))
    assert not started


def test_a_process_that_was_closed_is_not_started_again() -> None:
    process = PythonProcess("def grade(sample, item): return 1.0")
    process.close()
    with pytest.raises(GradingError, match="the run has ended"):
        process.grade(Graded("", {}))
    assert process._helper.process is None


@pytest.mark.parametrize("answer", [{"reward": 10**400}, {"reward": True}, {"reward": None}])
def test_what_a_process_answers_is_a_number_or_an_error(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = PythonProcess("x")
    monkeypatch.setattr(process, "_start", lambda: None)
    monkeypatch.setattr(process, "_ask", lambda call: answer)
    made = Grading(limiter(), "off")

    async def run() -> Grade:
        processes: Any = SimpleNamespace(grade=lambda grader, graded: process.grade(graded))
        grader = PythonGrader("p", "x")
        return await made.grade(grader, Graded("", {}), CALLER, processes, "job")

    found = asyncio.run(run())
    assert found.reward == 0.0
    assert found.errors


def test_a_process_that_cannot_be_confined_is_an_error_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = PythonProcess("x")
    monkeypatch.setattr(process._helper, "start", lambda *_: None)
    monkeypatch.setattr(process, "_ask", lambda call: {"confinement": "this kernel has no Landlock"})
    with pytest.raises(InvalidRequestError, match=r"no Landlock.*--python-graders unconfined") as caught:
        process.grade(Graded("", {}))
    assert caught.value.code == "python_graders_off"


def test_judges_messages_are_rendered_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_training import graders

    threads: list[str] = []

    def render(*_: Any) -> list[tuple[str, str]]:
        threads.append(threading.current_thread().name)
        return [("user", "x")]

    monkeypatch.setattr(graders, "render_messages", render)
    assert judged([GOOD]).reward == 0.5
    assert threads == ["graders"]


def test_one_run_of_a_grader_counts_as_a_request(serve_scripted: Starter, keys: Keys) -> None:
    key = keys.make("train", "generate", quotas={"requests": 1})
    with (
        serve_scripted("words", "--data-dir", str(keys.file.parent)) as server,
        client_with(server, key) as http,
    ):
        body = {"grader": CHECK, "model_sample": "a"}
        path = "/v1/fine_tuning/alpha/graders/run"
        first, second = (http.post(path, json=body) for _ in range(2))
    assert (first.status_code, first.json().get("reward")) == (200, 1.0), first.text
    assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(second.headers["retry-after"]) > 0
