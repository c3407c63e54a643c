"""Adapters, their versions and their proofs as the server reports them, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

READY: Final = "ready"
FAILED: Final = "failed"
MergeMethod: TypeAlias = Literal["linear", "cat", "ties", "dare_linear", "dare_ties"]
MergeSign: TypeAlias = Literal["total", "frequency"]


@dataclass(frozen=True)
class Adapter:
    """A name that requests can ask for. It points at one of its versions, the active one, or at none."""

    name: str
    version: str | None
    """The digest of the active version; None while none is."""
    active: bool
    state: str
    """The state of the active version, else of the newest one: see AdapterVersion."""
    kinds: tuple[str, ...]
    """Parts of the active version: `lora`, `dora`, `saved`, `tokens`. Like `rank`, `alpha`, `targets`,
    `parameters` and `bytes` it is empty or None while no version is active."""
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    """The layers that the active version changes, such as `q_proj`."""
    parameters: int | None
    bytes: int | None
    base: str
    """The name of the base that it belongs to."""
    tenant: str
    """Tenant that owns it."""
    pinned: bool
    """Whether it stays in memory even if others are used more recently."""
    tier: str | None
    """Place of the active version: `slot` (on the accelerator), `host` (in memory) or `disk`."""
    versions: int
    """Number of its versions."""
    created_at: float
    """Unix time in seconds, as `updated_at`."""
    updated_at: float
    shared: bool = False
    """Whether all tenants may use it and look at it; only its owner changes it."""


@dataclass(frozen=True)
class AdapterSource:
    """Source of a version's files."""

    kind: str
    """`upload`, `hub`, `folder`, `training` or `merge`."""
    repo: str | None = None
    revision: str | None = None
    """Revision that was asked for, such as `main`."""
    commit: str | None = None
    """The commit that `revision` was at that moment."""
    subfolder: str | None = None
    job: str | None = None
    """The job that trained it."""
    parent: str | None = None
    """`name@version` with the whole digest, if that job continued from a version of an adapter."""
    method: str | None = None
    """Method by which it was merged of others; None unless it was."""
    parents: tuple[MergeParent, ...] = ()
    """Versions of which it was merged."""


@dataclass(frozen=True)
class MergeParent:
    """A version that another one was merged of."""

    name: str
    version: str
    """Digest of the version."""
    weight: float


@dataclass(frozen=True)
class Progress:
    """Progress of a version towards being ready, or of a file to the server."""

    stage: str
    """`uploading`, `pulling`, `validating` or `proving`, at the end `ready` or `failed`; or `downloading`."""
    fraction: float | None = None
    """0 to 1, None if not known. Validating and proving are one piece of work, and share one fraction."""
    bytes_done: int | None = None
    """Bytes sent so far, while uploading; or received."""
    bytes_total: int | None = None
    file: str | None = None
    """The name of the file that is sent, where each is sent on its own."""


ProgressCallback: TypeAlias = Callable[[Progress], object]
"""Called with each step forward, in the thread or event loop that waits. It must return soon."""


@dataclass(frozen=True)
class VersionFailure:
    """Reason why a version failed."""

    code: str
    """The exact kind, stable enough to compare with."""
    message: str


@dataclass(frozen=True)
class ModuleReport:
    """Change that a version makes to one module of the base."""

    name: str
    kind: str
    """`lora`, `dora`, `saved` (the whole module is replaced) or `tokens` (some rows are)."""
    rank: int
    """Rank of the update; 0 unless the kind is `lora` or `dora`."""
    alpha: float
    parameters: int
    norm: float
    """Frobenius norm of the change of the module's weight."""
    spectral_norm: float | None = None
    """Largest singular value of the change, for `lora` and `dora`."""
    relative_norm: float | None = None
    """Ratio of `norm` to that of the base's weight, within some percent; None for `tokens` and an embedding's
    matrices."""


@dataclass(frozen=True)
class ProofReport:
    """Proof that the server computes what PEFT computes."""

    modules_compared: int
    """Modules that were compared with PEFT's own, on the same input."""
    modules_changed: int
    """Modules whose output differs from the base's."""
    rows: int
    """Rows of the input on which modules were compared."""
    exact: bool
    """Whether the outputs of all modules had PEFT's own bits."""
    largest_difference: float
    """Largest difference between outputs of the server's modules and of PEFT's."""
    texts: int
    """Prompts that were continued by both, greedily."""
    tokens_compared: int
    texts_changed: int
    """Texts that differ from the base's own."""
    base_unchanged: bool
    """Whether the base's weights are what they were before."""
    seconds: float
    kernels: str
    """Kernels of the server: `torch`, or its own in C, by their set of instructions."""
    modules_exact: int
    """Number of modules that had PEFT's own bits."""
    error_ratio: float
    """Largest error of the other modules, which sum in another order, divided by that of PEFT's own output.
    Both errors are measured from the result in fp64."""
    shown: str
    """Statement, in words, of what was shown."""


@dataclass(frozen=True)
class VersionReport:
    """Findings of the server about a version before it served it."""

    kinds: tuple[str, ...]
    rank: int
    """Largest rank of any module."""
    alpha: float
    rslora: bool
    """Whether alpha is divided by the root of the rank instead of the rank."""
    targets: tuple[str, ...]
    parameters: int
    bytes: int
    """Size in host memory or in a slot, in bytes."""
    base_name: str | None
    """The base that the adapter's own configuration names."""
    dropped: tuple[str, ...]
    """Tensors in the file that were the base's own and were left out."""
    modules: tuple[ModuleReport, ...]
    proof: ProofReport
    warnings: tuple[str, ...] = ()
    """Warnings to look at before the version is activated. The server blocks nothing because of them."""
    task: str = "CAUSAL_LM"
    """Task of the version, in PEFT's words: CAUSAL_LM is text; or SEQ_CLS, TOKEN_CLS, FEATURE_EXTRACTION."""
    labels: int = 0
    """Classes that a classifier tells apart."""
    label_names: tuple[str, ...] = ()
    """Names of all classes, in their order; empty if its files name none."""


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable set of files under a name."""

    id: str
    """`name@version`, shortened, for `adapter=` in a request."""
    name: str
    version: str
    """The SHA-256 of its content; while it is still being pulled, the id of the pull."""
    state: str
    """`pulling`, `validating`, `proving`, and in the end `ready` or `failed`."""
    active: bool
    """Whether requests for the name alone get this version."""
    error: VersionFailure | None
    base: str
    source: AdapterSource
    created_at: float
    """Unix time in seconds."""
    created_by: str
    tenant: str
    progress: Progress | None
    """Progress of the version; None in the end."""
    report: VersionReport | None
    """Findings about the version; None until it is ready."""

    @property
    def is_pull(self) -> bool:
        """Return True if its content is not known yet, so that `version` is the id of a pull and no
        digest."""
        return self.version.startswith("pull-")

    @property
    def finished(self) -> bool:
        """Return True if its state is final."""
        return self.state in (READY, FAILED)


@dataclass(frozen=True)
class Activation:
    """One entry in the history of a name: who changed its active version, and when."""

    action: str
    """`activate`, `rollback` or `deactivate`."""
    version: str | None
    """The digest that was active from then on. None after `deactivate`."""
    previous: str | None
    """The digest that was active before."""
    actor: str
    at: float
    """Unix time in seconds."""


@dataclass(frozen=True)
class VersionFile:
    """One of the two files of a version."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BaseReference:
    """Source of a version's base."""

    name: str
    repo: str | None
    """Repository on the Hugging Face Hub; None if the server has the base from a folder of its own."""
    revision: str | None
    """Commit in that repository."""


@dataclass(frozen=True)
class VersionFiles:
    """Files of a version."""

    version: str
    """Digest of the version."""
    base: BaseReference
    files: tuple[VersionFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.bytes for file in self.files)
