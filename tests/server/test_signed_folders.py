"""A folder that somebody changes while it is registered is taken as it was verified."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.signatures import PolicyRule, SentFiles, SignaturePolicy
from onebase_adapters.store.blobs import AdapterFiles
from onebase_adapters.store.store import Store
from onebase_server.adapters.sources import Folders

from .support import make_folder


class Library:
    """What Folders calls of the adapters' service. `checked` runs where signatures are verified."""

    def __init__(self, store: Store, checked: Callable[[], object]) -> None:
        self.store = store
        self.signatures = SignaturePolicy((PolicyRule("require", signers=("acme",)),))
        self.catalog = SimpleNamespace(of=lambda tenant: SimpleNamespace(own=lambda name: None))
        self.disk = self
        self.sent: SentFiles | None = None
        self.files: AdapterFiles | None = None
        self._checked = checked

    def vocabulary(self) -> None:
        return None

    async def run_blocking(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    async def check_signature(self, tenant: str, name: str, sent: SentFiles, *, actor: str) -> None:
        self.sent = sent
        self._checked()

    async def check_config(self, *args: Any) -> None:
        return None

    async def add(self, tenant: str, name: str, files: AdapterFiles, *args: Any, **more: Any) -> None:
        self.files = files


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_is_swapped_after_the_verification_is_not_taken(tmp_path: Path, file: str) -> None:
    folder = make_folder(tmp_path, "adapter")
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    library: Any = Library(store, lambda: (folder / file).write_text('{"peft_type": "LORA", "r": 2}'))
    folders = Folders(library, SimpleNamespace(), (), 1 << 20)  # type: ignore[arg-type]
    asyncio.run(folders.add("default", "acme", folder, actor=""))
    assert library.files.weights.sha256 == library.sent.sums["adapter_model.safetensors"]
    assert library.files.config.sha256 == library.sent.sums["adapter_config.json"]
    assert not any((store.scratch()).iterdir())
