"""Adapters that generate no text: classifiers of texts and of tokens, and encoders, as PEFT saves them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.matrix import matrix
from tests.tiny import randomize, save_base

from onebase_adapters.export.adapter_parts import opened_adapter
from onebase_adapters.export.base_files import BaseFiles, ExportError
from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.format.config import check_config, with_labels
from onebase_adapters.proof.merging import MergeInput, MergeRecipe, merge
from onebase_adapters.proof.report import ProofError
from onebase_adapters.proof.texts import TextProver
from onebase_adapters.proof.verifier import ProvenVersion, Verifier
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import peft_view
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.versions import Versions
from onebase_engine.kernels.weights import HEAD, AdapterWeights, Head, host_bytes, weights_bytes
from onebase_engine.lora.packed_adapter import read_packed_adapter

CLASSES: dict[str, Any] = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": tf.AutoModel,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "norm": {"modules_to_save": ["layers.0.input_layernorm"]},
}
LABELS = 5
TEXTS = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 70)]
PROBES = TEXTS[1:]


def own_model(folder: Path, task: str, labels: int = LABELS) -> Any:
    """transformers' model of the class, as a user of PEFT loads it."""
    more: dict[str, Any] = {} if task == "FEATURE_EXTRACTION" else {"num_labels": labels}
    model = CLASSES[task].from_pretrained(folder, dtype=torch.float32, **more)
    model.config.pad_token_id = None
    return model


def peft_model(base: Any, task: str, adapter: Path) -> Any:
    """PEFT's model of its own class, which has read the folder by itself, on the base's layers."""
    model = peft_view(base).base_model
    if task != "FEATURE_EXTRACTION":
        config = copy.deepcopy(base.config)
        config.num_labels, config.pad_token_id = LABELS, None
        decoder, model = model, CLASSES[task].from_config(config, dtype=base.dtype)
        model.model = decoder
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def nf4(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path, nf4: bool) -> torch.nn.Module:
    how: dict[str, Any] = (
        {"quantization": "nf4", "dtype": torch.bfloat16}
        if nf4
        else {"quantization": "none", "dtype": torch.float32}
    )
    return load_base(BaseSettings(folder, **how))


@pytest.fixture(scope="module")
def verifier(base: torch.nn.Module) -> Verifier:
    return Verifier(base, max_rank=64, base_id="tiny")


def save(folder: Path, target: Path, task: str, seed: int = 1, labels: int = LABELS, **settings: Any) -> Path:
    torch.manual_seed(seed)
    chosen: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        **copy.deepcopy(settings),  # PEFT adds to its lists
    }
    model = get_peft_model(own_model(folder, task, labels), LoraConfig(task_type=task, **chosen))
    randomize(model, 0.1)
    model.save_pretrained(target)
    return target


def prove(verifier: Verifier, adapter: Path, packed: Path) -> tuple[ProvenVersion, AdapterWeights]:
    found = verifier.prove(
        adapter / CONFIG_FILE,
        adapter / WEIGHTS_FILE,
        packed,
        probes=PROBES,
        probe_tokens=4,
        allow_noop=False,
        on_progress=lambda stage, fraction: None,
    )
    return found, read_packed_adapter(packed, found.sha256)


def serve(
    base: torch.nn.Module, versions: dict[str, AdapterWeights], asked: Sequence[protocol.Submit]
) -> dict[str, np.ndarray]:
    limits = SchedulerLimits(max_sequences=16, step_tokens=33, max_length=200)
    engine = Engine(base, name="tiny", limits=limits, kv_blocks=200, slots=4)
    for digest, weights in versions.items():
        engine.put_adapter(digest, weights)
    for submit in asked:
        engine.submit(submit)
    found: dict[str, np.ndarray] = {}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            if output.vector is not None:
                found[output.id] = np.frombuffer(output.vector, "<f4")
    return found


def reading(name: str, text: list[int], digest: str, kind: Any, head: bool) -> protocol.Submit:
    return protocol.Submit(
        id=name,
        prompt=text,
        sampling=protocol.Sampling(max_tokens=0),
        adapters=[protocol.AdapterRef(digest)],
        pooling=protocol.Pooling(kind, head=head),
    )


