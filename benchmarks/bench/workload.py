"""What is asked of every target: the same prompts, the same adapters, the same lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

WORDS = (
    "river window garden morning letter engine silver market winter answer bridge paper captain story "
    "mountain kitchen doctor music yellow travel station history coffee forest signal island teacher "
    "village number color summer picture machine ocean friend basket planet corner library ticket"
)


@dataclass(frozen=True)
class Request:
    """One greedy stream of exactly `tokens` tokens; `adapter` None is the base alone."""

    prompt: str
    adapter: str | None
    tokens: int


@dataclass(frozen=True)
class Scenario:
    """A load shape. Requests are sent all at once, or one after the other when `streams` is 1."""

    key: str
    title: str
    streams: int
    adapters: tuple[str | None, ...]
    """Request i asks for entry i modulo the length."""
    repeats: int = 1


def scenarios(streams: int, adapters: list[str], repeats: int) -> list[Scenario]:
    """The four shapes of the benchmark. `repeats` requests in a row steady the one-stream figures."""
    mixed = f"{streams} streams, {len(adapters)} adapters"
    return [
        Scenario("single", "1 stream, 1 adapter", 1, (adapters[0],), repeats),
        Scenario("same", f"{streams} streams, 1 adapter", streams, (adapters[0],)),
        Scenario("mixed", mixed, streams, tuple(adapters)),
        Scenario("base", f"{streams} streams, base only", streams, (None,)),
    ]


class Prompts:
    """Prompts of a given length in tokens, no two of which share their first words."""

    def __init__(self, base_folder: Path, length: int, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
        self._length = length
        self._seed = seed
        self._words = WORDS.split()

    def make(self, *key: object) -> str:
        """The prompt named by `key`: the same for every target, another for every other key."""
        rng = random.Random(f"{self._seed}/{'/'.join(map(str, key))}")
        opening = f"{rng.randrange(10**9)} {rng.choice(self._words)}: tell a story about "
        text = opening + " ".join(rng.choice(self._words) for _ in range(self._length))
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return str(self._tokenizer.decode(ids[: self._length]))


def requests_of(scenario: Scenario, prompts: Prompts, round_index: int | str, tokens: int) -> list[Request]:
    """All requests of one run of a scenario, in the order in which they are sent."""
    count = scenario.streams * scenario.repeats
    return [
        Request(
            prompts.make(round_index, scenario.key, index),
            scenario.adapters[index % len(scenario.adapters)],
            tokens,
        )
        for index in range(count)
    ]
