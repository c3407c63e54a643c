"""The real verifier process proves versions on an attached base, and says in numbers what it found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.kinds import KINDS
from tests.disks import small_disk
from tests.tiny import ATTENTION, MLP, load_folder
from tests.verifier.conftest import BASE_ID, Bench

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.format.spellings import PREFIX
from onebase_engine.base.load import base_tensors
from onebase_engine.kernels.weights import LoraWeights
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter
from onebase_server.processes.verifier_client import RejectedError


def test_a_version_is_proven_and_its_report_says_what_it_is(bench: Bench, adapter: Path) -> None:
    proved = bench.prove(bench.job(adapter))
    report = proved.report
    assert (report.kinds, report.rank, report.alpha, report.rslora) == (("lora",), 4, 24.0, False)
    assert list(report.targets) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert len(report.modules) == 14
    assert report.parameters == sum(module.parameters for module in report.modules)
    assert report.bytes == 4 * report.parameters
    assert report.dropped == ()
    proof = report.proof
    assert proof.modules_compared == 21
    assert proof.modules_changed == 14
    assert (proof.exact, proof.largest_difference, proof.base_unchanged) == (True, 0.0, True)
    assert proof.rows >= 96
    assert (proof.texts, proof.tokens_compared) == (2, 12)
    assert proof.texts_changed == 2
    assert proof.seconds > 0


@pytest.mark.parametrize("old", [PREFIX, f"{PREFIX}model."])
def test_an_adapter_under_other_names_is_proven_and_its_report_says_what_was_read(
    bench: Bench, adapter: Path, tmp_path: Path, old: str
) -> None:
    """Names without PEFT's prefix, and those of a composite."""
    new = "" if old == PREFIX else f"{PREFIX}language_model.model."
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({name.replace(old, new, 1): one for name, one in tensors.items()}, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    report = bench.prove(bench.job(tmp_path)).report
    plain = bench.prove(bench.job(adapter)).report
    assert report.modules == plain.modules
    assert (report.proof.exact, report.proof.texts_changed) == (True, 2)
    assert f"is read as {'base_model.model.' * (not new)}model.layers.0" in report.warnings[0]
    assert report.warnings[1:] == plain.warnings


def test_norms_are_those_of_what_is_added(bench: Bench, adapter: Path) -> None:
    modules = {module.name: module for module in bench.prove(bench.job(adapter)).report.modules}
    loaded = load_folder(bench.published.base, adapter)
    assert modules.keys() == loaded.weights.keys()
    for name, weights in loaded.weights.items():
        assert isinstance(weights, LoraWeights)
        product = (weights.scale * weights.b.double() @ weights.a.double()).norm().item()
        assert modules[name].norm == pytest.approx(product, rel=1e-6)
        assert product > 0.1


def test_what_stands_out_is_in_the_report_and_blocks_nothing(
    bench: Bench, adapter: Path, tmp_path: Path
) -> None:
    def scaled(name: str, down: float, **config: Any) -> Path:
        """The adapter, whose matrices are random and large, a hundredth as strong but for one module."""
        folder = _edited(adapter, tmp_path / name, **config)
        tensors = load_file(folder / WEIGHTS_FILE)
        for key in tensors:
            if "lora_B" in key:
                tensors[key] *= down if "layers.1.mlp.down_proj" in key else 0.01
        save_file(tensors, folder / WEIGHTS_FILE)
        return folder

    assert bench.prove(bench.job(scaled("quiet", 0.01))).report.warnings == ()
    odd = scaled("odd", 10.0, target_modules=[*ATTENTION, *MLP, "gate"])
    named, large = bench.prove(bench.job(odd)).report.warnings
    assert named == "target_modules names gate, of which the adapter has no tensors."
    assert large.startswith("model.layers.1.mlp.down_proj: what it adds has ")
    assert large.endswith(" times the norm of the base's weight")


def test_the_prepared_file_holds_what_was_proved(bench: Bench, adapter: Path) -> None:
    job = bench.job(adapter)
    proved = bench.prove(job)
    path = Path(job.packed_path)
    raw = path.read_bytes()
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (proved.bytes, proved.sha256)
    weights = read_packed_adapter(path, proved.sha256, base_id=BASE_ID)
    loaded = load_folder(bench.published.base, adapter).weights
    assert weights.keys() == loaded.keys()
    for name, module in weights.items():
        other = loaded[name]
        assert isinstance(module, LoraWeights)
        assert isinstance(other, LoraWeights)
        assert torch.equal(module.a, other.a)
        assert torch.equal(module.b, other.b)
        assert module.scale == other.scale
    with pytest.raises(PackedAdapterError, match="another base"):
        read_packed_adapter(path, base_id="other")


def test_progress_goes_from_validating_to_proving_and_never_back(bench: Bench, adapter: Path) -> None:
    job = bench.job(adapter)
    bench.prove(job)
    assert {progress.digest for progress in bench.progress} == {job.digest}
    stages = [progress.stage for progress in bench.progress]
    assert stages == sorted(stages, reverse=True)
    assert set(stages) == {"validating", "proving"}
    fractions = [progress.fraction for progress in bench.progress]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] <= 1


