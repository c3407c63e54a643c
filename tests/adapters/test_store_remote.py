"""The store on an object store, against a local server that speaks S3's API, and on other remote places."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from tests.disks import fill, small_disk
from tests.object_store import object_store

from onebase_adapters.store.blobs import Blob
from onebase_adapters.store.local import FileSystem
from onebase_adapters.store.remote import RemoteBlobs
from onebase_adapters.store.store import BlobDamagedError, BlobMissingError, Store, StoreError, StoreFullError
from onebase_engine.redaction import redacted, without_secrets

CONTENT = bytes(range(256)) * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BUCKET = "adapters"
SECRET = "s3cr3tKey"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with object_store() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3's own view of an empty bucket, to look past the store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)
    fsspec.filesystem("s3").clear_instance_cache()


def open_store(tmp_path: Path, name: str = "cache", **settings: Any) -> Store:
    return Store(f"s3://{BUCKET}/prefix", tmp_path / name, **settings)


def put(store: Store, content: bytes = CONTENT) -> Blob:
    with store.writer() as writer:
        writer.write(content)
        return writer.commit()


def keys(s3: Any) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_a_blob_goes_to_the_bucket_and_another_server_reads_it(s3: Any, tmp_path: Path) -> None:
    here, there = open_store(tmp_path, "here"), open_store(tmp_path, "there")
    assert not there.exists(SHA256)
    assert put(here) == Blob(SHA256, len(CONTENT))
    assert keys(s3) == [f"prefix/blobs/{SHA256}"]
    assert there.exists(SHA256)
    assert there.size(SHA256) == len(CONTENT)
    path = there.local(SHA256)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "there")
    assert not list(there.scratch().iterdir())


def test_a_blob_in_the_cache_is_not_fetched_again(s3: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store)
    s3.delete_object(Bucket=BUCKET, Key=f"prefix/blobs/{SHA256}")
    assert store.local(SHA256).read_bytes() == CONTENT
    assert not store.exists(SHA256)
    with pytest.raises(BlobMissingError):
        open_store(tmp_path, "other").local(SHA256)


def test_a_prepared_file_is_moved_into_the_cache_and_sent(s3: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.scratch() / "prepared"
    path.write_bytes(CONTENT)
    number = path.stat().st_ino
    store.add_file(path, move=True)
    assert store.local(SHA256).stat().st_ino == number
    assert keys(s3) == [f"prefix/blobs/{SHA256}"]


def test_a_large_blob_is_sent_in_parts_and_read_whole(s3: Any, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 60
    blob = put(open_store(tmp_path), content)
    assert "-" in s3.head_object(Bucket=BUCKET, Key=f"prefix/blobs/{blob.sha256}")["ETag"]
    other = open_store(tmp_path, "other")
    assert other.local(blob.sha256).read_bytes() == content


def test_damage_in_the_bucket_is_found_kept_out_of_the_cache_and_mended(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key=f"prefix/blobs/{SHA256}", Body=CONTENT[:-1] + b"!")
    store = open_store(tmp_path)
    with pytest.raises(BlobDamagedError, match=SHA256):
        store.local(SHA256)
    assert not list((tmp_path / "cache" / "blobs").iterdir())
    assert not list(store.scratch().iterdir())
    put(open_store(tmp_path, "other"))
    assert store.local(SHA256).read_bytes() == CONTENT


def test_a_sweep_takes_old_orphans_of_the_bucket_and_leaves_the_rest(s3: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    kept, orphan = put(store, b"kept").sha256, put(store, b"orphan").sha256
    s3.put_object(Bucket=BUCKET, Key="prefix/blobs/README", Body=b"not ours")
    s3.put_object(Bucket=BUCKET, Key=f"elsewhere/{SHA256}", Body=b"not ours")
    assert store.sweep([kept], 600.0) == 0
    assert not store.delete(orphan)
    time.sleep(1.1)  # S3 tells times in whole seconds
    assert store.sweep([kept], 1.0) == 1
    assert set(keys(s3)) == {f"elsewhere/{SHA256}", "prefix/blobs/README", f"prefix/blobs/{kept}"}
    assert store.delete(kept, older_than=0.0)
    assert not store.exists(kept)
    with pytest.raises(BlobMissingError):
        store.local(kept)


def test_a_bucket_of_two_registries_loses_nothing_to_either(s3: Any, tmp_path: Path) -> None:
    first, second = (open_store(tmp_path, name, registry=f"registry-{name}") for name in ("one", "two"))
    put(first)
    assert "prefix/registries/registry-one" in keys(s3)
    assert not first.is_shared()
    assert second.sweep(set(), 0.0) == 0
    assert not first.delete(SHA256, older_than=0.0)
    assert second.exists(SHA256)


@pytest.mark.parametrize("same_disk", [True, False])
def test_what_is_held_outlives_the_cache(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    if not same_disk:
        monkeypatch.setattr(os, "link", refuse)
    store, target = open_store(tmp_path), tmp_path / "job" / "file"
    put(store)
    for _ in range(2):
        assert store.hold(SHA256, target) == target
        (tmp_path / "cache" / "blobs" / SHA256).unlink()
        assert target.read_bytes() == CONTENT


def test_a_cache_on_a_disk_that_fails_is_an_error_of_the_store(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    store = open_store(tmp_path)
    put(store)
    monkeypatch.setattr(os, "utime", fail)
    with pytest.raises(StoreError, match="failed while looking for"):
        store.local(SHA256)


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(s3: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path, cache_bytes=35_000)
    blobs = [put(store, bytes([number]) * 10_000).sha256 for number in range(3)]
    for number, sha256 in enumerate(blobs):
        then = time.time() - 1_000 + number
        os.utime(tmp_path / "cache" / "blobs" / sha256, (then, then))
    store.local(blobs[0])
    newest = put(store, b"x" * 10_000).sha256
    held = {path.name for path in (tmp_path / "cache" / "blobs").iterdir()}
    assert held == {blobs[0], blobs[2], newest}
    assert store.local(blobs[1]).read_bytes() == bytes([1]) * 10_000


def test_the_same_content_from_several_servers_at_once_is_one_blob(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This stand-in answers 500 now and then when two write one key; the client's own retries are for that.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "10")
    stores = [open_store(tmp_path, f"cache-{number}") for number in range(3)]
    start = threading.Barrier(6)

    def upload(number: int) -> Blob:
        start.wait()
        return put(stores[number % 3])

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(upload, range(6))) == {Blob(SHA256, len(CONTENT))}
        paths = set(pool.map(lambda number: open_store(tmp_path, "cold").local(SHA256), range(6)))
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert keys(s3) == [f"prefix/blobs/{SHA256}"]


def test_a_failed_transfer_leaves_no_blob_and_no_temporary_file(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    s3.delete_bucket(Bucket=BUCKET)
    with pytest.raises(StoreError, match=rf"s3://{BUCKET}/prefix failed while sending"):
        put(store)
    s3.create_bucket(Bucket=BUCKET)
    assert not list(store.scratch().iterdir())
    assert not list((tmp_path / "cache" / "blobs").iterdir())
    put(store)
    assert store.exists(SHA256)


def test_a_store_that_cannot_be_reached_is_an_error_and_not_an_absence(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fsspec.filesystem("s3").clear_instance_cache()
    store = open_store(tmp_path)
    for call in (store.exists, store.size, store.local, store.delete):
        with pytest.raises(StoreError) as refused:
            call(SHA256)
        assert not isinstance(refused.value, BlobMissingError)
    with pytest.raises(StoreError):
        store.sweep([], 0.0)


class RemoteFullError(Exception):
    pass


def test_a_remote_store_that_is_full_says_so(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    remote = store._remote
    assert remote is not None

    def refuse(*_: Any, **__: Any) -> None:
        raise RemoteFullError("An error occurred (QuotaExceeded) when calling PutObject")

    monkeypatch.setattr(remote._fs, "put_file", refuse)
    with pytest.raises(StoreFullError):
        put(store)


def test_a_full_disk_under_the_cache_is_a_full_store(s3: Any, tmp_path: Path) -> None:
    put(open_store(tmp_path), b"x" * 200_000)
    sha256 = hashlib.sha256(b"x" * 200_000).hexdigest()
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = open_store(tmp_path, "disk/cache")
        filler = fill(disk)
        os.truncate(filler, filler.stat().st_size - 65_536)
        for call in (lambda: store.local(sha256), lambda: put(store, b"y" * 200_000)):
            with pytest.raises(StoreFullError):
                call()
        assert not list(store.scratch().iterdir())
        filler.unlink()
        assert store.local(sha256).read_bytes() == b"x" * 200_000


def test_what_was_fetched_is_on_the_disk_before_it_has_a_name(s3: Any, tmp_path: Path) -> None:
    put(open_store(tmp_path, "other"))
    calls: list[str] = []

    class Watched(FileSystem):
        def sync(self, file: Any) -> None:
            calls.append("sync")
            super().sync(file)

        def rename(self, source: Path, target: Path) -> None:
            calls.append(f"rename {source.read_bytes() == CONTENT}")
            super().rename(source, target)

        def sync_folder(self, folder: Path) -> None:
            calls.append("folder")
            super().sync_folder(folder)

    store = open_store(tmp_path, files=Watched())
    calls.clear()
    store.local(SHA256)
    assert calls == ["sync", "rename True", "folder"]


# Other places


def test_where_a_put_is_not_atomic_the_blob_gets_its_name_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's folder as a remote place, which `dir::` makes of any path."""
    remote = RemoteBlobs((tmp_path / "remote").as_uri())
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    seen: list[bool] = []
    move = remote._fs.mv

    def watched(part: str, name: str) -> None:
        seen.append(remote.size(SHA256) is None and Path(part).read_bytes() == CONTENT)
        move(part, name)

    monkeypatch.setattr(remote._fs, "mv", watched)
    remote.put(source, Blob(SHA256, len(CONTENT)))
    assert seen == [True]
    assert remote.size(SHA256) == len(CONTENT)
    left = tmp_path / "remote" / "tmp" / "dead.part"
    left.write_bytes(b"half")
    assert remote.sweep(frozenset([SHA256]), 0.0) == 1
    assert not left.exists()
    assert remote.remove(SHA256, 0.0)
    assert remote.size(SHA256) is None


