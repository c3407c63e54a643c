"""An engine process that speaks the real protocol over the real socket, and fails on demand.

It stands in for the engine only where a fault cannot be had from the real one at a given moment.
Run as `python scripted_engine.py BEHAVIOUR [--pace PIPE] --fd N [--base-fd N]`. It loads any file as an
adapter, if its hash is right, and dies when a row asks for one that is not loaded. A row with an adapter
whose file begins with the word `sick` ends with an error, and one with `stuck` never advances.

    words        every row gets the token ids of its prompt, one per step, over and over
    flood        as `words`, with no pause between steps; each says that it took a second
    few          as `words`, but computes four rows at once; others wait
    deaf         accepts requests and reports steps that never advance
    awaits       as `deaf`, but reports that everything waits for grammars
    limited      ends each row, whose grammars have taken too long
    fatal        refuses to start
    die-early    exits before it is ready
    sleep-early  never gets ready
    paced        as `words`, but takes a byte from the pipe `--pace` before each step
    die-ready    takes a byte from that pipe once it is ready, and exits
    poison       as `words`, but exits in the step after a row came that asks for POISON tokens
    gated-words  as `words`, but takes a byte from that pipe before it is ready; so any other behaviour
"""

from __future__ import annotations

import argparse
import hashlib
import os
import selectors
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec

from onebase_engine.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    BaseInfo,
    Cancel,
    Fatal,
    FrameReader,
    LoadAdapter,
    Loading,
    Pause,
    Ready,
    ScoredToken,
    SequenceOutput,
    Shutdown,
    SlotsChanged,
    Start,
    Stats,
    StepResult,
    Submit,
    ToApi,
    UnloadAdapter,
    encode,
    to_engine_decoder,
)

STEP_SECONDS = 0.02
POISON = 1313
FEW = 4


