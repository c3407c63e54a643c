"""Where the tensors of proven versions are, and how much memory they take."""

from __future__ import annotations

from onebase_adapters.store.content import Blob
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

    def size_of(self, digest: str) -> int:
        """Bytes, rounded up: the file is the tensors and a header. Raises UnknownAdapterError."""
        return self._blob(digest).size

    async def locate(self, digest: str) -> PackedAdapterFile:
        """A local file; one from a remote store is fetched first. Raises UnknownAdapterError, StoreError."""
        blob = self._blob(digest)
        return PackedAdapterFile(await self._disk.run(self._store.local, blob.sha256), blob.sha256)

    def _blob(self, digest: str) -> Blob:
        for version in self._catalog.of_digest(digest):
            if version.state == "ready" and version.prepared is not None:
                return version.prepared
        raise UnknownAdapterError(
            f"Version {digest[:12]} of the adapter is gone: it was deleted.", code="version_not_found"
        )
