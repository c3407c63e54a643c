"""Real jobs: on the default base beside requests, and on a tiny one up to the same adapter after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from .support import Server, Starter
from .training_support import BASE, add_file, ended, make_job, messages, openai_client, wait_job

MOODS = ("unhappy", "happy")
COLORS, ITEMS = ("red", "blue", "green", "black"), ("shirt", "hat", "shoe", "coat")
SETTINGS: dict[str, Any] = {
    "max_steps": 4, "batch_size": 2, "r": 4, "targets": ["q_proj", "v_proj"], "learning_rate": 5e-3,
    "eval_every": 4, "save_every": 2,
}  # fmt: skip
PROMPTS = ("The capital of France is", "def add(a, b):", "I want 3 blue hats please")


def rows(count: int, start: int = 0) -> str:
    """Orders in words, each answered by JSON."""
    lines = []
    for number in range(start, start + count):
        color, item = COLORS[number % 4], ITEMS[number // 4 % 4]
        asked = f"I want {number % 7 + 1} {color} {item}s please"
        reply = json.dumps({"item": item, "color": color, "count": number % 7 + 1})
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def real_job(client: OpenAI, name: str, **settings: Any) -> Any:
    held_out = add_file(client, rows(4, start=100), "held-out.jsonl")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": SETTINGS | settings}}
    return make_job(client, rows(12), method=method, validation_file=held_out, extra={"name": name})


def step_of(job: Any) -> int:
    return int((job.progress or {}).get("step") or 0)


def answers(client: OpenAI) -> list[str]:
    """Greedy texts with their log-probabilities, to the last bit."""
    found = []
    for prompt in PROMPTS:
        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=8, temperature=0, logprobs=3)
        found.append(answer.choices[0].model_dump_json())
    return found


def base_mapping(pid: int) -> dict[str, int]:
    """kB of the base's memory as a process has it mapped: in all, and what is its own of that."""
    sums = {"Rss": 0, "Private_Dirty": 0, "Private_Clean": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split(" ", 1)[0]:
            inside = "onebase-base" in line
        elif inside and name in sums:
            sums[name] += int(value.split()[0])
    return sums


@pytest.fixture(scope="module")
def server(serve_real: Starter) -> Iterator[Server]:
    with serve_real("--kv-memory", "200MB", "--max-sequences", "8", "--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return openai_client(server)


@pytest.fixture(scope="module")
def unbroken(server: Server, client: OpenAI) -> Any:
    """A job that nothing disturbed."""
    return wait_job(server, client, real_job(client, "orders").id, ended)


def test_a_job_makes_an_adapter_that_is_better_on_held_out_rows_and_serves(
    client: OpenAI, unbroken: Any
) -> None:
    assert (unbroken.status, unbroken.activated, unbroken.error) == ("succeeded", True, None)
    assert unbroken.report["loss_after"] < unbroken.report["loss_before"]
    assert unbroken.report["better"] is True
    assert unbroken.estimate["seconds"] > 0
    (finished,) = (
        event.data
        for event in client.fine_tuning.jobs.list_events(unbroken.id, limit=100)
        if (event.data or {}).get("kind") == "finished"
    )
    assert finished["report"]["better"] is True
    assert not {"losses", "held_out", "recipe"} & set(finished["report"])
    answer = client.chat.completions.create(
        model="orders", messages=[{"role": "user", "content": PROMPTS[2]}], max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content is not None
    losses = client.files.content(unbroken.result_files[0]).text.splitlines()
    assert losses[0] == "step,train_loss,valid_loss"
    assert len(losses) == 1 + 5


@pytest.fixture(scope="module")
def tiny(serve_real: Starter, small_base: Path) -> Iterator[Server]:
    """A real engine, verifier and trainer on a base that is trained in a moment."""
    with serve_real("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def small_client(tiny: Server) -> OpenAI:
    return openai_client(tiny)


@pytest.fixture(scope="module")
def small_job(tiny: Server, small_client: OpenAI) -> Any:
    """A job on the small base that nothing disturbed."""
    return wait_job(tiny, small_client, real_job(small_client, "orders").id, ended)


GOOD: dict[str, Any] = {"max_steps": 24, "batch_size": 4, "r": 4, "learning_rate": 2e-2, "eval_every": 24}
SHORT = GOOD | {"max_steps": 3, "learning_rate": 2e-3, "eval_every": 3}


def tiny_job(server: Server, name: str, settings: dict[str, Any], rows: str, **body: Any) -> Any:
    """Run a job to its end; its held-out rows are the same as those of every other."""
    client = openai_client(server)
    kind = body.pop("method", "supervised")
    body.setdefault("validation_file", add_file(client, body.pop("held_out", rows), "held-out.jsonl"))
    method: Any = {"type": kind, kind: {"hyperparameters": settings}}
    extra = {"name": name, **body.pop("extra", {})}
    return wait_job(server, client, make_job(client, rows, method=method, extra=extra, **body).id, ended)


def active(server: Server, name: str) -> str | None:
    adapter = server.client().get(f"/v1/adapters/{name}").json()
    return adapter["version"] if adapter["active"] else None


def test_a_worse_job_does_not_replace_the_active_version_and_a_better_one_does(tiny: Server) -> None:
    first = tiny_job(tiny, "tickets", SHORT, rows(12))
    assert (first.status, first.activated) == ("succeeded", True)
    good = tiny_job(tiny, "tickets", GOOD, rows(12))
    assert (good.status, good.activated, good.replaced) == ("succeeded", True, first.version)
    assert good.report["active"] == first.version
    assert good.report["loss_active"] == pytest.approx(first.report["loss_after"], abs=1e-6)
    worse = tiny_job(tiny, "tickets", SHORT | {"max_steps": 2}, rows(12))
    report = worse.report
    assert report["loss_before"] > report["loss_after"] > good.report["loss_after"]
    assert report["loss_active"] == pytest.approx(good.report["loss_after"], abs=1e-6)
    assert (worse.status, worse.activated, worse.replaced) == ("succeeded", False, None)
    assert (report["better"], report["better_than"]) == (False, {"base": True, "active": False})
    assert active(tiny, "tickets") == good.version
    said = messages(openai_client(tiny), worse.id)
    assert f"Measuring {good.fine_tuned_model}, which is active, on the held-out rows." in said
    loss = f"{report['loss_active']:.4f}"
    assert f"{good.fine_tuned_model}, which is active: held-out loss {loss}" in said
    assert said[-1].endswith(f"it is no better than {good.fine_tuned_model}, which is active.")


def test_the_same_rows_and_settings_again_give_the_version_that_is_active_already(tiny: Server) -> None:
    first = tiny_job(tiny, "same", SHORT, rows(12))
    again = tiny_job(tiny, "same", SHORT, rows(12))
    assert (again.version, again.activated, again.replaced) == (first.version, True, None)
    assert again.report["better_than"] == {"base": True, "active": False}
    assert "that version is active already" in messages(openai_client(tiny), again.id)[-1]


def test_an_adapter_of_another_kind_is_not_replaced_without_a_comparison(tiny: Server) -> None:
    labelled = [{"text": f"I want {n} {COLORS[n % 2]} hats", "label": COLORS[n % 2]} for n in range(12)]
    texts = "".join(json.dumps(row) + "\n" for row in labelled)
    first = tiny_job(tiny, "kinds", SHORT, texts, method="classification", extra={"activate": "always"})
    assert (first.status, first.activated) == ("succeeded", True)
    second = tiny_job(tiny, "kinds", SHORT, rows(12))
    assert (second.status, second.activated) == ("succeeded", False)
    assert second.report["better_than"] == {"base": True, "active": None}
    said = messages(openai_client(tiny), second.id)[-1]
    assert (
        f"could not be compared with {first.fine_tuned_model}, which is active: it classifies texts" in said
    )
    assert active(tiny, "kinds") == first.version
    by_base = SHORT | {"max_steps": 4}
    third = tiny_job(tiny, "kinds", by_base, rows(12), extra={"activate": "if_better_than_base"})
    assert (third.activated, third.replaced) == (True, first.version)


def test_a_slice_that_gets_worse_than_with_the_active_version_keeps_that_one_active(tiny: Server) -> None:
    lines = [json.loads(line) for line in rows(12).splitlines()]
    sliced = "".join(json.dumps(row | {"slice": "ab"[n % 2]}) + "\n" for n, row in enumerate(lines))
    good = tiny_job(tiny, "slices", GOOD, sliced)
    assert good.activated is True
    settings = SHORT | {"max_regression": 0.02, "slice_rows": 1}
    worse = tiny_job(tiny, "slices", settings, sliced, extra={"activate": "always"})
    assert (worse.status, worse.activated) == ("succeeded", False)
    slices = worse.report["slices"]
    assert (slices["against"], set(slices["regressed"])) == ("base", {"a", "b"})
    for one in slices["slices"]:
        assert (one["regressed_against"], one["before"] > one["after"] > one["active"]) == (["active"], True)
    said = messages(openai_client(tiny), worse.id)[-1]
    assert f"it is worse by more than 0.02 than {good.fine_tuned_model}, which is active" in said


def test_a_job_of_one_step_in_rank_1_is_proved(server: Server, client: OpenAI) -> None:
    """After AdamW's first step all numbers of B have one size, and are rounded alike."""
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"max_steps": 1, "r": 1}}}
    job = make_job(client, rows(4), method=method, extra={"name": "one-step"}, seed=1)
    done = wait_job(server, client, job.id, ended)
    assert (done.status, done.error) == ("succeeded", None)
    (version,) = server.client().get("/v1/adapters/one-step/versions").json()["data"]
    assert version["report"]["proof"]["modules_changed"] == 7 * 30


@pytest.mark.full
def test_a_job_goes_on_from_the_version_of_another_and_begins_with_its_loss(
    tiny: Server, small_client: OpenAI, small_job: Any
) -> None:
    held_out = add_file(small_client, rows(4, start=100), "held-out.jsonl")
    settings = {name: SETTINGS[name] for name in ("batch_size", "learning_rate")} | {"max_steps": 1}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    job = make_job(
        small_client, rows(12, 12), model=small_job.fine_tuned_model, method=method, validation_file=held_out
    )
    done = wait_job(tiny, small_client, job.id, ended)
    assert (done.status, done.error, done.name) == ("succeeded", None, "orders")
    report = done.report
    assert report["loss_parent"] == pytest.approx(small_job.report["loss_after"], abs=1e-6)
    assert report["loss_before"] == pytest.approx(small_job.report["loss_before"], abs=1e-6)
    assert report["better"] is (report["loss_after"] < report["loss_parent"])
    assert done.activated is report["better"]
    taken = done.method.supervised.hyperparameters
    assert (taken.r, taken.targets) == (4, ["q_proj", "v_proj"])


@pytest.mark.full
def test_a_job_trains_a_classifier_that_answers_with_the_names_of_its_labels(
    tiny: Server, small_client: OpenAI
) -> None:
    def texts(count: int, start: int) -> str:
        found = [
            (f"This {ITEMS[n % 4]} is {'good' if n % 2 else 'bad'}", n % 2)
            for n in range(start, start + count)
        ]
        return "".join(json.dumps({"text": text, "label": MOODS[label]}) + "\n" for text, label in found)

    held_out = add_file(small_client, texts(6, 50), "held-out.jsonl")
    settings = {name: SETTINGS[name] for name in ("max_steps", "r", "targets", "learning_rate", "eval_every")}
    method: Any = {
        "type": "classification",
        "classification": {"hyperparameters": settings | {"batch_size": 8}},
    }
    job = make_job(
        small_client, texts(16, 0), method=method, validation_file=held_out, extra={"name": "moods"}
    )
    done = wait_job(tiny, small_client, job.id, ended)
    assert (done.status, done.error, done.method.type) == ("succeeded", None, "classification")
    report = done.report
    assert set(report["metrics_after"]) == {"accuracy", "f1"}
    assert report["better"] is (report["loss_after"] < report["loss_before"])
    assert done.activated is report["better"]
    classes = report["classes"]
    assert (classes["labels"], classes["rows"], classes["base_by"]) == (sorted(MOODS), 6, "decide")
    said = messages(small_client, job.id)
    assert any("Labels of the adapter: accuracy" in message for message in said)

    rows = [json.loads(line) for line in texts(6, 50).splitlines()]
    ask = f"Which label fits this text? Answer with one of: {', '.join(sorted(MOODS))}"
    with tiny.client() as http:
        version = http.get(f"/v1/adapters/moods/versions/{done.version}").json()["report"]
        assert (version["task"], version["label_names"]) == ("SEQ_CLS", sorted(MOODS))
        body = {"model": done.fine_tuned_model, "input": [row["text"] for row in rows]}
        data = http.post("/classify", json=body).json()["data"]
        right = 0
        for row in rows:
            asked = [{"role": "user", "content": f"{row['text']}\n\n{ask}"}]
            decided = http.post("/v1/decide", json={"messages": asked, "choices": sorted(MOODS)}).json()
            right += decided["choice"] == row["label"]
    assert report["metrics_before"]["accuracy"] == pytest.approx(right / 6)
    given = [one["label"] for one in data]
    assert report["metrics_after"]["accuracy"] == pytest.approx(
        sum(label == row["label"] for label, row in zip(given, rows, strict=True)) / 6
    )
    losses = [
        -math.log(one["probs"][sorted(MOODS).index(row["label"])])
        for one, row in zip(data, rows, strict=True)
    ]
    assert report["loss_after"] == pytest.approx(sum(losses) / 6, abs=0.05)


@pytest.mark.full
def test_openais_own_rows_train_as_they_are(tiny: Server, small_client: OpenAI) -> None:
    """As in OpenAI's guide: tools and calls, the older functions, weights, and preferences."""
    weather = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}, "strict": True}
    call = {"name": "get_weather", "arguments": "{}"}
    asked = {"role": "user", "content": "Rain in Oslo?"}
    said = {"role": "assistant", "content": "No.", "name": "bot"}
    chats = [
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {**asked, "name": "ann"},
                {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
                {**said, "weight": 0},
                {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
                {**said, "content": "Yes.", "weight": 1},
            ],
            "tools": [{"type": "function", "function": weather}],
            "parallel_tool_calls": False,
        },
        {
            "messages": [
                asked,
                {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "get_weather", "content": "dry"},
                said,
            ],
            "functions": [weather],
        },
    ]
    pairs = [
        {
            "input": {"messages": [asked], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said],
            "non_preferred_output": [{"role": "assistant", "content": f"Who knows {number}?"}],
        }
        for number in range(2)
    ]
    settings: Any = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": "auto"}
    more = {"max_steps": 1, "r": 4, "targets": ["q_proj"]}
    for kind, rows in (("supervised", chats), ("dpo", pairs)):
        method: Any = {"type": kind, kind: {"hyperparameters": settings | more}}
        content = "\n".join(map(json.dumps, rows))
        job = make_job(
            small_client, content, method=method, suffix="Guide", seed=42, metadata={"from": "openai"}
        )
        done = wait_job(tiny, small_client, job.id, ended)
        assert (done.status, done.error, done.name) == ("succeeded", None, "ft-Guide")
        assert (done.method.type, done.hyperparameters.n_epochs, done.seed) == (kind, 1, 42)
        assert done.trained_tokens > 0


