"""Where the tensors of proven versions are, and how much memory they take."""

from __future__ import annotations

from pathlib import Path

from onebase_adapters.store.store import Store
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import PackedAdapterFile
from onebase_server.background import Threads
from onebase_server.errors import UnknownAdapterError


class PackedAdapterFiles:
    """Answers for digests that the catalog knows as ready."""

    def __init__(self, catalog: Catalog, store: Store, disk: Threads) -> None:
        self._catalog = catalog
        self._store = store
        self._disk = disk

    def find(self, digest: str) -> PackedAdapterFile:
        """The version's file. Its size is the tensors' and a header's. Raises UnknownAdapterError."""
        ready = [version for version in self._catalog.of_digest(digest) if version.state == "ready"]
        for version in ready:
            if (blob := version.prepared) is not None:
                return PackedAdapterFile(blob, tuple(one for one in ready if one.prepared == blob))
        raise UnknownAdapterError(
            f"Version {digest[:12]} of the adapter is gone: it was deleted.", code="version_not_found"
        )

    async def fetch(self, prepared: PackedAdapterFile) -> Path:
        """A local file; one from a remote store is fetched first. Raises StoreError."""
        return await self._disk.run(self._store.local, prepared.blob.sha256)
