"""How a folder gets to the server, with both clients."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.clients.registry_double import (
    Flaky,
    Registry,
    digest,
    refusal,
    report,
    version,
)

from onebase import (
    AdapterRejectedError,
    AdapterSource,
    ConflictError,
    ModuleReport,
    PayloadTooLargeError,
    Progress,
    ProofReport,
    StorageFullError,
    VersionFailure,
)
from onebase._core.adapters import DEFAULTS, TOKENIZER, adapter_folder
from onebase_adapters.format.added_tokens import TOKENIZER_FILES
from onebase_adapters.format.defaults import DEFAULTS_FILES

pytestmark = pytest.mark.usefixtures("slept")
NAME = "acme-support"
CONTENT = b'{"peft_type": "LORA"}' + b"weights\r\n--\x00" * 1000
DIGEST = digest(CONTENT)


def test_a_folder_is_sent_proven_and_activated_by_one_call(sdk: Any, folder: Path) -> None:
    registry = Registry()
    ready = sdk.call(lambda client: client.adapters.upload(folder, name=NAME), registry.transport)
    assert registry.uploads == [
        (
            {"name": NAME, "activate": "true"},
            {
                "adapter_config.json": (folder / "adapter_config.json").read_bytes(),
                "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
            },
        )
    ]
    assert (ready.name, ready.version, ready.state, ready.active) == (NAME, DIGEST, "ready", True)
    assert ready.id == f"{NAME}@{DIGEST[:12]}"
    assert ready.source == AdapterSource("upload")
    assert ready.finished


def test_a_report_is_typed_to_its_last_figure(sdk: Any, folder: Path) -> None:
    ready = sdk.call(lambda client: client.adapters.upload(folder, name=NAME), Registry().transport)
    sent = report()
    assert ready.report.kinds == ("lora",)
    assert (ready.report.rank, ready.report.alpha, ready.report.rslora) == (8, 16.0, False)
    assert ready.report.targets == ("q_proj", "v_proj")
    assert ready.report.proof == ProofReport(**sent["proof"])
    assert (ready.report.proof.modules_exact, ready.report.proof.seconds) == (60, 3.25)
    assert len(ready.report.modules) == 60
    first = sent["modules"][0]
    assert ready.report.modules[0] == ModuleReport(
        "model.layers.0.self_attn.q_proj", "lora", 8, 16.0, 8000, first["norm"]
    )


def test_only_what_is_asked_for_is_sent_with_it(sdk: Any, folder: Path) -> None:
    registry = Registry()

    def upload(client: Any) -> Any:
        return client.adapters.upload(
            str(folder), name=NAME, activate=False, wait=False, allow_noop=True, any_base=True
        )

    sent = sdk.call(upload, registry.transport)
    assert registry.uploads[0][0] == {"name": NAME, "allow_noop": "true", "any_base": "true"}
    assert (sent.state, sent.active, sent.report, sent.finished) == ("validating", False, None, False)
    assert len(registry.asked) == 1


def test_progress_is_told_from_the_first_byte_to_the_end(sdk: Any, folder: Path) -> None:
    told: list[Progress] = []
    sdk.call(
        lambda client: client.adapters.upload(folder, name=NAME, progress=told.append), Registry().transport
    )
    sent = [step for step in told if step.stage == "uploading"]
    total = sent[0].bytes_total
    assert total is not None
    assert total > len(CONTENT)
    assert [step.bytes_done for step in sent] == sorted({step.bytes_done for step in sent})
    assert (sent[-1].bytes_done, sent[-1].fraction) == (total, 1.0)
    assert told[len(sent) :] == [
        Progress("validating"),
        Progress("validating", 0.25),
        Progress("proving", 0.5),
        Progress("ready"),
    ]


def test_the_length_is_announced_and_nothing_is_chunked(sdk: Any, folder: Path) -> None:
    flaky = Flaky(Registry())
    sdk.call(lambda client: client.adapters.upload(folder, name=NAME, wait=False), flaky.transport)
    (request,) = flaky.requests
    assert int(request.headers["content-length"]) == len(request.content)
    assert "transfer-encoding" not in request.headers


def test_a_large_file_is_never_whole_in_memory(
    sdk: Any, folder: Path, serve: Callable[..., Any], wire: Any
) -> None:
    size = 48_000_000
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(size)
    received: list[int] = []

    def script(request: Any) -> None:
        received.append(sum(len(chunk) for chunk in request.chunks()))
        request.reply(202, version(NAME, "x", "validating"))

    url = serve(script).url
    tracemalloc.start()
    try:
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME, wait=False), url=url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received[0] > size
    assert peak < size / 6


def test_a_server_that_refuses_before_it_has_read_all_is_heard(
    sdk: Any, folder: Path, serve: Callable[..., Any]
) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(20_000_000)

    def script(request: Any) -> None:
        request.reply(413, refusal(413, "payload_too_large").json())
        for _ in request.chunks():
            pass
        request.hang_up()

    with pytest.raises(PayloadTooLargeError):
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME), url=serve(script).url)


@pytest.mark.parametrize("failure", [httpx2.ReadError("reset"), httpx2.ReadTimeout("slow"), 503, 502])
def test_an_upload_that_broke_is_sent_again_in_full(sdk: Any, folder: Path, failure: Any) -> None:
    registry = Registry()
    flaky = Flaky(registry, refusal(failure, "busy") if isinstance(failure, int) else failure)
    sdk.call(lambda client: client.adapters.upload(folder, name=NAME), flaky.transport)
    assert len(registry.uploads) == 1
    assert len(registry.versions[NAME]) == 1
    assert hashlib.sha256(b"".join(registry.uploads[0][1].values())).hexdigest() == DIGEST


def test_the_same_content_is_the_same_version(sdk: Any, folder: Path) -> None:
    registry = Registry()
    first, second = (
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME), registry.transport)
        for _ in range(2)
    )
    assert first.version == second.version
    assert len(registry.versions[NAME]) == 1


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (("adapter_config.json",), "lacks adapter_config.json.\nTo send an adapter, give a folder"),
        (("adapter_model.safetensors",), "lacks adapter_model.safetensors.\nTo send"),
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            "lacks adapter_config.json and adapter_model.safetensors",
        ),
    ],
)
def test_a_missing_file_is_named_before_anything_is_sent(
    sdk: Any, folder: Path, missing: tuple[str, ...], says: str
) -> None:
    for name in missing:
        (folder / name).unlink()
    registry = Registry()
    with pytest.raises(ValueError, match=says):
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME), registry.transport)
    assert registry.asked == []


def test_a_tokenizer_file_that_is_too_large_is_left_out_with_a_warning(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"modules_to_save": ["lm_head"]}')
    (folder / "tokenizer_config.json").write_text("{}")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(TOKENIZER["tokenizer.json"] + 1)
    with pytest.warns(UserWarning, match=r"tokenizer\.json is over"):
        found = adapter_folder(folder)
    assert [file.name for file in found.tokenizer] == ["tokenizer_config.json"]
    assert dict(TOKENIZER_FILES) == TOKENIZER


def test_a_folder_of_mlx_lm_is_sent_as_it_is(sdk: Any, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    found = adapter_folder(folder)
    assert (found.config.name, found.weights.name) == ("adapter_config.json", "adapters.safetensors")
    (folder / "adapter_model.safetensors").touch()
    assert adapter_folder(folder).weights.name == "adapter_model.safetensors"


def test_the_first_file_with_defaults_is_sent_and_more_of_them_in_a_field(sdk: Any, folder: Path) -> None:
    (folder / "Modelfile").write_text('SYSTEM "Hi"')
    (folder / "io.yaml").write_text("instruction: ~")
    registry = Registry()
    given = {"system": "Be brief.", "temperature": None}
    sdk.call(lambda client: client.adapters.upload(folder, name=NAME, defaults=given), registry.transport)
    ((fields, files),) = registry.uploads
    assert json.loads(fields["defaults"]) == given
    assert files.keys() - {"adapter_config.json", "adapter_model.safetensors"} == {"io.yaml"}
    (folder / "onebase.json").write_text("{}")
    assert adapter_folder(folder).defaults == folder / "onebase.json"


def test_the_names_of_files_with_defaults_are_the_servers() -> None:
    assert tuple(DEFAULTS_FILES) == DEFAULTS


def test_a_folder_of_pickles_is_refused_with_the_way_to_convert_it(sdk: Any, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"(?s)it only has adapter_model\.bin\..*weights_only=True"):
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME))


def test_what_was_meant_is_guessed(sdk: Any, folder: Path, tmp_path: Path) -> None:
    def upload(path: Path) -> Any:
        return sdk.call(lambda client: client.adapters.upload(path, name=NAME))

    with pytest.raises(ValueError, match=r"Did you mean a folder in it\? acme-support"):
        upload(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the folder"):
        upload(folder / "adapter_config.json")
    with pytest.raises(ValueError, match="nowhere is not there"):
        upload(tmp_path / "nowhere")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="It holds a whole model"):
        upload(whole)


def test_a_file_that_shrinks_while_it_is_sent_is_not_sent_short(sdk: Any, folder: Path) -> None:
    def shrink(step: Progress) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"")

    (folder / "adapter_model.safetensors").write_bytes(bytes(1_000_000))
    with pytest.raises(ValueError, match="became shorter while it was sent"):
        sdk.call(
            lambda client: client.adapters.upload(folder, name=NAME, progress=shrink), Registry().transport
        )


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(sdk: Any, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(bytes(1_000_000))

    def grow(step: Progress) -> None:
        with weights.open("ab") as file:
            file.write(b"more")

    registry = Registry()
    sdk.call(lambda client: client.adapters.upload(folder, name=NAME, progress=grow), registry.transport)
    assert registry.uploads[0][1]["adapter_model.safetensors"] == bytes(1_000_000)


def test_a_version_that_fails_says_why(sdk: Any, folder: Path) -> None:
    registry = Registry(failure=("no_effect", "no module changes anything"))
    told: list[Progress] = []
    with pytest.raises(AdapterRejectedError) as caught:
        sdk.call(
            lambda client: client.adapters.upload(folder, name=NAME, progress=told.append), registry.transport
        )
    error = caught.value
    assert (error.code, error.message) == ("no_effect", f"{NAME}@{DIGEST[:12]}: no module changes anything")
    assert str(error).endswith("no module changes anything (no_effect)")
    assert error.version is not None
    assert error.version.error == VersionFailure("no_effect", "no module changes anything")
    assert told[-1] == Progress("failed")


def test_files_that_do_not_even_become_a_version_are_rejected_the_same_way(sdk: Any, folder: Path) -> None:
    flaky = Flaky(Registry(), refusal(422, "unsupported_kind", "peft_type: LOHA is not served"))
    with pytest.raises(AdapterRejectedError, match="LOHA is not served") as caught:
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME), flaky.transport)
    assert (caught.value.code, caught.value.version) == ("unsupported_kind", None)


def test_a_full_disk_and_another_base_have_errors_of_their_own(sdk: Any, folder: Path) -> None:
    for answer, kind in (
        (refusal(507, "store_full"), StorageFullError),
        (refusal(409, "base_mismatch"), ConflictError),
    ):
        flaky = Flaky(Registry(), answer)
        with pytest.raises(kind):
            sdk.call(lambda client: client.adapters.upload(folder, name=NAME), flaky.transport)
        assert len(flaky.requests) == 1