LONG: dict[str, Any] = {"max_steps": 120, "eval_every": 120, "save_every": 2}
"""Settings of jobs that are cut off: their first steps are seen before the last is taken."""


@pytest.fixture(scope="module")
def long_job(tiny: Server, small_client: OpenAI) -> Any:
    """Such a job that nothing disturbed."""
    return wait_job(tiny, small_client, real_job(small_client, "whole", **LONG).id, ended)


@pytest.mark.full
def test_a_job_killed_at_a_step_ends_in_the_same_adapter_to_the_last_bit(
    tiny: Server, small_client: OpenAI, long_job: Any
) -> None:
    job = real_job(small_client, "broken", **LONG)
    wait_job(tiny, small_client, job.id, lambda job: step_of(job) >= 2)
    (trainer,) = tiny.trainer_pids()
    os.kill(trainer, signal.SIGKILL)
    done = wait_job(tiny, small_client, job.id, ended)
    assert done.status == "succeeded"
    said = messages(small_client, job.id)
    assert any("signal SIGKILL" in message for message in said)
    assert sum("The files are sound" in message for message in said) == 1  # only the check read them
    assert done.version == long_job.version  # by its content


@pytest.mark.full
def test_a_job_that_another_server_takes_over_ends_in_the_same_adapter_to_the_last_bit(
    serve_real: Starter, small_base: Path, tmp_path: Path, long_job: Any
) -> None:
    options = (
        "--registry", f"sqlite:///{tmp_path / 'registry.db'}", "--store", str(tmp_path / "store"),
        "--base", str(small_base), "--kv-memory", "50MB", "--threads", "1",
    )  # fmt: skip
    with serve_real(*options) as one, serve_real(*options) as other:
        here, there = openai_client(one), openai_client(other)
        job = real_job(here, "moved", **LONG)
        wait_job(one, here, job.id, lambda job: step_of(job) >= 2)
        one.signal(signal.SIGTERM)
        one.exit_status()
        done = wait_job(other, there, job.id, ended)
        assert (done.status, done.version) == ("succeeded", long_job.version)
        said = messages(there, job.id)
        assert any(told.startswith("Taken over by another server, resumed at step") for told in said)
        assert any(told.startswith("Continuing after step") for told in said)


