"""`onebase top` and `client.metrics`, against a scripted server; see also golden/top.txt."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from tests.clients.conftest import Sdk
from tests.clients.golden import Transcript
from tests.clients.registry_double import NOW
from tests.clients.test_cli_terminal import Person

from onebase import Client, InvalidResponseError, Metrics
from onebase.cli import main, top
from onebase.metrics import parse_metrics

ENGINE = 'model_name="smollm2-135m-instruct",engine="0"'


def figures(look: int) -> str:
    """What a server tells at a look: 100 tokens and 4 requests more each time."""
    buckets = (
        "".join(
            f'vllm:{name}_bucket{{{ENGINE},le="{bound}"}} {look * count}\n'
            for name in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "e2e_request_latency_seconds",
            )
            for bound, count in (("0.1", 2), ("0.5", 4), ("+Inf", 4))
        )
        + f"vllm:time_to_first_token_seconds_count{{{ENGINE}}} {4 * look}\n"
    )
    return f"""\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{ENGINE}}} 3
vllm:num_requests_waiting{{{ENGINE}}} 1
vllm:kv_cache_usage_perc{{{ENGINE}}} 0.375
vllm:generation_tokens_total{{{ENGINE}}} {100 * look}
vllm:prompt_tokens_total{{{ENGINE}}} {1000 * look}
vllm:prefix_cache_hits_total{{{ENGINE}}} {250 * look}
vllm:max_gpu_lora_adapters{{{ENGINE}}} 8
vllm:lora_adapter_loaded{{{ENGINE},adapter_name="support",level="gpu",pinned="false",rank="8"}} 1
vllm:lora_adapter_loaded{{{ENGINE},adapter_name="pirate",level="cpu",pinned="true",rank="8"}} 1
{buckets}onebase_engine_state{{state="ready"}} 1
onebase_engine_state{{state="failed"}} 0
onebase_adapters{{tier="slot"}} 1
onebase_adapters{{tier="host"}} 1
onebase_adapters{{tier="disk"}} 40
onebase_host_memory_bytes{{part="used"}} 5e+07
onebase_host_memory_bytes{{part="limit"}} 4e+09
onebase_versions_unfinished 1
onebase_http_answers_total{{route="/generate",status="429"}} {2 * look}
onebase_tenant_queue_seconds_bucket{{tenant="acme",le="0.1"}} {2 * look}
onebase_tenant_queue_seconds_bucket{{tenant="acme",le="0.5"}} {4 * look}
onebase_tenant_queue_seconds_bucket{{tenant="acme",le="+Inf"}} {4 * look}
onebase_tenant_queue_seconds_count{{tenant="acme"}} {4 * look}
onebase_tenant_sequences{{tenant="acme"}} 3
onebase_tenant_sequences{{tenant="beta"}} 1
onebase_adapter_requests_total{{tenant="acme",adapter="support"}} {4 * look}
onebase_adapter_generation_tokens_total{{tenant="acme",adapter="support"}} {90 * look}
onebase_adapter_requests_total{{tenant="beta",adapter="pirate"}} 7
onebase_adapter_generation_tokens_total{{tenant="beta",adapter="pirate"}} 70
onebase_adapter_requests_total{{tenant="beta",adapter="smollm2-135m-instruct"}} {look}
onebase_adapter_generation_tokens_total{{tenant="beta",adapter="smollm2-135m-instruct"}} {10 * look}
onebase_training_jobs{{state="running"}} 1
onebase_training_jobs{{state="queued"}} 2
onebase_training_step{{job_id="ftjob-3f2a9c41"}} 40
onebase_training_steps{{job_id="ftjob-3f2a9c41"}} 100
onebase_training_loss{{job_id="ftjob-3f2a9c41"}} 1.234
onebase_training_tokens_per_second{{job_id="ftjob-3f2a9c41"}} 812
"""


@pytest.fixture
def server(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that has done more at each look. `key`: what it wants; `down`: answers 503."""
    looks = itertools.count(1)
    state = SimpleNamespace(down=False, restarted=False)

    def script(request: Any) -> None:
        if state.down:
            request.reply(503, {"error": {"message": "The engine is restarting.", "type": "server_error"}})
            return
        request.begin_stream()
        request.send(figures(0 if state.restarted else next(looks)).encode())
        request.end_stream()

    made = serve(script)
    made.state = state
    monkeypatch.setenv("ONEBASE_URL", made.url)
    return made


