"""Bill of materials of a version: a CycloneDX 1.6 document about its files, its base, its data and its proof.

https://cyclonedx.org/docs/1.6/json/. The same version has the same document, but for what was found since, as
evaluations are; its `version` is the time of the newest one (Unix seconds), or 1.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from onebase_adapters.registry import SIGNATURE, VersionRecord
from onebase_adapters.store.blobs import ADAPTER_FILES
from onebase_protocol.adapters import BaseReference, VersionEvaluation

_NAMESPACE = uuid.UUID("5f0e6a1c-5c52-5d2b-9d65-0c8a4bb0a4de")
_ADAPTER, _BASE = "adapter", "base"
_PROOF = (
    "kernels", "exact", "modules_compared", "modules_exact", "modules_changed", "error_ratio", "texts",
    "texts_changed", "base_unchanged",
)  # fmt: skip
_METHODS = {"dpo": "reinforcement-learning", "reinforcement": "reinforcement-learning"}
"""CycloneDX's approach, by the recipe's method; the others are supervised."""


def bill_of_materials(
    version: VersionRecord,
    base: BaseReference,
    training: Mapping[str, Any],
    evaluations: Sequence[VersionEvaluation],
    software: str,
) -> dict[str, Any]:
    """Return a version's bill of materials.

    Args:
        version: with its whole report.
        training: `data` (SHA-256 and bytes by role), `recipe` and `seed`, as far as they are known.
        software: the version of this server's software.
    """
    report, source = version.report or {}, version.source
    data = [_data(role, file) for role, file in (training.get("data") or {}).items()]
    parents = _parents(source)
    facts = {
        "state": version.state,
        "source": source.get("kind"),
        **{name: source.get(name) for name in ("repo", "commit", "subfolder", "job", "method")},
        "rank": report.get("rank"),
        "alpha": report.get("alpha"),
        "targets": ",".join(report.get("targets") or ()),
        "parameters": report.get("parameters"),
        "seed": training.get("seed"),
        "weight_score": report.get("weight_score"),
        **_signature_facts(source.get(SIGNATURE) or {}),
        **{f"proof:{name}": (report.get("proof") or {}).get(name) for name in _PROOF},
        **{f"recipe:{name}": value for name, value in sorted((training.get("recipe") or {}).items())},
    }
    adapter = {
        "type": "machine-learning-model",
        "bom-ref": _ADAPTER,
        "name": version.name,
        "version": version.digest,
        "description": "LoRA adapter",
        "hashes": [_hash(version.digest)],
        "components": [_file(name, version) for name in ADAPTER_FILES],
        "pedigree": {"ancestors": [_base(base), *parents]},
        "modelCard": _card(report, training, data, evaluations),
        "properties": _properties(facts),
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(_NAMESPACE, f"{version.tenant}/{version.name}@{version.digest}").urn,
        "version": max((int(one.at) for one in evaluations), default=1),
        "metadata": {
            "timestamp": datetime.fromtimestamp(version.created_at, UTC).isoformat(timespec="seconds"),
            "tools": {"components": [{"type": "application", "name": "onebase", "version": software}]},
            "component": adapter,
        },
        "components": [{**_base(base), "bom-ref": _BASE}, *data],
        "dependencies": [
            {"ref": _ADAPTER, "dependsOn": [_BASE, *(one["bom-ref"] for one in data)]},
            {"ref": _BASE},
            *({"ref": one["bom-ref"]} for one in data),
        ],
    }


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _file(name: str, version: VersionRecord) -> dict[str, Any]:
    blob = version.files.of(name)
    facts = {"bytes": blob.size}
    return {"type": "file", "name": name, "hashes": [_hash(blob.sha256)], "properties": _properties(facts)}


def _base(base: BaseReference) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "machine-learning-model", "name": base.name}
    if base.revision:
        made["version"] = base.revision
    if base.repo:
        made["purl"] = f"pkg:huggingface/{base.repo}" + (f"@{base.revision}" if base.revision else "")
    facts = {"quantization": base.quantization}
    if base.quantization == "nf4":
        facts |= {"blocksize": str(base.blocksize), "double_quant": str(base.double_quant).lower()}
    return {**made, "properties": _properties(facts)}


def _data(role: str, file: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data-{role}",
        "name": f"{role} data",
        "hashes": [_hash(file["sha256"])],
        "data": [{"type": "dataset", "name": f"{role} data"}],
        "properties": _properties({"bytes": file.get("bytes")}),
    }


def _parents(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the versions that this one was trained from or merged of."""
    one = source.get("parent")
    found = [*([one] if one else ()), *(source.get("parents") or ())]
    return [
        {
            "type": "machine-learning-model",
            "name": parent["name"],
            "version": parent["version"],
            "hashes": [_hash(parent["version"])],
            "properties": _properties({"weight": parent.get("weight")}),
        }
        for parent in found
    ]


def _card(
    report: Mapping[str, Any],
    training: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    evaluations: Sequence[VersionEvaluation],
) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "task": str(report.get("task", "CAUSAL_LM")),
        "modelArchitecture": "+".join(report.get("kinds") or ("lora",)),
        "datasets": [{"ref": one["bom-ref"]} for one in data],
    }
    if training.get("recipe"):
        method = str(training["recipe"].get("method", ""))
        parameters["approach"] = {"type": _METHODS.get(method, "supervised")}
    metrics = [
        {
            "type": _metric(evaluation),
            "value": f"{score.sum / score.rows:.6g}",
            **({"slice": score.slice} if score.slice else {}),
        }
        for evaluation in evaluations
        for score in evaluation.slices
    ]
    return {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": metrics}}


def _metric(evaluation: VersionEvaluation) -> str:
    """Return what was measured, and who says so."""
    who = f"key {evaluation.key} (its own statement)" if evaluation.key else "a request without a key"
    if evaluation.job is not None:
        who = f"job {evaluation.job} of this server"
    against = evaluation.against or "the base"
    return f"mean difference of {evaluation.metric} from {against}, measured by {who}"


def _signature_facts(signature: Mapping[str, Any]) -> dict[str, Any]:
    names = ("status", "signer", "identity", "issuer", "code")
    return {f"signature:{name}": signature.get(name) for name in names}


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return facts in CycloneDX's form, without those that are not known."""
    said = {name: value for name, value in facts.items() if value is not None and value != ""}
    return [{"name": f"onebase:{name}", "value": _text(value)} for name, value in said.items()]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
