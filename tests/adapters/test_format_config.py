"""What `adapter_config.json` may hold: every field by its own rule, and nothing that acts on its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tests.adapters.format_support import CONFIG, Q0, SETTINGS, WEIGHTS, read, refusal, write

from onebase_adapters.format import config as config_fields
from onebase_adapters.format.config import AdapterFormatError, check_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def with_fields(**fields: Any) -> bytes:
    return json.dumps({**SETTINGS, **fields}).encode()


def code_of(raw: bytes) -> str | None:
    """The code with which a config is refused."""
    try:
        check_config(raw)
    except AdapterFormatError as error:
        return error.code
    return None


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_is_accepted_with_a_warning(folder: Path, off: Any) -> None:
    write(folder, use_something_new=off, lorap_lr_ratio=16.0, lora_dtype="fp32", lorap_emb_lr=1e-6)
    (sentence,) = read(folder).warnings
    assert "use_something_new" in sentence
    assert "lora" not in sentence


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"surprise": 1}, "unknown_field", "surprise"),
        ({"\ud800": 1}, "unknown_field", "ud800"),
        ({"peft_type": "IA3"}, "unsupported_kind", "peft_type"),
        ({"peft_type": "x" * 9999}, "unsupported_kind", "peft_type"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "unsupported_kind", "task_type"),
        ({"bias": "all"}, "unsupported_kind", "bias"),
        ({"bias": "lora_only"}, "unsupported_kind", "bias"),
        ({"bias": None}, "unsupported_kind", "bias"),
        ({"surprise": 0}, "unknown_field", "surprise"),
        ({"surprise": [0]}, "unknown_field", "surprise"),
        ({"\x1b[31m": None}, "unknown_field", "[31m"),
        ({"fan_in_fan_out": 1}, "bad_config", "fan_in_fan_out"),
        ({"loftq_config": {"loftq_bits": 4}}, "unsupported_kind", "loftq_config"),
        ({"layer_replication": [[0, 1]]}, "unsupported_kind", "layer_replication"),
        ({"megatron_config": {"a": 1}}, "unsupported_kind", "megatron_config"),
        ({"corda_config": {"cache_file": "/etc/passwd"}}, "unsupported_kind", "corda_config"),
        ({"lora_ga_config": {}}, "unsupported_kind", "lora_ga_config"),
        ({"velora_config": {}}, "unsupported_kind", "velora_config"),
        ({"kasa_config": {}}, "unsupported_kind", "kasa_config"),
        ({"monteclora_config": {}}, "unsupported_kind", "monteclora_config"),
        ({"arrow_config": {}}, "unsupported_kind", "arrow_config"),
        ({"use_bdlora": {}}, "unsupported_kind", "use_bdlora"),
        ({"use_qalora": True}, "unsupported_kind", "use_qalora"),
        ({"alora_invocation_tokens": []}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1] * 65}, "bad_config", "1 to 64 tokens, got 65"),
        ({"alora_invocation_tokens": [1, -1]}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [10**400]}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [True]}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1.0]}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": "check"}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": 5}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1], "task_type": None}, "unsupported_kind", "CAUSAL_LM"),
        (
            {"alora_invocation_tokens": [1], "task_type": "FEATURE_EXTRACTION"},
            "unsupported_kind",
            "CAUSAL_LM",
        ),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "unsupported_kind", "use_dora"),
        (
            {"alora_invocation_tokens": [1], "modules_to_save": ["norm"]},
            "unsupported_kind",
            "modules_to_save",
        ),
        (
            {"alora_invocation_tokens": [1], "trainable_token_indices": [1]},
            "unsupported_kind",
            "trainable_token_indices",
        ),
        ({"target_parameters": "mlp.experts.down_proj"}, "bad_config", "target_parameters"),
        ({"init_lora_weights": "pissa"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": 1}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": ["gaussian"]}, "unsupported_kind", "init_lora_weights"),
        ({"rank_pattern": {"(?=q)q_proj": 4}}, "bad_config", "rank_pattern"),
        ({"alpha_pattern": {"(a)\\1": 4}}, "bad_config", "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "bad_config", "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "bad_config", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "4"}}, "bad_config", "alpha_pattern"),
        ({"r": 0}, "bad_config", "r must"),
        ({"r": -1}, "bad_config", "r must"),
        ({"r": True}, "bad_config", "r must"),
        ({"r": 2.0}, "bad_config", "r must"),
        ({"r": 10**400}, "bad_config", "r must"),
        ({"lora_alpha": 10**400}, "bad_config", "lora_alpha"),
        ({"lora_alpha": 1e300}, "bad_config", "lora_alpha"),
        ({"lora_alpha": "16"}, "bad_config", "lora_alpha"),
        ({"use_rslora": "yes"}, "bad_config", "use_rslora"),
        ({"base_model_name_or_path": 3}, "bad_config", "base_model_name_or_path"),
        ({"base_model_name_or_path": "\ud800"}, "bad_config", "base_model_name_or_path"),
        ({"r": None}, "bad_config", "r must"),
        ({"lora_alpha": None}, "bad_config", "lora_alpha"),
        ({"lora_alpha": True}, "bad_config", "lora_alpha"),
        ({"use_dora": 1}, "bad_config", "use_dora"),
        ({"lora_bias": "true"}, "bad_config", "lora_bias"),
        ({"use_dora": True, "lora_bias": True}, "bad_config", "lora_bias and use_dora"),
        ({"ensure_weight_tying": []}, "bad_config", "ensure_weight_tying"),
        ({"inference_mode": "no"}, "bad_config", "inference_mode"),
        ({"peft_version": 1}, "bad_config", "peft_version"),
        ({"revision": ["main"]}, "bad_config", "revision"),
        ({"lora_dropout": "0.1"}, "bad_config", "lora_dropout"),
        ({"target_modules": 3}, "bad_config", "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "bad_config", "target_modules"),
        ({"exclude_modules": {"a": 1}}, "bad_config", "exclude_modules"),
        ({"layers_to_transform": "0"}, "bad_config", "layers_to_transform"),
        ({"layers_to_transform": [True]}, "bad_config", "layers_to_transform"),
        ({"layers_pattern": 3}, "bad_config", "layers_pattern"),
        ({"modules_to_save": "lm_head"}, "bad_config", "modules_to_save"),
        ({"modules_to_save": [["lm_head"]]}, "bad_config", "modules_to_save"),
        ({"trainable_token_indices": 4}, "bad_config", "trainable_token_indices"),
        ({"trainable_token_indices": [4, "5"]}, "bad_config", "trainable_token_indices"),
        ({"trainable_token_indices": [True]}, "bad_config", "trainable_token_indices"),
        ({"trainable_token_indices": [4, 4]}, "bad_config", "once"),
        ({"trainable_token_indices": [-1]}, "bad_config", "below zero"),
        ({"trainable_token_indices": {"embed_tokens": 4}}, "bad_config", "embed_tokens"),
        ({"trainable_token_indices": {"": [4]}}, "bad_config", "name the embedding"),
        ({"rank_pattern": {f"k{i}": 2 for i in range(8193)}}, "bad_config", "more than 8192 keys"),
        ({"alpha_pattern": {"k" * i: 2 for i in range(1, 300)}}, "bad_config", "128 forms"),
        ({"alpha_pattern": {"q_proj\\": 2}}, "bad_config", "ends too early"),
        ({"alpha_pattern": {"q\\b": 2}}, "bad_config", "regular expression"),
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_a_field_that_would_not_be_served_as_trained_is_refused_by_name(
    fields: dict[str, Any], code: str, named: str
) -> None:
    check_config(with_fields())
    with pytest.raises(AdapterFormatError) as refused:
        check_config(with_fields(**fields))
    assert refused.value.code == code
    assert named in str(refused.value)
    assert len(str(refused.value).encode()) < 500


def test_every_field_of_peft_s_own_config_is_known_and_its_defaults_are_taken() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    facts = check_config(json.dumps(config).encode())
    assert (facts.rank, facts.alpha, facts.kinds) == (8, 8.0, ("lora",))
    for field in dataclasses.fields(LoraConfig):
        assert code_of(with_fields(**{field.name: {"surprising": ["value"]}})) != "unknown_field"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("megatron_core", "os"),
        ("qalora_group_size", 16),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("eva_config", {"rho": 2.0}),
        ("lora_dropout", 0.1),
        ("peft_version", "0.99.0@evil"),
        ("revision", "evil"),
        ("exclude_modules", "(a+)+$"),
        ("layers_pattern", "(a+)+$"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", False),
        ("inference_mode", None),
        ("use_rslora", None),
        ("trainable_token_indices", []),
        ("modules_to_save", []),
    ],
    ids=repr,
)
def test_fields_that_act_in_training_only_are_dropped(
    folder: Path, name: str, value: Any, tmp_path: Path
) -> None:
    plain, dropped = tmp_path / "plain", tmp_path / "dropped"
    for target, fields in ((plain, {}), (dropped, {name: value})):
        target.mkdir()
        read(write(folder, **fields), target=target)
    assert (plain / CONFIG).read_bytes() == (dropped / CONFIG).read_bytes()
    assert (plain / WEIGHTS).read_bytes() == (dropped / WEIGHTS).read_bytes()


def test_the_canonical_config_holds_nothing_of_the_original_but_numbers_and_names_of_the_base(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    write(
        folder, base_model_name_or_path="evil", target_modules="(a+)+$", revision="evil", megatron_core="os"
    )
    assert read(folder, target=target).base_name == "evil"
    assert json.loads((target / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 4.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "target_modules": [Q0],
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "trainable_token_indices": None,
    }


def test_the_quick_check_tells_what_the_config_says() -> None:
    facts = check_config(
        with_fields(
            base_model_name_or_path="org/base",
            use_dora=True,
            use_rslora=True,
            rank_pattern={"o_proj": 4},
            modules_to_save=["lm_head"],
            trainable_token_indices=[3, 1],
            target_modules=["q_proj"],
        )
    )
    assert (facts.base_name, facts.rank, facts.alpha, facts.rslora) == ("org/base", 2, 4.0, True)
    assert facts.kinds == ("dora", "saved", "tokens")
    assert (facts.modules_to_save, facts.target_modules) == (("lm_head",), ("q_proj",))
    assert facts.token_indices == {"": (3, 1)}
    assert facts.rank_pattern.values == {"o_proj": 4}


def test_the_quick_check_needs_no_torch() -> None:
    code = (
        "import sys; from onebase_adapters.format.config import check_config; "
        'check_config(b\'{"peft_type": "LORA"}\'); '
        "sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    )
    source = str(Path(config_fields.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
        ('{"peft_type": "LORA", "r": 8, "r": 4}', "twice"),
        ('{"peft_type": "LORA", "rank_pattern": {"q": 8, "q": 4}}', "twice"),
        ("[" * 100_000, "valid JSON"),
        ('{"a":' * 100_000, "valid JSON"),
        ("[]", "object"),
        ("", "valid JSON"),
        ("\ufeff{}", "valid JSON"),
        ('{"r": 1' + "0" * 5000 + "}", "valid JSON"),
        ('{"peft_type": "LORA"', "valid JSON"),
        (" " * ((1 << 20) + 1), "over 1048576 bytes"),
    ],
    ids=lambda value: f"{value:.30}",
)
def test_a_config_that_is_no_plain_json_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    error = refusal(folder)
    assert error.code == "bad_config"
    assert why in str(error)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_config_in_another_encoding_is_refused(folder: Path, encoding: str) -> None:
    (folder / CONFIG).write_bytes('{"peft_type": "LORA", "revision": "é"}'.encode(encoding))
    assert refusal(folder).code == "bad_config"


@pytest.mark.parametrize("depth", [100, 500, 900, 960, 980, 990])
def test_nesting_near_the_parsers_limit_is_refused_like_any_value(folder: Path, depth: int) -> None:
    for field in ("peft_type", "use_dora", "init_lora_weights", "lora_alpha", "rank_pattern", "new"):
        nested = "[" * depth + "]" * depth
        others = {key: value for key, value in SETTINGS.items() if key != field}
        (folder / CONFIG).write_text(json.dumps(others)[:-1] + f', "{field}": {nested}}}')
        assert refusal(folder).code in {"bad_config", "unsupported_kind", "unknown_field"}
