"""Jobs that learn from rewards on a real server, by OpenAI's client: samples, graders, and what ends them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from tests.training.runs import talking_base

from onebase_adapters.hub.confinement import can_confine_code

from .access import Keys
from .support import Server, Starter, children
from .training_support import (
    BASE,
    add_file,
    ended,
    job_folder,
    make_job,
    messages,
    openai_client,
    step_of,
    until,
    wait_job,
)

CHECK = {
    "type": "string_check",
    "name": "a letter",
    "input": "{{sample.output_text}}",
    "reference": "{{item.letter}}",
    "operation": "like",
}
PYTHON = {
    "type": "python",
    "name": "letters",
    "source": "def grade(sample, item):\n    return sample['output_text'].count(item['letter']) / 4\n",
}
QUICK = {"r": 4, "batch_size": 2, "group_size": 4, "sample_tokens": 4, "temperature": 0.3, "eval_every": 2}
pytestmark = pytest.mark.usefixtures("forks")


def rows(count: int, first: int = 0) -> str:
    made = [
        {
            "messages": [{"role": "user", "content": f"Say number {first + one}."}],
            "letter": "k",
            "slice": "all",
        }
        for one in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in made)


OPTIONS = ("--threads", "1", "--kv-memory", "50MB")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_base(tmp_path_factory.mktemp("sure") / BASE, initializer_range=0.2)


@pytest.fixture(scope="module")
def server(serve_real: Starter, base: Path) -> Iterator[Server]:
    with serve_real("--base", str(base), *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return openai_client(server)


def begin(client: OpenAI, name: str, grader: dict[str, Any], **settings: Any) -> Any:
    method = {
        "type": "reinforcement",
        "reinforcement": {
            "grader": grader,
            "hyperparameters": {"n_epochs": 3, "max_steps": 4, **QUICK, **settings},
        },
    }
    return make_job(
        client,
        rows(8),
        validation_file=add_file(client, rows(3, 100), "held-out.jsonl"),
        method=method,
        extra={"name": name, "activate": "always"},
    )


def live_folders(server: Server, job_id: str) -> list[Path]:
    return list((job_folder(server.data_dir, job_id) / "live").glob("[0-9a-f]*/packed.safetensors"))


def test_a_job_samples_grades_learns_and_is_served(server: Server, client: OpenAI) -> None:
    grader: dict[str, Any] = {
        "type": "multi",
        "name": "both",
        "graders": {"has": CHECK, "like": {**CHECK, "type": "text_similarity"}},
        "calculate_output": "0.9 * has + 0.1 * like",
    }
    del grader["graders"]["like"]["operation"]
    grader["graders"]["like"]["evaluation_metric"] = "fuzzy_match"

    job = begin(client, "letters", grader)
    done = wait_job(server, client, job.id, ended, 300.0)

    assert done.status == "succeeded", done.error
    assert done.method.reinforcement.grader.calculate_output == "0.9 * has + 0.1 * like"
    assert done.method.reinforcement.hyperparameters.batch_size == 2
    report = done.report
    assert (report["metrics_before"].keys(), report["metrics_after"].keys()) == ({"reward"}, {"reward"})
    assert report["slices"]["by"] == "reward"
    assert report["replies"][0]["rewards"].keys() == {"base", "adapter"}
    told: list[Any] = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data]
    steps = [data for data in told if data and "rewards_spread" in data]
    assert {event["step"] for event in steps} == {1, 2, 3, 4}
    assert all(0 <= event["rewards_mean"] <= 1 and event["rewards_failed"] == 0 for event in steps)
    answer = client.completions.create(model="letters", prompt="one", max_tokens=2)
    assert answer.choices[0].text
    usage = server.client().get("/v1/usage", params={"group_by": "adapter"}).json()["data"]
    assert any(one.get("adapter") == "live" and one["completion_tokens"] > 0 for one in usage), usage


def test_a_killed_trainer_costs_the_job_no_step_that_was_saved(server: Server, client: OpenAI) -> None:
    job = begin(client, "killed", CHECK, max_steps=6, save_every=1)
    wait_job(server, client, job.id, lambda job: step_of(job) >= 2, 300.0)
    (pid,) = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and _folder_of(folder) == job_folder(server.data_dir, job.id)
    ]
    os.kill(pid, signal.SIGKILL)

    done = wait_job(server, client, job.id, ended, 300.0)

    assert done.status == "succeeded", done.error
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data]
    assert any(message.startswith("Continuing after step") for message in messages)


def _folder_of(process: Path) -> Path | None:
    """The run's folder of a trainer, by the lock that it has open."""
    try:
        for file in (process / "fd").iterdir():
            target = Path(os.readlink(file))
            if target.name == ".lock":
                return target.parent
    except OSError:
        pass
    return None


