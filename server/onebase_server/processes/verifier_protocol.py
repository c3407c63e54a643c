"""What the api and the workshop say to each other, in the frames of `engine.protocol`.

`Attach` → `Attached` or `Fatal`; then `Prove` → `Progress`… → `Proved` or `Rejected`, one job at a time.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from onebase_engine.engine.messages import EngineConfig, Fatal, Shutdown

Stage = Literal["validating", "proving"]


# ---- what a version turned out to be ---------------------------------------------------------


class ModuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """One adapted module of a version."""

    name: str
    kind: Literal["lora", "dora", "saved", "tokens"]
    rank: int
    """0 unless the kind is lora or dora."""
    alpha: float
    parameters: int
    norm: float
    """Frobenius norm of what the module adds to its weight: scale * B @ A, or the change of what it
    replaces."""


class ProofReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared with PEFT, and how far it was off."""

    modules_compared: int
    modules_changed: int
    """Modules that the adapter makes compute something else."""
    rows: int
    """Input rows of each module, alone and in company taken together."""
    exact: bool
    """Bit-equal was asked for, and was found (the CPU)."""
    largest_difference: float
    """Of any module, relative to the largest output of PEFT's; 0 when exact."""
    texts: int
    """Greedy texts compared."""
    tokens_compared: int
    texts_changed: int
    """Texts that differ from the bare base's."""
    base_unchanged: bool
    seconds: float


class VersionReport(msgspec.Struct, frozen=True, kw_only=True):
    """A proven version. Stored as JSON in the registry, and given out over HTTP as it is."""

    kinds: list[str]
    rank: int
    """The largest of any module, as is `alpha`."""
    alpha: float
    rslora: bool
    targets: list[str]
    parameters: int
    bytes: int
    """In memory, once loaded."""
    base_name: str | None
    """Of the base that the adapter's config names."""
    dropped: list[str]
    """Tensors of the file that were the base's own, bit for bit, and were left out."""
    modules: list[ModuleReport]
    proof: ProofReport


# ---- api -> workshop -------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message: attach the base that an engine has published."""

    config: EngineConfig
    manifest: bytes
    """From the engine's `Ready`."""
    base_id: str = ""
    """Written into prepared files, so that no other base ever loads them."""


class Prove(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Validate, load and prove one version; write its prepared file."""

    digest: str
    config_path: str
    weights_path: str
    prepared_path: str
    """Where to write the prepared file; nothing is left there when the job fails."""
    probes: list[list[int]]
    """Prompts, as tokens, whose greedy texts are compared."""
    probe_tokens: int
    """Tokens of each of those texts."""
    allow_noop: bool = False


ToWorkshop = Attach | Prove | Shutdown


# ---- workshop -> api -------------------------------------------------------------------------


class Attached(msgspec.Struct, frozen=True, tag=True):
    seconds: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    digest: str
    stage: Stage
    fraction: float
    """Of the whole job, 0 to 1."""


class Proved(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    digest: str
    report: VersionReport
    sha256: str
    """Of the prepared file."""
    bytes: int
    """Size of the prepared file."""


class Rejected(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The version is not served. `code` is stable, `message` is for the one who uploaded it."""

    digest: str
    code: str
    message: str


FromWorkshop = Attached | Progress | Proved | Rejected | Fatal


def to_workshop_decoder() -> msgspec.msgpack.Decoder[ToWorkshop]:
    return msgspec.msgpack.Decoder(ToWorkshop)


def from_workshop_decoder() -> msgspec.msgpack.Decoder[FromWorkshop]:
    return msgspec.msgpack.Decoder(FromWorkshop)
