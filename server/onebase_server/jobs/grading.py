"""Grading on this server: judges are its own models, and graders in Python run in confined processes."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from onebase_adapters.hub.confinement import can_confine_code
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import (
    ApiError,
    EngineRestartedError,
    ForbiddenError,
    InvalidRequestError,
    QueueFullError,
    QuotaExceededError,
    QuotaSpentError,
    UnavailableError,
    UnknownModelError,
)
from onebase_edge.settings import PythonGraders
from onebase_server.processes.helper import HelperProcess, TookTooMuchError
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import InnerAnswer, InnerPost, Limiter
from onebase_training.graders import (
    Grade,
    Graded,
    Grader,
    GraderError,
    GradingError,
    JudgedScore,
    PythonGrader,
    ScoreModel,
    encodable,
    grade,
    number_of,
    parse_grader,
    python_graders,
)

GRADER_THREADS = 4
MOST_PROCESSES = 6
"""Largest number of processes of graders in Python, each of 256 MiB at most: more than GRADER_THREADS."""
EACH_TENANT = 2
"""Largest number of such processes of one tenant."""
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
WAIT_SECONDS = 60.0
"""Time, in seconds, without room after which a job says that it waits."""
LONGEST_WAIT = 60.0
"""Longest pause, in seconds, that an answer may ask for: quotas are of a minute."""
PASSING = (EngineRestartedError, QueueFullError, QuotaSpentError, UnavailableError)
"""Errors after which a sample is drawn, or a judge is asked, again."""

_COMMAND = (sys.executable, "-P", "-m", "onebase_server.jobs.python_grader")
_WAITS = (429, 503)


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
        self._closed = False
        self._seconds = 0.0
        """Processor time that the process has used."""

    def grade(self, graded: Graded) -> float:
        """Return the number that the source's `grade` gives a reply.

        Raises GradingError; InvalidRequestError: the process cannot be confined.
        """
        with self._lock:
            if self._closed:
                raise GradingError("python_grader_server_error", "the run has ended")
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
        try:
            return number_of(answer.get("reward"))
        except ValueError:
            detail = str(answer.get("error") or "it gave no answer")
            raise GradingError("python_grader_runtime_error", detail) from None

    def close(self) -> None:
        """End the process for good, also while it grades."""
        self._closed = True
        process = self._helper.process
        if process is not None:
            process.kill()
        with self._lock:
            self._helper.kill()

    def _start(self) -> None:
        """Start the process unless it runs.

        Raises GradingError: the source cannot be run; InvalidRequestError; as `_ask`.
        """
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
            raise InvalidRequestError(
                f"grader: graders in Python cannot be confined on this machine: {begun['confinement']}. "
                "Use the other graders, or let the operator allow them nevertheless "
                "(--python-graders unconfined).",
                param="grader",
                code="python_graders_off",
            )
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


class GraderPool:
    """The processes of all runs' graders in Python. For one more than there may be, the one that was used
    least recently ends. Thread-safe.

    Args:
        most: largest number of processes, which is more than grade at once, so that one is idle.
        each: largest number of processes of one tenant.
    """

    def __init__(self, *, confined: bool, most: int = MOST_PROCESSES, each: int = EACH_TENANT) -> None:
        self._confined = confined
        self._most = most
        self._each = each
        self._lock = threading.Lock()
        self._processes: dict[tuple[str, int, str], PythonProcess] = {}
        """Processes by tenant, run and source; the one that was used last comes last."""
        self._grading: Counter[tuple[str, int, str]] = Counter()

    def acquire(self, tenant: str, run: int, source: str) -> PythonProcess:
        """Return a source's process, which does not end for the sake of others until it is released."""
        key = tenant, run, source
        with self._lock:
            process = self._processes.pop(key, None)
            ending = [] if process is not None else self._room(tenant)
            self._processes[key] = process or PythonProcess(source, confined=self._confined)
            self._grading[key] += 1
            found = self._processes[key]
        for one in ending:
            one.close()
        return found

    def release(self, tenant: str, run: int, source: str) -> None:
        """Let a process end when another one needs its place."""
        key = tenant, run, source
        with self._lock:
            self._grading[key] -= 1
            if not self._grading[key]:
                del self._grading[key]

    def close(self, run: int) -> None:
        """End the processes of a run, also those that grade."""
        with self._lock:
            ending = [self._processes.pop(key) for key in list(self._processes) if key[1] == run]
        for one in ending:
            one.close()

    def _room(self, tenant: str) -> list[PythonProcess]:
        """Drop idle processes until there is room for one more of a tenant, and return them."""
        found = []
        for mine, most in ((True, self._each), (False, self._most)):
            keys = [key for key in self._processes if key[0] == tenant or not mine]
            idle = [key for key in keys if key not in self._grading]
            found += [self._processes.pop(key) for key in idle[: max(0, len(keys) - most + 1)]]
        return found


class GraderProcesses:
    """The processes of one run's graders in Python, which the pool starts and ends. Thread-safe."""

    _numbers = itertools.count()

    def __init__(self, pool: GraderPool, tenant: str) -> None:
        self._pool = pool
        self._tenant = tenant
        self._run = next(self._numbers)
        self._closed = False

    def grade(self, grader: PythonGrader, graded: Graded) -> float:
        """Return the number that a grader gives a reply. Raises GradingError, InvalidRequestError."""
        if self._closed:
            raise GradingError("python_grader_server_error", "the run has ended")
        process = self._pool.acquire(self._tenant, self._run, grader.source)
        try:
            return process.grade(graded)
        finally:
            self._pool.release(self._tenant, self._run, grader.source)
            if self._closed:
                self._pool.close(self._run)

    def close(self) -> None:
        """End the processes; nothing is graded any more."""
        self._closed = True
        self._pool.close(self._run)


