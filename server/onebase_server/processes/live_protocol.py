"""Messages between the api and the trainer of live adapters, in the frames of `engine.messages`.

They carry no operation and no result, which are files (`onebase_training.live_store`): they say only where to
look. `StartLive` → `LiveReady`; then any number of `Look` and `Done`. `StopLive` ends the process.
"""

from __future__ import annotations

import msgspec

from onebase_engine.engine.messages import EngineConfig

# ---- api -> trainer --------------------------------------------------------------------------


class StartLive(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Train the live adapters of a folder on the base that an engine has published."""

    config: EngineConfig
    manifest: bytes
    """Manifest from the engine's `Ready`."""
    root: str
    """Folder of the live adapters."""
    base_id: str
    """Identity of the base: those of others are not trained."""
    base_name: str
    base_commit: str | None = None
    share: float
    """Part of the time in which it may compute while sequences run, 0 to 1."""
    memory_limit: int
    """Memory limit, in bytes; 0: half of what is free."""
    refuse: list[tuple[str, int]] = []
    """Operations, by model and number, that trainers have died of."""


class Look(msgspec.Struct, frozen=True, tag=True):
    """Something was written for a model: its spec, an operation, or that it is unloaded."""

    model_id: str


class StopLive(msgspec.Struct, frozen=True, tag=True):
    """Write all models to the disk and end."""


ToLive = StartLive | Look | StopLive


# ---- trainer -> api --------------------------------------------------------------------------


class LiveReady(msgspec.Struct, frozen=True, tag=True):
    """The base is attached."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """An operation's result is on the disk; number 0: what was made of the model's spec."""

    model_id: str
    seq_id: int


class LiveFailed(msgspec.Struct, frozen=True, tag=True):
    """The trainer ends because of an error."""

    message: str


FromLive = LiveReady | Done | LiveFailed


def to_live_decoder() -> msgspec.msgpack.Decoder[ToLive]:
    return msgspec.msgpack.Decoder(ToLive)


def from_live_decoder() -> msgspec.msgpack.Decoder[FromLive]:
    return msgspec.msgpack.Decoder(FromLive)
