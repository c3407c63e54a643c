"""Adapters from the Hub, against a local server that speaks its API to huggingface_hub."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from tests.disks import small_disk
from tests.hub_standin import HubStandIn
from tests.priorities import assert_behind

from onebase_adapters.format.added_tokens import BaseVocabulary, vocabulary_digests
from onebase_adapters.hub import pull as hub_pull
from onebase_adapters.hub.confinement import landlock_version
from onebase_adapters.hub.pull import (
    HubError,
    HubReference,
    PullCancelledError,
    parse_hub_reference,
    pull,
    resolve,
)
from onebase_adapters.store.blobs import AdapterFiles
from onebase_adapters.store.store import Store, StoreFullError
from onebase_engine.machine import BESIDE_SERVING

pytestmark = pytest.mark.usefixtures("forks")

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 2_000
FILES = {
    "adapter_config.json": CONFIG,
    "adapter_model.safetensors": WEIGHTS,
    "README.md": b"not wanted",
    "optimizer.pt": b"not wanted either" * 1_000,
}
REF = HubReference("acme/support")
MANY = 1 << 30


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with HubStandIn() as standin:
        for name, value in standin.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        yield standin


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"), tmp_path / "cache")


def contents(store: Store, files: AdapterFiles) -> tuple[bytes, bytes]:
    return store.local(files.config.sha256).read_bytes(), store.local(files.weights.sha256).read_bytes()


def code_of(refused: pytest.ExceptionInfo[HubError]) -> str:
    return refused.value.code


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:acme/support", HubReference("acme/support")),
        ("hub:acme/support@v1.0", HubReference("acme/support", "v1.0")),
        ("hub:a-b/c.d_e@refs/pr/3:lora/fr", HubReference("a-b/c.d_e", "refs/pr/3", "lora/fr")),
        ("hub:acme/support:fr", HubReference("acme/support", None, "fr")),
    ],
)
def test_a_reference_is_taken_apart_and_put_together(text: str, expected: HubReference) -> None:
    assert parse_hub_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "acme/support",
        "hub:",
        "hub:support",
        "hub:a/b/c",
        "hub:../support",
        "hub:acme/..",
        "hub:acme/sup port",
        "hub:acme/support.git",
        "hub:acme/a--b",
        "hub:acme/support@",
        "hub:acme/support@../../../etc",
        "hub:acme/support@/etc/passwd",
        "hub:acme/support@a//b",
        "hub:acme/support@a/./b",
        "hub:acme/support@-x",
        "hub:acme/support@v1\n",
        "hub:acme/support@a b",
        "hub:acme/support@main?x=1",
        "hub:acme/support:",
        "hub:acme/support:..",
        "hub:acme/support:a/../../b",
        "hub:acme/support:/etc",
        "hub:acme/support:a\\b",
        "hub:acme/support:a\0b",
        "hub:" + "a" * 97 + "/b",
    ],
)
def test_a_reference_that_could_lead_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(HubError) as refused:
        parse_hub_reference(text)
    assert code_of(refused) == "hub_invalid"


# Pulling


def test_the_two_files_come_and_nothing_else(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    assert resolve("acme/support") == commit
    seen: list[tuple[int, int]] = []
    files = pull(REF, commit, store, MANY, lambda done, total: seen.append((done, total)))
    assert contents(store, files) == (CONFIG, WEIGHTS)
    assert seen[-1] == (len(CONFIG) + len(WEIGHTS),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert any(len(CONFIG) < done < len(CONFIG) + len(WEIGHTS) for done, _ in seen)
    assert not [path for path in hub.requests() if "README" in path or "optimizer" in path]


MLX_CONFIG = b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 1, "scale": 2.0}}'
MLX_WEIGHTS = save({"model.layers.0.q_proj.lora_a": np.ones((3, 1), np.float32)})


def test_an_adapter_of_mlx_lm_comes_in_the_format_of_peft(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = {
        "adapter_config.json": MLX_CONFIG,
        "adapters.safetensors": MLX_WEIGHTS,
        "0001_adapters.safetensors": b"",
    }
    commit = hub.add_repo("acme/support", repo)
    config, weights = contents(store, pull(REF, commit, store, MANY))
    assert json.loads(config)["lora_alpha"] == 2.0
    (tensor,) = load(weights).items()
    assert tensor[0] == "base_model.model.model.layers.0.q_proj.lora_A.weight"
    assert tensor[1].shape == (1, 3)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert contents(store, pull(REF, commit, store, MANY)) == (config, weights)


def test_an_adapter_of_mlx_lm_that_cannot_be_converted_is_refused(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {"adapter_config.json": MLX_CONFIG, "adapters.safetensors": b"w"})
    with pytest.raises(HubError, match="cannot be served") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "bad_weights"


def test_weights_of_peft_come_first(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {**FILES, "adapters.safetensors": b"others"})
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


CLASSIFIER = b'{"peft_type": "LORA", "task_type": "SEQ_CLS"}'
NAMED = b'{"id2label": {"0": "no", "1": "yes"}, "model_type": "llama"}'


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"config.json": NAMED}, {"0": "no", "1": "yes"}),
        ({"config.json": b'{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}'}, None),
        ({"config.json": NAMED, "adapter_config.json": CONFIG}, None),
        ({}, None),
    ],
    ids=["named", "by-number", "for-text", "none"],
)
def test_the_names_of_a_classifiers_labels_come_with_its_config(
    hub: HubStandIn, store: Store, files: dict[str, bytes], names: dict[str, str] | None
) -> None:
    repo = FILES | {"adapter_config.json": CLASSIFIER} | files
    commit = hub.add_repo("acme/support", repo)
    config, weights = contents(store, pull(REF, commit, store, MANY))
    assert (json.loads(config).get("id2label"), weights) == (names, WEIGHTS)
    if names is None:
        assert config == repo["adapter_config.json"]
    again = contents(store, pull(REF, commit, store, MANY))  # of what is in the cache
    assert again == (config, weights)


def test_a_classifiers_config_that_cannot_be_read_is_refused(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo(
        "acme/support", FILES | {"adapter_config.json": CLASSIFIER, "config.json": b'{"a": NaN}'}
    )
    with pytest.raises(HubError, match=r"config\.json is not valid JSON") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "bad_config"


def test_a_branch_a_tag_and_a_pull_request_resolve_to_their_commits(hub: HubStandIn) -> None:
    old = hub.add_repo("acme/support", FILES, ("v1", "refs/pr/1"))
    new = hub.add_repo("acme/support", {**FILES, "adapter_config.json": b"{}"})
    assert (resolve("acme/support", "v1"), resolve("acme/support", "refs/pr/1")) == (old, old)
    assert (resolve("acme/support", "main"), resolve("acme/support", None)) == (new, new)
    asked = len(hub.log)
    assert resolve("acme/support", old) == old
    assert len(hub.log) == asked


def test_a_pull_is_of_the_commit_even_when_the_branch_has_moved(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.add_repo("acme/support", {**FILES, "adapter_config.json": b'{"moved": 1}'})
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


def test_a_subfolder_is_pulled(hub: HubStandIn, store: Store) -> None:
    inside = {f"lora/fr/{name}": content for name, content in FILES.items()}
    commit = hub.add_repo("acme/support", inside)
    files = pull(HubReference("acme/support", None, "lora/fr"), commit, store, MANY)
    assert contents(store, files) == (CONFIG, WEIGHTS)
    with pytest.raises(HubError, match="its main folder") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_no_adapter"


def test_a_repository_that_was_renamed_is_followed(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.moved["old/name"] = "acme/support"
    assert resolve("old/name") == commit
    assert contents(store, pull(HubReference("old/name"), commit, store, MANY)) == (CONFIG, WEIGHTS)


def test_the_token_reaches_the_hub_and_never_the_cdn(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES, private=True)
    with pytest.raises(HubError) as refused:
        resolve("acme/support")
    assert code_of(refused) == "hub_not_found"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve("acme/support") == commit
    pull(REF, commit, store, MANY)
    cdn = [headers for _, path, headers in hub.log if path.startswith("/cdn/")]
    assert cdn
    assert not [headers for headers in cdn if "authorization" in headers]


# What the cache gives


def test_offline_the_cached_commit_serves(
    hub: HubStandIn, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    pull(REF, resolve("acme/support"), store, MANY)
    asked = len(hub.log)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = Store(str(tmp_path / "other"), tmp_path / "cache")
    assert resolve("acme/support") == commit
    assert contents(empty, pull(REF, commit, empty, MANY)) == (CONFIG, WEIGHTS)
    assert len(hub.log) == asked


def test_offline_what_is_not_cached_is_refused_by_name(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (lambda: resolve("acme/support"), lambda: pull(REF, commit, store, MANY)):
        with pytest.raises(HubError, match=r"acme/support.*HF_HUB_OFFLINE") as refused:
            call()
        assert code_of(refused) == "hub_offline"
    assert not hub.log


def test_while_the_hub_is_down_the_cached_commit_serves(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    pull(REF, resolve("acme/support"), store, MANY)
    hub.faults.status = 503
    assert resolve("acme/support") == commit
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)
    hub.stop()
    assert resolve("acme/support") == commit
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


@pytest.mark.parametrize("status", [503, 429])
def test_defaults_that_the_hub_does_not_answer_about_fail_the_pull_and_make_no_other_version(
    hub: HubStandIn, store: Store, status: int
) -> None:
    commit = hub.add_repo("acme/support", {**FILES, "onebase.json": b'{"max_tokens": 7}'})
    whole = contents(store, pull(REF, commit, store, MANY))
    assert b'"max_tokens": 7' in whole[0]
    for kept in Path(os.environ["HF_HOME"]).rglob("onebase.json"):
        kept.unlink()
    hub.faults.status_of = "onebase.json", status
    with pytest.raises(HubError, match=hub.url) as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_unreachable"
    hub.faults.status_of = None
    assert contents(store, pull(REF, commit, store, MANY)) == whole


def test_offline_an_adapter_without_known_defaults_is_pulled_with_a_warning(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    pull(REF, commit, store, MANY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pull(REF, commit, store, MANY)
    assert not caplog.records
    for kept in Path(os.environ["HF_HOME"]).rglob(".no_exist/*/Modelfile"):
        kept.unlink()
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)
    assert "does not know whether it has Modelfile" in caplog.text


def test_a_vendors_file_that_is_too_large_is_noted_and_our_own_refused(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {**FILES, "Modelfile": b"# a license\n" * 10_000})
    config, _ = contents(store, pull(REF, commit, store, MANY))
    assert json.loads(config)["onebase_defaults"] == {
        "notes": ["Modelfile is not used: Modelfile is over 65536 bytes"]
    }
    assert not hub.requests("GET", "/acme/support/resolve/")[2:], "it is not fetched"
    commit = hub.add_repo("acme/support", {**FILES, "onebase.json": b" " * (257 << 10)})
    with pytest.raises(HubError, match=r"onebase\.json is over") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "bad_defaults"


# What the Hub refuses


def test_what_is_not_there_is_said(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {"README.md": b"only this"})
    for call, code, words in [
        (lambda: resolve("acme/other"), "hub_not_found", "acme/other"),
        (lambda: resolve("acme/support", "v9"), "hub_not_found", "v9"),
        (lambda: pull(REF, "0" * 40, store, MANY), "hub_not_found", "0000"),
        (lambda: pull(REF, commit, store, MANY), "hub_no_adapter", "adapter_model.safetensors"),
    ]:
        with pytest.raises(HubError, match=words) as refused:
            call()
        assert code_of(refused) == code


def test_a_gated_repository_and_a_wrong_token_are_told_apart_from_a_missing_one(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES, gated=True)
    with pytest.raises(HubError, match="no access") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_gated"
    monkeypatch.setenv("HF_TOKEN", "hf_WrongTokenOfMine")
    with pytest.raises(HubError) as refused:
        resolve("acme/support")
    assert code_of(refused) == "hub_gated"
    assert "WrongToken" not in str(refused.value)
    hub.token = "hf_without_access"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_gated"
    hub.token = "hf_granted"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


# Faults


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_that_answers_with_errors_is_unreachable(hub: HubStandIn, store: Store, status: int) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.status = status
    for call in (lambda: resolve("acme/support"), lambda: pull(REF, commit, store, MANY)):
        with pytest.raises(HubError, match=hub.url) as refused:
            call()
        assert code_of(refused) == "hub_unreachable"


def test_no_hub_at_all_is_unreachable(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.stop()
    for call in (lambda: resolve("acme/support"), lambda: pull(REF, commit, store, MANY)):
        with pytest.raises(HubError) as refused:
            call()
        assert code_of(refused) == "hub_unreachable"


def test_a_transfer_that_is_cut_goes_on_where_it_was(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.cut_after, hub.faults.cuts = 300_000, 1
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)
    ranges = [h.get("range") for m, path, h in hub.log if m == "GET" and path.startswith("/cdn/")]
    assert len(ranges) == 2
    assert ranges[1] is not None


def test_a_file_that_is_shorter_than_announced_is_not_stored(
    hub: HubStandIn, store: Store, tmp_path: Path
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.extra_size = 64
    hub.faults.cuts = 0
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, MANY, stall_seconds=2.0)
    assert code_of(refused) == "hub_unreachable"
    assert not list((tmp_path / "store" / "blobs").iterdir())
    hub.faults.extra_size = 0
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


def test_damage_on_the_way_is_noticed_and_fetched_again(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {**FILES, "adapter_config.json": CONFIG})
    hub.faults.corrupt = 2  # the config, which git's hash names, and the weights
    files = pull(REF, commit, store, MANY)
    assert contents(store, files) == (CONFIG, WEIGHTS)
    assert len(hub.requests("GET", "/cdn/")) == 2


def test_damage_that_stays_is_an_error(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.corrupt = 1_000
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_damaged"


def test_a_slow_hub_is_given_up(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.pause, hub.faults.piece = 0.05, 16
    with pytest.raises(HubError, match="Nothing came") as refused:
        pull(REF, commit, store, MANY, stall_seconds=1.0)
    assert code_of(refused) == "hub_unreachable"


def test_a_hub_that_never_answers_is_given_up(hub: HubStandIn) -> None:
    hub.add_repo("acme/support", FILES)
    hub.faults.hang = True
    for timeout in (1.0, 8.0, 64.0):  # a busy machine may take longer to start a process
        with pytest.raises(HubError) as refused:
            resolve("acme/support", timeout=timeout)
        assert code_of(refused) == "hub_unreachable"
        if hub.log:
            break
    assert hub.log


@pytest.fixture(params=["terminal", "background"])
def started_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so does all that it starts in turn."""
    ignored = request.param == "background"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("started_in")
