"""Versions taken elsewhere and made of others: downloads that are whole or not there, and the commands."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx2
import pytest
from msgspec import convert
from tests.clients.golden import Transcript
from tests.clients.registry_double import Registry, version

from onebase import AdapterWeight, InvalidResponseError, Progress, VersionFiles
from onebase._core import requests
from onebase._core.targets import atomic_target
from onebase.cli.adapters import export

NAME = "acme-support"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Shelf:
    """A server that gives out one active version of one adapter."""

    def __init__(self) -> None:
        self.content = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: bytes(range(256)) * 2000}
        sums = b"".join(
            name.encode() + b"\0" + bytes.fromhex(sha(self.content[name])) for name in self.content
        )
        self.digest = sha(sums)
        self.base: dict[str, Any] = {"name": "base", "repo": None, "revision": None}
        self.listing = {
            "version": self.digest,
            "base": self.base,
            "data": [
                {"name": name, "bytes": len(content), "sha256": sha(content)}
                for name, content in self.content.items()
            ],
        }
        self.registry = Registry()
        self.registry.activate(NAME, self.registry.add(NAME, "1"))
        self.registry.versions[NAME][0]["version"] = self.digest

    def answer(self, target: str) -> bytes | None:
        path = target.removeprefix(f"/v1/adapters/{NAME}/versions/{self.digest}/files")
        if path == target:
            return None
        return json.dumps(self.listing).encode() if not path else self.content[path[1:]]

    @property
    def transport(self) -> httpx2.MockTransport:
        def handle(request: httpx2.Request) -> httpx2.Response:
            found = self.answer(request.url.path)
            if found is not None:
                return httpx2.Response(200, content=found)
            return self.registry.transport.handle_request(request)

        return httpx2.MockTransport(handle)

    def script(self, request: Any) -> None:
        """For a server on a real port, which answers JSON alone."""
        self.registry.script(request)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def download(sdk: Any, shelf: Shelf, target: Path, **how: Any) -> Any:
    return sdk.call(lambda client: client.adapters.download(NAME, target, **how), shelf.transport)


# ---- downloads ---------------------------------------------------------------------------------


def test_a_version_comes_whole_with_its_progress(sdk: Any, shelf: Shelf, tmp_path: Path) -> None:
    told: list[Progress] = []
    listing = download(sdk, shelf, tmp_path / "new" / "mine", progress=told.append)
    assert {file.name: file.read_bytes() for file in (tmp_path / "new" / "mine").iterdir()} == shelf.content
    assert (listing.version, listing.base.name, listing.bytes) == (shelf.digest, "base", 512_021)
    assert {step.stage for step in told} == {"downloading"}
    assert (told[-1].fraction, told[-1].bytes_done) == (1.0, 512_021)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mine"]


class Damage(NamedTuple):
    do: Callable[[Shelf], object]
    message: str


DAMAGES = {
    "another content": Damage(lambda s: s.content.update({WEIGHTS: bytes(512_000)}), "arrived damaged"),
    "cut": Damage(lambda s: s.content.update({WEIGHTS: b"short"}), "arrived damaged"),
    "too long": Damage(lambda s: s.content.update({WEIGHTS: bytes(600_000)}), "more than it announced"),
    "another version": Damage(lambda s: s.listing.update(version="0" * 64), "not those of 000000000000"),
    "one file": Damage(lambda s: s.listing["data"].pop(), "does not list"),
    "no sum": Damage(lambda s: s.listing["data"][0].update(sha256="x"), "does not list"),
    "a third file": Damage(
        lambda s: s.listing["data"].append({"name": "../evil", "bytes": 1, "sha256": "00"}),
        "which no adapter has",
    ),
    "a path": Damage(
        lambda s: s.listing["data"].insert(0, {"name": "../evil", "bytes": 1, "sha256": "00"}),
        "which no adapter has",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_the_version_leaves_nothing(sdk: Any, shelf: Shelf, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage].do(shelf)
    with pytest.raises(InvalidResponseError, match=DAMAGES[damage].message):
        download(sdk, shelf, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_by_force_alone_and_only_if_it_is_a_model(
    sdk: Any, shelf: Shelf, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    download(sdk, shelf, target)  # an empty folder is as good as none
    (target / CONFIG).write_text("old")
    with pytest.raises(ValueError, match="is there already"):
        download(sdk, shelf, target)
    assert (target / CONFIG).read_text() == "old"
    download(sdk, shelf, target, force=True)
    assert (target / CONFIG).read_bytes() == shelf.content[CONFIG]
    (target / CONFIG).rename(target / "letters")
    with pytest.raises(ValueError, match="neither an adapter nor a model"):
        download(sdk, shelf, target, force=True)
    assert (target / "letters").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_said_before_anything_is_sent(
    sdk: Any, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match="make room or choose another disk") as error:
        download(sdk, shelf, tmp_path / "mine")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_an_active_version_needs_one_named(sdk: Any, shelf: Shelf, tmp_path: Path) -> None:
    shelf.registry.add("idle", "9")
    with pytest.raises(ValueError, match="no version of idle is active"):
        sdk.call(lambda client: client.adapters.download("idle", tmp_path / "mine"), shelf.transport)


def test_a_file_is_replaced_in_one_step_or_kept(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("old")
    unforced = atomic_target(target, force=False)
    with pytest.raises(ValueError, match="is there already"):
        unforced.__enter__()
    with contextlib.suppress(RuntimeError), atomic_target(target, force=True) as work:
        work.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_target(target, force=True) as work:
        work.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


# ---- merging -----------------------------------------------------------------------------------


class Merges:
    """A server on which a merge is ready at once."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    @property
    def made(self) -> dict[str, Any]:
        body = self.bodies[-1]
        parents = [{"version": sha(term["name"].encode()), **term} for term in body["adapters"]]
        source = {"kind": "merge", "method": body["method"], "parents": parents}
        return version(body["name"], "merged", source=source, active=body.get("activate", False))

    @property
    def transport(self) -> httpx2.MockTransport:
        def handle(request: httpx2.Request) -> httpx2.Response:
            assert (request.method, request.url.path) == ("POST", "/v1/adapters/merge")
            self.bodies.append(json.loads(request.content))
            return httpx2.Response(202, json=self.made)

        return httpx2.MockTransport(handle)

    def script(self, request: Any) -> None:
        assert (request.method, request.path) == ("POST", "/v1/adapters/merge")
        self.bodies.append(request.body)
        request.reply(202, self.made)


