"""The GPU check without a GPU: whatever becomes of a part, the others run and the report says it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import triton
from triton.compiler.compiler import LazyDict

import gpu_check
from bench import (
    gpu_bundle,
    gpu_forms,
    gpu_invariance,
    gpu_kernels,
    gpu_machine,
    gpu_parts,
    gpu_processes,
    gpu_report,
)
from bench.gpu_report import Findings, LastLaunches, Setup, held, page
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.kernels.cuda import Switches

ROOT = Path(__file__).parents[2]
FAULTS = ("raises", "tried", "hangs", "dies", "wrong", "unchecked", "nothing", "good")


@pytest.fixture(autouse=True)
def _forks(forks: None) -> None:
    """Parts begin as forks."""


def run(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """What faulty parts leave in a report, by name. A part that hangs has 8 seconds, and 8 more."""
    parts = [
        gpu_check.Part(
            name, f"part {name}", 8.0 if name == "hangs" else 600.0, "tests.benchmarks.faulty_parts"
        )
        for name in names
    ]
    setup = {"device": "cpu", "shape": "tiny", "folder": str(folder)}
    environment = gpu_check.environment_of("cpu", folder)
    seconds = sum(part.seconds for part in parts)
    GROWN.clear()
    return {one["part"]: one for one in gpu_check.run_parts(parts, setup, environment, seconds, GROWN.append)}


GROWN: list[Any] = []
"""What the reports said that were written meanwhile."""


def test_a_part_that_raises_hangs_or_dies_is_told_with_what_it_had_found_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, *FAULTS)
    states = {name: one["state"] for name, one in found.items()}
    ends = ("failed", "fails", "timed out", "failed", "fails", "failed", "skipped", "ok")
    assert states == dict(zip(FAULTS, ends, strict=True))
    assert [name for name, one in found.items() if held(one)] == ["nothing", "good"]
    assert found["raises"]["figures"] == found["dies"]["figures"] != []
    assert found["raises"]["error"] == "ValueError: a | kernel is wrong"
    assert "raise ValueError" in found["raises"]["log"]
    assert "raise ValueError" in found["tried"]["tracebacks"][0]["text"], "whole, with its place"
    assert [(one["name"], one["held"]) for one in found["tried"]["checks"]] == [
        ("a product can be measured", False),
        ("the others are done", True),
    ]
    assert found["tried"]["figures"][-1]["value"] == "_products", "what was launched last"
    assert found["hangs"]["error"] == "it took more than 16 s, at: a long sleep"
    assert found["hangs"]["checks"][0]["held"]
    left = int(found["hangs"]["figures"][0]["value"])
    assert not Path(f"/proc/{left}").exists(), "a child in a session of its own outlives the part"
    assert found["dies"]["error"] == "its process ended with signal SIGSEGV"
    assert found["unchecked"]["error"] == "it found nothing to check"
    assert found["nothing"]["error"] == "there is no such thing here"
    grown = [{one["part"]: one for one in results} for results in GROWN]
    assert any(
        (report["raises"]["state"], report["dies"]["state"]) == ("failed", "not run")
        and report["hangs"]["state"] == "running"
        and report["hangs"]["checks"]
        for report in grown
    ), "the report has no findings of a part that still runs"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FAULTS]
    assert "FAILS: a row's bits" in lines[4]
    report = {
        "ok": False, "device": "cpu", "shape": "tiny", "began": "now", "seconds": 1.0, "commit": "c",
        "machine": {"torch": "2"}, "parts": list(found.values()),
    }  # fmt: skip
    text = page(report)
    assert "| part raises | failed |" in text
    assert "ValueError: a / kernel is wrong" in text
    assert "- FAILS: a row's bits 2 of 3 rows differ" in text
    assert text.count("raise ValueError") >= 2, "of the part that ended by it, and of the one that went on"
    assert "| 1 | 2.5 |" in text
    assert "no time in this report means anything" in text


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
while [ "$1" != --error-exitcode ]; do shift; done
shift 2
echo "$* $PYTORCH_NO_CUDA_MEMORY_CACHING"
"$@"
echo "========= Invalid __global__ read of size 4 bytes"
echo "=========     at _products+0x80"
echo "========= ERROR SUMMARY: 1 error"
exit 9
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_part_in_which_something_raises_runs_again_launch_by_launch_and_then_under_a_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER)
    program.chmod(0o755 if there else 0o644)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(gpu_report, "_SANITIZER_PLACES", ())
    names = ("good", "raises", "tried", "wrong")
    parts = tuple(gpu_check.Part(name, name, 60.0, "tests.benchmarks.faulty_parts") for name in names)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    setup = {"device": "cpu", "shape": "8b", "folder": str(tmp_path)}
    environment = gpu_check.environment_of("cpu", tmp_path)
    first = gpu_check.run_parts(parts, setup, environment, 600.0)
    found = {one["part"]: one for one in gpu_check.run_again(first, setup, environment, 600.0)}
    assert [*found] == ["raises again", "tried again", "raises watched", "tried watched"]
    assert found["tried again"]["figures"][-1]["value"] == "_products"
    watched = found["tried watched"]
    if there:
        check = watched["checks"][-1]
        assert not check["held"]
        assert check["detail"].startswith("Invalid __global__ read of size 4 bytes; at _products+0x80; ")
        command = (tmp_path / "watched" / "tried" / "log").read_text().splitlines()[1]
        assert '"shape": "tiny"' in command
        assert command.endswith(" 1"), "each tensor is an allocation of its own"
    else:
        assert (watched["state"], watched["error"]) == ("skipped", "there is no compute-sanitizer here")


def test_a_sanitizer_that_finds_nothing_says_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("========= COMPUTE-SANITIZER\nholds: it\n=========\n========= ERROR SUMMARY: 0 errors\n")
    assert gpu_report.sanitizer_findings(log) == []
    assert gpu_report.sanitizer_findings(tmp_path / "none") == []


def test_the_code_of_the_kernels_that_were_launched_last_is_kept_form_by_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for form, name in (("one", "_products.ttgir"), ("two", "_products.ptx"), ("two", "_norm.ptx")):
        (tmp_path / "triton" / form).mkdir(parents=True, exist_ok=True)
        (tmp_path / "triton" / form / name).write_text(form)
    found = Findings(tmp_path / "engine" / "findings.json")
    (tmp_path / "engine").mkdir()
    found.launches.names.append("_products")
    found.trying("a step", lambda: 1 / 0)
    kept = {file.name for file in (tmp_path / "engine" / "code").iterdir()}
    assert kept == {"_products-one.ttgir", "_products-two.ptx"}
    gpu_check._keep_logs(tmp_path, tmp_path / "logs.tar.gz")
    with tarfile.open(tmp_path / "logs.tar.gz") as tar:
        assert "engine/code/_products-two.ptx" in tar.getnames()


def told(found: Findings) -> dict[str, Any]:
    """What a part has found, as its file has it."""
    result: dict[str, Any] = json.loads(found._file.read_text())
    return result


def faulty_unless(name: str) -> Any:
    """Rows that differ by these switches, of which one is at fault."""
    return lambda switches: 3 * getattr(switches, name)


def test_switches_are_turned_one_by_one_until_the_one_is_found_on_which_bits_hang(tmp_path: Path) -> None:
    found = Findings(tmp_path / "findings.json")
    assert gpu_invariance.turn_switches(found, "alone", Switches(), faulty_unless("tiles")) == ["tiles"]
    said = told(found)
    rows = dict(said["tables"][0]["rows"])
    assert len(rows) == 2 + len(vars(Switches())), "as usual, all off, and each by itself"
    assert (rows["as usual"], rows["all off"], rows["tiles off"], rows["library off"]) == (3, 0, 0, 3)
    assert rows["permuted on"] == 3
    assert said["figures"][-1]["value"] == "tiles"


@pytest.mark.parametrize(
    ("differing", "verdict", "compared"),
    [
        (lambda switches: 0, "chance", 1),
        (lambda switches: 2, "no switch", 2),
        (lambda switches: 2 * (switches.library or switches.graphs), "more than one switch", 16),
    ],
)
def test_a_difference_that_hangs_on_no_single_switch_is_told_as_such(
    tmp_path: Path, differing: Any, verdict: str, compared: int
) -> None:
    found = Findings(tmp_path / "findings.json")
    assert gpu_invariance.turn_switches(found, "alone", Switches(), differing) == []
    said = told(found)
    assert said["figures"][-1]["value"].startswith(verdict)
    assert len(said["tables"][0]["rows"]) == compared


def test_a_switch_that_cannot_be_turned_keeps_no_other_from_being_found(tmp_path: Path) -> None:
    def differing(switches: Switches) -> int:
        if not switches.wide and switches.gated:
            raise RuntimeError("out of resources")
        return int(switches.gated)

    found = Findings(tmp_path / "findings.json")
    assert gpu_invariance.turn_switches(found, "alone", Switches(), differing) == ["gated"]
    said = told(found)
    assert ["wide off", "RuntimeError: out of resources"] in said["tables"][0]["rows"]
    assert said["tracebacks"][0]["title"] == "alone, wide off"


def test_memory_that_takes_more_than_was_set_aside_is_told(tmp_path: Path) -> None:
    found = Findings(tmp_path / "findings.json")
    ledger = gpu_parts.Ledger(Setup("cpu", "tiny", tmp_path), found)
    ledger.compare("slots", 2_000_000, 3_000_000)
    ledger.compare("the KV cache", 2_000_000, 2_000_000)
    ledger.compare("jobs", 5_000_000, None)
    said = told(found)
    assert [check["held"] for check in said["checks"]] == [False, True]
    assert said["checks"][0]["detail"] == "3.0 of 2.0 MB"
    rows = [["slots", 2, 3, 1.5], ["the KV cache", 2, 2, 1], ["jobs", 5, None, None]]
    assert said["tables"][1]["rows"] == rows


def test_without_a_gpu_it_says_so_and_what_to_carry_to_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"There is no GPU here that can be used: torch {torch.__version__}" in said
    assert "--bundle" in said
    assert "torch 2.9 or newer" in said
    assert not (tmp_path / "gpu-check.json").exists()


def test_where_the_machine_cannot_be_looked_at_it_does_not_say_that_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "Traceback\nModuleNotFoundError: No module named 'msgspec'"
    failed: dict[str, Any] = {"state": "failed", "error": "its process ended with exit status 1", "log": log}
    monkeypatch.setattr(gpu_check, "run_parts", lambda *given: [failed])
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "could not be seen: ModuleNotFoundError: No module named 'msgspec'" in said
    assert "There is no GPU" not in said


def test_a_compiler_is_one_that_triton_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def add(name: str) -> None:
        (tmp_path / name).touch(0o755)

    add("cc")
    assert gpu_machine.compiler() is None
    monkeypatch.setenv("CC", "cc")
    assert gpu_machine.compiler() == str(tmp_path / "cc")
    monkeypatch.setenv("CC", "icc")
    assert gpu_machine.compiler() is None
    monkeypatch.delenv("CC")
    add("clang")
    assert gpu_machine.compiler() == str(tmp_path / "clang")


def limits_of(monkeypatch: pytest.MonkeyPatch, spent: dict[str, float]) -> dict[str, float]:
    """The limits that parts get, filled as they run, if each takes the seconds of `spent`, or none."""
    limits: dict[str, float] = {}
    clock = [0.0]
    checks = [{"name": "it holds", "held": True, "detail": ""}]
    done = {"state": "ok", "error": "", "figures": [], "checks": checks, "tables": [], "seconds": 0.0}

    def run_part(
        part: gpu_check.Part, setup: Any, environment: Any, seconds: float, note: Any
    ) -> dict[str, Any]:
        limits[part.name] = seconds
        clock[0] += spent.get(part.name, 0.0)
        facts = {"facts": {"GPU": "one"}} if part is gpu_check.MACHINE else {}
        return {"part": part.name, "title": part.title, **done, **facts}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])
    return limits


def test_the_parts_of_a_command_fit_into_ten_minutes_and_later_ones_get_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in gpu_check.COMMANDS:
        parts = [part.seconds for part in gpu_check.PARTS if part.command == command]
        assert sum(parts) + gpu_check.MACHINE.seconds <= 60 * gpu_check.MINUTES <= 580
    seconds = {part.name: part.seconds for part in gpu_check.PARTS}
    limits = limits_of(monkeypatch, seconds | {"forms": 10.0})
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert list(limits) == ["machine", *(part.name for part in gpu_check.PARTS if part.command == 1)]
    assert all(limits[name] >= seconds[name] for name in limits if name != "machine")
    assert limits["bits"] == 2 * seconds["bits"] <= seconds["bits"] + seconds["forms"] - 10


def test_where_time_is_short_the_last_parts_are_left_out_and_not_all_of_them_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {part.name: part.seconds for part in gpu_check.PARTS}
    limits = limits_of(monkeypatch, {**seconds, "machine": 40.0})
    assert gpu_check.main(["--output", str(tmp_path), "--minutes", "4"]) == 1
    assert [name for name in limits if name != "machine"] == ["forms", "bits", "kernels"]
    assert limits["forms"] == seconds["forms"]
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    states = {part["part"]: part["state"] for part in report["parts"]}
    assert (states["kernels"], states["engine"]) == ("ok", "not run")
    assert "engine      not run" in capsys.readouterr().out


def test_a_second_command_adds_to_the_report_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_of(monkeypatch, {})
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert gpu_check.main(["--output", str(tmp_path), "--command", "2"]) == 0
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {part["part"] for part in report["parts"]} == {"machine", *(part.name for part in gpu_check.PARTS)}


def test_short_calls_are_timed_many_in_a_row_without_what_a_graph_takes_to_begin_and_the_wipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a GPU on which a graph takes 5 us to begin, a wipe 30 and a call 3."""
    ran: list[str] = []

    def median(watch: gpu_kernels.Stopwatch, run: Any) -> float:
        ran.clear()
        run()
        return 5.0 + 30.0 * ran.count("wipe") + 3.0 * ran.count("call")

    monkeypatch.setattr(gpu_kernels.Stopwatch, "_median", median)
    monkeypatch.setattr(gpu_kernels.Stopwatch, "_graph", lambda watch, call: call)
    monkeypatch.setattr(gpu_kernels.Stopwatch, "_wipe", lambda watch: ran.append("wipe"))
    watch = gpu_kernels.Stopwatch(Setup("cpu", "tiny", tmp_path), Findings(tmp_path / "findings.json"))
    assert watch._in_a_row(lambda: ran.append("call"), alone=8.0) == 3.0
    assert watch._in_a_row(lambda: None, alone=8.0) == 8.0, "too short to tell"


