"""Render chat templates that came with adapters, in a process that is killed when one takes too long.

A template is a program. Jinja's sandbox keeps it from Python, but not from running for ever or filling the
memory. So the process has a limit of memory, writes no file, and is confined like that which talks to the
Hub. The api sends one request at a time as a line of JSON, and reads one line of JSON back.
"""

from __future__ import annotations

import json
import os
import resource
import select
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.hub.confinement import confine
from onebase_edge.errors import UnavailableError
from onebase_engine.environment import computing_environment
from onebase_engine.machine import BESIDE_SERVING, count_seconds, step_aside

CALL_SECONDS = 2.0
"""Processor time, in seconds, that one rendering may take."""
READING_SECONDS = 4.0
"""Processor time, in seconds, until it is known how a template writes thoughts and calls of tools."""
STUCK_SECONDS = 30.0
"""Longest time of one rendering that gets no processor."""
LOOK_SECONDS = 0.1
START_SECONDS = 60.0
"""Longest time until a new process is ready."""
MEMORY_BYTES = 1 << 30
"""Memory that the process may use for templates."""
MOST_BYTES = 32 << 20
"""Largest answer, in bytes."""
LONGEST_TEXT = 1 << 20
"""Characters that a template may write besides as many as the request has."""
MOST_REFUSED = 1000
"""Number of templates remembered as too slow, which are not tried again."""

_COMMAND = [sys.executable, "-P", "-m", "onebase_server.inference.own_templates"]


class OwnTemplateError(ValueError):
    """A template that came with an adapter cannot be rendered; the message says why."""


@dataclass
class Budget:
    """Processor time that is left for all that is rendered to read how a template writes."""

    seconds: float = READING_SECONDS


