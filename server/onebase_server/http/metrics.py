"""Prometheus metrics, collected at each scrape: vLLM's names first, which dashboards and gateways know.

Labels are names of adapters and tenants that the registry has, up to a limit, and words of our own: never
what a client has merely sent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric

from onebase_adapters.names import label
from onebase_adapters.registry import BATCH_STATES, JOB_STATES, ROLLOUT_SIDES
from onebase_engine.engine.messages import Stats
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.batches.runner import BatchRunner
from onebase_server.jobs.job_run import JobRun
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.processes.supervisor import EngineState, EngineSupervisor
from onebase_server.requests.request_log import RequestLog
from onebase_server.requests.rollouts import RolloutService
from onebase_server.telemetry.histogram import Histogram
from onebase_server.telemetry.measurements import MOST_ADAPTERS, RequestMeasurements

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_LOADED = 256
"""Largest number of versions in memory that are reported by name: the most recently used."""
_ENGINE = "0"
"""vLLM's label of the engine: there is one."""
_TIERS = ("slot", "host", "disk")
_FINISHED = ("stop", "length", "abort", "error")
_COUNTED = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens, with those that the prefix cache had."),
    ("generated_tokens", "generation_tokens", "Tokens that were generated."),
    ("prompt_tokens", "prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."),
    ("cached_tokens", "prefix_cache_hits", "Prompt tokens that the prefix cache had."),
    (
        "preemptions",
        "num_preemptions",
        "Sequences preempted: they released their blocks and were computed again.",
    ),
    ("draft_tokens", "spec_decode_num_draft_tokens", "Draft tokens computed, from sequences' own texts."),
    ("right_draft_tokens", "spec_decode_num_accepted_tokens", "Draft tokens accepted."),
)
"""Totals of the engine, vLLM's names, and what they are."""
_TIMED: tuple[tuple[str, Callable[[RequestMeasurements], Histogram], str], ...] = (
    ("time_to_first_token_seconds", lambda m: m.first_token, "From a request's arrival to its first token."),
    ("inter_token_latency_seconds", lambda m: m.token_gap, "From one output of a sequence to its next."),
    ("time_per_output_token_seconds", lambda m: m.token_gap, "inter_token_latency_seconds, by its old name."),
    ("request_time_per_output_token_seconds", lambda m: m.per_token, "Mean after a request's first token."),
    ("e2e_request_latency_seconds", lambda m: m.whole, "From a request's arrival to its last token."),
    ("request_queue_time_seconds", lambda m: m.queue, "In the engine's queue."),
    ("request_inference_time_seconds", lambda m: m.inference, "From the first step to the last token."),
    ("request_prefill_time_seconds", lambda m: m.prefill, "From the first step to the first token."),
    ("request_decode_time_seconds", lambda m: m.decode, "From the first token to the last."),
    ("request_prompt_tokens", lambda m: m.prompt_tokens, "Prompt tokens of a request."),
    ("request_generation_tokens", lambda m: m.completion_tokens, "Tokens that a request generated."),
    ("request_params_max_tokens", lambda m: m.max_tokens, "The most that a request may generate."),
    ("request_params_n", lambda m: m.choices, "Choices of a request."),
)
_USED = (
    ("requests", "requests", "Requests with an adapter; those with a sum of adapters count for each."),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests with an adapter."),
    ("completion_tokens", "generation_tokens", "Tokens that requests with an adapter generated."),
)
_OF_ROLLOUTS = (
    ("requests", "errors.n", "Requests of a rollout that were answered, or failed."),
    ("errors", "errors.sum", "Requests of a rollout that failed."),
    ("refusals", "refusals.sum", "Answers of a rollout that refuse."),
    ("aborted", "aborted", "Requests of a rollout that their callers left, or whose time was over."),
    (
        "copies_skipped",
        "skipped",
        "Copies and judgements that were not made: too many ran, or the judge could not be asked.",
    ),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of a rollout's requests."),
    ("generation_tokens", "completion_tokens", "Tokens that a rollout's requests generated."),
    ("first_token_seconds", "first_token.seconds", "Seconds to the first token, summed over requests."),
    ("decode_seconds", "decode.seconds", "Seconds from the first token to the last, summed over requests."),
)
_PROGRESS = (
    ("step", "onebase_training_step", "Steps that the job has done."),
    ("steps", "onebase_training_steps", "Steps that the job will have."),
    ("loss", "onebase_training_loss", "Training loss of the last step, nats a token."),
    ("eval_loss", "onebase_training_eval_loss", "Held-out loss when it was last evaluated, nats a token."),
    ("tokens_per_second", "onebase_training_tokens_per_second", "Tokens that the job trains on in a second."),
)


