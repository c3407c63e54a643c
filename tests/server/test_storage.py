"""Which base adapters are bound to, and which device that base is on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onebase_edge.settings import Settings
from onebase_server.storage.opening import chosen_device, host_memory, prefix_memory

from .support import Starter, upload


def test_adapters_proved_on_one_device_are_not_served_on_another_and_stay_where_they_were(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    def seen(device: str, *, send: str | None = None) -> dict[str, str]:
        options = ("words", "--device", device)
        with serve_scripted(*options, data_dir=tmp_path) as server, server.client() as http:
            if send is not None:
                upload(http, send, b"weights").raise_for_status()
            return {one["name"]: one["state"] for one in http.get("/v1/adapters").json()["data"]}

    assert seen("cpu", send="acme") == {"acme": "ready"}
    assert seen("cuda", send="on-the-gpu") == {"on-the-gpu": "ready"}
    assert seen("cpu") == {"acme": "ready"}


@pytest.mark.parametrize("found", [True, False])
def test_auto_takes_the_gpu_that_torch_finds_and_asks_only_where_there_may_be_one(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, devices = tmp_path / "sources", tmp_path / "dev"
    sources.mkdir()
    devices.mkdir()
    (sources / "torch.py").write_text(
        "class cuda:\n"
        "    def is_available():\n"
        f"        open({json.dumps(str(tmp_path / 'asked'))}, 'w')\n"
        f"        return {found}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(sources))
    (devices / "null").touch()
    assert chosen_device("auto", devices) == "cpu"
    assert not (tmp_path / "asked").exists()
    (devices / "nvidiactl").touch()
    assert chosen_device("auto", devices) == ("cuda" if found else "cpu")
    assert (tmp_path / "asked").exists()
    assert (chosen_device("cpu", devices), chosen_device("cuda", devices)) == ("cpu", "cuda")


def test_on_a_gpu_a_quarter_of_the_host_memory_is_for_prefixes_that_leave_the_kv_cache() -> None:
    shares = {}
    for device in ("cpu", "cuda"):
        settings = Settings(device=device, host_memory=8_000_000)
        shares[device] = host_memory(settings), prefix_memory(settings)
    assert shares == {"cpu": (8_000_000, 0), "cuda": (6_000_000, 2_000_000)}