@pytest.fixture
def even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is two seconds after the one before."""
    ticks = itertools.count(0.0, 2.0)
    clock = SimpleNamespace(
        monotonic=lambda: next(ticks),
        sleep=lambda seconds: None,
        time=lambda: NOW,
        strftime=time.strftime,
        localtime=time.localtime,
    )
    monkeypatch.setattr(top, "time", clock)


def test_one_interval_is_shown(
    server: Any, even_clock: None, transcript: Callable[[str], Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shell = transcript(os.environ["ONEBASE_URL"])
    shell.run("top", "--once")
    monkeypatch.setenv("COLUMNS", "50")
    shell.run("top")  # a pipe gets one interval too
    monkeypatch.setenv("COLUMNS", "80")
    shell.run("top", "--interval", "0")
    shell.run("top", "--help")
    server.state.down = True
    shell.run("top", "--once")
    shell.check("top")


def test_programs_get_json(server: Any, even_clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--json"]) == 0
    frame = json.loads(capsys.readouterr().out)
    assert (frame["running"], frame["waiting"], frame["state"]) == (3, 1, "ready")
    assert (frame["generated"], frame["prompted"], frame["cached"]) == (50, 500, 0.25)
    assert frame["first_token"] == {"p50": 0.1, "p95": pytest.approx(0.46)}
    assert frame["adapters"][0] == {
        "adapter": "support", "tenant": "acme", "tier": "slot", "requests": 2.0, "tokens": 45.0,
    }  # fmt: skip
    assert frame["refused"] == 1.0


def test_a_server_that_began_again_has_no_negative_rates(server: Any, even_clock: None) -> None:
    before = parse_metrics(figures(50))
    frame = top._frame(before, parse_metrics(figures(2)), 2.0, before)
    assert (frame.generated, frame.refused, frame.adapters[0].tokens) == (100, 2, 90)
    assert frame.first_token.p50 == frame.tenants[0].wait.p50 == 0.1


def test_waits_are_those_of_the_last_minute(server: Any, even_clock: None) -> None:
    with Client(os.environ["ONEBASE_URL"]) as client:
        watched = top.Watch(client, 2.0)
        frames = [watched.look() for _ in range(40)]
    assert frames[1] is not None
    assert frames[-1] is not None
    assert frames[1].tenants[0].wait == top.Latency(0.1, pytest.approx(0.46))
    assert frames[1].tenants[1].wait == top.Latency(None, None)
    assert len(watched._waits) == 31


def test_at_a_terminal_it_moves_survives_a_server_that_is_away_and_q_ends_it(server: Any) -> None:
    person = Person("top", "--interval", "0.1", terminal="xterm")
    try:
        person.sees("looking at")
        person.sees("3 running")
        person.sees("support")
        server.state.down = True
        person.sees("The engine is restarting")
        server.state.down = False
        person.sees("ready")
        person.types("q")
        assert person.process.wait(60) == 0
    finally:
        person.leaves()


def test_ctrl_c_ends_it_too(server: Any) -> None:
    person = Person("top", "--interval", "0.1", terminal="xterm")
    try:
        person.sees("3 running")
        person.types("\x03")
        assert person.process.wait(60) == 0
    finally:
        person.leaves()


# ---- client.metrics ---------------------------------------------------------------------------------


def test_the_sdk_reads_metrics(sdk: Sdk, server: Any) -> None:
    metrics: Metrics = sdk.call(lambda client: client.metrics(), url=server.url)
    assert metrics.total("onebase_tenant_sequences") == 4
    assert metrics.by("onebase_tenant_sequences", "tenant") == {"acme": 3, "beta": 1}
    assert metrics.total("onebase_tenant_sequences", tenant="nobody") == 0
    assert metrics.quantile("vllm:e2e_request_latency_seconds", 0.25) == pytest.approx(0.05)
    assert metrics.quantile("vllm:no_such", 0.5) is None


def test_what_is_no_text_of_prometheus_is_refused(sdk: Sdk, serve: Callable[..., Any]) -> None:
    def script(request: Any) -> None:
        request.begin_stream()
        request.send(b"<html>\n")
        request.end_stream()

    with pytest.raises(InvalidResponseError, match="line 1 of /metrics"):
        sdk.call(lambda client: client.metrics(), url=serve(script).url)


@given(st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), min_size=1, max_size=5))
def test_any_label_that_prometheus_writes_is_read_as_it_was(values: dict[str, float]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("some", "Some.", ["label", "other"], registry=registry)
    for label, value in values.items():
        gauge.labels(label, 'a "quoted", one').set(value)
    text = generate_latest(registry).decode()
    assert parse_metrics(text).by("some", "label", other='a "quoted", one') == values


def test_quantiles_are_by_bucket() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("some", "Some.", buckets=(1, 2, 4), registry=registry)
    for value in (0.5, 1.5, 1.5, 3.0):
        histogram.observe(value)
    before = parse_metrics(generate_latest(registry).decode())
    assert [before.quantile("some", share) for share in (0.25, 0.5, 1.0)] == [1, 1.5, 4]
    histogram.observe(100)
    after = parse_metrics(generate_latest(registry).decode())
    assert after.quantile("some", 0.5, since=before) == 4, "the highest bound that there is"
