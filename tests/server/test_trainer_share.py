"""The gate between training and serving: how much of the time a job computes, and how soon it stops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from onebase_engine.machine import niceness_for
from onebase_server.processes.time_share import NAP_SECONDS, BusyFlag, SharedGate, device_gate
from onebase_training.events import Interrupted, Reason


class Clock:
    """Time that passes only when somebody computes or sleeps."""

    def __init__(self) -> None:
        self.now = self.slept = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.on_sleep()

    def gate(
        self,
        share: float,
        busy: Callable[[], bool] = lambda: True,
        stopping: Callable[[], Reason | None] = lambda: None,
    ) -> SharedGate:
        return SharedGate(busy, share, stopping, clock=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_while_rows_run_a_job_computes_its_share_of_the_time(share: float) -> None:
    clock = Clock()
    gate = clock.gate(share)
    computed = 0.0
    for number in range(100):
        seconds = 0.001 * (1 + number % 7)
        clock.now += seconds
        computed += seconds
        gate.wait()
    assert computed / clock.now == pytest.approx(share)


def test_on_an_idle_server_it_takes_all_and_pays_for_nothing_later() -> None:
    clock = Clock()
    rows = [False]
    gate = clock.gate(0.2, busy=lambda: rows[0])
    for _ in range(50):
        clock.now += 1.0
        gate.wait()
    assert clock.slept == 0.0
    rows[0] = True
    clock.now += 0.01
    gate.wait()
    assert clock.slept == pytest.approx(0.04)


def test_a_pause_ends_with_the_rows() -> None:
    clock = Clock()
    rows = [True]
    gate = clock.gate(0.0, busy=lambda: rows[0])

    def end_of_rows() -> None:
        rows[0] = clock.slept < 1.0

    clock.on_sleep = end_of_rows
    gate.wait()
    assert 1.0 <= clock.slept <= 1.0 + 2 * NAP_SECONDS


def test_a_share_of_one_never_waits() -> None:
    clock = Clock()
    gate = clock.gate(1.0)
    clock.now += 5.0
    gate.wait()
    assert clock.slept == 0.0


LINUX_WEIGHTS = (
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137, 110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)  # fmt: skip
"""Linux's `sched_prio_to_weight` for niceness 0 to 19: processes that want one core share it by them."""


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_job_on_a_cpu_has_the_niceness_with_which_the_system_gives_it_its_share(share: float) -> None:
    weight = LINUX_WEIGHTS[niceness_for(share)]
    assert weight / (weight + LINUX_WEIGHTS[0]) == pytest.approx(share, rel=0.12)


def test_niceness_is_that_of_a_half_for_more_and_the_greatest_for_next_to_nothing() -> None:
    assert [niceness_for(share) for share in (0.0, 0.001, 0.5, 0.9, 1.0)] == [19, 19, 0, 0, 0]


@pytest.mark.parametrize(("share", "waits"), [(0.0, True), (0.2, False)])
def test_on_a_cpu_a_job_waits_for_the_rows_only_if_it_gets_no_time_beside_them(
    share: float, waits: bool
) -> None:
    flag, asked = BusyFlag.make(), 0
    flag.set(True)

    def stopping() -> Reason | None:
        nonlocal asked
        asked += 1
        return "pause" if asked > 3 else None

    gate = device_gate(torch.device("cpu"), flag, share, stopping)
    if waits:
        with pytest.raises(Interrupted):
            gate.wait()
    else:
        gate.wait()
        assert asked == 1


@pytest.mark.parametrize("reason", ["pause", "cancel"])
def test_a_job_that_is_to_stop_does_so_at_the_next_layer_and_also_while_it_waits(reason: Reason) -> None:
    clock = Clock()
    asked: list[Reason] = []
    gate = clock.gate(0.0, stopping=lambda: asked[0] if asked else None)
    clock.on_sleep = lambda: asked.append(reason) if clock.slept > 0.5 else None
    with pytest.raises(Interrupted) as first:
        gate.wait()
    assert first.value.reason == reason
    assert clock.slept == pytest.approx(0.5, abs=2 * NAP_SECONDS)
    with pytest.raises(Interrupted):
        gate.wait()


def test_the_flag_is_seen_by_another_process_without_a_message() -> None:
    flag = BusyFlag.make()
    program = (
        "import sys; from onebase_server.processes.time_share import BusyFlag\n"
        "flag = BusyFlag(int(sys.argv[1]))\n"
        "for line in sys.stdin: print(bool(flag), flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(flag.fd)],
        pass_fds=[flag.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    seen = []
    for busy in (False, True, False):
        flag.set(busy)
        child.stdin.write("look\n")
        child.stdin.flush()
        seen.append(child.stdout.readline().strip())
    child.communicate()
    assert seen == ["False", "True", "False"]
