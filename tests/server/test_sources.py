"""Folders given at start: which are found, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from onebase_server.adapters.sources import FolderError, find_adapters

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