class OwnTemplates:
    """The process, started when it is first needed. Thread-safe; calls wait for one another.

    Methods raise UnavailableError if the process cannot be used now, whatever the template.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: dict[str, None] = {}

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        budget: Budget | None = None,
    ) -> str:
        """Return the text that a template writes. A template that exceeds its budget is refused from then on.

        Raises OwnTemplateError, UnavailableError.
        """
        call = {"template": template, "messages": list(messages), "tools": tools, "options": dict(options)}
        line = _line(call)
        text = self._call(template, line, budget)
        if not isinstance(text, str):
            raise OwnTemplateError("the adapter's chat template wrote no text")
        most = LONGEST_TEXT + len(line)
        if len(text) > most:  # a tokenizer takes hundreds of bytes for each
            raise OwnTemplateError(
                f"the adapter's chat template wrote {len(text)} characters, and {most} are read at most"
            )
        return text

    def options(self, template: str, budget: Budget | None = None) -> frozenset[str]:
        """Return the variables of a template that a caller may set.

        Raises OwnTemplateError, UnavailableError.
        """
        found = self._call(template, _line({"template": template}), budget)
        return frozenset(str(name) for name in found) if isinstance(found, list) else frozenset()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _call(self, template: str, line: bytes, budget: Budget | None) -> Any:
        with self._lock:
            if template in self._refused:
                raise _too_slow()
            answer = self._answer(template, line, budget)
        if not isinstance(answer, dict) or "error" in answer:
            said = answer.get("error") if isinstance(answer, dict) else None
            raise OwnTemplateError(f"the adapter's chat template refuses: {said}")
        return answer.get("result")

    def _answer(self, template: str, line: bytes, budget: Budget | None, *, again: bool = True) -> Any:
        most = CALL_SECONDS if budget is None else min(CALL_SECONDS, budget.seconds)
        process = self._started()
        before = _cpu_seconds(process.pid)
        try:
            try:
                answer = _asked(process, line, STUCK_SECONDS, most)
            finally:
                used = _cpu_seconds(process.pid) - before
                count_seconds(used)
        except _TookMoreError:
            self._kill()
            self._refuse(template)
            raise _too_slow() from None
        except TimeoutError as error:
            self._kill()
            raise _unavailable(error) from None
        except OSError as error:
            self._kill()
            if again:  # it may have been killed from outside
                return self._answer(template, line, budget, again=False)
            raise OwnTemplateError(f"the adapter's chat template cannot be used: {error}") from None
        except ValueError as error:
            self._kill()
            raise OwnTemplateError(f"the adapter's chat template cannot be used: {error}") from None
        if budget is not None:
            budget.seconds -= used
            if budget.seconds <= 0:
                self._refuse(template)
        return answer

    def _refuse(self, template: str) -> None:
        self._refused[template] = None
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        try:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=computing_environment(),
                bufsize=0,
            )
        except OSError as error:
            raise _unavailable(error) from None
        step_aside(self._process.pid, BESIDE_SERVING)
        try:
            _asked(self._process, b"", START_SECONDS)
        except (OSError, ValueError) as error:
            self._kill()
            raise _unavailable(error) from None
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _line(call: Mapping[str, Any]) -> bytes:
    return json.dumps(call).encode() + b"\n"


def _too_slow() -> OwnTemplateError:
    return OwnTemplateError(
        f"the adapter's chat template takes more than {CALL_SECONDS:g} s, or more than {READING_SECONDS:g} s "
        "until it is known how it writes"
    )


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"The process for adapters' chat templates cannot be used now: {error}. Try again.",
        code="adapter_unavailable",
        retry_after=1.0,
    )


class _TookMoreError(Exception):
    """A call used more of a processor than it may."""


def _asked(
    process: subprocess.Popen[bytes], line: bytes, seconds: float, cpu_seconds: float = float("inf")
) -> Any:
    """Send a line and return the answer's value.

    Raises:
        _TookMoreError: the process used more than `cpu_seconds` of a processor.
        TimeoutError: the process does not answer within `seconds`.
        OSError: it has ended.
        ValueError: it says too much.
    """
    if process.stdin is None or process.stdout is None:
        raise OSError("it has no pipes")
    until, before = time.monotonic() + seconds, _cpu_seconds(process.pid)
    found = bytearray()
    left = memoryview(line)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if left:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while not found.endswith(b"\n"):
            ready = selector.select(LOOK_SECONDS)
            if not ready and _cpu_seconds(process.pid) - before > cpu_seconds:
                raise _TookMoreError
            if not ready and time.monotonic() > until:
                raise TimeoutError(f"it did not answer within {seconds:g} s")
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    left = left[os.write(process.stdin.fileno(), left[: 1 << 16]) :]
                    if not left:
                        selector.unregister(process.stdin)
                    continue
                data = os.read(process.stdout.fileno(), 1 << 16)
                found += data
                if not data:
                    raise BrokenPipeError("it took too much memory, or failed")
                if len(found) > MOST_BYTES:
                    raise ValueError(f"it writes more than {MOST_BYTES} bytes")
    return json.loads(found)


def _cpu_seconds(pid: int) -> float:
    """Return the time of a processor that a process has used; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the process -------------------------------------------------------------------------------------


def main() -> None:
    from onebase_server.inference.tokenization import leave_torch_out

    leave_torch_out()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from transformers.utils import chat_template_utils  # noqa: F401  (so that no call waits for it)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    confine([], [], file_bytes=0)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("{}", file=out, flush=True)
    for line in sys.stdin.buffer:
        try:
            answer = {"result": _answer(json.loads(line))}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=out, flush=True)


def _end_with_parent() -> None:
    """End the process when the api has closed its pipe, whatever a template does."""
    pipe = select.poll()
    pipe.register(sys.stdin.fileno(), 0)  # a pipe without a writer is reported anyway
    pipe.poll()
    os._exit(1)


def _answer(call: dict[str, Any]) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    from onebase_server.inference.tokenization import options_of

    if "messages" not in call:
        return sorted(options_of(call["template"]))
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in call["messages"]
    ]
    rendered, _ = render_jinja_template(
        conversations=[messages], tools=call["tools"], chat_template=call["template"], **call["options"]
    )
    return rendered[0]


if __name__ == "__main__":
    main()
