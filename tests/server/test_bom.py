"""A version's bill of materials is valid by CycloneDX's own schema, and names what the version is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.signing import signing

from onebase import Client
from onebase.cli import main
from onebase_adapters.registry import VersionRecord
from onebase_adapters.store.blobs import AdapterFiles, Blob
from onebase_protocol.adapters import SliceScore, VersionEvaluation
from onebase_server.adapters.bom import bill_of_materials

from .support import Server, Starter, make_folder, upload_folder
from .training_support import openai_client, run_job, sha256

signing()


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    key = tmp_path_factory.mktemp("key") / "server.key"
    with serve_scripted("words", "--signing-key", str(key)) as server:
        yield server


def check(bom: dict[str, Any]) -> None:
    """Validate a document by the schema of CycloneDX."""
    validators = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    errors = validators.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))
    assert errors is None, errors


def facts(bom: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in bom["metadata"]["component"]["properties"]}


def test_a_trained_versions_bill_names_data_recipe_proof_and_signature(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    client = openai_client(server)
    first = run_job(server, client, "rows scored", extra={"name": "bom"})
    job = run_job(server, client, "rows scored more", model="bom", extra={"name": "bom"}, seed=9)
    assert main(["adapters", "bom", f"bom@{job.version}", "--url", server.url]) == 0
    bom = json.loads(capsys.readouterr().out)
    check(bom)
    adapter = bom["metadata"]["component"]
    assert (adapter["name"], adapter["version"]) == ("bom", job.version)
    assert [one["version"] for one in adapter["pedigree"]["ancestors"][1:]] == [first.version]
    data = next(one for one in bom["components"] if one["type"] == "data")
    assert data["hashes"] == [{"alg": "SHA-256", "content": sha256("rows scored more")}]
    assert adapter["modelCard"]["modelParameters"]["datasets"] == [{"ref": data["bom-ref"]}]
    assert facts(bom)["onebase:signature:signer"] == "server"
    assert facts(bom)["onebase:job"] == job.id
    assert len(adapter["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]) == 2
    with Client(server.url) as sdk:
        assert sdk.adapters.bom("bom", job.version) == bom, "the same version has the same bill"


def test_an_uploads_bill_has_its_files_and_its_base(server: Server, tmp_path: Path) -> None:
    http = server.client()
    version = upload_folder(http, "sent", make_folder(tmp_path, "sent")).json()["version"]
    answer = http.get(f"/v1/adapters/sent/versions/{version}/bom")
    bom = answer.json()
    check(bom)
    files = {one["name"]: one["hashes"][0]["content"] for one in bom["metadata"]["component"]["components"]}
    listed = http.get(f"/v1/adapters/sent/versions/{version}/files").json()["data"]
    assert files == {one["name"]: one["sha256"] for one in listed}
    assert bom["components"][0]["bom-ref"] == "base"
    assert http.get("/v1/adapters/sent/versions/00000000/bom").status_code == 404


def test_reinforcement_is_named_and_who_measured_and_a_new_evaluation_raises_the_version() -> None:
    blob = Blob("0" * 64, 1)
    version = VersionRecord(
        "acme",
        "a",
        "d" * 64,
        "ready",
        AdapterFiles(blob, blob),
        None,
        None,
        {"kind": "training"},
        None,
        0.0,
        "",
        0.0,
    )
    score = SliceScore(slice="", rows=10, sum=1.0, squares=1.0)

    def evaluation(at: float, **who: Any) -> VersionEvaluation:
        return VersionEvaluation(against=None, metric="exact_match", slices=(score,), at=at, **who)

    sent = [evaluation(100.0, key="", job="ftjob-1"), evaluation(200.0, key="ob-1")]
    base: Any = SimpleNamespace(name="base", revision=None, repo=None, quantization=None)
    boms = [
        bill_of_materials(version, base, {"recipe": {"method": "reinforcement"}}, sent[:count], "1")
        for count in range(3)
    ]
    for bom in boms:
        check(bom)
    assert [bom["version"] for bom in boms] == [1, 100, 200]
    card = boms[2]["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["approach"] == {"type": "reinforcement-learning"}
    metrics = [one["type"] for one in card["quantitativeAnalysis"]["performanceMetrics"]]
    assert "measured by job ftjob-1 of this server" in metrics[0]
    assert "measured by key ob-1 (its own statement)" in metrics[1]
