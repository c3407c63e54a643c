"""The api's process loads no torch, and its tokenizers are the same without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from . import torch_free
from .support import HERE, serving, upload
from .training_support import openai_client, run_job

HEAVY = {"torch", "bitsandbytes", "peft", "accelerate", "datasets"}
CORPUS = ["The capital of France is Paris. don't 1234567 <extra>", "naïve café\n\ttabs  and  spaces"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def metaspace() -> Tokenizer:
    """As Llama 2's: a space before the text, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_of], show_progress=False)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_level(digits: bool = False) -> Tokenizer:
    """As GPT-2's, or with one token for each digit."""
    tokenizer = Tokenizer(models.BPE())
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if digits else parts[0]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<extra>", lstrip=True)])
    return tokenizer


def cut_and_padded() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


CLASSES: list[tuple[str, str, Callable[[], Tokenizer]]] = [
    ("llama", "LlamaTokenizer", metaspace),
    ("llama", "LlamaTokenizerFast", byte_level),
    ("llama", "PreTrainedTokenizerFast", metaspace),
    ("llama", "GPT2Tokenizer", lambda: byte_level(digits=True)),
    ("llama", "TokenizersBackend", cut_and_padded),
    ("gemma2", "GemmaTokenizer", metaspace),
    ("qwen2", "Qwen2Tokenizer", lambda: byte_level(digits=True)),
    ("qwen3", "Qwen2Tokenizer", byte_level),
    ("phi3", "LlamaTokenizer", metaspace),
    ("gpt_neox", "GPTNeoXTokenizerFast", byte_level),
    ("mistral", "LlamaTokenizer", metaspace),
    ("no_such_model", "NoSuchTokenizer", byte_level),
]


def make_base(folder: Path, model_type: str, name: str, tokenizer: Tokenizer, *, files: bool = False) -> Path:
    """A folder with a tokenizer and no weights; `files`: vocabulary and merges instead of tokenizer.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {
        "tokenizer_class": name, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "add_bos_token": True, "legacy": False, "chat_template": TEMPLATE,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if files:
        tokenizer.model.save(str(folder))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bases(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("bases")
    made = {
        f"{model_type} {name}": make_base(parent / str(number), model_type, name, make())
        for number, (model_type, name, make) in enumerate(CLASSES)
    }
    made["files"] = make_base(parent / "files", "gpt2", "GPT2Tokenizer", byte_level(), files=True)
    made["bytes"] = make_base(parent / "bytes", "gpt2", "ByT5Tokenizer", byte_level(), files=True)
    return {"default": base_folder, **made}


@pytest.fixture(scope="module")
def without_torch(bases: dict[str, Path]) -> dict[str, Any]:
    """What a process that has no torch says of each base."""
    command = [sys.executable, str(HERE / "torch_free.py"), *map(str, bases.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stderr
    said = json.loads(done.stdout)
    assert said["torch"] is False
    return {name: said["found"][str(folder)] for name, folder in bases.items()}


@pytest.mark.parametrize(
    "name", ["default", *(f"{kind} {cls}" for kind, cls, _ in CLASSES), "files", "bytes"]
)
def test_a_tokenizer_is_the_same_without_torch(
    bases: dict[str, Path], without_torch: dict[str, Any], name: str
) -> None:
    reference = AutoTokenizer.from_pretrained(bases[name])
    backend = getattr(reference, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    found = without_torch[name]

    assert found == torch_free.results(str(bases[name]))
    assert found["class"] == type(reference).__name__
    assert found["ids"] == [reference.encode(text) for text in torch_free.TEXTS]
    if found["chat"] != ["no_chat_template"]:
        chat = list(torch_free.CHAT)
        assert found["chat"] == reference.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )


def test_the_api_imports_no_torch_whatever_it_is_asked() -> None:
    command = [sys.executable, "-X", "importtime", str(HERE / "serve_scripted.py"), "words"]
    with serving(command) as server, server.client() as http:
        assert upload(http, "acme", b"acme", query="wait=true&activate=true").status_code == 200
        chat = {"model": "acme", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        http.post("/v1/chat/completions", json=chat).raise_for_status()
        http.post("/generate", json={"prompt": "one", "max_tokens": 2, "adapter": "acme"}).raise_for_status()
        assert run_job(server, openai_client(server), "rows").status == "succeeded"
        for path in ("/v1/adapters", "/metrics", "/status", "/openapi.json"):
            http.get(path).raise_for_status()
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        imported = {
            line.rpartition("|")[2].strip().partition(".")[0]
            for line in server.log.splitlines()
            if line.startswith("import time:")
        }

    assert "transformers" in imported
    assert not HEAVY & imported
    assert "libtorch" not in maps
