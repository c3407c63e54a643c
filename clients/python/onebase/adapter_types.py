"""Adapters, their versions and their proofs as the server reports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onebase_protocol.adapters import (
    FAILED,
    READY,
    Activation,
    Adapter,
    AdapterDefaults,
    AdapterSource,
    AdapterVersion,
    BaseReference,
    EvaluationGate,
    FeedbackAnswer,
    GateRule,
    GateState,
    MergeMethod,
    MergeParent,
    MergeSign,
    ModuleReport,
    ProofGate,
    ProofReport,
    Rollout,
    RolloutComparison,
    RolloutJudge,
    RolloutRules,
    RolloutSideCounts,
    SideFigure,
    SignatureReport,
    SliceScore,
    VersionApproval,
    VersionEvaluation,
    VersionFailure,
    VersionFile,
    VersionFiles,
    VersionGates,
    VersionProgress,
    VersionReport,
)

__all__ = [
    "FAILED",
    "READY",
    "Activation",
    "Adapter",
    "AdapterDefaults",
    "AdapterSource",
    "AdapterVersion",
    "BaseReference",
    "EvaluationGate",
    "FeedbackAnswer",
    "GateRule",
    "GateState",
    "MergeMethod",
    "MergeParent",
    "MergeSign",
    "ModuleReport",
    "Progress",
    "ProgressCallback",
    "ProofGate",
    "ProofReport",
    "Rollout",
    "RolloutComparison",
    "RolloutJudge",
    "RolloutRules",
    "RolloutSideCounts",
    "SideFigure",
    "SignatureReport",
    "SliceScore",
    "VersionApproval",
    "VersionEvaluation",
    "VersionFailure",
    "VersionFile",
    "VersionFiles",
    "VersionGates",
    "VersionReport",
]


class Progress(VersionProgress, frozen=True):
    """Progress of a version towards being ready, or of a file to the server.

    `stage` is also `uploading` or `downloading`, at the end `ready` or `failed`.
    """

    bytes_done: int | None = None
    """Bytes sent so far, while uploading; or received."""
    bytes_total: int | None = None
    file: str | None = None
    """The name of the file that is sent, where each is sent on its own."""


ProgressCallback: TypeAlias = Callable[[Progress], object]
"""Called with each step forward, in the thread or event loop that waits. It must return soon."""
