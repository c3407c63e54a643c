"""What a server writes, only its own user may read; and what it knows, its children do not."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from onebase_edge.settings import Settings
from onebase_server.storage.opening import close_to_others

from ..hub_standin import HubStandIn
from .support import CONFIG, HERE, Server, Starter, serving, upload
from .training_support import make_job, openai_client, run_job


def open_to_others(folder: Path) -> list[str]:
    """What group or others may read, write or enter, the folder included."""
    inside = [Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)]
    found = [path for path in (folder, *inside) if not path.is_symlink() and path.stat().st_mode & 0o077]
    return [f"{stat.filemode(path.stat().st_mode)} {path}" for path in found]


def use(server: Server, hub: HubStandIn) -> None:
    """An upload, a pull, a training file and a job; each must go well."""
    hub.add_repo("acme/pulled", {"adapter_config.json": CONFIG.encode(), "adapter_model.safetensors": b"w"})
    with server.client() as http:
        upload(http, "sent", b"weights").raise_for_status()
        pulled = http.post("/v1/adapters?wait=true", json={"name": "pulled", "hub": {"repo": "acme/pulled"}})
        pulled.raise_for_status()
    client = openai_client(server)
    assert run_job(server, client, "words\n").status == "succeeded"
    assert run_job(server, client, "broken\n").status == "failed"


def open_all(folder: Path) -> None:
    """As an umask of 022 would have left it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o055)


def test_nobody_else_reads_what_a_server_writes_whatever_the_umask(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data, home = tmp_path / "data", tmp_path / "hf"
    with HubStandIn() as hub:
        options = {"data_dir": data, "umask": 0, "environment": hub.environment(home)}
        with serve_scripted("words", "--hub-allow", "acme/*", **options) as server:
            use(server, hub)
            assert {"registry.db", "registry.db-wal", "registry.db.lock"} <= {p.name for p in data.iterdir()}
            assert list((data / "training").rglob("*"))
            assert open_to_others(data) == []
            # The library opens its empty lock files again; nobody else comes to where they are.
            assert not [line for line in open_to_others(home) if not line.endswith(".lock")]
    open_all(data)
    with serve_scripted("words", data_dir=data, umask=0o022) as server:
        with server.client() as http:
            upload(http, "sent-later", b"other weights").raise_for_status()
        assert open_to_others(data) == []


def test_only_what_is_the_servers_own_is_closed_to_others(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in ("store/blobs", "store/tmp", "cache/tmp", "training/registry-1/job"):
        (data / folder).mkdir(parents=True)
        (data / folder / "file").write_text("rows")
    (data / "store" / "link").symlink_to(tmp_path)
    (elsewhere / "store" / "blobs").mkdir(parents=True)
    for path in (
        data / "registry.db",
        elsewhere / "names.db",
        elsewhere / "names.db-wal",
        elsewhere / "mine",
    ):
        path.write_text("rows")
    open_all(tmp_path)
    close_to_others(
        Settings(
            data_dir=str(data),
            registry=f"sqlite:///{elsewhere / 'names.db'}",
            store=str(elsewhere / "store"),
        )
    )
    assert open_to_others(data) == []
    assert {line.rpartition("/")[2] for line in open_to_others(elsewhere)} == {"elsewhere", "mine"}
    assert stat.S_IMODE(tmp_path.stat().st_mode) & 0o055 == 0o055
    assert (data / "store" / "blobs" / "file").stat().st_mode & 0o700 == 0o600

    # Where something of the user's lies too, the folder is the user's, and so is its mode.
    (data / "notes").write_text("mine")
    open_all(data)
    close_to_others(Settings(data_dir=str(data)))
    assert {line.rpartition("/")[2] for line in open_to_others(data)} == {"data", "notes"}


def test_a_data_folder_behind_a_link_is_closed(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "data"
    (disk / "store" / "blobs").mkdir(parents=True)
    link.symlink_to(disk)
    open_all(disk)
    close_to_others(Settings(data_dir=str(link)))
    assert open_to_others(disk) == []


def test_a_file_system_that_changes_no_modes_is_told_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "registry.db").write_text("rows")
    open_all(tmp_path)

    def refuse(path: Path, _mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    close_to_others(Settings(data_dir=str(tmp_path)))
    (told,) = caplog.messages
    assert told.startswith(f"Others may read {tmp_path}/")
    assert "and 2 more: its file system changes no modes" in told


@pytest.mark.parametrize("url", ["postgresql://user:secret@host/names", "nonsense", "", "s3://bucket/part"])
def test_places_that_are_no_files_of_this_disk_are_left_alone(tmp_path: Path, url: str) -> None:
    store = url if url.startswith("s3") else ""
    close_to_others(Settings(data_dir=str(tmp_path / "absent"), registry="" if store else url, store=store))
    assert not (tmp_path / "absent").exists()


SECRET = "s3cret-of-the-operator"
SECRETS = {
    "HF_TOKEN": SECRET,
    "HUGGING_FACE_HUB_TOKEN": SECRET,
    "HF_TOKEN_PATH": f"/{SECRET}/token",
    "ONEBASE_API_KEY": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "PGPASSWORD": SECRET,
    "DATABASE_URL": f"postgresql://onebase:{SECRET}@db/names",
    "WANDB_API_KEY": SECRET,
    "SOMETHING_OF_TOMORROW": SECRET,
}


def test_the_engine_the_verifier_and_a_trainer_inherit_no_secret_but_what_their_libraries_read() -> None:
    environment = {**SECRETS, "OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "1"}
    command = [sys.executable, str(HERE / "serve_scripted.py"), "words,proves,real"]
    with serving(command, environment=environment) as server:
        with server.client() as http:
            upload(http, "sent", b"weights").raise_for_status()
        make_job(openai_client(server), '{"prompt": "a", "completion": "b"}\n')
        server.wait_for(lambda: bool(server.trainer_pids()))
        for pid in (server.engine_pid(), server.verifier_pid(), *server.trainer_pids()):
            inherited = Path(f"/proc/{pid}/environ").read_text().split("\0")
            assert {"HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=3", "CUDA_VISIBLE_DEVICES=1"} <= set(inherited)
            assert not [line for line in inherited if SECRET in line]
            assert SECRET not in Path(f"/proc/{pid}/cmdline").read_text()
        assert SECRET in Path(f"/proc/{server.process.pid}/environ").read_text()
