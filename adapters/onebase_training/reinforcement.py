"""Learn from rewards: sample replies to a prompt, have them graded, and prefer the better ones of each group.

A step samples `group_size` replies to each of its prompts with the weights as they are then. A reply's
advantage is its reward minus its group's mean, over the group's standard deviation (GRPO, Shao et al. 2024,
equation 3). All tokens of a step count equally, as in DAPO (Yu et al. 2025, equation 8).
"""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.proof.extract import extract
from onebase_engine.base.load import longest_row
from onebase_engine.lora.packed_adapter import write_packed_adapter
from onebase_training import events
from onebase_training.batches import Packed, first_fit, step_rows
from onebase_training.data.dataset import Dataset, Sample
from onebase_training.datum_losses import find_loss
from onebase_training.events import Gate, Listen
from onebase_training.loop import (
    Scores,
    Step,
    Trainer,
    TrainingDivergedError,
    learning_rate,
    set_learning_rate,
)
from onebase_training.losses import token_losses
from onebase_training.recipe import MOST_REPLY_TOKENS, REWARD, Recipe, decided
from onebase_training.replies import Measuring, Replies
from onebase_training.rollouts import LiveWeights, RewardedReply, RolloutOrder, RolloutPrompt, RolloutSampler
from onebase_training.trainable import ADAPTER, Trainable

LIVE = "live"
"""Folder, in that of the run, of the weights that are sampled from."""
_PACKED = "packed.safetensors"
_KEPT_RESULTS = 8
"""Number of weights whose replies to held-out prompts are remembered."""
_AT_ONCE = 64
"""Largest number of prompts in one rollout."""
_MOST_ASKED = 16 << 20
"""Largest number of characters of the rows in one rollout."""


@dataclass(eq=False)
class Episode:
    """A reply that is learned from.

    first: logprobs [tokens] of the training pass before the step's first update. reference: those of the
    start of training, for the KL divergence.
    """

    prompt: list[int]
    reply: RewardedReply
    advantage: float
    first: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply.tokens) - 1


class Policy:
    """Samples from the adapter that is trained, or from the base, and remembers held-out replies.

    Args:
        folder: of the run. base_id: identity of the base, which the engine checks.
    """

    def __init__(self, rollouts: RolloutSampler, recipe: Recipe, folder: Path, base_id: str) -> None:
        self._rollouts, self._recipe, self._base_id = rollouts, recipe, base_id
        self._folder = folder / LIVE
        self._held_out: dict[str, dict[int, list[RewardedReply]]] = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def sample(self, trainable: Trainable, rows: Sequence[Any], step: int) -> list[list[RewardedReply]]:
        """Return a group of replies to each row's prompt."""
        count, temperature = decided(self._recipe.group_size), self._recipe.temperature
        seeds = [self._seed("step", step, place) for place in range(len(rows))]
        return self._draw(self._weights(trainable), trainable, rows, seeds, count, temperature)

    def held_out(
        self, trainable: Trainable, rows: Sequence[Any], *, bare: bool = False
    ) -> list[list[RewardedReply]]:
        """Return replies to held-out prompts: the same ones each time for the same weights. `bare`: the
        base's."""
        weights = None if bare else self._weights(trainable)
        known = self._held_out.setdefault("" if weights is None else weights.digest, {})
        while len(self._held_out) > _KEPT_RESULTS:
            del self._held_out[next(one for one in self._held_out if one)]
        count = decided(self._recipe.eval_samples)
        missing = [row for row in rows if id(row) not in known]
        seeds = [self._seed("held out", row.line) for row in missing]
        temperature = 0.0 if count == 1 else self._recipe.temperature
        found = self._draw(weights, trainable, missing, seeds, count, temperature)
        known.update(zip(map(id, missing), found, strict=True))
        return [known[id(row)] for row in rows]

    def _seed(self, use: str, *numbers: int) -> int:
        text = f"{use} {self._recipe.seed} {numbers}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

    def _draw(
        self,
        weights: LiveWeights | None,
        trainable: Trainable,
        rows: Sequence[Any],
        seeds: Sequence[int],
        count: int,
        temperature: float,
    ) -> list[list[RewardedReply]]:
        longest = longest_row(trainable.base.config) or 2**31
        prompts = [
            RolloutPrompt(
                row.ids.tolist(), row.item, seed, min(self._recipe.sample_tokens, longest - len(row))
            )
            for row, seed in zip(rows, seeds, strict=True)
        ]
        found: list[list[RewardedReply]] = []
        for part in rollout_parts(prompts, count):
            order = RolloutOrder(prompts=part, n=count, temperature=temperature, weights=weights)
            found += self._rollouts.draw(order)
        return found

    def _weights(self, trainable: Trainable) -> LiveWeights:
        """Write the weights as they are now for the engine, in the place of those before."""
        work = self._folder / "next" / _PACKED
        work.parent.mkdir(parents=True, exist_ok=True)
        write_packed_adapter(work, extract(trainable.model, ADAPTER), base_id=self._base_id)
        with work.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = self._folder / digest / _PACKED
        if not path.exists():
            for old in self._folder.iterdir():
                if old != work.parent:
                    shutil.rmtree(old, ignore_errors=True)
            path.parent.mkdir()
            work.rename(path)
        return LiveWeights(path=str(path), digest=digest, bytes=path.stat().st_size)


