"""Rollouts of a policy: prompts to sample replies to, and the replies with their rewards, as messages."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class LiveWeights(msgspec.Struct, frozen=True, kw_only=True):
    """The policy's weights as the engine loads them: a file, its SHA-256 and its size."""

    path: str
    digest: str
    bytes: int


class RolloutPrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt. item: the row as JSON, for the grader. seed: of the draws of its replies."""

    tokens: list[int]
    item: str
    seed: int
    max_tokens: int


class RolloutOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order of `n` replies to each prompt, by the policy or, without weights, by the base.

    temperature: 0 for the most probable reply.
    """

    prompts: list[RolloutPrompt]
    n: int
    temperature: float
    weights: LiveWeights | None = None


class RewardedReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reply with its reward. tokens: up to the one that ended it, included. logprobs: of the sampler, nats.

    parts: rewards of a multi grader's graders. errors: details by OpenAI's flags; the reward is then a floor.
    """

    tokens: list[int]
    logprobs: list[float]
    text: str
    reward: float = 0.0
    parts: dict[str, float] = {}
    errors: dict[str, str] = {}


class RolloutSampler(Protocol):
    """Sampler and grader of a run."""

    def draw(self, rollout: RolloutOrder) -> list[list[RewardedReply]]:
        """Return the replies to each prompt. Raises RolloutError, Interrupted."""


class RolloutError(Exception):
    """Replies cannot be had, or not be graded. code: stable. param: the field of the job that is to blame."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def item_of(text: str) -> dict[str, Any]:
    """Return the row of a prompt."""
    found: dict[str, Any] = msgspec.json.decode(text)
    return found