class MetricsCollector:
    """Reads the server's parts when asked; keeps nothing of it."""

    def __init__(
        self,
        *,
        supervisor: EngineSupervisor,
        catalog: Catalog,
        residency: Residency,
        adapters: AdapterService,
        scheduler: JobScheduler,
        batches: BatchRunner,
        requests: RequestMeasurements,
        answers: Counter[tuple[str, int]],
        rollouts: RolloutService,
        request_log: RequestLog,
    ) -> None:
        self._request_log = request_log
        self._rollouts = rollouts
        self._supervisor = supervisor
        self._catalog = catalog
        self._residency = residency
        self._adapters = adapters
        self._scheduler = scheduler
        self._batches = batches
        self._requests = requests
        self._answers = answers
        self._labels = {"model_name": catalog.base_name, "engine": _ENGINE}

    def collect(
        self, job_counts: Mapping[str, int] | None, batch_counts: Mapping[str, int] | None = None
    ) -> list[Metric]:
        """Everything, for `render`. On the event loop, whose objects it reads; 1 ms.

        job_counts, batch_counts: how many there are in each state, if that is known.
        """
        return [
            *self._engine(),
            *self._request_figures(),
            *self._lora(),
            *self._tiers(),
            *self._lives(),
            *self._rollout_figures(),
            *self._training(job_counts),
            *self._batch_figures(batch_counts),
            _total("onebase_request_log_lines", "Lines in the log of requests.", self._request_log.written),
            _total(
                "onebase_request_log_dropped_lines",
                "Lines that could not be written in time and are not in the log of requests.",
                self._request_log.dropped,
            ),
        ]

    # ---- as vLLM ---------------------------------------------------------------------------------

    def _engine(self) -> Iterator[Metric]:
        router, base = self._supervisor.client, self._supervisor.base
        stats = router.stats
        running, waiting, used = _load(stats)
        yield self._gauge("num_requests_running", "Sequences running.", running)
        yield self._gauge(
            "num_requests_waiting",
            "Sequences waiting for their turn, and requests waiting for their adapter. Without batches.",
            waiting + self._residency.waiting,
        )
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            yield self._gauge(name, "Part of the KV cache in use by sequences, 0 to 1.", used)
        for field, name, text in _COUNTED:
            yield self._counter(name, text, router.total(field))
        sequences = GaugeMetricFamily(
            "onebase_tenant_sequences", "Sequences waiting or running.", labels=["tenant"]
        )
        tenants = sorted(router.tenants.items(), key=lambda one: -one[1])
        for tenant, count in tenants[:MOST_ADAPTERS]:
            sequences.add_metric([tenant], count)
        yield sequences
        if base is not None:
            info = {"block_size": str(base.block_size), "num_gpu_blocks": str(base.kv_blocks)}
            info |= {"cache_dtype": base.kv_dtype, "enable_prefix_caching": "True"}
            yield _labelled("vllm:cache_config_info", "Of the KV cache.", self._labels | info, 1)
        prefixes = GaugeMetricFamily(
            "onebase_host_prefix_blocks", "KV blocks of prefixes in host memory.", labels=["part"]
        )
        for part, field in (("limit", "kv_blocks_host_total"), ("used", "kv_blocks_on_host")):
            prefixes.add_metric([part], getattr(stats, field, 0))
        yield prefixes
        yield _total(
            "onebase_host_prefix_tokens",
            "Tokens whose keys and values came back from host memory.",
            router.total("restored_tokens"),
        )

    def _request_figures(self) -> Iterator[Metric]:
        requests = self._requests
        success = CounterMetricFamily(
            "vllm:request_success", "Choices that ended, by how.", labels=[*self._labels, "finished_reason"]
        )
        for reason in _FINISHED:
            success.add_metric([*self._labels.values(), reason], requests.finished[reason])
        yield success
        for name, histogram_of, text in _TIMED:
            yield self._histogram(f"vllm:{name}", text, {(): histogram_of(requests)}, ())
        yield _histogram(
            "onebase_tenant_queue_seconds",
            "A tenant's requests in the engine's queue.",
            {(tenant,): wait for tenant, wait in sorted(requests.tenants.waits.items())},
            ("tenant",),
        )

    def _lora(self) -> Iterator[Metric]:
        residency, base = self._residency, self._supervisor.base
        slots = base.max_slots if base is not None else 0
        names: dict[str, set[str]] = {"running": set(), "waiting": set()}
        for use in residency.used:
            if use.name:
                names["running" if residency.tier(use.digest) == "slot" else "waiting"].add(use.name)
        info = {"max_lora": str(slots)}
        for state, some in names.items():
            info[f"{state}_lora_adapters"] = ",".join(sorted(some)[:MOST_LOADED])
        yield _labelled(
            "vllm:lora_requests_info",
            "Adapters with requests: running, their version is in a slot; waiting, it is not yet.",
            info,
            time.time(),
        )
        loaded = residency.loaded
        yield self._loaded(loaded[:MOST_LOADED])
        in_slots = sum(tier == "slot" for _, tier, _ in loaded)
        yield self._gauge("num_gpu_loaded_lora_adapters", "Versions in slots.", in_slots)
        yield self._gauge("num_cpu_loaded_lora_adapters", "Versions in host memory.", len(loaded))
        yield self._gauge("max_gpu_lora_adapters", "Slots.", slots)
        yield self._histogram(
            "vllm:lora_adapter_load_seconds",
            "Loading a version: `load` into host memory, `activate` from there into a slot.",
            {("load",): residency.load_seconds, ("activate",): residency.slot_seconds},
            ("transition",),
        )

    def _loaded(self, versions: Sequence[tuple[str, str, bool]]) -> Metric:
        """Return the metric of versions in memory, by the names that requests have for them: an active one by
        its adapter's, others with `@`."""
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Versions in memory: `gpu`, in a slot; `cpu`, in host memory alone.",
            labels=[*self._labels, "adapter_name", "level", "pinned", "rank"],
        )
        told: set[str] = set()
        for digest, tier, pinned in versions:
            level = "gpu" if tier == "slot" else "cpu"
            for version in self._catalog.of_digest(digest):
                record = self._catalog.of(version.tenant).own(version.name)
                active = record is not None and record.active == digest
                name = version.name if active else label(version.name, digest)
                if name not in told:
                    told.add(name)
                    rank = str((version.report or {}).get("rank", 0))
                    family.add_metric([*self._labels.values(), name, level, str(pinned).lower(), rank], 1)
        return family

    # ---- our own -----------------------------------------------------------------------------------

    def _tiers(self) -> Iterator[Metric]:
        memory = self._residency.memory
        tiers: Counter[str] = Counter(
            self._residency.tier(record.active) for record in self._catalog if record.active is not None
        )
        family = GaugeMetricFamily("onebase_adapters", "Active adapters by tier.", labels=["tier"])
        for tier in _TIERS:
            family.add_metric([tier], tiers[tier])
        yield family
        sizes = GaugeMetricFamily("onebase_host_memory_bytes", "Host memory for versions.", labels=["part"])
        for part in ("limit", "used", "pinned"):
            sizes.add_metric([part], getattr(memory, part))
        yield sizes
        yield _total("onebase_adapter_loads", "Loads of versions into host memory.", memory.loads)
        yield _total("onebase_adapter_evictions", "Versions that made room for others.", memory.evictions)
        uses = list(self._requests.uses(self._is_known))
        for field, name, text in _USED:
            used = CounterMetricFamily(f"onebase_adapter_{name}", text, labels=["tenant", "adapter"])
            for tenant, adapter, use in uses:
                used.add_metric([tenant, adapter or self._catalog.base_name], getattr(use, field))
            yield used

    def _is_known(self, tenant: str, adapter: str) -> bool:
        return self._catalog.of(tenant).get(adapter) is not None

    def _lives(self) -> Iterator[Metric]:
        supervisor, router = self._supervisor, self._supervisor.client
        state = GaugeMetricFamily("onebase_engine_state", "1 for the engine's state.", labels=["state"])
        for one in EngineState:
            state.add_metric([one.value], supervisor.state is one)
        yield state
        if supervisor.base is not None:
            yield GaugeMetricFamily(
                "onebase_max_sequences",
                "Largest number of sequences computed at once.",
                supervisor.base.max_sequences,
            )
        yield _total("onebase_engine_restarts", "Engines started after the first one.", supervisor.restarts)
        yield _total("onebase_engine_steps", "Steps of the engine.", router.total("steps"))
        answers = CounterMetricFamily(
            "onebase_http_answers", "Answers by route and status.", labels=["route", "status"]
        )
        for (route, status), count in sorted(self._answers.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
        yield GaugeMetricFamily(
            "onebase_versions_unfinished",
            "Versions that are being proved, or wait for it.",
            value=self._adapters.unfinished,
        )
        proofs = CounterMetricFamily("onebase_proofs", "Versions by what they became.", labels=["result"])
        for result in ("ready", "failed"):
            proofs.add_metric([result], self._adapters.proofs[result])
        yield proofs
        yield _histogram("onebase_proof_seconds", "Of each proof.", {(): self._adapters.proof_seconds}, ())
        changes = CounterMetricFamily("onebase_activations", "Changes of active versions.", labels=["action"])
        for action in ("activate", "rollback", "deactivate"):
            changes.add_metric([action], self._adapters.activation.changes[action])
        yield changes

    def _rollout_figures(self) -> Iterator[Metric]:
        """Yield what this server has seen of rollouts that run, by version."""
        labels = ["tenant", "adapter", "version", "side"]
        percent = GaugeMetricFamily(
            "onebase_rollout_percent", "Percent of an adapter's requests that a candidate answers.",
            labels=["tenant", "adapter", "version"],
        )  # fmt: skip
        counters = [
            (CounterMetricFamily(f"onebase_rollout_{name}", text, labels=labels), figure)
            for name, figure, text in _OF_ROLLOUTS
        ]
        judged = SummaryMetricFamily(
            "onebase_rollout_judged", "Answers that a judge looked at; the sum is of those it approved of.",
            labels=labels,
        )  # fmt: skip
        for rollout in islice(self._rollouts.running(), MOST_ADAPTERS):
            percent.add_metric([rollout.tenant, rollout.name, rollout.candidate], rollout.percent)
            for side in ROLLOUT_SIDES:
                sums = self._rollouts.totals.get((rollout.id, side))
                if sums is None:
                    continue
                version = rollout.baseline if side == "active" else rollout.candidate
                values = [rollout.tenant, rollout.name, version, side]
                for family, figure in counters:
                    family.add_metric(values, sums[figure])
                judged.add_metric(values, sums["judge.n"], sums["judge.sum"])
        yield percent
        for family, _ in counters:
            yield family
        yield judged
        ends = CounterMetricFamily(
            "onebase_rollouts_ended", "Rollouts that this server ended.", labels=["state"]
        )
        for state in ("promoted", "rolled_back", "stopped"):
            ends.add_metric([state], self._adapters.activation.rollouts[state])
        yield ends

    def _training(self, job_counts: Mapping[str, int] | None) -> Iterator[Metric]:
        if job_counts is not None:
            jobs = GaugeMetricFamily("onebase_training_jobs", "Training jobs by state.", labels=["state"])
            for state in JOB_STATES:
                jobs.add_metric([state], job_counts.get(state, 0))
            yield jobs
        yield _total("onebase_trainer_deaths", "Trainers that died by themselves.", self._scheduler.deaths)
        runs = [run for run in self._scheduler.running if run.kind == "train"]
        for field, name, text in _PROGRESS:
            figures = GaugeMetricFamily(name, text, labels=["job_id"])
            for run in runs:
                value = run.progress.get(field)
                if value is not None:
                    figures.add_metric([run.job.id], value)
            yield figures
        yield _TrainerMemory(runs)

    def _batch_figures(self, counts: Mapping[str, int] | None) -> Iterator[Metric]:
        if counts is not None:
            batches = GaugeMetricFamily("onebase_batches", "Batches by state.", labels=["state"])
            for state in BATCH_STATES:
                batches.add_metric([state], counts.get(state, 0))
            yield batches
        yield GaugeMetricFamily(
            "onebase_batch_requests_running", "Requests of batches in flight.", value=self._batches.flying
        )
        ended = CounterMetricFamily(
            "onebase_batch_requests", "Requests of batches that ended.", labels=["result"]
        )
        for result in ("completed", "failed"):
            ended.add_metric([result], self._batches.answered.get(result, 0))
        yield ended

    # ---- families -----------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _labelled(f"vllm:{name}", text, self._labels, value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(
        self,
        name: str,
        text: str,
        histograms: Mapping[tuple[str, ...], Histogram],
        labels: tuple[str, ...],
    ) -> Metric:
        return _histogram(
            name,
            text,
            {(*self._labels.values(), *values): one for values, one in histograms.items()},
            (*self._labels, *labels),
        )


