"""The api's side of one trainer process."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from onebase_engine.engine.messages import encode
from onebase_engine.environment import behind_serving
from onebase_engine.machine import BEHIND_SERVING, niceness_for
from onebase_server.processes.link import AskedProcess
from onebase_server.processes.trainer_protocol import (
    Active,
    Check,
    DrawnReplies,
    EndAfter,
    Failed,
    FilesChecked,
    FindActive,
    FromTrainer,
    NotDrawn,
    RunEvent,
    Stop,
    Stopped,
    Train,
    Trained,
    from_trainer_decoder,
)
from onebase_training.events import Event, Reason
from onebase_training.rollouts import RolloutOrder

TRAINER_COMMAND = (sys.executable, "-m", "onebase_server.processes", "trainer")
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Environment of a trainer: threads that wait for each other must not spin on cores that serving uses."""
LAST_WORDS_SECONDS = 10.0
"""Time, in seconds, between a trainer's last message and its end."""
UNKNOWN = "unknown"
"""Digest that stands for an active version that was not found: no version has it, none is replaced."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Died:
    """The process ended without an answer. `how`: `signal SIGKILL`, `exit status 1`."""

    how: str


Outcome = FilesChecked | Trained | Stopped | Failed | Died


async def _none_active() -> Active:
    """Return that no version is active: there is no registry."""
    return Active()


async def _no_samples(rollout: RolloutOrder) -> DrawnReplies | NotDrawn:
    """Return that nothing samples: there is no engine."""
    return NotDrawn("no_samples", "This server samples nothing for jobs.")


class TrainerClient:
    """One running trainer process. Made by `start`; `outcome` must be awaited, and ends it in any case."""

    def __init__(self, process: AskedProcess[FromTrainer]) -> None:
        self._process = process
        self._answering: asyncio.Task[None] | None = None
        """Task that answers the trainer's newest question. It asks one at a time."""

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        message: Check | Train,
        fds: Mapping[str, int],
        on_event: Callable[[Event], None],
        find_active: Callable[[], Awaitable[Active]] = _none_active,
        draw: Callable[[RolloutOrder], Awaitable[DrawnReplies | NotDrawn]] = _no_samples,
    ) -> TrainerClient:
        """Start a trainer; `command` gets `--fd N` and an option for each of `fds` appended.

        find_active: gives the version that is active when training has ended. draw: samples replies for a
            run that learns from rewards, and grades them.

        Raises OSError; ValueError, OverflowError: the message cannot be sent.
        """
        frame = encode(message)

        def take_news(message: FromTrainer) -> bool:
            if isinstance(message, RunEvent):
                on_event(message.event)
            elif isinstance(message, FindActive):
                client._answering = asyncio.get_running_loop().create_task(client._answer(find_active))
            elif isinstance(message, RolloutOrder):
                client._answering = asyncio.get_running_loop().create_task(client._draw(draw, message))
            return isinstance(message, RunEvent | FindActive | RolloutOrder)

        environment = ENVIRONMENT | behind_serving()
        niceness = niceness_for(message.share) if isinstance(message, Train) else BEHIND_SERVING
        process = await AskedProcess.spawn(
            command, from_trainer_decoder(), take_news, fds, environment, niceness
        )
        client = cls(process)
        process.ask(frame)
        return client

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def stop(self, reason: Reason) -> None:
        """Ask it to end at its next layer."""
        self._process.notify(Stop(reason))

    def end_after(self, step: int) -> None:
        """Ask it to finish after this step, or the one that it computes."""
        self._process.notify(EndAfter(step))

    async def _answer(self, find_active: Callable[[], Awaitable[Active]]) -> None:
        """Send the trainer the active version. It waits for that, whatever fails here."""
        try:
            active = await find_active()
        except Exception as error:
            logger.exception("the active version was not found")
            problem = f"the server failed to find it ({type(error).__name__}: {error})"
            active = Active(label="The active version", digest=UNKNOWN, problem=problem)
        self._process.notify(active)

    async def _draw(
        self, draw: Callable[[RolloutOrder], Awaitable[DrawnReplies | NotDrawn]], rollout: RolloutOrder
    ) -> None:
        """Send the trainer its replies. It waits for them, whatever fails here."""
        try:
            frame = encode(await draw(rollout))
        except Exception:
            logger.exception("a rollout failed")
            frame = encode(NotDrawn("internal_error", "The server failed to sample; its log says why."))
        self._process.send(frame)

    def kill(self) -> None:
        self._process.kill()

    async def outcome(self) -> Outcome:
        """Wait until the process is gone, and return its answer, or Died without one."""
        try:
            answer = await self._process.answer()
            how = await self._process.end(LAST_WORDS_SECONDS)
        except BaseException:
            self.kill()
            await self._process.end(LAST_WORDS_SECONDS)
            raise
        finally:
            if self._answering is not None:
                self._answering.cancel()
        if answer is None or isinstance(answer, RunEvent | FindActive | RolloutOrder):
            return Died(how)
        return answer
