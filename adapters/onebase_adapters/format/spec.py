"""Describe a validated adapter: its modules, their kinds and their ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebase_adapters.format.config import Task
from onebase_protocol.adapters import AdapterDefaults, TokenizerAdditions


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted module, as the tensors and the config agree on it.

    A head is a classifier's, which the base does not have.

    `rank` and `alpha` are 0 unless it has matrices; `bias`: whether lora_B has one; `indices`: the tokens
    whose rows are replaced. A head that is tied to an embedding with such tokens follows it, with 0
    parameters of its own.
    """

    name: str
    kind: Literal["lora", "dora", "alora", "saved", "tokens", "head"]
    rank: int
    alpha: float
    bias: bool
    parameters: int
    indices: tuple[int, ...] = ()
    words: int = 0
    """Number of rows of an embedding or a head that was resized; 0: as many as the base's."""
    experts: int = 0
    """Number of experts, if it is the parameter that holds their matrices: each has its own of this rank."""


@dataclass(frozen=True)
class AdapterSpec:
    """A validated adapter; `modules` are sorted by name.

    `dropped`: names of tensors in the file that were the base's own, bit for bit, and were left out.
    `warnings`: a sentence for each name in the config that has no tensors.
    """

    modules: tuple[ModuleSpec, ...]
    rslora: bool
    base_name: str | None
    parameters: int
    task: Task = "CAUSAL_LM"
    labels: int = 0
    """Number of a classifier's classes."""
    label_names: tuple[str, ...] = ()
    """Names of all classes, or empty."""
    tokens: TokenizerAdditions | None = None
    """Additions of its tokenizer to the base's; None if there are none."""
    invocation: tuple[int, ...] = ()
    """Invocation tokens of an activated LoRA, from which on it acts; none for any other adapter."""
    defaults: AdapterDefaults | None = None
    """Defaults of requests that came with it."""
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 if none has one."""
        return max(module.rank for module in self.modules)

    @property
    def alpha(self) -> float:
        """The largest alpha of any module with a rank; 0 if none has one."""
        return max((module.alpha for module in self.modules if module.rank), default=0.0)

    @property
    def words(self) -> int:
        """Number of tokens of its own vocabulary; 0 if it is the base's."""
        return max(module.words for module in self.modules)

    @property
    def kinds(self) -> list[str]:
        """Kinds of the modules, sorted."""
        return sorted({module.kind for module in self.modules})

    @property
    def targets(self) -> list[str]:
        """Last parts of the names of the base's adapted modules, sorted."""
        return sorted({module.name.rpartition(".")[2] for module in self.modules if module.kind != "head"})