def test_a_paused_job_leaves_no_live_weights_and_goes_on(server: Server, client: OpenAI) -> None:
    job = begin(client, "paused", CHECK, max_steps=30, n_epochs=10)
    wait_job(server, client, job.id, lambda job: step_of(job) >= 1, 300.0)
    client.fine_tuning.jobs.pause(job.id)
    paused = wait_job(server, client, job.id, lambda job: job.status == "paused")
    step = step_of(paused)
    client.fine_tuning.jobs.resume(job.id)
    wait_job(server, client, job.id, lambda job: step_of(job) > step, 300.0)
    assert len(live_folders(server, job.id)) <= 1
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"


LONG: dict[str, Any] = {
    "group_size": 8, "sample_tokens": 96, "temperature": 1.0, "max_steps": 3, "eval_every": 3,
    "save_every": 1, "learning_rate": 5e-3,
}  # fmt: skip
"""Settings of jobs whose samples take so long that what comes meanwhile finds them running."""


def in_engine(server: Server) -> int:
    """Sequences that run in the engine or wait there, as it said last."""
    with server.client() as http:
        stats = http.get("/status").json()["stats"]
    return 0 if stats is None else int(stats["sequences_running"] + stats["sequences_waiting"])


def grader_pids(server: Server) -> list[int]:
    """The processes of graders in Python."""
    return [pid for pid in children(server.process.pid) if "python_grader" in _command_line(pid)]


def _command_line(pid: int) -> str:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def begin_sampling(server: Server, client: OpenAI, name: str, **settings: Any) -> Any:
    """Begin a job, and wait until the replies of a step after its first are drawn."""
    job = begin(client, name, PYTHON, **{**LONG, **settings})
    wait_job(server, client, job.id, lambda job: step_of(job) >= 1, 300.0)
    server.wait_for(lambda: in_engine(server) > 0)
    assert grader_pids(server)
    return job


@pytest.mark.skipif(not can_confine_code(), reason="the kernel has no Landlock or no seccomp")
def test_a_job_that_is_paused_and_cancelled_while_it_samples_leaves_nothing(
    server: Server, client: OpenAI
) -> None:
    def sampling() -> bool:
        return in_engine(server) > 0 and bool(grader_pids(server))

    def at_rest() -> bool:
        return not (server.trainer_pids() or grader_pids(server) or in_engine(server))

    def tenant() -> dict[str, Any]:
        (found,) = http.get("/v1/tenants").json()["data"]
        return dict(found)

    def left() -> dict[str, int]:
        """What jobs left, as the server and the engine tell of it now."""
        status, limits = http.get("/status").json(), tenant()
        stats = status["stats"]
        computed = stats["prompt_tokens"] + stats["generated_tokens"]
        return {
            "requests": status["requests"],
            "bytes of a step's weights": max(0, status["host_memory"]["used"] - loaded),
            "blocks of the cache": stats["kv_blocks_total"] - stats["kv_blocks_free"],
            "unended jobs": limits["jobs"],
            "sequences": limits["used"]["sequences"],
            "tokens reserved that nothing will compute": max(0, limits["used"]["tokens"] - computed),
        }

    with server.client() as http:
        limits = {"sequences": 1000, "tokens": 10**9}
        http.post("/v1/tenants/default", json={"quotas": limits}).raise_for_status()
        server.wait_for(lambda: tenant()["jobs"] == 0)  # that of another test may still end
        before, loaded = tenant(), http.get("/status").json()["host_memory"]["used"]
        job = begin_sampling(server, client, "ended", max_steps=1000, n_epochs=1000)
        client.fine_tuning.jobs.pause(job.id)
        server.wait_for(at_rest)
        paused = client.fine_tuning.jobs.retrieve(job.id)
        assert paused.status == "paused"

        client.fine_tuning.jobs.resume(job.id)
        wait_job(server, client, job.id, lambda job: step_of(job) > step_of(paused), 300.0)
        server.wait_for(sampling)
        client.fine_tuning.jobs.cancel(job.id)
        server.wait_for(at_rest)
        server.wait_for(lambda: not job_folder(server.data_dir, job.id).exists())
        for file in (job.training_file, job.validation_file):
            assert client.files.delete(file).deleted
        with suppress(TimeoutError):  # what is left is told below
            server.wait_for(lambda: not any(left().values()))
        assert not any(left().values()), left()
        assert tenant()["bytes"] == before["bytes"]


