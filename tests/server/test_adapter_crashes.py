"""`kill -9` while adapters are on their way: what comes back is the old state or the new one, never half."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .support import PATIENCE, Server, Starter, make_folder, upload

BODY = {"prompt": "word", "max_tokens": 1}


def used_version(http: httpx2.Client, adapter: str) -> str:
    answer = http.post("/generate", json={**BODY, "adapter": adapter})
    return str(answer.raise_for_status().json()["adapter"])


def check_whole(server: Server, http: httpx2.Client, name: str) -> None:
    """Every version ends ready or failed, ready ones serve, and the database is sound."""

    def versions() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = http.get(f"/v1/adapters/{name}/versions").json()["data"]
        return found

    server.wait_for(lambda: all(v["state"] in ("ready", "failed") for v in versions()))
    assert versions()
    for version in versions():
        assert version["state"] == "ready"
        assert used_version(http, f"{name}@{version['version']}") == version["id"]
    with contextlib.closing(sqlite3.connect(server.data_dir / "registry.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def kill(server: Server) -> None:
    server.signal(signal.SIGKILL)
    server.exit_status()


class Sender:
    """Uploads and activates one version after the other until the server is gone."""

    def __init__(self, server: Server, run: int) -> None:
        self.acknowledged: list[str] = []
        self.third = threading.Event()
        self._server = server
        self._run = run
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        with contextlib.suppress(httpx2.TransportError), self._server.client() as http:
            for step in range(1000):
                if step == 2:
                    self.third.set()
                content = f"{self._run} {step} ".encode() * 20_000
                answer = upload(http, "acme", content, query="wait=true&activate=true")
                self.acknowledged.append(answer.json()["version"])

    def join(self) -> None:
        self._thread.join(PATIENCE)


def test_killed_at_any_moment_of_uploads_and_activations_nothing_is_half_done_or_forgotten(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    acknowledged: list[str] = []
    for run, delay in enumerate((0.0, 0.04, 0.1)):
        with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
            if run:
                check_acknowledged(server, http, acknowledged)
            sender = Sender(server, run)
            assert sender.third.wait(PATIENCE)
            time.sleep(delay)
            kill(server)
            sender.join()
            acknowledged += sender.acknowledged
    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        check_acknowledged(server, http, acknowledged)


def check_acknowledged(server: Server, http: httpx2.Client, acknowledged: list[str]) -> None:
    """Every version that was answered is there; active is the last one, or the one that was under way."""
    check_whole(server, http, "acme")
    known = [version["version"] for version in http.get("/v1/adapters/acme/versions").json()["data"]]
    assert set(acknowledged) <= set(known)
    assert http.get("/v1/adapters/acme").json()["version"] in {acknowledged[-1], known[0]}


def test_a_version_killed_in_its_proof_is_proved_and_activated_after_the_restart(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir, held = tmp_path / "data", tmp_path / "held"
    with serve_scripted(f"words,held={held}", data_dir=data_dir) as server, server.client() as http:
        old = upload(http, "acme", b"old", query="wait=true&activate=true").json()["version"]
        held.touch()
        new = upload(http, "acme", b"new", query="activate=true").json()["version"]
        server.wait_for(lambda: state_of(http, new) == "proving")
        kill(server)

    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        assert http.get("/v1/adapters/acme").json()["version"] in (old, new)
        server.wait_for(lambda: http.get("/v1/adapters/acme").json()["version"] == new)
        check_whole(server, http, "acme")


def state_of(http: httpx2.Client, digest: str) -> str:
    return str(http.get(f"/v1/adapters/acme/versions/{digest}").json()["state"])


def test_an_upload_cut_by_a_kill_leaves_nothing_that_a_later_start_does_not_sweep(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    head = (
        "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
        'Content-Length: 9000000\r\n\r\n--B\r\nContent-Disposition: form-data; name="files"; '
        'filename="adapter_model.safetensors"\r\n\r\n'
    )
    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        kept = upload(http, "acme", b"kept", query="wait=true&activate=true").json()["id"]
        before = stored(data_dir)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"w" * 3_000_000)
            server.wait_for(lambda: stored(data_dir) > before)
            kill(server)

    (left,) = stored(data_dir) - before
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        server.wait_for(lambda: stored(data_dir) == before)
        assert used_version(http, "acme") == kept


def stored(data_dir: Path) -> set[Path]:
    return {path for path in (data_dir / "store").rglob("*") if path.is_file()}


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A file while which is there the verifier `held=FILE` ends no proof."""
    file = tmp_path / "held"
    file.touch()
    return file


def test_a_verifier_that_is_killed_is_replaced_and_the_version_still_gets_ready(
    serve_scripted: Starter, held: Path
) -> None:
    with serve_scripted(f"words,held={held}") as server, server.client() as http:
        digest = upload(http, "acme", b"acme", query="").json()["version"]
        server.wait_for(lambda: state_of(http, digest) == "proving")
        first = server.verifier_pid()

        os.kill(first, signal.SIGKILL)
        held.unlink()

        server.wait_for(lambda: state_of(http, digest) == "ready")
        assert server.verifier_pid() != first


