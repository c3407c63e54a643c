"""Harmony, the format of gpt-oss: an answer is a row of messages, each in a channel.

`analysis` is the thought, `commentary` has the calls of tools and what is said before them, `final` is the
answer. The prompt ends with `<|start|>assistant`, so that an answer begins within a message's header. The
format is described in https://github.com/openai/harmony/blob/main/docs/format.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onebase_engine.engine.messages import Grammar
from onebase_server.inference.thoughts import (
    KEYS,
    Message,
    Render,
    Thinking,
    ThoughtFormat,
    held,
)
from onebase_server.inference.tool_format import Schema, ToolChoice, ToolDefinition, ToolFormat, compact

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CONSTRAIN = "<|constrain|>"
_LAST = ("<|call|>", "<|return|>")
"""Control tokens that end an answer."""
_ENDS = (END, START, *_LAST)
"""Control tokens that end a message. The second one begins the next message already."""
_BEGINNINGS = (START, CHANNEL, "to=")
"""Beginnings of a header."""
_FUNCTIONS = "functions."
"""Namespace of the tools that a caller offers."""
FINAL_HEADER = f"{CHANNEL}final{MESSAGE}"
"""Text between a prompt and an answer without a thought."""
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts of reasoning that gpt-oss does not know, and the nearest that it knows."""
_PROBE = "probethought"


@dataclass(frozen=True)
class HarmonyFormat(ThoughtFormat):
    """Thoughts as messages of their own, in the channel `analysis`."""

    @property
    def answer_header(self) -> str:
        return FINAL_HEADER

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(self.controls[name] for name in _LAST if name in self.controls)

    def opened_by(self, tail: str) -> bool | None:
        return None

    def bounded(self, tokens: int, *, opened: bool) -> None:
        """Return None: several messages of an answer may be thoughts, and any of them the last."""
        return

    def reader(self, thinking: Thinking, *, calls: bool) -> HarmonyReader:
        return HarmonyReader(calls=calls)

    def effort(self, asked: str) -> str:
        return _EFFORTS.get(asked, asked)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Return messages as the template expects them: with one call at most in each, followed by its
        result, and one system message, at the beginning.

        Raises ValueError for a system message that the template would leave out.
        """
        made: list[Message] = []
        for message in _with_single_calls([self.with_thoughts(message) for message in messages]):
            if message["role"] == "system" and made:
                if len(made) > 1 or made[0]["role"] != "system":
                    raise ValueError(
                        "a system message stands behind others, and this base's chat template has a place "
                        "for one at the beginning alone"
                    )
                made[0]["content"] += f"\n\n{message['content']}"
                continue
            made.append(message)
        return made

    def with_thoughts(self, message: Mapping[str, Any]) -> Message:
        made = super().with_thoughts(message)
        key = self.key or KEYS[0]
        if made.get("tool_calls") and made.get(key) and made.get("content"):
            # The template has one place for what stands before a call.
            made |= {key: f"{made[key]}\n\n{made['content']}", "content": ""}
        return made

    def grammar(self, *, opened: bool, calls: bool = False) -> str:
        """Return the rules of the thoughts and of the answer's header: see Grammar.before.

        calls: whether the answer's own grammar has its header.
        """
        control = self.controls
        start, channel, message, end = (f"<[{control[name]}]>" for name in (START, CHANNEL, MESSAGE, END))
        header = "" if calls else f'{channel} "final" {message}'
        return "\n".join(
            [
                f'before: ({start} "assistant")? thought* {header}',
                f'thought: {channel} "analysis" {message} /(?s:.*)/ {end} {start} "assistant"',
            ]
        )


@dataclass(frozen=True)
class HarmonyTools(ToolFormat):
    """Calls as messages of their own: this is how HarmonyReader writes them, whichever way they came."""

    def grammar(
        self,
        tools: Mapping[str, ToolDefinition],
        choice: ToolChoice,
        *,
        parallel: bool,
        content: Schema | None = None,
    ) -> Grammar:
        """Keep what follows the thoughts of an answer to one call of these tools, or under `auto` to an
        answer. parallel: is not possible, as a call ends the answer."""
        control = self.controls
        start, channel, message, end = (f"<[{control[name]}]>" for name in (START, CHANNEL, MESSAGE, END))
        constrain = f"(<[{control[CONSTRAIN]}]>)?" if CONSTRAIN in control else ""
        said = "TEXT" if content is None else "content"
        rules = [
            f"start: said? {'call' if choice == 'required' else '(final | call)'}",
            f'said: {channel} "commentary" {message} TEXT {end} {start} "assistant"',
            f'final: {channel} "final" {message} {said}',
            f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}",
            f'kind: (/ ?/ {constrain} "json")? {message}',
            "TEXT: /(?s:.*)/",
        ]
        if content is not None:
            rules.append(f"content: %json {compact(content)}")
        for index, (name, tool) in enumerate(tools.items()):
            to = json.dumps(f"to={_FUNCTIONS}{name}", ensure_ascii=False)
            rules += [
                f'call_{index}: ({channel} "commentary " {to} | " " {to} {channel} "commentary")'
                f" kind args_{index}",
                *self._arguments(f"args_{index}", tool),
            ]
        return self._checked(rules)


def read_formats(render: Render, controls: Mapping[str, int]) -> tuple[HarmonyFormat, HarmonyTools] | None:
    """Return the formats of thoughts and of calls, or None if a template writes no Harmony."""
    if not {START, CHANNEL, MESSAGE, END} <= controls.keys():
        return None
    used = {
        name: controls[name] for name in (START, CHANNEL, MESSAGE, END, CONSTRAIN, *_LAST) if name in controls
    }
    opening = f"{CHANNEL}analysis{MESSAGE}"
    for key in KEYS:
        answer = {"role": "assistant", "content": "probecontent", key: _PROBE}
        try:
            text = render(
                [{"role": "user", "content": "probequestion"}, answer], tools=None, generation=False
            )
        except Exception:  # a template is a program and fails in any way
            continue
        if f"{opening}{_PROBE}{END}" in text and f"{FINAL_HEADER}probecontent" in text:
            thoughts = HarmonyFormat(opening, END, used, key, header=f"{START}assistant")
            head = f"{START}assistant to={_FUNCTIONS}"
            middle = f"{CHANNEL}commentary json{MESSAGE}"
            return thoughts, HarmonyTools(head, middle, None, "", START, None, used)
    return None


def _with_single_calls(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield messages so that each has one call at most, and the result of a call follows it."""
    left = iter(messages)
    message = next(left, None)
    while message is not None:
        calls, results = message.get("tool_calls") or (), list[Message]()
        following = next(left, None)
        while len(calls) > 1 and following is not None and following["role"] == "tool":
            results.append(following)
            following = next(left, None)
        for number, call in enumerate(calls):
            rest = {key: value for key, value in message.items() if number == 0 or key not in KEYS}
            yield rest | {"tool_calls": [call]} | ({"content": ""} if number else {})
            for result in [one for one in results if one.get("tool_call_id") == call.get("id")]:
                results.remove(result)
                yield result
        yield from results if calls else (message,)
        message = following


