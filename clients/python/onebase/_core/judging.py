"""Several judges on one conversation: one request, and an answer or an error of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from onebase_protocol.text import GenerateManyAnswer, OneOfManyAnswer

from ..errors import ErrorDetail, InvalidResponseError, StreamError, status_error
from ..judging_types import Judge, Judgement
from ..types import AdapterSpec, Messages
from . import parse
from .requests import Body, Call, adapter_body, encode, messages_body, sampling_body
from .streams import Assembler

_OWN: Final = ("name", "adapter")


def judge(judges: Sequence[Judge], prompt: str | None, messages: Messages | None, *, stream: bool) -> Call:
    """Return the call for the judgements of one prompt or conversation.

    Raises:
        TypeError: an unknown field of a judge, or a value that JSON cannot carry.
        ValueError: neither or both of `prompt` and `messages`; no judges.
    """
    if (prompt is None) == (messages is None):
        raise ValueError("give either prompt (text that they continue) or messages (a conversation)")
    if not judges:
        raise ValueError("judges is empty: give at least one")
    body: Body = {"prompt": prompt} if messages is None else {"messages": messages_body(messages)}
    body["requests"] = [_request(one) for one in judges]
    body["stream"] = stream
    return Call("POST", "/generate/many", encode(body))


def _request(judge: Judge) -> Body:
    fields: Any = {name: value for name, value in judge.items() if name not in _OWN}
    return {"adapter": adapter_body(judge.get("adapter")), **sampling_body(fields)}


def name_of(judge: Judge) -> str:
    """Return the name of a judge's answer."""
    return judge.get("name") or _adapter_name(judge.get("adapter"))


def _adapter_name(adapter: AdapterSpec) -> str:
    body = adapter_body(adapter)
    if isinstance(body, list):
        return "+".join(str(term.get("name")) for term in body)
    return "base" if body is None else str(body)


def judgements(answer: GenerateManyAnswer, judges: Sequence[Judge]) -> tuple[Judgement, ...]:
    """Return the judgements in a whole answer. Raises InvalidResponseError."""
    if [one.request for one in answer.data] != list(range(len(judges))):
        raise InvalidResponseError("the server's answer has not one entry for each judge")
    return tuple(_judgement(one, judge) for one, judge in zip(answer.data, judges, strict=True))


def _judgement(one: OneOfManyAnswer, judge: Judge) -> Judgement:
    name = name_of(judge)
    if one.answer is not None:
        return Judgement(name, one.request, parse.generation(one.answer, judge.get("schema")))
    given = one.error
    detail = (
        ErrorDetail(f"the server answered {one.status}")
        if given is None
        else ErrorDetail(given.message, given.type, given.param, given.code)
    )
    return Judgement(name, one.request, None, status_error(one.status, detail))


class JudgementReader:
    """Reads the judgements of a stream, each when it is complete."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self._judges = judges
        self._assemblers = [Assembler() for _ in judges]
        self._ended: set[int] = set()
        self.done = False

    def read(self, data: str) -> Judgement | None:
        """Return the judgement that an event completes, if it does.

        Raises:
            StreamError: the server sends something else than a stream of answers, or ends it too early.
        """
        if data == "[DONE]":
            self.done = True
            if len(self._ended) < len(self._judges):
                raise StreamError(ErrorDetail("the stream ended too early", code="invalid_stream"))
            return None
        try:
            event = parse.decode(data, dict[str, Any])
            number = event.get("request")
            if type(number) is not int or not 0 <= number < len(self._judges):
                raise InvalidResponseError("the server's stream has an event of no judge")
            judge = self._judges[number]
            if "error" in event:
                self._ended.add(number)
                error = status_error(int(event.get("status") or 500), parse.stream_error(event["error"]))
                return Judgement(name_of(judge), number, None, error)
        except InvalidResponseError as error:
            raise StreamError(ErrorDetail(error.message, code="invalid_stream")) from error
        self._assemblers[number].read_piece(data)
        if not event.get("done"):
            return None
        self._ended.add(number)
        answer = replace(self._assemblers[number].result(), schema=judge.get("schema"))
        return Judgement(name_of(judge), number, answer)