@pytest.fixture(scope="module")
def undisturbed(server: Server, client: OpenAI) -> str:
    """The version that a job ends with which nothing disturbs."""
    job = begin(client, "undisturbed", PYTHON, **LONG)
    done = wait_job(server, client, job.id, ended, 300.0)
    assert done.status == "succeeded", done.error
    return str(done.version)


@pytest.mark.full
@pytest.mark.parametrize("process", ["trainer", "engine"])
def test_a_process_that_is_killed_while_samples_run_changes_no_bit_of_the_result(
    server: Server, client: OpenAI, undisturbed: str, process: str
) -> None:
    job = begin_sampling(server, client, process)
    (trainer,) = server.trainer_pids()
    os.kill(trainer if process == "trainer" else server.engine_pid(), signal.SIGKILL)
    done = wait_job(server, client, job.id, ended, 300.0)
    assert done.status == "succeeded", done.error
    told = messages(client, job.id)
    assert any("signal SIGKILL" in one or "the engine ended" in one for one in told), told
    assert done.version == undisturbed
    server.wait_for(lambda: not in_engine(server))


@pytest.mark.full
def test_a_server_that_is_killed_while_samples_run_changes_no_bit_of_the_result(
    serve_real: Starter, base: Path, undisturbed: str, tmp_path: Path
) -> None:
    options = ("--base", str(base), *OPTIONS)
    with serve_real(*options, data_dir=tmp_path) as server:
        job = begin_sampling(server, openai_client(server), "server")
        left = children(server.process.pid)
        server.process.kill()
        server.exit_status()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
    with serve_real(*options, data_dir=tmp_path) as server:
        done = wait_job(server, openai_client(server), job.id, ended, 300.0)
        assert done.status == "succeeded", done.error
        assert any(one.startswith("Continuing after step") for one in messages(openai_client(server), job.id))
        assert done.version == undisturbed
        server.wait_for(lambda: not job_folder(server.data_dir, job.id).exists())  # once its end is recorded


def test_samples_count_for_their_tenants_quota_and_without_room_in_it_the_job_fails_until_it_is_resumed(
    serve_real: Starter, base: Path, tmp_path: Path
) -> None:
    keys = Keys(tmp_path / "data")
    key = keys.make("train", "generate", "adapters", tenant="acme")
    keys.tenants.set_quotas("acme", {"sequences": 3})
    with serve_real("--base", str(base), *OPTIONS, data_dir=keys.file.parent) as server:
        client = openai_client(server).with_options(api_key=key)
        job = begin(client, "bounded", CHECK)
        failed = wait_job(server, client, job.id, ended, 300.0)
        assert (failed.status, failed.error.code) == ("failed", "insufficient_quota")
        message = failed.error.message
        assert "tenant 'acme' may have 3 sequences (completions) at once" in message
        assert "n is group_size" in message

        keys.tenants.set_quotas("acme", {"sequences": 4})  # one group at a time: each must free its room
        client.fine_tuning.jobs.resume(job.id)
        done = wait_job(server, client, job.id, ended, 300.0)
        assert done.status == "succeeded", done.error
    keys.close()


