"""Tokens of conversations, and which of them are to be learned: by position, never by value.

A reply's tokens begin where the prompt that serving would send ends, so that the model learns to go on from
exactly those ids. They end with the token that stops a generation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onebase_adapters.training.base_tokens import BaseTokens
from onebase_adapters.training.conversation import Chat
from onebase_adapters.training.data_problems import RowError

_NO_TEMPLATE = (
    "the base has no chat template: bring prompt and completion, or text, or take a base that is made to chat"
)


@dataclass(frozen=True)
class Piece:
    """A tokenized row, or the part of a conversation up to one reply, where that must be learned by itself.

    spans: half-open ranges of positions in `ids` that are learned, ascending.
    prompt: number of tokens before the last reply; None where the row does not end in one.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    prompt: int | None = None


@dataclass(frozen=True)
class _Reply:
    """Character positions in a rendered conversation. marked: whether a control token ends the reply."""

    start: int
    stop: int
    marked: bool


class ChatTokens:
    """Conversations into tokens by the base's chat template, which writes all special tokens itself.

    everything: learn every token but the first, not the replies alone.
    """

    def __init__(self, base: BaseTokens, *, everything: bool = False) -> None:
        self._base = base
        self._everything = everything

    def render(self, chat: Chat) -> str:
        """The whole conversation as text. Raises RowError."""
        if not self._base.template:
            raise RowError("messages", _NO_TEMPLATE)
        self._check(chat)
        return self._render(chat, len(chat.messages), False)

    def pieces(self, chat: Chat, text: str, ids: list[int]) -> list[Piece]:
        """What to learn of a conversation: most often one piece. Raises RowError.

        Args:
            text: of `render`. ids: of the text.
        """
        if self._everything:
            return [Piece(ids, [(1, len(ids))], self._prompt(chat, text, ids))]
        stable: list[_Reply] = []
        alone: list[Piece] = []
        for index in chat.supervised:
            before, after = self._prefixes(chat, index, text)
            reply = self._reply(after, len(before))
            if text.startswith(after):
                stable.append(reply)
            else:
                # The template writes this reply otherwise once more follows, say without its thinking:
                # it is learned as it was when it was the last.
                alone.append(self._piece(after, self._base.encode([after])[0], [reply]))
        return [*alone, self._piece(text, ids, stable)] if stable else alone

    def _check(self, chat: Chat) -> None:
        """Refuse what the template would drop in silence, or take for its own marks."""
        if chat.tools and "tools" not in self._base.template:
            raise RowError("tools", "the base's chat template takes no tools: they would be lost")
        self._check_plain(chat.tools, "tools")
        for index, message in enumerate(chat.messages):
            field = f"messages[{index}]"
            if "tool_calls" in message and "tool_calls" not in self._base.template:
                reason = "the base's chat template takes no tool calls: they would be lost"
                raise RowError(f"{field}.tool_calls", reason)
            for key, value in message.items():
                self._check_plain(value, f"{field}.{key}")

    def _check_plain(self, value: Any, field: str) -> None:
        """Refuse control tokens in texts, and in keys, which templates write as well."""
        if isinstance(value, str):
            if found := self._base.special.search(value):
                reason = f"holds {found[0]!r}, which the base reads as a control token: take it out"
                raise RowError(field, f"{reason}, or bring the row as text")
        elif isinstance(value, dict):
            for key, part in value.items():
                self._check_plain(key, field)
                self._check_plain(part, field)
        elif isinstance(value, list):
            for part in value:
                self._check_plain(part, field)

    def _render(self, chat: Chat, count: int, generation: bool) -> str:
        """The first `count` messages as the template writes them."""
        try:
            text: str = self._base.tokenizer.apply_chat_template(
                chat.messages[:count], tools=chat.tools, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # a template is a program and fails in any way
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise RowError("messages", f"the base's chat template refuses them: {said}") from error
        return text

    def _prefixes(self, chat: Chat, index: int, text: str) -> tuple[str, str]:
        """The conversation up to a reply, ready for it; and with it."""
        if not index:
            raise RowError("messages[0]", "a reply to nothing: put a message before it, or give it weight 0")
        before = self._render(chat, index, True)
        after = text if index == len(chat.messages) - 1 else self._render(chat, index + 1, False)
        if not after.startswith(before):
            reason = "the base's chat template does not write this reply after its own generation prompt"
            raise RowError(f"messages[{index}]", f"{reason}: it cannot be told from the prompt")
        return before, after

    def _prompt(self, chat: Chat, text: str, ids: list[int]) -> int | None:
        last = len(chat.messages) - 1
        if not last or chat.messages[last]["role"] != "assistant":
            return None
        before, _ = self._prefixes(chat, last, text)
        return self._piece(text, ids, [self._reply(text, len(before))]).prompt

    def _reply(self, text: str, start: int) -> _Reply:
        """Up to the last control token that stops a generation; failing that, the last control token."""
        marks = list(self._base.special.finditer(text, start))
        stops = [mark for mark in marks if self._base.is_stop(mark[0])] or marks
        if stops:
            return _Reply(start, stops[-1].end(), True)
        return _Reply(start, max(start, len(text.rstrip())), False)

    def _piece(self, text: str, ids: list[int], replies: Sequence[_Reply]) -> Piece:
        """The replies' tokens. Where a token reaches over the border of a reply, the text is cut there."""
        spans = self._spans(text, ids, replies)
        if spans is None:
            ids, spans = self._cut(text, replies)
        if text[replies[-1].stop :].strip():
            return Piece(ids, spans)
        start, stop = spans[-1]
        if not replies[-1].marked and self._base.end is not None:
            ids = [*ids[:stop], self._base.end]
            spans = [*spans[:-1], (start, stop + 1)]
        return Piece(ids, spans, start)

    def _spans(self, text: str, ids: list[int], replies: Sequence[_Reply]) -> list[tuple[int, int]] | None:
        """The replies' positions in the ids of the whole text; None if a token reaches over a border.

        Control tokens are counted in the text and in the ids. What stands between the last one and a
        border is tokenized by itself, as in serving, and must be there.
        """
        marks = [(mark.start(), mark.end()) for mark in self._base.special.finditer(text)]
        at = [index for index, token in enumerate(ids) if token in self._base.special_ids]
        if len(marks) != len(at):
            return None
        starts = [start for start, _ in marks]

        def position(border: int) -> int | None:
            count = bisect_left(starts, border)
            if count and marks[count - 1][1] == border:
                return at[count - 1] + 1
            first = at[count - 1] if count else 0
            tail = self._base.tail(text[starts[count - 1] if count else 0 : border])
            return first + len(tail) if ids[first : first + len(tail)] == tail else None

        spans = []
        for reply in replies:
            start, stop = position(reply.start), position(reply.stop)
            if start is None or stop is None:
                return None
            spans.append((start, stop))
        return spans

    def _cut(self, text: str, replies: Sequence[_Reply]) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self._base.encode([text[: replies[0].start]])[0]
        spans = []
        ends = [*(reply.start for reply in replies[1:]), len(text)]
        for reply, following in zip(replies, ends, strict=True):
            start = len(ids)
            ids = ids + self._base.go_on(text[reply.start : reply.stop])
            spans.append((start, len(ids)))
            ids = ids + self._base.go_on(text[reply.stop : following])
        return ids, spans
