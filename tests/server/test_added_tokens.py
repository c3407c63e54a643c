"""What an adapter's tokenizer adds to the base's: found by comparing files, encoded as transformers does."""

from __future__ import annotations

import copy
import json
import time
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.server.test_control_tokens import CHATML, byte_level, folding, metaspace, unigram, words, wrapped
from tokenizers import AddedToken
from transformers import AutoTokenizer

from onebase_adapters.format import added_tokens
from onebase_adapters.format.added_tokens import (
    LONGEST_TOKEN,
    MOST_ADDED,
    TOKENIZER_FIELD,
    BaseVocabulary,
    checked_additions,
    read_folder,
    with_tokens,
)
from onebase_adapters.format.config import AdapterFormatError, check_config
from onebase_engine.machine import thread_seconds
from onebase_protocol.adapters import TokenizerAdditions
from onebase_server.inference import tokenization
from onebase_server.inference.tokenization import BaseTokenizer, TokenizerError, Tokenizers

KINDS = {
    "byte level": byte_level,
    "merges ignored": lambda special: byte_level(special, ignore_merges=True),
    "metaspace": metaspace,
    "unigram": unigram,
    "whole words": words,
    "normalized": folding,
}
OF_BASE = ["<|endoftext|>", "<|pad|>"]
NEW = ["<|im_start|>", "<|im_end|>", "<tool>", "capitalism"]
CONFIG = b'{"peft_type": "LORA", "modules_to_save": ["embed_tokens"]}'


class Case:
    """A base's tokenizer, and the same with tokens that transformers itself added."""

    def __init__(self, kind: str, place: Path) -> None:
        wrapped(KINDS[kind](OF_BASE), CHATML).save_pretrained(place / "base")
        self.base = BaseTokenizer(str(place / "base"))
        self.theirs = AutoTokenizer.from_pretrained(place / "base")
        self.theirs.add_special_tokens({"additional_special_tokens": NEW[:2]})
        self.theirs.add_tokens([NEW[2], AddedToken(NEW[3], single_word=True, normalized=True)])
        self.theirs.eos_token = NEW[1]
        self.theirs.save_pretrained(place / "adapter")
        self.folder = place / "adapter"
        (self.folder / "adapter_config.json").write_bytes(CONFIG)
        self.weights = self.folder / "adapter_model.safetensors"
        save_file({"base_model.model.model.embed_tokens.weight": np.ones((1, 1), np.float32)}, self.weights)
        self.own = Tokenizers(self.base).of(self.added, 0)

    def config(self, read: Any = None, base: BaseVocabulary | None = None) -> bytes:
        return with_tokens(
            CONFIG, self.weights, read or read_folder(self.folder), lambda: base or self.base.vocabulary
        )

    @property
    def added(self) -> TokenizerAdditions:
        found, problem = checked_additions(check_config(self.config()).tokenizer)
        assert found is not None, problem
        return found


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("case"))


def test_the_added_tokens_are_found_with_their_ids_and_ends(case: Case) -> None:
    added, first = case.added, len(case.theirs) - len(NEW)
    assert [(token.id, token.content) for token in added.tokens] == [
        (first + place, text) for place, text in enumerate(NEW)
    ]
    assert [token.special for token in added.tokens] == [True, True, False, False]
    assert added.tokens[3].single_word
    assert added.end_tokens == (first + 1,)
    assert added.chat_template == CHATML


PIECES = st.lists(
    st.sampled_from(
        [*NEW, *OF_BASE, " ", "\n", "The capital", "capital", "ism", "naïve", "<", "|", "im", ">"]
    )
    | st.text(max_size=6),
    max_size=12,
)


