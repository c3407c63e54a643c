"""Learning from rewards: a tiny base gets better at what a grader likes, and at nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.runs import talking_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit
from onebase_engine.lora.packed_adapter import read_packed_adapter
from onebase_training import events, replies
from onebase_training import run as run_module
from onebase_training.checkpoint import WEIGHTS, RunReport
from onebase_training.data.dataset import DataError
from onebase_training.events import Interrupted, OpenGate
from onebase_training.graders import LARGEST_REWARD, Graded, Grader, grade, parse_grader
from onebase_training.recipe import MOST_REPLY_TOKENS, RecipeError, parse_recipe
from onebase_training.reinforcement import advantages, figures, rollout_parts
from onebase_training.rollouts import RewardedReply, RolloutOrder, RolloutPrompt, item_of
from onebase_training.run import TrainingRequest, load_tokenizer, train

GRADER = {
    "type": "string_check",
    "name": "has a letter",
    "input": "{{sample.output_text}}",
    "reference": "{{item.letter}}",
    "operation": "like",
}
SETTINGS: dict[str, Any] = {
    "method": "reinforcement",
    "grader": json.dumps(GRADER),
    "r": 8,
    "batch_size": 4,
    "group_size": 8,
    "sample_tokens": 4,
    "temperature": 0.3,
    "max_steps": 12,
    "epochs": 10.0,
    "learning_rate": 2e-2,
    "eval_every": 6,
    "eval_samples": 4,
}


class LocalRollouts:
    """Samples with an engine of this process, as a server's does, and grades."""

    def __init__(self, base: torch.nn.Module, tokenizer: Any, grader: Grader, pause_at: int = 0) -> None:
        self._base, self._tokenizer, self._grader = base, tokenizer, grader
        self._pause_at, self._draws = pause_at, 0

    def draw(self, rollout: RolloutOrder) -> list[list[RewardedReply]]:
        self._draws += 1
        if self._draws == self._pause_at:
            raise Interrupted("pause")
        stops = replies.stop_ids(self._base, self._tokenizer)
        engine = replies._engine(self._base, 8, 512, stops, lambda: None)
        adapters = []
        if rollout.weights is not None:
            engine.put_adapter("live", read_packed_adapter(Path(rollout.weights.path)))
            adapters = [AdapterRef("live")]
        for place, one in enumerate(rollout.prompts):
            sampling = Sampling(
                temperature=rollout.temperature, seed=one.seed, max_tokens=one.max_tokens, logprobs=0
            )
            submit = Submit(
                id=str(place), prompt=one.tokens, sampling=sampling, adapters=adapters, n=rollout.n
            )
            engine.submit(submit)
        tokens: dict[tuple[int, int], list[int]] = {}
        while engine.busy:
            engine.step()
            for output in engine.take_outputs():
                tokens.setdefault((int(output.id), output.choice), []).extend(output.tokens)
        return [
            [self._reply(tokens[place, choice], one.item) for choice in range(rollout.n)]
            for place, one in enumerate(rollout.prompts)
        ]

    def _reply(self, tokens: list[int], item: str) -> RewardedReply:
        async def text(work: Callable[[], float]) -> float:
            return work()

        said = self._tokenizer.decode(tokens, skip_special_tokens=True)
        given: Any = None
        found = asyncio.run(
            grade(self._grader, Graded(said, item_of(item)), judge=given, python=given, text=text)
        )
        return RewardedReply(tokens=tokens, logprobs=[], text=said, reward=found.reward, errors=found.errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base that is sure of some words: its replies differ, and a few steps can change them."""
    return talking_base(tmp_path_factory.mktemp("sure"), initializer_range=0.2)


@pytest.fixture(scope="module")
def base(folder: Path) -> torch.nn.Module:
    return load_base(BaseSettings(folder=folder))


def rows(path: Path, count: int, first: int = 0) -> Path:
    """Questions with the letter that their replies should have, of two slices."""
    made = [
        {
            "messages": [{"role": "user", "content": f"Say number {first + one}."}],
            "letter": "k",
            "slice": "even" if one % 2 else "odd",
        }
        for one in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> TrainingRequest:
    return TrainingRequest(
        name="letters",
        recipe=parse_recipe(SETTINGS),
        train=rows(tmp_path / "train.jsonl", 16),
        held_out=rows(tmp_path / "held-out.jsonl", 6, first=100),
        folder=tmp_path / "run",
        base=BaseSettings(folder=folder),
        base_name="small",
    )


def run(
    base: torch.nn.Module,
    job: TrainingRequest,
    listen: Callable[[events.Event], None] = lambda event: None,
    *,
    pause_at: int = 0,
) -> RunReport:
    rollouts = LocalRollouts(base, load_tokenizer(job.base), parse_grader(job.recipe.grader), pause_at)
    return train(lambda: base, job, listen, OpenGate(), rollouts=rollouts)


def rewards_of(heard: list[events.Event]) -> list[float]:
    return [event.rewards["mean"] for event in heard if isinstance(event, events.StepDone)]


def with_settings(job: TrainingRequest, **settings: Any) -> TrainingRequest:
    return replace(job, recipe=parse_recipe({**SETTINGS, **settings}))


def test_the_reward_rises_on_rows_that_were_not_trained_on(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    heard: list[events.Event] = []

    report = run(base, job, heard.append)

    steps = rewards_of(heard)
    assert sum(steps[-2:]) / 2 > sum(steps[:2]) / 2 + 0.2
    assert report.metrics_before["reward"] < 0.2
    assert report.metrics_after["reward"] > 0.5
    assert report.better_than == {"base": True}
    assert [loss for _, loss in report.held_out][-1] < -0.5  # negated rewards, so that less is better
    shown = report.replies[0]
    assert shown["rewards"].keys() == {"base", "adapter"}
    by_slice = {one["slice"]: (one["before"], one["after"]) for one in report.slices["slices"]}  # type: ignore[index]
    assert by_slice.keys() == {"odd", "even"}
    assert any(after > before for before, after in by_slice.values())


def test_a_run_that_was_paused_continues_to_the_same_weights(
    base: torch.nn.Module, job: TrainingRequest, tmp_path: Path
) -> None:
    job = with_settings(job, max_steps=4, eval_every=2)
    run(base, job)
    other = replace(job, folder=tmp_path / "paused")
    with pytest.raises(Interrupted):
        run(base, other, pause_at=5)  # within the third step: the base's replies and an evaluation come first
    run(base, other)

    whole, paused = (load_file(one.folder / "adapter" / WEIGHTS) for one in (job, other))
    assert all(torch.equal(whole[name], paused[name]) for name in whole)


def test_a_kl_penalty_keeps_the_weights_nearer_to_the_start(
    base: torch.nn.Module, job: TrainingRequest, tmp_path: Path
) -> None:
    def moved(**settings: Any) -> float:
        one = replace(
            with_settings(job, max_steps=3, eval_every=3, **settings), folder=tmp_path / str(settings)
        )
        run(base, one)
        return sum(
            float(t.norm()) for n, t in load_file(one.folder / "adapter" / WEIGHTS).items() if "_B" in n
        )

    assert moved(kl=10.0) < moved(kl=0.0)


def test_more_updates_of_a_step_are_clipped_by_ppo(base: torch.nn.Module, job: TrainingRequest) -> None:
    job = with_settings(job, max_steps=3, eval_every=3, updates=2, policy_loss="ppo", eval_samples=2)
    report = run(base, job)
    assert report.steps == 3


def test_groups_with_equal_rewards_teach_nothing() -> None:
    assert advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert advantages([0.1 + 0.2, 0.3]) == [0.0, 0.0]
    assert advantages([0.0, 1.0, 0.0, 1.0]) == [-1.0, 1.0, -1.0, 1.0]
    assert sum(advantages([0.3, 0.5, 7.0])) == pytest.approx(0.0)


def test_the_largest_rewards_have_finite_advantages() -> None:
    assert advantages([LARGEST_REWARD, -LARGEST_REWARD] * 64) == [1.0, -1.0] * 64


def test_a_group_is_even_in_the_figures_if_it_teaches_nothing() -> None:
    def group(*rewards: float) -> list[RewardedReply]:
        return [RewardedReply(tokens=[1], logprobs=[0.0], text="", reward=one) for one in rewards]

    assert figures([group(0.1 + 0.2, 0.3), group(0.0, 1.0)])["even"] == 0.5


def test_a_rollout_has_no_more_tokens_than_a_message_holds() -> None:
    prompts = [RolloutPrompt([1], "{}", one, MOST_REPLY_TOKENS // 20) for one in range(7)]
    parts = rollout_parts(prompts, 8)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert [one for part in parts for one in part] == prompts
    assert [len(part) for part in rollout_parts([RolloutPrompt([1], "{}", 0, 1)] * 100, 8)] == [64, 36]
    rows = [RolloutPrompt([1], "x" * (9 << 20), 0, 1)] * 2
    assert [len(part) for part in rollout_parts(rows, 8)] == [1, 1]


def test_memory_is_estimated_for_replies_as_long_as_they_may_be(
    base: torch.nn.Module, job: TrainingRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    original = run_module.estimate

    def estimate(*args: Any, **options: Any) -> Any:
        given.append(options)
        return original(*args, **options)

    monkeypatch.setattr(run_module, "estimate", estimate)
    run(base, with_settings(job, max_steps=1, eval_every=1, sample_tokens=12))
    shortest = given[0]["longest_row"] - 12
    assert given[0]["supervised_part"] >= 12 / (12 + shortest)


def test_rewards_that_never_differ_leave_the_weights_alone(
    base: torch.nn.Module, job: TrainingRequest
) -> None:
    grader = json.dumps({**GRADER, "reference": ""})
    report = run(base, with_settings(job, grader=grader, max_steps=2, eval_every=2))
    weights = load_file(job.folder / "adapter" / WEIGHTS)
    assert not any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert report.better is False


def test_a_run_without_a_server_says_what_to_do(base: torch.nn.Module, job: TrainingRequest) -> None:
    with pytest.raises(RecipeError, match="onebase jobs create FILE --method reinforcement"):
        train(lambda: base, job, lambda event: None, OpenGate())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, "the model is to write the last reply"),
        ({"text": "x"}, "messages that end with the user's, or prompt"),
    ],
)
def test_rows_that_ask_for_nothing_are_refused(
    base: torch.nn.Module, job: TrainingRequest, row: dict[str, Any], reason: str
) -> None:
    Path(job.train).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=reason):
        run(base, job)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"grader": ""}, "grader"),
        ({"grader": json.dumps({**GRADER, "operation": "near"})}, "grader.operation"),
        ({"grader": json.dumps({**GRADER, "input": "{{sample.text}}"})}, "grader.input"),
        ({"metrics": ["exact_match"]}, "metrics"),
        ({"alora_invocation": "go"}, "alora_invocation"),
        ({"method": "supervised"}, "grader"),
        ({"group_size": 1}, "group_size"),
        ({"group_size": 64, "compute_multiplier": 2.0, "sample_tokens": 4000}, "group_size"),
        ({"sample_tokens": 32768, "eval_samples": 16}, "eval_samples"),
    ],
)
def test_settings_that_rewards_leave_no_place_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**SETTINGS, **settings})
    assert caught.value.field == field