Part = Literal["thought", "answer", "call"]


class HarmonyReader:
    """Separates the thoughts of one answer from what is said and called, as it comes.

    Texts that are no header, such as those of an adapter that writes no channels, are the answer.

    calls: whether calls are looked for. They are handed out as HarmonyTools has them; else their arguments
    are text.
    """

    interleaved = True
    """Whether thoughts may come behind text of the answer."""

    def __init__(self, *, calls: bool) -> None:
        self._calls = calls
        self._rest = ""
        self._part: Part | None = None
        """Part that the message is of; None in a header."""
        self._first = True
        self._ended = False
        self._said: dict[Part, int] = {"thought": 0, "answer": 0, "call": 0}
        """Messages of each part that have begun."""
        self.thinks = False
        """Whether there is a thought."""
        self.start: int | None = None
        """0 once the answer, or a call, has begun: its text is counted apart from the thought's."""

    @property
    def inside(self) -> bool:
        """Return True in a thought, or in a header."""
        return self._part in (None, "thought")

    def feed(self, text: str, *, end: bool = False) -> tuple[str, str]:
        """Return what of the thoughts and of the answer is certain with this text."""
        self._rest = "" if self._ended else self._rest + text
        thought, answer = "", ""
        while True:
            begun = self._begin(end) if self._part is None else ""
            if begun is None:
                return thought, answer
            answer += begun if self._part != "thought" else ""
            thought += begun if self._part == "thought" else ""
            part = self._part
            found, ended = self._read(end)
            if part == "thought":
                thought += found
            else:
                answer += found
            if not ended or self._ended:
                return thought, answer

    def _begin(self, end: bool) -> str | None:
        """Read a header, and return what stands before its message's text; None: it is not whole."""
        text = self._rest.lstrip()
        no_header = self._first and text and not any(text.startswith(one[: len(text)]) for one in _BEGINNINGS)
        if no_header or (self._first and end and text and not text.startswith(_BEGINNINGS)):
            self._first = False
            return self._enter("answer")
        at = self._rest.find(MESSAGE)
        if at < 0:
            if end:
                self._rest = ""
            return None
        header, self._rest = self._rest[:at], self._rest[at + len(MESSAGE) :]
        self._first = False
        channel = _CHANNEL.search(header)
        called = _RECIPIENT.search(header)
        if called and called[1].startswith(_FUNCTIONS) and self._calls:
            self._enter("call")
            name = called[1].removeprefix(_FUNCTIONS)
            return f"{START}assistant to={_FUNCTIONS}{name}{CHANNEL}commentary json{MESSAGE}"
        return self._enter("thought" if channel and channel[1] == "analysis" else "answer")

    def _enter(self, part: Part) -> str:
        """Begin a part, and return what separates it from an earlier one of its kind."""
        self._part = part
        self.thinks = self.thinks or part == "thought"
        if part != "thought":
            self.start = 0
        self._said[part] += 1
        return "\n\n" if self._said[part] > 1 and part != "call" else ""

    def _read(self, end: bool) -> tuple[str, bool]:
        """Return the certain text of a message, and whether the message has ended."""
        at, mark = min(((at, mark) for mark in _ENDS if (at := self._rest.find(mark)) >= 0), default=(-1, ""))
        if at < 0:
            unsure = 0 if end else max(held(self._rest, mark, space=False) for mark in _ENDS)
            found, self._rest = self._rest[: len(self._rest) - unsure], self._rest[len(self._rest) - unsure :]
            return found, False
        found, self._rest = self._rest[:at], self._rest[at + len(mark) :]
        self._part = None
        self._ended = mark in _LAST
        return found, True


_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([A-Za-z0-9_.:/-]+)")
