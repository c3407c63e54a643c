"""Grammars that rows follow: a JSON schema, a regular expression, a grammar in Lark's or GBNF's notation.

A process of its own (`grammar_process.py`) compiles them with llguidance and computes, next to the forward
pass, which tokens may come next. Grammars come from anybody: one that hangs or kills that process costs its
own requests an answer, and the others the moment that a new process takes to come to where they are.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import select
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np

from onebase_engine.engine.messages import FrameReader, Grammar, encode
from onebase_engine.engine.row import Row, Segment
from onebase_engine.environment import computing_environment

MASK_BYTES = 4
"""Of an entry of a mask: 32 tokens, the first in the lowest bit."""
WHITESPACE = " ?"
"""Between two parts of a JSON text. With new lines and tabs a small base loses its way in them."""
START_SECONDS = 40.0
"""Until a new process takes orders, or begins with one."""
COMPILING = 2
"""Grammars at once: a slow one lets others pass."""
COMPILE_SECONDS = 10.0
MASK_SECONDS = 5.0
"""What one grammar may take, in which everybody else's are waited for too."""
IDLE_SECONDS = 0.01
FORESEEN = 64
"""Tokens of a row that are said to be forced, at most."""
PROGRAM = ("-m", "onebase_engine.engine.grammar_process")
DEATHS = 2
"""Of processes that had one grammar to compile and ended: then it is the grammar's fault."""
HARMFUL_SECONDS = 600.0
REMEMBERED = 1000
"""For how long, and how many at most, are not tried again of those that ended a process."""

logger = logging.getLogger(__name__)


# ---- what is said to the process, and what it answers ------------------------------------------


class Compile(msgspec.Struct, frozen=True, tag=True, array_like=True):
    key: str
    grammar: Grammar


