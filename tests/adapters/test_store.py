"""The store of blobs in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onebase_adapters.store.blobs import Blob, version_digest
from onebase_adapters.store.store import BlobDamagedError, BlobMissingError, Store, StoreError

CONTENT = bytes(range(256)) * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ABSENT = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"), tmp_path / "cache")


def put(store: Store, content: bytes = CONTENT) -> Blob:
    with store.writer() as writer:
        writer.write(content)
        return writer.commit()


def age(store: Store, sha256: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(store.local(sha256), (then, then))


def test_what_was_written_in_pieces_is_read_whole_under_its_hash(store: Store) -> None:
    with store.writer() as writer:
        for begin in range(0, len(CONTENT), 1_000):
            writer.write(CONTENT[begin : begin + 1_000])
        assert writer.size == len(CONTENT)
        assert not store.exists(SHA256)
        blob = writer.commit()
    assert blob == Blob(SHA256, len(CONTENT))
    assert store.local(SHA256).read_bytes() == CONTENT
    assert store.exists(SHA256)
    assert store.size(SHA256) == len(CONTENT)
    store.check_blob(SHA256)


def test_a_writer_that_is_left_without_commit_leaves_nothing(store: Store) -> None:
    with store.writer() as writer:
        writer.write(CONTENT)
        assert list(store.scratch().iterdir())
    assert not list(store.scratch().iterdir())
    assert not store.exists(SHA256)


def test_a_writer_writes_one_blob_only(store: Store) -> None:
    with store.writer() as writer:
        writer.write(CONTENT)
        writer.commit()
        with pytest.raises(StoreError, match="begin another"):
            writer.write(CONTENT)
        with pytest.raises(StoreError, match="begin another"):
            writer.commit()
    assert store.exists(SHA256)


def test_a_file_is_copied_in_or_moved_in(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "file"
    outside.write_bytes(CONTENT)
    assert store.add_file(outside).sha256 == SHA256
    assert outside.exists()
    inside = store.scratch() / "prepared"
    inside.write_bytes(CONTENT + b"!")
    number = inside.stat().st_ino
    blob = store.add_file(inside, move=True)
    assert store.local(blob.sha256).stat().st_ino == number
    assert store.local(blob.sha256).read_bytes() == CONTENT + b"!"
    assert not inside.exists()
    with pytest.raises(StoreError):
        store.add_file(tmp_path / "absent")


@pytest.mark.parametrize("name", [ABSENT, "", "../../etc/passwd", "a" * 63, "A" * 64, "..", "x/" + "0" * 62])
def test_a_name_that_is_no_blob_is_missing_and_leads_nowhere(store: Store, name: str) -> None:
    for call in (store.local, store.size, store.check_blob):
        with pytest.raises(BlobMissingError):
            call(name)
    if name == ABSENT:
        assert not store.exists(name)
        assert not store.delete(name, older_than=0.0)
        return
    for look in (store.exists, store.delete):
        with pytest.raises(BlobMissingError):
            look(name)


def test_a_store_whose_folder_is_away_has_not_lost_its_blobs(store: Store, tmp_path: Path) -> None:
    put(store)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    (tmp_path / "store").mkdir()  # where it is mounted
    for use in (store.local, store.exists, store.size, store.check_blob):
        with pytest.raises(StoreError, match="failed while looking") as away:
            use(SHA256)
        assert not isinstance(away.value, BlobMissingError)
    (tmp_path / "store").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "store")
    store.check_blob(SHA256)


def test_damage_is_found_and_mended_by_the_same_content(store: Store) -> None:
    put(store)
    store.local(SHA256).write_bytes(b"damaged")
    with pytest.raises(BlobDamagedError, match=SHA256):
        store.check_blob(SHA256)
    put(store)
    store.check_blob(SHA256)


# Deleting


def test_a_young_blob_is_not_deleted_as_somebody_may_be_about_to_register_it(store: Store) -> None:
    put(store)
    assert not store.delete(SHA256)
    age(store, SHA256, 1_000)
    assert store.delete(SHA256)
    assert not store.exists(SHA256)


def test_storing_the_same_content_again_makes_an_old_blob_young(store: Store) -> None:
    put(store)
    age(store, SHA256, 1_000)
    put(store)
    assert not store.delete(SHA256)
    assert store.sweep([], 600.0) == 0
    assert store.exists(SHA256)


def test_a_sweep_takes_old_orphans_and_leaves_the_rest(store: Store, tmp_path: Path) -> None:
    kept, old, young = (put(store, content).sha256 for content in (b"kept", b"old", b"young"))
    for sha256 in (kept, old):
        age(store, sha256, 1_000)
    foreign = tmp_path / "store" / "blobs" / "README"
    foreign.write_text("not ours")
    left = store.scratch() / "prepared-of-a-dead-process"
    left.write_bytes(b"x")
    assert store.sweep([kept], 600.0) == 1
    assert [store.exists(sha256) for sha256 in (kept, old, young)] == [True, False, True]
    assert store.sweep(iter([kept]), 0.0) == 2
    assert not left.exists()
    assert foreign.exists()


def test_a_store_of_several_registries_keeps_what_one_of_them_does_not_need(tmp_path: Path) -> None:
    for url in (str(tmp_path / "store"), "memory://of-several-registries"):
        first, second = (Store(url, tmp_path / "cache", registry=name, grace=0.0) for name in ("a", "b"))
        kept = put(first)
        assert first.delete(put(first, b"alone").sha256)
        put(second, b"of the second")
        assert not first.delete(kept.sha256)
        for store in (first, second, Store(url, tmp_path / "cache", registry="a")):
            assert store.sweep(set(), 0.0) == 0
        assert first.exists(kept.sha256)


def test_what_is_held_of_a_local_store_is_the_blob_itself(store: Store, tmp_path: Path) -> None:
    put(store)
    assert store.hold(SHA256, tmp_path / "job" / "file") == store.local(SHA256)
    with pytest.raises(BlobMissingError):
        store.hold(ABSENT, tmp_path / "job" / "file")


def test_a_sweep_leaves_what_a_living_process_writes(store: Store, tmp_path: Path) -> None:
    with store.writer() as writer:
        writer.write(CONTENT)
        assert Store(str(tmp_path / "store"), tmp_path / "cache").sweep([], 0.0) == 0
        assert writer.commit().sha256 == SHA256
    store.check_blob(SHA256)


def test_a_sweep_takes_what_a_killed_process_was_writing(store: Store, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from onebase_adapters.store.store import Store\n"
        "writer = Store(sys.argv[1], Path(sys.argv[2])).writer(); writer.write(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store"), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "adapters")},
    )
    assert len(list(store.scratch().iterdir())) == 1
    assert store.sweep([], 0.0) == 1
    assert not list(store.scratch().iterdir())


# Several at once


def test_the_same_content_at_once_is_one_blob(store: Store) -> None:
    start = threading.Barrier(8)

    def upload(_: int) -> Blob:
        start.wait()
        return put(store)

    with ThreadPoolExecutor(8) as pool:
        blobs = set(pool.map(upload, range(8)))
    assert blobs == {Blob(SHA256, len(CONTENT))}
    store.check_blob(SHA256)
    assert not list(store.scratch().iterdir())


def test_while_others_sweep_no_blob_is_lost_that_was_just_stored_again(store: Store, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "store"), tmp_path / "cache")
    swept: list[int] = []
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            swept.append(other.sweep([], 600.0))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        while sum(swept) < 50:
            put(store)
            assert store.exists(SHA256)
            with contextlib.suppress(FileNotFoundError, BlobMissingError):
                age(store, SHA256, 1_000)
    finally:
        stop.set()
        sweeper.join()


# Places


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = Store((tmp_path / "with space").as_uri(), tmp_path / "cache")
    put(store)
    assert (tmp_path / "with space" / "blobs" / SHA256).read_bytes() == CONTENT
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("url", ["file://relative/path", "file://host/share", "nowhere://x/y", "s3://"])
def test_a_place_that_cannot_be_used_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Store(url, tmp_path / "cache")


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="folder"):
        Store(str(tmp_path / "file" / "store"), tmp_path / "cache")


def test_a_version_is_named_by_both_files_contents() -> None:
    config, weights = hashlib.sha256(b"config"), hashlib.sha256(b"weights")
    whole = hashlib.sha256()
    for name, part in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
        whole.update(name.encode() + b"\0" + part.digest())
    assert version_digest(config.hexdigest(), weights.hexdigest()) == whole.hexdigest()
    assert version_digest(weights.hexdigest(), config.hexdigest()) != whole.hexdigest()
