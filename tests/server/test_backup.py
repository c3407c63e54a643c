"""`onebase backup`: what a server keeps, copied while it serves, and served from the copy."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from onebase_server.app.cli import backup
from onebase_server.storage import opening

from .support import Starter, upload

ORDERS = Path(__file__).resolve().parents[2] / "examples/adapters/orders/adapter_model.safetensors"


def other(number: int) -> bytes:
    """Weights of another version for each number."""
    weights = ORDERS.read_bytes()
    return weights[:-1] + bytes([number])


def test_a_copy_made_while_versions_come_and_go_is_served_with_all_that_it_names(
    serve_scripted: Starter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, numbers = tmp_path / "copy", itertools.count(1)
    with serve_scripted("words", data_dir=tmp_path / "data") as server, server.client() as http:
        server.wait_ready()
        first = upload(http, "acme", other(0), query="wait=true&activate=true").json()["version"]

        def and_then(step: Callable[..., None]) -> Callable[..., None]:
            """The step of a backup; after it a version comes, and another one comes and goes."""

            def done(*arguments: Any, **settings: Any) -> None:
                step(*arguments, **settings)
                upload(http, "acme", other(next(numbers))).raise_for_status()
                gone = upload(http, "acme", other(next(numbers))).json()["version"]
                http.delete(f"/v1/adapters/acme/versions/{gone}").raise_for_status()

            return done

        for name in ("_copy_registry", "_copy_files"):
            monkeypatch.setattr(opening, name, and_then(getattr(opening, name)))
        for _ in range(2):
            assert backup([str(copy), "--data-dir", str(tmp_path / "data")]) == 0
            said = " ".join(capsys.readouterr().err.split())
            assert re.search(r": 1 adapter, \d+ files, [\d.]+ [kM]B, newest change \d{4}-\d\d-\d\d ", said), (
                said
            )
        assert http.delete("/v1/adapters/acme?force=true").status_code == 200
    with closing(sqlite3.connect(copy / "registry.db")) as database:
        leases = database.execute("SELECT until - at FROM servers").fetchall()
    assert leases == [(0.0,)]  # else the copy would wait for the end of the original's
    with serve_scripted("words", data_dir=copy) as server, server.client() as http:
        server.wait_ready()
        versions = http.get("/v1/adapters/acme/versions").json()["data"]
        assert next(one["version"] for one in versions if one["active"]) == first
        assert len(versions) > 5
        for version in [one["version"] for one in versions]:
            body = {"prompt": "a", "adapter": f"acme@{version}", "max_tokens": 2}
            assert http.post("/generate", json=body).json()["adapter"] == f"acme@{version[:12]}"
        for path in copy.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_backup_does_not_touch_a_folder_that_a_server_or_somebody_else_uses(
    serve_scripted: Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other, mine = tmp_path / "data", tmp_path / "other", tmp_path / "mine"
    (mine / "training").mkdir(parents=True)
    with serve_scripted("words", data_dir=data) as server, serve_scripted("words", data_dir=other) as used:
        server.wait_ready()
        used.wait_ready()
        for folder, reason in (
            (other, "uses"),
            (data / "copy", "lies in the data folder"),
            (mine, "holds other files"),
        ):
            assert backup([str(folder), "--data-dir", str(data)]) == 1
            assert reason in " ".join(capsys.readouterr().err.split())
    assert (mine / "training").exists()
    assert backup([str(tmp_path / "copy"), "--data-dir", str(tmp_path / "nothing")]) == 1
    assert "is not there" in " ".join(capsys.readouterr().err.split())


def test_what_is_not_on_a_disk_here_is_named_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--registry", "postgresql://me:secret@127.0.0.1/x", "--store", "s3://bucket/path")
    assert backup([str(tmp_path / "copy"), "--data-dir", str(tmp_path), *places]) == 1
    assert backup([str(tmp_path / "copy"), "--data-dir", str(tmp_path / "data"), *places]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "127.0.0.1/x" in said
    assert "s3://bucket/path" in said
    assert "secret" not in said
