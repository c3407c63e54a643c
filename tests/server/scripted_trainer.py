"""A trainer process that speaks the real protocol and trains nothing, in a moment or not at all.

It stands in for the trainer where a fault cannot be had from the real one at a given step. Run as
`python scripted_trainer.py --fd N [--base-fd N --busy-fd N]`. What it does is in the training file, a word or
several:

    (anything)      ten steps of 20 ms, a checkpoint after every fifth, then an adapter
    broken          the check finds two bad lines
    long            a hundred steps
    slow            three thousand steps, so that it never ends by itself in a test
    dies-at-7       is killed after that step, each time it gets there
    dies-at-7-once  only when it has not gone on from a checkpoint
    dies-checking   is killed while it checks the file
    dies-checking-twice  only the first two times
    checked-after=F waits with the check until the file F is there
    full            says that the disk is full at step 3, once
    worse           the report says that the adapter is no better
    worse-than-active  it says so of the active version alone
    not-comparable  the active version cannot be measured
    regresses       the report says that a slice got worse by more than the job allows
    broken-adapter  the verifier refuses what comes out
    deaf            does not heed Stop
    finishes        when it is to pause, it finishes
    dies-ending-once  is killed when it is to end early, if it was not told so from the start
    gated           waits at the real gate before each step
    stands-at-7     stands still after that step, unless it has gone on from a checkpoint
    until-full      saves after step 5 until the disk is full, unless it has gone on from a checkpoint
    until-paused    waits after step 5 until it is to stop, unless it has gone on from a checkpoint
    until=F         waits after step 5 until the file F is there, whatever it is told meanwhile
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from onebase_engine.engine.messages import FrameReader, encode
from onebase_server.processes.time_share import BusyFlag, SharedGate
from onebase_server.processes.trainer_protocol import (
    Active,
    Check,
    EndAfter,
    Failed,
    FileProblem,
    FilesChecked,
    FindActive,
    FromTrainer,
    RunEvent,
    Stop,
    Stopped,
    Train,
    Trained,
    to_trainer_decoder,
)
from onebase_training import events

STEP_SECONDS = 0.02
SAVE_EVERY = 5
CONFIG = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'


class ScriptedTrainer:
    """One job, or the check of one."""

    def __init__(self, connection: socket.socket, busy_fd: int) -> None:
        self.connection = connection
        self.busy_fd = busy_fd
        self.frames, self.decoder = FrameReader(), to_trainer_decoder()
        self.selector = selectors.DefaultSelector()
        self.selector.register(connection, selectors.EVENT_READ)
        self.stop: Stop | None = None
        self.last_step: int | None = None
        self.active: Active | None = None

    def send(self, message: FromTrainer) -> None:
        self.connection.sendall(encode(message))

    def say(self, event: events.AnyEvent) -> None:
        self.send(RunEvent(event))

    def messages(self, seconds: float | None) -> list[object]:
        """What has come; waits so long for the first."""
        if not self.selector.select(seconds):
            return []
        data = self.connection.recv(1 << 16)
        if not data:
            os._exit(0)
        return [self.decoder.decode(payload) for payload in self.frames.feed(data)]

    def run(self) -> None:
        first: list[object] = []
        while not first:
            first = self.messages(None)
        # A job that is paused at once is told so in the same breath.
        self.stop = next((message for message in first[1:] if isinstance(message, Stop)), None)
        if isinstance(first[0], Check):
            self.check(first[0])
        elif isinstance(first[0], Train):
            self.train(first[0])

    def check(self, message: Check) -> None:
        words = Path(message.job.train).read_text().split()
        self.say(events.Phase(at=time.time(), name="validating_files"))
        self.wait_for_file("checked-after", words)
        if "dies-checking" in words or ("dies-checking-twice" in words and self.checks(message) <= 2):
            os.kill(os.getpid(), signal.SIGKILL)
        if "broken" in words:
            problems = [FileProblem(line, "messages", f"line {line} is bad") for line in (1, 3)]
            self.send(
                Failed(
                    code="invalid_file",
                    message="2 problems",
                    param="training_file",
                    problems=problems,
                    problem_count=2,
                )
            )
            return
        self.say(events.DataChecked(at=time.time(), report={"rows": len(words)}))
        recipe = {**message.job.recipe, "epochs": 3.0, "batch_size": 4, "learning_rate_multiplier": 1.0}
        self.send(FilesChecked({"recipe": recipe, "estimate": {"total": 1}, "steps": steps_of(words)}))

    def checks(self, message: Check) -> int:
        """How often the file has been checked, with this time."""
        counter = Path(message.job.folder) / "checks"
        counter.parent.mkdir(parents=True, exist_ok=True)
        with counter.open("a") as file:
            file.write("x")
        return counter.stat().st_size

    def train(self, message: Train) -> None:
        folder = Path(message.job.folder)
        words = Path(message.job.train).read_text().split()
        steps = steps_of(words)
        first = max((int(path.name) for path in (folder / "checkpoints").glob("*")), default=0)
        self.say(events.Planned(at=time.time(), recipe={}, estimate={}, steps=steps, first_step=first))
        gate = self.gate(message.share)
        self.last_step = message.job.last_step
        step = first
        while step < steps and not self.ends_at(step):
            step += 1
            if "gated" in words:
                gate.wait()
            self.step(step, steps)
            self.faults(words, folder, step, first)
            while f"stands-at-{step}" in words and not first and self.stop is None:
                self.heed(None)
            while "until-paused" in words and step == 5 and not first and self.stop is None:
                self.heed(None)
            if step == 5:
                self.wait_for_file("until", words)
            while "until-full" in words and step == 5 and not first:
                self.save(folder, step)
                self.heed(STEP_SECONDS)
            if self.stop is not None and "finishes" in words:
                break
            if self.stop is not None and "deaf" not in words:
                if self.stop.reason == "pause":
                    self.save(folder, step)
                self.send(Stopped(self.stop.reason))
                return
            if step % SAVE_EVERY == 0:
                self.save(folder, step)
            if self.last_step != message.job.last_step and "dies-ending-once" in words:
                os.kill(os.getpid(), signal.SIGKILL)
        self.finish(message, words, step)

    def ends_at(self, step: int) -> bool:
        return self.last_step is not None and step >= max(1, self.last_step)

    def gate(self, share: float) -> SharedGate:
        flag = BusyFlag(self.busy_fd)
        return SharedGate(lambda: bool(flag), share, lambda: None)

    def heed(self, seconds: float | None) -> None:
        for message in self.messages(seconds):
            if isinstance(message, Stop):
                self.stop = message
            elif isinstance(message, EndAfter):
                self.last_step = message.step
            elif isinstance(message, Active):
                self.active = message

    def wait_for_file(self, name: str, words: list[str]) -> None:
        """Wait for the file that the word `name=FILE` names, if there is such a word."""
        for word in words:
            wanted, _, file = word.partition("=")
            while wanted == name and not Path(file).exists():
                self.heed(STEP_SECONDS)

    def step(self, step: int, steps: int) -> None:
        self.heed(STEP_SECONDS)
        loss = 1.0 / step
        self.say(
            events.StepDone(
                at=time.time(), step=step, steps=steps, epoch=step / steps, loss=loss, learning_rate=1e-3,
                grad_norm=1.0, tokens=64, total_tokens=64 * step, tokens_per_second=3200.0,
                seconds_left=(steps - step) * STEP_SECONDS, memory_bytes=1,
            )
        )  # fmt: skip

    def faults(self, words: list[str], folder: Path, step: int, first: int) -> None:
        for word in words:
            found = re.fullmatch(r"dies-at-(\d+)(-once)?", word)
            if found and int(found[1]) == step and not (found[2] and first):
                os.kill(os.getpid(), signal.SIGKILL)
        marker = folder / "was-full"
        if "full" in words and step == 3 and not marker.exists():
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
            self.send(Failed(code="disk_full", message="The server's disk is full."))
            sys.exit(0)

    def save(self, folder: Path, step: int) -> None:
        checkpoint = folder / "checkpoints" / str(step)
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "new").write_bytes(bytes(100_000))
            (checkpoint / "new").replace(checkpoint / "weights")
            (checkpoint / "adapter").mkdir(exist_ok=True)
            (checkpoint / "adapter" / "adapter_config.json").write_text(CONFIG)
            (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(f"{folder}{step}".encode())
        except OSError as error:
            self.send(Failed(code="disk_full", message=str(error)))
            sys.exit(0)
        self.say(events.Saved(at=time.time(), step=step, path=f"checkpoints/{step}", loss=None))

    def finish(self, message: Train, words: list[str], steps: int) -> None:
        adapter = Path(message.job.folder) / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(CONFIG)
        self.send(FindActive())
        while self.active is None:
            self.heed(None)
        start = b"broken " if "broken-adapter" in words else b""
        (adapter / "adapter_model.safetensors").write_bytes(start + message.job.id.encode())
        report: dict[str, Any] = {
            "name": message.job.name, "base": "b", "quantization": "none", "steps": steps, "best_step": steps,
            "tokens": 640, "seconds": 1.0, "parameters": 64, "adapter_bytes": 64,
            "loss_before": 2.0, "loss_after": 1.0, "metrics_before": {}, "metrics_after": {},
            "better": "worse" not in words, "better_than": {"base": "worse" not in words},
            "losses": [[1, 1.0], [2, 0.5]], "held_out": [[0, 2.0], [2, 1.0]],
            "recipe": {}, "peak_memory_bytes": 1,
        }  # fmt: skip
        if self.active.digest:
            better = None if "not-comparable" in words else not {"worse", "worse-than-active"} & {*words}
            report["better_than"] |= {"active": better}
            report |= {"active": self.active.digest, "better": better}
            found = {"loss_active": 1.2 if better else 0.8, "metrics_active": {}}
            report |= {"not_compared": "its labels are others: a, b"} if better is None else found
        if "scored" in words:
            rows = [{"slice": "de", "rows": 400, "sum": 40.0, "squares": 40.0}]
            report["paired"] = {"base": {"exact_match": rows}}
            if self.active.digest:
                report["paired"]["active"] = {"exact_match": rows}
        if "regresses" in words:
            one = {"slice": "de", "rows": 12, "measured": 12, "before": 1.0, "active": None, "after": 1.5,
                   "worse_by": 0.5, "regressed": True, "regressed_against": ["base"], "loss_before": 1.0,
                   "loss_active": None, "loss_after": 1.5, "metrics_before": {}, "metrics_active": {},
                   "metrics_after": {}}  # fmt: skip
            report["slices"] = {
                "by": "loss", "against": "base", "slices": [one], "slice_count": 1, "regressed": ["de"],
                "changed": [], "changed_count": 0,
            }  # fmt: skip
        self.send(Trained(report))


def steps_of(words: list[str]) -> int:
    return 3000 if "slow" in words else 100 if "long" in words else 10


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    for option in ("--fd", "--base-fd", "--busy-fd"):
        arguments.add_argument(option, type=int, default=-1)
    options = arguments.parse_args()
    ScriptedTrainer(socket.socket(fileno=options.fd), options.busy_fd).run()
