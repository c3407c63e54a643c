"""What the upkeep of live training deletes, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from onebase_edge.background import Threads
from onebase_edge.errors import InvalidRequestError
from onebase_server.live.service import (
    IDLE_SECONDS,
    LiveTraining,
    Place,
    adapter_name,
)
from onebase_training.live_operations import Checkpoint, ModelSpec, OptimStep
from onebase_training.live_store import CHECKPOINT, LiveStore

RUN = "1b2c3d4e-0000:train:3"
LATER = 2_000_000_000.0
"""Long after the service began."""


def checkpoint(store: LiveStore, name: str, created: float) -> None:
    folder = store.checkpoint_folder(RUN, "sampler", name)
    folder.mkdir()
    made = Checkpoint(
        name=name, kind="sampler", folder=str(folder), model=RUN, seq_id=1, step=1, digest="", bytes=1,
        rank=4, alpha=32.0, targets=[], train_mlp=True, train_attn=True, train_unembed=True, optimizer=False,
        created=created,
    )  # fmt: skip
    (folder / CHECKPOINT).write_bytes(msgspec.json.encode(made))


class Upkeep:
    """A run with three steps that are sampled, and a named checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.store = LiveStore(folder)
        self.store.create(ModelSpec(id=RUN, rank=4, owner="acme", session="s", created=1.0))
        for number in range(3):
            checkpoint(self.store, f"live-{number}", LATER + number)
        checkpoint(self.store, "final", LATER)
        self.open = {"s"}
        self.unloaded: list[str] = []

    def tidy(self, after: float, in_use: Collection[str] = ()) -> list[str]:
        """Tidy so many seconds later, and return the names that are left."""
        asyncio.run(self._tidy(LATER + after, in_use))
        return sorted(one.name for one in self.store.checkpoints(RUN))

    async def _tidy(self, now: float, in_use: Collection[str]) -> None:
        await self.service().tidy(in_use, now)

    def service(self) -> LiveTraining:
        async def unload(run: str) -> None:
            self.unloaded.append(run)
            self.store.unload(run)

        threads: Any = Threads("test", 1)
        trainer: Any = SimpleNamespace(store=self.store, unload=unload)
        records: Any = SimpleNamespace(open_sessions=lambda *_: self.open, note_run=lambda *_: None)
        nothing: Any = SimpleNamespace(
            disk=threads, drop_live=lambda path: set(), forget=lambda digests: None, trained=None
        )
        return LiveTraining(
            trainer, records, threads, "server", base_names=["base"], tokenizer="base", max_rank=8,
            files=nothing, residency=nothing, library=nothing, usage=nothing,
        )  # fmt: skip


def test_a_steps_weights_go_once_nobody_samples_from_them(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path)
    everything = ["final", "live-0", "live-1", "live-2"]
    assert upkeep.tidy(IDLE_SECONDS - 1) == everything
    assert upkeep.tidy(IDLE_SECONDS + 3, in_use=["s:sample:1"]) == ["final", "live-1", "live-2"]
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-2"]  # the newest, and what has a name
    assert upkeep.unloaded == []


def test_a_run_ends_with_its_session_and_leaves_what_has_a_name(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path)
    upkeep.open = set()
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final"]
    assert upkeep.unloaded == [RUN]


def test_what_another_base_has_trained_stays_and_is_refused(tmp_path: Path) -> None:
    upkeep = Upkeep(tmp_path)
    upkeep.store, upkeep.open = LiveStore(tmp_path, "another base"), set()
    assert upkeep.tidy(IDLE_SECONDS + 3) == ["final", "live-0", "live-1", "live-2"]
    assert upkeep.unloaded == []
    caller: Any = SimpleNamespace(tenant="acme")
    path = f"tinker://{RUN}/sampler_weights/final"
    with pytest.raises(InvalidRequestError, match="model_path: 'final' was trained on another base"):
        asyncio.run(upkeep.service().checkpoint(caller, path, "model_path"))
    with pytest.raises(InvalidRequestError, match="was trained on another base"):
        asyncio.run(upkeep.service().submit(caller, RUN, 1, OptimStep()))


def test_a_path_names_a_checkpoint_and_a_run_its_adapter() -> None:
    place = Place.read(f"tinker://{RUN}/sampler_weights/final", "path")
    assert (place.run, place.kind, place.name, place.is_of_step) == (RUN, "sampler", "final", False)
    assert place.path == f"tinker://{RUN}/sampler_weights/final"
    assert adapter_name(RUN) == "run-1b2c3d4e-3"
    for wrong in ("final", "tinker://x/y", f"tinker://{RUN}/other/final", f"tinker://{RUN}/weights/a/b"):
        with pytest.raises(InvalidRequestError, match="names no checkpoint"):
            Place.read(wrong, "path")
