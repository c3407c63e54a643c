"""Import torch, transformers and PEFT in less time.

transformers reads 1,700 files at its import, twice, to learn which of them defines which name: up to a second
of CPU for each process that starts. The result depends on its release alone, and is stored in the user's
cache. bitsandbytes has torch.compile wrap four functions that are for other devices than ours; decorators of
PyTorch and transformers ask its compiler to leave functions as they are; and transformers has code for
tensors on several machines. Each of them alone loads the compiler, with SymPy: a second, and 80 MB. Python
also searches for garbage again and again among objects of which none is: another second.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from onebase_engine.user_cache import keep, recall

_READER = "transformers.utils.import_utils"
_COMPILED = "bitsandbytes.backends.default.ops"
_COMPILER = "torch._dynamo"
_MASKING = "transformers.masking_utils"
_LAYERS = "peft.tuners.tuners_utils"
_WRAPPER = "torch._dynamo._trace_wrapped_higher_order_op"

Index = dict[frozenset[str], dict[str, set[str]]]
"""Mapping: required packages -> module -> its names."""


def load_compiler() -> None:
    """Load PyTorch's compiler, which recomputing activations asks for, before memory is limited."""
    importlib.import_module(f"{_COMPILER}.config")


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
    """Finds a few modules, as Python would, and has them loaded otherwise."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{_COMPILER}."):
            return self._part_of_compiler(name)
        loader = _LOADERS.get(name)
        if loader is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = loader(name, spec.loader.path)
        return spec

    def _part_of_compiler(self, name: str) -> importlib.machinery.ModuleSpec | None:
        """Load the compiler, whose parts need each other in its order, if this is the first part of it."""
        whole = getattr(sys.modules.get(_COMPILER), "__spec__", None)
        if whole is not None and isinstance(whole.loader, _CompilerLoader):
            whole.loader.load()
        return importlib.machinery.ModuleSpec(name, _PartLoader()) if name in sys.modules else None


class _ReaderLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        read = getattr(module, "define_import_structure", None)
        # What it defines for tensors on several machines takes more time to import than PyTorch itself.
        module.is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]
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


class _CompilerLoader(importlib.machinery.SourceFileLoader):
    """Loads PyTorch's compiler once more of it is asked for than to leave a function as it is.

    That much decorators of PyTorch and transformers ask of it when they are imported or first called.
    """

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self._lock = threading.RLock()
        self._module: ModuleType | None = None

    def exec_module(self, module: ModuleType) -> None:
        self._module = module
        vars(module).update(dict.fromkeys(_OF_DECORATORS, _leave), __getattr__=self._attribute)

    def load(self) -> None:
        with self._lock:
            module, self._module = self._module, None
            if module is None:
                return
            for name in _OF_DECORATORS:
                delattr(module, name)
            try:
                super().exec_module(module)
            except BaseException:  # no memory, say: the next who asks tries again
                self.exec_module(module)
                raise

    def _attribute(self, name: str) -> Any:
        if not name.startswith("__"):  # those are asked of every module
            self.load()
        try:
            return vars(sys.modules[_COMPILER])[name]
        except KeyError:
            raise AttributeError(f"module {_COMPILER!r} has no attribute {name!r}") from None


_OF_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable", "graph_break")


def _leave(function: Any = None, *_: Any, **__: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


class _LoneLoader(importlib.machinery.SourceFileLoader):
    """Loads PEFT's module that looks for tensors on several machines, and tells it that there are none."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module._torch_supports_distributed = False  # type: ignore[attr-defined]


class _PartLoader(importlib.abc.Loader):
    """Loads a part of the compiler, which the whole of it has loaded."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


class _MaskingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module that needs a class of the compiler for masks that our bases do not have."""

    def exec_module(self, module: ModuleType) -> None:
        if _WRAPPER in sys.modules:
            return super().exec_module(module)
        wrapper = sys.modules[_WRAPPER] = ModuleType(_WRAPPER)
        wrapper.TransformGetItemToIndex = _TransformGetItemToIndex  # type: ignore[attr-defined]
        try:
            super().exec_module(module)
        finally:
            del sys.modules[_WRAPPER]


class _TransformGetItemToIndex:
    """Is PyTorch's class of this name from its first use on."""

    def __new__(cls) -> Any:
        return importlib.import_module(_WRAPPER).TransformGetItemToIndex()


_LOADERS = {
    _READER: _ReaderLoader,
    _COMPILED: _UncompiledLoader,
    _COMPILER: _CompilerLoader,
    _MASKING: _MaskingLoader,
    _LAYERS: _LoneLoader,
}


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
