"""The life of an adapter through the SDK and the command, against the real server and a Hub beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.clients.real_server import Server

from onebase import (
    AdapterRejectedError,
    Client,
    ConflictError,
    Logprobs,
    NotFoundError,
    PermissionDeniedError,
    Progress,
    StreamError,
)
from onebase.cli import main

QUESTION = "Hi, this is Mia from Lisbon, please send 3 red lamps."


def copied(source: Path, target: Path, **config: Any) -> Path:
    """An adapter, with some fields of its configuration changed."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def zeroed(folder: Path) -> Path:
    """The adapter with every number set to 0."""
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.chmod(0o600)
    file.write_bytes(content[:start] + bytes(len(content) - start))
    return folder


def files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """What a Hub repository holds."""
    return {f"{prefix}{file.name}": file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def name(server: Server, request: pytest.FixtureRequest) -> Any:
    """A name for one test; what it brought there is deleted afterwards."""
    made = re.sub(r"\W+", "-", request.node.name).strip("-")[-60:].strip("-")
    yield made
    with Client(server.url) as client:
        if made in {adapter.name for adapter in client.adapters.list()}:
            client.adapters.delete(made, force=True)


@pytest.mark.parametrize("sdk", ["async", pytest.param("sync", marks=pytest.mark.full)], indirect=True)
def test_an_adapter_lives_from_upload_to_deletion(
    sdk: Any, server: Server, name: str, tmp_path: Path
) -> None:
    def call(action: Any) -> Any:
        return sdk.call(lambda client: action(client.adapters), url=server.url)

    def ask() -> Any:
        return sdk.call(
            lambda client: client.chat(QUESTION, adapter=name, temperature=0, max_tokens=6), url=server.url
        )

    told: list[Progress] = []
    one = call(lambda adapters: adapters.upload(server.adapters / "orders", name=name, progress=told.append))
    assert (one.state, one.active, one.source.kind) == ("ready", True, "upload")
    assert (told[0].stage, told[-1].stage) == ("uploading", "ready")
    report = one.report
    assert (report.rank, report.alpha, report.kinds) == (16, 32.0, ("lora",))
    assert set(report.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(report.modules) == 8
    assert all(module.norm > 0 for module in report.modules)
    assert report.proof.exact
    assert report.proof.base_unchanged
    assert report.proof.modules_changed == 8
    assert call(lambda adapters: adapters.version(name, one.version[:8])) == one

    first = ask()
    assert first.adapter == one.id

    weaker = copied(server.adapters / "orders", tmp_path / "weaker", lora_alpha=1)
    two = call(lambda adapters: adapters.upload(weaker, name=name, activate=False))
    assert (two.state, two.active) == ("ready", False)
    assert ask().text == first.text
    assert (
        call(lambda adapters: adapters.activate(name, two.version, expected=one.version)).version
        == two.version
    )
    second = ask()
    assert (second.adapter, second.text == first.text) == (two.id, False)
    with pytest.raises(ConflictError) as stale:
        call(lambda adapters: adapters.activate(name, one.version, expected=one.version))
    assert (stale.value.code, stale.value.current) == ("stale_activation", two.version)

    assert call(lambda adapters: adapters.rollback(name)).version == one.version
    assert ask().text == first.text
    history = call(lambda adapters: adapters.history(name))
    assert [(entry.action, entry.version, entry.previous) for entry in history] == [
        ("rollback", one.version, two.version),
        ("activate", two.version, one.version),
        ("activate", one.version, None),
    ]
    assert [found.version for found in call(lambda adapters: adapters.versions(name))] == [
        two.version,
        one.version,
    ]

    assert call(lambda adapters: adapters.pin(name)).pinned
    with pytest.raises(ConflictError) as in_use:
        call(lambda adapters: adapters.delete(name, one.version))
    assert in_use.value.code == "adapter_in_use"
    call(lambda adapters: adapters.delete(name, two.version))
    assert call(lambda adapters: adapters.retrieve(name)).versions == 1
    off = call(lambda adapters: adapters.deactivate(name))
    assert (off.version, off.active, off.rank) == (None, False, None)
    call(lambda adapters: adapters.delete(name))
    with pytest.raises(NotFoundError):
        call(lambda adapters: adapters.retrieve(name))


def test_the_same_content_is_proven_once(server: Server, name: str) -> None:
    with Client(server.url) as client:
        first = client.adapters.upload(server.adapters / "pirate", name=name)
        again = client.adapters.upload(server.adapters / "pirate", name=name)
        assert again == first
        assert len(client.adapters.versions(name)) == 1


@pytest.mark.parametrize("sdk", ["async"], indirect=True)
def test_an_adapter_is_pulled_and_keeps_its_commit(
    sdk: Any, server: Server, name: str, tmp_path: Path
) -> None:
    content = copied(server.adapters / "orders", tmp_path / "hub", lora_alpha=24)
    commit = server.hub.add_repo("acme/loras", files(content, "support/"), ("v2",))
    told: list[Progress] = []

    def pull(client: Any) -> Any:
        return client.adapters.pull(
            "acme/loras", revision="v2", subfolder="support", name=name, progress=told.append
        )

    version = sdk.call(pull, url=server.url)
    assert (version.state, version.active, len(version.version)) == ("ready", True, 64)
    assert (version.source.kind, version.source.repo) == ("hub", "acme/loras")
    assert (version.source.revision, version.source.subfolder) == ("v2", "support")
    assert version.source.commit == commit
    assert told[0].stage == "pulling"
    assert version.report.alpha == 24


def test_what_the_server_may_not_pull_or_cannot_find_is_told_apart(sdk: Any, server: Server) -> None:
    with pytest.raises(PermissionDeniedError) as forbidden:
        sdk.call(lambda client: client.generate("Hi", adapter="hub:other/x"), url=server.url)
    assert forbidden.value.code == "hub_not_allowed"
    with pytest.raises(AdapterRejectedError) as missing:
        sdk.call(lambda client: client.adapters.pull("acme/nowhere"), url=server.url)
    assert missing.value.code == "hub_not_found"


@pytest.mark.parametrize("sdk", ["sync"], indirect=True)
def test_adapters_that_are_not_served_are_rejected_with_their_reason(
    sdk: Any, server: Server, name: str, tmp_path: Path
) -> None:
    def rejection(folder: Path) -> Any:
        with pytest.raises(AdapterRejectedError) as caught:
            sdk.call(lambda client: client.adapters.upload(folder, name=name), url=server.url)
        return caught.value

    loha = rejection(copied(server.adapters / "orders", tmp_path / "loha", peft_type="LOHA"))
    assert (loha.code, loha.version) == ("unsupported_kind", None)
    idle = zeroed(copied(server.adapters / "orders", tmp_path / "idle"))
    nothing = rejection(idle)
    assert nothing.code == "no_effect"
    assert (nothing.version.state, nothing.version.active) == ("failed", False)
    accepted = sdk.call(
        lambda client: client.adapters.upload(idle, name=name, allow_noop=True), url=server.url
    )
    assert (accepted.version, accepted.state) == (nothing.version.version, "ready")


def test_another_base_is_a_conflict_unless_it_is_meant(server: Server, name: str, tmp_path: Path) -> None:
    foreign = copied(server.adapters / "orders", tmp_path / "foreign", base_model_name_or_path="acme/gemma")
    with Client(server.url) as client:
        with pytest.raises(ConflictError) as caught:
            client.adapters.upload(foreign, name=name)
        assert caught.value.code == "base_mismatch"
        assert "acme/gemma" in caught.value.message
        assert client.adapters.upload(foreign, name=name, any_base=True).active


def test_deleting_what_runs_needs_force_and_ends_it(server: Server, name: str) -> None:
    with Client(server.url) as client:
        client.adapters.upload(server.adapters / "pirate", name=name)
        with client.stream(messages=QUESTION, adapter=name, max_tokens=30_000, ignore_eos=True) as stream:
            next(iter(stream))
            with pytest.raises(ConflictError) as caught:
                client.adapters.delete(name)
            assert caught.value.code == "adapter_in_use"
            client.adapters.delete(name, force=True)
            with pytest.raises(StreamError) as ended:
                stream.read()
        assert ended.value.code == "adapter_deleted"


# ---- versions of others, and elsewhere -----------------------------------------------------------------


def test_cat_answers_as_the_weighted_sum_of_a_request(server: Server, name: str) -> None:
    weights = {"orders": 0.75, "pirate": -0.5}
    with Client(server.url) as client:
        made = client.adapters.merge(weights, name=name, method="cat")
        assert (made.active, made.report.rank, made.report.proof.exact) == (True, 32, True)
        assert made.report.proof.texts_changed > 0
        parents = {parent.name: (parent.weight, parent.version) for parent in made.source.parents}
        assert parents == {
            parent: (weight, client.adapters.retrieve(parent).version) for parent, weight in weights.items()
        }
        how: Any = {"messages": QUESTION, "temperature": 0, "max_tokens": 12, "logprobs": 0}
        asked: list[Any] = [name, weights, None]
        merged, summed, base = (client.generate(adapter=adapter, **how) for adapter in asked)
        again = client.adapters.merge(weights, name=name, method="cat")
    assert merged.adapter == made.id
    one, other, alone = (answer.choices[0].logprobs or Logprobs() for answer in (merged, summed, base))
    # A random base has near ties, at which the texts may part.
    same = [mine == theirs for mine, theirs in zip(one.token_ids, other.token_ids, strict=False)]
    common = (*same, False).index(False)
    assert common >= 3
    assert one.token_logprobs[:common] == pytest.approx(other.token_logprobs[:common], abs=0.03)
    assert one.token_ids[:common] != alone.token_ids[:common]
    assert again.version == made.version


def test_an_export_is_what_was_sent_and_what_is_served(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 16 bit a merged model is near the served answers; how near depends on the server's 4 bit."""
    export = ["adapters", "export", "orders", "--url", server.url, "--json"]
    assert main([*export, "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    sent = files(server.adapters / "orders")
    assert all(sent[file.name] == file.read_bytes() for file in (tmp_path / "peft").iterdir())
    assert main([*export, "--format", "merged", "--out", str(tmp_path / "merged")]) == 2
    assert "from a folder of its own" in capsys.readouterr().err

    base = server.adapters.parent / "smollm2-135m-instruct"
    base_option = ("--base", str(base))
    assert main([*export, "--format", "merged", "--out", str(tmp_path / "merged"), *base_option]) == 0
    result = json.loads(capsys.readouterr().out)
    compared = result["compared"]
    assert result["path"] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()
    for side in ("adapter", "base"):
        assert compared[side]["tokens"] >= 50
        assert 0 < compared[side]["mean"] < compared[side]["largest"] < 5
        assert compared[side]["agreeing"] > compared[side]["tokens"] / 4
    for form in ("gguf", "gguf-lora"):
        target = tmp_path / f"{form}.gguf"
        assert main([*export, "--format", form, "--out", str(target), *base_option]) == 0
        assert target.read_bytes()[:4] == b"GGUF"
    assert {file.name for file in tmp_path.iterdir()} == {"peft", "merged", "gguf.gguf", "gguf-lora.gguf"}