@given(pieces=PIECES)
@settings(max_examples=150)
def test_texts_become_the_ids_that_transformers_gives_them_and_back(case: Case, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = case.theirs.encode(text)
    assert case.own.encode(text) == ids
    assert case.own.decode(ids) == case.theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    decoder = case.own.pieces()
    assert "".join([*(decoder.push(token) for token in ids), decoder.flush()]) == case.own.decode(ids)


@given(pieces=PIECES)
@settings(max_examples=50)
def test_the_base_reads_texts_as_before(case: Case, pieces: list[str]) -> None:
    text = "".join(pieces)
    plain = AutoTokenizer.from_pretrained(case.base._folder) if not hasattr(case, "plain") else case.plain
    case.plain = plain  # type: ignore[attr-defined]
    assert case.base.encode(text) == plain.encode(text)


def test_a_folder_without_new_tokens_or_rows_changes_nothing(case: Case, tmp_path: Path) -> None:
    base = read_folder(Path(case.base._folder))
    assert case.config(base) == CONFIG
    assert case.config(lambda name: None) == CONFIG
    plain = tmp_path / "plain.safetensors"
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": np.ones((1, 1), np.float32)}, plain)
    bare = b'{"peft_type": "LORA"}'
    assert with_tokens(bare, plain, read_folder(case.folder), lambda: case.base.vocabulary) == bare
    assert with_tokens(CONFIG, plain, read_folder(case.folder), lambda: None) == CONFIG


def test_a_model_is_read_only_where_its_text_is_not_the_bases(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, tokenizer = case.config(), json.loads((case.folder / "tokenizer.json").read_text())
    monkeypatch.setattr(added_tokens, "_digest_apart", None)  # to call it would fail
    assert case.config() == expected
    monkeypatch.undo()

    def read(name: str) -> bytes | None:
        return json.dumps(tokenizer).encode() if name == "tokenizer.json" else read_folder(case.folder)(name)

    before = thread_seconds() - time.thread_time()
    assert case.config(read) == expected
    assert thread_seconds() - time.thread_time() > before + 0.001, "the process that reads it counts"


def changed(case: Case, change: Any) -> str:
    """The problem with a tokenizer's file that was changed."""
    data = json.loads((case.folder / "tokenizer.json").read_text())
    change(data)
    text = json.dumps(data, indent=2, ensure_ascii=False).encode()  # as the library writes it

    def read(name: str) -> bytes | None:
        return text if name == "tokenizer.json" else read_folder(case.folder)(name)

    found = json.loads(case.config(read))[TOKENIZER_FIELD]
    assert found.keys() == {"problem"}
    assert checked_additions(found) == (None, found["problem"])
    return str(found["problem"])


def test_another_tokenizer_is_named(case: Case) -> None:
    def renamed(data: Any) -> None:
        data["added_tokens"][0]["content"] = "<other>"

    def gap(data: Any) -> None:
        data["added_tokens"][-1]["id"] += 5

    def smaller(data: Any) -> None:
        vocab = data["model"]["vocab"]
        vocab.popitem() if isinstance(vocab, dict) else vocab.pop()

    def many(data: Any) -> None:
        last = data["added_tokens"][-1]
        for number in range(MOST_ADDED):
            data["added_tokens"].append({**last, "id": last["id"] + 1 + number, "content": f"<{number}>"})

    def long(data: Any) -> None:
        data["added_tokens"][-1]["content"] = "x" * (LONGEST_TOKEN + 1)

    def twice(data: Any) -> None:
        data["added_tokens"][-1]["content"] = data["added_tokens"][-2]["content"]

    def no_merges(data: Any) -> None:
        data["model"]["merges"] = 1

    def no_model(data: Any) -> None:
        del data["model"]

    assert "<other>" in changed(case, renamed)
    assert "follow" in changed(case, gap)
    assert "vocabulary" in changed(case, smaller)
    assert str(MOST_ADDED) in changed(case, many)
    assert str(LONGEST_TOKEN) in changed(case, long)
    assert "same text" in changed(case, twice)
    assert "model" in changed(case, no_model)
    assert "$.merges" in changed(case, no_merges)


def with_template(case: Case, template: Any) -> dict[str, Any]:
    """The field of an adapter whose tokenizer_config.json has this chat template."""

    def read(name: str) -> bytes | None:
        if name == "tokenizer_config.json":
            return json.dumps({"chat_template": template}).encode()
        return None if name == "chat_template.jinja" else read_folder(case.folder)(name)

    found: dict[str, Any] = json.loads(case.config(read))[TOKENIZER_FIELD]
    return found


def test_a_template_that_no_message_can_carry_is_named(case: Case) -> None:
    assert "UTF-8" in with_template(case, "a\ud800")["problem"]


def test_of_several_templates_the_default_one_is_read_whatever_the_others_are(case: Case) -> None:
    templates = [{"name": [], "template": "x"}, "y", {"name": "default", "template": "z"}]
    assert with_template(case, templates)["chat_template"] == "z"
    assert with_template(case, templates[:2])["chat_template"] is None


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"tokens": []},
        {"tokens": [{"id": -1, "content": "a"}]},
        {"tokens": [{"id": 1 << 40, "content": "a"}]},
        {"tokens": [{"id": 5, "content": ""}]},
        {"tokens": [{"id": 5, "content": "a"}, {"id": 7, "content": "b"}]},
        {"tokens": [{"id": 5, "content": "a"}, {"id": 6, "content": "a"}]},
        {"tokens": [{"id": 5 + i, "content": f"{i:100}"} for i in range(200)]},
        {"tokens": [{"id": 5, "content": "a"}], "end_tokens": [6]},
        {"tokens": [{"id": 5, "content": "a"}], "end_tokens": [0] * 17},
        {"tokens": [{"id": 5, "content": "a"}], "chat_template": "x" * ((64 << 10) + 1)},
        {"tokens": [{"id": 5, "content": "a"}], "chat_template": "\ud800"},
        {"problem": 1},
        {"problem": "\ud800"},
        {"problem": "x" * 1000},
    ],
    ids=lambda value: f"{value!r:.50}",
)
def test_a_field_that_is_no_addition_is_refused(value: Any) -> None:
    with pytest.raises(AdapterFormatError, match=TOKENIZER_FIELD) as refused:
        checked_additions(value)
    assert refused.value.code == "bad_config"