def test_a_job_whose_judge_is_not_there_fails_and_says_so(server: Server, client: OpenAI) -> None:
    judge = {
        "type": "score_model",
        "name": "judge",
        "model": "nobody",
        "input": [{"role": "user", "content": "Rate {{sample.output_text}}."}],
    }
    job = begin(client, "judged", judge)
    failed = wait_job(server, client, job.id, ended, 300.0)
    assert failed.status == "failed"
    assert failed.error.code == "model_not_found"
    assert "The judge of grader 'judge' is not here" in failed.error.message


@pytest.mark.skipif(not can_confine_code(), reason="the kernel has no Landlock or no seccomp")
def test_a_grader_in_python_that_hangs_gives_its_replies_the_floor(server: Server, client: OpenAI) -> None:
    source = "def grade(sample, item):\n    while True:\n        pass\n"
    alpha = client.with_options(timeout=300).fine_tuning.alpha.graders
    found = alpha.run(grader={**PYTHON, "source": source}, model_sample="kk", item={})  # type: ignore[arg-type]
    assert found.reward == 0.0
    assert found.metadata.errors.python_grader_runtime_error
    fine = alpha.run(grader=PYTHON, model_sample="kk", item={"letter": "k"})  # type: ignore[arg-type]
    assert (fine.reward, fine.metadata.type) == (0.5, "python"), fine.metadata.errors


def test_a_grader_is_checked_by_the_name_of_its_field(client: OpenAI) -> None:
    graders = client.fine_tuning.alpha.graders
    assert graders.validate(grader=CHECK).grader.name == "a letter"  # type: ignore[union-attr, arg-type]
    with pytest.raises(openai.BadRequestError) as caught:
        graders.validate(grader={**CHECK, "operation": "near"})  # type: ignore[arg-type]
    assert caught.value.param == "grader.operation"
    with pytest.raises(openai.BadRequestError) as caught:
        begin(client, "bad", {**CHECK, "input": "{{sample.text}}"})
    assert caught.value.param == "method.reinforcement.grader.input"


def test_a_judge_of_this_server_scores_a_text(client: OpenAI) -> None:
    judge = {
        "type": "score_model",
        "name": "judge",
        "model": BASE,
        "range": [-1e6, 1e6],
        "input": [{"role": "user", "content": "Rate {{sample.output_text}}."}],
        "sampling_params": {"max_completions_tokens": 64},
    }
    found = client.fine_tuning.alpha.graders.run(grader=judge, model_sample="x")  # type: ignore[arg-type]
    assert found.metadata.sampled_model_name == BASE
    assert found.metadata.errors.api_model_grader_server_error is False


def test_reinforcement_needs_a_key_that_may_generate_and_an_operator_who_allows_python(
    serve_scripted: Starter, keys: Keys
) -> None:
    options = ("--data-dir", str(keys.file.parent), "--python-graders", "off")
    one, two = keys.make("train"), keys.make("train", "generate")
    with serve_scripted("words", *options) as server:
        trains = OpenAI(base_url=f"{server.url}/v1", api_key=one, max_retries=0)
        both = OpenAI(base_url=f"{server.url}/v1", api_key=two, max_retries=0)
        method = {"type": "reinforcement", "reinforcement": {"grader": CHECK}}
        with pytest.raises(openai.PermissionDeniedError, match="generate"):
            trains.fine_tuning.jobs.create(model=BASE, training_file="file-1", method=method)  # type: ignore[arg-type]
        method["reinforcement"] = {"grader": PYTHON}
        with pytest.raises(openai.BadRequestError, match=r"--python-graders off") as caught:
            both.fine_tuning.jobs.create(model=BASE, training_file="file-1", method=method)  # type: ignore[arg-type]
        assert caught.value.code == "python_graders_off"