@pytest.mark.parametrize(("task", "kind"), matrix(CLASSES, KINDS))
def test_they_are_proved_and_served_in_one_batch_as_pefts_own_model_of_their_class(
    folder: Path,
    base: torch.nn.Module,
    verifier: Verifier,
    nf4: bool,
    task: str,
    kind: str,
    tmp_path: Path,
) -> None:
    adapter = save(folder, tmp_path / "adapter", task, **KINDS[kind])
    other = save(folder, tmp_path / "other", "SEQ_CLS", seed=2, labels=3)
    proven, weights = prove(verifier, adapter, tmp_path / "packed")
    _, others = prove(verifier, other, tmp_path / "packed other")
    classifies = task != "FEATURE_EXTRACTION"
    assert (proven.report.task, proven.report.labels) == (task, LABELS if classifies else 0)
    assert ("The classes of 2 texts were PEFT's" in proven.report.proof.shown) == classifies
    assert ("head" in proven.report.kinds) == classifies

    pooled = "each" if task == "TOKEN_CLS" else "last"
    asked = []
    sampling = protocol.Sampling(temperature=0, max_tokens=5)
    for i, text in enumerate(TEXTS):
        asked += [
            reading(f"{i}", text, "own", pooled, classifies),
            reading(f"other{i}", text, "other", "last", True),
            protocol.Submit(id=f"text{i}", prompt=text, sampling=sampling),
        ]
    found = serve(base, {"own": weights, "other": others}, asked)
    model = peft_model(base, task, adapter)
    for i, text in enumerate(TEXTS):
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([text]))
        expected = output.logits[0] if classifies else output.last_hidden_state[0, -1]
        got = torch.from_numpy(found[str(i)].copy()).view(expected.shape)
        allowed = 0.1 * float(expected.float().abs().max()) if nf4 else 1e-4
        torch.testing.assert_close(got, expected.float(), atol=allowed, rtol=1e-3)
        assert found[f"other{i}"].shape == (3,)
    if classifies:
        alone = serve(base, {"own": weights}, [reading("0", TEXTS[2], "own", pooled, True)])
        assert np.array_equal(alone["0"], found["2"])


def test_a_head_that_is_not_what_the_file_says_is_no_proof(
    folder: Path, base: torch.nn.Module, verifier: Verifier, tmp_path: Path
) -> None:
    adapter = save(folder, tmp_path / "adapter", "SEQ_CLS")
    _, weights = prove(verifier, adapter, tmp_path / "packed")
    classifier = peft_model(base, "SEQ_CLS", adapter).get_base_model()
    head = weights[HEAD]
    assert isinstance(head, Head)
    texts = TextProver(base)
    assert texts.prove_classes(classifier, weights, PROBES, "SEQ_CLS") == 2
    for planted in (
        Head(head.weight.roll(1, 0)),
        Head(head.weight * 1.1),
        Head(head.weight, torch.ones(LABELS, dtype=head.weight.dtype)),
    ):
        with pytest.raises(ProofError, match="classes of text 1"):
            texts.prove_classes(classifier, {**weights, HEAD: planted}, PROBES, "SEQ_CLS")


def test_classes_of_an_adapter_without_a_head_or_of_a_sum_are_refused(
    base: torch.nn.Module, folder: Path, verifier: Verifier, tmp_path: Path
) -> None:
    _, weights = prove(verifier, save(folder, tmp_path / "a", "SEQ_CLS"), tmp_path / "packed")
    engine = Engine(base, name="tiny", limits=SchedulerLimits(8, 64, 200), kv_blocks=100, slots=4)
    engine.put_adapter("own", weights)
    engine.put_adapter("plain", {name: one for name, one in weights.items() if name != HEAD})
    refs = ([], [("plain", 1.0)], [("own", 0.5)], [("own", 1.0), ("plain", 1.0)])
    for number, terms in enumerate(refs):
        engine.submit(
            protocol.Submit(
                id=str(number),
                prompt=[5],
                sampling=protocol.Sampling(max_tokens=0),
                adapters=[protocol.AdapterRef(*term) for term in terms],
                pooling=protocol.Pooling(head=True),
            )
        )
    assert {output.error_code for output in engine.take_outputs()} == {"no_classifier"}
    assert not engine.busy


