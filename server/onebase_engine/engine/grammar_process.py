"""The process that follows grammars: `python -m onebase_engine.engine.grammar_process`. See `grammars.py`.

What it compiles comes from anybody, so it is given nothing but a socket to the engine, memory for masks that
both have, and the base's tokenizer; its memory has a limit, and it ends with the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import mmap
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from onebase_engine.base.chat import renamed_json
from onebase_engine.engine.grammars import (
    COMPILING,
    FORESEEN,
    MASK_BYTES,
    WHITESPACE,
    Begun,
    Compile,
    Compiled,
    Forced,
    Masks,
    Started,
    Tell,
    Want,
    request_decoder,
)
from onebase_engine.engine.messages import FrameReader, Grammar, encode
from onebase_engine.logs import set_up_logs
from onebase_engine.machine import return_freed_memory

MEMORY_BYTES = 4 << 30
"""Of addresses: beyond it the process ends, and whoever asked for too much is found."""
KEPT_BYTES = 256 << 20
"""What grammars may take that nobody uses at the moment."""
KEPT_GRAMMARS = 1000
MOST_BYTES = 1 << 30
"""What all of them may take."""
FORESEE_TOKENS, FORESEE_SECONDS = 512, 0.05
"""Of what one row can only go on with, and of the processor for it. A longer text takes too much, and as much
again for each mask of a draft: in its grammar nothing is foreseen again."""
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Follower:
    """The grammars that are compiled, and where in its own each row is."""

    def __init__(self, tokenizer: Any, masks: np.ndarray, before: int) -> None:
        import llguidance

        self._library = llguidance
        self._tokenizer = tokenizer
        self._masks = masks
        self._executor = llguidance.LLExecutor()
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._used: set[str] = set()
        self._rows: dict[int, Any] = {}
        self._costly: set[str] = set()
        """Grammars in which nothing is foreseen, see FORESEE_TOKENS."""
        self._lock = threading.Lock()
        self._before = before

    def compile(self, key: str, grammar: Grammar) -> Compiled:
        """Compile and keep a grammar, or say what is wrong with it."""
        with self._lock:
            self._used.add(key)
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return Compiled(key, None)
        try:
            matcher = self._matcher(grammar)
        except BaseException as error:  # what panics in Rust is no Exception
            with self._lock:
                self._used.discard(key)
            return Compiled(key, _sentence(str(error) or type(error).__name__))
        with self._lock:
            self._compiled[key] = matcher
            self._let_go()
            if self._taken() <= MOST_BYTES:
                return Compiled(key, None)
            del self._compiled[key]
            self._used.discard(key)
            return_freed_memory()
        return Compiled(key, "the grammars that are in use take all the memory that they may", busy=True)

    def _matcher(self, grammar: Grammar) -> Any:
        """Raises ValueError, and whatever the library raises."""
        matcher = self._library.LLMatcher(
            self._tokenizer, self._source(grammar), log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        first = matcher.deep_copy()
        mask = first.compute_bitmask()
        if first.is_error() or not any(mask):
            reason = str(first.get_error())
            raise ValueError("no text keeps to it" if "NoExtension" in reason or not reason else reason)
        return matcher

    def _source(self, grammar: Grammar) -> str:
        matcher = self._library.LLMatcher
        if grammar.kind == "json_schema":
            return str(
                matcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
            )
        if grammar.kind == "regex":
            return str(matcher.grammar_from_regex(grammar.text))
        if grammar.kind == "lark" or "::=" not in grammar.text:
            return str(matcher.grammar_from_lark(grammar.text))
        from llguidance.gbnf_to_lark import gbnf_to_lark

        return str(matcher.grammar_from_lark(gbnf_to_lark(grammar.text)))

    def _let_go(self) -> None:
        """Of grammars that nobody uses, the one that was not asked for the longest, until they fit."""
        idle = [key for key in self._compiled if key not in self._used]
        while idle and (self._taken() > KEPT_BYTES or len(idle) > KEPT_GRAMMARS):
            del self._compiled[idle.pop(0)]
            return_freed_memory()

    def _taken(self) -> int:
        return resident_bytes() - self._before

    def forget(self, rows: list[int], keys: list[str]) -> None:
        for row in rows:
            self._rows.pop(row, None)
        self._costly.difference_update(keys)
        with self._lock:
            self._used.difference_update(keys)
            self._let_go()

    def _follow(self, row: int, key: str, tokens: list[int]) -> Any:
        """The row's grammar, after its new tokens; None if it was not compiled."""
        if row not in self._rows:
            with self._lock:
                known = self._compiled.get(key)
            if known is None:
                return None
            self._rows[row] = known.deep_copy()
        matcher = self._rows[row]
        if tokens:
            matcher.consume_tokens(tokens)
        return matcher

    def foresee(self, tell: Tell) -> dict[int, list[int]]:
        """What each row can only go on with, where that is one text alone."""
        forced = {}
        for row, key, tokens in tell.rows:
            matcher = self._follow(row, key, tokens)
            if matcher is None or key in self._costly:
                continue
            began = time.thread_time()
            found = matcher.compute_ff_tokens()
            if len(found) > FORESEE_TOKENS or time.thread_time() - began > FORESEE_SECONDS:
                self._costly.add(key)
            elif found:
                forced[row] = found[:FORESEEN]
        return forced

    def mask(self, want: Want) -> dict[int, str]:
        """Write what may come next in each row, and after each token of its draft; errors by row."""
        errors: dict[int, str] = {}
        going = []
        for row, key, tokens, draft, place in want.rows:
            matcher = self._follow(row, key, tokens)
            if matcher is None:
                errors[row] = "its grammar was not compiled"
                continue
            self._masks[place : place + len(draft) + 1] = -1
            going.append((row, matcher, place, draft))
        memory = self._masks.ctypes.data, self._masks.shape[1] * MASK_BYTES, len(self._masks)
        plain = [(matcher, place) for _, matcher, place, draft in going if not draft]
        # Beyond a token of the draft that is not allowed nothing is written, and nothing is taken from there.
        drafted = [(matcher, place, draft) for _, matcher, place, draft in going if draft]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *memory)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *memory)
        for row, matcher, _, _ in going:
            if matcher.is_error():
                errors[row] = _sentence(str(matcher.get_error()))
        return errors


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _sentence(message: str) -> str:
    """Of what the library says its first line, and the reason where that follows on one of its own."""
    first, *rest = [line.strip() for line in message.splitlines() if line.strip()] or [
        "it cannot be followed"
    ]
    reasons = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    return " ".join([first, *reasons]).rstrip(".")[:300]


