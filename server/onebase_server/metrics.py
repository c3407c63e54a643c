"""Prometheus' figures of training and serving, collected when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from onebase_adapters.registry import BATCH_STATES, JOB_STATES
from onebase_server.batches.runner import BatchRunner
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.processes.supervisor import EngineSupervisor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PROGRESS = (
    ("step", "onebase_training_step", "Steps that the job has done."),
    ("steps", "onebase_training_steps", "Steps that the job will have."),
    ("loss", "onebase_training_loss", "Training loss of the last step, nats a token."),
    ("eval_loss", "onebase_training_eval_loss", "Held-out loss when it was last evaluated, nats a token."),
    ("tokens_per_second", "onebase_training_tokens_per_second", "Tokens that the job trains on in a second."),
)
_SERVING = (
    ("rows_running", "onebase_rows_running", "Rows that are being computed."),
    ("rows_waiting", "onebase_rows_waiting", "Rows that wait for their turn."),
    ("kv_blocks_free", "onebase_kv_blocks_free", "Blocks of the KV cache that are free."),
    ("adapters_loaded", "onebase_adapters_loaded", "Versions in the engine's memory."),
)
_SERVED = (
    ("steps", "onebase_engine_steps", "Steps of the engine."),
    ("prompt_tokens", "onebase_prompt_tokens", "Tokens of prompts that were computed."),
    ("generated_tokens", "onebase_generated_tokens", "Tokens that were generated."),
    ("draft_tokens", "onebase_draft_tokens", "Tokens of rows' own texts that were tried ahead."),
    ("right_draft_tokens", "onebase_right_draft_tokens", "Those of them that were right."),
    ("preemptions", "onebase_preemptions", "Rows that gave their blocks back and were computed again."),
)


class Metrics:
    """Collects when asked; keeps nothing."""

    def __init__(self, supervisor: EngineSupervisor, scheduler: JobScheduler, batches: BatchRunner) -> None:
        self._supervisor = supervisor
        self._scheduler = scheduler
        self._runner = batches

    def render(
        self, job_counts: Mapping[str, int] | None, batch_counts: Mapping[str, int] | None = None
    ) -> bytes:
        """Prometheus' text. job_counts, batch_counts: how many there are in each state, if that is known."""
        registry = CollectorRegistry(auto_describe=False)
        metrics = [*self._serving(), *self._training(job_counts), *self._batches(batch_counts)]
        registry.register(_Collected(metrics))
        return generate_latest(registry)

    def _serving(self) -> Iterator[Metric]:
        supervisor = self._supervisor
        yield _counter("onebase_engine_restarts", "Engines started after the first one.", supervisor.restarts)
        stats = supervisor.router.stats
        if stats is None:
            return
        for field, name, text in _SERVING:
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, name, text in _SERVED:
            yield _counter(name, text, getattr(stats, field))

    def _training(self, job_counts: Mapping[str, int] | None) -> Iterator[Metric]:
        if job_counts is not None:
            jobs = GaugeMetricFamily("onebase_training_jobs", "Training jobs by state.", labels=["state"])
            for state in JOB_STATES:
                jobs.add_metric([state], job_counts.get(state, 0))
            yield jobs
        yield _counter("onebase_trainer_deaths", "Trainers that died by themselves.", self._scheduler.deaths)
        runs = [run for run in self._scheduler.running if run.kind == "train"]
        for field, name, text in _PROGRESS:
            figures = GaugeMetricFamily(name, text, labels=["job"])
            for run in runs:
                value = run.progress.get(field)
                if value is not None:
                    figures.add_metric([run.job.id], value)
            yield figures
        memory = GaugeMetricFamily(
            "onebase_trainer_memory_bytes", "Private memory of the trainer's process.", labels=["job"]
        )
        for run in runs:
            if run.pid is not None:
                memory.add_metric([run.job.id], private_memory(run.pid))
        yield memory

    def _batches(self, counts: Mapping[str, int] | None) -> Iterator[Metric]:
        if counts is not None:
            batches = GaugeMetricFamily("onebase_batches", "Batches by state.", labels=["state"])
            for state in BATCH_STATES:
                batches.add_metric([state], counts.get(state, 0))
            yield batches
        yield GaugeMetricFamily(
            "onebase_batch_rows_running", "Rows of batches under way.", value=self._runner.flying
        )
        rows = CounterMetricFamily("onebase_batch_rows", "Rows of batches that ended.", labels=["result"])
        for result in ("completed", "failed"):
            rows.add_metric([result], self._runner.answered.get(result, 0))
        yield rows


class _Collected:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def private_memory(pid: int) -> int:
    """Bytes that a process has for itself; 0 when it has ended. What it shares, as the base, is left out."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("Private_Clean:", "Private_Dirty:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
