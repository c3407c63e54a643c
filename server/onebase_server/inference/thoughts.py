"""Thoughts of bases that think before they answer: how a chat template writes them, and where they end.

The base's own chat template says how a thought is written, as it says how calls of tools are: an answer with
a thought in it is rendered, and what stands around the thought is the format. Where a template writes no
thoughts of earlier answers, its generation prompt or its text names the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from onebase_engine.engine.messages import Grammar, ThoughtBudget

Render = Callable[..., str]
"""A template: messages, tools and generation (keywords), and variables to text."""
Message = dict[str, Any]

KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
"""Names of a message's thought in chat templates, in the order in which they are looked for."""
BLOCKS = "content"
"""Stands for the name of a thought that a template expects as a block of the content (Mistral's)."""
TAIL_TOKENS = 256
"""Tokens at a prompt's end in which its generation prompt is looked for."""
_THOUGHT, _CONTENT, _QUESTION = "probethought", "probecontent", "probequestion"
_TAG = r"<[^<>\s]{1,60}>|\[/?[A-Z][A-Z_ ]{1,40}\]"
"""Pattern of marks that are no control tokens."""
_THINKS = re.compile(r"<(?:\w+:)?think(?:ing)?>|\[THINK\]|<\|START_THINKING\|>|</(?:\w+:)?think(?:ing)?>")
_SWITCHES: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", True, False),
    ("thinking", True, False),
    ("reasoning", True, False),
    ("thinking_mode", "enabled", "disabled"),
    ("thinking_budget", -1, 0),
    ("reasoning_effort", "high", "none"),
    ("reasoning_effort", "high", "no_think"),
)
"""Variables of chat templates that switch thinking on and off, with their values for it."""
_BUDGETS = ("thinking_budget", "reasoning_budget")


@dataclass(frozen=True)
class Switch:
    """Variable of a chat template that says whether to think."""

    name: str
    on: Any
    off: Any
    default: bool
    """Whether the base thinks where the variable is not given."""