def test_a_head_counts_as_much_memory_as_the_engine_has_for_it(
    base: torch.nn.Module, folder: Path, verifier: Verifier, tmp_path: Path
) -> None:
    _, weights = prove(verifier, save(folder, tmp_path / "a", "TOKEN_CLS"), tmp_path / "packed")
    versions = Versions()
    versions.put("own", weights)
    held = sum(part.nbytes for part in versions.heads["own"])
    assert host_bytes(weights) == weights_bytes(versions.weights["own"]) + held


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param({"base_model.model.score.weight": None}, "incomplete", id="no-head"),
        pytest.param({"base_model.model.score.weight": (LABELS, 7)}, "bad_shape", id="narrow"),
        pytest.param({"base_model.model.score.weight": (0, 128)}, "bad_shape", id="no-labels"),
        pytest.param({"base_model.model.score.weight": (4097, 128)}, "bad_shape", id="too-many-labels"),
        pytest.param({"base_model.model.score.weight": (LABELS,)}, "bad_shape", id="flat"),
        pytest.param({"base_model.model.score.bias": (3,)}, "bad_shape", id="short-bias"),
        pytest.param({"base_model.model.score.bias": (LABELS,)}, "bad_shape", id="bias-of-another-class"),
        pytest.param({"base_model.model.classifier.weight": (LABELS, 128)}, "incomplete", id="two-heads"),
        pytest.param({"base_model.model.score.lora_A.weight": (8, 128)}, "unknown_module", id="lora-on-head"),
    ],
)
def test_files_whose_head_does_not_fit_are_refused(
    folder: Path, verifier: Verifier, change: dict[str, tuple[int, ...] | None], code: str, tmp_path: Path
) -> None:
    adapter = save(folder, tmp_path / "adapter", "SEQ_CLS")
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)
    save_file(tensors, adapter / WEIGHTS_FILE)
    with pytest.raises(AdapterFormatError) as error:
        prove(verifier, adapter, tmp_path / "packed")
    assert error.value.code == code
    assert not (tmp_path / "packed").exists()


def named(adapter: Path, names: Any) -> Path:
    """The folder as a server keeps it, with these names of labels next to it."""
    config = adapter / CONFIG_FILE
    model = json.dumps({"model_type": "llama", "id2label": names}).encode()
    config.write_bytes(with_labels(config.read_bytes(), model))
    return adapter


def test_labels_are_called_what_the_models_config_calls_them(
    folder: Path, verifier: Verifier, tmp_path: Path
) -> None:
    names = ["a", "b <i>", "\u00e9", "d", "e"]
    adapter = named(
        save(folder, tmp_path / "adapter", "SEQ_CLS"), {str(n): one for n, one in enumerate(names)}
    )
    proven, _ = prove(verifier, adapter, tmp_path / "packed")
    assert (list(proven.report.label_names), proven.report.warnings) == (names, ())
    fewer = named(save(folder, tmp_path / "fewer", "SEQ_CLS"), {"0": "a", "1": "b"})
    proven, _ = prove(verifier, fewer, tmp_path / "packed")
    assert proven.report.label_names == ()
    assert list(proven.report.warnings) == ["id2label names 2 labels, and there are 5: it is not used"]
    with pytest.warns(UserWarning, match="id2label"):
        assert LoraConfig.from_pretrained(adapter).r == 8


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        {"0": "a", "2": "b"},
        {"0": "a", "01": "b"},
        {"0": 1},
        {"0": ""},
        {"0": "a\x1b[2J"},
        {"0": "a\u202e"},
        {"0": "a\ud800"},
        {"0": "a" * 201},
        {"0": "a", "1": "a"},
        {str(n): f"label {n}" for n in range(4097)},
        {str(n): f"{n:0190}" for n in range(400)},
        {},
    ],
    ids=range(13),
)
def test_names_of_labels_that_are_none_are_refused(names: Any) -> None:
    config = b'{"peft_type": "LORA", "task_type": "TOKEN_CLS", "id2label": %s}' % json.dumps(names).encode()
    with pytest.raises(AdapterFormatError, match=r"id2label|JSON") as refused:
        check_config(config)
    assert refused.value.code == "bad_config"


