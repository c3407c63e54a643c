"""One client's request in the soak: sends a plan, and checks that the answer keeps the contract."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.soak_plan import Plan
from bench.stream import DONE, Response, request

FINISHES = ("stop", "length")


class ContractError(Exception):
    """The server answered what it must not answer."""


@dataclass
class Tally:
    """Outcomes of all requests so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """A whole answer, streamed or not."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


class _LeftError(Exception):
    """The client has read as much as it wanted."""


async def run_plan(url: str, plan: Plan, tally: Tally, hang_seconds: float) -> Answer | None:
    """Runs one plan and counts its outcome; None when there was no whole answer.

    Raises:
        ContractError: the answer is wrong, or none came within `hang_seconds`.
    """
    try:
        async with asyncio.timeout(hang_seconds):
            try:
                async with asyncio.timeout(plan.leave_after_seconds):
                    return await _ask(url, plan, tally)
            except (_LeftError, TimeoutError):
                if plan.leave_after_events is None and plan.leave_after_seconds is None:
                    raise
                tally.outcomes["left by the client"] += 1
                return None
    except TimeoutError as error:
        raise ContractError(f"no end after {hang_seconds:.0f} s: {_short(plan.body)}") from error
    except (OSError, EOFError, ValueError) as error:
        raise ContractError(f"{type(error).__name__}: {error}: {_short(plan.body)}") from error


async def _ask(url: str, plan: Plan, tally: Tally) -> Answer | None:
    async with request(f"{url}/generate", "POST", plan.body) as response:
        if response.status != 200:
            await _refused(response, plan, tally)
            return None
        if not plan.valid:
            raise ContractError(f"an invalid request was served: {_short(plan.body)}")
        answer = await (_streamed(response, plan) if plan.body.get("stream") else _whole(response))
    check(answer, plan)
    tally.tokens += answer.usage["completion_tokens"]
    tally.outcomes[
        "cancelled by its deadline" if "cancelled" in answer.finishes.values() else "finished"
    ] += 1
    return answer


async def _refused(response: Response, plan: Plan, tally: Tally) -> None:
    """A refusal is right for an invalid request, and for any when the queue is full."""
    body = json.loads(await response.body())
    if not body.get("error", {}).get("message"):
        raise ContractError(f"status {response.status} without an error message: {body}")
    if response.status == 429:
        wait = response.headers.get("retry-after")
        if wait is None:
            raise ContractError("status 429 without Retry-After")
        tally.outcomes["refused, queue full"] += 1
        await asyncio.sleep(min(5.0, float(wait)))
    elif plan.valid or not 400 <= response.status < 500:
        raise ContractError(f"status {response.status}: {body['error']}: {_short(plan.body)}")
    else:
        tally.outcomes["refused, invalid"] += 1


async def _whole(response: Response) -> Answer:
    body = json.loads(await response.body())
    choices = {choice["index"]: choice for choice in body["choices"]}
    return Answer(
        {index: choice["text"] for index, choice in choices.items()},
        {index: choice["finish_reason"] for index, choice in choices.items()},
        body["usage"],
    )


async def _streamed(response: Response, plan: Plan) -> Answer:
    answer, seen, done = Answer(), 0, False
    async for data in response.events():
        if seen == plan.leave_after_events:
            raise _LeftError
        seen += 1
        if data == DONE:
            if not done:
                raise ContractError(f"[DONE] before the last event: {_short(plan.body)}")
            return answer
        done = _take(answer, json.loads(data)) or done
    raise ContractError(f"a stream ended without [DONE]: {_short(plan.body)}")


def _take(answer: Answer, event: dict[str, Any]) -> bool:
    """Adds one event to the answer; True for the last one, which carries the usage."""
    if "error" in event:
        raise ContractError(f"error in a stream: {event['error']}")
    if event.get("done"):
        answer.usage = event["usage"]
        return True
    index = event["index"]
    if index in answer.finishes:
        raise ContractError(f"choice {index} went on after its end")
    answer.texts[index] = answer.texts.get(index, "") + event["text"]
    if event.get("finish_reason"):
        answer.finishes[index] = event["finish_reason"]
    return False


def check(answer: Answer, plan: Plan) -> None:
    body, short = plan.body, _short(plan.body)
    count = body.get("n", 1)
    if sorted(answer.finishes) != list(range(count)):
        raise ContractError(f"{count} choices asked for, ended were {sorted(answer.finishes)}: {short}")
    allowed = (*FINISHES, "cancelled") if "timeout_s" in body else FINISHES
    wrong = [reason for reason in answer.finishes.values() if reason not in allowed]
    if wrong:
        raise ContractError(f"finish_reason {wrong[0]!r}: {short}")
    tokens, most = answer.usage["completion_tokens"], count * body["max_tokens"]
    exact = body.get("ignore_eos") and not {"stop", "stop_token_ids", "timeout_s"} & set(body)
    if tokens > most or (exact and tokens != most):
        raise ContractError(f"{tokens} tokens where {most} were asked for: {short}")
    if plan.text is not None and plan.text != texts_of(answer):
        raise ContractError(f"expected {plan.text}, got {texts_of(answer)}: {short}")


def texts_of(answer: Answer) -> tuple[str, ...]:
    """The text of each choice, in order."""
    return tuple(text for _, text in sorted(answer.texts.items()))


def _short(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False)[:400]
