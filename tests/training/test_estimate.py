"""What a run will take: against PEFT's own count, against what autograd keeps, and as a decision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from tests.hub_standin import HubStandIn
from tests.tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM, JetMoeConfig, LlamaConfig, Qwen3MoeConfig

from onebase_engine.base.default_base import DEFAULT_BASE, DEFAULT_REPO, BaseSpecError, fetch_default_base
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import BaseSettings, base_tensors, load_base
from onebase_engine.base.load import estimate_memory as base_memory
from onebase_training.batches import MicroBatch
from onebase_training.cli.estimate import duration, find_config, main, this_machine
from onebase_training.data.dataset import Sample
from onebase_training.estimate import Estimate, estimate
from onebase_training.events import OpenGate
from onebase_training.recipe import Recipe, RecipeError, parse_recipe, resolve
from onebase_training.trainable import Trainable, resolve_targets

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
ATTENTION = {"r": 32, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
GB = 10**9


def recipe(**settings: Any) -> Recipe:
    return resolve(parse_recipe(settings), rows=1000, held_out=0, base_limit=1 << 20)


def of_8b(settings: dict[str, Any], **options: Any) -> Estimate:
    return estimate(LlamaConfig(**LLAMA_8B), recipe(**settings), **{"longest_row": 512, **options})


def test_llama_8b_with_rank_32_on_attention_has_the_known_size() -> None:
    made = of_8b(ATTENTION)
    assert made.parameters == 27_262_976
    assert f"{made.adapter_bytes / 1e6:.2f} MB" == "109.05 MB"
    assert made.base_parameters == 8_030_261_248
    assert made.base_bytes == base_memory(empty_base(LlamaConfig(**LLAMA_8B)), "nf4").total
    assert made.optimizer_bytes == 2 * made.adapter_bytes
    assert made.adapter_memory == 2 * made.adapter_bytes


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "targets": ["mlp"]},
        {"r": 4, "targets": ["all-linear", "lm_head"], "use_dora": True},
        {"r": 8, "rank_pattern": {"down_proj": 32, "layers.1.self_attn.o_proj": 2}},
    ],
)
def test_parameters_are_those_that_peft_makes(architecture: str, settings: dict[str, Any]) -> None:
    config = ARCHITECTURES[architecture]()
    wanted = recipe(**settings)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
        adapter = LoraConfig(
            r=wanted.r,
            target_modules=resolve_targets(model, wanted.targets),
            use_dora=wanted.use_dora,
            rank_pattern=dict(wanted.rank_pattern),
        )
        peft = get_peft_model(model, adapter)
    count = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
    assert estimate(config, wanted, longest_row=64).parameters == count


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """NF4, of the proportions that real ones have, so that the small things do not matter more than there."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_base(BaseSettings(folder=folder))


class Saved:
    """A tensor that a graph keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(base: Any, settings: Recipe, tokens: int) -> int:
    """Bytes of the tensors saved for the backward pass, but for the base's own."""
    trainable = Trainable(base, settings, OpenGate())
    own = {t.untyped_storage().data_ptr() for t in base_tensors(trainable.model).values()}
    held = weakref.WeakSet[Saved]()

    def keep(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        held.add(saved)
        return saved

    supervised = np.zeros(tokens, bool)
    supervised[tokens // 2 :] = True
    batch = MicroBatch((Sample(np.arange(tokens, dtype=np.int32), supervised, 1),), (0,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        losses, _ = trainable.losses(batch)
    assert losses.requires_grad
    storages = [one.tensor.untyped_storage() for one in held]
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in own}.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ["attention"], "r": 8},
        {"targets": ["mlp"], "r": 64},
        {"targets": ["layers.2.self_attn.q_proj"]},
        {"dropout": 0.1},
        {"use_dora": True},
        {"gradient_checkpointing": True},
    ],
)
def test_activations_and_logits_are_what_autograd_keeps(base: Any, settings: dict[str, Any]) -> None:
    from onebase_training.estimate import activations_of, ranks_of
    from onebase_training.trainable import target_layers

    tokens = 512
    wanted = recipe(**{"gradient_checkpointing": False, **settings})
    model = empty_base(base.config)
    targets = target_layers(model, wanted.targets)
    counted = activations_of(model, targets, ranks_of(targets, wanted), wanted, torch.bfloat16)
    per_token = counted.after + (
        counted.boundary * len(counted.layers) if wanted.gradient_checkpointing else sum(counted.layers)
    )
    expected = tokens * per_token + tokens // 2 * counted.logits
    assert kept_by_autograd(base, wanted, tokens) == pytest.approx(expected, rel=0.1)
    whole = estimate(base.config, wanted, longest_row=tokens, supervised_part=0.5)
    assert whole.activation_bytes + whole.logits_bytes > expected