@pytest.mark.full
def test_a_stopped_job_whose_trainer_is_killed_keeps_the_best_of_the_steps_before(
    tiny: Server, small_client: OpenAI
) -> None:
    job = real_job(small_client, "stopped", epochs=100, max_steps=400, eval_every=2, schedule="constant")
    wait_job(tiny, small_client, job.id, lambda job: step_of(job) >= 3)
    (trainer,) = tiny.trainer_pids()
    asked: Any = small_client.post(f"/fine_tuning/jobs/{job.id}/stop", cast_to=FineTuningJob)
    os.kill(trainer, signal.SIGKILL)
    done = wait_job(tiny, small_client, job.id, ended)
    assert (done.status, done.error, done.activated) == ("succeeded", None, True)
    report, last = done.report, done.report["steps"]
    assert done.stopped == {**asked.stopped, "step": last}
    assert 3 <= last < 400
    lines = small_client.files.content(done.result_files[0]).text.splitlines()[1:]
    held_out = {int(step): float(loss) for step, _, loss in (line.split(",") for line in lines) if loss}
    assert max(held_out) == last
    assert report["loss_after"] == min(loss for step, loss in held_out.items() if step)
    assert held_out[report["best_step"]] == report["loss_after"]
    (told,) = (
        event.data
        for event in small_client.fine_tuning.jobs.list_events(job.id, limit=100)
        if (event.data or {}).get("kind") == "stopped"
    )
    assert told == {"kind": "stopped", "step": last, "steps": 400, "best_step": report["best_step"], "by": ""}


