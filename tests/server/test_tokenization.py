"""The base's tokenizer: prompts, chats, bytes of tokens, and many threads at once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onebase_edge.errors import InvalidRequestError
from onebase_engine.base.chat import encode_texts
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput


def test_a_chat_is_tokenized_as_the_bases_tokenizer_does_it(
    tokenizer: BaseTokenizer, base_folder: str
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🎉"}]
    reference = AutoTokenizer.from_pretrained(base_folder)

    ids = tokenizer.encode_chat(TemplateInput(messages))

    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(reference.bos_token_id) == reference.decode(ids).count(reference.bos_token)


@cache
def _two_alike(folder: str) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    return AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    " ",
    "\n\n",
    "1234567",
    "naïve 🎉 漢字",
    "\x00",
    "\ud7ff",
)


@given(
    st.lists(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(PIECES)), max_size=40), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_texts_get_the_ids_that_transformers_gives_them(
    base_folder: str, texts: list[list[str]], special: bool, split: bool
) -> None:
    asked = ["".join(pieces) for pieces in texts]
    reference, tokenizer = _two_alike(base_folder)
    reference.split_special_tokens = tokenizer.split_special_tokens = split
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)

    assert encode_texts(tokenizer, asked, special) == [
        reference.encode(text, add_special_tokens=special) for text in asked
    ]


def test_a_long_text_gets_the_same_ids_from_threads_that_leave_the_processor_to_the_engine(
    base_folder: str,
) -> None:
    # In a process of its own: the library begins its threads once, and keeps their niceness.
    code = f"""
import os, threading, time
from transformers import AutoTokenizer
from onebase_engine.base import chat
from onebase_engine.machine import BESIDE_SERVING, thread_seconds

chat.begin_tokenizing_aside()
tokenizer = AutoTokenizer.from_pretrained({str(base_folder)!r})
text = "a word, " * (chat.LONG_CHARACTERS // 4)
usual = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
own, all_of_it = time.thread_time(), thread_seconds()
with chat.tokenized_aside():
    found = chat.encode_texts(tokenizer, [text, "short"])
own, all_of_it = time.thread_time() - own, thread_seconds() - all_of_it
assert found == [tokenizer.backend_tokenizer.encode(one).ids for one in (text, "short")]
nice = [os.getpriority(os.PRIO_PROCESS, int(one)) for one in os.listdir("/proc/self/task")]
assert max(nice) == min(19, usual + BESIDE_SERVING), nice
assert all_of_it > 2 * own, (all_of_it, own)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tokenizer_that_encodes_in_its_own_way_does_so(base_folder: str) -> None:
    class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: list[str], *given: object, **named: object) -> object:
            return super()._encode_plus([one.upper() for one in text], *given, **named)

    plain = AutoTokenizer.from_pretrained(base_folder)
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer)

    assert encode_texts(shouting, ["loud"]) == [plain.encode("LOUD", add_special_tokens=False)]


def test_the_bytes_of_all_tokens_make_the_text(tokenizer: BaseTokenizer) -> None:
    text = "naïve 🎉 漢字\n\ttabs"

    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)).decode() == text


def test_special_tokens_are_no_text_but_have_a_name(tokenizer: BaseTokenizer) -> None:
    (end,) = tokenizer.encode("<|im_end|>")

    assert tokenizer.text_bytes(end) == b""
    assert tokenizer.token_text(end) == "<|im_end|>"
    assert tokenizer.decode([end]) == ""


def test_half_a_character_is_written_as_bytes(tokenizer: BaseTokenizer) -> None:
    first, *_ = tokenizer.encode("🦩")

    assert tokenizer.token_text(first).startswith("bytes:\\x")


def test_an_unused_id_is_empty(tokenizer: BaseTokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""


def test_threads_share_one_tokenizer(tokenizer: BaseTokenizer) -> None:
    texts = [f"text number {number} 🎉 " * 50 for number in range(64)]
    expected = [tokenizer.encode(text) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_a_base_without_a_chat_template_says_what_to_use_instead(
    tokenizer: BaseTokenizer, base_folder: str
) -> None:
    bare = BaseTokenizer(str(base_folder))
    bare._tokenizer.chat_template = None

    with pytest.raises(InvalidRequestError, match="/v1/completions") as caught:
        bare.encode_chat(TemplateInput([{"role": "user", "content": "hi"}]))
    assert caught.value.code == "no_chat_template"


def test_messages_that_the_template_refuses_are_the_callers_error(base_folder: str) -> None:
    strict = BaseTokenizer(str(base_folder))
    strict._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        strict.encode_chat(TemplateInput([{"role": "user", "content": "hi"}]))
    assert caught.value.param == "messages"