CHECK = {"type": "string_check", "name": "c", "input": "a", "reference": "a", "operation": "eq"}
REWARDS = {"method": "reinforcement", "grader": json.dumps(CHECK), "gradient_checkpointing": True}


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "tokens", "within"),
    [
        ({"gradient_checkpointing": False}, 512, 0.25),
        ({"gradient_checkpointing": True}, 512, 0.25),
        # Less than what the logits over the temperature take, which is a sixth.
        (REWARDS | {"temperature": 0.7}, 4096, 0.1),
    ],
)
def test_the_peak_of_a_real_step_is_near_the_estimate(
    settings: dict[str, Any], tokens: int, within: float
) -> None:
    script = Path(__file__).with_name("peak_of_a_step.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, script, json.dumps({**settings, "micro_tokens": tokens}), str(tokens)],
        env=environment,
        capture_output=True,
        check=True,
    )
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["estimated"] == pytest.approx(sizes["measured"], rel=within)


def test_logits_over_a_temperature_are_counted() -> None:
    def logits(temperature: float) -> int:
        return of_8b(ATTENTION | REWARDS | {"temperature": temperature, "micro_tokens": 1024}).logits_bytes

    assert logits(0.7) - logits(1.0) == 1024 * 2 * LLAMA_8B["vocab_size"]  # type: ignore[operator]


def test_memory_grows_with_what_is_asked() -> None:
    plain = of_8b(ATTENTION, device="cuda")
    assert of_8b({**ATTENTION, "optimizer": "adamw_8bit"}).optimizer_bytes < plain.optimizer_bytes / 3
    assert of_8b(ATTENTION, device="cuda", base_resident=True).base_bytes == 0
    assert of_8b(ATTENTION, device="cuda", supervised_part=0.1).logits_bytes < plain.logits_bytes / 2
    assert of_8b({**ATTENTION, "targets": ["lm_head"]}, device="cuda").logits_bytes > plain.logits_bytes
    int8 = of_8b(ATTENTION, quantization="int8")
    assert plain.base_bytes < int8.base_bytes < of_8b(ATTENTION, quantization="none").base_bytes
    half = of_8b({**ATTENTION, "gradient_checkpointing": True, "micro_tokens": 4096})
    assert half.activation_bytes < of_8b({**ATTENTION, "micro_tokens": 4096}).activation_bytes / 4


def test_parts_and_the_total_agree_in_json() -> None:
    made = of_8b(ATTENTION, memory_limit=10 * GB).to_json()
    parts = ("base_bytes", "adapter_memory", "optimizer_bytes", "activation_bytes", "logits_bytes")
    assert made["total"] == sum(made[part] for part in parts) + made["process_bytes"]
    assert json.loads(json.dumps(made)) == made


