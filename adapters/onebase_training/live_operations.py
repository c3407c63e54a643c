"""Operations on a live adapter and their results, as they are kept in files.

A client trains by primitives instead of a job: it computes losses and gradients of its own rows, steps the
optimizer, saves and loads. The names are those of the Tinker API, whose semantics these operations have:
losses are sums, and gradients accumulate until a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

Kind = Literal["weights", "sampler", "external"]
Category = Literal["user", "server"]
_DTYPES: dict[str, str] = {"float32": "<f4", "int64": "<i8"}
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class DenseArray(msgspec.Struct, frozen=True, array_like=True):
    """Dense array. `data`: its numbers in C order, little-endian."""

    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: npt.ArrayLike) -> DenseArray:
        """Return the array as float32 or, if it is of whole numbers, as int64."""
        array = np.asarray(values)
        dtype: Literal["float32", "int64"] = "float32" if array.dtype.kind == "f" else "int64"
        return cls(dtype, array.shape, np.ascontiguousarray(array, _DTYPES[dtype]).tobytes())

    def array(self) -> npt.NDArray[Any]:
        """Return the array, which cannot be written to. Raises ValueError if the bytes have another size."""
        return np.frombuffer(self.data, _DTYPES[self.dtype]).reshape(self.shape)


class Datum(msgspec.Struct, frozen=True, array_like=True):
    """One row. `tokens`: N ids, int32 little-endian. `inputs`: arrays that the loss reads, by name; position
    i of each belongs to the token that follows token i."""

    tokens: bytes
    inputs: dict[str, DenseArray]

    @classmethod
    def of(cls, tokens: Sequence[int], inputs: Mapping[str, npt.ArrayLike]) -> Datum:
        """Return a row of token ids and arrays."""
        arrays = {name: DenseArray.of(values) for name, values in inputs.items()}
        return cls(np.asarray(tokens, "<i4").tobytes(), arrays)

    def __len__(self) -> int:
        return len(self.tokens) // 4


class StartingWeights(msgspec.Struct, frozen=True):
    """Checkpoint that a new model begins with. `folder` is absolute."""

    folder: str
    optimizer: bool = False


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A live adapter as it was asked for."""

    id: str
    rank: int
    seed: int = 0
    alpha: float = 32.0
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    start: StartingWeights | None = None
    version: str = ""
    """Version of an adapter that it begins with, as NAME@DIGEST: its layers, ranks and alphas are that one's,
    whose files the store keeps beside the spec."""
    owner: str = ""
    key: str = ""
    """Id of the API key that created it."""
    base: str = ""
    """Name of the base, as it was asked for."""
    base_id: str = ""
    """Identity of the base, which the store sets."""
    session: str = ""
    metadata: dict[str, Any] = {}
    created: float = 0.0
    """Unix seconds."""


class ParentCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Checkpoint, or version of an adapter, that a model's weights were last replaced by.

    digest, step: its own. optimizer: whether the optimizer's state came with it, and `step` was counted on
    from. from_base: whether it has no parent itself.
    """

    model: str
    kind: Kind
    name: str
    digest: str
    step: int
    optimizer: bool
    from_base: bool


class CheckpointFolder(msgspec.Struct, frozen=True, kw_only=True):
    """Saved weights: a PEFT folder, and with `optimizer` the state of Adam beside it. Those of the kind
    `external` are for other programs: they have no packed file, and may be encrypted.

    digest: that of the two PEFT files as a version, or of the packed one if it is alone: equal weights have
    equal digests. step: optimizer steps done since the base, or since `parent`, whose own steps are counted
    if its optimizer was loaded. parent: None: the weights began with the base. bytes: size of the folder.
    created, expires: Unix seconds. packed, packed_bytes: SHA-256 and size of `packed.safetensors`, which the
    engine loads. metadata: as it was saved. base_id: identity of the base that it was trained on. version:
    that of an adapter with which its model began, as NAME@DIGEST.
    """

    name: str
    kind: Kind
    folder: str
    model: str
    seq_id: int
    step: int
    digest: str
    bytes: int
    rank: int
    alpha: float
    targets: list[str]
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    optimizer: bool
    created: float
    expires: float | None = None
    packed: str = ""
    packed_bytes: int = 0
    metadata: dict[str, str] | None = None
    base_id: str = ""
    parent: ParentCheckpoint | None = None
    version: str = ""


# ---- operations ------------------------------------------------------------------------------


class ForwardBackward(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Compute the summed loss of all rows, and add its gradients to those of before."""

    data: list[Datum]
    loss: str
    config: dict[str, float | str] = {}
    forward_only: bool = False


class OptimStep(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Step AdamW with the gradients added up since the last step, clipped to a norm if that is not 0."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Save(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Save a checkpoint: `weights` with the optimizer, to continue from, `sampler`, to be served, or
    `external`, to be downloaded.

    packed_only: write the file that the engine loads and no PEFT folder, which takes half the time.
    recipients: of an `external` one, public keys of age (https://age-encryption.org) or SSH, to which each
    file is encrypted; its name then ends in `.age`.
    """

    name: str
    kind: Kind
    packed_only: bool = False
    ttl_seconds: float | None = None
    overwrite: bool = False
    metadata: dict[str, str] | None = None
    recipients: list[str] = []


class Load(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Replace the weights by those of a checkpoint, and the optimizer's state by its own or by none."""

    folder: str
    optimizer: bool = False


class Refuse(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Do nothing: the request with this number was refused before it could become an operation."""

    message: str
    code: str = "invalid_request"


Operation = ForwardBackward | OptimStep | Save | Load | Refuse


# ---- results ---------------------------------------------------------------------------------


class Computed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Result of ForwardBackward. outputs: for each row `logprobs` of its targets, [N] or [N, K], in nats."""

    outputs: list[dict[str, DenseArray]]
    metrics: dict[str, float]
    tokens: int
    seconds: float


class Stepped(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Result of OptimStep. `step`: number of steps done, this one included."""

    metrics: dict[str, float]
    step: int


class WeightsSaved(msgspec.Struct, frozen=True, tag=True):
    checkpoint: CheckpointFolder


class Loaded(msgspec.Struct, frozen=True, tag=True):
    checkpoint: CheckpointFolder


class Refused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The operation was not done and changed nothing. `message` says what to change."""

    message: str
    code: str = "invalid_value"
    category: Category = "user"


Result = Computed | Stepped | WeightsSaved | Loaded | Refused


class RefusedError(Exception):
    """An operation cannot be done. `code`, `category`: as in Refused."""

    def __init__(self, message: str, code: str = "invalid_value", category: Category = "user") -> None:
        super().__init__(message)
        self.refused = Refused(message=message, code=code, category=category)
