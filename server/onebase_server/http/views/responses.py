"""Answers of /v1/responses, whole and streamed. Plain dicts: this is the hot path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from hashlib import blake2b
from typing import Any

from onebase_edge.errors import ApiError, status_of
from onebase_edge.sse import identified_event
from onebase_protocol.common import Json
from onebase_protocol.text import ChatTokenLogprob
from onebase_server.http.views.generation import GenerationView, chat_logprobs
from onebase_server.inference.generation import GenerationRequest, GenerationRun
from onebase_server.inference.stream import OutputPiece, TokenInfo
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import ToolCallDelta, answer_reader
from onebase_server.requests.schemas.items import CUSTOM_INPUT
from onebase_server.requests.schemas.messages import object_or_its_beginning
from onebase_server.requests.schemas.responses import FlatToolChoice, ResponsesRequest
from onebase_server.telemetry.measurements import TokenUsage

_REASONS = {"length": "max_output_tokens", "cancelled": "timeout"}
"""Reasons why an answer is not whole, by how its sequence ended."""


class _Output:
    """Items of one answer, and the events that build them up. namespaces, customs: as the request's."""

    def __init__(
        self,
        job: GenerationRequest,
        tokenizer: BaseTokenizer,
        namespaces: Mapping[str, str],
        customs: Set[str] = frozenset(),
    ) -> None:
        self._namespaces, self._customs = namespaces, customs
        self.items: list[Json] = []
        self.reason: str | None = None
        """Reason why the answer is not whole."""
        self._tokenizer = tokenizer
        self._id = job.id
        self._reader = answer_reader(job.calls, job.id)
        self._open: Json | None = None
        self._parts: list[str] = []
        self._called = False
        self._said = 0
        self._waiting: list[TokenInfo] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def feed(self, piece: OutputPiece) -> list[Json]:
        """Return the events of a piece."""
        ended = piece.finish_reason is not None
        said = self._reader.feed(piece.text, end=ended)
        self._waiting += piece.tokens
        events = self._think(piece.reasoning) if piece.reasoning else []
        if said.content:
            events += self._say(said.content)
        for delta in said.calls:
            events += self._call(delta)
        if ended:
            self.reason = _REASONS.get(piece.finish_reason or "")
            if self.reason is None and not self._reader.whole:
                self.reason = "stop"  # a stop string in a call
            if self._open is None and not self.items:
                events += self._begin_message()  # there is an item in each answer
            events += self._close("incomplete" if self.reason else "completed")
        return events

    # ---- a thought ---------------------------------------------------------------------------

    def _think(self, text: str) -> list[Json]:
        events = []
        if self._open is None or self._open["type"] != "reasoning":
            events = self._close("completed")
            item = {"id": self._item_id("rs_"), "type": "reasoning", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
            events += [
                self._begin(item),
                self._event("response.content_part.added", content_index=0, part=part),
            ]
        self._parts.append(text)
        return [*events, self._event("response.reasoning_text.delta", content_index=0, delta=text)]

    def _end_thought(self, item: Json) -> list[Json]:
        part = {"type": "reasoning_text", "text": "".join(self._parts)}
        item["content"] = [part]
        return [
            self._event("response.reasoning_text.done", content_index=0, text=part["text"]),
            self._event("response.content_part.done", content_index=0, part=part),
        ]

    # ---- text --------------------------------------------------------------------------------

    def _say(self, text: str) -> list[Json]:
        events = []
        if self._open is None or self._open["type"] == "reasoning":
            events = [*self._close("completed"), *self._begin_message()]
        self._parts.append(text)
        self._said += len(text)
        logprobs = self._take_logprobs(all=False)
        delta = {"content_index": 0, "delta": text, "logprobs": logprobs}
        return [*events, self._event("response.output_text.delta", **delta)]

    def _take_logprobs(self, *, all: bool) -> list[ChatTokenLogprob]:
        """Return the log-probabilities of the tokens whose text has been said; calls have none."""
        count = len(self._waiting)
        if not all:
            count = next((n for n, token in enumerate(self._waiting) if token.offset >= self._said), count)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        found = chat_logprobs(taken, self._tokenizer)
        self._logprobs += found
        return found

    def _begin_message(self) -> list[Json]:
        begun = self._begin(
            {"id": self._item_id("msg_"), "type": "message", "role": "assistant", "content": []}
        )
        return [begun, self._event("response.content_part.added", content_index=0, part=_text_part("", []))]

    def _end_message(self, item: Json) -> list[Json]:
        if not self._called:
            self._take_logprobs(all=True)
        part = _text_part("".join(self._parts), self._logprobs)
        done = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
        item["content"] = [part]
        return [
            self._event("response.output_text.done", **done),
            self._event("response.content_part.done", content_index=0, part=part),
        ]

    # ---- calls -------------------------------------------------------------------------------

    def _call(self, delta: ToolCallDelta) -> list[Json]:
        events: list[Json] = []
        if delta.id is not None:
            self._called = True
            events += self._close("completed")
            named = _called(delta.name or "", self._namespaces) | {"call_id": delta.id}
            if delta.name in self._customs:
                item = {"id": self._item_id("ctc_"), "type": "custom_tool_call", "input": ""}
            else:
                item = {"id": self._item_id("fc_"), "type": "function_call", "arguments": ""}
            events.append(self._begin(item | named))
        if delta.arguments:
            self._parts.append(delta.arguments)
            if self._open is not None and self._open["type"] == "function_call":
                events.append(self._event("response.function_call_arguments.delta", delta=delta.arguments))
        return events

    def _end_call(self, item: Json) -> list[Json]:
        item["arguments"] = "".join(self._parts)
        done = {"arguments": item["arguments"], "name": item["name"]}
        return [self._event("response.function_call_arguments.done", **done)]

    def _end_custom_call(self, item: Json) -> list[Json]:
        """Send the text at once: it is known when its JSON has been read."""
        found = object_or_its_beginning("".join(self._parts)) or {}
        text = found.get(CUSTOM_INPUT)
        item["input"] = text if isinstance(text, str) else ""
        delta = self._event("response.custom_tool_call_input.delta", delta=item["input"])
        done = self._event("response.custom_tool_call_input.done", input=item["input"])
        return [delta, done] if item["input"] else [done]

    # ---- both --------------------------------------------------------------------------------

    def _item_id(self, kind: str) -> str:
        """Return the id of the next item, the same in a stream that is resumed."""
        return kind + blake2b(f"{self._id}.{len(self.items)}".encode(), digest_size=12).hexdigest()

    def _begin(self, item: Json) -> Json:
        self._open, self._parts = item, []
        return self._event("response.output_item.added", item={**item, "status": "in_progress"})

    def _close(self, status: str) -> list[Json]:
        item = self._open
        if item is None:
            return []
        ends = {
            "message": self._end_message,
            "reasoning": self._end_thought,
            "custom_tool_call": self._end_custom_call,
        }
        events = ends.get(item["type"], self._end_call)(item)
        item["status"] = status
        events.append(self._event("response.output_item.done", item=item))
        self.items.append(item)
        self._open = None
        return events

    def break_off(self) -> None:
        """Close the open item: nothing more of it comes."""
        self._close("incomplete")

    def _event(self, kind: str, **fields: Any) -> Json:
        """Return an event of the open item."""
        made: Json = {"type": kind, "output_index": len(self.items), **fields}
        if self._open is not None and "item" not in fields:
            made["item_id"] = self._open["id"]
        return made


class ResponseView(GenerationView):
    """One answer of POST /v1/responses.

    Args:
        keep: given the answer when it is whole or cut, before the caller has it.
    """

    closing = b""

    def __init__(
        self, tokenizer: BaseTokenizer, body: ResponsesRequest, keep: Callable[[Json], None]
    ) -> None:
        super().__init__(tokenizer)
        self._body = body
        self._keep = keep
        self._sequence = -1
        self._output: _Output
        self._head: Json

    def _begin(self, job: GenerationRequest) -> None:
        self._output = _Output(job, self._tokenizer, self._body.namespaces, self._body.customs)
        head = {"id": job.id, "object": "response", "created_at": job.created}
        self._head = head | _asked(self._body, job)

    def answer(self, generation: GenerationRun, choices: Sequence[OutputPiece]) -> Json:
        self._begin(generation.request)
        for piece in choices:
            self._output.feed(piece)
        return self._ended(generation)

    async def events(self, generation: GenerationRun) -> AsyncIterator[bytes]:
        self._begin(generation.request)
        begun = self._response("in_progress")
        chunk = b"".join(self._lifecycle(kind, begun) for kind in ("created", "in_progress"))
        async for pieces in generation.pieces():
            for piece in pieces:
                chunk += b"".join(map(self._event, self._output.feed(piece)))
            if chunk:
                yield chunk
            chunk = b""
        response = self._ended(generation)
        yield self._lifecycle(response["status"], response)

    def failure(self, error: ApiError) -> bytes:
        self._output.break_off()
        reason = {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "type": status_of(error)[1],
        }
        return self._lifecycle("failed", self._response("failed", error=reason))

    def _ended(self, generation: GenerationRun) -> Json:
        reason, usage = self._output.reason, _usage(generation.usage)
        if reason:
            response = self._response("incomplete", incomplete_details={"reason": reason}, usage=usage)
        else:
            response = self._response("completed", completed_at=generation.ended_at, usage=usage)
        self._keep(response)
        return response

    def _response(self, status: str, **fields: Any) -> Json:
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": list(self._output.items), **empty, **fields}

    def _lifecycle(self, kind: str, response: Json) -> bytes:
        return self._event({"type": f"response.{kind}", "response": response})

    def _event(self, data: Json) -> bytes:
        self._sequence += 1
        return identified_event({**data, "sequence_number": self._sequence}, event=data["type"])


def _called(name: str, namespaces: Mapping[str, str]) -> Json:
    """Return the fields of a call, or of a tool, that name its function."""
    namespace = namespaces.get(name)
    if namespace is None:
        return {"name": name}
    return {"namespace": namespace, "name": name.removeprefix(f"{namespace}.")}


def _tool(function: Json, body: ResponsesRequest) -> Json:
    """Return a tool as the request had it."""
    named = _called(function["name"], body.namespaces)
    if function["name"] not in body.customs:
        return {"type": "function", **function, **named}
    description = {key: function[key] for key in ("description",) if key in function}
    return {"type": "custom", **named, **description, "format": {"type": "text"}}


def _asked(body: ResponsesRequest, job: GenerationRequest) -> Json:
    """Return the request's fields as the answer repeats them, with those that came from the adapter's
    defaults."""
    limited = job.has_default_limit or body.max_output_tokens is not None
    wanted, effort = body.text.format if body.text is not None else None, body.reasoning_effort
    choice = body.tool_choice
    return {
        "model": body.model,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        **({} if body.conversation_id is None else {"conversation": {"id": body.conversation_id}}),
        "max_output_tokens": job.sampling.max_tokens if limited else None,
        "temperature": job.sampling.temperature,
        "top_p": job.sampling.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "tools": [_tool(function, body) for function in body.functions],
        "tool_choice": _plain(choice) if isinstance(choice, FlatToolChoice) else choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": {"type": "text"} if wanted is None else _plain(wanted), "verbosity": "medium"},
        "reasoning": {"effort": effort, "summary": None},
        "metadata": body.metadata or {},
        "store": body.store is not False,
        "truncation": "disabled",
        "background": False,
    }


def _plain(model: Any) -> Json:
    made: Json = model.model_dump(by_alias=True, exclude_none=True)
    return made


def _text_part(text: str, logprobs: list[ChatTokenLogprob]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: TokenUsage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
