"""Runs this server's batches: checks their files, has rows answered while there is room, keeps the answers.

A row is a request to its route like any other, by the key that made the batch, but in the background: it
fills places that nobody waits for. What is answered is on the disk before it counts, so that a batch
continues from there after whatever ends the server or its engine."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from onebase_adapters.registry import (
    BatchRecord,
    BatchRecords,
    BatchState,
    BatchStateError,
    Origin,
    RegistryError,
    UnknownBatchError,
    acting,
)
from onebase_adapters.store.store import StoreError
from onebase_edge.background import Backoff, Threads, keep_running
from onebase_edge.errors import (
    ApiError,
    ForbiddenError,
    InsufficientScopeError,
    QuotaSpentError,
    SequenceFailedError,
    TrainingFileNotFoundError,
    UnauthenticatedError,
    UnavailableError,
    error_body,
    status_of,
)
from onebase_protocol.batches import BatchError
from onebase_server.batches.results import (
    ERRORS,
    EXPIRED,
    OUTPUT,
    Result,
    Results,
    answered,
    record_id,
    unanswered,
)
from onebase_server.batches.rows import BatchLine, RowFile, check_batch_file
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.tenancy.access import Caller, KeyRing
from onebase_server.tenancy.peers import Peers
from onebase_server.tenancy.quotas import InnerAnswer, InnerPost, Limiter, QuotaReservation

MOST_RUNS = 32
"""Largest number of batches, and of one tenant's, with rows in the engine by turns; further ones wait."""
MOST_TRIES = 8
"""Largest number of tries of a row whose steps fail; the last answer is recorded."""
ABSENT_TRIES = 32
"""Largest number of tries of a row that is answered 503, over a quarter of an hour: proving an adapter again
takes minutes."""
SPARE_ROWS = 2
"""Rows beyond the free places, so that one that ends is followed at once."""
STOP_SECONDS = 10.0
"""Limit for rows that run when the server stops; those that are left run again after its start."""
SWEEP_SECONDS = 3600.0
_TICK_SECONDS = 0.1
_NOTE_SECONDS = 1.0
"""Time, in seconds, between two writes of a batch's progress to the registry."""
_AHEAD_ROWS, _AHEAD_BYTES = 64, 1 << 20
"""Limits, in rows and bytes, of what is read ahead of its turn."""
HELD_ROWS, HELD_BYTES = 1024, 8 << 20
"""Limits, in rows and bytes, of what one batch has in memory, retries included. Nothing more is read above
them."""
_GROUP = 256
_TROUBLE = Backoff(1.0, 30.0)
_ROW_AGAIN = Backoff(0.5, 30.0)
_MOST_PAUSE = 5.0
_WAITS = ("rate_limit_exceeded", "queue_full", "server_stopping", "engine_starting", "engine_restarting",
          "engine_stalled")  # fmt: skip
"""Codes of answers that count as no try: it was not the row's turn."""

_log = logging.getLogger(__name__)


class BatchFolders:
    """`batches/<registry>/<batch>` of the data folder: what batches have answered. Blocks."""

    def __init__(self, data_dir: Path, registry: str) -> None:
        self._root = data_dir / "batches" / registry

    def of(self, batch_id: str) -> Path:
        return self._root / batch_id

    def forget(self, batch_id: str) -> None:
        shutil.rmtree(self.of(batch_id), ignore_errors=True)

    def keep_only(self, batch_ids: set[str]) -> None:
        """Delete what others have left. Raises OSError."""
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if folder.name not in batch_ids:
                    self.forget(folder.name)


@dataclass
class Parts:
    """Dependencies that all runs share."""

    records: BatchRecords
    threads: Threads
    files: TrainingFiles
    folders: BatchFolders
    jobs: JobFolders
    keys: KeyRing
    limiter: Limiter
    supervisor: EngineSupervisor
    peers: Peers
    max_body: int
    most: int
    """Rows at once; 0: as many as the engine has places."""
    post: InnerPost | None = None
    answered: Counter[str] = field(default_factory=Counter)
    """Rows that were kept since the start, as `completed` and `failed`."""

    @property
    def disk(self) -> Threads:
        return self.files.disk


@dataclass
class _Turn:
    """A row that is to be answered. tries: how often that has failed; at: not before this time."""

    number: int
    row: BatchLine
    tries: int = 0
    at: float = 0.0