def test_activations_are_kept_where_there_is_room_and_computed_twice_where_not() -> None:
    roomy = of_8b(ATTENTION, device="cuda", memory_limit=200 * GB)
    assert (roomy.micro_tokens, roomy.gradient_checkpointing, roomy.fits) == (8192, False, True)
    tight = of_8b(ATTENTION, device="cuda", memory_limit=12 * GB)
    assert (tight.gradient_checkpointing, tight.fits) == (True, True)
    tiny = of_8b(ATTENTION, device="cuda", memory_limit=8 * GB)
    assert (tiny.micro_tokens, tiny.gradient_checkpointing) == (1024, True)
    assert tight.total < 12 * GB < roomy.total
    assert of_8b(ATTENTION, device="cpu").micro_tokens <= 2048
    settings = recipe(**ATTENTION)
    assert tight.applied_to(settings) == replace(
        settings, micro_tokens=tight.micro_tokens, gradient_checkpointing=True
    )


def test_what_the_recipe_says_is_not_decided_anew() -> None:
    fixed = {**ATTENTION, "micro_tokens": 700, "gradient_checkpointing": False}
    made = of_8b(fixed, memory_limit=GB)
    assert (made.micro_tokens, made.gradient_checkpointing, made.fits) == (700, False, False)


def test_a_micro_batch_holds_the_longest_row() -> None:
    assert of_8b(ATTENTION, device="cuda", longest_row=20_000).micro_tokens == 20_000
    assert of_8b({**ATTENTION, "micro_tokens": 64}, longest_row=900).micro_tokens == 900


@pytest.mark.parametrize(
    ("settings", "limit", "row", "advice", "changes"),
    [
        (
            {"gradient_checkpointing": False, "micro_tokens": 4096},
            12 * GB,
            512,
            "gradient_checkpointing = true and micro_tokens = auto",
            {"gradient_checkpointing": True, "micro_tokens": "auto"},
        ),
        ({}, 14 * GB, 8192, "max_length = 4096", {}),
        ({"r": 512}, 24 * GB, 512, "optimizer = adamw_8bit", {"optimizer": "adamw_8bit"}),
        ({"r": 512}, 24 * GB, 512, "r = 256", {"r": 256}),
    ],
)
def test_what_does_not_fit_says_what_to_change_and_that_helps(
    settings: dict[str, Any], limit: int, row: int, advice: str, changes: dict[str, Any]
) -> None:
    made = of_8b(settings, device="cuda", longest_row=row, memory_limit=limit)
    assert not made.fits
    assert advice in made.advice
    assert f"{made.total / 1e9:.1f} GB" in made.advice
    shorter = 4096 if "max_length" in advice else row
    changed = of_8b({**settings, **changes}, device="cuda", longest_row=shorter, memory_limit=limit)
    assert changed.fits
    assert changed.advice == ""


def test_a_base_without_room_is_said_to_be_too_large() -> None:
    assert "smaller base" in of_8b(ATTENTION, memory_limit=4 * GB).advice


def test_time_follows_tokens_speed_and_work() -> None:
    known = {"rate": 1e13, "total_tokens": 100_000, "device": "cuda"}
    plain = of_8b(ATTENTION, **known).seconds
    assert plain is not None
    assert of_8b(ATTENTION, **{**known, "total_tokens": 200_000}).seconds == pytest.approx(2 * plain)
    assert of_8b(ATTENTION, **{**known, "rate": 2e13}).seconds == pytest.approx(plain / 2)
    twice = of_8b({**ATTENTION, "gradient_checkpointing": True}, **known).seconds
    assert twice == pytest.approx(1.5 * plain, rel=0.1)
    assert plain == pytest.approx(100_000 * 4 * 8e9 / 1e13, rel=0.1)
    assert of_8b(ATTENTION, total_tokens=1).seconds is None


def test_a_target_that_the_base_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="qkv_proj"):
        of_8b({"targets": ["qkv_proj"]})


def test_the_rate_of_this_machine_is_measured() -> None:
    measured = this_machine(torch.device("cpu"), torch.bfloat16)
    assert 1e6 < measured.rate < 1e15
    assert 0 < measured.memory < 1 << 62
    assert this_machine(torch.device("cpu"), torch.bfloat16, 5).memory == 5


