"""The api's side of one trainer process."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onebase_adapters.training.events import Event, Reason
from onebase_engine.engine.messages import encode
from onebase_server.processes.engine_link import ChildProcess
from onebase_server.processes.trainer_protocol import (
    Check,
    Checked,
    Failed,
    FromTrainer,
    Said,
    Stop,
    Stopped,
    Train,
    Trained,
    from_trainer_decoder,
)

TRAINER_COMMAND = (sys.executable, "-m", "onebase_server.processes.trainer")
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads of a trainer that wait for each other must not spin on cores that serving uses."""
LAST_WORDS_SECONDS = 10.0
"""From a trainer's last message to its end."""


@dataclass(frozen=True)
class Died:
    """The process ended without an answer. `how`: `signal SIGKILL`, `exit status 1`."""

    how: str


Outcome = Checked | Trained | Stopped | Failed | Died


class Trainer:
    """One running trainer process. Made by `start`; `outcome` must be awaited, and ends it in any case."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._answer: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        self._child: ChildProcess | None = None

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        message: Check | Train,
        fds: Mapping[str, int],
        on_event: Callable[[Event], None],
    ) -> Trainer:
        """`command` gets `--fd N` and an option for each of `fds` appended.

        Raises OSError; ValueError, OverflowError: the message cannot be sent.
        """
        frame = encode(message)
        trainer = cls(on_event)
        trainer._child = await ChildProcess.spawn(
            command, from_trainer_decoder(), trainer._receive, trainer._closed, fds, ENVIRONMENT
        )
        trainer._child.send_frame(frame)
        return trainer

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def stop(self, reason: Reason) -> None:
        """Ask it to end at its next layer."""
        if self._child is not None:
            self._child.send(Stop(reason))

    def kill(self) -> None:
        if self._child is not None:
            self._child.signal_group(signal.SIGKILL)

    async def outcome(self) -> Outcome:
        """What it answered, once the process is gone."""
        if self._child is None:
            return Died("never started")
        try:
            answer = await self._answer
            how = await self._child.end(LAST_WORDS_SECONDS)
        except BaseException:
            self.kill()
            await self._child.wait()
            raise
        return answer or Died(how)

    def _receive(self, message: FromTrainer) -> None:
        if isinstance(message, Said):
            self._on_event(message.event)
        elif not self._answer.done():
            self._answer.set_result(message)

    def _closed(self) -> None:
        if not self._answer.done():
            self._answer.set_result(None)
