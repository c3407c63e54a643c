"""A trainer's place: what it may take, and what its failures are called."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.priorities import assert_behind
from tests.tiny import save_base
from transformers import LlamaConfig

from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import BaseSettings, load_config
from onebase_engine.engine.messages import EngineConfig, to_api_decoder
from onebase_server.processes import child
from onebase_server.processes.job_memory import job_bytes
from onebase_server.processes.link import ChildProcess
from onebase_server.processes.live import ModelMemory
from onebase_server.processes.trainer import failure_of, memory_limit
from onebase_server.processes.trainer_client import TrainerClient
from onebase_server.processes.trainer_protocol import Check, Train, TrainJob
from onebase_training.data.dataset import DataError, Problem
from onebase_training.data.reader import load_dataset
from onebase_training.loop import TrainingDivergedError
from onebase_training.recipe import Recipe, RecipeError
from onebase_training.run import load_tokenizer

GREEDY = """
import sys, torch
from onebase_server.processes.trainer import bound_memory, failure_of, private_bytes
from onebase_server.processes.trainer_protocol import TrainJob
job = TrainJob(id="j", name="n", recipe={}, train="", train_name="a", held_out=None, held_out_name=None,
               folder="/tmp", base_name="b", memory_limit=0)
torch.ones(100, 100) @ torch.ones(100, 100)
bound_memory(200_000_000, torch.device("cpu"))
kept = [torch.ones(10_000_000) for _ in range(4)]
try:
    while True:
        kept.append(torch.ones(10_000_000) if sys.argv[1] == "torch" else bytearray(40_000_000))
except (RuntimeError, MemoryError) as error:
    taken = sum(item.numel() * 4 if hasattr(item, "numel") else len(item) for item in kept)
    print(failure_of(error, job, limit=200_000_000).code, taken <= 200_000_000)
"""
HIGHER = """
import torch
from onebase_server.processes.trainer import bound_memory
cpu = torch.device("cpu")
uncounted = bound_memory(200_000_000, cpu)
try:
    torch.ones(100_000_000)
except RuntimeError:
    bound_memory(600_000_000, cpu, uncounted)
    print(torch.ones(100_000_000).sum().item())
"""
THREADS = """
import torch
from onebase_server.processes.trainer import bound_memory
torch.set_num_threads(8)
bound_memory(20_000_000, torch.device("cpu"))
print(torch.ones(1 << 20).add_(1.0).sum().item())
"""

CHILDREN = """
import pathlib, signal, subprocess, sys, threading
from onebase_server.processes.link import kill_children
started, ending = threading.Event(), threading.Event()
children = []
def start():
    children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
    started.set()
    ending.wait()
thread = threading.Thread(target=start)
thread.start()
started.wait()
own, read = f"/{thread.native_id}/", pathlib.Path.read_text
def reading(path, *given):
    if own in str(path) and not ending.is_set():
        ending.set()
        thread.join()
    return read(path, *given)