def test_sums_with_other_bits_are_counted_measured_and_placed() -> None:
    one = torch.tensor([[1.0, -1.0], [0.0, 3.0]])
    assert gpu_forms.difference(one, one.clone()) == (0, 0, "")
    other = torch.nextafter(one, torch.tensor(9.0))
    other[0] = one[0]
    other[1, 1] = torch.nextafter(other[1, 1], torch.tensor(9.0))
    assert gpu_forms.difference(other, one) == (2, 2, "1, 0")


def test_a_row_with_other_bits_in_company_is_traced_to_the_first_module_that_gives_them(
    tmp_path: Path,
) -> None:
    setup = Setup("cpu", "tiny", tmp_path)
    running = gpu_parts.make_engine(setup, gpu_parts.new_base(setup), None, blocks=RESERVED_BLOCKS + 40)
    output = running.model._view.model.layers[0].self_attn.o_proj
    asked = [gpu_parts.Asked(name, gpu_parts.words(setup, 5, seed), 3) for seed, name in enumerate("ab")]
    ways = (running, [asked]), (running, [[one] for one in asked])
    found = Findings(tmp_path / "findings.json")
    gpu_invariance.trace(found, "alone", "a", *ways)
    # As if more rows than one prompt's had another form of a kernel; decodes of both have the usual one.
    output.register_forward_hook(lambda module, given, rows: rows * (1 + (rows.shape[-2] > 5)))
    gpu_invariance.trace(found, "alone, again", "b", *ways)
    usual, wrong = (one["value"] for one in json.loads((tmp_path / "findings.json").read_text())["figures"])
    assert usual == "none, launched kernel by kernel"
    assert wrong == "model.layers.0.self_attn.o_proj, of row b at token 0, in steps of 10 and 5 rows"