class Want(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Masks of one step. A row: its number, its grammar's key, what it has more than last time, its draft,
    and where in the shared memory its first mask goes; those after each token of the draft follow."""

    number: int
    rows: list[tuple[int, str, list[int], list[int], int]]


class Tell(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rows that have drawn tokens: their number, their grammar's key, what they have more than last time."""

    number: int
    rows: list[tuple[int, str, list[int]]]


class Forget(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rows that have ended, and keys of grammars that nobody uses at the moment."""

    rows: list[int]
    keys: list[str]


class Started(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """It knows the tokenizer, and takes orders."""


class Begun(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """It is being compiled, and waits for no other any more."""

    key: str


class Compiled(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`busy`: the error is not the grammar's, which may be compiled later."""

    key: str
    error: str | None
    busy: bool = False


class Masks(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    errors: dict[int, str]


class Forced(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What the rows of a Tell can only go on with, of those that can go on with one text alone."""

    number: int
    tokens: dict[int, list[int]]


def request_decoder() -> msgspec.msgpack.Decoder[Compile | Want | Tell | Forget]:
    return msgspec.msgpack.Decoder(Compile | Want | Tell | Forget)


_answers = msgspec.msgpack.Decoder(Started | Begun | Compiled | Masks | Forced)


class GrammarError(Exception):
    """A row cannot go on as its grammar says."""


class _GoneError(Exception):
    """The process has died, or did not answer in time."""


class Grammars:
    """Those of one engine. Not thread-safe. The process begins with the first grammar.

    Args:
        folder: the base's, whose tokenizer says which text a token stands for.
        vocabulary: logits of a row.
        places: rows and tokens of drafts in one step.
    """

    def __init__(self, folder: Path, vocabulary: int, eos_ids: Iterable[int], places: int) -> None:
        self._masks = np.zeros((places, -(-vocabulary // 32)), dtype=np.int32)
        """[places, words], which the process writes once there is one."""
        self._vocabulary = vocabulary
        self._settings = {
            "folder": str(folder),
            "vocabulary": vocabulary,
            "eos_ids": sorted(eos_ids),
            "places": places,
            "words": self._masks.shape[1],
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._users: dict[str, int] = {}
        self._grammars: dict[str, Grammar] = {}
        self._compiled: set[str] = set()
        self._asked: dict[str, float] = {}
        """What is being compiled, and until when."""
        self._waiting: list[str] = []
        """What a process had to compile when it ended; each is compiled again when no other is."""
        self._deaths: dict[str, int] = {}
        """By grammar, see DEATHS."""
        self._ready = False
        self._harmful: OrderedDict[str, tuple[float, str]] = OrderedDict()
        """What ended a process: until when it is not tried again, and what is said of it."""
        self._errors: dict[str, str] = {}
        """Of grammars that a new process could not compile again."""
        self._arrived: list[Compiled] = []
        self._outbox = bytearray()
        self._told: dict[int, int] = {}
        """Tokens of each row that the process knows."""
        self._number = 0
        self._wanted: list[tuple[Row, Segment, int]] = []
        self._tells = 0
        self._telling: dict[int, Row] = {}
        """Rows of the last Tell, until it is answered."""
        self._blind: set[str] = set()
        """Grammars of rows that a process was told of when it ended: of them nothing is foreseen again."""

    # ---- compiling --------------------------------------------------------------------------

    def open(self, grammar: Grammar, rows: int) -> str:
        """Have it compiled, once for all who use it; `arrived` says when it is. Its key.

        Each row is to be given to `forget`, or the key as often to `close`.
        """
        key = blake2b(f"{grammar.kind}\n{grammar.text}".encode(), digest_size=16).hexdigest()
        self._users[key] = self._users.get(key, 0) + rows
        self._grammars[key] = grammar
        until, reason = self._harmful.get(key, (0.0, ""))
        if time.monotonic() < until:
            self._arrived.append(Compiled(key, reason))
        elif key not in self._waiting and (key not in self._asked or self._users[key] == rows):
            # Also if others asked and have left: the process was told that nobody uses it.
            self._compile(key)
        return key

    def close(self, key: str, rows: int = 1) -> None:
        """So many rows less follow it."""
        self._users[key] -= rows
        if not self._users[key]:
            del self._users[key], self._grammars[key]
            self._deaths.pop(key, None)
            self._errors.pop(key, None)
            self._compiled.discard(key)
            self._blind.discard(key)
            self._tell_gone([], [key])

    def arrived(self, timeout: float = 0.0) -> list[Compiled]:
        """What has been compiled since the last call, or refused."""
        if self._asked:
            try:
                self._receive(timeout)
                if late := self._late():
                    for key in late:
                        del self._asked[key]
                        self._refuse(key, self._reason())
                    raise _GoneError(self._reason())
            except _GoneError as error:
                self._stop(error)
        self._go_on()
        arrived, self._arrived = self._arrived, []
        return arrived

    def _compile(self, key: str) -> None:
        self._asked[key] = math.inf if self._ready else time.monotonic() + START_SECONDS
        try:
            self._say(Compile(key, self._grammars[key]))
        except _GoneError as error:
            self._stop(error)

    def _late(self) -> list[str]:
        """What is being compiled for too long; what waits its turn has all the time."""
        now = time.monotonic()
        return [key for key, deadline in self._asked.items() if now > deadline]

    def _reason(self) -> str:
        return f"took more than {COMPILE_SECONDS:g} s" if self._ready else "did not start"

    def _refuse(self, key: str, reason: str) -> None:
        message = f"the process that compiles it {reason}"
        self._arrived.append(Compiled(key, message, busy=not self._ready))
        if self._ready:
            self._harmful[key] = time.monotonic() + HARMFUL_SECONDS, message
            if len(self._harmful) > REMEMBERED:
                self._harmful.popitem(last=False)

    def _go_on(self) -> None:
        """Compile what waits, one at a time: so it is seen which of them a process dies of."""
        while self._waiting and not self._asked:
            key = self._waiting.pop(0)
            if key in self._grammars:
                self._compile(key)

    # ---- masks ------------------------------------------------------------------------------

    def ask(self, segments: Iterable[Segment]) -> bool:
        """Have the masks computed of those that get a token and follow a grammar; whether there are any."""
        self._wanted = []
        place = 0
        for segment in segments:
            if segment.row.grammar is not None and segment.samples:
                self._wanted.append((segment.row, segment, place))
                place += len(segment.draft) + 1
        if self._wanted:
            with suppress(_GoneError):
                self._want(self._wanted)
        return bool(self._wanted)

    def masks(self) -> dict[Row, np.ndarray | GrammarError]:
        """The masks of each row that `ask` named: [1 + draft, words] int32, valid until the next `ask`."""
        if not self._wanted:
            return {}
        try:
            return self._take(self._wanted)
        except _GoneError as error:
            logger.error("the process that follows grammars %s; each row is tried alone", error)
            self._stop(error)
        found: dict[Row, np.ndarray | GrammarError] = {}
        for one in self._wanted:
            found |= self._alone(one)
        return found

    def tell(self, rows: Iterable[Row]) -> None:
        """Say what rows have drawn. What they can only go on with comes into `Row.forced`, by the time that
        `foresee` or `masks` returns, or not at all: nobody waits for it."""
        asked = {
            row.arrival: row
            for row in rows
            if row.grammar in self._compiled and row.grammar not in self._blind and not row.forced
        }
        if not asked:
            return
        self._tells += 1
        with suppress(_GoneError):
            self._say(Tell(self._tells, [(number, *self._news(row)) for number, row in asked.items()]))
            self._telling = asked
            self._told |= {number: row.generated for number, row in asked.items()}

    def foresee(self) -> None:
        """Take in what has come of what was told."""
        if self._telling:
            try:
                self._receive(0.0)
            except _GoneError as error:
                self._stop(error)

    def _news(self, row: Row) -> tuple[str, list[int]]:
        """Its grammar's key, and the tokens that the process does not know."""
        return row.grammar or "", row.tokens[row.prompt_length + self._told.get(row.arrival, 0) :]

    def forget(self, row: Row) -> None:
        """It has ended."""
        if row.grammar is not None:
            if self._told.pop(row.arrival, None) is not None:
                self._tell_gone([row.arrival], [])
            self.close(row.grammar)

    def _tell_gone(self, rows: list[int], keys: list[str]) -> None:
        if self._socket is not None:
            with suppress(_GoneError):
                self._say(Forget(rows, keys))

    def _alone(self, one: tuple[Row, Segment, int]) -> dict[Row, np.ndarray | GrammarError]:
        try:
            self._want([one])
            return {
                row: mask.copy() if isinstance(mask, np.ndarray) else mask
                for row, mask in self._take([one]).items()
            }
        except _GoneError as error:
            self._stop(error)
            return {one[0]: GrammarError(f"the process that follows its grammar {error}")}

    def _want(self, wanted: Sequence[tuple[Row, Segment, int]]) -> None:
        rows = []
        self._number += 1
        for row, segment, place in wanted:
            key = row.grammar or ""
            if key not in self._compiled:
                # A new process, which has to know it first; what comes after it waits in the socket.
                self._recompile(key)
            rows.append((row.arrival, *self._news(row), list(segment.draft), place))
        self._say(Want(self._number, rows))
        for row, _, _ in wanted:
            self._told[row.arrival] = row.generated

    def _recompile(self, key: str) -> None:
        self._say(Compile(key, self._grammars[key]))
        self._errors.pop(key, None)
        deadline = time.monotonic() + START_SECONDS
        while key not in self._compiled:
            before = self._ready
            self._receive(deadline - time.monotonic())
            if self._ready and not before:
                deadline = time.monotonic() + COMPILE_SECONDS
            if time.monotonic() > deadline:
                raise _GoneError("does not answer")
            if key in self._errors:
                raise _GoneError(f"says: {self._errors[key]}")

    def _take(self, wanted: Sequence[tuple[Row, Segment, int]]) -> dict[Row, np.ndarray | GrammarError]:
        deadline = time.monotonic() + MASK_SECONDS
        while (answer := self._receive(deadline - time.monotonic())) is None:
            if time.monotonic() > deadline:
                raise _GoneError("does not answer")
        found: dict[Row, np.ndarray | GrammarError] = {}
        for row, segment, place in wanted:
            mask = self._masks[place : place + len(segment.draft) + 1]
            error = answer.errors.get(row.arrival)
            if error is None and not mask[0].any():
                error = "its grammar allows no token here"
            found[row] = mask if error is None else GrammarError(error)
        return found

    # ---- the process ------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        size = self._masks.nbytes
        memory = os.memfd_create("masks")
        try:
            os.ftruncate(memory, size)
            shared = np.frombuffer(mmap.mmap(memory, size), dtype=np.int32)
            self._masks = shared.reshape(self._masks.shape)
            options = ("--fd", str(theirs.fileno()), "--masks-fd", str(memory),
                       "--settings", json.dumps(self._settings))  # fmt: skip
            self._process = subprocess.Popen(
                [sys.executable, "-P", *PROGRAM, *options],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                env=computing_environment() | {"MALLOC_ARENA_MAX": "2", "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            theirs.close()
            os.close(memory)
        ours.setblocking(False)
        self._socket, self._reader = ours, FrameReader()

    def _stop(self, reason: _GoneError) -> None:
        """End the process, if it has not ended by itself; the next call begins another.

        What it was compiling is tried again, or refused after DEATHS.
        """
        self.end()
        self._blind |= {row.grammar for row in self._telling.values() if row.grammar in self._users}
        self._telling = {}
        asked, self._asked = list(self._asked), {}
        for key in asked:
            self._deaths[key] = self._deaths.get(key, 0) + (len(asked) == 1)
            if self._deaths[key] < DEATHS:
                self._waiting.append(key)
            else:
                self._refuse(key, str(reason))
        self._ready = False

    def end(self) -> None:
        """End the process. Where grammars are still followed, the next call begins another."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None
        self._compiled.clear()
        self._told.clear()
        self._outbox.clear()

    def _say(self, message: msgspec.Struct) -> None:
        """Send it, at once or with what comes later: nobody waits for a process that does not read."""
        try:
            if self._socket is None:
                self._start()
        except OSError as error:
            raise _GoneError(f"cannot begin ({error.strerror})") from error
        self._outbox += encode(message)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox and self._socket is not None:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise _GoneError("ended") from error

    def _receive(self, timeout: float) -> Masks | None:
        """Take in what has come, waiting for it up to `timeout` seconds; masks that are not old."""
        self._flush()
        if self._socket is None:
            raise _GoneError("ended")
        if timeout > 0:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            poll.poll(timeout * 1000)
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _GoneError("ended") from error
        if not data:
            raise _GoneError("ended")
        try:
            messages = [_answers.decode(payload) for payload in self._reader.feed(data)]
        except (ValueError, msgspec.MsgspecError) as error:
            raise _GoneError(f"says what is no message ({error})") from error
        found: Masks | None = None
        for message in messages:
            if isinstance(message, Masks):
                found = message if message.number == self._number else found
            elif isinstance(message, Forced):
                if message.number == self._tells:
                    self._take_forced(message)
            elif isinstance(message, Compiled):
                self._take_compiled(message)
            elif isinstance(message, Started):
                self._ready = True
                self._asked = dict.fromkeys(self._asked, math.inf)
            elif message.key in self._asked:
                self._asked[message.key] = time.monotonic() + COMPILE_SECONDS
        return found

    def _take_forced(self, message: Forced) -> None:
        """Raises _GoneError: what is said cannot be, and a step would fail of it."""
        known = range(self._vocabulary)
        for number, tokens in message.tokens.items():
            if number not in self._telling or not all(token in known for token in tokens):
                raise _GoneError("names tokens or rows that there are not")
            self._telling[number].forced = tokens
        self._telling = {}

    def _take_compiled(self, message: Compiled) -> None:
        self._deaths.pop(message.key, None)
        if message.key not in self._grammars:
            self._tell_gone([], [message.key])
        elif message.error is None:
            self._compiled.add(message.key)
        else:
            self._errors[message.key] = message.error
        if self._asked.pop(message.key, None) is not None:
            self._arrived.append(message)