def test_a_config_is_found_in_a_folder_or_as_a_file_without_any_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for spec in (tmp_path, tmp_path / "config.json"):
        assert find_config(str(spec)).num_hidden_layers == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "not the config of a base"),
        ('{"model_type": "t5"}', "decoder-only"),
        ("no json", "not the config"),
    ],
)
def test_what_is_no_config_of_a_base_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseSpecError, match=words):
        find_config(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseSpecError, match=r"has no config\.json"):
        find_config(str(tmp_path / "empty"))


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def test_the_command_prints_the_known_size(llama_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", llama_8b, "--r", "32", "--targets", "q_proj,k_proj,v_proj,o_proj"]
    assert main([*arguments, "--gpu", "h100", "--rows", "1000"]) == 0
    printed = capsys.readouterr().out
    # Of 1,000 rows 100 are held out; the rest is 256 tokens each, three times.
    for text in ("27,262,976", "109.05 MB", "8,030,261,248", "peak", "fits in", "691,200 tokens"):
        assert text in printed


def test_the_command_prints_json_and_fails_when_it_does_not_fit(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--base", llama_8b, "--memory", "4GB", "--gpu", "t4", "--json"]) == 1
    made = json.loads(capsys.readouterr().out)
    assert (made["memory_limit"], made["fits"], made["machine"]) == (4 * GB, False, "t4")
    assert main(["--base", llama_8b, "--memory", "4GB", "--gpu", "t4"]) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_experts_count_in_4_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Qwen3MoeConfig(num_hidden_layers=48).save_pretrained(tmp_path)
    assert main(["--base", str(tmp_path), "--memory", "80GB", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["base_parameters"] > 30e9
    assert made["fits"]
    assert made["flops_per_token"] > 4 * 2.5e9, "of experts those that a token uses"


def test_experts_of_their_own_kind_get_a_sentence_instead_of_an_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    JetMoeConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["--base", str(tmp_path), "--gpu", "h100"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "Choose a mixture whose experts" in " ".join(said.err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "voodoo2"], "not in the table"),
        (["--memory", "lots"], "write it as in 20GB"),
        (["--rows", "0"], "above 0"),
        (["--r", "0"], "--r: r is 0"),
        (["--targets", "nothing"], "targets"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_data_that_cannot_be_read_is_named_without_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "missing.jsonl"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("onebase: missing.jsonl: ")
    assert "usage" not in said


def test_real_data_is_read_for_its_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Say " + "well " * n, "completion": " done"} for n in (3, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--data", str(tmp_path / "rows.jsonl"), "--epochs", "2", "--json"]) == 0
    assert 60 < json.loads(capsys.readouterr().out)["total_tokens"] < 300


def test_the_time_is_that_of_the_steps_that_are_made(
    llama_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base", llama_8b, "--gpu", "h100", "--rows", "3000", "--row-tokens", "100", "--json"]
    arguments += ["--batch-size", "8", "--epochs", "2"]

    def tokens(*more: str) -> int:
        assert main([*arguments, *more]) == 0
        found: int = json.loads(capsys.readouterr().out)["total_tokens"]
        return found

    assert tokens() == 2 * 2800 * 100
    assert tokens("--eval-split", "0") == 2 * 3000 * 100
    assert tokens("--max-steps", "5") == 5 * 8 * 100


def test_the_default_base_is_asked_for_its_tokenizer_on_the_hub_if_it_is_not_here(tmp_path: Path) -> None:
    folder = fetch_default_base()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
    code = "import sys; from onebase_training.cli.estimate import find_tokenizer as find; "
    code += "print(len(find(sys.argv[1])))"
    with HubStandIn() as hub:
        hub.add_repo(DEFAULT_REPO, files)
        environment = {**os.environ, **hub.environment(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", code, DEFAULT_BASE],
            env={**environment, "ONEBASE_CACHE": str(tmp_path / "none")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40_000
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (9000, "2 h 30 min"), (300_000, "3 days")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