def rollout_parts(prompts: Sequence[RolloutPrompt], count: int) -> list[list[RolloutPrompt]]:
    """Return the prompts in parts, each of which, with `count` replies to a prompt, fits in a message."""
    parts: list[list[RolloutPrompt]] = []
    tokens = asked = 0
    for one in prompts:
        tokens += count * one.max_tokens
        asked += len(one.item) + 8 * len(one.tokens)
        full = not parts or len(parts[-1]) == _AT_ONCE
        if full or tokens > MOST_REPLY_TOKENS or asked > _MOST_ASKED:
            parts.append([])
            tokens, asked = count * one.max_tokens, len(one.item) + 8 * len(one.tokens)
        parts[-1].append(one)
    return parts


class RewardTrainer(Trainer):
    """Trains one adapter on the rewards of its own replies; its losses are negated mean rewards."""

    def __init__(self, *args: Any, policy: Policy, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = policy
        self._loss = find_loss(self.recipe.policy_loss)

    def train_step(self, number: int) -> Step:
        recipe = self.recipe
        torch.manual_seed(hash((recipe.seed, number, self._processes.rank)))
        numbers = step_rows(len(self._data), recipe.batch_size, number, recipe.seed)
        rows: list[Any] = [self._data.rows[one] for one in numbers]
        groups = self._policy.sample(self.trainable, rows, number)
        episodes = _episodes(rows, groups, keep_all=recipe.kl > 0)
        rate = learning_rate(number, self.steps, recipe.learning_rate, recipe.schedule, recipe.warmup_ratio)
        set_learning_rate(self._optimizer, rate)
        found, norm = figures(groups), 0.0
        if recipe.kl > 0:
            with self.trainable.at_start(), self.trainable.evaluating():
                self._note(episodes, "reference")
        for _ in range(recipe.updates if episodes else 0):
            norm = self._update(episodes, number, [row.line for row in rows])
        tokens = recipe.updates * sum(map(len, episodes))
        return Step(-found["mean"], norm, rate, tokens, {"rewards": found})

    def _update(self, episodes: Sequence[Episode], number: int, lines: Sequence[int]) -> float:
        """Do one update of the weights, and return the norm of its gradient."""
        self._optimizer.zero_grad(set_to_none=True)
        weight, total = sum(len(one.reply.tokens) for one in episodes), 0.0
        for places in _passes(episodes, self.recipe.micro_tokens):
            part = [episodes[place] for place in places]
            losses = [
                self._token_losses(one, own) for one, own in zip(part, self._logprobs(part), strict=True)
            ]
            loss = torch.cat(losses).sum() / weight
            total += float(loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
        parameters = self.trainable.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm or math.inf)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise TrainingDivergedError(number + 1, "the loss", sorted(lines))
        self._optimizer.step()
        return float(norm)

    def _token_losses(self, one: Episode, own: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token of a reply.

        Ratios compare with the learner's own logprobs before the step: it samples with those weights, and the
        sampler's products round otherwise than a training pass.
        """
        if one.first is None:
            one.first = own.detach()
        inputs = {
            "logprobs": one.first,
            "advantages": torch.full_like(own, one.advantage),
            "sequence_ratio_mask": torch.ones_like(own),
        }
        losses = self._loss.elementwise(own, inputs, self._loss.settings({}))
        if one.reference is not None:
            gap = one.reference - own
            losses = losses + self.recipe.kl * (gap.exp() - gap - 1)  # k3 (Schulman 2020), as in GRPO
        return losses

    def _note(self, episodes: Sequence[Episode], name: str) -> None:
        for places in _passes(episodes, self.recipe.micro_tokens):
            part = [episodes[place] for place in places]
            for one, own in zip(part, self._logprobs(part), strict=True):
                setattr(one, name, own.detach())

    def _logprobs(self, part: Sequence[Episode]) -> list[torch.Tensor]:
        """Return the logprobs of each reply's tokens, [tokens] fp32 nats, in one pass."""
        device, lengths = self.trainable.device, [len(one) for one in part]
        ids, targets, keep, start = list[int](), list[int](), list[int](), 0
        for one in part:
            ids += one.prompt + one.reply.tokens[:-1]
            targets += one.reply.tokens
            keep += range(start + len(one.prompt) - 1, start + len(one))
            start += len(one)
        owner = [number for number, one in enumerate(part) for _ in one.reply.tokens]
        packed = Packed(
            ids=torch.tensor(ids, device=device)[None],
            positions=torch.cat([torch.arange(length) for length in lengths]).to(device)[None],
            keep=torch.tensor(keep, device=device),
            targets=torch.tensor(targets, device=device),
            owner=torch.tensor(owner, device=device),
            lengths=lengths,
        )
        logits = self.trainable.logits(packed)
        if self.recipe.temperature != 1.0:
            logits = logits / self.recipe.temperature
        return list(torch.split(-token_losses(logits, packed.targets), [len(o.reply.tokens) for o in part]))

    def held_out_scores(self, data: Dataset) -> Scores:
        """Return the negated mean reward of the replies to all held-out prompts."""
        groups = self._policy.held_out(self.trainable, data.rows)
        return reward_scores([_mean(group) for group in groups])


def _episodes(
    rows: Sequence[Any], groups: Sequence[Sequence[RewardedReply]], *, keep_all: bool
) -> list[Episode]:
    """Return the replies with their advantages; without those that teach nothing, unless `keep_all`."""
    found = []
    for row, group in zip(rows, groups, strict=True):
        prompt = row.ids.tolist()
        for reply, advantage in zip(group, advantages([one.reward for one in group]), strict=True):
            if reply.tokens and (advantage or keep_all):
                found.append(Episode(prompt, reply, advantage))
    return found


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return the advantage of each reply of a group: 0 for all if they got the same reward."""
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    if is_even(rewards):
        return [0.0] * len(rewards)
    return [(one - mean) / spread for one in rewards]


def is_even(rewards: Sequence[float]) -> bool:
    """Return True if a group's rewards are equal but for rounding, so that it teaches nothing."""
    return statistics.pstdev(rewards) <= 1e-9 * max(1.0, abs(statistics.fmean(rewards)))


def _passes(episodes: Sequence[Episode], limit: int) -> list[list[int]]:
    order = sorted(range(len(episodes)), key=lambda place: (-len(episodes[place]), place))
    return [[order[one] for one in some] for some in first_fit([len(episodes[one]) for one in order], limit)]


def figures(groups: Sequence[Sequence[RewardedReply]]) -> dict[str, float]:
    """Return a step's means over all replies.

    mean: of the rewards. spread: of each group's standard deviation. tokens: of a reply. failed: part of the
    replies that a grader could not grade. even: part of the groups that teach nothing.
    """
    replies = [reply for group in groups for reply in group]
    spreads = [statistics.pstdev([reply.reward for reply in group]) for group in groups]
    return {
        "mean": statistics.fmean(reply.reward for reply in replies),
        "spread": statistics.fmean(spreads),
        "tokens": statistics.fmean(len(reply.tokens) for reply in replies),
        "failed": statistics.fmean(bool(reply.errors) for reply in replies),
        "even": statistics.fmean(is_even([reply.reward for reply in group]) for group in groups),
    }


def _mean(group: Sequence[RewardedReply]) -> float:
    return statistics.fmean(reply.reward for reply in group)


def reward_scores(rewards: Sequence[float]) -> Scores:
    """Return held-out scores: the loss is the negated mean reward."""
    mean = statistics.fmean(rewards)
    return Scores.from_means(-mean, {"mean": mean})


class Rewarding(Measuring):
    """Rewards of the replies to all held-out prompts. Its losses are negated rewards, one of each prompt."""

    def __init__(
        self,
        trainable: Trainable,
        tokenizer: Any,
        recipe: Recipe,
        held_out: Dataset | None,
        folder: Path,
        listen: Listen,
        gate: Gate,
        *,
        policy: Policy,
    ) -> None:
        super().__init__(trainable, tokenizer, recipe, held_out, folder, listen, gate)
        self._prompts = list(held_out.prompts) if held_out is not None else []
        self._policy = policy

    def _measure(self, subject: str) -> Replies:
        if not self._prompts:
            return Replies()
        self._listen(events.Phase(at=time.time(), name="measuring", message=subject))
        rows: list[Sample] = [prompt.sample for prompt in self._prompts]
        groups = self._policy.held_out(self._trainable, rows, bare=subject == "base")
        rewards = [_mean(group) for group in groups]
        found = {REWARD: statistics.fmean(rewards)}
        self._listen(events.Measured(at=time.time(), subject=subject, metrics=found, rows=len(rows)))
        return Replies(found, [group[0].text for group in groups], [-one for one in rewards])
