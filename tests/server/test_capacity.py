"""How many servers a load takes: what binds, that it follows from what is asked, what the command says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM, LlamaConfig

from onebase_engine.engine.graphs import ROWS
from onebase_engine.engine.model import ServedModel
from onebase_server.estimate import _kv_bytes, main
from onebase_server.routing.capacity import (
    GRAPH_ROWS,
    LAYER_LAUNCHES,
    WORST,
    BaseFigures,
    Capacity,
    Demand,
    Device,
    Serving,
    UnservableError,
    capacity,
    launch_seconds,
)

GB = 10**9
H100 = Device("h100", 80 * GB, 2e12, 300e12, "made up", 0.25e-3)
LLAMA = BaseFigures(bytes=6 * GB, read=5 * GB, flops=15 * GB, kv_bytes=131_072, layers=32)
DEMAND = Demand(
    adapters=100, adapter_bytes=50_000_000, requests=40.0, prompt=500, answer=200, ttft=2.0
)  # fmt: skip


def asked(*, device: Device = H100, serving: Serving = Serving(), **demand: object) -> Capacity:  # noqa: B008
    return capacity(device, LLAMA, replace(DEMAND, **demand), serving, drawn=500)  # type: ignore[arg-type]


def test_twice_the_requests_take_twice_the_compute() -> None:
    one, two = asked(), asked(requests=80.0)
    assert one.meets
    assert two.meets
    assert two.needs["compute"] == pytest.approx(2 * one.needs["compute"], rel=0.01)
    assert one.binds == "compute"
    assert one.chosen.replicas == math.ceil(one.needs["compute"])
    assert one.more.replicas == one.chosen.replicas + 1
    assert one.more.used < one.chosen.used <= 0.85


def test_as_many_rows_run_as_come_while_one_is_answered() -> None:
    point = asked().chosen
    arrivals = DEMAND.requests / point.replicas
    assert point.running == pytest.approx(arrivals * DEMAND.answer * point.token)


def test_each_resource_binds_where_it_is_scarce() -> None:
    cases = {
        "KV memory": asked(device=replace(H100, memory=12 * GB), prompt=4000),
        "rows": asked(serving=Serving(rows=8)),
        "slots": asked(serving=Serving(slots=6)),
        "host memory": asked(serving=Serving(host_memory=GB), adapters=200, ttft=0.2),
        "time a token": asked(token=0.0085, requests=200.0),
    }
    assert {name: found.binds for name, found in cases.items()} == {name: name for name in cases}
    assert all(found.meets for found in cases.values())
    assert cases["host memory"].chosen.replicas == 20, "two homes for each, twenty fit on one"
    assert cases["time a token"].chosen.token <= 0.0085


def test_memory_goes_to_slots_where_that_takes_fewer_servers() -> None:
    scarce = replace(H100, memory=20 * GB)
    chosen = asked(device=scarce, adapters=2000, adapter_bytes=100_000_000)
    tenth = asked(
        device=scarce, adapters=2000, adapter_bytes=100_000_000, serving=Serving(slot_memory=1_260_000_000)
    )
    assert chosen.setup.slots > tenth.setup.slots
    assert chosen.setup.kv_memory < tenth.setup.kv_memory
    assert chosen.chosen.replicas < tenth.chosen.replicas
    used = LLAMA.bytes + chosen.setup.kv_memory + 1.25 * chosen.setup.slot_memory
    assert used <= scarce.memory


def test_so_many_servers_are_judged_as_they_are() -> None:
    few = capacity(H100, LLAMA, DEMAND, Serving(), replicas=1)
    assert (few.meets, few.chosen.replicas, few.more.replicas) == (False, 1, 2)
    assert few.chosen.ttft == (math.inf, math.inf)
    assert asked() == asked(), "the same is drawn each time"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": replace(H100, memory=6 * GB)}, "no request fits next to it"),
        ({"ttft": 0.02}, "a prompt of 500 tokens takes 0.03 s on h100"),
        ({"token": 0.001}, "one row's token takes 8.0 ms"),
        ({"requests": 1e7}, "more than 10000 servers"),
    ],
)
def test_what_no_number_of_servers_does_is_said(change: dict[str, object], said: str) -> None:
    with pytest.raises(UnservableError, match=said):
        asked(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_token_takes_what_the_engines_cache_gives_it(architecture: str, dtype: torch.dtype) -> None:
    config = ARCHITECTURES[architecture]()
    model = ServedModel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), 1, kv_dtype=dtype)
    assert _kv_bytes(config.get_text_config(), dtype) == model.kv_bytes_per_token


def test_a_step_of_few_rows_is_a_graph_on_a_gpu_and_takes_its_bytes_and_launches() -> None:
    assert ROWS[-1] == GRAPH_ROWS, "of the engine"
    graphs = replace(H100, graph_rows=GRAPH_ROWS)
    few, as_few = asked(device=graphs, requests=10.0).chosen, asked(requests=10.0).chosen
    launches = 32 * LAYER_LAUNCHES * 2.5e-6 + 12 * (2.5e-6 + 10e-6)
    assert launch_seconds(32 * LAYER_LAUNCHES, 24, WORST) == pytest.approx(launches)
    row = (600 * LLAMA.kv_bytes + DEMAND.adapter_bytes) / H100.bandwidth
    assert few.token < 0.008 <= as_few.token, "without graphs it is Python's 0.25 ms a layer"
    step = LLAMA.read / H100.bandwidth + launches + few.running * row
    assert few.token == pytest.approx(step / (1 - 10 * 500 * 15.1e9 / 300e12), rel=0.02)
    rows = replace(graphs, graph_rows=1)
    assert asked(device=rows, requests=10.0).chosen.token == pytest.approx(as_few.token)


# The command


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a base of a few layers of Llama 3.1 8B."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_the_command_says_how_many_servers_and_what_binds(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", llama, "--gpu", "h100", "--serve", "--requests", "900", "--adapters", "20"]
    assert main([*options, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["base"]["kv_bytes"] == 2 * 2 * 8 * 128 * 2
    assert made["demand"]["adapter_bytes"] == 4 * 16 * 2 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * 18432)
    assert main([*options, "--json", "--kv-dtype", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["kv_bytes"] == 2 * 2 * 8 * (128 + 2)
    assert made["device"]["graph_rows"] == GRAPH_ROWS
    assert main([*options, "--json", "--quantization", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["graph_rows"] == 0, "PyTorch computes int8"
    assert main(options) == 0
    said = capsys.readouterr().out
    rows = [[part.strip() for part in line.split("\t")] for line in said.splitlines() if "\t" in line]
    lines = {label: words for label, *words in reversed(rows)}
    assert lines["servers"] == [str(made["chosen"]["replicas"]), f"{made['binds']} binds"]
    assert lines[made["binds"]][1] == "servers binds"
    assert "60% of 3350 GB/s" in lines["device"][1]
    assert f"--max-slots {made['setup']['slots']}" in lines["slots"][1]
    assert "No GPU was measured" in " ".join(said.split())


def test_a_token_on_an_h100_takes_what_the_gpu_check_predicts_at_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/performance.md has 2.4 to 4.0 ms for a row of 156 tokens with an adapter on all linear layers."""
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    load = ["--adapters", "1", "--requests", "0.001", "--prompt", "100", "--answer", "112", "--replicas", "1"]
    assert main(["--serve", "--base", str(tmp_path), "--gpu", "h100", *load, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["chosen"]["token"] == pytest.approx(4.0e-3, rel=0.03)
    assert made["base"]["read"] == pytest.approx(5.0e9, rel=0.01)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--gpu", "h1000"], 2, "--gpu: GPU 'h1000' is not in the table"),
        (["--gpu", "t4", "--memory", "1GB"], 1, "no request fits next to it"),
        (["--gpu", "h100", "--targets", "no_proj"], 2, "--targets: "),
        (["--gpu", "h100", "--requests", "-1"], 2, "is not a number above 0"),
    ],
)
def test_what_cannot_be_said_has_a_reason(
    options: list[str], status: int, said: str, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["--serve", "--base", llama, *options])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == status
    assert said in capsys.readouterr().err


def test_without_a_gpu_this_machine_is_measured(
    llama: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--serve", "--base", llama, "--requests", "0.01", "--ttft", "60", "--memory", "8GB", "--json"]
    main([*options, "--adapters", "2", "--replicas", "1"])
    made = json.loads(capsys.readouterr().out)
    assert made["device"]["how"].startswith("measured on this machine")
    assert made["device"]["bandwidth"] > 1e8
    assert made["chosen"]["replicas"] == 1
