"""The Tinker API by its own client, against a real server with a small base."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
import pytest
import tinker
import torch
import zstandard
from safetensors.torch import load_file, save_file
from tests.training.runs import assert_equal
from tinker import types

from onebase.cli import main

from .access import Keys
from .support import PATIENCE, ROOT, Server, Starter, upload_folder

OPTIONS = ("--kv-memory", "100MB", "--threads", "1", "--max-sequences", "16")
PROMPT = [504, 2920, 282, 4649, 314]
KILLS = int(os.environ.get("ONEBASE_LIVE_KILLS", "4"))
"""Moments at which the server, its engine or its trainer is killed; more of them take some seconds each."""
CLIENTS_COMMAND = """
import os, sys
from tinker.cli.__main__ import main

status = 0
try:
    main()
except SystemExit as ended:
    status = ended.code
sys.stdout.flush()
sys.stderr.flush()
os._exit(status or 0)
"""
"""`python -m tinker.cli` without the end of the interpreter, in which the client's HTTP threads call abort()
about once in a hundred commands."""


@pytest.fixture(scope="module")
def live(serve_real: Starter, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    options = (*OPTIONS, "--signing-key", str(folder / "server.key"))
    with serve_real("--base", str(small_base), *options, data_dir=folder) as server:
        yield server


@pytest.fixture
def client(live: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    made = tinker.ServiceClient(base_url=live.url, api_key="tml-dummy")
    yield made
    made.close("success").result()


def params(tokens: int = 4, **settings: Any) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=tokens, **settings)


def row(tokens: list[int], **inputs: Any) -> types.Datum:
    """A row whose targets are its next tokens."""
    given = {"target_tokens": np.array(tokens[1:], np.int64), **inputs}
    arrays = {name: types.TensorData.from_numpy(np.asarray(one)) for name, one in given.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=arrays)


def supervised(tokens: list[int]) -> types.Datum:
    return row(tokens, weights=np.ones(len(tokens) - 1, np.float32))


# ---- sampling --------------------------------------------------------------------------------------


def test_the_base_is_listed_and_sampled(client: tinker.ServiceClient) -> None:
    (model,) = client.get_server_capabilities().supported_models
    assert model.sampleable
    assert model.max_context_length == 512
    sampler = client.create_sampling_client(base_model=str(model.model_name)).result()
    answer = sampler.sample(types.ModelInput.from_ints(PROMPT), 2, params(seed=1, stop=[])).result()
    first, second = answer.sequences
    assert len(first.tokens) == len(second.tokens) == 4
    assert first.stop_reason == "length"
    assert first.tokens != second.tokens
    assert first.sequence_id != second.sequence_id
    again = sampler.sample(types.ModelInput.from_ints(PROMPT), 2, params(seed=1, stop=[])).result()
    assert [one.tokens for one in again.sequences] == [first.tokens, second.tokens]
    assert again.sequences[0].logprobs == first.logprobs


def test_logprobs_of_a_prompt_of_its_likeliest_and_of_named_tokens_agree(
    client: tinker.ServiceClient,
) -> None:
    sampler = client.create_sampling_client(base_model="smollm2-135m-instruct").result()
    prompt = types.ModelInput.from_ints(PROMPT)
    whole = sampler.sample(
        prompt, 1, params(1), include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    top = whole.topk_prompt_logprobs
    assert whole.prompt_logprobs is not None
    assert top is not None
    assert top[4] is not None
    likeliest = top[4][0]
    assert whole.prompt_logprobs[0] is None
    assert top[0] is None
    assert len(top) == len(PROMPT)
    assert sampler.compute_logprobs(prompt).result() == whole.prompt_logprobs
    wanted = torch.full((len(PROMPT) - 1, 2), -1, dtype=torch.int64)
    wanted[0, 1], wanted[3, 0] = PROMPT[1], likeliest[0]
    for given in (
        types.TensorData.from_torch(wanted),
        types.TensorData.from_torch_sparse(wanted, pad_value=-1),
    ):
        answer = sampler.sample(prompt, 1, params(1), target_prompt_logprobs=given).result()
        assert answer.target_prompt_logprobs is not None
        scored = answer.target_prompt_logprobs.to_torch()
        assert scored[0, 1].item() == whole.prompt_logprobs[1]
        assert scored[3, 0].item() == likeliest[1]
        assert scored[wanted < 0].abs().sum() == 0
    last = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
    assert last == [None, None, None, *whole.prompt_logprobs[-2:]]


def test_an_explicit_list_of_stops_replaces_the_end_of_sequence(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="smollm2-135m-instruct").result()
    prompt = types.ModelInput.from_ints(PROMPT)
    greedy = sampler.sample(prompt, 1, params(6, temperature=0.0, stop=[])).result().sequences[0]
    third = greedy.tokens[2]
    stopped = sampler.sample(prompt, 1, params(6, temperature=0.0, stop=[third])).result().sequences[0]
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == greedy.tokens[: greedy.tokens.index(third) + 1]
    assert len(stopped.logprobs or ()) == len(stopped.tokens)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k: "),
        ({"record_stability_info": True}, "importance_sampling, ppo, cispo or gspo"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "bases read text alone"),
        ({"num_samples": 100_000}, "--max-choices"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 9}, "has 4 tokens after its first"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "has 1 rows"),
        ({"top_secret": 1}, "top_secret: this server does not know this field"),
    ],
)
def test_what_is_not_served_is_refused_by_name(live: Server, fields: dict[str, Any], told: str) -> None:
    with live.client() as http:
        sampler = new_sampler(http)
        answer = http.post("/api/v1/asample", json=sample_body(sampler, 0, **fields))
        assert answer.status_code == 400
        assert told in answer.json()["error"]["message"]


def new_session(http: httpx2.Client) -> str:
    body = {"tags": [], "user_metadata": {"run": "7"}, "sdk_version": "0.38.0", "type": "create_session"}
    answer = http.post("/api/v1/create_session", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["session_id"])


def new_sampler(http: httpx2.Client, number: int = 0, session: str | None = None, **of: str) -> str:
    body = {"session_id": session or new_session(http), "sampling_session_seq_id": number}
    body |= of or {"base_model": "smollm2-135m-instruct"}
    answer = http.post("/api/v1/create_sampling_session", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["sampling_session_id"])


def sample_body(sampler: str, number: int, **fields: Any) -> dict[str, Any]:
    body = {
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": 4, "temperature": 1, "top_k": -1, "top_p": 1, "seed": 5},
        "sampling_session_id": sampler,
        "seq_id": number,
        "type": "sample",
    }
    return body | fields


def retrieved(http: httpx2.Client, request_id: str) -> httpx2.Response:
    """The result, however long it takes."""
    for _ in range(10):
        answer = http.post("/api/v1/retrieve_future", json={"request_id": request_id})
        if answer.status_code != 408:
            break
        assert answer.json()["type"] == "try_again"
    return answer


def test_a_request_that_comes_again_is_the_same_promise(live: Server) -> None:
    with live.client() as http:
        body = sample_body(new_sampler(http), 3, sampling_params={"max_tokens": 4})
        first = http.post("/api/v1/asample", json=body).json()
        result = retrieved(http, first["request_id"])
        assert http.post("/api/v1/asample", json=body).json() == first
        assert result.headers["content-type"] == "application/x-protobuf"
        assert retrieved(http, first["request_id"]).content == result.content  # no second draw


def test_clients_of_one_sampler_get_numbers_of_their_own(live: Server) -> None:
    with live.client() as http:
        body = {"sampling_session_id": new_sampler(http)}
        answers = [http.post("/api/v1/join_sampling_session", json=body).json() for _ in range(2)]
    assert [one["client_counter"] for one in answers] == [1, 2]


def test_unknown_ids_are_told_apart(live: Server) -> None:
    with live.client() as http:
        unknown = "0:sample:0:1"
        gone = http.post("/api/v1/retrieve_future", json={"request_id": unknown})
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "result_gone")
        answer = http.get("/api/v1/samplers/nobody")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "sampler_not_found")
        answer = http.post("/api/v1/session_heartbeat", json={"session_id": "nobody"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")
        answer = http.post("/api/v1/get_info", json={"model_id": "nobody:train:0"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "run_not_found")
        path = "tinker://nobody:train:0/weights/a"
        answer = http.post("/api/v1/weights_info", json={"tinker_path": path})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "checkpoint_not_found")


def test_promised_samples_survive_a_killed_server(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    data, ids, first = tmp_path / "data", [], None
    with serve_real("--base", str(small_base), *OPTIONS, data_dir=data) as server, server.client() as http:
        sampler = new_sampler(http)
        for number in range(12):
            asked = sample_body(sampler, number, sampling_params={"max_tokens": 200, "seed": number})
            ids.append(http.post("/api/v1/asample", json=asked).json()["request_id"])
        first = retrieved(http, ids[0]).content
        server.signal(signal.SIGKILL)
        server.exit_status()
    with serve_real("--base", str(small_base), *OPTIONS, data_dir=data) as server, server.client() as http:
        results = [retrieved(http, one) for one in ids]
        assert [one.status_code for one in results] == [200] * 12
        assert results[0].content == first
        # Those that were drawn twice are what one draw would have been.
        direct = http.post("/api/v1/asample", json=sample_body(
            sampler, 99, sampling_params={"max_tokens": 200, "seed": 11})).json()["request_id"]  # fmt: skip
        assert sequences(retrieved(http, direct)) == sequences(results[11])


def sequences(answer: httpx2.Response) -> Any:
    from tinker.proto.response_conv import deserialize_sample_response

    return [(one.tokens, one.logprobs) for one in deserialize_sample_response(answer.content).sequences]


# ---- tenants and keys ------------------------------------------------------------------------------


def test_keys_are_taken_with_the_prefix_that_the_client_demands(
    serve_real: Starter, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    keys = Keys(tmp_path / "data")
    mine = keys.make("generate", "train", tenant="acme")
    other = keys.make("generate", "train", tenant="globex")
    reader = keys.make("adapters", tenant="acme")
    keys.close()
    with serve_real("--base", str(small_base), *OPTIONS, data_dir=tmp_path / "data") as server:
        client = tinker.ServiceClient(base_url=server.url, api_key=f"tml-{mine}")
        sampler = client.create_sampling_client(base_model="smollm2-135m-instruct").result()
        answer = sampler.sample(types.ModelInput.from_ints(PROMPT), 1, params()).result()
        sampler_id, sample = sampler._sampling_session_id, answer.sequences[0].sequence_id.rpartition(":")[0]
        client.close("success").result()
        with server.client() as http:
            for key, status in ((mine, 200), (other, 404), (f"{mine}x", 401), ("dummy", 401)):
                headers = {"X-API-Key": f"tml-{key}"}
                assert http.get(f"/api/v1/samplers/{sampler_id}", headers=headers).status_code == status
            found = http.post(
                "/api/v1/retrieve_future", json={"request_id": sample}, headers={"X-API-Key": f"tml-{other}"}
            )
            assert found.status_code == 410  # another tenant's is as unknown as none
            body = {"session_id": "x", "model_seq_id": 0, "base_model": "x", "lora_config": {"rank": 4}}
            refusal = http.post("/api/v1/create_model", json=body, headers={"X-API-Key": f"tml-{reader}"})
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (403, "insufficient_scope")
            usage = http.get("/v1/usage", headers={"X-API-Key": mine}).json()
            assert "acme" in json.dumps(usage)
            assert "completion_tokens" in json.dumps(usage)


def test_runs_and_checkpoints_are_their_tenants_alone(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    keys = Keys(tmp_path / "data")
    mine = keys.make("generate", "train", tenant="acme")
    other = keys.make("generate", "train", tenant="globex")
    sampling = keys.make("generate", tenant="acme")
    keys.close()
    with (
        serve_real("--base", str(small_base), *OPTIONS, data_dir=tmp_path / "data") as server,
        server.client() as http,
    ):
        http.headers["X-API-Key"] = f"tml-{mine}"
        run = new_run(http)
        saved = http.post("/api/v1/save_weights", json={"model_id": run, "seq_id": 1, "path": "a"}).json()
        assert retrieved(http, saved["request_id"]).json()["type"] == "save_weights"
        session, of_run = run.partition(":")[0], f"/api/v1/training_runs/{run}"
        path, step = f"{of_run}/checkpoints/weights/a", {"model_id": run, "seq_id": 2, "adam_params": {}}
        future = {"request_id": saved["request_id"]}
        requests: list[tuple[str, str, dict[str, Any] | None]] = [
            ("GET", of_run, None),
            ("GET", f"{of_run}/checkpoints", None),
            ("GET", f"/api/v1/sessions/{session}", None),
            ("POST", "/api/v1/weights_info", {"tinker_path": f"tinker://{run}/weights/a"}),
            ("POST", "/api/v1/optim_step", step),
            ("POST", "/api/v1/retrieve_future", future),
            ("PUT", f"{path}/ttl", {"ttl_seconds": 7200}),
            ("DELETE", path, None),
            ("POST", f"/api/v1/sessions/{session}/finish", {}),
        ]

        def statuses(key: str) -> list[int]:
            http.headers["X-API-Key"] = f"tml-{key}"
            return [http.request(how, url, json=body).status_code for how, url, body in requests]

        assert statuses(other) == [404] * 9
        assert http.get("/api/v1/training_runs").json()["training_runs"] == []
        assert http.get("/api/v1/checkpoints").json()["checkpoints"] == []
        assert statuses(sampling) == [403, 403, 200, *[403] * 6]
        assert statuses(mine) == [200] * 9


# ---- training --------------------------------------------------------------------------------------


def test_supervised_steps_are_sampled_at_once(client: tinker.ServiceClient, live: Server) -> None:
    """What sl_loop does: passes and steps, then samples of what they made."""
    run = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=8, seed=3)
    training = run.result()
    assert training.get_info().lora_rank == 8
    tokens = [*PROMPT, 100, 100, 100, 100]
    prompt = types.ModelInput.from_ints(tokens[:5])
    losses, samplers = [], []
    for _ in range(8):
        passed = training.forward_backward([supervised(tokens)] * 2, "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=2e-2))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
        samplers.append(training.save_weights_and_get_sampling_client().result())
    assert losses[-1] < losses[0] / 2
    drawn = samplers[-1].sample(prompt, 1, params(temperature=0.0, stop=[])).result().sequences[0]
    assert drawn.tokens == [100] * 4
    # Each sampler keeps the weights that it was made with.
    whole = types.ModelInput.from_ints(tokens)
    scores = [sum(score or 0.0 for score in one.compute_logprobs(whole).result()) for one in samplers]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1] / 2
    with live.client() as http:
        shown = http.get(f"/api/v1/samplers/{samplers[-1]._sampling_session_id}").json()
    assert len(shown["live"]) == 64


def test_the_trainer_and_the_sampler_agree_on_logprobs(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=1).result()
    tokens = list(range(300, 340))
    training.forward_backward([supervised(tokens)], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    (output,) = training.forward([supervised(tokens)], "cross_entropy").result().loss_fn_outputs
    sampled = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:]
    assert np.abs(output["logprobs"].to_numpy() - np.array(sampled)).max() < 2e-2


@pytest.mark.full
@pytest.mark.parametrize(
    ("quantization", "dtype", "kv_dtype", "kernels"),
    [  # any two of these at least once, for each of the first two
        ("nf4", "bfloat16", "auto", ""),
        ("nf4", "bfloat16", "int8", "torch"),
        ("nf4", "float32", "int8", "portable"),
        ("int8", "bfloat16", "auto", "avx2"),
        ("int8", "float32", "auto", "torch"),
        ("none", "bfloat16", "auto", "portable"),
        ("none", "float32", "auto", "avx2"),
        ("none", "bfloat16", "int8", ""),
    ],
)
def test_sampled_tokens_have_the_trainers_logprobs_bit_for_bit(
    serve_real: Starter,
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    dtype: str,
    kv_dtype: str,
    kernels: str,
) -> None:
    """What the cookbook logs as `kl_sample_train`: with each way to store and to compute; over 10,240 tokens
    of each in `make check-long`."""
    many, length = (4, 320) if os.environ.get("ONEBASE_EXAMPLES") == "long" else (1, 96)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    options = {"quantization": quantization, "dtype": dtype, "compute-dtype": dtype, "kv-dtype": kv_dtype}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    environment = {"ONEBASE_KERNELS": kernels} if kernels else {}
    with serve_real("--base", str(small_base), *OPTIONS, *given, environment=environment) as server:
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-dummy")
        base = str(client.get_server_capabilities().supported_models[0].model_name)
        training = client.create_lora_training_client(base_model=base, rank=8, seed=1).result()
        for _ in range(2):
            training.forward_backward([supervised(list(range(300, 340)))], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        prompts = [[*PROMPT, number] for number in range(600, 600 + many)]
        asked = [
            sampler.sample(types.ModelInput.from_ints(prompt), 8, params(length, seed=prompt[-1], stop=[]))
            for prompt in prompts
        ]
        compared = 0
        for prompt, future in zip(prompts, asked, strict=True):
            drawn, before = future.result().sequences, [0.0] * (len(prompt) - 1)
            data = [
                row(
                    [*prompt, *one.tokens],
                    logprobs=np.array([*before, *(one.logprobs or ())], np.float32),
                    advantages=np.array([*before, *[1.0] * len(one.tokens)], np.float32),
                )
                for one in drawn
            ]
            passed = training.forward_backward(data, "importance_sampling").result()
            for one, output in zip(drawn, passed.loss_fn_outputs, strict=True):
                own = output["logprobs"].to_numpy()[len(before) :]
                assert (own == np.array(one.logprobs, np.float32)).all()
                compared += len(own)
            assert passed.metrics["loss:sum"] == -8 * length  # each ratio is 1
        client.close("success").result()
    assert compared == many * 8 * length


def test_a_policy_learns_from_reward_alone(client: tinker.ServiceClient) -> None:
    """What rl_loop does: groups of samples, advantages, importance sampling."""
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=8, seed=1).result()
    prompt, rewards = types.ModelInput.from_ints(PROMPT), []
    for step in range(8):
        sampler = training.save_weights_and_get_sampling_client().result()
        drawn = sampler.sample(prompt, 16, params(6, stop=[], seed=step, top_k=8)).result().sequences
        gained = [float(np.mean([token % 2 == 0 for token in one.tokens])) for one in drawn]
        rewards.append(float(np.mean(gained)))
        data = []
        for one, reward in zip(drawn, gained, strict=True):
            before, advantage = len(PROMPT) - 1, reward - rewards[-1]
            logprobs = np.array([0.0] * before + list(one.logprobs or ()), np.float32)
            advantages = np.array([0.0] * before + [advantage] * len(one.tokens), np.float32)
            data.append(row([*PROMPT, *one.tokens], logprobs=logprobs, advantages=advantages))
        training.forward_backward(data, "importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    assert rewards[-1] > rewards[0] + 0.2


def test_the_loop_of_the_how_to_page_runs(
    live: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/how-to/tinker.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, value in (("BASE_URL", live.url), ("API_KEY", "tml-dummy"), ("TELEMETRY", "0")):
        monkeypatch.setenv(f"TINKER_{name}", value)
    exec(compile(snippet, "docs/how-to/tinker.md", "exec"), {})  # noqa: S102 (our own documentation)
    *steps, path = capsys.readouterr().out.strip().split("\n")
    losses = [float(line.split()[1]) for line in steps]
    assert losses[-1] < losses[0]
    assert path.endswith("/sampler_weights/final")


def test_a_custom_loss_runs_as_weights(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=1).result()

    def contrast(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        better, worse = (one.sum() for one in logprobs)
        loss = -torch.nn.functional.logsigmoid(0.1 * (better - worse))
        return loss, {"margin": float(better - worse)}

    data, margins = [supervised([1, 2, 3]), supervised([1, 5, 6])], []
    for _ in range(4):
        passed = training.forward_backward_custom(data, contrast)
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
        margins.append(passed.result().metrics["margin"])
        stepped.result()
    assert margins[-1] > margins[0] + 0.5


def test_a_checkpoint_continues_a_run_and_becomes_a_version(
    client: tinker.ServiceClient, live: Server
) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=2).result()
    tokens = list(range(40, 60))
    for _ in range(2):
        training.forward_backward([supervised(tokens)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    saved = training.save_state("state-1", user_metadata={"step": "2"}).result().path
    served = training.save_weights_for_sampler("final", ttl_seconds=7200).result().path
    assert saved == f"tinker://{training.model_id}/weights/state-1"

    def step(one: tinker.TrainingClient) -> float:
        before = one.forward_backward([supervised(tokens)], "cross_entropy").result().metrics["loss:sum"]
        one.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        return before + one.forward([supervised(tokens)], "cross_entropy").result().metrics["loss:sum"]

    other = client.create_training_client_from_state_with_optimizer(saved).result()
    assert step(other) == step(training)  # Adam's moments too, bit for bit

    sampler = client.create_sampling_client(model_path=served).result()
    assert sampler.sample(types.ModelInput.from_ints([40, 41]), 1, params(2)).result().sequences
    rest = client.create_rest_client()
    listed = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {one.checkpoint_id for one in listed} == {"weights/state-1", "sampler_weights/final"}
    assert {one.checkpoint_id: one.user_metadata for one in listed}["weights/state-1"] == {"step": "2"}
    assert rest.get_training_run(training.model_id).result().lora_rank == 4
    with live.client() as http:
        shown = wait_for(lambda: proved(http, training.model_id))
        text = http.post(
            "/v1/completions",
            json={"model": f"{shown['adapter']}@{shown['version']}", "prompt": PROMPT, "max_tokens": 2},
        )
        assert text.status_code == 200, text.text
    rest.delete_checkpoint(training.model_id, "weights/state-1").result()
    left = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [one.checkpoint_id for one in left] == ["sampler_weights/final"]


def test_a_named_checkpoint_is_signed_with_what_it_was_made_of_and_exported_so(
    client: tinker.ServiceClient, live: Server, tmp_path: Path
) -> None:
    model_signing = pytest.importorskip("model_signing")
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=7).result()
    training.forward_backward([supervised(list(range(40, 60)))], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    training.save_weights_for_sampler("final").result()
    state = training.save_state("state").result().path
    other = client.create_training_client_from_state(state).result()
    other.save_weights_for_sampler("final").result()

    def signed(run: str) -> dict[str, Any] | None:
        shown = proved(http, run)
        if shown is None:
            return None
        version = http.get(f"/v1/adapters/{shown['adapter']}/versions/{shown['version']}").json()
        return version if version["signature"] else None

    with live.client() as http:
        version = wait_for(lambda: signed(training.model_id))
        begun = wait_for(lambda: signed(other.model_id))["signature"]["statement"]
    statement = version["signature"]["statement"]
    assert (version["signature"]["status"], version["signature"]["signer"]) == ("verified", "server")
    assert (statement["job"], statement["checkpoint"]) == (training.model_id, "final")
    assert (statement["seed"], statement["steps"], statement["recipe"]["rank"]) == (7, 1, 4)
    assert statement["parent"] is None
    digest = version["version"]  # of equal weights
    assert (begun["steps"], begun["parent"]) == (
        0,
        {"checkpoint": state, "digest": digest, "steps": 1, "optimizer": False, "from_base": True},
    )
    assert statement["base"]["name"]
    assert statement["proof"]["base_unchanged"] is True
    out = tmp_path / "export"
    exported = ("adapters", "export", version["id"], "--format", "peft", "--out", str(out))
    assert main([*exported, "--url", live.url]) == 0
    model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=live.data_dir / "server.key.pub"
    ).verify(out, out / "model.sig")


def proved(http: httpx2.Client, run: str) -> dict[str, Any] | None:
    """The checkpoint `final`, once its version is ready."""
    found = http.get(f"/api/v1/training_runs/{run}/checkpoints").json()["checkpoints"]
    shown = next(one for one in found if one["checkpoint_id"] == "sampler_weights/final")
    if shown.get("version") is None:
        return None
    version: dict[str, Any] = http.get(f"/v1/adapters/{shown['adapter']}/versions/{shown['version']}").json()
    assert version["state"] != "failed", version
    return shown if version["state"] == "ready" else None


def wait_for(find: Callable[[], dict[str, Any] | None], seconds: float = PATIENCE) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (found := find()) is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_external_weights_are_downloaded_without_a_key_as_peft_has_them(
    client: tinker.ServiceClient, live: Server
) -> None:
    pyrage = pytest.importorskip("pyrage")
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=5).result()
    training.forward_backward([supervised(list(range(40, 60)))], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    training.save_state("state").result()
    saved = live.data_dir / "live" / training.model_id / "weights" / "state"
    own = {name: (saved / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    identity = pyrage.x25519.Identity.generate()
    plain = training.save_weights_external("plain", ttl_seconds=7200).result().path
    secret = training.save_weights_external(
        "secret", age_encryption_recipients=[str(identity.to_public())]
    ).result()
    assert plain == f"tinker://{training.model_id}/external_weights/plain"
    rest = tinker.RestClient(base_url=live.url, api_key="tml-dummy")
    found = rest.get_external_weights_urls(plain).result()
    assert found.expires.timestamp() > time.time() + 600  # clients renew it five minutes before
    with httpx2.Client(timeout=60) as stranger:
        assert {name: stranger.get(url).content for name, url in found.urls.items()} == own
        encrypted = rest.get_external_weights_urls(secret.path).result().urls
        files = {name: stranger.get(url).content for name, url in encrypted.items()}
        assert {name: pyrage.decrypt(content, [identity]) for name, content in files.items()} == {
            f"{name}.age": content for name, content in own.items()
        }
        url = found.urls["adapter_config.json"]
        assert stranger.get(url).headers["cache-control"] == "private, no-store"
        part = stranger.get(url, headers={"Range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, own["adapter_config.json"][2:6])
        for other in (
            re.sub(r"save=(\d+)", r"save=1\1", url),
            url.replace("plain", "secret"),
            url.replace("adapter_config.json", "checkpoint.json"),
            re.sub(r"expires=\d+", f"expires={2**40}", url),
            url[:-1] + ("0" if url[-1] != "0" else "1"),
        ):
            refusal = stranger.get(other)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (403, "link_invalid"), other
        listed = {
            one.checkpoint_id: one for one in rest.list_checkpoints(training.model_id).result().checkpoints
        }
        assert listed["external_weights/plain"].checkpoint_type == "external"
        assert listed["external_weights/plain"].expires_at is not None
        with pytest.raises(tinker.BadRequestError, match="is for download"):
            client.create_sampling_client(model_path=plain).result()
        rest.delete_checkpoint(training.model_id, "external_weights/plain").result()
        assert stranger.get(url).status_code == 403


def test_the_clients_own_command_lists_checkpoints_and_downloads_one(
    client: tinker.ServiceClient, live: Server, tmp_path: Path
) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=5).result()
    path = training.save_state("state").result().path
    environment = os.environ | {"TINKER_BASE_URL": live.url, "TINKER_API_KEY": "tml-dummy"}

    def printed(*words: str) -> str:
        command = [sys.executable, "-c", CLIENTS_COMMAND, "--format", "json", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    assert training.model_id in printed("run", "list")
    assert "smollm2-135m-instruct" in printed("model", "list")
    assert path in printed("checkpoint", "list", "--run-id", training.model_id)
    assert path in printed("checkpoint", "info", path)
    printed("checkpoint", "set-ttl", path, "--ttl", "7200")
    printed("checkpoint", "download", path, "--output", str(tmp_path))
    (folder,) = tmp_path.iterdir()
    saved = live.data_dir / "live" / training.model_id / "weights" / "state"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    for file in folder.iterdir():
        assert file.read_bytes() == (saved / file.name).read_bytes()


def test_an_adapter_that_was_uploaded_is_sampled_and_trained_further_by_its_path(
    client: tinker.ServiceClient, live: Server, tmp_path: Path
) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=6).result()
    row_of = supervised([*PROMPT, 100, 100])
    for _ in range(3):
        training.forward_backward([row_of], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=3e-2)).result()
    state = training.save_state("state").result().path
    saved, folder = live.data_dir / "live" / training.model_id / "weights" / "state", tmp_path / "brought"
    folder.mkdir()
    config = json.loads((saved / "adapter_config.json").read_text())
    config |= {"lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}  # as no run of flags has it
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(saved / "adapter_model.safetensors")
    kept = {name: one for name, one in weights.items() if "q_proj" in name or "v_proj" in name}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = types.ModelInput.from_ints([*PROMPT, 100, 100])
    with live.client() as http:
        version = upload_folder(http, "brought", folder).json()["version"]
        unknown = {"session_id": new_session(http), "sampling_session_seq_id": 0}
        for name, told in (("brought", "has no active version"), ("nobody", "There is no adapter 'nobody'")):
            unknown["model_path"] = f"tinker://adapters/sampler_weights/{name}"
            refusal = http.post("/api/v1/create_sampling_session", json=unknown)
            assert refusal.status_code == 404
            assert told in refusal.json()["error"]["message"]
        activated = http.post("/v1/adapters/brought/activate", json={"version": version})
        assert activated.status_code == 200, activated.text
        sampler = new_sampler(http, model_path="tinker://adapters/sampler_weights/brought")
        shown = http.get(f"/api/v1/samplers/{sampler}").json()
    path = f"tinker://adapters/sampler_weights/brought@{version}"
    assert shown["model_path"] == path
    brought = client.create_sampling_client(model_path=path).result().compute_logprobs(whole).result()
    begun = client.create_training_client_from_state("tinker://adapters/weights/brought").result()
    assert begun.get_info().lora_rank == 4

    def scores(one: tinker.TrainingClient) -> list[float]:
        (output,) = one.forward([row_of], "cross_entropy").result().loss_fn_outputs
        return [float(score) for score in output["logprobs"].to_numpy()]

    assert scores(begun) == brought[1:]
    assert scores(begun) != scores(training)

    def step(one: tinker.TrainingClient) -> list[float]:
        one.forward_backward([row_of], "cross_entropy")
        one.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        return scores(one)

    assert sum(step(begun)) > sum(score or 0.0 for score in brought)
    later = begun.save_state("later").result().path
    again = client.create_training_client_from_state_with_optimizer(later).result()
    assert step(again) == step(begun)
    with pytest.raises(tinker.RequestFailedError, match="began with the base"):
        begun.load_state(state).result()
    served = begun.save_weights_for_sampler("final").result().path
    assert client.create_sampling_client(model_path=served).result().compute_logprobs(whole).result()[
        1:
    ] == scores(begun)


def test_an_operator_sees_the_audit_log_and_what_checkpoints_take(
    client: tinker.ServiceClient, live: Server
) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=5).result()
    admin = tinker.AdminClient(base_url=live.url, api_key="tml-dummy")
    before = admin.get_current_checkpoint_storage_usage().result().data[0]
    path = training.save_state("state").result().path
    after = admin.get_current_checkpoint_storage_usage().result().data[0]
    assert after.checkpoint_count == before.checkpoint_count + 1
    assert after.size_bytes > before.size_bytes
    rest = tinker.RestClient(base_url=live.url, api_key="tml-dummy")
    today = datetime.now(UTC).date()
    rest.delete_checkpoint_from_tinker_path(path).result()
    entry = admin.get_audit_log("checkpoints").result().entries[-1]
    day = entry.timestamp.date()
    assert day in (today, today + timedelta(days=1))  # midnight may have passed
    assert (entry.event, entry.event_details["target"]) == ("checkpoint_deleted", path)
    of_day = admin.get_audit_log(day=day).result().entries
    assert [one.event_details["target"] for one in of_day if one.event == "checkpoint_deleted"][-1] == path
    assert "run_created" in {one.event for one in admin.get_audit_log().result().entries}
    assert admin.get_audit_log(day=today - timedelta(days=2)).result().entries == []


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda rest, path: rest.publish_checkpoint_from_tinker_path(path), "save_weights_for_sampler"),
        (lambda rest, path: rest.unpublish_checkpoint_from_tinker_path(path), "no checkpoint is public"),
        (lambda rest, path: rest.export_session_trace("s"), "--otlp-endpoint"),
        (lambda rest, path: rest.assign_session_project("s", "p"), "tenants instead of projects"),
        (lambda rest, path: rest.search_sessions(types.SessionSearchRequest()), "GET /api/v1/sessions"),
        (lambda rest, path: rest.copy_weights(path, destination_project_id="p"), "give .* the path itself"),
        (
            lambda rest, path: rest.get_billing_usage(datetime(2026, 12, 1, tzinfo=UTC), datetime.now(UTC)),
            "GET /v1/usage",
        ),
    ],
)
def test_a_route_of_the_client_that_is_not_served_says_what_is(live: Server, ask: Any, told: str) -> None:
    rest = tinker.RestClient(base_url=live.url, api_key="tml-dummy")
    with pytest.raises(tinker.BadRequestError, match=told):
        ask(rest, "tinker://s:train:0/weights/a").result()


def test_refused_requests_keep_their_place_and_the_run_goes_on(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(base_model="smollm2-135m-instruct", rank=4, seed=1).result()
    image = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=1)
    pictured = types.Datum(model_input=types.ModelInput(chunks=[image]), loss_fn_inputs={})
    refused: Any = (
        ([pictured], "cross_entropy", "image is not served"),
        ([supervised([1, 2, 3])], "stable_reinforce", "importance_sampling"),
    )
    for data, loss, told in refused:
        with pytest.raises(tinker.RequestFailedError, match=told):
            training.forward_backward(data, loss).result()
    with pytest.raises(tinker.RequestFailedError, match="'nobody' is no public key: write age1"):
        training.save_weights_external("x", age_encryption_recipients=["nobody"]).result()
    assert training.forward([supervised([1, 2, 3])], "cross_entropy").result().metrics["loss:sum"] > 0
    with pytest.raises(tinker.BadRequestError, match="nobody/else"):
        client.create_lora_training_client(base_model="nobody/else", rank=4).result()


def test_a_request_with_a_wrong_field_fails_in_its_place_and_the_run_goes_on(live: Server) -> None:
    with live.client() as http:
        run = new_run(http)
        place = {"model_id": run, "path": "a"}
        gone = f"tinker://{run}/weights/gone"
        wrong: list[tuple[str, dict[str, Any], str]] = [
            ("save_weights", {"path": "my run"}, "cannot be a checkpoint's name"),
            ("save_weights", {"ttl_seconds": 60}, "ttl_seconds"),
            ("optim_step", {"adam_params": {"beta1": 1}}, "beta1"),
            ("load_weights", {"path": gone, "optimizer": False}, "there is no checkpoint"),
            ("save_weights_for_sampler", {"sampling_session_seq_id": 1}, "either path or"),
        ]
        for number, (name, fields, told) in enumerate(wrong, 1):
            given = (place if "adam_params" not in fields else {"model_id": run}) | fields
            accepted = http.post(f"/api/v1/{name}", json=given | {"seq_id": number})
            assert accepted.status_code == 200, accepted.text
            failed = retrieved(http, accepted.json()["request_id"]).json()
            assert told in failed["error"]
            assert failed["category"] == "user"
        kind = {"content-type": "application/x-protobuf"}
        large, packed = pass_body(run, 6, 6000), zstandard.ZstdCompressor().compress(pass_body(run, 7, 6000))
        assert len(large) > 2_000_000 > len(packed)
        for body, headers in ((large, kind), (packed, kind | {"content-encoding": "zstd"})):
            accepted = http.post("/api/v1/forward_backward", content=body, headers=headers)
            assert accepted.status_code == 200, accepted.text
            assert "2000000" in retrieved(http, accepted.json()["request_id"]).json()["error"]
        answer = http.post("/api/v1/forward_backward", content=pass_body(run, 8), headers=kind)
        assert answer.status_code == 200, answer.text
        passed = retrieved(http, answer.json()["request_id"])
        assert passed.headers["content-type"] == "application/x-protobuf"
        unknown = {"model_id": "nobody:train:0", "seq_id": 1, "path": "my run"}
        refusal = http.post("/api/v1/save_weights", json=unknown)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (400, "invalid_value")


def test_accepted_operations_survive_a_killed_server(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"

    results = []
    for killed in (False, True):
        with (
            serve_real("--base", str(small_base), *OPTIONS, data_dir=data) as server,
            server.client() as http,
        ):
            run = new_run(http)
            ids = submit_steps(http, run)
            if not killed:
                results.append([retrieved(http, one).content for one in ids])
                continue
            retrieved(http, ids[2])
            server.signal(signal.SIGKILL)
            server.exit_status()
        with (
            serve_real("--base", str(small_base), *OPTIONS, data_dir=data) as server,
            server.client() as http,
        ):
            submit_steps(http, run)  # a client that saw no answer sends them again
            results.append([retrieved(http, one).content for one in ids])
    assert results[0] == results[1]


def submit_steps(http: httpx2.Client, run: str) -> list[str]:
    """Eight operations, a pass and a step in turns, and their futures."""
    ids = []
    for number in range(1, 9):
        if number % 2:
            body = pass_body(run, number)
            answer = http.post(
                "/api/v1/forward_backward",
                content=body,
                headers={"content-type": "application/x-protobuf"},
            )
        else:
            step = {"adam_params": {"learning_rate": 0.01}, "model_id": run, "seq_id": number}
            answer = http.post("/api/v1/optim_step", json=step)
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["request_id"])
    return ids


def test_accepted_operations_survive_the_death_of_engine_and_trainer(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    with (
        serve_real("--base", str(small_base), *OPTIONS, data_dir=tmp_path / "data") as server,
        server.client() as http,
    ):
        whole = [retrieved(http, one).content for one in submit_steps(http, new_run(http))]
        ids = submit_steps(http, run := new_run(http))
        found = []
        for place, one in enumerate(ids):
            found.append(retrieved(http, one).content)
            if place in (0, 4):
                for pid in server.live_pids():
                    os.kill(pid, signal.SIGKILL)
            if place == 2:
                os.kill(server.engine_pid(), signal.SIGKILL)
        submit_steps(http, run)
        assert found == whole == [retrieved(http, one).content for one in ids]


def new_run(http: httpx2.Client) -> str:
    body = {
        "session_id": new_session(http),
        "model_seq_id": 0,
        "base_model": "smollm2-135m-instruct",
        "lora_config": {"rank": 4, "seed": 9},
    }
    answer = http.post("/api/v1/create_model", json=body)
    assert answer.status_code == 200, answer.text
    assert retrieved(http, answer.json()["request_id"]).json()["type"] == "create_model"
    return str(answer.json()["model_id"])


def pass_body(run: str, number: int, rows: int = 1) -> bytes:
    from tinker.proto.request_conv import forward_backward_request_to_proto

    data = [supervised(list(range(30, 50)))] * rows
    given = types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
    request = types.ForwardBackwardRequest(forward_backward_input=given, model_id=run, seq_id=number)
    encoded: bytes = forward_backward_request_to_proto(request).SerializeToString()
    return encoded


# ---- killed processes ------------------------------------------------------------------------------


class KilledServer:
    """A server whose processes are killed at moments that follow from a seed, and that is started again.

    In each life of the server, engine and trainer are killed at most once, and then the server: what runs at
    several deaths of one engine or trainer is refused as their cause.
    """

    def __init__(self, start: Callable[..., Any], kills: int, seed: int) -> None:
        self.kills: list[str] = []
        """What was killed so far."""
        self._start = start
        self._draw = random.Random(seed)
        self._lives = contextlib.ExitStack()
        self._server: Server = self._lives.enter_context(start(ready=True))
        self._answers = 0
        self._failures: list[BaseException] = []
        self._ended = threading.Event()
        self._killing = threading.Thread(target=self._kill_all, args=(kills,), daemon=True)

    def __enter__(self) -> Self:
        self._killing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._killing.join()
        self._lives.close()

    @property
    def is_killing(self) -> bool:
        """Whether a process is still to be killed."""
        return self._killing.is_alive()

    def ask(self, path: str, body: Any) -> httpx2.Response:
        """POST until there is an answer, as the client does."""
        kind = {"content-type": "application/x-protobuf" if isinstance(body, bytes) else "application/json"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self._failures:
            with contextlib.suppress(httpx2.TransportError), self._server.client() as http:
                answer = http.post(f"/api/v1/{path}", content=content, headers=kind)
                if answer.status_code not in (408, 503):
                    assert answer.status_code == 200, f"{answer.text}\n{self._server.log}"
                    self._answers += 1
                    return answer
            time.sleep(0.05)
        raise TimeoutError(f"{path} is not answered: {self._failures}\n{self._server.log}")

    def _kill_all(self, kills: int) -> None:
        try:
            while len(self.kills) < kills:
                helpers = self._draw.sample(("engine", "trainer"), self._draw.randrange(3))
                for victim in (*helpers, "server")[: kills - len(self.kills)]:
                    self._wait()
                    if self._ended.is_set():
                        return
                    self._kill(victim)
                    self.kills.append(victim)
        except BaseException as error:
            self._failures.append(error)

    def _wait(self) -> None:
        """Wait for some answers, and a moment longer."""
        until = self._answers + self._draw.randrange(8)
        while self._answers < until and not self._ended.is_set():
            time.sleep(0.005)
        self._ended.wait(self._draw.uniform(0.0, 0.3))

    def _kill(self, victim: str) -> None:
        server, pids = self._server, []
        if victim == "server":
            server.signal(signal.SIGKILL)
            server.exit_status()
            self._server = self._lives.enter_context(self._start(ready=False))
            return
        # One whose first engine does not start ends.
        server.wait_for(lambda: self._ended.is_set() or server.status_of("/ready") == 200)
        while not pids and not self._ended.is_set():
            with contextlib.suppress(ValueError):  # there is none at this moment
                pids = server.live_pids() if victim == "trainer" else [server.engine_pid()]
            time.sleep(0.01)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Lesson:
    """Two runs of one session, trained and sampled in turns."""

    def __init__(self, server: KilledServer) -> None:
        self._server = server
        self._asked: dict[str, tuple[str, Any]] = {}
        """Requests by their futures."""
        self._results: dict[str, httpx2.Response] = {}
        session = {"tags": [], "sdk_version": "0.38.0", "type": "create_session"}
        self.session = str(server.ask("create_session", session).json()["session_id"])
        loras = {"rank": 4, "seed": 9, "train_mlp": False}, {"rank": 8, "seed": 8, "train_unembed": False}
        of = {"session_id": self.session, "base_model": "smollm2-135m-instruct"}
        made = [
            self._promised("create_model", of | {"model_seq_id": number, "lora_config": lora})
            for number, lora in enumerate(loras)
        ]
        self._retrieve()
        self.runs = [future.rpartition(":")[0] for future in made]
        for first in (1, 6):
            saved = [self._trained(run, first) for run in self.runs]
            self._retrieve()
            for future, number in itertools.product(saved, range(3)):
                sampler = self._results[future].json()["sampling_session_id"]
                seed = {"seed": number} if number else {}  # the first is drawn by chance
                sampled = {"max_tokens": 24, "stop": [], **seed}
                self._promised(
                    "asample", sample_body(sampler, number, num_samples=2, sampling_params=sampled)
                )
            self._retrieve()
        for run in self.runs:
            self._promised("save_weights", {"model_id": run, "seq_id": 11, "path": "end"})
        self._retrieve()

    def _trained(self, run: str, first: int) -> str:
        """Ask for two steps, the last request first; return the future of weights that can be sampled."""
        sampler = {"sampling_session_seq_id": 10 * first + self.runs.index(run)}
        step = {"adam_params": {"learning_rate": 0.01, "grad_clip_norm": 1.0}}
        requests: list[tuple[str, Any]] = [
            ("forward_backward", pass_body(run, first, rows=2)),
            ("forward_backward", pass_body(run, first + 1)),
            ("optim_step", step | {"model_id": run, "seq_id": first + 2}),
            ("forward_backward", pass_body(run, first + 3)),
            ("save_weights_for_sampler", sampler | {"model_id": run, "seq_id": first + 4}),
        ]
        futures = [self._promised(path, body) for path, body in reversed(requests)]
        return futures[0]

    def _promised(self, path: str, body: Any) -> str:
        future = str(self._server.ask(path, body).json()["request_id"])
        self._asked[future] = path, body
        return future

    def _retrieve(self) -> None:
        for future in self._asked.keys() - self._results.keys():
            self._results[future] = self._server.ask("retrieve_future", {"request_id": future})

    def outcome(self) -> dict[str, Any]:
        """All that another lesson must come to, by names that do not depend on the session."""
        found: dict[str, Any] = {}
        for future, answer in self._results.items():
            name = future.replace(self.session, "")
            if ":sample:" not in future:
                found[name] = answer.content.replace(self.session.encode(), b"")
            elif not future.endswith(":0"):
                found[name] = sequences(answer)
        return found

    def weights(self, data: Path) -> dict[str, torch.Tensor]:
        """Weights and optimizer's state of both runs at the end."""
        return {
            f"{number} {file.name} {name}": tensor
            for number, run in enumerate(self.runs)
            for file in sorted((data / "live" / run / "weights" / "end").glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    def check_again(self) -> None:
        """A request that comes again is the same promise, and its result stays what it was."""
        for future, (path, body) in self._asked.items():
            assert self._promised(path, body) == future
            again = self._server.ask("retrieve_future", {"request_id": future})
            assert again.content == self._results[future].content, future


@pytest.mark.timeout(1200 + 60 * KILLS)
def test_processes_killed_at_any_moment_lose_no_future_and_do_nothing_twice(
    serve_real: Starter, small_base: Path, tmp_path: Path
) -> None:
    def start(folder: str, **how: Any) -> contextlib.AbstractContextManager[Server]:
        return serve_real("--base", str(small_base), *OPTIONS, data_dir=tmp_path / folder, **how)

    with KilledServer(functools.partial(start, "whole"), kills=0, seed=0) as server:
        whole = Lesson(server)
    expected, weights = whole.outcome(), whole.weights(tmp_path / "whole")
    assert len(expected) == 2 * (1 + 11) + 4 * 2
    assert any("optimizer.safetensors" in name for name in weights)
    with KilledServer(functools.partial(start, "killed"), KILLS, seed=5) as server:
        lessons = [Lesson(server)]
        while server.is_killing:
            lessons.append(Lesson(server))
        for lesson in lessons:
            lesson.check_again()
    assert len(server.kills) == KILLS
    for lesson in lessons:
        assert lesson.outcome() == expected
        assert_equal(lesson.weights(tmp_path / "killed"), weights)
