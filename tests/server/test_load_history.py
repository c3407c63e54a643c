"""Load of the last hours: readings become points a minute, buckets quantiles, and the machine is read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_server.telemetry import history
from onebase_server.telemetry.histogram import quantile
from onebase_server.telemetry.history import LoadRecorder
from onebase_server.telemetry.machine import Gpu, MachineReader, MachineReading
from onebase_server.telemetry.measurements import RequestMeasurements


@pytest.mark.parametrize(
    ("counts", "part", "value"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([4, 0, 0, 0], 0.5, 0.5),
        ([1, 1, 2, 0], 0.5, 2.0),
        ([0, 0, 10, 0], 0.95, 2.0 + 0.95 * 2.0),
        ([0, 0, 0, 3], 0.5, 4.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(counts: list[int], part: float, value: float | None) -> None:
    found = quantile((1.0, 2.0, 4.0), counts, part)

    assert found == (None if value is None else pytest.approx(value))


def test_each_point_has_what_came_since_the_one_before_and_probes_are_no_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    measured, answers, totals = RequestMeasurements(), Counter[tuple[str, int]](), Counter[str]()
    recorder = LoadRecorder(measured, answers, lambda name: totals[name], lambda: None, MachineReader())

    answers.update({("/generate", 200): 3, ("/generate", 503): 1, ("/health", 503): 9})
    measured.broken_answers += 1
    totals["generated_tokens"] = 40
    for seconds in (0.15, 0.2, 3.0):
        measured.first_token.observe(seconds)
    clock[0] = 1060.0
    recorder.add_reading()
    clock[0] = 1090.0
    answers["/generate", 200] += 2

    (point,) = recorder.points()
    assert (point.answers, point.errors, point.requests, point.generated_tokens) == (4, 2, 3, 40)
    assert (point.at, point.seconds) == (1060.0, 60.0)
    assert point.first_token_p50 is not None
    assert point.first_token_p95 is not None
    assert 0.1 <= point.first_token_p50 <= 0.25 < 2.5 <= point.first_token_p95 <= 5.0
    newest = recorder.since(60.0)
    assert (newest.answers, newest.requests, newest.first_token_p50) == (2, 0, None)
    assert recorder.since(3600.0).answers == 6


def test_no_more_than_six_hours_are_kept() -> None:
    totals: Any = Counter[str]()
    recorder = LoadRecorder(
        RequestMeasurements(), Counter(), lambda name: totals[name], lambda: None, MachineReader()
    )
    for _ in range(history.MOST_POINTS + 5):
        recorder.add_reading()

    assert len(recorder.points()) == history.MOST_POINTS


# ---- the machine --------------------------------------------------------------------------------


def proc(folder: Path, *, busy: int, idle: int, available: int = 600) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 {busy} 0\ncpu0 1 0 0 0 0 0 0 0 0 0\n")
    (folder / "meminfo").write_text(f"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
    return folder


def driver(status: int = 0) -> Any:
    """Return what stands in for NVML with one GPU; `asked` are the GPUs that were looked for."""
    asked: list[Any] = []

    def find(wanted: Any, device: Any) -> int:
        asked.append(getattr(wanted, "value", wanted))
        return 0

    def name(device: Any, buffer: Any, size: Any) -> int:
        buffer.value = b"A GPU"
        return 0

    def utilization(device: Any, found: Any) -> int:
        found._obj.gpu = 40
        return 0

    def memory(device: Any, found: Any) -> int:
        found._obj.total, found._obj.used = 80_000, 20_000
        return 0

    return SimpleNamespace(
        asked=asked,
        nvmlInit_v2=lambda: status,
        nvmlDeviceGetHandleByIndex_v2=find,
        nvmlDeviceGetHandleByUUID=find,
        nvmlDeviceGetName=name,
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetMemoryInfo=memory,
    )


def no_driver(name: str) -> Any:
    raise OSError("no such file")


def test_the_load_of_the_machine_is_read_and_is_part_of_each_minute(tmp_path: Path) -> None:
    folder = proc(tmp_path / "proc", busy=100, idle=900)
    machine = MachineReader(proc=folder, group=tmp_path, open_gpu=lambda: Gpu(lambda name: driver(), {}))
    recorder = LoadRecorder(RequestMeasurements(), Counter(), lambda name: 0, lambda: None, machine)
    assert recorder.machine.cpu is None

    recorder.note_machine(machine.read())
    proc(folder, busy=175, idle=925, available=250)
    recorder.note_machine(machine.read())
    recorder.add_reading()

    now, (minute,) = recorder.machine, recorder.points()
    assert (now.cpu, now.cpu_cores, now.memory_total, now.missing) == (0.75, os.cpu_count(), 1_024_000, {})
    assert (now.gpu, now.gpu_name, now.gpu_memory_used, now.gpu_memory_total) == (
        0.4,
        "A GPU",
        20_000,
        80_000,
    )
    assert (minute.cpu, minute.memory_used) == (0.75, 750 * 1024)
    assert (minute.gpu, minute.gpu_memory_used) == (0.4, 20_000)


def test_a_container_is_measured_by_its_own_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2000000\nuser_usec 1\n")
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    machine = MachineReader(False, proc(tmp_path / "proc", busy=1, idle=1), tmp_path)
    recorder = LoadRecorder(RequestMeasurements(), Counter(), lambda name: 0, lambda: None, machine)
    recorder.note_machine(machine.read())
    clock[0] = 54.0
    (tmp_path / "cpu.stat").write_text("usage_usec 5000000\n")
    recorder.note_machine(machine.read())

    now = recorder.machine
    assert (now.cpu, now.cpu_cores) == (0.5, 1.5)
    assert (now.memory_used, now.memory_total) == (300_000, 500_000)
    assert now.missing == {"gpu": "the base is on the processor (--device cpu)"}


def test_what_cannot_be_read_is_none_and_says_why(tmp_path: Path) -> None:
    machine = MachineReader(proc=tmp_path, group=tmp_path, open_gpu=lambda: Gpu(no_driver, {}))
    reading = machine.read()

    assert (reading.cpu_busy, reading.memory_used, reading.gpu) == (None, None, None)
    assert set(machine.missing) == {"cpu", "memory", "gpu"}
    assert "libnvidia-ml.so.1 is not installed" in machine.missing["gpu"]


def test_a_driver_that_stopped_answering_says_nothing_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    recorder = LoadRecorder(RequestMeasurements(), Counter(), lambda name: 0, lambda: None, MachineReader())
    for _ in range(2):
        clock[0] += 5
        recorder.note_machine(MachineReading(clock[0], clock[0], 2 * clock[0], 7, 0.5, 8))
    assert (recorder.machine.cpu, recorder.machine.gpu) == (0.5, 0.5)
    clock[0] += 60
    recorder.add_reading()

    (point,) = recorder.points()
    assert (point.cpu, point.memory_used, point.gpu, recorder.machine.memory_used) == (None, None, None, None)


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("2,3", 2), ("GPU-7f", b"GPU-7f"), ("MIG-1/2", b"MIG-1/2")]
)
def test_the_gpu_is_the_one_that_cuda_sees_first(visible: str | None, asked: Any) -> None:
    library = driver()
    Gpu(lambda name: library, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert library.asked == [asked]


@pytest.mark.parametrize(("visible", "status"), [("", 0), ("-1", 0), ("0", 9)])
def test_a_gpu_that_is_hidden_or_whose_driver_fails_is_none(visible: str, status: int) -> None:
    with pytest.raises(OSError, match=r"names no GPU|status 9"):
        Gpu(lambda name: driver(status), {"CUDA_VISIBLE_DEVICES": visible})
