"""The api's side of one trainer process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onebase_adapters.training.events import Event, Reason
from onebase_engine.engine.messages import encode
from onebase_engine.environment import behind_serving
from onebase_server.processes.link import AskedProcess
from onebase_server.processes.trainer_protocol import (
    Check,
    Checked,
    EndAfter,
    Failed,
    FromTrainer,
    RunEvent,
    Stop,
    Stopped,
    Train,
    Trained,
    from_trainer_decoder,
)

TRAINER_COMMAND = (sys.executable, "-m", "onebase_server.processes", "trainer")
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads of a trainer that wait for each other must not spin on cores that serving uses."""
LAST_WORDS_SECONDS = 10.0
"""From a trainer's last message to its end."""


@dataclass(frozen=True)
class Died:
    """The process ended without an answer. `how`: `signal SIGKILL`, `exit status 1`."""

    how: str


Outcome = Checked | Trained | Stopped | Failed | Died


class TrainerClient:
    """One running trainer process. Made by `start`; `outcome` must be awaited, and ends it in any case."""

    def __init__(self, process: AskedProcess[FromTrainer]) -> None:
        self._process = process

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        message: Check | Train,
        fds: Mapping[str, int],
        on_event: Callable[[Event], None],
    ) -> TrainerClient:
        """`command` gets `--fd N` and an option for each of `fds` appended.

        Raises OSError; ValueError, OverflowError: the message cannot be sent.
        """
        frame = encode(message)

        def take_event(message: FromTrainer) -> bool:
            if isinstance(message, RunEvent):
                on_event(message.event)
            return isinstance(message, RunEvent)

        environment = ENVIRONMENT | behind_serving()
        process = await AskedProcess.spawn(command, from_trainer_decoder(), take_event, fds, environment)
        process.ask(frame)
        return cls(process)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def stop(self, reason: Reason) -> None:
        """Ask it to end at its next layer."""
        self._process.tell(Stop(reason))

    def end_after(self, step: int) -> None:
        """Ask it to finish after this step, or the one that it computes."""
        self._process.tell(EndAfter(step))

    def kill(self) -> None:
        self._process.kill()

    async def outcome(self) -> Outcome:
        """What it answered, once the process is gone."""
        try:
            answer = await self._process.answer()
            how = await self._process.end(LAST_WORDS_SECONDS)
        except BaseException:
            self.kill()
            await self._process.end(LAST_WORDS_SECONDS)
            raise
        if answer is None or isinstance(answer, RunEvent):
            return Died(how)
        return answer
