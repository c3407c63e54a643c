"""The processes that compile and follow grammars: `python -m onebase_engine.engine.grammar_process`.

This command is the template: it loads the base's tokenizer and forks a process for each socket that the
engine sends it (`grammar_link.py`). Grammars come from anybody, so a fork has nothing but that socket, the
tokenizer and, where it follows a tenant's grammars, memory for masks that the engine reads. Its memory has a
limit, its work has a lower priority than the engine, and it ends with the template, which ends with the
engine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import mmap
import os
import re
import resource
import secrets
import signal
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from onebase_engine.base.chat import renamed_json
from onebase_engine.engine.grammar_link import (
    FORESEEN,
    MASK_BYTES,
    THREADS,
    WHITESPACE,
    Compile,
    Compiled,
    Forced,
    MaskRequest,
    Masks,
    Started,
    TokensDrawn,
    request_decoder,
)
from onebase_engine.engine.messages import FrameReader, Grammar, encode
from onebase_engine.logs import set_up_logs
from onebase_engine.machine import return_freed_memory, step_aside_in_thread

MEMORY_BYTES = 4 << 30
"""Addresses of one process, beyond which it ends."""
KEPT_BYTES = 64 << 20
"""Memory that grammars of one tenant may take while nobody uses them."""
KEPT_GRAMMARS = 1000
MOST_BYTES = 256 << 20
"""Memory that all grammars of one tenant may take."""
MOST_PATTERNS = 8
"""Patterns that one text of a JSON schema may have to match at once. The library finds out whether any text
matches them all, which takes about six times as long for each two more: 0.1 s for 16, 2.6 s for 20."""
MOST_PARTS = 100_000
"""Parts of a JSON schema that are looked at for patterns, references followed."""
FORESEE_TOKENS, FORESEE_SECONDS = 512, 0.05
"""Longest forced text of a sequence, in tokens, and most seconds of a processor to find it. A longer text
takes too much, and as much again for each mask of a draft, so that nothing is foreseen in its grammar
again."""
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Matchers:
    """The grammars that are compiled, and where in its own each sequence is."""

    def __init__(self, tokenizer: Any, masks: np.ndarray, before: int) -> None:
        import llguidance

        self._library = llguidance
        self._tokenizer = tokenizer
        self._masks = masks
        self._executor: Any = None
        """Begins its threads, which a fork does not have, with the first masks."""
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._used: set[str] = set()
        self._sequences: dict[int, Any] = {}
        self._costly: set[str] = set()
        """Grammars in which nothing is foreseen, see FORESEE_TOKENS."""
        self._lock = threading.Lock()
        self._before = before

    def compile(self, key: str, grammar: Grammar, *, kept_only: bool = False) -> Compiled:
        """Compile and keep a grammar, or say what is wrong with it."""
        with self._lock:
            self._used.add(key)
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return Compiled(key, None)
            if kept_only:
                self._used.discard(key)
                return Compiled(key, "it is not kept", busy=True, not_kept=True)
        try:
            matcher = self._matcher(grammar)
        except BaseException as error:  # what panics in Rust is no Exception
            with self._lock:
                self._used.discard(key)
            return Compiled(key, _sentence(str(error) or type(error).__name__))
        with self._lock:
            self._compiled[key] = matcher
            self._evict()
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
        """Return a grammar in the library's notation. Raises ValueError, and whatever the library raises."""
        text = self._text_source(grammar)
        if not grammar.before:
            return text
        found = json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}
        whole = f"%llguidance {{}}\nstart: before @answer\n{grammar.before}"
        return json.dumps(
            {"grammars": [{"name": "whole", "lark_grammar": whole}, {**found, "name": "answer"}]}
        )

    def _text_source(self, grammar: Grammar) -> str:
        matcher = self._library.LLMatcher
        if grammar.kind == "json_schema":
            check_patterns(json.loads(grammar.text))
            return str(
                matcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
            )
        if grammar.kind == "regex":
            return str(matcher.grammar_from_regex(grammar.text))
        for found in re.finditer(r"%json\s*(?={)", grammar.text):
            with suppress(json.JSONDecodeError):  # the library says what is wrong with it
                check_patterns(json.JSONDecoder().raw_decode(grammar.text, found.end())[0])
        if grammar.kind == "lark" or "::=" not in grammar.text:
            return str(matcher.grammar_from_lark(grammar.text))
        from llguidance.gbnf_to_lark import gbnf_to_lark

        return str(matcher.grammar_from_lark(gbnf_to_lark(grammar.text)))

    def _evict(self) -> None:
        """Drop the least recently used grammars that no sequence follows, until the rest fits."""
        idle = [key for key in self._compiled if key not in self._used]
        while idle and (self._taken() > KEPT_BYTES or len(idle) > KEPT_GRAMMARS):
            del self._compiled[idle.pop(0)]
            return_freed_memory()

    def _taken(self) -> int:
        return resident_bytes() - self._before

    def forget(self, sequences: list[int], keys: list[str]) -> None:
        for number in sequences:
            self._sequences.pop(number, None)
        self._costly.difference_update(keys)
        with self._lock:
            self._used.difference_update(keys)
            self._evict()

    def _follow(self, number: int, key: str, tokens: list[int]) -> Any:
        """Return a sequence's grammar after its new tokens, or None if it was not compiled."""
        if number not in self._sequences:
            with self._lock:
                known = self._compiled.get(key)
            if known is None:
                return None
            self._sequences[number] = known.deep_copy()
        matcher = self._sequences[number]
        if tokens:
            matcher.consume_tokens(tokens)
        return matcher

    def foresee(self, drawn: TokensDrawn) -> dict[int, list[int]]:
        """Return the tokens that each sequence must continue with, where that is one text."""
        forced = {}
        for number, key, tokens in drawn.sequences:
            matcher = self._follow(number, key, tokens)
            if matcher is None or key in self._costly:
                continue
            began = time.thread_time()
            found = matcher.compute_ff_tokens()
            if len(found) > FORESEE_TOKENS or time.thread_time() - began > FORESEE_SECONDS:
                self._costly.add(key)
            elif found:
                forced[number] = found[:FORESEEN]
        return forced

    def mask(self, request: MaskRequest) -> dict[int, str]:
        """Write the masks of each sequence and of each token of its draft. Return errors by number."""
        errors: dict[int, str] = {}
        going = []
        for number, key, tokens, draft, place in request.sequences:
            matcher = self._follow(number, key, tokens)
            if matcher is None:
                errors[number] = "its grammar was not compiled"
                continue
            self._masks[place : place + len(draft) + 1] = -1
            going.append((number, matcher, place, draft))
        if self._executor is None:
            # Its threads have the priority of the one that makes it.
            with ThreadPoolExecutor(1, initializer=step_aside_in_thread) as pool:
                count = min(THREADS, os.cpu_count() or 1)
                self._executor = pool.submit(self._library.LLExecutor, count).result()
        memory = self._masks.ctypes.data, self._masks.shape[1] * MASK_BYTES, len(self._masks)
        plain = [(matcher, place) for _, matcher, place, draft in going if not draft]
        # Beyond a token of the draft that is not allowed nothing is written, and nothing is taken from there.
        drafted = [(matcher, place, draft) for _, matcher, place, draft in going if draft]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *memory)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *memory)
        for number, matcher, _, _ in going:
            if matcher.is_error():
                errors[number] = _sentence(str(matcher.get_error()))
        return errors