def test_gaps_between_kernels_are_those_in_which_none_of_them_runs() -> None:
    assert gpu_parts._gaps([(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (2.0, 3.0), (6.5, 7.0)]) == [2.0, 0.5]
    assert gpu_parts._gaps([]) == []


DRIVER = """
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
typedef struct { int type, id; } place;
typedef struct { int type, handles; place at; void *data; unsigned char flags[8]; } properties;
typedef struct { place at; int flags; } access_of;
static int flags;
int cuInit(unsigned none) { return none; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return device != 3; }
int cuCtxSetCurrent(void *context) { return !context; }
int cuCtxSynchronize(void) { return 0; }
int cuGetErrorName(int code, const char **name) {
    *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "?";
    return 0;
}
int cuMemGetAllocationGranularity(size_t *size, properties *how, int option) {
    *size = 1 << 16;
    return option;
}
int cuMemCreate(uint64_t *handle, size_t size, properties *how, uint64_t none) {
    if (how->type != 1 || how->handles != 1 || how->at.type != 1 || how->at.id != 3 || none) return 1;
    *handle = memfd_create("memory", 0);
    return ftruncate(*handle, size);
}
int cuMemExportToShareableHandle(int *fd, uint64_t handle, int type, uint64_t none) {
    *fd = dup(handle);
    return type != 1 || none;
}
int cuMemImportFromShareableHandle(uint64_t *handle, void *fd, int type) {
    *handle = (intptr_t)fd;
    return type != 1;
}
int cuMemAddressReserve(uint64_t *address, size_t size, size_t align, uint64_t at, uint64_t none) {
    *address = (uint64_t)mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return align || at || none;
}
int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t none) {
    void *where = (void *)address;
    return mmap(where, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, handle, offset) != where || none;
}
int cuMemSetAccess(uint64_t address, size_t size, access_of *how, size_t count) {
    flags = how->flags;
    return how->at.type != 1 || how->at.id != 3 || count != 1;
}
int cuMemsetD32_v2(uint64_t address, unsigned word, size_t count) {
    if (KEEPS && flags != 3) return 700;
    for (size_t i = 0; i < count; i++) ((unsigned *)address)[i] = word;
    return 0;
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { memcpy(to, (void *)from, size); return 0; }
typedef struct { size_t count; int *kinds; } graph;
int cuGraphGetNodes(graph *one, void **nodes, size_t *count) {
    if (!one->kinds || (nodes && *count != one->count)) return 400;
    for (size_t i = 0; nodes && i < one->count; i++) nodes[i] = one->kinds + i;
    *count = one->count;
    return 0;
}
int cuGraphNodeGetType(int *node, int *kind) { *kind = *node; return 0; }
"""
"""CUDA's driver for memory and graphs, on the CPU. KEEPS: whether it keeps writes out of what is mapped to be
read."""


def driver_library(folder: Path, *, keeps: bool = True) -> Path:
    """The driver as a library, compiled."""
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    compiler = gpu_machine.compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    command = [compiler, "-shared", "-fPIC", f"-DKEEPS={int(keeps)}", source, "-o", library]
    subprocess.run(command, check=True, timeout=600)
    return library


class Graph(ctypes.Structure):
    """A graph of that driver."""

    _fields_ = (("count", ctypes.c_size_t), ("kinds", ctypes.c_void_p))


def test_nodes_of_a_captured_graph_are_counted_by_kind(tmp_path: Path) -> None:
    library = str(driver_library(tmp_path))
    kinds = (ctypes.c_int * 6)(0, 0, 1, 2, 0, 77)
    graph = Graph(len(kinds), ctypes.addressof(kinds))
    found = gpu_parts.node_kinds(ctypes.addressof(graph), library)
    assert found == {"kernel": 3, "copy": 1, "fill": 1, "kind 77": 1}
    with pytest.raises(RuntimeError, match="cuGraphGetNodes: error 400"):
        gpu_parts.node_kinds(ctypes.addressof(Graph(1, None)), library)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_write_to_memory_that_another_process_has_mapped_to_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    library = driver_library(tmp_path, keeps=keeps)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    said, kept = gpu_processes.write_to_read_only(str(library), 3)
    assert kept is keeps
    assert said == ("cuMemsetD32_v2: CUDA_ERROR_ILLEGAL_ADDRESS (700)" if keeps else "it may write")


def test_a_process_that_does_not_come_to_its_write_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = MagicMock()
    driver.return_value.create.return_value = 1, 4
    driver.return_value.export_file.side_effect = lambda handle: os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(gpu_processes, "Driver", driver)
    for said, code in (("", 1), ("another line", 0)):
        done = subprocess.CompletedProcess([], code, said, "a traceback")
        monkeypatch.setattr(subprocess, "run", lambda *given, done=done, **named: done)
        with pytest.raises(RuntimeError, match=f"exit status {code}: {said or 'a traceback'}"):
            gpu_processes.write_to_read_only()


def test_kernels_that_are_launched_before_an_error_are_named() -> None:
    """By the hook that Triton calls at each launch."""
    last = LastLaunches(2)
    hooks = triton.knobs.runtime.launch_enter_hook
    last.watch()
    try:
        for name in ("_norm", "_products", "_finish"):
            hooks(LazyDict({"name": name}))
    finally:
        hooks.remove(last.note)
    assert list(last.names) == ["_products", "_finish"]


@pytest.mark.parametrize("options", [["--only", "kernels,graphs"], ["--device", "cpu", "--shape", "8b"]])
def test_what_cannot_be_asked_for_is_refused_at_once(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([*options, "--output", str(tmp_path)])
    assert "choose from machine, forms" in (said := capsys.readouterr().err) or "days" in said


@pytest.mark.full
def test_the_whole_schedule_is_rehearsed_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ten times the limits, since other tests run beside it."""
    parts = tuple(replace(part, seconds=10 * part.seconds) for part in gpu_check.PARTS)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(
        gpu_check, "MACHINE", replace(gpu_check.MACHINE, seconds=10 * gpu_check.MACHINE.seconds)
    )
    monkeypatch.setattr(gpu_check, "MINUTES", 10 * gpu_check.MINUTES)
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path)]) == 0
    assert not (tmp_path / "gpu-check.json").exists()
    report = json.loads((tmp_path / "gpu-check-rehearsal.json").read_text())
    assert (report["format"], report["ok"], report["shape"]) == (2, True, "tiny")
    assert [part["part"] for part in report["parts"]] == ["machine", *(part.name for part in gpu_check.PARTS)]
    assert report["machine"]["torch"] == torch.__version__
    for part in report["parts"]:
        assert part["state"] == ("skipped" if part["part"] in ("tests", "sanitizer") else "ok"), part
        assert all(check["held"] for check in part["checks"])
        assert part["checks"] or part["part"] in ("machine", "tests", "sanitizer")
        for table in part["tables"]:
            assert table["rows"]
            assert all(len(row) == len(table["headings"]) for row in table["rows"])
    assert "Everything that was checked holds." in (tmp_path / "gpu-check-rehearsal.md").read_text()
    with tarfile.open(tmp_path / "gpu-check-rehearsal-logs.tar.gz") as tar:
        assert {"engine/log", "forms/forms.json"} <= set(tar.getnames())
    engine = next(part for part in report["parts"] if part["part"] == "engine")
    decodes = next(table for table in engine["tables"] if table["title"].startswith("Decodes"))
    captures = next(table for table in engine["tables"] if table["title"] == "Captured passes")
    assert {row[4] for row in captures["rows"]} == {"captured"}
    assert all(" kernel" in row[5] and " operator" in row[5] for row in captures["rows"])
    memory = next(part for part in report["parts"] if part["part"] == "memory")
    sized = next(table for table in memory["tables"] if table["title"].startswith("Memory set aside"))
    assert {row[0] for row in sized["rows"]} >= {
        "the KV cache",
        "slots",
        "the largest step and captured passes",
    }
    invariance = next(part for part in report["parts"] if part["part"] == "invariance")
    assert ["ahead off", 2] in [row for table in invariance["tables"] for row in table["rows"]]
    assert {"with drafts: the same bits", "a planted fault is traced to its switch"} <= {
        check["name"] for check in invariance["checks"]
    }
    assert {(row[0], row[1]) for row in decodes["rows"]} == {
        (load, graphs) for load in (row[0] for row in decodes["rows"]) for graphs in ("on", "off")
    }


def test_an_interrupted_run_ends_at_once_and_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    limits_of(monkeypatch, {})
    whole = gpu_check.run_part

    def run_part(part: gpu_check.Part, *given: Any) -> dict[str, Any]:
        began.append(part.name)
        if part.name == "bits":
            raise SystemExit(143)
        return whole(part, *given)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    for options, name in ((["--rehearse"], "gpu-check-rehearsal"), ([], "gpu-check")):
        assert gpu_check.main([*options, "--output", str(tmp_path)]) == 1
        assert began == ["machine", "forms", "bits"]
        states = {
            one["part"]: one["state"] for one in json.loads((tmp_path / f"{name}.json").read_text())["parts"]
        }
        assert (states["forms"], states["bits"], states["engine"]) == ("ok", "not run", "not run")
        began.clear()


def test_failures_are_read_from_what_pytest_prints_file_by_file(tmp_path: Path) -> None:
    printed = """
tests/engine/test_oracle.py::test_rows[llama-nf4] PASSED                 [  2%]
tests/engine/test_oracle.py::test_text[a b] FAILED                       [  4%]
tests/adapters/test_view.py::test_a_view SKIPPED (no such thing)         [  6%]
FAILED tests/engine/test_oracle.py::test_text[a b] - assert 1 == 2
"""
    found = Findings(tmp_path / "findings.json")
    gpu_processes.tell_tests(printed.splitlines(keepends=True), found)
    told = json.loads((tmp_path / "findings.json").read_text())
    assert told["tables"][0]["rows"] == [
        ["tests/engine/test_oracle.py", 1, 0, 1],
        ["tests/adapters/test_view.py", 0, 1, 0],
    ]
    assert [check["name"] for check in told["checks"]] == ["test_oracle.py: test_text[a b]"]


# ---- what is carried -----------------------------------------------------------------------------


def test_a_bundle_holds_the_sources_and_what_is_installed_and_its_wheels_can_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, python = tmp_path / "carried.tar.gz", f"{sys.version_info.major}.{sys.version_info.minor}"
    assert gpu_bundle.write_bundle(ROOT, file, roots=("pluggy", "msgspec"), pythons=(python,)) == 0
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / gpu_bundle.FOLDER
    assert (folder / "benchmarks" / "gpu_check.py").exists()
    assert (folder / "engine" / "onebase_engine" / "kernels" / "cuda.py").exists()
    assert not (folder / "examples").exists()
    assert (folder / gpu_bundle.COMMIT).read_text()
    gpu_bundle.unpack(folder / gpu_bundle.WHEELS, tmp_path / "site")
    for name in ("pluggy", "msgspec"):
        assert (tmp_path / "site" / name / "__init__.py").exists()
        assert list((tmp_path / "site").glob(f"{name}-*.dist-info/METADATA"))
    assert "2 wheels" in capsys.readouterr().out


def test_a_bundle_says_what_it_could_not_get_and_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bundle, "_fetch", lambda *asked: False)
    file = tmp_path / "carried.tar.gz"
    roots = ("msgspec", "no-such-distribution")
    assert gpu_bundle.write_bundle(ROOT, file, roots=roots, pythons=("3.99",)) == 1
    said = capsys.readouterr().out
    assert "Could not be had: no-such-distribution, which is not installed here" in said
    assert "for Python 3.99 on Linux, x86-64" in said
    monkeypatch.setattr(gpu_bundle, "_sources", lambda root: iter(["pyproject.toml"]))
    monkeypatch.setattr(gpu_bundle, "LIMIT", 10_000)
    assert gpu_bundle.write_bundle(ROOT, file, roots=("pluggy",), pythons=()) == 1
    assert "It must have this too, which did not fit into 0 MiB: pluggy-" in capsys.readouterr().out
    assert file.stat().st_size <= 10_000


def test_a_bundle_for_one_machine_leaves_out_what_it_has_and_other_versions_of_cuda(tmp_path: Path) -> None:
    there = gpu_bundle.installed(
        "msgspec==0.0.1\nPluggy==" + metadata.version("pluggy") + "+cu130\nnumpy==2.0.0\n\n"
    )
    assert there == {"msgspec": "0.0.1", "pluggy": metadata.version("pluggy"), "numpy": "2.0.0"}
    file, python = tmp_path / "carried.tar.gz", f"{sys.version_info.major}.{sys.version_info.minor}"
    given = {"roots": ("pluggy", "msgspec"), "pythons": (python,), "there": there}
    assert gpu_bundle.write_bundle(ROOT, file, **given) == 0
    with tarfile.open(file) as tar:
        wheels = [name.rpartition("/")[2] for name in tar.getnames() if name.endswith(".whl")]
    assert [name.partition("-")[0] for name in wheels] == ["msgspec"]
    left_out = gpu_bundle.useless("130")
    names = [
        f"bitsandbytes/libbitsandbytes_{one}.so"
        for one in ("cuda128", "cuda130", "cuda1301", "rocm72", "cpu")
    ]
    assert [name for name in names if not left_out.search(name)] == [names[1], names[4]]


@pytest.mark.parametrize(
    ("tag", "python", "fitting"),
    [
        ("py3-none-any", (3, 12), True),
        ("py2.py3-none-any", (3, 12), True),
        ("cp312-cp312-manylinux_2_28_x86_64", (3, 12), True),
        ("cp312-cp312-manylinux_2_28_x86_64", (3, 13), False),
        ("cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64", (3, 13), True),
        ("cp313-abi3-manylinux_2_17_x86_64", (3, 12), False),
    ],
)
def test_wheels_are_unpacked_for_the_python_that_they_are_for(
    tag: str, python: tuple[int, int], fitting: bool
) -> None:
    assert gpu_bundle.fits(tag, python) is fitting


def test_libraries_of_bitsandbytes_that_no_supported_torch_takes_are_left_out() -> None:
    kept = [
        name
        for name in ("cuda118", "cuda121", "cuda126", "cuda128", "cuda130", "rocm72", "xpu2025", "cpu")
        if not gpu_bundle.USELESS.search(f"bitsandbytes/libbitsandbytes_{name}.so")
    ]
    assert kept == ["cuda126", "cuda128", "cuda130", "cpu"]


def test_what_a_wheel_keeps_apart_goes_where_it_is_imported(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing-1.data/purelib/thing.py", "")
        wheel.writestr("thing-1.data/scripts/thing", "")
        wheel.writestr("thing-1.dist-info/METADATA", "Name: thing\n")
    gpu_bundle.unpack(wheels, tmp_path / "site")
    found = {os.path.relpath(one, tmp_path / "site") for one in (tmp_path / "site").rglob("*")}
    assert {"thing.py", "thing-1.dist-info/METADATA"} <= found
    assert not any("scripts" in one for one in found)