class Grading:
    """Grades replies on behalf of callers. For one event loop.

    Args:
        python: which graders in Python are run.
    """

    def __init__(self, limiter: Limiter, python: PythonGraders) -> None:
        self._limiter = limiter
        self._python = python
        self._pool = GraderPool(confined=python != "unconfined")
        self._threads = Threads("graders", GRADER_THREADS, each=1)
        self.post: InnerPost | None = None
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

    def processes(self, tenant: str) -> GraderProcesses:
        """Return processes for one run of a tenant, which must close them."""
        return GraderProcesses(self._pool, tenant)

    async def grade(
        self,
        grader: Grader,
        graded: Graded,
        caller: Caller,
        processes: GraderProcesses,
        name: str,
        waiting: RoomWait | None = None,
    ) -> Grade:
        """Return a reply's reward.

        Args:
            name: of the run, for the ids of requests to judges.
            waiting: has judges asked again where there is no room, and is told so; None: that is an error.

        Raises ApiError: a judge is not there, or the caller may not ask it, or there is no room for that.
        """
        run_for = self._threads.run_for

        async def text(work: Callable[[], Any]) -> Any:
            return await run_for(caller.tenant, work)

        async def python(part: PythonGrader, of: Graded) -> float:
            return await run_for(caller.tenant, processes.grade, part, of)

        async def judge(part: ScoreModel, messages: Sequence[tuple[str, str]]) -> JudgedScore:
            return await self._judge(part, messages, caller, name, waiting)

        return await grade(grader, graded, judge=judge, python=python, text=text)

    async def _judge(
        self,
        grader: ScoreModel,
        messages: Sequence[tuple[str, str]],
        caller: Caller,
        name: str,
        waiting: RoomWait | None,
    ) -> JudgedScore:
        """Ask a judge, as often as it takes until there is room. Raises GradingError, ApiError."""
        body = await self._threads.run_for(caller.tenant, _question_bytes, grader, messages)
        for pause in AGAIN.pauses():
            try:
                return await self._ask_once(grader, body, caller, name)
            except PASSING as error:
                if waiting is None:
                    raise
                waiting.refused(error)
                pause = max(pause, error.retry_after or 0.0)
            await asyncio.sleep(pause)
        raise RuntimeError("pauses have no end")

    async def _ask_once(self, grader: ScoreModel, body: bytes, caller: Caller, name: str) -> JudgedScore:
        """Raises GradingError, ApiError; those of PASSING where there is no room now."""
        reservation = self._limiter.enter(caller)
        try:
            if self.post is None:
                raise RuntimeError("judges are asked before the app is there")
            answer = await self.post("/v1/chat/completions", body, f"{name}-judge", caller, reservation)
            if answer.status in _WAITS:
                reservation.refund_request()
        finally:
            reservation.close()
        return _judgement(grader, answer)


class RoomWait:
    """Time for which one job has waited for room. Says so once, after WAIT_SECONDS, and again after room."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._since: float | None = None
        self._said = False

    def refused(self, error: ApiError) -> None:
        """Record that there was no room."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        if not self._said and now - self._since >= WAIT_SECONDS:
            self._said = True
            what = "its quota" if isinstance(error, QuotaSpentError) else "the engine"
            self._say(f"The job waits for {what}: {error.message}")

    def admitted(self) -> None:
        """Record that there was room."""
        self._since, self._said = None, False


def _question_bytes(grader: ScoreModel, messages: Sequence[tuple[str, str]]) -> bytes:
    return msgspec.json.encode(_question(grader, messages))


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


def _judgement(grader: ScoreModel, answer: InnerAnswer) -> JudgedScore:
    """Return what a judge said. Raises GradingError; ApiError: it would be refused each time, or for now."""
    try:
        told = json.loads(answer.body)
    except (ValueError, RecursionError):
        told = {}
    if answer.status >= 400:
        raise _refusal(grader, answer, told)
    try:
        tokens = int(told["usage"]["total_tokens"])
        reward = number_of(json.loads(told["choices"][0]["message"]["content"])["result"])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise GradingError("model_grader_parse_error", "the judge gave no number") from error
    return JudgedScore(reward, tokens, grader.model)


def _refusal(grader: ScoreModel, answer: InnerAnswer, told: Any) -> Exception:
    """Return the error that an answer of a status from 400 on is."""
    error = told.get("error") if isinstance(told, dict) else None
    error = error if isinstance(error, dict) else {}
    message = encodable(str(error.get("message", "it gave no reason")))
    if answer.status == 404:
        return UnknownModelError(f"The judge of grader {grader.name!r} is not here: {message}")
    if answer.status in (401, 403):
        refusal = f"The judge of grader {grader.name!r} may not be asked: {message}"
        return ForbiddenError(refusal, code="judge_refused")
    if answer.status not in _WAITS:
        return GradingError("model_grader_server_error", message)
    message = f"The judge of grader {grader.name!r} cannot be asked: {message}"
    code = str(error.get("code") or "")
    if code == "insufficient_quota" or answer.headers.get("x-should-retry") == "false":
        return QuotaExceededError(message, {})
    try:
        seconds = min(LONGEST_WAIT, max(0.0, float(answer.headers.get("retry-after", "1"))))
    except ValueError:
        seconds = 1.0
    if answer.status == 429:
        return QuotaSpentError(message, {}, retry_after=seconds)
    return UnavailableError(message, code=code or "unavailable", retry_after=seconds)
