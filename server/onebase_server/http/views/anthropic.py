"""Messages as Anthropic's clients expect them: whole, and as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic_core import from_json

from onebase_edge.errors import OneBaseError, error_body, status_of
from onebase_edge.refusals import anthropic_error
from onebase_edge.sse import identified_event
from onebase_server.http.views.generation import GenerationView, Json, whole_calls
from onebase_server.inference.generation import Generation
from onebase_server.inference.stream import Piece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import AnswerReader, CallDelta, answer_reader
from onebase_server.telemetry.measurements import Usage

_STOP_REASONS = {"length": "max_tokens", "cancelled": "pause_turn"}
"""Stop reasons of a message that was cut: `pause_turn` says that it continues if it is sent back."""


class MessageView(GenerationView):
    """Answers of POST /v1/messages. scope: of the request, whose id is in errors."""

    closing = b""

    def __init__(self, tokenizer: BaseTokenizer, model: str, scope: Any) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._scope = scope

    def answer(self, generation: Generation, choices: Sequence[Piece]) -> Json:
        (piece,) = choices
        reader = answer_reader(generation.job.calls, generation.job.id)
        said = reader.feed(piece.text, end=True)
        content: list[Json] = [_text_block(said.content)] if said.content else []
        for call in whole_calls(said.calls):
            function = call["function"]
            content.append(_call_block(call["id"], function["name"], _values(function["arguments"])))
        return {**self._head(generation, content), **_stop(piece, reader)}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        blocks = _Blocks(answer_reader(generation.job.calls, generation.job.id))
        chunk = b""
        begun = False
        async for pieces in generation.pieces():
            if not begun:
                chunk = _event("message_start", message=self._head(generation, []))
                begun = True
            for piece in pieces:
                chunk += blocks.more(piece)
                if piece.finish_reason:
                    usage = message_usage(generation.usage)
                    chunk += _event("message_delta", delta=_stop(piece, blocks.reader), usage=usage)
                    chunk += _event("message_stop")
            if chunk:
                yield chunk
            chunk = b""

    def failure(self, error: OneBaseError) -> bytes:
        told = anthropic_error(error_body(error), status_of(error)[0], self._scope)
        return identified_event(told, event="error")

    def _head(self, generation: Generation, content: list[Json]) -> Json:
        return {
            "id": generation.job.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage(generation.usage) | {"service_tier": "standard"},
        }


def _stop(piece: Piece, reader: AnswerReader) -> Json:
    """Return the stop reason and the stop sequence of an answer."""
    reason = _STOP_REASONS.get(piece.finish_reason or "")
    if reason is None:
        called = reader.count > 0 and reader.whole
        reason = "stop_sequence" if piece.stop is not None else "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": piece.stop}


class _Blocks:
    """The blocks of a streamed answer, one after the other."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self._open = False
        self._index = -1

    def more(self, piece: Piece) -> bytes:
        """Return the events of what is certain with a piece."""
        said = self.reader.feed(piece.text, end=piece.finish_reason is not None)
        chunk = b""
        if said.content:
            if not self._open:
                chunk += self._begin(_text_block(""))
            chunk += self._delta("text_delta", text=said.content)
        for delta in said.calls:
            chunk += self._call(delta)
        return chunk + (self._close() if piece.finish_reason else b"")

    def _call(self, delta: CallDelta) -> bytes:
        begun = b"" if delta.id is None else self._begin(_call_block(delta.id, delta.name, {}))
        return begun + (
            self._delta("input_json_delta", partial_json=delta.arguments) if delta.arguments else b""
        )

    def _begin(self, block: Json) -> bytes:
        closed = self._close()
        self._open = True
        self._index += 1
        return closed + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **new: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **new})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = False
        return _event("content_block_stop", index=self._index)


def message_usage(usage: Usage) -> Json:
    """Return the usage. Anthropic's prompt is the sum of three: what is new, what was put into the cache,
    what came from it."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return identified_event({"type": kind, **fields}, event=kind)


def _text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def _call_block(call_id: str, name: str | None, values: Json) -> Json:
    return {"type": "tool_use", "id": call_id, "name": name, "input": values}


def _values(arguments: str) -> Json:
    """Return the arguments of a call; of one that was cut, as far as they go."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