def _save_kind(bench: Bench, kind: str, folder: Path) -> Path:
    """An adapter of one of KINDS, as PEFT saves it."""
    from tests.adapters.kinds import peft_adapter

    model: Any = peft_adapter(bench.published.base, kind, seed=5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("rslora", ["lora"]),
        ("dora", ["dora"]),
        ("bias odd scale", ["lora"]),
        ("head dora", ["dora"]),
        ("embedding", ["lora"]),
        ("saved norms", ["lora", "saved"]),
        ("tokens", ["lora", "tokens"]),
        ("alora", ["alora"]),
    ],
)
def test_every_kind_goes_from_its_files_to_a_proof(
    bench: Bench, kind: str, kinds: list[str], tmp_path: Path
) -> None:
    proved = bench.prove(bench.job(_save_kind(bench, kind, tmp_path / "adapter")))
    assert list(proved.report.kinds) == kinds
    assert proved.report.modules
    assert all(module.norm > 0 for module in proved.report.modules)
    assert proved.report.rslora == (kind == "rslora")
    assert proved.report.invocation_tokens == tuple(KINDS[kind].get("alora_invocation_tokens", ()))
    assert proved.report.proof.texts_changed == (5 if kind == "alora" else 2)
    assert kind in KINDS


def _edited(adapter: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(adapter, target)
    path = target / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def test_a_rejected_version_leaves_no_file_and_the_process_goes_on(
    bench: Bench, adapter: Path, tmp_path: Path
) -> None:
    pid = bench.verifier.pid
    bad = {
        "unknown_field": _edited(adapter, tmp_path / "field", new_trick=True),
        "missing_file": tmp_path / "nothing",
    }
    for folder in bad.values():
        job = bench.job(folder)
        with pytest.raises(RejectedError) as rejected:
            bench.prove(job)
        assert rejected.value.code
        assert rejected.value.message
        assert not Path(job.packed_path).exists()
    large = bench.job(_wide(bench, tmp_path / "wide"))
    with pytest.raises(RejectedError, match="64") as rejected:
        bench.prove(large)
    assert rejected.value.code == "rank_too_large"
    assert bench.prove(bench.job(adapter)).report.rank == 4
    assert bench.verifier.pid == pid is not None


def _wide(bench: Bench, folder: Path) -> Path:
    from tests.tiny import save_adapter

    settings = {"r": 64, "lora_alpha": 64, "target_modules": ["q_proj"]}
    return save_adapter(bench.published.base, settings, folder, seed=1)


def test_an_adapter_that_changes_nothing_is_refused_unless_it_is_allowed(
    bench: Bench, adapter: Path, tmp_path: Path
) -> None:
    idle = _edited(adapter, tmp_path / "idle")
    path = idle / WEIGHTS_FILE
    save_file({k: t * 0 if "lora_B" in k else t for k, t in load_file(path).items()}, path)
    with pytest.raises(RejectedError) as rejected:
        bench.prove(bench.job(idle))
    assert rejected.value.code == "no_effect"
    proof = bench.prove(bench.job(idle, allow_noop=True)).report.proof
    assert (proof.modules_changed, proof.texts_changed, proof.tokens_compared) == (0, 0, 12)


def test_a_full_disk_rejects_the_version_and_leaves_no_half_file(
    bench: Bench, adapter: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1 << 14) as disk:
        bench.scratch, before = disk, bench.scratch
        try:
            with pytest.raises(RejectedError) as rejected:
                bench.prove(bench.job(adapter))
        finally:
            bench.scratch = before
        assert rejected.value.code == "store_full"
        assert list(disk.iterdir()) == []


def test_without_probes_the_modules_alone_are_compared(bench: Bench, adapter: Path) -> None:
    job = bench.job(adapter)
    quiet = type(job)(**{**{f: getattr(job, f) for f in job.__struct_fields__}, "probes": []})
    proof = bench.prove(quiet).report.proof
    assert (proof.texts, proof.tokens_compared, proof.modules_compared) == (0, 0, 21)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("dropped_layer", "proof_failed", r"layers\.1\.self_attn\.o_proj differs from PEFT's"),
        ("wrong_positions", "proof_failed", "text 1 of the bare base differs"),
        ("out_of_memory", "no_memory", "memory"),
        ("file_limit", "store_full", "File too large"),
        ("stumbles", "proof_error", "ZeroDivisionError"),
    ],
)
def test_a_fault_in_what_would_be_served_rejects_the_version(
    bench: Bench, adapter: Path, fault: str, code: str, words: str
) -> None:
    job = bench.job(adapter, fault=fault)
    with pytest.raises(RejectedError, match=words) as rejected:
        bench.prove(job)
    assert rejected.value.code == code
    assert not Path(job.packed_path).exists()
    assert bench.prove(bench.job(adapter)).report.proof.exact


def test_a_write_to_the_base_stays_in_the_process_and_ends_it(bench: Bench, adapter: Path) -> None:
    first = bench.verifier.pid
    values = {name: tensor.clone() for name, tensor in base_tensors(bench.published.base).items()}
    with pytest.raises(RejectedError, match="written to") as rejected:
        bench.prove(bench.job(adapter, fault="written_base"))
    assert rejected.value.code == "base_changed"
    # The next one is another process's, in which the base is whole.
    assert bench.prove(bench.job(adapter)).report.proof.texts_changed == 2
    assert bench.verifier.pid != first
    after = base_tensors(bench.published.base)
    assert all(torch.equal(value, after[name]) for name, value in values.items())
