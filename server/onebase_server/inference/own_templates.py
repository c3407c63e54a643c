"""Render chat templates that came with adapters, in a process that is killed when one takes too long.

A template is a program. Jinja's sandbox keeps it from Python, but not from running for ever or filling the
memory. So the process has a limit of memory, writes no file, and is confined like that which talks to the
Hub. Calls and answers are JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.hub.confinement import confine
from onebase_edge.errors import UnavailableError
from onebase_server.processes.helper import HelperProcess, TookTooMuchError, serve_calls, take_pipes

CALL_SECONDS = 2.0
"""Processor time, in seconds, that one rendering may take."""
READING_SECONDS = 4.0
"""Processor time, in seconds, until it is known how a template writes thoughts and calls of tools."""
STUCK_SECONDS = 30.0
"""Longest time of one rendering that gets no processor."""
MEMORY_BYTES = 1 << 30
"""Memory that the process may use for templates."""
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
        self._helper = HelperProcess()
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
        encoded = _encoded(call)
        text = self._call(template, encoded, budget)
        if not isinstance(text, str):
            raise OwnTemplateError("the adapter's chat template wrote no text")
        most = LONGEST_TEXT + len(encoded)
        if len(text) > most:  # a tokenizer takes hundreds of bytes for each
            raise OwnTemplateError(
                f"the adapter's chat template wrote {len(text)} characters, and {most} are read at most"
            )
        return text

    def options(self, template: str, budget: Budget | None = None) -> frozenset[str]:
        """Return the variables of a template that a caller may set.

        Raises OwnTemplateError, UnavailableError.
        """
        found = self._call(template, _encoded({"template": template}), budget)
        return frozenset(str(name) for name in found) if isinstance(found, list) else frozenset()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._helper.kill()

    def _call(self, template: str, call: bytes, budget: Budget | None) -> Any:
        with self._lock:
            if template in self._refused:
                raise _too_slow()
            answer = self._answer(template, call, budget)
        if not isinstance(answer, dict) or "error" in answer:
            said = answer.get("error") if isinstance(answer, dict) else None
            raise OwnTemplateError(f"the adapter's chat template refuses: {said}")
        return answer.get("result")

    def _answer(self, template: str, call: bytes, budget: Budget | None, *, again: bool = True) -> Any:
        most = CALL_SECONDS if budget is None else min(CALL_SECONDS, budget.seconds)
        try:
            self._helper.start(_COMMAND)
        except (OSError, ValueError) as error:
            raise _unavailable(error) from None
        try:
            answer = json.loads(self._helper.call(call, STUCK_SECONDS, cpu_seconds=most))
        except TookTooMuchError:
            self._refuse(template)
            raise _too_slow() from None
        except TimeoutError as error:
            raise _unavailable(error) from None
        except OSError as error:
            if again:  # it may have been killed from outside
                return self._answer(template, call, budget, again=False)
            raise OwnTemplateError(f"the adapter's chat template cannot be used: {error}") from None
        except ValueError as error:
            raise OwnTemplateError(f"the adapter's chat template cannot be used: {error}") from None
        if budget is not None:
            budget.seconds -= self._helper.seconds
            if budget.seconds <= 0:
                self._refuse(template)
        return answer

    def _refuse(self, template: str) -> None:
        self._refused[template] = None
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]


def _encoded(call: Mapping[str, Any]) -> bytes:
    return json.dumps(call).encode()


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


# ---- the process -------------------------------------------------------------------------------------


def main() -> None:
    from onebase_server.inference.tokenization import leave_torch_out

    leave_torch_out()
    calls, answers = take_pipes()
    from transformers.utils import chat_template_utils  # noqa: F401  (so that no call waits for it)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    confine([], [], file_bytes=0)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    serve_calls(calls, answers, _encoded_answer)


def _encoded_answer(call: bytes) -> bytes:
    try:
        answer = {"result": _answer(json.loads(call))}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    return json.dumps(answer).encode()


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