def check_patterns(root: Any) -> None:
    """Raise ValueError if one text has to match more than MOST_PATTERNS patterns of a JSON schema at once.

    Patterns meet where several schemas apply to one value: by `allOf`, by a reference with other keywords
    beside it, and below these under the same key. What is not seen here, such as a `patternProperties` that
    meets `properties`, ends with the time that a trial may take.
    """
    looked_at = 0

    def resolve(reference: Any) -> Any:
        found = root
        for part in str(reference).removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def patterns(schema: Any, following: tuple[str, ...] = ()) -> Counter[tuple[str, ...]]:
        """Return how many patterns meet at each place below a schema, by the keys that lead there."""
        nonlocal looked_at
        looked_at += 1
        if looked_at > MOST_PARTS:
            raise ValueError(
                f"it has more than {MOST_PARTS} parts, references followed; use fewer references"
            )
        found: Counter[tuple[str, ...]] = Counter()
        if not isinstance(schema, dict):
            return found
        found[()] += ("pattern" in schema) + ("format" in schema)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#") and reference not in following:
            found += patterns(resolve(reference), (*following, reference))
        for part in _parts(schema.get("allOf")):
            found += patterns(part, following)
        for keyword in ("anyOf", "oneOf"):
            found += _largest(patterns(part, following) for part in _parts(schema.get(keyword)))
        below = {
            **{f".{name}": part for name, part in _items(schema.get("properties"))},
            **{f"/{name}": part for name, part in _items(schema.get("patternProperties"))},
            **{f"[{number}]": part for number, part in enumerate(_parts(schema.get("prefixItems")))},
            "/": schema.get("additionalProperties"),
            "[]": schema.get("items"),
        }
        for step, part in below.items():
            for place, count in patterns(part, following).items():
                found[(step, *place)] += count
        return found

    most = max(patterns(root).values(), default=0)
    if most > MOST_PATTERNS:
        raise ValueError(
            f"one text has to match {most} patterns and formats at once, and at most {MOST_PATTERNS} are "
            "allowed; put them into one pattern"
        )


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _largest(counters: Iterable[Counter[tuple[str, ...]]]) -> Counter[tuple[str, ...]]:
    """Return the largest count of each place."""
    found: Counter[tuple[str, ...]] = Counter()
    for counter in counters:
        found |= counter
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


