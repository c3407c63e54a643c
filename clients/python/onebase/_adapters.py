"""`client.adapters`, synchronous."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from . import _adapter_parse, _adapter_requests
from ._adapter_folder import adapter_folder
from ._config import UNSET, Unset
from ._http import Reply
from ._parse import parse
from ._requests import Call
from ._wait import Waiting, refused, was_active
from .adapter_types import Activation, Adapter, AdapterVersion, ProgressCallback
from .errors import UnprocessableError


class Adapters:
    """`client.adapters`: what the server has, and how a new version gets there and is let answer."""

    def __init__(self, send: Callable[[Call], Reply]) -> None:
        self._send = send

    def list(self) -> tuple[Adapter, ...]:
        """Every adapter that the server has."""
        return parse(self._send(_adapter_requests.LIST).body, _adapter_parse.adapters)

    def retrieve(self, name: str) -> Adapter:
        """One of them.

        Raises:
            NotFoundError: there is none of this name.
        """
        return self._adapter(_adapter_requests.retrieve(name))

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """All versions of an adapter, the newest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return parse(self._send(_adapter_requests.versions(name)).body, _adapter_parse.versions)

    def version(self, name: str, version: str) -> AdapterVersion:
        """One version, with its report.

        Args:
            version: Its digest, or at least the first 8 digits; or the id of a pull.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._version(_adapter_requests.version(name, version))

    def history(self, name: str) -> tuple[Activation, ...]:
        """What answered under this name, and since when: the newest entry first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return parse(self._send(_adapter_requests.history(name)).body, _adapter_parse.history)

    def upload(
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
        """Send a folder that PEFT saved, and have it proven. The files are streamed from disk.

        The same content under the same name is the same version: sending it twice does no harm.

        Args:
            path: The folder with `adapter_config.json` and `adapter_model.safetensors`.
            name: What requests ask for. A name that exists gets one more version.
            activate: Let it answer as soon as it is ready, at once and for all requests that begin then.
            wait: Return when it is ready, and active if that is wanted; otherwise as soon as it is sent
                (see `wait`).
            allow_noop: Accept an adapter that changes nothing.
            any_base: Accept an adapter whose configuration names another base.
            progress: Told of the bytes that are sent and of each stage after that.

        Raises:
            ValueError: the folder holds no adapter; nothing was sent.
            AdapterRejectedError: it was not accepted.
            ConflictError: it was trained on another base (`any_base`).
            PayloadTooLargeError, StorageFullError: there is no room for it.
        """
        call = _adapter_requests.upload(
            adapter_folder(path),
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
            progress=progress,
        )
        return self._begin(call, activate, wait, progress)

    def pull(
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
        """Let the server fetch an adapter from the Hugging Face Hub, and have it proven.

        Args:
            repo: `org/repo`.
            revision: A branch, a tag or a commit; by default the main branch. The version keeps the
                commit that it was.
            subfolder: Where in the repository the adapter is, when not at its top.
            name: What requests ask for; by default the repository's name without its owner.
            activate, wait, allow_noop, any_base, progress: As for `upload`.

        Raises:
            ValueError: `repo` is not `org/repo`; nothing was sent.
            AdapterRejectedError: it could not be fetched (codes `hub_...`), or was not accepted.
        """
        call = _adapter_requests.pull(
            repo,
            revision,
            subfolder,
            name,
            activate=activate,
            allow_noop=allow_noop,
            any_base=any_base,
        )
        return self._begin(call, activate, wait, progress)

    def wait(self, version: AdapterVersion, *, progress: ProgressCallback | None = None) -> AdapterVersion:
        """Ask now and then until a version is ready, and give it as it is then, with its report.

        Args:
            progress: Told of each stage, and of each step forward in it.

        Raises:
            AdapterRejectedError: it failed.
        """
        waiting = Waiting(version, progress)
        while not waiting.over:
            time.sleep(waiting.next_delay())
            waiting.take(self.version(waiting.version.name, waiting.version.version))
        return waiting.version

    def activate(self, name: str, version: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """Let a version answer to the name from now on. Requests that have begun end on the old one.

        Args:
            version: Its digest, or at least the first 8 digits.
            expected: Only if this digest is active now, or only if none is (None). Left out: in any case.

        Raises:
            ConflictError: another version than `expected` is active (`.current`), or this one is not ready.
            NotFoundError: there is no such adapter or version.
        """
        return self._adapter(_adapter_requests.activate(name, version, expected))

    def rollback(self, name: str, *, expected: str | Unset | None = UNSET) -> Adapter:
        """Let the version answer again that was active before the present one was activated.

        Args:
            expected: As for `activate`: the digest that you want to get away from.

        Raises:
            ConflictError: there is nothing to go back to, or another version than `expected` is active.
            NotFoundError: there is no such adapter.
        """
        return self._adapter(_adapter_requests.rollback(name, expected))

    def deactivate(self, name: str) -> Adapter:
        """Let no version answer to the name. Its versions stay, and can be asked for by `name@version`.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return self._adapter(_adapter_requests.deactivate(name))

    def pin(self, name: str, pinned: bool = True) -> Adapter:
        """Keep an adapter in memory although others are used more recently; False lets it go again.

        Raises:
            NotFoundError: there is no such adapter.
        """
        return self._adapter(_adapter_requests.pin(name, pinned))

    def delete(self, name: str, version: str | None = None, *, force: bool = False) -> None:
        """Delete one version, or the adapter with all of them. It cannot be undone.

        Args:
            version: Its digest, or at least the first 8 digits; None: all.
            force: Even if it is the active one, or requests run on it; they end with an error.

        Raises:
            ConflictError: requests run on it, or it is the version that is active.
            NotFoundError: there is no such adapter or version.
        """
        self._send(_adapter_requests.delete(name, version, force=force))

    def _begin(
        self, call: Call, activate: bool, wait: bool, progress: ProgressCallback | None
    ) -> AdapterVersion:
        try:
            version = self._version(call)
        except UnprocessableError as error:
            raise refused(error) from error
        if not wait:
            return version
        version = self.wait(version, progress=progress)
        return self._activated(version) if activate and not version.active else version

    def _activated(self, version: AdapterVersion) -> AdapterVersion:
        """The server activates it once it is ready: it is about to, or could not, and this tells why."""
        if not was_active(version, self.history(version.name)):
            self.activate(version.name, version.version)
        return self.version(version.name, version.version)

    def _version(self, call: Call) -> AdapterVersion:
        return parse(self._send(call).body, _adapter_parse.version)

    def _adapter(self, call: Call) -> Adapter:
        return parse(self._send(call).body, _adapter_parse.adapter)