@dataclass(frozen=True)
class ThoughtFormat:
    """An answer with a thought: opening THOUGHT closing ANSWER, with white space between any two.

    Control tokens are written by their own texts.
    """

    opening: str
    closing: str
    controls: Mapping[str, int]
    """Ids of the control tokens in the two, by their texts."""
    key: str | None = None
    """Name of an earlier answer's thought in a message; BLOCKS if it is a part of the content; None if the
    template writes none."""
    header: str = ""
    """Text with which the generation prompt begins an answer, before any mark of a thought."""
    switch: Switch | None = None
    budget: str | None = None
    """Variable of the chat template for the largest number of tokens of a thought."""

    @property
    def shown(self) -> frozenset[int]:
        """Control tokens without which thoughts cannot be read."""
        return frozenset(self.controls.values())

    @property
    def answer_header(self) -> str:
        """Text between a prompt and an answer without a thought."""
        return ""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, whether or not the base's config has them."""
        return ()

    def reader(self, thinking: Thinking, *, calls: bool) -> AnyThoughtReader:
        """Return the reader of one answer. calls: whether it may call tools."""
        return ThoughtReader(thinking)

    def effort(self, asked: str) -> str:
        """Return the effort of reasoning that the template knows for one that is asked for."""
        return asked

    def is_on(self, options: Mapping[str, Any]) -> bool:
        """Return True if the base may think with these variables of its chat template."""
        if self.switch is None:
            return True
        value = options.get(self.switch.name)
        return self.switch.default if value is None else value != self.switch.off

    def opened_by(self, tail: str) -> bool | None:
        """Return whether the text at a prompt's end opens a thought (True), or opens and closes one (False).

        None: it does neither, and the answer may begin with the opening.
        """
        if self.header and self.header in tail:
            begun = tail[tail.rindex(self.header) + len(self.header) :]
        else:
            begun = self.opening if tail.rstrip().endswith(self.opening) else ""
        opens, closes = begun.rfind(self.opening), begun.rfind(self.closing)
        return None if opens == closes == -1 else opens > closes

    def bounded(self, tokens: int, *, opened: bool) -> ThoughtBudget | None:
        """Return the bound of a thought to so many tokens, or None where no token ends thoughts.

        opened: whether the prompt opens the thought. If not, a token has to begin it, too.
        """
        end = self.controls.get(self.closing)
        begins = [token for name, token in self.controls.items() if self.opening.startswith(name)]
        if end is None or not (opened or begins):
            return None
        return ThoughtBudget(tokens, end, None if opened else begins[0])

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Return messages as the template expects them. Raises ValueError for those that it leaves out."""
        return [self.with_thoughts(message) for message in messages]

    def with_thoughts(self, message: Mapping[str, Any]) -> Message:
        """Return a message with its thought as the template names it, or without where it writes none."""
        made, thought = without_thought(message), message.get(KEYS[0])
        if not thought or self.key is None:
            return made
        if self.key != BLOCKS:
            return made | {self.key: thought}
        text = [{"type": "text", "text": made["content"]}] if made["content"] else []
        return made | {"content": [{"type": "thinking", "thinking": thought}, *text]}

    def grammar(self, *, opened: bool, calls: bool = False) -> str:
        """Return the rules of what stands before an answer: see Grammar.before.

        Args:
            opened: whether the prompt opens the thought. If not, there may be one.
            calls: whether the answer may call tools.
        """
        token = self.controls.get(self.closing)
        letters = "letters[lazy]: /(?s:.*)/ " + _quoted(self.closing)
        if token is None:
            rules = ["thought: letters space", letters]
        else:  # written letter by letter it ends as well: the reader sees no difference
            rules = [f"thought: (inside <[{token}]> | letters) space", "inside: /(?s:.*)/", letters]
        begin = (
            "thought" if opened else f"(({self._literal(self.opening)} | {_quoted(self.opening)}) thought)?"
        )
        return "\n".join([f"before: {begin}", *rules, "space: /[ \\n]{0,4}/"])

    def _literal(self, text: str) -> str:
        """Return the text as a grammar writes it, with control tokens by id."""
        names = sorted(self.controls, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return " ".join(
            f"<[{self.controls[part]}]>" if part in self.controls else _quoted(part) for part in parts if part
        )


@dataclass(frozen=True)
class Thinking:
    """Thought that an answer may begin with. opened: whether the prompt has opened it already."""

    format: ThoughtFormat
    opened: bool
    on: bool = True
    """Whether the base is to think: if not, a grammar of the answer has no place for a thought."""
    bound: ThoughtBudget | None = None

    def before(self, grammar: Grammar | None, *, calls: bool = False) -> Grammar | None:
        """Return the grammar of an answer with its thought: it describes what follows that.

        calls: whether the answer may call tools.
        """
        if grammar is None or not self.on:
            return grammar
        return Grammar(grammar.kind, grammar.text, self.format.grammar(opened=self.opened, calls=calls))


def without_thought(message: Mapping[str, Any]) -> Message:
    return {key: value for key, value in message.items() if key != KEYS[0]}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ---- an answer's text --------------------------------------------------------------------------


class AnyThoughtReader(Protocol):
    """Reader that separates the thoughts of one answer from the rest of its text as it comes."""

    thinks: bool
    start: int | None
    interleaved: bool

    @property
    def inside(self) -> bool: ...

    def feed(self, text: str, *, end: bool = False) -> tuple[str, str]: ...


class ThoughtReader:
    """Separates one answer's thought from the rest of its text as it comes.

    Only a thought at the very beginning is one; the white space around the two is no part of them.
    """

    interleaved = False
    """Whether thoughts may come behind text of the answer."""

    def __init__(self, thinking: Thinking) -> None:
        self._format = thinking.format
        self._rest = ""
        self._at = 0
        self._begun = False
        self.thinks = thinking.opened
        """Whether there is a thought."""
        self.inside = thinking.opened
        """Whether it has not ended."""
        self.start: int | None = None
        """Offset in the whole text at which the answer begins; None: it has not begun."""

    def feed(self, text: str, *, end: bool = False) -> tuple[str, str]:
        """Return what of the thought and of the answer is certain with this text."""
        if self.start is not None:
            return "", text
        self._rest += text
        thought = ""
        if not self.thinks:
            self._open(end)
        if self.inside:
            thought = self._think(end)
        if self.thinks and not self.inside:
            self._skip_space()
            if self._rest:
                self.start = self._at
        if self.start is None:
            return thought, ""
        answer, self._rest = self._rest, ""
        return thought, answer

    def _open(self, end: bool) -> None:
        opening = self._format.opening
        text = self._rest.lstrip()
        if text.startswith(opening):
            self.thinks = self.inside = True
            self._skip(len(self._rest) - len(text) + len(opening))
        elif end or not opening.startswith(text):
            self.start = self._at

    def _think(self, end: bool) -> str:
        if not self._begun:
            self._skip_space()
        closing = self._format.closing
        at = self._rest.find(closing)
        if at >= 0:
            self.inside = False
            thought = self._rest[:at].rstrip()
            self._skip(at + len(closing))
            return thought
        thought = self._rest.rstrip() if end else self._rest[: len(self._rest) - held(self._rest, closing)]
        self._begun = self._begun or bool(thought)
        self._skip(len(thought))
        return thought

    def _skip_space(self) -> None:
        self._skip(len(self._rest) - len(self._rest.lstrip()))

    def _skip(self, characters: int) -> None:
        self._rest = self._rest[characters:]
        self._at += characters


def held(text: str, marker: str, *, space: bool = True) -> int:
    """Return how many characters at the end may begin a marker, with the white space before them."""
    held = next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)
    before = text[: len(text) - held]
    return held + (len(before) - len(before.rstrip()) if space else 0)


# ---- how a template writes a thought -----------------------------------------------------------


def read_format(
    render: Render, template: str, controls: Mapping[str, int], variables: Iterable[str]
) -> ThoughtFormat | None:
    """Return a template's format of thoughts, or None if it writes none that can be separated.

    Args:
        template: its text.
        controls: ids of the base's added tokens, by their texts.
        variables: variables that a caller may set.
    """
    known = frozenset(variables)
    prompts = {name: _generation_prompt(render, {name: on}) for name, on, _ in _SWITCHES if name in known}
    plain = _generation_prompt(render, {})
    found = _rendered_format(render, controls, known)
    if found is None:
        found = _named_format(template, [plain, *prompts.values()], controls)
    if found is None or _begins_any_answer(render, found):
        return None
    return replace(
        found,
        header=_header(render, found, plain),
        switch=_switch(render, found, known, plain),
        budget=next((name for name in _BUDGETS if name in known), None),
    )


def _generation_prompt(render: Render, options: Mapping[str, Any]) -> str:
    """Return the prompt of a question, or an empty text if the template fails."""
    try:
        return render([{"role": "user", "content": _QUESTION}], tools=None, generation=True, **options)
    except Exception:  # a template is a program and fails in any way
        return ""


def _rendered_format(
    render: Render, controls: Mapping[str, int], known: frozenset[str]
) -> ThoughtFormat | None:
    """Return the format of a thought in an earlier answer, if the template writes any."""
    for key, answer, options in _probes(known):
        try:
            text = render(
                [{"role": "user", "content": _QUESTION}, answer], tools=None, generation=False, **options
            )
        except Exception:  # a template is a program and fails in any way
            continue
        at = text.rfind(_THOUGHT)
        if at < 0:
            continue
        before = text[text.rfind(_QUESTION, 0, at) + len(_QUESTION) : at]
        after, content, _ = text[at + len(_THOUGHT) :].partition(_CONTENT)
        made = _around(before, after, controls, text, called="tool_calls" in answer)
        if made is not None and (content or "tool_calls" in answer):
            return replace(made, key=key)
    return None


def _probes(known: frozenset[str]) -> Iterator[tuple[str, Message, Message]]:
    """Yield names of a thought, answers that have one by that name, and variables to render them with."""
    switches: list[Message] = [{}, *({name: on} for name, on, _ in _SWITCHES if name in known)]
    call = {"id": "probeid01", "type": "function", "function": {"name": "probe", "arguments": {}}}
    blocks = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _CONTENT}]
    for options in switches:
        for key in KEYS:
            answer = {"role": "assistant", "content": _CONTENT, key: _THOUGHT}
            yield key, answer, options
            yield key, answer | {"tool_calls": [call]}, options
        yield BLOCKS, {"role": "assistant", "content": blocks}, options


def _around(
    before: str, after: str, controls: Mapping[str, int], text: str, *, called: bool
) -> ThoughtFormat | None:
    """Return the format whose marks stand at the end of a text and at the beginning of another.

    None where the thought is a message or a channel of its own: then more than marks, or calls, follows it.
    """
    tag = "|".join([*map(re.escape, sorted(controls, key=len, reverse=True)), _TAG])
    ends = re.match(rf"\s*({tag})(?=\s|{tag}|\Z)" + ("" if called else rf"(?:\s|{tag})*\Z"), after)
    begins = re.search(rf"({tag})([^<>\[\]]*)\Z", before)
    if ends is None or begins is None or _ends_a_turn(ends[1], text, controls):
        return None
    return _made(f"{begins[1]}{begins[2]}".strip(), ends[1], controls)


def _begins_any_answer(render: Render, format: ThoughtFormat) -> bool:
    """Return True if an answer without a thought has the opening too, and no closing (Apriel's)."""
    try:
        answer = {"role": "assistant", "content": _CONTENT}
        text = render([{"role": "user", "content": _QUESTION}, answer], tools=None, generation=False)
    except Exception:  # a template is a program and fails in any way
        return False
    begun = text[text.rfind(_QUESTION) : text.rfind(_CONTENT)]
    return format.opening in begun and format.closing not in begun


def _ends_a_turn(mark: str, text: str, controls: Mapping[str, int]) -> bool:
    """Return True if a mark ends the user's message too."""
    after = text[text.find(_QUESTION) + len(_QUESTION) :].lstrip()
    return mark in controls and after.startswith(mark)


def _named_format(template: str, prompts: Sequence[str], controls: Mapping[str, int]) -> ThoughtFormat | None:
    """Return the format whose marks are named by a generation prompt, or by the template's text."""
    for text in (*(prompt[prompt.rfind(_QUESTION) :] for prompt in prompts), template):
        for found in _THINKS.finditer(text):
            opening = found[0].replace("</", "<")
            closing = opening.replace("START", "END")
            if closing == opening:
                closing = f"{opening[0]}/{opening[1:]}"
            if closing in template:
                return _made(opening, closing, controls)
    channel, closing = "<|channel>", "<channel|>"  # which Gemma's first templates only drop
    return (
        _made(f"{channel}thought", closing, controls)
        if {channel, closing} <= controls.keys() and (channel in template and closing in template)
        else None
    )


def _made(opening: str, closing: str, controls: Mapping[str, int]) -> ThoughtFormat:
    used = {name: token for name, token in controls.items() if name in opening or name == closing}
    return ThoughtFormat(opening, closing, used)


def _header(render: Render, format: ThoughtFormat, prompt: str) -> str:
    """Return what the generation prompt writes before any mark of a thought."""
    try:
        before = render([{"role": "user", "content": _QUESTION}], tools=None, generation=False)
    except Exception:  # a template is a program and fails in any way
        return ""
    begun = prompt.removeprefix(before) if prompt.startswith(before) else prompt[prompt.rfind(_QUESTION) :]
    return begun.split(format.opening)[0].split(format.closing)[0].removeprefix(_QUESTION).strip()


def _switch(render: Render, format: ThoughtFormat, known: frozenset[str], plain: str) -> Switch | None:
    """Return the variable by which the template's prompt, or an answer in it, changes."""
    for name, on, off in _SWITCHES:
        if name not in known:
            continue
        with_it, without = _generation_prompt(render, {name: on}), _generation_prompt(render, {name: off})
        if without and with_it and with_it != without:
            return Switch(name, on, off, default=plain != without)
    return None