class _TrainerMemory(GaugeMetricFamily):
    """Read in the thread that renders: the kernel walks over each process's whole memory for it."""

    def __init__(self, runs: Sequence[JobRun]) -> None:
        super().__init__(
            "onebase_trainer_memory_bytes", "Private memory of the trainer's process.", labels=["job_id"]
        )
        self._pids = [(run.job.id, run.pid) for run in runs if run.pid is not None]

    def read(self) -> None:
        for job, pid in self._pids:
            self.add_metric([job], private_memory(pid))


class _Collected:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def render(metrics: list[Metric]) -> bytes:
    """Return the text of Metrics.collect's result for Prometheus. In any thread."""
    registry = CollectorRegistry(auto_describe=False)
    for metric in metrics:
        if isinstance(metric, _TrainerMemory):
            metric.read()
    registry.register(_Collected(metrics))
    return generate_latest(registry)


def _load(stats: Stats | None) -> tuple[int, int, float]:
    """Return the running and the waiting sequences, without batches', and the used part of the KV cache."""
    if stats is None:
        return 0, 0, 0.0
    total = stats.kv_blocks_total
    used = 1 - stats.kv_blocks_free / total if total else 0.0
    return stats.sequences_running, stats.sequences_waiting - stats.background_waiting, used


def _labelled(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _total(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _histogram(
    name: str, text: str, histograms: Mapping[tuple[str, ...], Histogram], labels: Sequence[str]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in histograms.items():
        family.add_metric(values, histogram.buckets(), histogram.total)
    return family


def private_memory(pid: int) -> int:
    """Return the private memory of a process in bytes; 0 after its end. Shared memory, as the base, is left
    out."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("Private_Clean:", "Private_Dirty:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
