"""Tokenizers, templates and files for the tests of training data."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_training.data.dataset import DataError, Dataset, RowError, Sample
from onebase_training.data.reader import load_dataset
from onebase_training.data.rows import parse_row
from onebase_training.recipe import Recipe, parse_recipe

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen's way: the thinking of a reply is dropped once the user has spoken again.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_MARKS = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "Be brief."}
_SPECIAL = {
    LLAMA_3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}


@functools.cache
def base_tokenizer(template: str | None = "own") -> Any:
    """The default base's tokenizer, with its own chat template, another one or none. Not to be changed."""
    folder = resolve_base(DEFAULT_BASE).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if template != "own":
        tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL.get(template or "", [])})
        tokenizer.chat_template = template
    return tokenizer


@functools.cache
def metaspace_tokenizer() -> Any:
    """As Llama 2's: a space is put before the first word of all, and <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    letters = "abcdefghijklmnopqrstuvwxyz .,!?[]/INST\n"
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=list(letters))
    made.train_from_iterator(["[INST] what is it [/INST] it is this or that", letters], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA_2
    return tokenizer


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(row: dict[str, Any], method: Any = "supervised") -> tuple[str, str]:
    """Field and reason."""
    with pytest.raises(RowError) as caught:
        parse_row(row, method)
    return caught.value.field, caught.value.reason


def written(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def problems(path: Path, **settings: Any) -> list[tuple[int, str, str]]:
    """Line, field and reason of everything that is wrong with a file."""
    with pytest.raises(DataError) as caught:
        load_dataset(path, base_tokenizer(), recipe(**settings))
    return [(each.line, each.field, each.reason) for each in caught.value.problems]


Load = Callable[..., Dataset]
"""`load(*rows, tokenizer=, name=, **fields of the recipe)`"""


def rows_loader(folder: Path) -> Load:
    def load(*rows: Any, tokenizer: Any = None, name: str = "rows", **fields: Any) -> Dataset:
        path = write_rows(folder / f"{name}.jsonl", rows)
        return load_dataset(path, tokenizer or base_tokenizer(), recipe(**fields))

    return load


def reason(load: Load, *rows: Any, **more: Any) -> str:
    """What is said when the rows cannot be loaded."""
    with pytest.raises(DataError) as caught:
        load(*rows, **more)
    return str(caught.value)


def recipe(**settings: Any) -> Recipe:
    return parse_recipe(settings)


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """A row of messages in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)], **more}


def learned(sample: Any, tokenizer: Any) -> str:
    assert isinstance(sample, Sample)
    return str(tokenizer.decode(sample.ids[sample.supervised], clean_up_tokenization_spaces=False))


def whole(sample: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(sample.ids, clean_up_tokenization_spaces=False))


def only(dataset: Dataset) -> Sample:
    (row,) = dataset.rows
    assert isinstance(row, Sample)
    return row