@pytest.mark.full
def test_a_job_on_hold_says_what_it_will_take_and_trains_the_same_adapter_then(
    tiny: Server, small_client: OpenAI, small_job: Any
) -> None:
    held_out = add_file(small_client, rows(4, start=100), "held-out.jsonl")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": SETTINGS}}
    extra = {"name": "held", "hold": True}
    job = make_job(small_client, rows(12), method=method, validation_file=held_out, extra=extra)
    held = wait_job(tiny, small_client, job.id, lambda job: job.status != "validating_files")
    assert (held.status, held.estimate["fits"]) == ("paused", True)
    tiny.wait_for(lambda: not tiny.trainer_pids())
    told = [event.data for event in small_client.fine_tuning.jobs.list_events(job.id) if event.data]
    (report,) = [data["report"] for data in told if data["kind"] == "data_checked"]
    assert (report["rows"], report["evaluation"]["rows"], len(report["examples"])) == (12, 4, 3)
    small_client.fine_tuning.jobs.resume(job.id)
    done = wait_job(tiny, small_client, job.id, ended)
    assert done.version == small_job.version


def test_beside_a_job_the_base_is_there_once_and_answers_are_the_same_to_the_last_bit(
    server: Server, client: OpenAI
) -> None:
    before = answers(client)
    job = real_job(client, "beside", max_steps=500, eval_every=500, save_every=500)
    wait_job(server, client, job.id, lambda job: step_of(job) >= 1)
    (trainer,) = server.trainer_pids()
    for _ in range(3):
        assert answers(client) == before
    mapped = base_mapping(trainer)
    assert mapped["Rss"] > 80_000
    assert mapped["Private_Dirty"] + mapped["Private_Clean"] < 5_000
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    server.wait_for(lambda: not server.trainer_pids())
    assert answers(client) == before
    (newest,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert newest.step_number == step_of(client.fine_tuning.jobs.retrieve(job.id))
    model = newest.fine_tuned_model_checkpoint
    asked = client.completions.create(model=model, prompt=PROMPTS[2], max_tokens=4, temperature=0)
    assert asked.choices[0].text
    (version,) = server.client().get(f"/v1/adapters/{model}/versions").json()["data"]
    assert version["report"]["targets"] == ["q_proj", "v_proj"]
    assert version["report"]["proof"]["modules_changed"] > 0
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.NotFoundError, match="is gone"):
        client.completions.create(model=model, prompt="x", max_tokens=1)


def test_every_bad_line_is_told_and_a_job_that_cannot_fit_is_refused_before_it_begins(
    serve_real: Starter, small_base: Path
) -> None:
    options = ("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1")
    with serve_real(*options, "--train-memory", "10MB") as server:
        client = openai_client(server)
        lines = rows(6).splitlines()
        lines[1] = '{"messages": []}'
        lines[4] = "no json"
        bad, big = make_job(client, "\n".join(lines)), real_job(client, "big")
        done = wait_job(server, client, bad.id, ended)
        assert (done.status, done.error.code, done.error.param) == ("failed", "invalid_file", "training_file")
        assert "line 5" in done.error.message
        events = client.fine_tuning.jobs.list_events(bad.id)
        told: Any = [event.data for event in events if event.level == "error"]
        problems = [problem["line"] for data in told for problem in data.get("problems", [])]
        assert problems == [2, 5]
        done = wait_job(server, client, big.id, ended)
        assert (done.status, done.error.code, done.resumable) == ("failed", "does_not_fit", False)


def test_unknown_names_of_the_base_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="base is"):
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-1")
