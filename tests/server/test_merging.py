"""POST /v1/adapters/merge, and a version's files: what each route does, with verifiers that take any file."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from onebase_adapters.store.blobs import version_digest
from onebase_edge.errors import InvalidRequestError, UnavailableError, VersionFailedError
from onebase_server.adapters.merging import MOST_MERGES, MergeSettings, Merging
from onebase_server.adapters.service import VersionOptions
from onebase_server.processes.verifier_client import RejectedError

from .access import Keys, client_with
from .support import CONFIG, Server, Starter, upload


@pytest.fixture(scope="module")
def key_of(keys: Keys) -> dict[str, str]:
    """Made before the server starts, which would know them a second later."""
    return {
        "operator": keys.make("admin", tenant="default"),
        "acme": keys.make("adapters", "generate", tenant="acme"),
    }


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, key_of: dict[str, str]) -> Iterator[Server]:
    with serve_scripted(
        "words", "--max-rank", "20", "--max-upload", "2MB", data_dir=keys.file.parent
    ) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server, key_of: dict[str, str]) -> Iterator[httpx2.Client]:
    """A tenant's, with three adapters, `one`, `two` and `three`."""
    with client_with(server, key_of["acme"]) as client:
        for name in ("one", "two", "three"):
            assert upload(client, name, name.encode(), query="activate=true&wait=true").status_code == 200
        yield client


def merge(http: httpx2.Client, query: str = "wait=true", **body: Any) -> httpx2.Response:
    parents = [{"name": "one", "weight": 0.75}, {"name": "two", "weight": -2}]
    return http.post(f"/v1/adapters/merge?{query}", json={"name": "both", "adapters": parents, **body})