def test_a_store_in_memory_works_like_any_other(tmp_path: Path) -> None:
    store = Store("memory://onebase-test", tmp_path / "cache")
    put(store)
    other = Store("memory://onebase-test", tmp_path / "other")
    assert other.local(SHA256).read_bytes() == CONTENT
    assert store.sweep([], 0.0) == 1


# Credentials

URLS = [
    ("ftp://user:s3cr3tKey@127.0.0.1:1/x", "s3cr3tKey"),
    ("ftp://user:s3%2Fcr3tKey@127.0.0.1:1/x", "s3/cr3tKey"),
    ("webdav://user:s3cr3tKey@host/x", "s3cr3tKey"),
    ("nowhere://host/x?token=s3cr3tKey", "s3cr3tKey"),
    ("nowhere://s3cr3tKey@host/x", "s3cr3tKey"),
]


@pytest.mark.parametrize(("url", "secret"), URLS)
def test_no_error_or_log_line_holds_a_credential_of_the_url(
    url: str, secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError) as refused:
        put(Store(url, tmp_path / "cache"))
    error = refused.value
    shown = [str(error), repr(error), str(error.__cause__), caplog.text]
    assert error.__suppress_context__ or error.__context__ is None
    for text in shown:
        assert secret not in text
        assert url not in text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("sftp://me:pw@host:22/data", "sftp://***@host:22/data"),
        ("sftp://me:p@w/?#x@host/data", "sftp://***@host/data"),
        ("https://host/data?sig=abc#frag", "https://host/data"),
        ("/var/lib/onebase", "/var/lib/onebase"),
        ("/var/lib/me:you@home", "/var/lib/me:you@home"),
        ("me:s3cr3t@host:5432/data?x=y", "***@host:5432/data"),
        ("//me:s3cr3t@host/data", "//***@host/data"),
        ("s3cr3t@host", "***@host"),
        ("me:s3cr3t://x@host/data", "***@host/data"),
        ("https://host:8080/data?mail=me@home&x=y", "https://host:8080/data"),
        ("https://[::1]:80?mail=me@home", "https://[::1]:80"),
        ("https://me:s3cr3t@host/data?mail=me@home", "https://***@host/data"),
        ("sftp://me:s3?cr=3t@host/data", "sftp://***@host/data"),
        ("host/data?mail=me@home", "host/data"),
    ],
)
def test_a_place_is_shown_without_credentials(url: str, expected: str) -> None:
    assert redacted(url) == expected


def test_a_password_without_a_scheme_is_removed_from_what_a_library_quotes() -> None:
    clean = without_secrets("cannot reach me:s3cr3t@host/x: s3cr3t was refused", "me:s3cr3t@host/x")
    assert clean == "cannot reach ***@host/x: *** was refused"


def test_what_a_library_quotes_is_cleaned() -> None:
    url = "sftp://me:p%40ss@host/x?key=k3y"
    said = f"cannot open {url}: user me, password p@ss or p%40ss, key=k3y"
    clean = without_secrets(said, url)
    assert not [secret for secret in ("p@ss", "p%40ss", "k3y") if secret in clean]
    assert "cannot open sftp://***@host/x" in clean
