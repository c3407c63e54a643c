"""Grading on this server: judges are its own models, and graders in Python run in confined processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from onebase_adapters.hub.confinement import can_confine_code
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import (
    EngineRestartedError,
    ForbiddenError,
    InvalidRequestError,
    QueueFullError,
    QuotaSpentError,
    UnavailableError,
    UnknownModelError,
)
from onebase_edge.settings import PythonGraders
from onebase_server.processes.helper import HelperProcess, TookTooMuchError
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import Limiter, QuotaReservation
from onebase_training.graders import (
    Grade,
    Graded,
    Grader,
    GraderError,
    GradingError,
    Judgement,
    PythonGrader,
    ScoreModel,
    grade,
    parse_grader,
    python_graders,
)

GRADER_THREADS = 4
CALL_SECONDS = 5.0
"""Processor time, in seconds, that a grader in Python may take for one reply."""
PROCESS_SECONDS = 60.0
"""Processor time, in seconds, after which a process is replaced; the kernel would end it a little later."""
STUCK_SECONDS = 60.0
"""Longest time for one reply that gets no processor."""
MOST_ANSWER_BYTES = 64 << 10
JUDGE_TOKENS = 256
"""Longest answer of a judge, in tokens, where its grader says nothing."""
MOST_JUDGED = 8
"""Largest number of replies of one run that judges read at once."""
AGAIN = Backoff(0.2, 10.0)
PASSING = (EngineRestartedError, QueueFullError, QuotaSpentError, UnavailableError)
"""Errors after which a sample is drawn, or a judge is asked, again."""

_COMMAND = (sys.executable, "-P", "-m", "onebase_server.jobs.python_grader")
_WAITS = (429, 503)


class JudgeAnswer(Protocol):
    """Answer of a route. headers: by their names in lower case."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...


class Post(Protocol):
    """Function that has a route answer; see InnerRequests."""

    async def __call__(
        self, path: str, body: bytes, request_id: str, caller: Caller, reservation: QuotaReservation
    ) -> Any: ...