class BatchRun:
    """One batch while it is worked on. For one event loop."""

    def __init__(self, parts: Parts, batch: BatchRecord) -> None:
        self.batch = batch
        self.waiting: str | None = None
        """Reason why nothing is computed now, if there is one."""
        self.flying: set[asyncio.Task[None]] = set()
        """Rows that are being answered."""
        self._stopped = asyncio.Event()
        self._feeds = False
        """Whether rows may begin."""
        self._parts = parts
        self._changed = asyncio.Event()
        self._results: Results | None = None
        self._rows: RowFile | None = None
        self._left: Iterator[int] = iter(())
        self._has_more = True
        self._ahead: deque[_Turn] = deque()
        self._again: list[_Turn] = []
        self._pending: list[Result] = []
        self._committing: asyncio.Task[None] | None = None
        self._stuck = False
        self._refused: ApiError | None = None
        """Error of the batch's key or file because of which the batch may not continue."""
        self._not_before = 0.0

    # ---- its life ----------------------------------------------------------------------------

    async def work(self) -> None:
        """Work until the batch ends, whatever fails, or until `stopping`."""
        failures = 0
        owned = self.batch.id, self.batch.server
        with acting(Origin(self.batch.key, actor=f"batch {self.batch.id}", owned=owned)):
            while not self.stopping:
                try:
                    if await self._is_ours():
                        await self._go_on()
                    return
                except (UnknownBatchError, BatchStateError):
                    return  # another moved it meanwhile: the next look sees how
                except (ApiError, RegistryError, StoreError, OSError) as error:
                    failures += 1
                    self.waiting = str(error)
                    _log.warning("batch %s waits: %s", self.batch.id, error)
                except Exception:
                    failures += 1
                    self.waiting = "the server failed on the batch; its log says why"
                    _log.exception("batch %s waits", self.batch.id)
                finally:
                    await self._put_down()
                await self._nap(_TROUBLE.pause(failures))

    def cancel(self) -> None:
        """Cancel the batch, as the registry has it already."""
        if self.batch.state != "cancelling":
            self.batch = replace(self.batch, state="cancelling")
            self._changed.set()

    def stop(self) -> None:
        """Stop the batch's work: running rows may end, and the others are answered when it is resumed."""
        self._stopped.set()
        self._changed.set()

    @property
    def stopping(self) -> bool:
        return self._stopped.is_set()

    async def _nap(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    async def _is_ours(self) -> bool:
        """Read the batch anew, and return False if it has ended or been taken over since it was listed."""
        server, parts = self.batch.server, self._parts
        self.batch = await parts.threads.run_blocking(parts.records.batch, self.batch.tenant, self.batch.id)
        return self.batch.server == server and not self.batch.ended

    async def _go_on(self) -> None:
        try:
            if self.batch.state == "validating":
                await self._validate()
            if self.batch.state == "in_progress":
                await self._answer_rows()
        except TrainingFileNotFoundError as error:
            self._refused = error
        if not self.stopping and not self.batch.ended:
            await self._finalize()

    async def _validate(self) -> None:
        batch, parts = self.batch, self._parts
        path = await self._input()
        checked = await parts.disk.run_blocking(check_batch_file, path, batch.endpoint, parts.max_body)
        if checked.errors:
            await self._move("validating", "failed", errors=checked.problems)
            await self._forget()
        else:
            await self._move("validating", "in_progress", total=checked.rows)

    async def _input(self) -> Path:
        """Return the batch's file, which stays as long as its folder does. Raises TrainingFileNotFoundError,
        StoreError."""
        files = self._parts.files
        file = await files.get(self.batch.tenant, self.batch.input_file)
        folder = self._parts.folders.of(self.batch.id)
        return await files.disk.run_blocking(files.content, file, folder / "input.jsonl")

    async def _answer_rows(self) -> None:
        """InnerAnswer rows until each has a record, or the batch is to end without. Raises OSError, ..."""
        disk, folder, batch = self._parts.disk, self._parts.folders.of(self.batch.id), self.batch
        self._rows = await disk.run_blocking(RowFile, await self._input())
        self._results = results = await disk.run_blocking(Results, folder, batch.total)
        self._left, self._has_more, self._ahead, self._again = results.left(), True, deque(), []
        self.waiting, self._feeds = None, True
        noted, noted_at = (batch.completed, batch.failed), 0.0
        while not self._is_over(results):
            self._changed.clear()
            await self._read_ahead(self._rows)
            if (counts := (results.completed, results.failed)) != noted and time.monotonic() > noted_at:
                await self._note(results)
                noted, noted_at = counts, time.monotonic() + _NOTE_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(_NOTE_SECONDS):
                    await self._changed.wait()
        await self._land()
        if not self.stopping and self._refused is None and self.batch.state == "in_progress":
            await self._expire(self._rows, results)  # by the clock, which is asked once: it may go back

    def _is_over(self, results: Results) -> bool:
        done = results.completed + results.failed >= self.batch.total
        is_cancelled = self.batch.state != "in_progress"
        return done or is_cancelled or self.stopping or self._refused is not None or self._is_late

    @property
    def _is_late(self) -> bool:
        return time.time() >= self.batch.expires_at

    async def _expire(self, rows: RowFile, results: Results) -> None:
        """Record for each row without an answer that the batch's window has ended."""
        message = "The request could not be answered before the batch's completion window ended."
        left = list(results.left())
        for begin in range(0, len(left), _GROUP):

            def group(numbers: Sequence[int] = tuple(left[begin : begin + _GROUP])) -> list[Result]:
                ids = [(number, rows.read(number).custom_id) for number in numbers]
                return [unanswered(self.batch.id, n, name, EXPIRED, message) for n, name in ids]

            await self._parts.disk.run_blocking(lambda made: results.append(made()), group)

    async def _finalize(self) -> None:
        """Write the files of results, and end the batch. An interruption at any point loses nothing."""
        parts, folder, state = self._parts, self._parts.folders.of(self.batch.id), self.batch.state
        end: BatchState = "completed"
        errors = None
        results = self._results
        if results is None:
            results = self._results = await parts.disk.run_blocking(Results, folder, self.batch.total)
        if state == "cancelling":
            end = "cancelled"
        elif self._refused is not None:
            end, errors = "failed", [BatchError(code=self._refused.code, message=self._refused.message)]
        elif results.expired:
            end = "expired"
        elif state == "in_progress":
            await self._move(state, "finalizing", **self._facts(results))
            state = "finalizing"
        ids = {}
        for fact, name in (("output_file", OUTPUT), ("error_file", ERRORS)):
            ids[fact] = await self._keep(folder / name, name)
        await self._move(state, end, errors=errors, **self._facts(results), **ids)
        await self._forget()

    async def _keep(self, path: Path, name: str) -> str | None:
        """Return a file of the tenant's with the content of one here, of the same id each time, unless
        empty."""
        parts, batch = self._parts, self.batch
        size = (await parts.disk.run_blocking(path.stat)).st_size
        if not size:
            return None
        kind = name.partition(".")[0]
        file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"
        blob = await parts.disk.run_blocking(parts.files.store.add_file, path)
        await parts.files.add(batch.tenant, blob, f"{batch.id}_{name}", "batch_output", file_id)
        return file_id

    async def _move(
        self,
        before: BatchState,
        state: BatchState,
        errors: Sequence[BatchError] | None = None,
        **facts: Any,
    ) -> None:
        """Raises BatchStateError when somebody else has moved the batch, which was `before`."""
        run, records = self._parts.threads.run_blocking, self._parts.records
        self.batch = await run(
            records.move, self.batch.id, state, (before,), server=self.batch.server, errors=errors, **facts
        )

    async def _note(self, results: Results) -> None:
        run, note = self._parts.threads.run_blocking, self._parts.records.note
        await run(note, self.batch.id, server=self.batch.server, **self._facts(results))

    def _facts(self, results: Results) -> dict[str, Any]:
        return {"completed": results.completed, "failed": results.failed, "usage": dict(results.usage)}

    async def _forget(self) -> None:
        await self._put_down()
        await self._parts.disk.run_blocking(self._parts.folders.forget, self.batch.id)

    async def _put_down(self) -> None:
        """Close the files of rows and results; nothing that is stored is lost."""
        await self._land()
        for held in (self._results, self._rows):
            if held is not None:
                await self._parts.disk.run_blocking(held.close)
        self._results = self._rows = None

    async def _land(self) -> None:
        """Wait until no row is being answered, and all answers are on the disk, if that has room."""
        self._feeds = False
        if self.stopping and self.flying:
            await asyncio.wait(self.flying, timeout=STOP_SECONDS)
        for task in list(self.flying):
            task.cancel()
        if self.flying:
            await asyncio.wait(self.flying)
        if self._committing is not None:
            await self._committing
        self._pending.clear()

    # ---- rows --------------------------------------------------------------------------------

    async def _read_ahead(self, rows: RowFile) -> None:
        held = [*self._ahead, *self._again]
        if len(self._ahead) >= _AHEAD_ROWS // 2 or len(held) >= HELD_ROWS or not self._has_more:
            return
        if sum(memoryview(turn.row.body).nbytes for turn in held) >= HELD_BYTES:
            return

        def read() -> list[_Turn]:
            found, size = [], 0
            for number in self._left:
                row = rows.read(number)
                found.append(_Turn(number, row))
                size += len(bytes(row.body))
                if len(found) >= _AHEAD_ROWS or size >= _AHEAD_BYTES:
                    break
            return found

        found = await self._parts.disk.run_blocking(read)
        self._has_more = bool(found)
        self._ahead.extend(found)

    @property
    def has_turn(self) -> bool:
        """Return True if a row of it could be answered now."""
        if not self._feeds or self._stuck or self._refused is not None or len(self._pending) > _GROUP:
            return False
        now = time.monotonic()
        if now < self._not_before or self.batch.state != "in_progress" or self.stopping:
            return False
        return bool(self._ahead) or any(turn.at <= now for turn in self._again)

    def begin_row(self) -> asyncio.Task[None]:
        """Have the next row answered."""
        now = time.monotonic()
        due = next((turn for turn in self._again if turn.at <= now), None)
        if due is not None:
            self._again.remove(due)
        turn = due or self._ahead.popleft()
        if len(self._ahead) < _AHEAD_ROWS // 2:
            self._changed.set()
        task = asyncio.get_running_loop().create_task(self._answer(turn))
        self.flying.add(task)
        task.add_done_callback(self.flying.discard)
        return task

    async def _answer(self, turn: _Turn) -> None:
        try:
            await self._ask(turn)
        except Exception:
            _log.exception("row %d of batch %s failed", turn.number, self.batch.id)
            failed = SequenceFailedError(
                "The server failed on this row; its log says why.", code="row_failed"
            )
            self._take(turn, _refusal(failed))

    async def _ask(self, turn: _Turn) -> None:
        try:
            caller = await self._caller()
            reservation = self._parts.limiter.enter(caller)
        except (UnauthenticatedError, ForbiddenError) as error:
            self._refused = error
            self._changed.set()
        except (QuotaSpentError, UnavailableError) as error:
            self._pause(turn, error.retry_after, error.message)
        except ApiError as error:
            self._take(turn, _refusal(error))
        else:
            self._take(turn, await self._post(turn, caller, reservation))

    async def _post(self, turn: _Turn, caller: Caller, reservation: QuotaReservation) -> InnerAnswer:
        if self._parts.post is None:
            raise RuntimeError("rows run before the app is there")
        request_id = record_id(self.batch.id, turn.number)
        return await self._parts.post(turn.row.url, bytes(turn.row.body), request_id, caller, reservation)

    async def _caller(self) -> Caller:
        """Return the caller who made the batch, as its key is now.

        Raises UnauthenticatedError, ForbiddenError, UnavailableError.
        """
        caller = await self._parts.keys.caller_of(self.batch.key)
        if not caller.may("generate"):
            raise InsufficientScopeError("generate", caller.key)
        return replace(caller, background=True)

    def _take(self, turn: _Turn, answer: InnerAnswer) -> None:
        """Store an answer, or have the row answered again if the server could not answer it."""
        code, message = _error(answer) if answer.status >= 400 else (None, "")
        if code in _WAITS:
            self._pause(turn, _seconds(answer.headers.get("retry-after")), message)
        elif code == "crash_suspect":
            self._try_again(turn, turn.tries, message)
        elif turn.tries + 1 < (
            MOST_TRIES if code == "step_failed" else ABSENT_TRIES if answer.status == 503 else 0
        ):
            self._try_again(turn, turn.tries + 1, message)
        else:
            self.waiting = None
            name, number = turn.row.custom_id, turn.number
            request_id = record_id(self.batch.id, number)
            self._pending.append(
                answered(self.batch.id, number, name, answer.status, request_id, answer.body)
            )
            if self._committing is None:
                self._committing = asyncio.get_running_loop().create_task(self._commit())

    def _pause(self, turn: _Turn, seconds: float | None, why: str) -> None:
        """Postpone the row, and all others with it."""
        pause = _TICK_SECONDS if seconds is None else min(max(seconds, _TICK_SECONDS), _MOST_PAUSE)
        self._not_before = max(self._not_before, time.monotonic() + pause)
        self._ahead.appendleft(turn)
        self.waiting = why

    def _try_again(self, turn: _Turn, tries: int, why: str) -> None:
        self._again.append(replace(turn, tries=tries, at=time.monotonic() + _ROW_AGAIN.pause(tries)))
        self.waiting = why

    async def _commit(self) -> None:
        """Write pending results to the disk, group by group; on a full disk try again and again."""
        failures = 0
        try:
            while self._pending and self._results is not None:
                group, self._pending = self._pending, []
                try:
                    await self._parts.disk.run_blocking(self._results.append, group)
                    failures, self._stuck, self.waiting = 0, False, None
                    for result in group:
                        self._parts.answered["completed" if result.ok else "failed"] += 1
                except Exception as error:
                    self._pending = group + self._pending
                    failures, self._stuck = failures + 1, True
                    self.waiting = f"answers cannot be kept in --data-dir: {error}"
                    _log.warning("batch %s waits: its answers cannot be kept: %s", self.batch.id, error)
                    if self.stopping or self.batch.state == "cancelling":
                        return  # these rows are answered again after the next start, or not at all
                    await self._nap(_TROUBLE.pause(failures))
                self._changed.set()
        finally:
            self._committing = None
            self._stuck = False


class BatchRunner:
    """Follows the registry, and gives the engine's free places to the rows of this server's batches."""

    def __init__(self, parts: Parts, look_seconds: float) -> None:
        self._parts = parts
        self._look_seconds = look_seconds
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        self._ending = False
        self._next_sweep = 0.0
        self._feeder: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()

    def look(self) -> None:
        """Something has changed in the registry."""
        self._changed.set()

    def waiting(self, batch_id: str) -> str | None:
        """Return the reason why nothing of a batch is computed now, as far as this server knows."""
        found = self._runs.get(batch_id)
        if found is None:
            return None
        run = found[0]
        if run.waiting is None and run.batch.state == "in_progress" and not run.flying and not self._room():
            return "the engine is not ready, or all its places are taken by requests that are waited for"
        return run.waiting

    @property
    def answered(self) -> Mapping[str, int]:
        """Rows that were kept since the start, as `completed` and `failed`."""
        return self._parts.answered

    @property
    def flying(self) -> int:
        """Rows that are being answered."""
        return sum(len(run.flying) for run, _ in self._runs.values())

    async def follow(self, post: InnerPost) -> None:
        """Do what the registry says, whatever fails, until cancelled. post: has routes answer."""
        self._parts.post = post
        while not self._parts.peers.owns_jobs:  # JobScheduler claims them
            await asyncio.sleep(self._look_seconds)
        feeding = keep_running("feeding rows of batches", self._feed)
        self._feeder = asyncio.get_running_loop().create_task(feeding)
        while not self._ending:
            self._changed.clear()
            try:
                await self._reconcile()
            except (RegistryError, StoreError, OSError) as error:
                _log.warning("batches cannot be followed: %s", error)
            except Exception:
                _log.exception("batches cannot be followed")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_seconds):
                    await self._changed.wait()

    async def stop(self) -> None:
        """Feed no more rows, let those that run end, and keep what they answer."""
        self._ending = True
        if self._feeder is not None:
            self._feeder.cancel()
        for run, _ in self._runs.values():
            run.stop()
        if self._runs:
            await asyncio.wait([task for _, task in self._runs.values()])

    async def _reconcile(self) -> None:
        parts = self._parts
        if not parts.peers.owns_jobs:  # a copy of the data folder does
            for run, _ in self._runs.values():
                run.stop()
            return
        if parts.peers.have_been and parts.peers.holds_lease:
            await self._take_over()
        found = await parts.threads.run_blocking(parts.records.open_batches, parts.jobs.server)
        for batch in found:
            if batch.id in self._runs and batch.state == "cancelling":
                self._runs[batch.id][0].cancel()
        chosen = _in_turn(found)[:MOST_RUNS]
        for batch_id in self._runs.keys() - {batch.id for batch in chosen}:
            self._runs[batch_id][0].stop()  # for a tenant that has fewer: it continues when its turn comes
        for batch in chosen:
            if len(self._runs) >= MOST_RUNS or self._ending:
                break
            if batch.id not in self._runs:
                self._begin(batch)
        if time.monotonic() >= self._next_sweep:
            kept = await parts.threads.run_blocking(parts.records.open_ids, parts.jobs.server)
            await parts.disk.run_blocking(parts.folders.keep_only, kept)
            self._next_sweep = time.monotonic() + SWEEP_SECONDS

    async def _take_over(self) -> None:
        """Resume the batches of servers that are gone, if their files are in this one's store."""
        parts = self._parts
        for batch in await parts.threads.run_blocking(parts.records.lost, parts.jobs.server):
            ends = batch.state == "cancelling"
            if not ends and not await parts.files.is_stored(batch.tenant, batch.input_file):
                continue
            with suppress(UnknownBatchError):  # another was faster
                await parts.disk.run_blocking(parts.folders.forget, batch.id)  # of when it was here before
                await parts.threads.run_blocking(
                    parts.records.take_batch, batch.id, batch.server, parts.jobs.server
                )
                _log.warning("batch %s is taken over from %s", batch.id, batch.server)

    def _begin(self, batch: BatchRecord) -> None:
        run = BatchRun(self._parts, batch)
        task = asyncio.get_running_loop().create_task(run.work())
        self._runs[batch.id] = run, task

        def forget(done: asyncio.Task[None]) -> None:
            del self._runs[batch.id]
            if not done.cancelled() and (error := done.exception()) is not None:
                _log.error("batch %s broke off, and is started again", batch.id, exc_info=error)
            self.look()

        task.add_done_callback(forget)

    async def _feed(self) -> None:
        """Fill the engine's free places, by turns among tenants, with each one's oldest batch first."""
        while True:
            self._freed.clear()
            while self.flying < self._room() and (run := self._next()) is not None:
                run.begin_row().add_done_callback(lambda _: self._freed.set())
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._freed.wait()

    def _room(self) -> int:
        """Return how many rows may be answered at once."""
        supervisor = self._parts.supervisor
        if supervisor.base is None or not supervisor.ready.is_set() or supervisor.paused:
            return 0
        if not self._parts.peers.owns_jobs:
            return 0
        places = supervisor.base.max_sequences
        free = max(0, places - supervisor.client.foreground_sequences)
        return min(self._parts.most or places + SPARE_ROWS, free + SPARE_ROWS) if free else 0

    def _next(self) -> BatchRun | None:
        """Return a run of the tenant with the fewest rows in flight, among the runs that have a row to
        answer."""
        taken: Counter[str] = Counter()
        for run, _ in self._runs.values():
            taken[run.batch.tenant] += len(run.flying)
        ready = [run for run, _ in self._runs.values() if run.has_turn]
        return min(ready, key=lambda run: (taken[run.batch.tenant], run.batch.number), default=None)


def _in_turn(batches: Sequence[BatchRecord]) -> list[BatchRecord]:
    """Return batches that only need to end, then each tenant's oldest, then each one's second, and so on."""
    seen: Counter[str] = Counter()
    placed = []
    for batch in sorted(batches, key=lambda batch: batch.number):
        ends = batch.state == "cancelling"
        placed.append((not ends, seen[batch.tenant], batch.number, batch))
        seen[batch.tenant] += not ends
    return [batch for *_, batch in sorted(placed, key=lambda one: one[:3])]


def _refusal(error: ApiError) -> InnerAnswer:
    return InnerAnswer(status_of(error)[0], {}, msgspec.json.encode(error_body(error)))


def _error(answer: InnerAnswer) -> tuple[str | None, str]:
    """Return the code and the message of an answer that is an error."""
    try:
        error = msgspec.json.decode(answer.body)["error"]
        return error.get("code"), str(error.get("message"))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return None, ""


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdecimal() else None
