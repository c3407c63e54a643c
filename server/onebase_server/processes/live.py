"""The trainer of live adapters: a process on the engine's base that does the operations of all of them.

The api runs it as `python -m onebase_server.processes live --fd N --base-fd M [--busy-fd K]`. It may be
killed at any moment: the next one continues from the folder.
"""

from __future__ import annotations

import importlib
import logging
import socket
from pathlib import Path

import torch

from onebase_engine.base.attach import attach
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.imports import load_compiler
from onebase_engine.machine import free_memory, keep_freed_memory
from onebase_server.processes.child import Channel, begin
from onebase_server.processes.engine import base_settings
from onebase_server.processes.live_protocol import (
    Done,
    LiveFailed,
    LiveReady,
    Look,
    StartLive,
    StopLive,
    ToLive,
    to_live_decoder,
)
from onebase_server.processes.time_share import BusyFlag, device_gate
from onebase_server.processes.trainer import CPU, alone, bound_memory, memory_limit, private_bytes, threads_of
from onebase_training.events import Interrupted, Reason
from onebase_training.live import MODELS_SHARE, BaseName, LiveModels
from onebase_training.live_operations import Refused
from onebase_training.live_store import LiveStore

DIED = Refused(
    message="The trainer died of this operation each time that it was tried: send fewer or shorter rows.",
    code="trainer_died",
    category="server",
)
DIED_OF_MODEL = Refused(
    message="The trainer died each time that it made this model: begin another from a checkpoint of it.",
    code="model_broken",
    category="server",
)

logger = logging.getLogger(__name__)


def main() -> int:
    inherited = begin("live")
    keep_freed_memory()
    return run_live(inherited.sock, inherited.base_fd, inherited.busy_fd)


def run_live(sock: socket.socket, base_fd: int | None, busy_fd: int | None) -> int:
    """Do operations until the api stops this process or goes; returns the process's exit status."""
    channel = Channel[ToLive](sock, to_live_decoder().decode, leave_within=0.0)
    try:
        return _LiveWork(channel, base_fd, busy_fd).run_to_end()
    finally:
        channel.close()


class ModelMemory:
    """Memory limit of this process, for all live models together.

    Args:
        asked: bytes that the models may take; 0: as many as `memory_limit` finds.

    Attributes:
        limit: bytes that the models may take now.
    """

    def __init__(self, asked: int, device: torch.device, config: EngineConfig) -> None:
        self._device = device
        self._is_fixed = asked > 0 or (device.type == "cuda" and not config.kv_memory)
        self.limit = memory_limit(asked, device, config)
        self._uncounted = bound_memory(self.limit, device)

    def find(self) -> int:
        """Set the limit to half of what is free now and of what the models have, and return it. It falls no
        lower than to what they have and their passes need beside it. A limit that was asked for, and one that
        the engine sets aside on a GPU, stay as they are."""
        if self._is_fixed:
            return self.limit
        taken = self._taken()
        lowest = min(self.limit, int(taken / MODELS_SHARE))
        found = max(lowest, (free_memory(self._device) + taken) // 2)
        if found != self.limit:
            self.limit = found
            bound_memory(found, self._device, self._uncounted)
        return self.limit

    def _taken(self) -> int:
        """Return the bytes that the models have."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return private_bytes() - self._uncounted


class _LiveWork:
    """One process's work."""

    def __init__(self, channel: Channel[ToLive], base_fd: int | None, busy_fd: int | None) -> None:
        self._channel = channel
        self._base_fd = base_fd
        self._busy = None if busy_fd is None else BusyFlag(busy_fd)
        self._reason: Reason | None = None
        self._looks: dict[str, None] = {}

    def run_to_end(self) -> int:
        """Return the process's exit status."""
        start = self._channel.receive()
        if not isinstance(start, StartLive):
            return 0
        try:
            with alone(Path(start.root)):
                self._run(start)
        except Exception as error:
            logger.exception("live adapters cannot be trained")
            self._channel.send(LiveFailed(f"{type(error).__name__}: {error}"))
            return 1
        return 0

    def _run(self, start: StartLive) -> None:
        torch.set_num_threads(threads_of(start.config))
        base = attach(base_settings(start.config, CPU), start.manifest, self._base_fd)
        device = next(base.parameters()).device
        # Before the limit, which is for what the models take.
        importlib.import_module("peft")
        load_compiler()
        memory = ModelMemory(start.memory_limit, device, start.config)
        models = LiveModels(
            base,
            LiveStore(Path(start.root), start.base_id),
            device_gate(device, self._busy, start.share, self._stopping),
            BaseName(start.base_name, start.base_commit),
            int8_cache=start.config.kv_dtype == "int8",
            memory=memory.limit,
            find_memory=memory.find,
            joins=device.type == "cuda",
            on_done=lambda model_id, seq_id: self._channel.send(Done(model_id, seq_id)),
        )
        for model_id, seq_id in start.refuse:
            models.refuse(model_id, seq_id, DIED if seq_id else DIED_OF_MODEL)
        self._channel.send(LiveReady())
        models.enqueue_all()
        try:
            while self._reason is None:
                if not models.do_next() and not self._looks:
                    for message in self._channel.arrived(models.seconds_to_retry()):
                        self._take(message)
                self._stopping()
                for model_id in self._looks:
                    models.enqueue(model_id)
                self._looks.clear()
        except Interrupted:
            pass
        models.write_points()

    def _stopping(self) -> Reason | None:
        for message in self._channel.arrived():
            self._take(message)
        return self._reason

    def _take(self, message: ToLive) -> None:
        if isinstance(message, Look):
            self._looks[message.model_id] = None
        elif isinstance(message, StopLive):
            self._reason = "pause"
