"""Random requests for the soak: every field of POST /generate, in mixtures no test would think of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from bench.workload import WORDS

PIECES = ("naïve café", "日本語の文章", "👩‍👩‍👧‍👦 🇨🇭", "e\u0301", "\n\n", "{}", "</s>")
INVALID: tuple[dict[str, Any], ...] = (
    {"temperature": -1.0},
    {"adapter": "there-is-no-such-adapter"},
    {"max_tokens": 10**9},
    {"top_p": 0.0},
    {"no_such_field": 1},
    {"adapter": [{"name": "there-is-no-such-adapter", "weight": 0.5}]},
)


@dataclass(frozen=True)
class Plan:
    """One request and what its client does with the answer."""

    body: dict[str, Any]
    valid: bool = True
    leave_after_events: int | None = None
    """Disconnect once so many events of the stream have been read."""
    leave_after_seconds: float | None = None
    """Disconnect after so long, whatever has come."""
    text: tuple[str, ...] | None = None
    """Text that each choice must have, where that is known."""


class Planner:
    """Draws plans; the same seed draws the same ones."""

    def __init__(self, adapters: list[str], seed: int) -> None:
        self._adapters = adapters
        self._rng = random.Random(seed)
        self._words = WORDS.split()
        self._prefixes = [self._sentence(length) for length in (8, 40, 80, 160)]

    def plan(self) -> Plan:
        rng = self._rng
        body = self._prompt() | self._sampling() | self._length()
        if (adapter := self._adapter()) is not None:
            body["adapter"] = adapter
        if rng.random() < 0.04:
            return Plan(body | rng.choice(INVALID), valid=False)
        if rng.random() < 0.05:
            body["timeout_s"] = round(rng.uniform(0.1, 3.0), 2)
        body["stream"] = rng.random() < 0.75
        if rng.random() < 0.2:
            if body["stream"] and rng.random() < 0.7:
                return Plan(body, leave_after_events=rng.randrange(12))
            return Plan(body, leave_after_seconds=rng.uniform(0.0, 2.0))
        return Plan(body)

    def canaries(self) -> list[Plan]:
        """Requests with a known answer once they have run: every adapter, a sum, and a seeded sample."""
        wanted: list[Any] = [None, *self._adapters]
        if len(self._adapters) > 1:
            wanted.append([{"name": name, "weight": 0.7} for name in self._adapters[:2]])
        plans = []
        for index, adapter in enumerate(wanted):
            body = {"prompt": self._sentence(10 + 9 * index), "max_tokens": 12, "ignore_eos": True}
            body |= {"temperature": 0.0} if index % 3 else {"temperature": 0.9, "seed": index, "n": 2}
            plans.append(Plan(body if adapter is None else body | {"adapter": adapter}))
        return plans

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def choose(self, plans: list[Plan]) -> Plan:
        return self._rng.choice(plans)

    def _sentence(self, length: int) -> str:
        return " ".join(self._rng.choice(self._words) for _ in range(length))

    def _prompt(self) -> dict[str, Any]:
        rng = self._rng
        text = self._sentence(rng.randint(1, 60))
        if rng.random() < 0.4:
            text = f"{rng.choice(self._prefixes)} {text}"
        if rng.random() < 0.2:
            text += rng.choice(PIECES) * rng.randint(1, 5)
        if rng.random() < 0.15:
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt": text}

    def _adapter(self) -> Any:
        rng = self._rng
        draw = rng.random()
        if draw < 0.2 or not self._adapters:
            return None
        if draw < 0.7:
            return rng.choice(self._adapters)
        names = rng.choices(self._adapters, k=rng.randint(1, 3))
        return [{"name": name, "weight": round(rng.uniform(-1.0, 1.5), 3)} for name in names]

    def _length(self) -> dict[str, Any]:
        rng = self._rng
        length: dict[str, Any] = {"max_tokens": min(128, 1 + int(rng.expovariate(1 / 20)))}
        if rng.random() < 0.3:
            length["ignore_eos"] = True
        elif rng.random() < 0.2:
            length["min_tokens"] = rng.randint(0, length["max_tokens"])
        if rng.random() < 0.2:
            length["n"] = rng.randint(2, 4)
        if rng.random() < 0.15:
            length["stop"] = rng.choice(["the", [".", "\n\n"], ["zzz", ", and"]])
        return length

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        choices: list[dict[str, Any]] = [
            {"temperature": rng.choice([0.0, 0.7, 1.0, 1.8])},
            {"top_k": rng.choice([1, 5, 50])},
            {"top_p": rng.choice([0.1, 0.9])},
            {"min_p": 0.05},
            {"repetition_penalty": 1.2},
            {"presence_penalty": 0.5, "frequency_penalty": 0.5},
            {"seed": rng.randrange(2**31)},
            {"logit_bias": {str(rng.randrange(1000)): rng.uniform(-5, 5)}},
            {"logprobs": rng.randint(0, 5)},
            {"stop_token_ids": [rng.randrange(1000)]},
            {"logprobs": 2, "echo": True},
        ]
        sampling: dict[str, Any] = {}
        for choice in rng.sample(choices, k=rng.randint(0, 3)):
            sampling |= choice
        return sampling
