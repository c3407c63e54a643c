"""Adapters' names and versions: what may be asked for, and what is refused at start."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from onebase_server.catalog import Catalog, CatalogError, find_adapters, version_digest
from onebase_server.engine.protocol import AdapterRef
from onebase_server.errors import UnknownAdapterError


def folder(parent: Path, name: str, content: bytes = b"weights") -> Path:
    path = parent / name
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def test_the_digest_is_the_documented_one_and_depends_on_content_alone(tmp_path: Path) -> None:
    first, second = folder(tmp_path, "one"), folder(tmp_path, "two")
    other = folder(tmp_path, "three", b"other weights")
    parts = b"".join(
        name.encode() + b"\0" + hashlib.sha256(content).digest()
        for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights"))
    )

    assert version_digest(first) == hashlib.sha256(parts).hexdigest()
    assert version_digest(first) == version_digest(second)
    assert version_digest(first) != version_digest(other)


def test_a_name_a_version_and_a_beginning_of_it_all_find_the_adapter(tmp_path: Path) -> None:
    catalog = Catalog("base", [("acme", folder(tmp_path, "acme"))])
    (version,) = catalog

    for reference in ("acme", f"acme@{version.digest}", f"acme@{version.digest[:8]}"):
        choice = catalog.choose(reference)
        assert choice.refs == (AdapterRef(version.digest),)
        assert choice.label == f"acme@{version.digest[:12]}"


@pytest.mark.parametrize("reference", ["nobody", "acme@", "acme@0123", "acme@ffffffffffffffff", "ACME", ""])
def test_an_unknown_name_or_version_is_not_found_and_the_known_ones_are_named(
    tmp_path: Path, reference: str
) -> None:
    catalog = Catalog("base", [("acme", folder(tmp_path, "acme"))])

    with pytest.raises(UnknownAdapterError) as caught:
        catalog.choose(reference)

    assert caught.value.code == "adapter_not_found"
    assert "acme" in caught.value.message


def test_too_short_a_beginning_of_a_version_is_refused_even_when_it_fits(tmp_path: Path) -> None:
    catalog = Catalog("base", [("acme", folder(tmp_path, "acme"))])
    (version,) = catalog

    with pytest.raises(UnknownAdapterError, match="at least 8"):
        catalog.choose(f"acme@{version.digest[:7]}")


def test_a_weighted_sum_keeps_order_and_weights(tmp_path: Path) -> None:
    catalog = Catalog("base", [("a", folder(tmp_path, "a")), ("b", folder(tmp_path, "b", b"other"))])

    choice = catalog.choose_sum([("b", 0.5), ("a", -1.0), ("b", 0.25)])

    digests = {version.name: version.digest for version in catalog}
    assert choice.refs == (
        AdapterRef(digests["b"], 0.5),
        AdapterRef(digests["a"], -1.0),
        AdapterRef(digests["b"], 0.25),
    )


def test_the_unknown_term_of_a_sum_is_named_by_its_place(tmp_path: Path) -> None:
    catalog = Catalog("base", [("a", folder(tmp_path, "a"))])

    with pytest.raises(UnknownAdapterError) as caught:
        catalog.choose_sum([("a", 1.0), ("nobody", 1.0)])

    assert caught.value.param == "adapter[1].name"


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a@b", "ä", "a" * 65, "a\n"])
def test_a_name_that_is_not_allowed_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CatalogError, match="adapter name"):
        Catalog("base", [(name, folder(tmp_path, "x"))])


def test_the_base_name_and_a_name_twice_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, "x")

    with pytest.raises(CatalogError, match="base's own name"):
        Catalog("base", [("base", path)])
    with pytest.raises(CatalogError, match="twice"):
        Catalog("base", [("x", path), ("x", path)])


def test_a_folder_without_weights_is_refused_by_the_file_it_lacks(tmp_path: Path) -> None:
    path = folder(tmp_path, "x")
    (path / "adapter_model.safetensors").unlink()

    with pytest.raises(CatalogError, match=r"adapter_model\.safetensors"):
        Catalog("base", [("x", path)])


def test_subfolders_with_an_adapter_are_found_and_others_left_alone(tmp_path: Path) -> None:
    folder(tmp_path, "b")
    folder(tmp_path, "a")
    (tmp_path / "notes").mkdir()

    names = [name for name, _ in find_adapters([("c", str(tmp_path / "a"))], str(tmp_path))]

    assert names == ["c", "a", "b"]


def test_two_names_for_the_same_files_are_loaded_once(tmp_path: Path) -> None:
    path = folder(tmp_path, "x")
    catalog = Catalog("base", [("one", path), ("two", path)])

    assert len(catalog.loads()) == 1
    assert catalog.names_of(catalog.loads()[0].digest) == ["one", "two"]