def load_tokenizer(folder: Path, vocabulary: int, eos_ids: list[int]) -> Any:
    """Which bytes each token of a base stands for.

    Raises:
        ValueError: they cannot be found out.
    """
    import llguidance

    file = folder / "tokenizer.json"
    if file.exists():
        text = file.read_text(encoding="utf-8")
    else:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = made.backend_tokenizer.to_str()
    # Under names that no text has: in a text, the name of a control token is letters.
    data = json.loads(text)
    secret = secrets.token_hex(16)
    special = [token["content"] for token in data["added_tokens"] if token["special"]]
    names = {content: f"<{secret}-{number}>" for number, content in enumerate(special)}
    return llguidance.LLTokenizer(renamed_json(data, names), n_vocab=vocabulary, eos_token=eos_ids)


def serve(sock: socket.socket, follower: Follower | None, reason: str) -> None:
    """Answer until the engine closes the socket; without a follower, `reason` to every grammar."""
    lock = threading.Lock()
    pool = ThreadPoolExecutor(COMPILING, thread_name_prefix="compile")
    reader, decoder = FrameReader(), request_decoder()

    def say(message: msgspec.Struct) -> None:
        with lock, suppress(OSError):
            sock.sendall(encode(message))

    def compile_one(order: Compile) -> None:
        say(Begun(order.key))
        say(follower.compile(order.key, order.grammar) if follower else Compiled(order.key, reason))

    say(Started())
    while data := sock.recv(1 << 16):
        for payload in reader.feed(data):
            message = decoder.decode(payload)
            if isinstance(message, Compile):
                pool.submit(compile_one, message)
            elif follower is None:
                logger.error("masks are wanted of a process without a tokenizer")
            elif isinstance(message, Want):
                say(Masks(message.number, follower.mask(message)))
            elif isinstance(message, Tell):
                say(Forced(message.number, follower.foresee(message)))
            else:
                follower.forget(message.rows, message.keys)


def main() -> None:
    parser = argparse.ArgumentParser(description="OneBase grammar process; the engine starts it.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the engine")
    parser.add_argument("--masks-fd", type=int, required=True, help="file descriptor of the masks' memory")
    parser.add_argument("--settings", required=True, help="JSON: folder, vocabulary, eos_ids, places, words")
    arguments = parser.parse_args()
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logs("grammars", logging.INFO)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = json.loads(arguments.settings)
    shape = settings["places"], settings["words"]
    memory = mmap.mmap(arguments.masks_fd, shape[0] * shape[1] * MASK_BYTES)
    masks = np.frombuffer(memory, dtype=np.int32).reshape(shape)
    follower: Follower | None = None
    reason = ""
    try:
        tokenizer = load_tokenizer(Path(settings["folder"]), settings["vocabulary"], settings["eos_ids"])
        follower = Follower(tokenizer, masks, resident_bytes())
    except Exception as error:
        logger.exception("no grammar can be followed")
        reason = f"this base's tokenizer cannot be used: {_sentence(str(error) or type(error).__name__)}"
    with socket.socket(fileno=arguments.fd) as sock:
        serve(sock, follower, reason)
    os._exit(0)  # whatever is still being compiled


if __name__ == "__main__":
    main()