def test_names_are_only_taken_for_a_classifier_that_has_none() -> None:
    model = b'{"id2label": {"0": "a"}}'
    for raw in (
        b'{"task_type": "CAUSAL_LM"}',
        b'{"task_type": "SEQ_CLS", "id2label": {"0": "own"}}',
        b'{"task_type": ["SEQ_CLS"]}',
        b"[]",
    ):
        assert with_labels(raw, model) == raw
    raw = b'{"task_type": "SEQ_CLS"}'
    assert json.loads(with_labels(raw, model)) == {"task_type": "SEQ_CLS", "id2label": {"0": "a"}}
    assert with_labels(raw, None) == with_labels(raw, b"{}") == raw
    assert with_labels(raw, b'{"id2label": {"0": "LABEL_0"}}') == raw
    for bad in (b"", b"[1]", b"{" + b" " * (1 << 20) + b"}"):
        with pytest.raises(AdapterFormatError, match=r"config\.json"):
            with_labels(raw, bad)


def test_names_that_are_nested_deep_cost_no_more_than_their_bytes() -> None:
    raw = b'{"task_type": "SEQ_CLS"}'
    deep = b'{"id2label": ' + b"[" * 900 + b",".join([b"1"] * 1000) + b"]" * 900 + b"}"
    assert len(with_labels(raw, deep)) < 2 * len(deep)
    for depth in (*range(900, 1100), 10_000, 100_000):
        with contextlib.suppress(AdapterFormatError):
            with_labels(raw, b'{"id2label": ' + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["named", "all"])
def test_an_encoder_may_have_been_trained_on_the_model_for_text(
    folder: Path, verifier: Verifier, targets: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "adapter" / WEIGHTS_FILE
    )
    proven, _ = prove(verifier, tmp_path / "adapter", tmp_path / "packed")
    assert proven.report.task == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_for_text_which_a_classifier_does_not_have_is_refused(
    folder: Path, verifier: Verifier, task: str, tmp_path: Path
) -> None:
    adapter = save(folder, tmp_path / "adapter", task)
    config = adapter / CONFIG_FILE
    config.write_text(config.read_text().replace('"q_proj"', '"q_proj", "lm_head"'))
    tensors = load_file(adapter / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(8, 128)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(320, 8)
    save_file(tensors, adapter / WEIGHTS_FILE)
    with pytest.raises(AdapterFormatError, match="lm_head is in no model whose task_type is"):
        prove(verifier, adapter, tmp_path / "packed")


def test_a_head_in_an_adapter_for_text_is_foreign(folder: Path, verifier: Verifier, tmp_path: Path) -> None:
    adapter = save(folder, tmp_path / "adapter", "SEQ_CLS")
    config = adapter / CONFIG_FILE
    config.write_text(config.read_text().replace('"SEQ_CLS"', '"CAUSAL_LM"'))
    with pytest.raises(AdapterFormatError):
        prove(verifier, adapter, tmp_path / "packed")


def test_what_generates_no_text_is_neither_merged_nor_made_a_model(
    folder: Path, base: torch.nn.Module, tmp_path: Path
) -> None:
    adapter = save(folder, tmp_path / "adapter", "SEQ_CLS")
    parent = MergeInput("sorts", adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, 1.0)
    recipe = MergeRecipe("cat", None, "total", 0)
    with pytest.raises(AdapterFormatError, match="sorts generates no text"):
        merge(base, [parent, parent], recipe, 64, tmp_path / "config", tmp_path / "weights")
    with pytest.raises(ExportError, match="export it as peft"):
        opened_adapter(adapter, BaseFiles(folder, "tiny")).__enter__()
