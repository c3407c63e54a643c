"""The processes for grammars as the engine sees them: what starts them, and the messages to and from them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from onebase_engine.engine.messages import FrameReader, Grammar, encode
from onebase_engine.environment import computing_environment

PROGRAM = ("-m", "onebase_engine.engine.grammar_process")
MASK_BYTES = 4
"""Bytes of one entry of a mask, which holds 32 tokens, the first in the lowest bit."""
WHITESPACE = " ?"
"""White space between two parts of a JSON text: a small base loses its way in new lines and tabs."""
FORESEEN = 64
"""Limit of the forced tokens that are reported for a sequence."""
THREADS = 4
"""Limit of the threads that compute the masks of one tenant."""
START_SECONDS = 40.0
"""Longest time until a new process answers for the first time."""
COMPILE_SECONDS = 10.0
MASK_SECONDS = 5.0
"""Processor time, in seconds, that one grammar and the masks of one step may take."""
STUCK_SECONDS = 60.0
"""Longest time without an answer of a process that uses no processor, or gets none."""
DID_NOT_START, WAS_NOT_STARTED, TOOK_MORE = "did not start", "could not be started", "took more than"
"""Reasons for which a process is lost: it did not answer once, it ended or failed before that, or it used too
much of a processor."""


# ---- messages -----------------------------------------------------------------------------------


class Compile(msgspec.Struct, frozen=True, tag=True, array_like=True):
    key: str
    grammar: Grammar
    kept_only: bool = False
    """Whether the grammar is only to be used if it is still there compiled: its tenant has spent its time."""


class MaskRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Masks that one step needs. Each sequence: its number, its grammar's key, its tokens since the last
    message, its draft, and the place of its first mask in the shared memory; those after each token of the
    draft follow."""

    number: int
    sequences: list[tuple[int, str, list[int], list[int], int]]


