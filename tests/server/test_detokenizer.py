"""Tokens become text that is valid at any boundary, and stop strings never show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from onebase_server.inference.detokenizer import BytePieces, StopStrings, WindowPieces
from onebase_server.inference.tokenization import BaseTokenizer

HARD_TEXTS = (
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 party",
    "漢字かな交じり文、中文字符，한국어",
    "e\u0301 a\u0308 n\u0303 Z\u0351\u0343\u0354alg\u0336o\u035c",
    "\ufffd literal \ufffd\ufffd",
    "naïve café — «ça» 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u202eright",
    "\x00\x01\t\r\n   ",
)


def pieces_of(push: Callable[[int], str], tokens: Sequence[int]) -> list[str]:
    return [push(token) for token in tokens]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_pieces_of_emoji_cjk_and_combining_marks_add_up_to_the_text(
    tokenizer: BaseTokenizer, text: str
) -> None:
    tokens = tokenizer.encode(text)
    decoder = tokenizer.pieces()

    pieces = pieces_of(decoder.push, tokens)

    assert "".join(pieces) + decoder.flush() == text
    assert all(piece.encode("utf-8") is not None for piece in pieces)


def test_an_emoji_split_over_several_tokens_leaves_whole(tokenizer: BaseTokenizer) -> None:
    tokens = tokenizer.encode("🦩")
    decoder = tokenizer.pieces()

    pieces = pieces_of(decoder.push, tokens)

    assert len(tokens) > 1
    assert pieces == [""] * (len(tokens) - 1) + ["🦩"]


@given(tokens=st.lists(st.integers(0, 49151), max_size=40))
@example(tokens=[0, 1, 2, 17])
@example(tokens=[49151, 138, 139, 140])
def test_pieces_of_random_tokens_add_up_to_the_tokenizers_own_decoding(
    tokenizer: BaseTokenizer, tokens: list[int]
) -> None:
    decoder = tokenizer.pieces()

    joined = "".join(pieces_of(decoder.push, tokens)) + decoder.flush()

    assert joined == tokenizer.decode(tokens)


@given(text=st.text(max_size=60), cut=st.integers(0, 200))
def test_a_text_cut_at_any_token_boundary_decodes_as_its_tokens_do(
    tokenizer: BaseTokenizer, text: str, cut: int
) -> None:
    tokens = tokenizer.encode(text)[:cut]
    decoder = tokenizer.pieces()

    joined = "".join(pieces_of(decoder.push, tokens)) + decoder.flush()

    assert joined == tokenizer.decode(tokens)


@given(raw=st.binary(max_size=40))
def test_any_bytes_one_per_token_give_the_same_replacement_characters_as_at_once(raw: bytes) -> None:
    decoder = BytePieces(lambda token: bytes([token]))

    joined = "".join(pieces_of(decoder.push, list(raw))) + decoder.flush()

    assert joined == raw.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: words with a leading mark, and bytes for the rest."""
    words = ["<unk>", "\u2581hello", "\u2581world", "ly", "\u2581"]
    names = words + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(
        BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@given(parts=st.lists(st.one_of(st.integers(1, 4), st.sampled_from("aé漢🎉")), max_size=20))
def test_pieces_of_a_byte_fallback_tokenizer_add_up_and_never_show_half_a_character(
    byte_fallback: Tokenizer, parts: list[int | str]
) -> None:
    tokens: list[int] = []
    for part in parts:
        tokens += [5 + byte for byte in part.encode()] if isinstance(part, str) else [part]
    decoder = WindowPieces(lambda ids: str(byte_fallback.decode(list(ids))))

    pieces = pieces_of(decoder.push, tokens)

    assert "".join(pieces) + decoder.flush() == byte_fallback.decode(tokens)
    assert "\ufffd" not in "".join(pieces)


def test_endless_invalid_bytes_are_not_held_back_for_ever(byte_fallback: Tokenizer) -> None:
    decoder = WindowPieces(lambda ids: str(byte_fallback.decode(list(ids))))

    pieces = pieces_of(decoder.push, [5 + 0xFF] * 200)

    assert len("".join(pieces)) > 100


def expected_cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several, before the longest."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


letters = st.text("ab🎉\n", max_size=30)
stop_lists = st.lists(st.text("ab🎉\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=letters, stops=stop_lists, data=st.data())
@example(text="aab", stops=["ab"], data=None)
@example(text="aaab", stops=["aab"], data=None)
def test_a_stop_string_cuts_at_the_same_place_however_the_text_is_split(
    text: str, stops: list[str], data: st.DataObject | None
) -> None:
    cuts = (
        sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else list(range(len(text)))
    )
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopStrings(stops)

    released = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()

    assert released == expected_cut(text, stops)
    assert (matcher.matched in stops) == any(stop in text for stop in stops)
    assert text.startswith(released + (matcher.matched or ""))


@given(text=letters, stops=stop_lists)
def test_what_was_released_is_never_the_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    released = ""
    for character in text:
        released += matcher.push(character)
        if matcher.matched:
            break
        for stop in stops:
            for length in range(1, len(stop)):
                assert not (
                    released.endswith(stop[:length]) and _still_possible(text, released, stop, length)
                )


def _still_possible(text: str, released: str, stop: str, length: int) -> bool:
    """Whether the text goes on after `released` so that this beginning becomes the whole stop string."""
    return text[len(released) :].startswith(stop[length:])


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["END"])

    assert matcher.push("the EN") == "the "
    assert matcher.push("tr") == "ENtr"
    assert matcher.push("y") == "y"


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("text") == "text"
