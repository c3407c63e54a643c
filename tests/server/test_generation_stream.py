"""One choice's pieces: stop strings across tokens, logprobs that go with their text, endings."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_edge.background import Threads
from onebase_engine.engine.messages import Sampling, ScoredToken, SequenceOutput
from onebase_server.http.views.generation import CompletionView, GenerateView
from onebase_server.inference.detokenizer import BytePieces
from onebase_server.inference.generation import GenerationRequest, GenerationRun, Prompt
from onebase_server.inference.stream import ChoiceDecoder, OutputPiece, prompt_token_infos
from onebase_server.inference.tokenization import BaseTokenizer


def letters() -> BytePieces:
    """Token ids are bytes."""
    return BytePieces(lambda token: bytes([token]))


def outputs(
    text: str | bytes, *, logprobs: bool = False, finish: str | None = "length"
) -> list[SequenceOutput]:
    """One output per byte; the last one ends the row."""
    raw = text.encode() if isinstance(text, str) else text
    return [
        SequenceOutput(
            id="r",
            tokens=[byte],
            logprobs=[ScoredToken(byte, -0.5, [(byte, -0.5)])] if logprobs else None,
            finish=finish if position == len(raw) - 1 else None,  # type: ignore[arg-type]
        )
        for position, byte in enumerate(raw)
    ]


class Watched:
    """A tokenizer whose token ids are bytes, and how often it was used on the event loop."""

    def __init__(self) -> None:
        self._loop = threading.get_ident()
        self.on_loop = 0

    def _note(self) -> None:
        self.on_loop += threading.get_ident() == self._loop

    def pieces(self, shown: object = None) -> BytePieces:
        def text_bytes(token: int) -> bytes:
            self._note()
            return bytes([token])

        return BytePieces(text_bytes)

    def token_text(self, token: int) -> str:
        self._note()
        return chr(token)


@pytest.mark.parametrize("length", [100, 3000])
@pytest.mark.parametrize("kind", ["completion", "generate"])
def test_the_logprobs_of_a_long_prompt_are_streamed_without_holding_up_the_event_loop(
    kind: str, length: int
) -> None:
    text = "a" * length
    job = GenerationRequest(
        "id",
        "default",
        (Prompt([97] * length, text),),
        Sampling(max_tokens=1, logprobs=1, prompt_logprobs=1),
        n=2,
        echo=True,
    )
    tokenizer: Any = Watched()
    view = CompletionView(tokenizer, "m", "never") if kind == "completion" else GenerateView(tokenizer)

    async def play() -> list[dict[str, Any]]:
        nobody: Any = SimpleNamespace(
            token_gap=len, used=lambda *_: None, rows_ended=lambda: None, router=SimpleNamespace(cancel=id)
        )
        generation = GenerationRun(nobody, tokenizer, Threads("reading", 1), job, recorder=nobody)
        scores = [ScoredToken(97, -0.5, [(97, -0.5)])] * (length - 1)
        for choice in range(2):
            last = ScoredToken(98, -0.5, [(98, -0.5)])
            output = SequenceOutput(
                id="id.0",
                choice=choice,
                tokens=[98],
                logprobs=[last],
                prompt_logprobs=scores,
                finish="length",
            )
            generation._inflight.push(output, 0.0)
        events = [one async for chunk in view.events(generation) for one in chunk.split(b"\n\n") if one]
        return [json.loads(one[6:]) for one in events]

    choices = [choice for one in asyncio.run(play()) for choice in one.get("choices", [one])]
    for index in range(2):
        said = [one for one in choices if one.get("index") == index]
        assert "".join(one["text"] for one in said) == text + "b"
        names = [name for one in said for name in (one.get("logprobs") or {}).get("tokens", ())]
        assert "".join(names) == text + "b"
    assert tokenizer.on_loop < 1000


def run(choice: ChoiceDecoder, rows: list[SequenceOutput]) -> list[OutputPiece]:
    pieces = []
    for row in rows:
        piece = choice.feed(row)
        if piece is not None:
            pieces.append(piece)
        if choice.finish_reason is not None:
            break
    return pieces


def test_a_stop_string_over_several_tokens_never_shows_and_ends_the_choice() -> None:
    choice = ChoiceDecoder(0, letters(), ["STOP"])

    pieces = run(choice, outputs("say STO or STOP now"))

    assert "".join(piece.text for piece in pieces) == "say STO or "
    assert pieces[-1].finish_reason == "stop"
    assert choice.stopped_here
    assert choice.completion_tokens == len("say STO or STOP")


def test_text_held_back_for_a_stop_string_comes_at_the_end_when_it_was_none() -> None:
    choice = ChoiceDecoder(0, letters(), ["STOP"])

    pieces = run(choice, outputs("go STO"))

    assert "".join(piece.text for piece in pieces) == "go STO"
    assert pieces[-1].finish_reason == "length"


def test_a_stop_string_before_min_tokens_does_not_stop() -> None:
    choice = ChoiceDecoder(0, letters(), ["x"], min_tokens=3)

    pieces = run(choice, outputs("xaxa"))

    assert "".join(piece.text for piece in pieces) == "xa"
    assert choice.completion_tokens == 3


def test_the_token_that_ended_the_row_counts_but_is_not_text() -> None:
    choice = ChoiceDecoder(0, letters(), [])

    piece = choice.feed(SequenceOutput(id="r", tokens=[104, 105, 33], finish="stop", stop_token=33))

    assert piece is not None
    assert piece.text == "hi"
    assert piece.finish_reason == "stop"
    assert choice.completion_tokens == 3


def test_a_row_that_ends_inside_a_character_ends_with_a_replacement_character() -> None:
    choice = ChoiceDecoder(0, letters(), [])

    pieces = run(choice, outputs("ok 🎉".encode()[:-1]))

    assert "".join(piece.text for piece in pieces) == "ok \ufffd"


def test_logprobs_leave_with_the_text_of_their_token() -> None:
    choice = ChoiceDecoder(0, letters(), ["bc"])

    pieces = run(choice, outputs("abdbc", logprobs=True))

    assert [(piece.text, [chr(info.token) for info in piece.tokens]) for piece in pieces] == [
        ("a", ["a"]),
        ("bd", ["b", "d"]),
        ("", []),
    ]
    assert [info.offset for piece in pieces for info in piece.tokens] == [0, 1, 2]


def test_all_tokens_of_one_character_keep_their_logprobs() -> None:
    choice = ChoiceDecoder(0, letters(), [])

    pieces = run(choice, outputs("é!", logprobs=True))

    tokens = [info.token for piece in pieces for info in piece.tokens]
    assert bytes(tokens).decode() == "é!"
    assert [info.offset for piece in pieces for info in piece.tokens] == [0, 0, 1]


def test_prompt_tokens_have_offsets_and_the_first_no_logprob(tokenizer: BaseTokenizer) -> None:
    prompt = tokenizer.encode("Hello big world")
    logprobs = [ScoredToken(token, -1.0, [(token, -1.0)]) for token in prompt[1:]]

    infos = prompt_token_infos(prompt, logprobs, tokenizer.pieces())

    assert [info.token for info in infos] == prompt
    assert [info.logprob for info in infos] == [None, -1.0, -1.0]
    assert [info.offset for info in infos] == [0, 5, 9]