class PythonProcess:
    """A process that runs one grader's source, started when it is first needed. Thread-safe; calls wait for
    one another.

    A call that takes too long, or that ends the process, fails alone: the next one gets another process.
    """

    def __init__(self, source: str, *, confined: bool = True) -> None:
        self._source = source
        self._command = _COMMAND if confined else (*_COMMAND, "--unconfined")
        self._lock = threading.Lock()
        self._helper = HelperProcess()
        self._seconds = 0.0
        """Processor time that the process has used."""

    def grade(self, graded: Graded) -> float:
        """Return the number that the source's `grade` gives a reply. Raises GradingError."""
        with self._lock:
            try:
                self._start()
                answer = self._ask({"sample": graded.as_sample(), "item": graded.item})
            except TookTooMuchError:
                detail = f"it took more than {CALL_SECONDS:g} s of a processor"
                raise GradingError("python_grader_runtime_error", detail) from None
            except (OSError, ValueError, RecursionError) as error:
                self._helper.kill()
                detail = f"its process ended: {error}"
                raise GradingError("python_grader_runtime_error", detail) from None
        reward = answer.get("reward")
        if isinstance(reward, int | float) and not isinstance(reward, bool):
            return float(reward)
        raise GradingError("python_grader_runtime_error", str(answer.get("error") or "it gave no answer"))

    def close(self) -> None:
        """End the process, also while it grades."""
        process = self._helper.process
        if process is not None:
            process.kill()
        with self._lock:
            self._helper.kill()

    def _start(self) -> None:
        """Start the process unless it runs. Raises GradingError: the source cannot be run; as `_ask`."""
        process = self._helper.process
        if process is not None and process.poll() is None and self._seconds < PROCESS_SECONDS:
            return
        self._helper.kill()
        self._seconds = 0.0
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self._helper.start(self._command, environment | {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"})
        begun = self._ask({"source": self._source})
        if "confinement" in begun:
            self._helper.kill()
            raise GradingError("python_grader_server_error", f"it cannot be confined: {begun['confinement']}")
        if "error" in begun:
            self._helper.kill()
            raise GradingError("python_grader_runtime_error", f"its source cannot be run: {begun['error']}")

    def _ask(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer. Raises TookTooMuchError, OSError, ValueError."""
        data = json.dumps(call).encode()
        try:
            given = self._helper.call(
                data, STUCK_SECONDS, cpu_seconds=CALL_SECONDS, most_bytes=MOST_ANSWER_BYTES
            )
        finally:
            self._seconds += self._helper.seconds
        answer = json.loads(given)
        if not isinstance(answer, dict):
            raise ValueError("it gave no answer")
        return answer


@dataclass
class GraderProcesses:
    """The processes of one run's graders in Python, by their sources."""

    confined: bool
    _running: dict[str, PythonProcess] = field(default_factory=dict)

    def of(self, grader: PythonGrader) -> PythonProcess:
        if grader.source not in self._running:
            self._running[grader.source] = PythonProcess(grader.source, confined=self.confined)
        return self._running[grader.source]

    def close(self) -> None:
        for process in self._running.values():
            process.close()
        self._running.clear()


class Grading:
    """Grades replies on behalf of callers. For one event loop.

    Args:
        python: which graders in Python are run.
    """

    def __init__(self, limiter: Limiter, python: PythonGraders) -> None:
        self._limiter = limiter
        self._python = python
        self._threads = Threads("graders", GRADER_THREADS, each=1)
        self.post: Post | None = None
        """Function that has a route answer; set once the app is there."""

    def check(self, grader: Grader | str | Mapping[str, Any], param: str) -> Grader:
        """Return a grader that can be run here. Raises InvalidRequestError naming its field."""
        try:
            found = parse_grader(grader) if isinstance(grader, str | Mapping) else grader
        except GraderError as error:
            place = f"{param}.{error.field}".rstrip(".")
            raise InvalidRequestError(f"{place}: {error.reason}.", param=place) from error
        if python_graders(found) and (problem := self._no_python()):
            raise InvalidRequestError(f"{param}: {problem}", param=param, code="python_graders_off")
        return found

    def _no_python(self) -> str:
        if self._python == "off":
            return (
                "graders in Python are not run here (--python-graders off). Use string_check, "
                "text_similarity, score_model or multi."
            )
        if self._python == "confined" and not can_confine_code():
            return (
                "graders in Python cannot be confined on this machine (it needs Linux 5.13 with Landlock and "
                "seccomp, on x86_64 or aarch64). Use the other graders, or let the operator allow them "
                "nevertheless (--python-graders unconfined)."
            )
        return ""

    def processes(self) -> GraderProcesses:
        """Return processes for one run, which must close them."""
        return GraderProcesses(self._python != "unconfined")

    async def grade(
        self, grader: Grader, graded: Graded, caller: Caller, processes: GraderProcesses, name: str
    ) -> Grade:
        """Return a reply's reward.

        Args:
            name: of the run, for the ids of requests to judges.

        Raises ApiError: a judge is not there, or the caller may not ask it.
        """
        run_for = self._threads.run_for

        async def text(work: Callable[[], float]) -> float:
            return await run_for(caller.tenant, work)

        async def python(part: PythonGrader, of: Graded) -> float:
            return await run_for(caller.tenant, processes.of(part).grade, of)

        async def judge(part: ScoreModel, messages: Sequence[tuple[str, str]]) -> Judgement:
            return await self._judge(part, messages, caller, name)

        return await grade(grader, graded, judge=judge, python=python, text=text)

    async def _judge(
        self, grader: ScoreModel, messages: Sequence[tuple[str, str]], caller: Caller, name: str
    ) -> Judgement:
        """Ask a judge, as often as it takes until there is room. Raises GradingError, ApiError."""
        body = msgspec.json.encode(_question(grader, messages))
        for pause in AGAIN.pauses():
            try:
                reservation = self._limiter.enter(caller)
            except (QuotaSpentError, UnavailableError) as error:
                await asyncio.sleep(max(pause, error.retry_after or 0.0))
                continue
            if self.post is None:
                raise RuntimeError("judges are asked before the app is there")
            try:
                answer: JudgeAnswer = await self.post(
                    "/v1/chat/completions", body, f"{name}-judge", caller, reservation
                )
            finally:
                reservation.close()
            if answer.status not in _WAITS:
                return _judgement(grader, answer)
            await asyncio.sleep(pause)
        raise AssertionError("pauses have no end")


def _question(grader: ScoreModel, messages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the request to a judge, whose answer is `{"result": NUMBER}`."""
    params = grader.sampling_params
    schema = {
        "type": "object",
        "properties": {"result": {"type": "number"}},
        "required": ["result"],
        "additionalProperties": False,
    }
    body: dict[str, Any] = {
        "model": grader.model,
        "messages": [{"role": role, "content": text} for role, text in messages],
        "temperature": 0.0,
        "max_tokens": JUDGE_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "score", "schema": schema}},
    }
    if params is not None:
        given = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "max_tokens": params.max_completions_tokens,
        }
        body |= {key: value for key, value in given.items() if value is not None}
    return body


def _judgement(grader: ScoreModel, answer: JudgeAnswer) -> Judgement:
    """Return what a judge said. Raises GradingError; ApiError: it would be refused each time."""
    try:
        told = json.loads(answer.body)
    except ValueError:
        told = {}
    if answer.status >= 400:
        message = str(told.get("error", {}).get("message", "it gave no reason"))
        if answer.status == 404:
            raise UnknownModelError(f"The judge of grader {grader.name!r} is not here: {message}")
        if answer.status in (401, 403):
            refusal = f"The judge of grader {grader.name!r} may not be asked: {message}"
            raise ForbiddenError(refusal, code="judge_refused")
        raise GradingError("model_grader_server_error", message)
    try:
        tokens = int(told["usage"]["total_tokens"])
        reward = json.loads(told["choices"][0]["message"]["content"])["result"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GradingError("model_grader_parse_error", "the judge gave no number") from error
    if type(reward) not in (int, float):
        raise GradingError("model_grader_parse_error", "the judge gave no number")
    return Judgement(float(reward), tokens, grader.model)
