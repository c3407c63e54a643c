"""Small runs for the tests: a tiny base, rows that can be learned, and a trainer over both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.tiny import save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_training.checkpoint import Checkpoints, RunReport
from onebase_training.data.dataset import Dataset, Preference, Row, Sample
from onebase_training.events import Event, Gate, OpenGate
from onebase_training.loop import Trainer
from onebase_training.objectives import make_objective
from onebase_training.recipe import Recipe, parse_recipe, resolve
from onebase_training.trainable import Trainable

VOCABULARY = 320


def tiny_base(folder: Path, architecture: str = "llama", **settings: Any) -> torch.nn.Module:
    """NF4 over a random model that is saved in `folder` the first time."""
    if not (folder / "config.json").exists():
        save_base(architecture, folder)
    return load_base(BaseSettings(folder=folder, **settings))


def sample(rng: np.random.Generator, line: int, longest: int = 40) -> Sample:
    """A random prompt and the reply that all rows have, cut somewhere."""
    prompt = rng.integers(3, VOCABULARY, int(rng.integers(2, longest - 12)))
    reply = [50 + 7 * place for place in range(int(rng.integers(1, 12)))]
    ids = np.array([*prompt, *reply], dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    supervised[len(prompt) :] = True
    return Sample(ids, supervised, line)


def samples(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return dataset([sample(rng, line) for line in range(1, count + 1)])


def noise(count: int, seed: int = 0) -> Dataset:
    """Rows whose replies have nothing to do with those of `samples`."""
    return dataset([row.rejected for row in preferences(count, seed).rows if isinstance(row, Preference)])


def preferences(count: int, seed: int = 0) -> Dataset:
    """Pairs of replies to one prompt."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for line in range(1, count + 1):
        chosen = sample(rng, line)
        reply = chosen.supervised
        ids = chosen.ids.copy()
        ids[reply] = rng.integers(3, VOCABULARY, int(reply.sum()))
        rows.append(Preference(chosen, Sample(ids, reply, line)))
    return dataset(rows)


def labelled(count: int, seed: int = 0, labels: tuple[str, ...] = ("no", "so-so", "yes")) -> Dataset:
    """Random texts; the label says which token is their last but one."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for line in range(1, count + 1):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(16, 44))).astype(np.int32)
        label = int(rng.integers(len(labels)))
        ids[-2] = 40 + 60 * label
        rows.append(Sample(ids, np.arange(len(ids)) == len(ids) - 1, line, label=labels[label]))
    return dataset(rows)


def dataset(rows: list[Row] | list[Sample]) -> Dataset:
    return Dataset(list(rows))


def recipe_for(data: Dataset, **settings: Any) -> Recipe:
    """Resolved, with small steps."""
    asked = {"batch_size": 4, "micro_tokens": 64, "learning_rate": 5e-3, "max_steps": 6, **settings}
    asked.setdefault("gradient_checkpointing", False)
    made = resolve(parse_recipe(asked), rows=len(data), held_out=0, base_limit=512)
    return replace(made)


def trainer(
    base: torch.nn.Module,
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    *,
    held_out: Dataset | None = None,
    listen: Callable[[Event], None] = lambda event: None,
    gate: Gate | None = None,
    **more: Any,
) -> Trainer:
    made = Trainable(base, recipe, gate or OpenGate(), labels=data.labels, **more)
    return Trainer(
        made,
        make_objective(made, recipe),
        recipe,
        data,
        held_out,
        checkpoints=Checkpoints(folder / "checkpoints", recipe.keep),
        identity="test",
        listen=listen,
    )


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    """The adapter as it is now, copied."""
    return {name: one.detach().clone() for name, one in run.trainable.named_parameters().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def talking_base(folder: Path, kind: str = "LlamaConfig", **fields: Any) -> Path:
    """A small random model with the default base's tokenizer and chat template, as a folder.

    kind: the class of its config; fields: more of that.
    """
    import shutil

    import transformers as tf

    from onebase_engine.base.default_base import fetch_default_base

    default = fetch_default_base()
    torch.manual_seed(0)
    config = tf.AutoConfig.from_pretrained(default, local_files_only=True)
    small = getattr(tf, kind)(
        vocab_size=config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        **{"tie_word_embeddings": True, "max_position_embeddings": 512, **fields},
    )
    tf.AutoModelForCausalLM.from_config(small, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (default / name).exists():
            shutil.copyfile(default / name, folder / name)
    return folder


def write_chats(path: Path, count: int, first: int = 0) -> Path:
    """A JSONL file of conversations that end in one of two replies."""
    import json

    lines = []
    for number in range(first, first + count):
        color = ("red", "blue")[number % 2]
        messages = [
            {"role": "user", "content": f"Item {number} is {color}. Which colour?"},
            {"role": "assistant", "content": f'{{"colour": "{color}"}}'},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def finished_report(**changes: Any) -> RunReport:
    """What came of a short run."""
    facts: dict[str, Any] = {
        "name": "n", "base": "b", "quantization": "nf4", "steps": 4, "best_step": 4, "tokens": 400,
        "seconds": 8.0, "parameters": 10, "adapter_bytes": 2_000_000, "loss_before": 3.0, "loss_after": 1.5,
        "metrics_before": {}, "metrics_after": {}, "better": True, "losses": [], "held_out": [], "recipe": {},
        "peak_memory_bytes": 10**9,
    }  # fmt: skip
    return RunReport(**(facts | changes))


def start_at_a_terminal(program: list[str], *arguments: str) -> subprocess.Popen[str]:
    """Python with a program that Ctrl-C reaches, and whose stderr is to be read."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / part) for part in ("adapters", "engine", "server", "clients/python"))
    # A shell's background starts its commands with Ctrl-C ignored; here it is not.
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
