"""Folders given at start: which are found, and what is refused; first uses of what the Hub does not have."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.hub.pull import HubError
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_edge.errors import ApiError
from onebase_server.adapters import sources
from onebase_server.adapters.sources import FolderError, HubAdapters, Pulls, find_adapters

from .support import make_folder


def test_subfolders_with_an_adapter_are_found_and_others_left_alone(tmp_path: Path) -> None:
    make_folder(tmp_path, "b")
    make_folder(tmp_path, "a")
    (tmp_path / "notes").mkdir()

    names = [name for name, _ in find_adapters([("c", str(tmp_path / "a"))], str(tmp_path), "base")]

    assert names == ["c", "a", "b"]


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a@b", "base"])
def test_a_name_that_is_not_allowed_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FolderError, match="adapter name"):
        find_adapters([(name, str(make_folder(tmp_path, "x")))], "", "base")


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = str(make_folder(tmp_path, "x"))

    with pytest.raises(FolderError, match="twice"):
        find_adapters([("x", path), ("x", path)], "", "base")


def test_a_folder_without_weights_is_refused_by_the_file_it_lacks(tmp_path: Path) -> None:
    path = make_folder(tmp_path, "x")
    (path / "adapter_model.safetensors").unlink()

    with pytest.raises(FolderError, match=r"adapter_model\.safetensors"):
        find_adapters([("x", str(path))], "", "base")


def test_what_is_no_folder_is_refused_by_its_option_or_name(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="--adapters-dir"):
        find_adapters([], str(tmp_path / "nowhere"), "base")
    with pytest.raises(FolderError, match="'x'"):
        find_adapters([("x", str(tmp_path / "nowhere"))], "", "base")


# ---- first uses that fail -----------------------------------------------------------------------


class MissingPulls:
    """Pulls from a Hub that has nothing; counts them."""

    def __init__(self) -> None:
        self.count = 0

    def check_allowed(self, reference: Any, param: str) -> None:
        pass

    def start(self, tenant: str, reference: Any) -> tuple[None, asyncio.Future[Any]]:
        self.count += 1
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        ended.set_exception(HubError("hub_not_found", "The Hub has no such repository."))
        return None, ended


def hub_adapters(pulls: MissingPulls | Pulls) -> HubAdapters:
    known = SimpleNamespace(get=lambda name: None, own=lambda name: None)
    library: Any = SimpleNamespace(catalog=SimpleNamespace(of=lambda tenant: known))
    return HubAdapters(library, pulls)  # type: ignore[arg-type]


async def refused(hub: HubAdapters, name: str, tenant: str = "one") -> ApiError:
    with pytest.raises(ApiError) as caught:
        await hub.use(tenant, name, param="adapter")
    return caught.value


def test_a_refusal_that_is_remembered_keeps_no_frames_of_the_requests_that_got_it() -> None:
    async def play() -> list[ApiError]:
        hub = hub_adapters(MissingPulls())
        return [await refused(hub, "hub:acme/missing") for _ in range(4)]

    first, *others = asyncio.run(play())

    assert len({id(error) for error in (first, *others)}) == 4
    assert {(error.code, error.message) for error in others} == {(first.code, first.message)}
    frames = [len(traceback.extract_tb(error.__traceback__)) for error in others]
    assert frames == [frames[0]] * 3
    assert all(error.__context__ is None for error in others)


def test_a_tenant_whose_pulls_fail_too_often_starts_no_more_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    may = threading.Event()

    def resolve(repo: str, revision: str | None, *, cancel: threading.Event) -> str:
        asked.append(repo)
        may.wait(60)
        raise HubError("hub_unreachable", "The Hub does not answer.")

    monkeypatch.setattr(sources, "resolve", resolve)
    monkeypatch.setattr(sources, "MOST_FAILED_A_MINUTE", 5)
    clock = [1000.0]
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))

    async def play() -> None:
        pulls = Pulls(Store(str(tmp_path / "store"), tmp_path), Threads("pull", 2), ["*"], 1000)
        hub = hub_adapters(pulls)
        waiting = [asyncio.create_task(refused(hub, f"hub:acme/vain{number}", "evil")) for number in range(9)]
        may.set()
        codes = [error.code for error in await asyncio.gather(*waiting)]
        assert set(codes) == {"hub_unreachable", "rate_limit_exceeded"}
        assert len(asked) <= 6, "one that had begun when the fifth failed, and none of those that waited"

        asked.clear()
        error = await refused(hub, "hub:acme/vain", "evil")
        assert (error.code, error.param, error.retry_after) == ("rate_limit_exceeded", "adapter", 60.0)
        assert error.details == {"quota": "failed_pulls", "limit": 5, "of": "tenant"}
        assert not asked
        assert (await refused(hub, "hub:acme/vain", "good")).code == "hub_unreachable"

        clock[0] += 60
        assert (await refused(hub, "hub:acme/vain", "evil")).code == "hub_unreachable"
        assert asked == ["acme/vain"] * 2

    asyncio.run(play())


def test_refusals_are_remembered_by_tenant_and_no_more_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "MOST_FAILED", 3)
    pulls = MissingPulls()

    async def play() -> None:
        hub = hub_adapters(pulls)
        for tenant in ("one", "other", "one", "other"):
            await refused(hub, "hub:acme/missing", tenant)
        assert pulls.count == 2
        for number in range(5):
            await refused(hub, f"hub:acme/missing{number}")
        assert len(hub._failed) == 3
        await refused(hub, "hub:acme/missing")
        assert pulls.count == 8

    asyncio.run(play())