class TokensDrawn(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sequences that have new tokens: number, grammar's key, and tokens since the last message."""

    number: int
    sequences: list[tuple[int, str, list[int]]]


class Forget(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sequences that have ended, and keys of grammars that no sequence uses at the moment."""

    sequences: list[int]
    keys: list[str]


class Started(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process runs, under this id, and takes messages."""

    pid: int


class Compiled(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The end of a compilation. `busy`: the error is not the grammar's, which may be compiled later."""

    key: str
    error: str | None
    busy: bool = False
    not_kept: bool = False
    """Whether the grammar was not compiled since it was not there, as `Compile.kept_only` has it."""
    seconds: float = 0.0
    """Time of a processor that it took."""


class Masks(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    errors: dict[int, str]


class Forced(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Tokens that sequences of a TokensDrawn must continue with, for those that have no choice."""

    number: int
    tokens: dict[int, list[int]]


def request_decoder() -> msgspec.msgpack.Decoder[Compile | MaskRequest | TokensDrawn | Forget]:
    return msgspec.msgpack.Decoder(Compile | MaskRequest | TokensDrawn | Forget)


Answer = Started | Compiled | Masks | Forced
_answers = msgspec.msgpack.Decoder(Answer)


class ProcessGoneError(Exception):
    """A process has ended, or did not answer in time."""


# ---- processes ----------------------------------------------------------------------------------


class Template:
    """The process that loads the tokenizer and forks all others."""

    def __init__(self, settings: dict[str, object]) -> None:
        """Raises OSError: no process can be started."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        environment = {
            "MALLOC_ARENA_MAX": "2",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    *PROGRAM,
                    "--fd",
                    str(theirs.fileno()),
                    "--settings",
                    json.dumps(settings),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=computing_environment() | environment,
            )

    def fork(self, theirs: socket.socket, memory: int | None) -> None:
        """Have it fork a process that serves the socket: on trial, or with `memory` for masks.

        Raises:
            OSError: the template has ended, or does not read.
        """
        files = [theirs.fileno()] if memory is None else [theirs.fileno(), memory]
        socket.send_fds(self._socket, [b"fork"], files)

    def error(self) -> str | None:
        """Return why the tokenizer cannot be used, if it cannot. Raises ProcessGoneError."""
        try:
            reason = self._socket.recv(1 << 16).decode()
        except BlockingIOError:
            return None
        except OSError:
            reason = ""
        if not reason:
            raise ProcessGoneError("ended")
        return reason

    def end(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Process:
    """A forked process. Messages go and come without anybody waiting for it."""

    def __init__(self, template: Template, memory: int | None = None) -> None:
        """Raises OSError: none can be started."""
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._reader, self._outbox = FrameReader(), bytearray()
        self._pid: int | None = None
        self._pidfd: int | None = None
        self.began = time.monotonic()
        self._started: float | None = None
        """Monotonic time of its first answer."""
        self._since: float | None = None
        """Start of the wait for the expected answer, on the monotonic clock."""
        self._limit, self._cpu_before = 0.0, 0.0
        with theirs:
            try:
                template.fork(theirs, memory)
            except OSError:
                self._socket.close()
                raise

    @property
    def pid(self) -> int | None:
        """Process id; None until the process has reported it."""
        return self._pid

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send at once, or with what follows if the process does not read. Raises ProcessGoneError."""
        self._outbox += encode(message)
        self.flush()

    def flush(self) -> None:
        """Raises ProcessGoneError."""
        try:
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> list[Answer]:
        """Return the messages that have come. Raises ProcessGoneError."""
        self.flush()
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        try:
            messages = [_answers.decode(payload) for payload in self._reader.feed(data)]
        except (ValueError, msgspec.MsgspecError) as error:
            raise ProcessGoneError(f"sends what is no message ({error})") from error
        for message in messages:
            if isinstance(message, Started) and self._pid is None:
                self._note_start(message.pid)
        return messages

    def _gone(self) -> ProcessGoneError:
        return ProcessGoneError("ended" if self._pid is not None else WAS_NOT_STARTED)

    def _note_start(self, pid: int) -> None:
        """Raises ProcessGoneError: there is no such process any more, or too many files are open."""
        self._pid, self._started = pid, time.monotonic()
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, ValueError, OverflowError) as error:
            raise ProcessGoneError("ended") from error
        self._since = None if self._since is None else self._started

    def expect(self, seconds: float) -> None:
        """Expect answers before `seconds` of a processor have been used; 0: expect none.

        The clock starts again when this changes.
        """
        if seconds != self._limit:
            self._limit = seconds
            self._since = time.monotonic() if seconds else None
            self._cpu_before = self.cpu_seconds() if seconds else 0.0

    def check_deadline(self) -> None:
        """Raise ProcessGoneError if the answer that is expected takes too long."""
        now = time.monotonic()
        if self._pid is None and now - self.began > START_SECONDS:
            raise ProcessGoneError(DID_NOT_START)
        if self._pid is None or self._since is None:
            return
        elapsed = now - self._since
        if elapsed > STUCK_SECONDS:
            raise ProcessGoneError(f"did not answer within {STUCK_SECONDS:g} s")
        if elapsed > self._limit / THREADS and self.cpu_seconds() - self._cpu_before > self._limit:
            raise ProcessGoneError(f"{TOOK_MORE} {self._limit:g} s")

    def check_wait(self, since: float) -> None:
        """Raise ProcessGoneError if one answer has not come since then, whatever else has."""
        if self._started is not None and time.monotonic() - max(since, self._started) > STUCK_SECONDS:
            raise ProcessGoneError(f"did not answer within {STUCK_SECONDS:g} s")

    def cpu_seconds(self, ended: float = 0.0) -> float:
        """Return the time of a processor that the process has used, or `ended` if there is none any more."""
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ended
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cost(self) -> float:
        """Return the seconds of a processor that a grammar has taken: at most, if the process has ended."""
        if self._started is None:
            return 0.0
        return self.cpu_seconds(ended=min(time.monotonic() - self._started, COMPILE_SECONDS))

    @property
    def unsent(self) -> bool:
        """Whether the process has not read all that was sent."""
        return bool(self._outbox)

    def kill(self) -> None:
        """End it, whatever it does; its socket's end tells a process that has not reported its id."""
        self._socket.close()
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = None
