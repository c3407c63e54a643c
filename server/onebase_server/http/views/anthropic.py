"""Messages as Anthropic's clients expect them: whole, and as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b
from typing import Any

from pydantic_core import from_json

from onebase_edge.errors import ApiError, error_body, status_of
from onebase_edge.refusals import anthropic_error
from onebase_edge.sse import identified_event
from onebase_protocol import messages as wire
from onebase_protocol.common import Json
from onebase_server.http.views.generation import GenerationView, whole_calls
from onebase_server.inference.generation import GenerationRun
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import AnswerReader, ToolCallDelta, answer_reader
from onebase_server.telemetry.measurements import TokenUsage

_STOP_REASONS = {"length": "max_tokens", "cancelled": "pause_turn"}
"""Stop reasons of a message that was cut: `pause_turn` says that it continues if it is sent back."""


class MessageView(GenerationView):
    """Answers of POST /v1/messages.

    Args:
        scope: of the request, whose id is in errors.
        hides_thoughts: whether thoughts are sent without their text.
    """

    closing = b""

    def __init__(self, tokenizer: BaseTokenizer, model: str, scope: Any, *, hides_thoughts: bool) -> None:
        super().__init__(tokenizer)
        self._model = model
        self._scope = scope
        self._hides_thoughts = hides_thoughts

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> wire.MessageAnswer:
        (piece,) = choices
        reader = answer_reader(generation.request.calls, generation.request.id)
        said = reader.feed(piece.text, end=True)
        content: list[wire.BlockAnswer] = []
        if piece.reasoning:
            shown = "" if self._hides_thoughts else piece.reasoning
            content.append(wire.ThinkingBlockAnswer(shown, _signature(piece.reasoning)))
        if said.content:
            content.append(wire.TextBlockAnswer(said.content))
        for call in whole_calls(said.calls):
            values = _values(call.function.arguments)
            content.append(wire.ToolUseAnswer(call.id, call.function.name, values))
        answer = self._head(generation, content)
        stop = _stop(piece, reader)
        answer.stop_reason, answer.stop_sequence = stop.stop_reason, stop.stop_sequence
        return answer

    async def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        reader = answer_reader(generation.request.calls, generation.request.id)
        blocks = _Blocks(reader, hides_thoughts=self._hides_thoughts)
        chunk = b""
        begun = False
        async for pieces in generation.pieces():
            if not begun:
                chunk = _event("message_start", wire.MessageStart(self._head(generation, [])))
                begun = True
            for piece in pieces:
                chunk += blocks.more(piece)
                if piece.finish_reason:
                    usage = wire.MessageUsage(*_usage(generation.usage))
                    stop = _stop(piece, blocks.reader)
                    chunk += _event("message_delta", wire.MessageDelta(stop, usage))
                    chunk += _event("message_stop", wire.MessageStop())
            if chunk:
                yield chunk
            chunk = b""

    def failure(self, error: ApiError) -> bytes:
        told = anthropic_error(error_body(error), status_of(error)[0], self._scope)
        return identified_event(told, event="error")

    def _head(self, generation: GenerationRun, content: list[wire.BlockAnswer]) -> wire.MessageAnswer:
        usage = wire.MessageAnswerUsage(*_usage(generation.usage))
        return wire.MessageAnswer(id=generation.request.id, model=self._model, content=content, usage=usage)


def _stop(piece: OutputPiece, reader: AnswerReader) -> wire.MessageStopReason:
    """Return the stop reason and the stop sequence of an answer."""
    reason = _STOP_REASONS.get(piece.finish_reason or "")
    if reason is None:
        called = reader.count > 0 and reader.whole
        reason = "stop_sequence" if piece.stop is not None else "tool_use" if called else "end_turn"
    return wire.MessageStopReason(reason, piece.stop)


class _Blocks:
    """The blocks of a streamed answer, one after the other."""

    def __init__(self, reader: AnswerReader, *, hides_thoughts: bool) -> None:
        self.reader = reader
        self._hides_thoughts = hides_thoughts
        self._thought: list[str] = []
        """Parts of the thought whose block is open."""
        self._open = False
        self._index = -1

    def more(self, piece: OutputPiece) -> bytes:
        """Return the events of what is certain with a piece."""
        said = self.reader.feed(piece.text, end=piece.finish_reason is not None)
        chunk = self._think(piece.reasoning) if piece.reasoning else b""
        if said.content:
            if not self._open or self._thought:
                chunk += self._begin(wire.TextBlockAnswer(""))
            chunk += self._delta(wire.TextDelta(said.content))
        for delta in said.calls:
            chunk += self._call(delta)
        return chunk + (self._close() if piece.finish_reason else b"")

    def _think(self, text: str) -> bytes:
        begun = b"" if self._thought else self._begin(wire.ThinkingBlockAnswer("", ""))
        self._thought.append(text)
        return begun + (b"" if self._hides_thoughts else self._delta(wire.ThinkingDelta(text)))

    def _call(self, delta: ToolCallDelta) -> bytes:
        begun = b"" if delta.id is None else self._begin(wire.ToolUseAnswer(delta.id, delta.name, {}))
        return begun + (self._delta(wire.InputDelta(delta.arguments)) if delta.arguments else b"")

    def _begin(self, block: wire.BlockAnswer) -> bytes:
        closed = self._close()
        self._open = True
        self._index += 1
        return closed + _event("content_block_start", wire.BlockStart(self._index, block))

    def _delta(
        self, delta: wire.TextDelta | wire.InputDelta | wire.ThinkingDelta | wire.SignatureDelta
    ) -> bytes:
        return _event("content_block_delta", wire.BlockDelta(self._index, delta))

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = False
        signed = b""
        if self._thought:
            signed = self._delta(wire.SignatureDelta(_signature("".join(self._thought))))
            self._thought = []
        return signed + _event("content_block_stop", wire.BlockStop(self._index))


def _signature(thought: str) -> str:
    """Return what clients send back with a thought. Nothing checks it: a thought is text like any other."""
    return blake2b(thought.encode(), digest_size=24).hexdigest()


def _usage(usage: TokenUsage) -> tuple[int, int, int, int, wire.ThinkingTokens]:
    """Return the fields of Anthropic's usage."""
    thoughts = wire.ThinkingTokens(usage.reasoning)
    return usage.prompt - usage.cached, 0, usage.cached, usage.completion, thoughts


def _event(kind: str, data: wire.Event) -> bytes:
    return identified_event(data, event=kind)


def _values(arguments: str) -> Json:
    """Return the arguments of a call; of one that was cut, as far as they go."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
