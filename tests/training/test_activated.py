"""Training activated LoRAs: PEFT's gradients from the invocation on, a result that is proved and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine.harness import Lab, Request, run
from tests.tiny import load_folder
from tests.training.runs import dataset, recipe_for, trainer
from torch import nn

from onebase_adapters.proof.verifier import Verifier
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view
from onebase_engine.kernels.weights import invocation_of
from onebase_training.batches import MicroBatch
from onebase_training.checkpoint import write_adapter
from onebase_training.data.dataset import DataError, Dataset, Sample
from onebase_training.data.rows import parse_row
from onebase_training.data.tokens import BaseTokens, RowTokens, TokenizedRow
from onebase_training.events import OpenGate
from onebase_training.parent import Parent, modules_of
from onebase_training.recipe import RecipeError, continued, parse_recipe
from onebase_training.run import TrainingRequest, load_tokenizer, train
from onebase_training.trainable import Trainable

INVOCATION = (41, 42)


def judged(count: int, seed: int = 0) -> Dataset:
    """Rows of a random text, the invocation, and a reply by whether the text begins with a low token."""
    rng = np.random.default_rng(seed)
    rows = []
    for line in range(1, count + 1):
        text = rng.integers(50, 320, int(rng.integers(4, 24)))
        reply = [60, 61, 62] if text[0] < 180 else [70, 71, 72]
        ids = np.array([*text, *INVOCATION, *reply], dtype=np.int32)
        supervised = np.arange(len(ids)) >= len(ids) - len(reply)
        rows.append(Sample(ids, supervised, line, prompt=len(ids) - len(reply)))
    return dataset(rows)


@pytest.fixture(scope="module")
def nf4(base_folder: Path) -> nn.Module:
    return load_base(BaseSettings(folder=base_folder))


def gradients_of_peft(base: nn.Module, trainable: Trainable, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """By PEFT's own model, one row after the other, which finds the invocation by itself."""
    settings = trainable.model.peft_config["default"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        alora_invocation_tokens=[*INVOCATION],
    )
    model: Any = get_peft_model(view(base), config)
    own = trainable.named_parameters()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = own[name].detach().clone()
    model.train()
    for sample in batch.samples:
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        places = torch.from_numpy(np.flatnonzero(sample.supervised))
        logits = model(input_ids=ids, use_cache=False).logits[0, places - 1]
        nn.functional.cross_entropy(logits.float(), ids[0, places], reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed twice"])
@pytest.mark.parametrize("precision", ["exact_base", "nf4"])
def test_gradients_of_packed_rows_are_pefts(
    precision: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(precision)
    data = judged(5)
    rows = list(data.rows)
    # Also a row that is invoked twice, and one that is not at all.
    twice = np.array([90, *INVOCATION, 91, 92, *INVOCATION, 93, 94], dtype=np.int32)
    never = np.array([90, 91, 92, 93], dtype=np.int32)
    for ids in (twice, never):
        rows.append(Sample(ids, np.arange(len(ids)) >= len(ids) - 2, len(rows), prompt=len(ids) - 2))
    batch = MicroBatch(tuple(rows), tuple(range(len(rows))))  # type: ignore[arg-type]
    recipe = recipe_for(
        data,
        r=4,
        targets=["all-linear", "lm_head"],
        init="false",
        alora_invocation_tokens=[*INVOCATION],
        gradient_checkpointing=checkpointing,
    )
    trainable = Trainable(base, recipe, OpenGate())
    losses, _ = trainable.losses(batch)
    losses.sum().backward()
    wanted = gradients_of_peft(base, trainable, batch)
    got = {name: parameter.grad for name, parameter in trainable.named_parameters().items()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        found = got[name]
        assert found is not None
        error = float((found - gradient).norm() / gradient.norm().clamp(min=1e-9))
        assert error < (1e-4 if precision == "exact_base" else 0.05), name
    bare = MicroBatch((rows[-1],), (0,))  # type: ignore[arg-type]
    trainable.model.zero_grad()
    trainable.losses(bare)[0].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in trainable.parameters()), "it is the base's"


def test_it_learns_and_is_proved_and_served_as_trained(nf4: nn.Module, tmp_path: Path) -> None:
    data = judged(32)
    recipe = recipe_for(
        data, epochs=8, max_steps=40, learning_rate=1e-2, alora_invocation_tokens=[*INVOCATION]
    )
    done = trainer(nf4, recipe, data, tmp_path / "run")
    state = done.run_steps()
    assert state.losses[-1][1] < 0.5 * state.losses[0][1]
    folder = tmp_path / "adapter"
    write_adapter(done.trainable.model, folder, base="b", commit=None, card=lambda size: f"# {size}\n")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [*INVOCATION]
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    verifier = Verifier(nf4, max_rank=64, base_id="b")
    proved = verifier.prove(
        *files,
        tmp_path / "packed",
        probes=[[5, 6, 7, 8], [200, 201, 202]],
        probe_tokens=4,
        allow_noop=False,
        on_progress=lambda stage, part: None,
    )
    assert (proved.report.kinds, proved.report.invocation_tokens) == (("alora",), INVOCATION)
    loaded = load_folder(nf4, folder)
    trained = done.trainable.weights()
    assert {invocation_of({name: one}) for name, one in trained.items()} == {INVOCATION}
    lab = Lab(nf4, [folder], [loaded.reference], [loaded.weights])
    held = judged(12, seed=9)
    asked = [
        Request(tuple(row.ids[: row.prompt].tolist()), 0, 3) for row in held.rows if isinstance(row, Sample)
    ]
    texts = run(lab.engine(), asked)
    assert not lab.disagreements(asked, texts)
    assert sum(text in ([60, 61, 62], [70, 71, 72]) for text in texts) > 8
    again = recipe_for(data, max_steps=2, init="true", r=16, alora_invocation_tokens=[*INVOCATION])
    parent = Parent.of_folder(folder)
    further = Trainable(nf4, again, OpenGate(), parent=parent)
    batch = MicroBatch((data.rows[0],), (0,))  # type: ignore[arg-type]
    with done.trainable.evaluating(), further.evaluating():
        assert torch.equal(further.losses(batch)[0], done.trainable.losses(batch)[0])
    version = Trainable(nf4, recipe_for(data), OpenGate(), version=parent)
    with done.trainable.evaluating(), version.evaluating():
        assert torch.equal(version.losses(batch)[0], done.trainable.losses(batch)[0])


def chats(folder: Path, replies: list[tuple[str, str]]) -> Path:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in replies]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "rows.jsonl"


def request_of(base: Path, folder: Path, rows: Path, **settings: Any) -> TrainingRequest:
    return TrainingRequest(
        name="judge",
        recipe=parse_recipe({"r": 4, "max_steps": 2, "eval_split": 0.0, **settings}),
        train=rows,
        folder=folder / "run",
        base=BaseSettings(folder=base),
        base_name="small",
    )


def test_a_run_takes_the_invocation_as_text(talking_folder: Path, tmp_path: Path) -> None:
    base = load_base(BaseSettings(folder=talking_folder))
    rows = chats(
        tmp_path, [(f"The answer is {n}.\nVerdict:", " good" if n % 2 else " bad") for n in range(8)]
    )
    job = request_of(talking_folder, tmp_path, rows, alora_invocation="\nVerdict:")
    train(lambda: base, job, lambda event: None, OpenGate())
    config = json.loads((job.folder / "adapter" / "adapter_config.json").read_text())
    tokens = config["alora_invocation_tokens"]
    by_tokens = request_of(talking_folder, tmp_path / "b", rows, alora_invocation_tokens=tokens)
    train(lambda: base, by_tokens, lambda event: None, OpenGate())
    same = (one.folder / "adapter" / "adapter_model.safetensors" for one in (job, by_tokens))
    first, second = (path.read_bytes() for path in same)
    assert first == second
    parent = Parent.of_folder(job.folder / "adapter")
    own = modules_of(parent, base)

    def further(name: str, text: str) -> TrainingRequest:
        settings = continued({"alora_invocation": text}, own, parent.label)
        return replace(request_of(talking_folder, tmp_path / name, rows, **settings), parent=parent)

    train(lambda: base, further("c", "\nVerdict:"), lambda event: None, OpenGate())
    with pytest.raises(RecipeError, match=r"has the invocation .* Leave the invocation out"):
        train(lambda: base, further("d", "Verdict:"), lambda event: None, OpenGate())


def test_a_row_without_the_invocation_is_an_error_that_names_it(talking_folder: Path, tmp_path: Path) -> None:
    rows = chats(tmp_path, [("One.\nVerdict:", " good"), ("Two.", "\nVerdict: bad"), ("Three.", " bad")])
    job = request_of(talking_folder, tmp_path, rows, alora_invocation="\nVerdict:")
    with pytest.raises(DataError) as refused:
        train(lambda: pytest.fail("the base is not needed"), job, lambda event: None, OpenGate())
    assert [problem.line for problem in refused.value.problems] == [2, 3]
    assert all("lacks the invocation" in problem.reason for problem in refused.value.problems)


def test_only_what_follows_the_invocation_is_learned(talking_folder: Path) -> None:
    base = BaseTokens(load_tokenizer(BaseSettings(folder=talking_folder)))
    invocation = base.go_on("\nVerdict:")
    tokens = RowTokens(base, everything=True, limit=200, too_long="refuse", invocation=invocation)
    row = parse_row({"prompt": "Hello.\nVerdict: no.\nVerdict:", "completion": " good"}, "supervised")
    (made,) = tokens.tokenize([(1, row)])  # type: ignore[list-item]
    (sample,) = made.samples  # type: ignore[union-attr]
    first = int(np.flatnonzero(sample.supervised)[0])
    assert sample.ids[first - len(invocation) : first].tolist() == invocation
    assert first == sample.prompt, "from the last one on, though everything is learned"


@pytest.mark.parametrize(("last", "answered"), [([7, *INVOCATION, 5], True), ([7, 8, 9, 5], False)])
def test_no_reply_is_generated_where_the_last_prompt_lacks_the_invocation(
    talking_folder: Path, last: list[int], answered: bool
) -> None:
    """The earlier reply of the row is learned still, and its prompt is not that of the last reply."""
    base = BaseTokens(load_tokenizer(BaseSettings(folder=talking_folder)))
    tokens = RowTokens(base, everything=False, limit=200, too_long="refuse", invocation=INVOCATION)
    pieces = [TokenizedRow([6, *INVOCATION, 4], [(3, 4)], 3), TokenizedRow(last, [(3, 4)], 3)]
    made = tokens._bounded(1, pieces)
    assert [sample.ids.tolist() for sample in made.samples] == [piece.ids for piece in pieces[: 1 + answered]]
    assert (made.reply is not None) is answered


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"alora_invocation": "x", "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"alora_invocation": "x", "use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1], "init": "eva"}, "init"),
        ({"alora_invocation_tokens": [1], "method": "classification"}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": "1,x"}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [1] * 65}, "alora_invocation_tokens"),
        ({"alora_invocation": "x" * 1001}, "alora_invocation"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(settings)
    assert refused.value.field == field
    assert parse_recipe({"alora_invocation_tokens": "4, 5"}).alora_invocation_tokens == (4, 5)


def test_an_invocation_that_is_no_token_is_refused(talking_folder: Path, tmp_path: Path) -> None:
    rows = chats(tmp_path, [("One.", " good")])
    job = request_of(talking_folder, tmp_path, rows, alora_invocation="word " * 199)
    with pytest.raises(RecipeError, match="tokens"):
        train(lambda: pytest.fail("the base is not needed"), job, lambda event: None, OpenGate())
    assert replace(job.recipe, alora_invocation="").alora_invocation_tokens == ()