def refused(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def digest_of(http: httpx2.Client, name: str) -> str:
    return str(http.get(f"/v1/adapters/{name}").json()["version"])


# ---- merging -----------------------------------------------------------------------------------


def test_a_merge_is_a_version_that_says_what_it_is_made_of(http: httpx2.Client) -> None:
    version = merge(http).json()

    assert (version["name"], version["state"], version["active"]) == ("both", "ready", False)
    assert version["source"] == {
        "kind": "merge",
        "method": "linear",
        "parents": [
            {"name": "one", "version": digest_of(http, "one"), "weight": 0.75},
            {"name": "two", "version": digest_of(http, "two"), "weight": -2.0},
        ],
    }
    weights = http.get(f"/v1/adapters/both/versions/{version['version']}/files/adapter_model.safetensors")
    assert weights.content == b"linear None total 0 0.75*one -2*two"
    entry = http.get("/v1/audit", params={"action": "adapter.merged"}).json()["data"][0]
    assert (entry["target"], entry["version"]) == ("both", version["version"])
    assert entry["details"]["parents"] == version["source"]["parents"]


def test_what_was_merged_may_serve_at_once(http: httpx2.Client) -> None:
    answer = merge(http, name="serving", method="cat", activate=True, adapters=[
        {"name": f"one@{digest_of(http, 'one')[:8]}", "weight": 1}, {"name": "two", "weight": 1},
    ])  # fmt: skip

    assert (answer.status_code, answer.json()["active"]) == (200, True)
    body = {"prompt": "word", "max_tokens": 1, "adapter": "serving"}
    assert http.post("/generate", json=body).json()["adapter"] == answer.json()["id"]


def test_the_same_merge_is_the_same_version_and_another_seed_another(http: httpx2.Client) -> None:
    how = {"name": "pruned", "method": "dare_ties", "density": 0.5}
    first, again, other = merge(http, **how), merge(http, **how), merge(http, **how, seed=1, sign="frequency")
    assert first.json()["version"] == again.json()["version"] != other.json()["version"]
    source = other.json()["source"]
    assert (source["density"], source["sign"], source["seed"]) == (0.5, "frequency", 1)
    assert len(http.get("/v1/adapters/pruned/versions").json()["data"]) == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"adapters": [{"name": "one", "weight": 1}]}, "adapters", "at least 2"),
        ({"adapters": [{"name": "one", "weight": 1}] * 17}, "adapters", "more than the 16"),
        ({"adapters": [{"name": "one", "weight": 1}] * 2}, "adapters[1].name", "sum of its weights"),
        ({"adapters": [{"name": "one", "weight": 1}, {"name": "two"}]}, "adapters[1].weight", "is missing"),
        (
            {"adapters": [{"name": "one", "weight": 1}, {"name": "two", "weight": 0}]},
            "adapters[1].weight",
            "is 0",
        ),
        (
            {"adapters": [{"name": "one", "weight": 1}, {"name": "two", "weight": 1e9}]},
            "adapters[1].weight",
            "1000",
        ),
        ({"method": "svd"}, "method", "linear"),
        ({"method": "ties"}, "density", "is needed by ties"),
        ({"method": "ties", "density": 0}, "density", "greater than 0"),
        ({"method": "ties", "density": 1.5}, "density", "at most 1"),
        ({"density": 0.5}, "density", "not for linear"),
        ({"method": "dare_linear", "density": 0.5, "sign": "total"}, "sign", "not for dare_linear"),
        ({"method": "ties", "density": 0.5, "seed": 3}, "seed", "not for ties"),
        ({"method": "dare_linear", "density": 0.5, "seed": -1}, "seed", "at least 0"),
        ({"name": "no name"}, "name", "cannot be an adapter's name"),
        ({"name": "smollm2-135m-instruct"}, "name", "the base's own name"),
        ({"svd_rank": 8}, "svd_rank", "does not know"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_refused_by_name(
    http: httpx2.Client, body: dict[str, Any], param: str, words: str
) -> None:
    error = refused(merge(http, **body), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_weights_that_are_no_numbers_are_refused(http: httpx2.Client) -> None:
    text = '{"name": "both", "adapters": [{"name": "one", "weight": NaN}, {"name": "two", "weight": 1}]}'
    headers = {"Content-Type": "application/json"}
    assert http.post("/v1/adapters/merge", content=text, headers=headers).status_code == 400


def test_names_and_versions_that_are_not_there_are_said(http: httpx2.Client) -> None:
    unknown = [{"name": "one", "weight": 1}, {"name": "nobody", "weight": 1}]
    error = refused(merge(http, adapters=unknown), 404)
    assert (error["code"], error["param"]) == ("adapter_not_found", "adapters[1].name")
    unknown[1]["name"] = "two@0123456789ab"
    error = refused(merge(http, adapters=unknown), 404)
    assert (error["code"], error["param"]) == ("version_not_found", "adapters[1].name")
    upload(http, "idle", b"idle")
    unknown[1]["name"] = "idle"
    assert "idle" in refused(merge(http, adapters=unknown), 404)["message"]
    upload(http, "broken", b"broken")
    digest = http.get("/v1/adapters/broken/versions").json()["data"][0]["version"]
    unknown[1]["name"] = f"broken@{digest[:12]}"
    assert refused(merge(http, adapters=unknown), 409)["code"] == "version_not_ready"


def test_a_rank_that_no_slot_holds_is_refused_with_the_option(http: httpx2.Client) -> None:
    three = [{"name": name, "weight": 1} for name in ("one", "two", "three")]
    error = refused(merge(http, method="cat", adapters=three), 400)
    assert error["param"] == "method"
    assert "rank 8 + 8 + 8 = 24, and this server takes 20" in error["message"]
    assert "--max-rank 24" in error["message"]


def test_a_result_that_is_too_large_is_refused_before_it_is_made(http: httpx2.Client) -> None:
    for number in (1, 2):
        assert upload(
            http, f"big-{number}", bytes([number]) * 1_500_000, query="activate=true&wait=true"
        ).is_success
    big = [{"name": f"big-{number}", "weight": 1} for number in (1, 2)]
    error = refused(merge(http, method="cat", adapters=big), 400)
    assert error["param"] == "adapters"
    assert "over --max-upload" in error["message"]
    assert merge(http, name="same-size", method="linear", adapters=big).status_code in (200, 422)


def test_a_result_is_in_fp32_though_the_files_are_not() -> None:
    report = {"kinds": ["lora"], "rank": 4, "parameters": 100}
    files = SimpleNamespace(weights=SimpleNamespace(size=200))
    halves: Any = [
        (SimpleNamespace(name=name, digest="0" * 64, report=report, files=files), 1.0) for name in ("a", "b")
    ]
    nothing: Any = None
    assert Merging(nothing, nothing, max_rank=8, max_bytes=800).check_parents(halves, "cat") == 800
    with pytest.raises(InvalidRequestError, match="about 800 bytes, over --max-upload"):
        Merging(nothing, nothing, max_rank=8, max_bytes=799).check_parents(halves, "cat")


def test_a_verifier_that_dies_of_a_merge_fails_that_alone(serve_scripted: Starter, tmp_path: Any) -> None:
    with serve_scripted("words", data_dir=tmp_path / "data") as server, server.client() as own:
        for name in ("one", "two"):
            upload(own, name, name.encode(), query="activate=true&wait=true")
    with serve_scripted("words,dies", data_dir=tmp_path / "data") as server, server.client() as own:
        error = refused(merge(own), 422)
        assert error["code"] == "proof_crashed"
        assert "was to be merged ended 2 times" in error["message"]
        assert own.get("/v1/adapters/both").status_code == 404
        assert own.get("/v1/adapters/one").json()["active"] is True


def test_few_merges_of_a_tenant_wait_at_once_and_others_still_may() -> None:
    async def tried() -> None:
        asked, done = [], asyncio.Event()

        async def hold(*parents: object, **how: object) -> None:
            asked.append(how["tenant"])
            await done.wait()
            raise RejectedError("enough", "That is all.")

        verifier: Any = SimpleNamespace(merge=hold)

        async def unsigned(*parents: object, **how: object) -> None:
            return None

        adapters: Any = SimpleNamespace(check_parents=unsigned)
        merging = Merging(adapters, verifier, max_rank=8, max_bytes=1)

        async def one(tenant: str) -> None:
            recipe, options = MergeSettings("linear", None, None, None), VersionOptions()
            with pytest.raises(VersionFailedError):
                await merging.merge(tenant, "both", [], recipe, options)

        async with asyncio.TaskGroup() as group:
            for tenant in (*["acme"] * MOST_MERGES, "rival"):
                group.create_task(one(tenant))
            await asyncio.sleep(0)
            assert asked == [*["acme"] * MOST_MERGES, "rival"]
            with pytest.raises(UnavailableError) as busy:
                await one("acme")
            assert busy.value.code == "merges_busy"
            done.set()
        await one("acme")

    asyncio.run(tried())


def test_what_others_share_is_neither_merged_nor_taken_elsewhere(
    http: httpx2.Client, server: Server, key_of: dict[str, str]
) -> None:
    with client_with(server, key_of["operator"]) as owner:
        upload(owner, "shared-one", b"shared", query="activate=true&wait=true")
        assert owner.post("/v1/adapters/shared-one/share", json={"shared": True}).status_code == 200
        digest = digest_of(owner, "shared-one")
        assert owner.get(f"/v1/adapters/shared-one/versions/{digest}/files").status_code == 200
    parents = [{"name": "one", "weight": 1}, {"name": "shared-one", "weight": 1}]
    error = refused(merge(http, adapters=parents), 403)
    assert error["code"] == "adapter_read_only"
    assert "only its owner may merge it into others" in error["message"]
    for path in ("files", "files/adapter_config.json"):
        error = refused(http.get(f"/v1/adapters/shared-one/versions/{digest}/{path}"), 403)
        assert "only its owner may take its files elsewhere" in error["message"]


# ---- files -------------------------------------------------------------------------------------


def test_the_files_of_a_version_are_those_that_were_sent(http: httpx2.Client) -> None:
    digest = digest_of(http, "one")
    listing = http.get(f"/v1/adapters/one/versions/{digest[:8]}/files").json()

    sums = {file["name"]: file["sha256"] for file in listing["data"]}
    assert (listing["version"], listing["base"]["name"]) == (digest, "smollm2-135m-instruct")
    assert listing["base"]["repo"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert version_digest(sums["adapter_config.json"], sums["adapter_model.safetensors"]) == digest
    for file, content in (("adapter_config.json", CONFIG.encode()), ("adapter_model.safetensors", b"one")):
        answer = http.get(f"/v1/adapters/one/versions/{digest}/files/{file}")
        assert answer.content == content
        assert hashlib.sha256(content).hexdigest() == sums[file]
        assert answer.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "path",
    ["versions/{}/files/config.json", "versions/{}/files/..%2F..%2Fregistry.db", "versions/0123abcd/files"],
)
def test_no_other_file_can_be_asked_for(http: httpx2.Client, path: str) -> None:
    answer = http.get(f"/v1/adapters/one/{path.format(digest_of(http, 'one'))}")
    assert answer.status_code in (400, 404)