def test_tokens_that_would_get_other_ids_are_refused(case: Case) -> None:
    added = case.added
    for shift in (-1, 1):
        tokens = tuple(
            type(token)(id=token.id + shift, content=token.content, special=token.special)
            for token in added.tokens
        )
        with pytest.raises(TokenizerError, match=r"im_start"):
            Tokenizers(case.base).of(TokenizerAdditions(tokens=tokens), 0)
    known = copy.copy(added.tokens[0])
    taken = type(known)(id=known.id, content="<|pad|>")
    with pytest.raises(TokenizerError, match="pad"):
        Tokenizers(case.base).of(TokenizerAdditions(tokens=(taken,)), 0)


def test_the_tokenizers_used_last_are_kept_and_those_in_use(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "MOST_TOKENIZERS", 2)
    tokenizers = Tokenizers(case.base)
    reports = {
        str(words): {"vocabulary": words, "tokenizer": msgspec.to_builtins(case.added)} for words in range(4)
    }
    built = [weakref.ref(tokenizers.of_version(name, reports[name])) for name in "012"]
    assert [one() is None for one in built] == [True, False, False]
    assert tokenizers.of_version("1", reports["1"]) is built[1]()
    in_use = tokenizers.of_version("3", reports["3"])
    assert [one() is None for one in built] == [True, False, True]
    tokenizers.of_version("0", reports["0"])
    tokenizers.of_version("2", reports["2"])
    assert tokenizers.of_version("3", reports["3"]) is in_use


def test_a_check_keeps_no_tokenizer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def extended(*given: Any) -> BaseTokenizer:
        made = BaseTokenizer.extended(case.base, *given)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(case.base, "extended", extended)
    tokenizers = Tokenizers(case.base)
    tokenizers.check(case.added)
    assert [one() for one in built] == [None]