class ScriptedEngine:
    """Rows that copy their prompt, in one loop over the socket."""

    def __init__(self, behaviour: str, connection: socket.socket, pipe: str = "") -> None:
        self.behaviour = behaviour.removeprefix("gated-")
        self.is_gated = behaviour != self.behaviour
        self.pipe = pipe
        self.paused = False
        self.connection = connection
        self.frames = FrameReader()
        self.decoder = to_engine_decoder()
        self.rows: dict[tuple[str, int], list[object]] = {}
        self.steps = 0
        self.loaded: set[str] = set()
        self.sick: set[str] = set()
        self.stuck: set[str] = set()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.pace: int | None = None

    def send(self, message: ToApi) -> None:
        self.connection.setblocking(True)
        self.connection.sendall(encode(message))

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self.connection, selectors.EVENT_READ)
        while True:
            pause = 0.0 if self.behaviour == "flood" and self.rows else STEP_SECONDS
            if selector.select(pause):
                data = self.connection.recv(1 << 16)
                if not data:
                    return
                for payload in self.frames.feed(data):
                    self.receive(self.decoder.decode(payload))
            if not self.paused:
                self.step()

    def receive(self, message: object) -> None:
        if isinstance(message, Start):
            self.start(message)
        elif isinstance(message, LoadAdapter):
            self.load(message)
        elif isinstance(message, UnloadAdapter):
            self.loaded.discard(message.digest)
            self.send(AdapterUnloaded(message.digest))
        elif isinstance(message, Submit):
            missing = {ref.digest for ref in message.adapters} - self.loaded
            if missing:
                raise RuntimeError(f"a row asks for versions that are not loaded: {missing}")
            self.send(SlotsChanged([ref.digest for ref in message.adapters]))
            for choice in message.choices:
                begun = [] if message.resume_tokens is None else message.resume_tokens[choice]
                self.rows[message.id, choice] = [message, len(begun)]
        elif isinstance(message, Cancel):
            self.cancel(message)
        elif isinstance(message, Pause):
            self.paused = message.paused
            self.report([])
        elif isinstance(message, Shutdown):
            sys.exit(0)

    def load(self, message: LoadAdapter) -> None:
        content = Path(message.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != message.sha256:
            self.send(AdapterFailed(digest=message.digest, code="damaged", message="not what was proved"))
            return
        self.loaded.add(message.digest)
        if content.startswith(b"sick"):
            self.sick.add(message.digest)
        if content.startswith(b"stuck"):
            self.stuck.add(message.digest)
        self.send(AdapterLoaded(digest=message.digest, bytes=len(content), load_seconds=0.0))

    def start(self, message: Start) -> None:
        self.send(Loading("loading the base", 0.5))
        if self.behaviour == "fatal":
            self.send(Fatal("this base is a sonnet, not a model"))
            sys.exit(3)
        if self.behaviour == "die-early":
            sys.exit(7)
        if self.behaviour == "sleep-early":
            self.connection.recv(1)
            sys.exit(0)
        config = message.config
        base = BaseInfo(
            architecture="Scripted", parameters=1, quantization="none", dtype="float32", device="cpu",
            base_bytes=1, kv_bytes=1, kv_blocks=4096, kv_tokens=65_536, kv_longest=65_536, block_size=16,
            max_length=config.max_length or 100_000, max_sequences=config.max_sequences,
            max_slots=config.max_slots if self.behaviour == "few" else 1,
            max_rank=8, vocab_size=49152, load_seconds=0.0,
        )  # fmt: skip
        if self.is_gated:
            self.wait_for_byte()
        self.send(Ready(base))
        if self.behaviour == "die-ready":
            self.wait_for_byte()
            os._exit(9)

    def cancel(self, message: Cancel) -> None:
        ended = [key for key in self.rows if key[0] == message.id and message.choice in (None, key[1])]
        for key in ended:
            del self.rows[key]
        self.report([SequenceOutput(id=name, choice=choice, finish="cancelled") for name, choice in ended])

    def wait_for_byte(self) -> None:
        """Until the test writes one; ends with the test."""
        if self.pace is None:
            self.pace = os.open(self.pipe, os.O_RDONLY)
        if not os.read(self.pace, 1):
            sys.exit(0)

    def step(self) -> None:
        if self.behaviour == "paced" and self.rows:
            self.wait_for_byte()
        if self.behaviour in ("deaf", "awaits"):
            self.report([])
            return
        if self.behaviour == "limited" and self.rows:
            error = {
                "error_code": "grammar_limit",
                "error_message": "new grammars took 20 s",
                "retry_after": 7.0,
            }
            ended, self.rows = list(self.rows), {}
            self.report(
                [SequenceOutput(id=name, choice=choice, finish="error", **error) for name, choice in ended]
            )
            return
        if self.behaviour == "poison" and any(self.poisonous(submit) for submit, _ in self.rows.values()):
            os._exit(9)
        outputs = []
        for (name, choice), state in list(self.rows.items())[: FEW if self.behaviour == "few" else None]:
            submit, count = state
            if not isinstance(submit, Submit) or not isinstance(count, int):
                raise TypeError("a row is a submit and a count")
            if any(ref.digest in self.stuck for ref in submit.adapters):
                continue
            state[1] = count + 1
            if any(ref.digest in self.sick for ref in submit.adapters):
                error = {"error_code": "engine_error", "error_message": "these weights make it sick"}
                outputs.append(SequenceOutput(id=name, choice=choice, finish="error", **error))
                del self.rows[name, choice]
                continue
            if submit.pooling is not None or submit.branches:
                outputs.append(self.read(submit, choice))
                del self.rows[name, choice]
                continue
            finish = "length" if count + 1 >= submit.sampling.max_tokens else None
            token = submit.prompt[count % len(submit.prompt)]
            told = [] if submit.sampling.logprobs is None else [ScoredToken(token, -0.5, [(token, -0.5)])]
            row = SequenceOutput(id=name, choice=choice, tokens=[token], logprobs=told or None, finish=finish)
            if count == len((submit.resume_tokens or {}).get(choice, ())):
                row = msgspec.structs.replace(row, cached_tokens=self.cached(submit), queue_seconds=0.0)
            outputs.append(row)
            if finish:
                del self.rows[name, choice]
        self.steps += bool(outputs)
        if outputs:
            self.report(outputs)

    def read(self, submit: Submit, choice: int) -> SequenceOutput:
        """How often each token modulo eight is in the prompt; each token of a branch is less likely."""
        branch = submit.branches[choice] if submit.branches else []
        values = [float(sum(token % 8 == number for token in submit.prompt)) for number in range(8)]
        if submit.pooling is not None and submit.pooling.kind == "each":
            values = [value for token in submit.prompt for value in (float(token % 8), 1.0)]
        return SequenceOutput(
            id=submit.id,
            choice=choice,
            finish="stop",
            cached_tokens=self.cached(submit),
            vector=struct.pack(f"<{len(values)}f", *values) if submit.pooling is not None else None,
            prompt_logprobs=[ScoredToken(token, -1.0 - number, []) for number, token in enumerate(branch)]
            or None,
        )

    def cached(self, submit: Submit) -> int:
        """Tokens of a prompt that come from the cache, it says: of one that the tenant sent before."""
        key = submit.tenant, tuple(submit.prompt)
        known = key in self.seen
        self.seen.add(key)
        return len(submit.prompt) if known else 0

    def poisonous(self, submit: object) -> bool:
        return isinstance(submit, Submit) and submit.sampling.max_tokens == POISON

    def report(self, outputs: list[SequenceOutput]) -> None:
        counts = dict.fromkeys(Stats.__struct_fields__, 0)
        known = {"paused": self.paused, "sequences_running": len(self.rows), "steps": self.steps}
        stats = Stats(**counts | known | {"awaits_grammars": self.behaviour == "awaits"})
        if self.behaviour == "few":
            waiting = max(0, len(self.rows) - FEW)
            running = len(self.rows) - waiting
            stats = msgspec.structs.replace(stats, sequences_running=running, sequences_waiting=waiting)
        at = float(self.steps) if self.behaviour == "flood" else time.monotonic()
        self.send(StepResult(outputs, stats, at))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("behaviour")
    arguments.add_argument("--pace", default="")
    for option in ("--fd", "--base-fd"):
        arguments.add_argument(option, type=int, default=-1)
    options = arguments.parse_known_args()[0]
    ScriptedEngine(options.behaviour, socket.socket(fileno=options.fd), options.pace).run()
