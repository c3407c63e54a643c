"""A verifier process that speaks the real protocol and proves whatever it is given, in a moment.

It stands in for the verifier beside a scripted engine, which has no base to attach. The "prepared" file is
the weights file as it came. Run as `python scripted_verifier.py BEHAVIOUR --fd N [--base-fd N]`:

    proves    everything is proved, unless its weights begin with the word `broken`; what TASKS has is no
              adapter for text, and `score 1.5` has that `weight_score`
    slow      as `proves`, after a second
    held=F    as `proves`, but no proof ends while F is there
    threaded=F  as `proves`, after a tenth of one; says that it computes with one thread. Each job adds the
        process's id to the file F
    steady=F  as `threaded`, after half a second
    lonely=F  as `threaded`, but no process attaches the base once F is there
    dies      exits at every job
    hangs     never answers a job
    unattached  cannot attach the base
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import socket
import sys
from pathlib import Path

import msgspec

from onebase_engine.engine.messages import FrameReader, Shutdown, encode
from onebase_protocol.adapters import ModuleReport, ProofReport, VersionReport
from onebase_server.processes.verifier_protocol import (
    Attach,
    Attached,
    FromVerifier,
    Merge,
    Merged,
    Prove,
    Proved,
    Rejected,
    VersionStage,
    to_verifier_decoder,
)

REPORT = VersionReport(
    kinds=("lora",), rank=8, alpha=16.0, rslora=False, targets=("q_proj",), parameters=64, bytes=256,
    base_name=None, dropped=(),
    modules=(ModuleReport(name="q_proj", kind="lora", rank=8, alpha=16.0, parameters=64, norm=1.0),),
    proof=ProofReport(
        modules_compared=1, modules_changed=1, rows=32, exact=True, modules_exact=1, largest_difference=0.0,
        texts=0, tokens_compared=0, texts_changed=0, base_unchanged=True, seconds=0.0,
    ),
)  # fmt: skip
TASKS = {b"sorts": ("SEQ_CLS", 8), b"tags": ("TOKEN_CLS", 2)}
"""By weights: the task, and as many labels as the scripted engine tells of."""


class ScriptedVerifier:
    """Answers one message after the other."""

    def __init__(self, behaviour: str, connection: socket.socket) -> None:
        self.behaviour = behaviour
        self.name, _, file = behaviour.partition("=")
        self.file = Path(file)
        self.connection = connection

    @property
    def is_threaded(self) -> bool:
        return self.name in ("threaded", "steady", "lonely")

    def send(self, message: FromVerifier) -> None:
        self.connection.sendall(encode(message))

    def run(self) -> None:
        frames, decoder = FrameReader(), to_verifier_decoder()
        while data := self.connection.recv(1 << 16):
            for payload in frames.feed(data):
                self.receive(decoder.decode(payload))

    def receive(self, message: object) -> None:
        if isinstance(message, Attach):
            if self.name == "unattached" or (self.name == "lonely" and self.file.exists()):
                os._exit(11)
            self.send(Attached(0.0, threads=int(self.is_threaded)))
        elif isinstance(message, Prove):
            self.prove(message)
        elif isinstance(message, Merge):
            self.merge(message)
        elif isinstance(message, Shutdown):
            sys.exit(0)

    def prove(self, job: Prove) -> None:
        if self.behaviour == "dies":
            os._exit(11)
        if self.is_threaded:
            with self.file.open("a") as file:
                file.write(f"{os.getpid()}\n")
        self.send(VersionStage(job.digest, "validating", 0.1))
        self.send(VersionStage(job.digest, "proving", 0.5))
        self.pause({"slow": 1.0, "hangs": 3600.0, "steady": 0.5}.get(self.name, 0.1 * self.is_threaded))
        while self.name == "held" and self.file.exists():
            self.pause(0.02)
        content = Path(job.weights_path).read_bytes()
        if content.startswith(b"broken"):
            self.send(Rejected(digest=job.digest, code="broken_weights", message="these weights are broken"))
            return
        shutil.copyfile(job.weights_path, job.packed_path)
        sha256 = hashlib.sha256(content).hexdigest()
        task, labels = TASKS.get(content, (REPORT.task, REPORT.labels))
        score = re.match(rb"score ([\d.]+)", content)
        weights = float(score[1]) if score else None
        report = msgspec.structs.replace(REPORT, task=task, labels=labels, weight_score=weights)
        self.send(Proved(digest=job.digest, report=report, sha256=sha256, bytes=len(content)))

    def pause(self, seconds: float) -> None:
        """Wait for so long, or end with the server."""
        ended = select.poll()
        ended.register(self.connection, select.POLLRDHUP)
        if ended.poll(min(seconds, 86400.0) * 1000):
            os._exit(0)

    def merge(self, job: Merge) -> None:
        """The first one's config, and the weights of all with what each weighs, one after the other."""
        if self.behaviour == "dies":
            os._exit(11)
        parts = [f"{job.method} {job.density} {job.sign} {job.seed}".encode()]
        parts += [f"{p.weight:g}*".encode() + Path(p.weights_path).read_bytes() for p in job.parents]
        shutil.copyfile(job.parents[0].config_path, job.config_path)
        Path(job.weights_path).write_bytes(b" ".join(parts))
        self.send(Merged(job.digest))


if __name__ == "__main__":
    arguments = sys.argv
    descriptor = int(arguments[arguments.index("--fd") + 1])
    ScriptedVerifier(arguments[1], socket.socket(fileno=descriptor)).run()