@pytest.mark.parametrize(("behaviour", "code"), [("dies", "proof_crashed"), ("hangs", "proof_timeout")])
def test_a_version_whose_proof_never_ends_well_fails_by_itself(
    serve_scripted: Starter, behaviour: str, code: str
) -> None:
    with serve_scripted(f"words,{behaviour}", "--proof-timeout", "1") as server, server.client() as http:
        answer = upload(http, "acme", b"acme")

        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == code
        assert http.post("/generate", json=BODY).status_code == 200


def test_versions_wait_for_the_next_engine_when_the_engine_dies(serve_scripted: Starter, held: Path) -> None:
    with serve_scripted(f"words,held={held}") as server, server.client() as http:
        digest = upload(http, "acme", b"acme", query="activate=true").json()["version"]
        server.wait_for(lambda: state_of(http, digest) == "proving")
        verifier = server.verifier_pid()

        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for(lambda: http.get("/status").json()["engine"]["restarts"] == 1)
        server.wait_ready()
        held.unlink()

        server.wait_for(lambda: http.get("/v1/adapters/acme").json()["active"])
        assert server.verifier_pid() != verifier
        assert used_version(http, "acme").startswith("acme@")


def test_what_is_pinned_is_in_memory_again_when_a_new_engine_is_ready(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server, server.client() as http:
        for name in ("pinned", "loose"):
            upload(http, name, name.encode(), query="wait=true&activate=true").raise_for_status()
        http.post("/v1/adapters/pinned/pin", json={"pinned": True}).raise_for_status()

        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for(lambda: http.get("/status").json()["engine"]["restarts"] == 1)
        server.wait_ready()

        assert http.get("/v1/adapters/pinned").json()["tier"] == "host"
        assert http.get("/v1/adapters/loose").json()["tier"] == "disk"
        assert used_version(http, "loose").startswith("loose@")


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_prepared_file_that_is_lost_or_damaged_is_made_again(
    serve_scripted: Starter, tmp_path: Path, damage: str
) -> None:
    data_dir = tmp_path / "data"
    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        used = upload(http, "acme", b"the same", query="wait=true&activate=true").json()["id"]
        server.signal(signal.SIGTERM)
        server.exit_status()
    with contextlib.closing(sqlite3.connect(data_dir / "registry.db")) as database:
        ((prepared, weights),) = database.execute("SELECT prepared_sha256, weights_sha256 FROM versions")
        assert prepared == weights  # the scripted verifier's way: the file that was sent
        other = "0" * 64
        database.execute("UPDATE versions SET prepared_sha256 = ?", (other,))
        database.commit()
    (blob,) = (path for path in stored(data_dir) if path.name == weights)
    if damage == "changed":
        blob.with_name(other).write_bytes(b"something else")

    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        first = http.post("/generate", json={**BODY, "adapter": "acme"})
        assert first.status_code == 503
        assert first.json()["error"]["code"] == "adapter_unavailable"
        server.wait_for(lambda: http.post("/generate", json={**BODY, "adapter": "acme"}).status_code == 200)
        assert used_version(http, "acme") == used


def test_a_folder_given_at_start_gives_way_to_what_was_activated_since(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir, folders = tmp_path / "data", tmp_path / "adapters"
    folders.mkdir()
    folder = make_folder(folders, "acme")
    options = ("--adapters-dir", str(folders))
    with serve_scripted("words", *options, data_dir=data_dir) as server, server.client() as http:
        given = http.get("/v1/adapters/acme").json()["version"]
        chosen = upload(http, "acme", b"chosen", query="wait=true&activate=true").json()["version"]
        kill(server)

    with serve_scripted("words", *options, data_dir=data_dir) as server, server.client() as http:
        assert http.get("/v1/adapters/acme").json()["version"] == chosen != given
        server.wait_for(lambda: "chosen since" in server.log)
        kill(server)
    (folder / "adapter_model.safetensors").write_bytes(b"a newer folder")
    with serve_scripted("words", *options, data_dir=data_dir) as server, server.client() as http:
        newer = http.get("/v1/adapters/acme").json()["version"]
        assert newer not in (given, chosen)
        kill(server)
    shutil.rmtree(folder)
    with serve_scripted("words", *options, data_dir=data_dir) as server, server.client() as http:
        assert http.get("/v1/adapters/acme").json()["version"] == newer
        assert len(http.get("/v1/adapters/acme/versions").json()["data"]) == 3


def test_a_version_whose_proof_ends_while_the_registry_cannot_be_written_is_ready_afterwards(
    serve_scripted: Starter, held: Path
) -> None:
    with serve_scripted(f"words,held={held}") as server, server.client() as http:
        upload(http, "acme", b"proved", query="activate=true").raise_for_status()
        server.wait_for(lambda: http.get("/v1/adapters/acme").json()["state"] == "proving")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        held.unlink()
        server.wait_for(lambda: "of acme waits: " in server.log)
        assert http.get("/v1/adapters/acme").json()["state"] in ("validating", "proving")

        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)

        server.wait_for(lambda: http.get("/v1/adapters/acme").json()["active"])