def test_a_merge_says_what_it_is_made_of(sdk: Any) -> None:
    server = Merges()

    def merge(client: Any) -> Any:
        return client.adapters.merge(
            {"one": 0.75, "two@3f2a9c41": -1}, name="both", method="ties", density=0.5, sign="total"
        )

    made = sdk.call(merge, server.transport)
    assert server.bodies == [
        {
            "name": "both",
            "adapters": [{"name": "one", "weight": 0.75}, {"name": "two@3f2a9c41", "weight": -1}],
            "method": "ties",
            "density": 0.5,
            "sign": "total",
            "activate": True,
        }
    ]
    assert (made.source.kind, made.source.method) == ("merge", "ties")
    assert [(parent.name, parent.weight) for parent in made.source.parents] == [
        ("one", 0.75),
        ("two@3f2a9c41", -1),
    ]


@pytest.mark.parametrize("parents", [{}, {"one": 1.0}, [AdapterWeight("one", 1.0)]], ids=str)
def test_fewer_than_two_are_refused_before_anything_is_sent(sdk: Any, parents: Any) -> None:
    server = Merges()
    with pytest.raises(ValueError, match="at least two"):
        sdk.call(lambda client: client.adapters.merge(parents, name="both"), server.transport)
    with pytest.raises(ValueError, match="cannot be sent"):
        sdk.call(
            lambda client: client.adapters.merge({"one": float("nan"), "two": 1}, name="both"),
            server.transport,
        )
    assert server.bodies == []


@pytest.mark.usefixtures("slept")
def test_the_command_merges_and_says_what_to_do_next(
    serve: Callable[..., Any], transcript: Callable[[str], Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Merges()
    url = serve(server.script).url
    monkeypatch.setenv("ONEBASE_URL", url)
    shell = transcript(url)
    shell.run("adapters", "merge", "one:0.7", "hub:acme/two@main:0.3", "--name", "both")
    how = ("--method", "dare_ties", "--density", "0.5", "--seed", "7", "--sign", "frequency", "--activate")
    shell.run("adapters", "merge", "one@3f2a9c41:1", "two:-2", "--name", "both", *how)
    shell.run("adapters", "merge", "one", "two:1", "--name", "both")
    shell.run("adapters", "merge", "one:1", "two:1")
    shell.run("adapters", "merge", "--help")
    shell.check("adapters-merge")
    assert server.bodies[0]["adapters"][1] == {"name": "hub:acme/two@main", "weight": 0.3}
    assert server.bodies[1] == {
        "name": "both",
        "adapters": [{"name": "one@3f2a9c41", "weight": 1.0}, {"name": "two", "weight": -2.0}],
        "method": "dare_ties",
        "density": 0.5,
        "sign": "frequency",
        "seed": 7,
        "activate": True,
    }


# ---- the command that exports ------------------------------------------------------------------


def test_the_command_says_what_an_export_needs(
    serve: Callable[..., Any],
    transcript: Callable[[str], Transcript],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    registry = Registry()
    registry.activate(NAME, registry.add(NAME, "1"))
    url = serve(registry.script).url
    monkeypatch.setenv("ONEBASE_URL", url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "entry_points", lambda **which: ())
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / CONFIG).write_text("{}")
    shell = transcript(url)
    shell.run("adapters", "export", NAME, "--format", "peft")
    shell.run("adapters", "export", NAME, "--format", "merged")
    shell.run("adapters", "export", NAME, "--format", "onnx")
    shell.run("adapters", "export", "nobody", "--format", "gguf")
    shell.run("adapters", "export", "--help")
    shell.check("adapters-export")


def test_names_of_the_hub_become_names_of_files() -> None:
    assert export._file_name("hub:org/repo@v2:sub/folder") == "hub-org-repo-v2-sub-folder"


def test_a_base_that_only_the_server_has_must_be_named(shelf: Shelf) -> None:
    with pytest.raises(
        ValueError, match="a folder of its own: name the same base, not quantized, with --base"
    ):
        export._base_of(convert(shelf.listing, VersionFiles))
    shelf.base |= {"repo": "org/model", "revision": "abc"}
    assert export._base_of(convert(shelf.listing, VersionFiles)) == "org/model@abc"
    shelf.base["revision"] = None
    assert export._base_of(convert(shelf.listing, VersionFiles)) == "base"


def test_an_export_is_compared_without_the_adapters_defaults() -> None:
    asked: list[dict[str, Any]] = []
    client: Any = SimpleNamespace(generate=lambda **how: asked.append(how))
    export._ask(client, {"messages": "Hello"}, NAME)
    (how,) = asked
    assert (how.pop("adapter"), how.pop("messages")) == (NAME, "Hello")
    sampling: Any = how
    assert requests.sampling_body(sampling)["adapter_defaults"] is False