pathlib.Path.read_text = reading
killed = kill_children()
children[0].kill()
print(killed == [children[0].pid], children[0].wait() == -signal.SIGKILL)
"""


def run(program: str, *arguments: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def job(**changes: str) -> TrainJob:
    facts = {"folder": "/tmp", "train_name": "a.jsonl", "held_out_name": "b.jsonl", **changes}
    return TrainJob(
        id="ftjob-1", name="n", recipe={}, train="/files/1", held_out="/files/2", base_name="b",
        memory_limit=0, **facts,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_a_process_that_takes_more_than_it_may_fails_alone_and_says_so(kind: str) -> None:
    assert run(GREEDY, kind) == ["out_of_memory", "True"]


def test_a_limit_of_memory_is_replaced_by_a_higher_one() -> None:
    assert run(HIGHER) == ["100000000.0"]


def test_threads_of_the_processor_are_not_counted_as_what_a_job_takes() -> None:
    assert run(THREADS) == ["2097152.0"]


def test_the_processes_of_a_thread_that_ends_while_they_are_looked_for_are_killed_too() -> None:
    assert run(CHILDREN) == ["True", "True"]


def test_on_a_gpu_a_job_takes_what_was_left_free_for_it_however_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(base_folder=str(save_base("llama", tmp_path)))
    own = job_bytes(load_config(tmp_path), config)
    for free in (800, 10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert memory_limit(0, torch.device("cuda"), config) == own > 700_000_000
        assert memory_limit(7, torch.device("cuda"), config) == 7


def test_on_a_gpu_where_nothing_is_set_aside_for_jobs_one_takes_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(base_folder=str(save_base("llama", tmp_path)), kv_memory=1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 10**12))
    assert memory_limit(0, torch.device("cuda"), config) == 400
    assert memory_limit(7, torch.device("cuda"), config) == 7


@pytest.mark.parametrize(("asked", "kv_memory"), [(0, 1000), (7, 1000), (0, 0)])
def test_on_a_gpu_live_models_may_take_half_of_what_is_free_now_unless_their_part_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, kv_memory: int
) -> None:
    free, reserved, bounds, device = [800], [0], list[float](), torch.device("cuda")
    total = SimpleNamespace(total_memory=10**12)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: bounds.append(part * 10**12)
    )
    config = EngineConfig(base_folder=str(save_base("llama", tmp_path)), kv_memory=kv_memory)
    memory = ModelMemory(asked, device, config)
    found = [memory.limit, memory.find()]
    for free[0], reserved[0] in ((500, 300), (1000, 300), (100, 300), (400, 0)):
        found.append(memory.find())
    first = memory_limit(asked, device, config)
    if asked or not kv_memory:
        assert found == [first] * 6
        assert bounds == pytest.approx([first])
    else:
        assert found == [400, 400, 400, 650, 375, 200]  # with 300 taken no less than 300 / 0.8
        assert bounds == pytest.approx([400, 650, 375, 200])


def test_products_of_fp32_are_exact_in_every_process_whatever_an_image_asks_for() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does
    try:
        child._set_up_libraries()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_left_free_for_a_job_of_an_8b_is_some_gigabytes() -> None:
    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    assert 2e9 < job_bytes(shape, EngineConfig(base_folder="")) < 8e9


@pytest.mark.parametrize(("share", "niceness"), [(None, 19), (0.0, 19), (0.02, 17), (0.2, 6)])
def test_a_trainer_gets_its_share_of_the_processor_and_dies_first(share: float | None, niceness: int) -> None:
    async def start_and_look() -> None:
        command = (sys.executable, "-c", "import time; time.sleep(600)")
        config = EngineConfig(base_folder="/nowhere")
        check = Check(config=config, job=job())
        message = check if share is None else Train(config=config, manifest=b"", job=job(), share=share)
        trainer = await TrainerClient.start(command, message, {}, lambda event: None)
        try:
            assert trainer.pid is not None
            assert_behind(trainer.pid, niceness)
        finally:
            trainer.kill()
            await trainer.outcome()

    asyncio.run(start_and_look())


def test_the_engine_has_the_servers_priority_and_session() -> None:
    async def start_and_look() -> None:
        command = (sys.executable, "-c", "import time; time.sleep(600)")
        engine = await ChildProcess.spawn(command, to_api_decoder(), print, lambda: None)
        try:
            assert os.getpriority(os.PRIO_PROCESS, engine.pid) == os.getpriority(os.PRIO_PROCESS, 0)
            assert os.getsid(engine.pid) == os.getsid(0)
        finally:
            await engine.end()

    asyncio.run(start_and_look())


def test_a_terminal_that_interrupts_the_server_does_not_reach_its_processes() -> None:
    """They are in the server's session, and make themselves a process group before anything else."""
    command = [sys.executable, "-m", "onebase_server.processes", "trainer", "--fd", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            while (group := os.getpgid(child.pid)) != child.pid:
                assert child.poll() is None, f"it ended in process group {group}"
                time.sleep(0.01)
        finally:
            child.kill()


def test_bad_lines_are_told_with_the_file_that_they_are_in() -> None:
    problems = [Problem(line, "messages", "is bad") for line in range(1, 31)]
    for name, param in (("a.jsonl", "training_file"), ("b.jsonl", "validation_file")):
        failed = failure_of(DataError(name, problems), job(), limit=0)
        assert (failed.code, failed.param, failed.problem_count) == ("invalid_file", param, 30)
        assert [problem.line for problem in failed.problems] == list(range(1, 31))
        assert "line 1: messages" in failed.message


def test_a_file_that_went_away_with_its_disk_is_no_bad_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as gone:
        load_dataset(tmp_path / "a.jsonl", load_tokenizer(BaseSettings(fetch_default_base())), Recipe())
    failed = failure_of(gone.value, job(), limit=0)
    assert failed.code == "store_unavailable"
    assert "cannot be read: No such file" in failed.message
    assert failed.message.endswith("Resume the job later.")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("r", "r is 0"), "invalid_value"),
        (TrainingDivergedError(3, "the loss", [4, 5]), "training_diverged"),
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EFBIG, "File too large"), "disk_full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 40 bytes"), "out_of_memory"),
        (RuntimeError("could not create a primitive"), "out_of_memory"),
        (RuntimeError("could not create a memory object"), "out_of_memory"),
        (RuntimeError("could not execute a primitive"), "out_of_memory"),
        (
            RuntimeError("could not create a primitive descriptor for the matmul primitive."),
            "trainer_failed",
        ),
        (KeyError("surprise"), "trainer_failed"),
    ],
)
def test_each_failure_has_its_code_and_says_what_happened(
    error: Exception, code: str, tmp_path: Path
) -> None:
    failed = failure_of(error, job(folder=str(tmp_path)), limit=1_000_000_000)
    assert failed.code == code
    assert failed.message
    if code == "out_of_memory":
        assert "1000 MB" in failed.message
        assert "--train-memory" in failed.message
    if code == "training_diverged":
        assert "lines 4, 5" in failed.message