def test_a_pull_can_be_given_up_while_it_waits(hub: HubStandIn, store: Store, tmp_path: Path) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.pause, hub.faults.piece = 0.25, 16_384  # 8 s in all
    cancel = threading.Event()
    with pytest.raises(PullCancelledError):
        pull(REF, commit, store, MANY, lambda done, _: done > 100_000 and cancel.set(), cancel=cancel)
    assert not list((tmp_path / "store" / "blobs").iterdir())
    assert hub.requests("GET", "/cdn/")
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_files_that_are_too_large_are_refused_before_a_byte_of_them(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    limit = len(CONFIG) + len(WEIGHTS) - 1
    with pytest.raises(HubError, match=f"{limit} are allowed") as refused:
        pull(REF, commit, store, limit)
    assert code_of(refused) == "hub_too_large"
    assert not hub.requests("GET")
    assert pull(REF, commit, store, limit + 1)


def test_a_transfer_without_an_end_is_stopped_at_the_limit(
    hub: HubStandIn, store: Store, tmp_path: Path
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.endless = True
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, 2_000_000)
    assert code_of(refused) == "hub_too_large"
    left = [path.stat().st_size for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert sum(left) < 3_000_000


def test_a_server_that_is_no_hub_is_said_to_be_none(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.no_commit_header = True
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_unreachable"


def test_no_error_or_log_line_holds_the_token_or_a_signed_address(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.extra_size = 64
    caplog.set_level(logging.DEBUG)
    with pytest.raises(HubError) as refused:
        pull(REF, commit, store, MANY, stall_seconds=2.0)
    for text in (str(refused.value), caplog.text):
        assert hub.token not in text
        assert "s3cr3t" not in text


def test_a_cache_that_cannot_be_written_is_named_by_its_variable(
    hub: HubStandIn, store: Store, tmp_path: Path
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(HubError, match=r"may not write the Hub's cache \(HF_HOME\)") as refused:
        pull(REF, commit, store, MANY)
    assert str(tmp_path) not in str(refused.value)


def test_a_full_disk_under_the_cache_is_said_to_be_full(
    hub: HubStandIn, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    with small_disk(tmp_path / "small", 200_000) as disk:
        monkeypatch.setenv("HF_HOME", str(disk))
        with pytest.raises(StoreFullError, match="HF_HOME"):
            pull(REF, commit, store, MANY)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert contents(store, pull(REF, commit, store, MANY)) == (CONFIG, WEIGHTS)


# A Hub that lies

EVIL_NAMES = ["../../../planted", "/tmp/onebase-planted", "..", "a\\b", "x" * 300]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("etag", EVIL_NAMES)
def test_an_etag_that_is_no_name_of_a_file_is_not_made_one(
    hub: HubStandIn, store: Store, tmp_path: Path, etag: str
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.etag = etag
    with pytest.raises(HubError, match="ETag") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_wrong_answer"
    assert not {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"lock"}
    assert not hub.requests("GET")


@pytest.mark.parametrize("commit", ["../../../planted", "main", "0" * 40 + "/../x"])
def test_a_commit_that_is_none_is_not_taken_for_one(
    hub: HubStandIn, store: Store, tmp_path: Path, commit: str
) -> None:
    real = hub.add_repo("acme/support", FILES)
    empty = hub.add_repo("acme/empty", {"README.md": b"no adapter"})
    hub.faults.commit = commit
    for call in (
        lambda: resolve("acme/support"),
        lambda: resolve("acme/support", "main"),
        lambda: pull(REF, real, store, MANY),
        lambda: pull(HubReference("acme/empty"), empty, store, MANY),
    ):
        with pytest.raises(HubError, match="commit") as refused:
            call()
        assert code_of(refused) == "hub_wrong_answer"
    assert not {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"lock"}


def test_another_commit_than_the_one_that_was_asked_for_is_a_wrong_answer(
    hub: HubStandIn, store: Store
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.commit = "f" * 40
    with pytest.raises(HubError, match="f" * 40) as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_wrong_answer"


def test_headers_that_no_client_reads_and_sizes_that_are_none_are_refused(
    hub: HubStandIn, store: Store
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.etag = "a\0b"
    with pytest.raises(HubError):
        pull(REF, commit, store, MANY)
    hub.faults.etag, hub.faults.size = None, "-5"
    with pytest.raises(HubError, match="-5 bytes") as refused:
        pull(REF, commit, store, MANY)
    assert code_of(refused) == "hub_wrong_answer"


def test_names_that_lead_out_of_the_repository_are_never_asked_for(
    hub: HubStandIn, store: Store, tmp_path: Path
) -> None:
    commit = hub.add_repo("acme/support", {**FILES, "../../planted": b"x", "/tmp/onebase-planted": b"x"})
    assert contents(store, pull(REF, resolve("acme/support"), store, MANY)) == (CONFIG, WEIGHTS)
    assert not [name for name in everything(tmp_path) if "planted" in name]
    assert not Path("/tmp/onebase-planted").exists()
    assert commit


def test_a_commit_that_an_earlier_release_cached_is_checked_too(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = tmp_path / "hf" / "hub" / "models--acme--support" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("../../elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="commit") as refused:
        resolve("acme/support")
    assert code_of(refused) == "hub_wrong_answer"


def test_a_file_that_is_not_the_repositorys_is_not_taken_from_the_process(
    hub: HubStandIn, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/support", FILES)
    secret = tmp_path / "secret"
    secret.write_text("of another tenant")
    repo = tmp_path / "hf" / "hub" / "models--acme--support"
    repo.mkdir(parents=True)
    (repo / "link").symlink_to(secret)
    for path in (secret, repo / "link", repo / ".." / "models--acme--other", repo):
        answer = {"paths": [str(path)] * 2, "sha256": [None, None]}
        program = f"import json, sys; sys.stdin.readline(); print(json.dumps({answer!r}))"
        monkeypatch.setattr(hub_pull, "_COMMAND", (sys.executable, "-c", program))
        with pytest.raises(HubError, match="not its own") as refused:
            pull(REF, commit, store, MANY)
        assert code_of(refused) == "hub_wrong_answer"
    assert not list((tmp_path / "store" / "blobs").iterdir())


GOOD = {"paths": ["a", "b"], "sha256": [None, None]}


@pytest.mark.parametrize(
    "message",
    [
        {"total": "many"},
        {"done": -1},
        {"done": 1.5},
        {"done": None, "total": 1 << 62},
        {"commit": ["0" * 40]},
        {**GOOD, "paths": "ab"},
        {**GOOD, "paths": [1, 2]},
        {**GOOD, "paths": ["a"]},
        {**GOOD, "paths": ["\0", "/" + "x" * 5000]},
        {**GOOD, "sha256": []},
        {**GOOD, "sha256": [1, 2]},
        {"paths": ["a", "b"]},
        {"error": ["hub_gated"], "message": "no"},
        {"error": "internal_error", "message": "no"},
        {"error": "hub_gated", "message": {"no": 1}},
    ],
)
def test_a_message_of_another_type_is_a_wrong_answer(
    hub: HubStandIn, store: Store, monkeypatch: pytest.MonkeyPatch, message: dict[str, object]
) -> None:
    program = f"import json, sys; sys.stdin.readline(); print(json.dumps({message!r}))"
    monkeypatch.setattr(hub_pull, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(HubError) as refused:
        pull(REF, "0" * 40, store, MANY, lambda done, total: None)
    assert code_of(refused) == "hub_wrong_answer"


# Confinement

TRIES = """
import json, os, signal, socket, subprocess, sys
from pathlib import Path
from onebase_adapters.hub.confinement import confine
own, outside, secret = map(Path, sys.argv[1:4])
confine([own], [], file_bytes=100_000)

def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
    return 0

def listen():
    socket.create_server(("127.0.0.1", 0)).close()

print(json.dumps({
    "own": tried(lambda: (own / "a" / "b").mkdir(parents=True) or (own / "a" / "b" / "c").write_text("x")),
    "rename": tried(lambda: (own / "a" / "b" / "c").rename(own / "d")),
    "link": tried(lambda: (own / "e").symlink_to(secret)),
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[4]))).close()),
    "import": tried(lambda: __import__("sqlite3") and __import__("httpx2")),
    "certificates": tried(lambda: open(__import__("certifi").where()).close()),
    "write": tried(lambda: (outside / "planted").write_text("x")),
    "replace": tried(lambda: secret.write_text("x")),
    "read": tried(secret.read_text),
    "read by link": tried((own / "e").read_text),
    "look": tried(lambda: os.listdir(outside)),
    "unlink": tried(secret.unlink),
    "move in": tried(lambda: secret.rename(own / "f")),
    "environ": tried(Path(f"/proc/{os.getppid()}/environ").read_bytes),
    "run": tried(lambda: subprocess.run(["/bin/true"])),
    "large": tried(lambda: (own / "large").write_bytes(bytes(200_000))),
    "listen": tried(listen),
    "signal": tried(lambda: os.kill(os.getppid(), 0)),
}))
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: print('x' * 4096, end='', flush=True)", "over 65536 bytes"),
        ("while True: print('{\"done\": 1}', flush=True)", "another message than the commit"),
        ("print('{', flush=True)", "no JSON"),
        ("print('[]', flush=True)", "no JSON object"),
        ("print('{\"x\":' * 10000, flush=True)", "no JSON"),
    ],
)
def test_a_process_that_prints_without_end_or_no_messages_is_given_up(
    monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    monkeypatch.setattr(hub_pull, "_COMMAND", (sys.executable, "-c", program))

    with pytest.raises(HubError, match=reason) as failed:
        resolve("acme/support")

    assert failed.value.code == "hub_wrong_answer"


def test_the_confined_process_does_what_it_must_and_nothing_elsewhere(
    hub: HubStandIn, tmp_path: Path
) -> None:
    version = landlock_version()
    if not version:
        pytest.skip("this kernel has no Landlock: only the limits hold")
    own, outside = tmp_path / "own", tmp_path / "data"
    own.mkdir()
    outside.mkdir()
    secret = outside / "registry.db"
    secret.write_text("rows")
    arguments = [str(own), str(outside), str(secret), hub.url.rpartition(":")[2]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRIES, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    may = {"own", "rename", "link", "connect", "import", "certificates"}
    assert {name for name in found if found[name] == 0} == may | ({"listen"} if version < 4 else set()) | (
        {"signal"} if version < 6 else set()
    )
    assert found["large"] == errno.EFBIG
    assert secret.read_text() == "rows"
    assert os.listdir(outside) == ["registry.db"]


def test_the_process_that_pulls_is_confined(hub: HubStandIn, store: Store, tmp_path: Path) -> None:
    """It ends by itself, so it is looked at while the Hub keeps it waiting."""
    commit = hub.add_repo("acme/support", FILES)
    hub.faults.pause, hub.faults.piece = 0.25, 16_384
    cancel = threading.Event()
    seen: list[str] = []

    def look(done: int, _total: int) -> None:
        if done > 50_000 and not seen:
            for task in Path("/proc/self/task").iterdir():
                for pid in (task / "children").read_text().split():
                    if "hub.child" in Path(f"/proc/{pid}/cmdline").read_text():
                        seen.extend(Path(f"/proc/{pid}/{part}").read_text() for part in ("status", "limits"))
                        assert_behind(int(pid), BESIDE_SERVING)
            cancel.set()

    with pytest.raises(PullCancelledError):
        pull(REF, commit, store, MANY, look, cancel=cancel)
    status, limits = seen
    assert re.search(r"^Max open files +256 +256 ", limits, re.MULTILINE)
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert re.search(rf"^NoNewPrivs:\t{int(landlock_version() > 0)}$", status, re.MULTILINE)


# An adapter's tokenizer


def tokenizer_file(*added: str) -> bytes:
    tokens = [{"id": 2 + place, "content": text, "special": True} for place, text in enumerate(added)]
    return json.dumps({"added_tokens": tokens, "model": {"vocab": {"a": 0, "b": 1}, "merges": []}}).encode()


ROWS = save({"base_model.model.model.embed_tokens.weight": np.ones((3, 1), np.float32)})
PLAIN = save({"base_model.model.model.layers.0.q_proj.lora_A.weight": np.ones((3, 1), np.float32)})


def vocabulary() -> BaseVocabulary:
    return BaseVocabulary({"a": 0, "b": 1}, frozenset(vocabulary_digests(tokenizer_file())))


@pytest.mark.parametrize("folder", ["", "fr/"])
def test_the_tokens_that_a_tokenizer_adds_come_with_rows_for_tokens(
    hub: HubStandIn, store: Store, folder: str
) -> None:
    files = {
        f"{folder}adapter_config.json": CONFIG,
        f"{folder}adapter_model.safetensors": ROWS,
        f"{folder}tokenizer.json": tokenizer_file("<|im_start|>"),
        f"{folder}tokenizer_config.json": b'{"eos_token": "<|im_start|>"}',
        f"{folder}chat_template.jinja": b"{{ messages }}",
    }
    commit = hub.add_repo("acme/support", files)
    ref = HubReference("acme/support", None, folder.rstrip("/") or None)
    config, weights = contents(store, pull(ref, commit, store, MANY, vocabulary=vocabulary))
    assert weights == ROWS
    assert json.loads(config) == {
        "peft_type": "LORA",
        "onebase_tokenizer": {
            "tokens": [
                {
                    "id": 2,
                    "content": "<|im_start|>",
                    "special": True,
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                    "normalized": False,
                }
            ],
            "end_tokens": [2],
            "chat_template": "{{ messages }}",
        },
    }


def test_a_tokenizer_is_not_asked_for_without_rows_for_tokens(hub: HubStandIn, store: Store) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": PLAIN}
    commit = hub.add_repo("acme/support", {**files, "tokenizer.json": tokenizer_file("<|im_start|>")})
    assert contents(store, pull(REF, commit, store, MANY, vocabulary=vocabulary)) == (CONFIG, PLAIN)
    assert not [path for path in hub.requests() if "tokenizer" in path]


def test_rows_without_a_tokenizer_come_as_they_are(hub: HubStandIn, store: Store) -> None:
    commit = hub.add_repo("acme/support", {"adapter_config.json": CONFIG, "adapter_model.safetensors": ROWS})
    assert contents(store, pull(REF, commit, store, MANY, vocabulary=vocabulary)) == (CONFIG, ROWS)
