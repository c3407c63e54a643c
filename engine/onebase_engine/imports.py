"""Import torch, transformers and PEFT in less time.

transformers reads 1,700 files at its import, twice, to learn which of them defines which name: up to a second
of CPU for each process that starts. The result depends on its release alone, and is stored in the user's
cache. bitsandbytes has torch.compile wrap four functions that are for other devices than ours, and that alone
loads PyTorch's compiler: a second. Python also searches for garbage again and again among objects of which
none is: another second.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from onebase_engine.user_cache import keep, recall

_READER = "transformers.utils.import_utils"
_COMPILED = "bitsandbytes.backends.default.ops"

Index = dict[frozenset[str], dict[str, set[str]]]
"""Mapping: required packages -> module -> its names."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Speed up imports: reuse transformers' index from an earlier start, compile nothing, and pause garbage
    collection."""
    collects = gc.isenabled()
    gc.disable()
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        yield
    finally:
        if collects:
            gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds two modules, as Python would, and has them loaded otherwise."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        loader = _LOADERS.get(name)
        if loader is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = loader(name, spec.loader.path)
        return spec


class _ReaderLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        read = getattr(module, "define_import_structure", None)
        if read is not None:
            module.define_import_structure = _remembering(read, Path(self.path).parents[1])  # type: ignore[attr-defined]


class _UncompiledLoader(importlib.machinery.SourceFileLoader):
    """Loads a module whose functions torch.compile is to leave as they are."""

    def exec_module(self, module: ModuleType) -> None:
        import torch

        compile_function = torch.compile
        torch.compile = lambda function, **_: function  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            torch.compile = compile_function


_LOADERS = {_READER: _ReaderLoader, _COMPILED: _UncompiledLoader}


def _remembering(read: Callable[..., Index], package: Path) -> Callable[..., Index]:
    """Wrap `read` so that its result for this release of the package is cached on disk."""

    def index(module_path: Any, prefix: str | None = None) -> Index:
        version = importlib.metadata.version("transformers")
        if "dev" in version:  # its files may change
            return read(module_path, prefix=prefix)
        key = [version, str(package), package.stat().st_mtime_ns, str(module_path), prefix]
        try:
            return {frozenset(needs): _as_sets(modules) for needs, modules in recall("transformers", key)}
        except (TypeError, ValueError, AttributeError):
            found = read(module_path, prefix=prefix)
        keep("transformers", key, [[sorted(needs), _as_lists(modules)] for needs, modules in found.items()])
        return found

    return index


def _as_sets(modules: dict[str, list[str]]) -> dict[str, set[str]]:
    return {module: set(names) for module, names in modules.items()}


def _as_lists(modules: dict[str, set[str]]) -> dict[str, list[str]]:
    return {module: sorted(names) for module, names in modules.items()}
