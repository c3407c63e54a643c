"""`client.adapters`, asynchronous: Adapters' methods, awaited. What they mean is documented there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from . import _adapter_parse, _adapter_requests
from ._adapter_folder import adapter_folder
from ._config import UNSET, Unset
from ._http import Reply
from ._parse import parse
from ._requests import Call
from ._wait import Waiting, refused, was_active
from .adapter_types import Activation, Adapter, AdapterVersion, ProgressCallback
from .errors import UnprocessableError


class AsyncAdapters:
    """`client.adapters`: what the server has, and how a new version gets there and is let answer."""

    def __init__(self, send: Callable[[Call], Awaitable[Reply]]) -> None:
        self._send = send

    async def list(self) -> tuple[Adapter, ...]:
        """As Adapters.list."""
        return parse((await self._send(_adapter_requests.LIST)).body, _adapter_parse.adapters)

    async def retrieve(self, name: str) -> Adapter:
        """As Adapters.retrieve."""
        return await self._adapter(_adapter_requests.retrieve(name))

    async def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """As Adapters.versions."""
        return parse((await self._send(_adapter_requests.versions(name))).body, _adapter_parse.versions)

    async def version(self, name: str, version: str) -> AdapterVersion:
        """As Adapters.version."""
        return await self._version(_adapter_requests.version(name, version))

    async def history(self, name: str) -> tuple[Activation, ...]:
        """As Adapters.history."""
        return parse((await self._send(_adapter_requests.history(name))).body, _adapter_parse.history)

    async def upload(
        self,
        path: str | Path,
        *,
        name: str,
        activate: bool = True,
        wait: bool = True,
        allow_noop: bool = False,
        any_base: bool = False,
        progress: ProgressCallback | None = None,
    ) -> AdapterVersion:
        """As Adapters.upload."""
        call = _adapter_requests.upload(
            adapter_folder(path),
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
            progress=progress,
        )
        return await self._begin(call, activate, wait, progress)

    async def pull(
        self,
        repo: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        name: str | None = None,
        activate: bool = True,
        wait: bool = True,
        allow_noop: bool = False,
        any_base: bool = False,
        progress: ProgressCallback | None = None,
    ) -> AdapterVersion:
        """As Adapters.pull."""
        call = _adapter_requests.pull(
            repo,
            revision,
            subfolder,
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
        )
        return await self._begin(call, activate, wait, progress)

    async def wait(
        self, version: AdapterVersion, *, progress: ProgressCallback | None = None
    ) -> AdapterVersion:
        """As Adapters.wait."""
        waiting = Waiting(version, progress)
        while not waiting.over:
            await anyio.sleep(waiting.next_delay())
            waiting.take(await self.version(waiting.version.name, waiting.version.version))
        return waiting.version

    async def activate(self, name: str, version: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """As Adapters.activate."""
        return await self._adapter(_adapter_requests.activate(name, version, expected))

    async def rollback(self, name: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """As Adapters.rollback."""
        return await self._adapter(_adapter_requests.rollback(name, expected))

    async def deactivate(self, name: str) -> Adapter:
        """As Adapters.deactivate."""
        return await self._adapter(_adapter_requests.deactivate(name))

    async def pin(self, name: str, pinned: bool = True) -> Adapter:
        """As Adapters.pin."""
        return await self._adapter(_adapter_requests.pin(name, pinned))

    async def delete(self, name: str, version: str | None = None, *, force: bool = False) -> None:
        """As Adapters.delete."""
        await self._send(_adapter_requests.delete(name, version, force=force))

    async def _begin(
        self, call: Call, activate: bool, wait: bool, progress: ProgressCallback | None
    ) -> AdapterVersion:
        try:
            version = await self._version(call)
        except UnprocessableError as error:
            raise refused(error) from error
        if not wait:
            return version
        version = await self.wait(version, progress=progress)
        return await self._activated(version) if activate and not version.active else version

    async def _activated(self, version: AdapterVersion) -> AdapterVersion:
        """The server activates it once it is ready: it is about to, or could not, and this tells why."""
        if not was_active(version, await self.history(version.name)):
            await self.activate(version.name, version.version)
        return await self.version(version.name, version.version)

    async def _version(self, call: Call) -> AdapterVersion:
        return parse((await self._send(call)).body, _adapter_parse.version)

    async def _adapter(self, call: Call) -> Adapter:
        return parse((await self._send(call)).body, _adapter_parse.adapter)