_REWORDED = {
    r"oneOf constraints are not supported\. Enable 'coerce_one_of' option .*": "oneOf is not supported where "
    "more than one of its schemas may hold; write anyOf",
    r"Unimplemented keys: \[(.*)\]": r"not supported: \1",
    r"Unknown format: (\S+)": r"the format \1 is not supported; leave it out",
}
"""Advice of the library to programs that call it, and what a caller can do instead."""


def _sentence(message: str) -> str:
    """Return the first line of a message of the library, and the reason if it stands on a line of its own."""
    first, *rest = [line.strip() for line in message.splitlines() if line.strip()] or [
        "it cannot be followed"
    ]
    reasons = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    told = " ".join([first, *reasons])
    for theirs, ours in _REWORDED.items():
        told = re.sub(theirs, ours, told)
    return told.rstrip(".")[:300]


def load_tokenizer(folder: Path, vocabulary: int, eos_ids: list[int]) -> Any:
    """Load the bytes that each token of a base stands for.

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


def serve(sock: socket.socket, matchers: Matchers) -> None:
    """Answer until the engine closes the socket. One thread compiles, so that masks are not waited for."""
    lock = threading.Lock()
    # What only answers has the engine's priority.
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile", initializer=step_aside_in_thread)
    reader, decoder = FrameReader(), request_decoder()

    def send(message: msgspec.Struct) -> None:
        with lock, suppress(OSError):
            sock.sendall(encode(message))

    def compile_one(message: Compile) -> None:
        try:
            began = time.thread_time()
            compiled = matchers.compile(message.key, message.grammar, kept_only=message.kept_only)
            send(msgspec.structs.replace(compiled, seconds=time.thread_time() - began))
        except BaseException:
            logger.exception("a grammar was not compiled")
            os._exit(1)  # who waits for the answer sees that none will come

    send(Started(os.getpid()))
    while data := sock.recv(1 << 16):
        for payload in reader.feed(data):
            message = decoder.decode(payload)
            if isinstance(message, Compile):
                pool.submit(compile_one, message)
            elif isinstance(message, MaskRequest):
                send(Masks(message.number, matchers.mask(message)))
            elif isinstance(message, TokensDrawn):
                send(Forced(message.number, matchers.foresee(message)))
            else:
                matchers.forget(message.sequences, message.keys)


def fork(control: socket.socket, files: list[int], tokenizer: Any, shape: tuple[int, int]) -> None:
    """Fork a process that serves a socket, the first file, and writes masks to the second, if there is
    one."""
    try:
        parent = os.fork() != 0
    except OSError:
        logger.exception("no process for grammars can be started")
        parent = True  # the end of the socket says it
    if parent:
        for file in files:
            os.close(file)
        return
    try:
        _end_with_parent()
        control.close()
        size = shape[0] * shape[1] * MASK_BYTES if len(files) > 1 else MASK_BYTES
        memory = mmap.mmap(files[1] if len(files) > 1 else -1, size)
        masks = np.frombuffer(memory, dtype=np.int32).reshape(shape if len(files) > 1 else (1, 1))
        with socket.socket(fileno=files[0]) as sock:
            serve(sock, Matchers(tokenizer, masks, resident_bytes()))
    finally:
        os._exit(0)  # whatever is still being compiled


def _end_with_parent() -> None:
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description="OneBase grammar processes; the engine starts them.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the engine")
    parser.add_argument("--settings", required=True, help="JSON: folder, vocabulary, eos_ids, places, words")
    arguments = parser.parse_args()
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears up after forks
    set_up_logs("grammars", logging.INFO)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = json.loads(arguments.settings)
    with socket.socket(fileno=arguments.fd) as control:
        try:
            tokenizer = load_tokenizer(Path(settings["folder"]), settings["vocabulary"], settings["eos_ids"])
        except Exception as error:
            logger.exception("no grammar can be followed")
            reason = _sentence(str(error) or type(error).__name__)
            control.send(f"this base's tokenizer cannot be used: {reason}".encode())
            control.recv(1)  # until the engine has read it
            return
        gc.freeze()  # what forks share is not written to when they look for garbage
        while True:
            message, files, _, _ = socket.recv_fds(control, 16, 2)
            if not message:
                return
            fork(control, files, tokenizer, (settings["places"], settings["words"]))


if __name__ == "__main__":
    main()
