"""What GET /metrics tells: each family, vLLM's meaning of it, and no more series than we decide."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from onebase_edge.settings import Settings
from onebase_engine.engine.messages import Sampling
from onebase_server.adapters.catalog import AdapterChoice, VersionRef
from onebase_server.inference.generation import GenerationRequest, Prompt
from onebase_server.telemetry.histogram import Histogram
from onebase_server.telemetry.measurements import (
    MOST_ADAPTERS,
    OTHERS,
    RequestMeasurements,
    RequestTimestamps,
    TokenUsage,
)

from .conftest import Api
from .support import ROOT, Server, Starter, upload

BASE = "smollm2-135m-instruct"
ENGINE = {"model_name": BASE, "engine": "0"}
VLLM = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc "
    "cache_config_info lora_requests_info lora_adapter_loaded num_gpu_loaded_lora_adapters "
    "num_cpu_loaded_lora_adapters max_gpu_lora_adapters",
    "counter": "prompt_tokens generation_tokens prefix_cache_queries prefix_cache_hits num_preemptions "
    "spec_decode_num_draft_tokens spec_decode_num_accepted_tokens request_success",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds "
    "request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds "
    "request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_prompt_tokens request_generation_tokens request_params_max_tokens request_params_n "
    "lora_adapter_load_seconds",
}
OURS = {
    "gauge": "tenant_sequences adapters host_memory_bytes engine_state max_sequences versions_unfinished "
    "training_jobs training_step training_steps training_loss training_eval_loss training_tokens_per_second "
    "trainer_memory_bytes batches batch_requests_running host_prefix_blocks rollout_percent",
    "counter": "adapter_loads adapter_evictions adapter_requests adapter_prompt_tokens "
    "adapter_generation_tokens engine_restarts engine_steps http_answers proofs activations trainer_deaths "
    "batch_requests host_prefix_tokens rollouts_ended rollout_requests rollout_errors rollout_refusals "
    "rollout_aborted rollout_copies_skipped rollout_prompt_tokens rollout_generation_tokens "
    "rollout_first_token_seconds rollout_decode_seconds request_log_lines request_log_dropped_lines",
    "summary": "rollout_judged",
    "histogram": "proof_seconds tenant_queue_seconds",
}
FAMILIES = {
    prefix + name: kind
    for prefix, names in (("vllm:", VLLM), ("onebase_", OURS))
    for kind, some in names.items()
    for name in some.split()
}


def scrape(http: httpx2.Client) -> dict[str, Metric]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    """Of the one sample of this name with these labels, and perhaps others."""
    (found,) = (
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    )
    return found


@pytest.fixture(scope="module")
def http(scripted: Server) -> Iterator[httpx2.Client]:
    with scripted.client() as client:
        yield client


def test_each_family_has_its_type_a_text_and_whole_histograms(http: httpx2.Client) -> None:
    http.post("/generate", json={"prompt": "one two", "max_tokens": 3})
    families = scrape(http)

    assert {name: family.type for name, family in families.items()} == FAMILIES
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        if name.startswith("vllm:") and name != "vllm:lora_requests_info":
            assert all(one.labels.items() >= ENGINE.items() for one in family.samples), name
        if family.type == "histogram":
            check_histogram(family)


def check_histogram(family: Metric) -> None:
    """Buckets grow to +Inf, which is the count."""
    series: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in family.samples:
        labels = {name: text for name, text in one.labels.items() if name != "le"}
        key = one.labels.get("le") or one.name.removeprefix(family.name)
        series.setdefault(tuple(sorted(labels.items())), {})[key] = one.value
    assert series, family.name
    for samples in series.values():
        bounds = [key for key in samples if not key.startswith("_")]
        assert bounds == sorted(bounds, key=float)
        counts = [samples[bound] for bound in bounds]
        assert counts == sorted(counts)
        assert (bounds[-1], counts[-1]) == ("+Inf", samples["_count"])
        assert samples["_sum"] >= 0


def test_a_request_is_in_the_figures_once(http: httpx2.Client) -> None:
    names = {
        "vllm:request_success_total": {"finished_reason": "length"},
        "vllm:time_to_first_token_seconds_count": {},
        "vllm:inter_token_latency_seconds_count": {},
        "vllm:request_time_per_output_token_seconds_count": {},
        "vllm:e2e_request_latency_seconds_count": {},
        "vllm:request_prompt_tokens_sum": {},
        "vllm:request_generation_tokens_sum": {},
        "vllm:request_params_n_sum": {},
        "vllm:request_params_max_tokens_sum": {},
        "onebase_adapter_generation_tokens_total": {"tenant": "default", "adapter": BASE},
        "onebase_http_answers_total": {"route": "/v1/completions", "status": "200"},
    }
    body = {"model": BASE, "prompt": "one two", "n": 2, "max_tokens": 4}
    http.post("/v1/completions", json=body)
    before = scrape(http)
    http.post("/v1/completions", json=body)
    after = scrape(http)
    prompt = len(http.post("/tokenize", json={"prompt": "one two"}).json()["tokens"])
    more = {
        name: value(after, name, **labels) - value(before, name, **labels) for name, labels in names.items()
    }
    assert list(more.values()) == [2, 1, 6, 1, 1, prompt, 8, 2, 4, 8, 1]


def test_how_choices_ended_is_said_in_vllms_words(scripted: Server, http: httpx2.Client) -> None:
    before = scrape(http)
    http.post("/generate", json={"prompt": "one two", "max_tokens": 40, "stop": ["two"]})
    with http.stream("POST", "/generate", json={"prompt": "a", "max_tokens": 90_000, "stream": True}) as one:
        next(one.iter_lines())
    expected = {"stop": 1.0, "length": 0.0, "abort": 1.0, "error": 0.0}

    def more() -> dict[str, float]:
        after, name = scrape(http), "vllm:request_success_total"
        return {
            reason: value(after, name, finished_reason=reason) - value(before, name, finished_reason=reason)
            for reason in expected
        }

    scripted.wait_for(lambda: more()["abort"] == 1.0)
    assert more() == expected


def test_a_gateway_finds_where_adapters_are(http: httpx2.Client) -> None:
    upload(http, "first", b"first", activate="true").raise_for_status()
    upload(http, "second", b"second", activate="true").raise_for_status()
    older = http.get("/v1/adapters/second").json()["version"]
    upload(http, "second", b"newer", activate="true").raise_for_status()
    http.post("/v1/adapters/second/pin", json={"pinned": True})
    http.post("/v1/completions", json={"model": "first", "prompt": "one", "max_tokens": 2})

    families = scrape(http)

    loaded = {
        one.labels["adapter_name"]: (one.labels["level"], one.labels["pinned"], one.labels["rank"], one.value)
        for one in families["vllm:lora_adapter_loaded"].samples
    }
    assert loaded == {
        "first": ("gpu", "false", "8", 1),
        "second": ("cpu", "true", "8", 1),
        f"second@{older[:12]}": ("cpu", "false", "8", 1),
    }
    assert value(families, "vllm:num_gpu_loaded_lora_adapters", model_name=BASE) == 1
    assert value(families, "vllm:num_cpu_loaded_lora_adapters", model_name=BASE) == 3
    assert value(families, "vllm:max_gpu_lora_adapters", model_name=BASE) == 1
    assert value(families, "vllm:lora_adapter_load_seconds_count", transition="load") == 3
    assert value(families, "onebase_adapters", tier="slot") == 1
    assert value(families, "onebase_proofs_total", result="ready") == 3
    assert value(families, "onebase_activations_total", action="activate") == 3
    (info,) = families["vllm:lora_requests_info"].samples
    assert (info.labels["max_lora"], info.labels["running_lora_adapters"]) == ("1", "")


def test_an_adapter_with_requests_is_in_the_older_metric_too(scripted: Server, http: httpx2.Client) -> None:
    upload(http, "busy", b"busy", activate="true").raise_for_status()
    body = {"model": "busy", "prompt": "one", "max_tokens": 90_000, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # dropped, it would close the stream
        next(lines)
        (info,) = scrape(http)["vllm:lora_requests_info"].samples
    scripted.wait_for(lambda: http.get("/status").json()["requests"] == 0)  # it is in no figure after this
    assert info.labels["running_lora_adapters"] == "busy"
    assert info.labels["waiting_lora_adapters"] == ""
    assert info.value > 1.7e9, "when it was so, in Unix seconds"


def test_nothing_that_clients_send_becomes_a_series(http: httpx2.Client) -> None:
    def series() -> set[tuple[str, str]]:
        families = scrape(http)
        return {(one.name, str(sorted(one.labels.items()))) for it in families.values() for one in it.samples}

    def ask(mark: str) -> None:
        http.post("/v1/completions", json={"model": f"no-{mark}", "prompt": "x", "max_tokens": 1})
        http.post("/generate", json={"adapter": f"none-{mark}", "prompt": "x"})
        http.post("/generate", json={"prompt": "x", "max_tokens": 1}, headers={"x-request-id": mark})
        http.get(f"/{mark}")
        http.get(f"/v1/adapters/{mark}")
        http.request(mark.upper().replace("-", ""), "/generate")
        http.get("/v1/models", headers={"host": f"{mark}.example", "user-agent": mark})

    ask("mark")
    before = series()
    for number in range(20):
        ask(f"mark-{number}")
    assert {one for one in series() ^ before if one[0] != "vllm:lora_requests_info"} == set()


def test_counters_go_on_when_an_engine_ends(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server, server.client() as http:
        http.post("/generate", json={"prompt": "one two", "max_tokens": 3}).raise_for_status()
        before = value(scrape(http), "onebase_engine_steps_total")
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for(lambda: value(scrape(http), "onebase_engine_restarts_total") == 1)
        assert value(scrape(http), "onebase_engine_steps_total") == before
        server.wait_ready()
        http.post("/generate", json={"prompt": "one two", "max_tokens": 3}).raise_for_status()
        assert value(scrape(http), "onebase_engine_steps_total") > before


def test_the_real_engine_says_how_long_versions_take_into_slots(api: Api) -> None:
    api.generate(prompt="Hello", adapter="red")
    api.generate(prompt="Hello", adapter="blue")
    # Of requests before these, which others have left, blocks may be in use for a moment.
    api.server.wait_for(lambda: value(scrape(api.http), "vllm:kv_cache_usage_perc") == 0)
    families = scrape(api.http)
    assert value(families, "vllm:lora_adapter_load_seconds_count", transition="activate") >= 2
    assert value(families, "vllm:lora_adapter_load_seconds_sum", transition="activate") > 0
    assert re.fullmatch(r"[1-9]\d+", families["vllm:cache_config_info"].samples[0].labels["num_gpu_blocks"])
    assert families["vllm:cache_config_info"].samples[0].labels["cache_dtype"] == "bfloat16"
    assert value(families, "vllm:request_queue_time_seconds_count") >= 2


# ---- what is measured -----------------------------------------------------------------------------


def job(*adapters: str, **how: Any) -> GenerationRequest:
    uses = tuple(VersionRef("acme", name, "digest") for name in adapters)
    return GenerationRequest("id", "acme", (Prompt([1]),), Sampling(), AdapterChoice(uses=uses), **how)


def test_a_histogram_counts_as_prometheus_does() -> None:
    histogram = Histogram((1.0, 2.5))
    for one in (0.5, 1.0, 1.1, 2.5, 9.0):
        histogram.observe(one)
    assert histogram.buckets() == [("1.0", 2), ("2.5", 4), ("+Inf", 5)]
    assert histogram.total == pytest.approx(14.1)


def test_beyond_the_limit_adapters_are_counted_together_and_deleted_ones_are_forgotten() -> None:
    measured = RequestMeasurements()
    for number in range(MOST_ADAPTERS + 5):
        measured.ended(job(f"adapter-{number}"), TokenUsage(2, 3), RequestTimestamps(), Counter(stop=1))
    told = {adapter: use.requests for _, adapter, use in measured.uses(lambda tenant, adapter: True)}
    assert len(told) == MOST_ADAPTERS + 1
    assert told[OTHERS] == 5

    kept = {adapter for _, adapter, _ in measured.uses(lambda tenant, adapter: adapter == "adapter-7")}
    assert kept == {"adapter-7", OTHERS}


def test_rows_of_batches_are_in_no_histogram() -> None:
    measured = RequestMeasurements()
    measured.ended(job("a", background=True), TokenUsage(2, 3), RequestTimestamps(), Counter(stop=1))
    assert measured.whole.buckets()[-1] == ("+Inf", 0)
    assert measured.finished.total() == 0
    assert [use.completion_tokens for *_, use in measured.uses(lambda *names: True)] == [3]


def test_a_stream_that_was_resumed_after_its_last_token_has_no_times() -> None:
    measured = RequestMeasurements()
    measured.ended(job("a"), TokenUsage(2, 3), RequestTimestamps(), Counter(stop=1))
    assert measured.finished.total() == 1
    for times in (measured.whole, measured.inference, measured.prefill):
        assert (times.buckets()[-1], times.total) == (("+Inf", 0), 0)


def test_a_sum_of_adapters_counts_for_each_of_them() -> None:
    measured = RequestMeasurements()
    measured.ended(job("a", "b"), TokenUsage(2, 3), RequestTimestamps(), Counter(stop=1))
    assert {adapter for _, adapter, _ in measured.uses(lambda *names: True)} == {"a", "b"}


# ---- who reads them -------------------------------------------------------------------------------


def sample_names() -> dict[str, str]:
    """Of each sample the family."""
    ends = {
        "gauge": ("",),
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "summary": ("_sum", "_count"),
    }
    return {name + end: name for name, kind in FAMILIES.items() for end in ends[kind]}


def expressions() -> list[tuple[str, str]]:
    """What the dashboard asks Prometheus for, with the text of each legend."""
    dashboard = json.loads((ROOT / "deploy/grafana/onebase.json").read_text())
    return [
        (target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def test_the_dashboard_asks_for_samples_and_labels_that_there_are(http: httpx2.Client) -> None:
    http.post("/generate", json={"prompt": "one two", "max_tokens": 2})
    families, known = scrape(http), sample_names()
    assert len(expressions()) > 50
    for expression, legend in expressions():
        names = re.findall(r"\b(?:vllm:|onebase_)\w+", expression)
        assert names, expression
        for name in names:
            assert name in known, expression
        asked = set(re.findall(r"\{\{(\w+)\}\}", legend))
        asked |= {
            label for some in re.findall(r"\bby \(([\w, ]+)\)", expression) for label in some.split(", ")
        }
        asked |= set(re.findall(r'(\w+)=~?"', expression))
        has = {label for name in names for one in families[known[name]].samples for label in one.labels}
        idle = {"job_id", "tenant"} if re.search("train|tenant_sequences", expression) else set()
        assert asked <= has | idle | {"instance"}, expression


def test_each_family_is_documented() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    for name in FAMILIES:
        bare = name.removeprefix("vllm:")
        assert re.search(rf"`(?:vllm:)?{bare}(?:_total)?[`{{]", page) or f"`{name}" in page, name


def test_prometheus_and_grafana_find_what_is_named_to_them() -> None:
    scraped = (ROOT / "deploy/prometheus.yml").read_text()
    assert f"127.0.0.1:{Settings().port}" in scraped
    dashboard = json.loads((ROOT / "deploy/grafana/onebase.json").read_text())
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used <= variables | {"__rate_interval", "__all"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for place, one in enumerate(dashboard["panels"]):
        for other in dashboard["panels"][:place]:
            assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )
