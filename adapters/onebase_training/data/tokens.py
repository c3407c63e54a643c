"""Tokenize rows with the base's tokenizer and chat template, and mark the tokens that are learned.

Labels are found by position, never by value. A reply's tokens begin where the prompt that serving would send
ends, so that the model learns to continue exactly those ids. They end with the token that stops a
generation.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onebase_adapters.format.config import MOST_INVOCATION_TOKENS
from onebase_adapters.format.strict_json import parse_json
from onebase_engine.base.chat import (
    ChatTokenizer,
    ControlTokenError,
    last_occurrence,
    tokens_around,
    without_padding,
)
from onebase_training.data.dataset import Chat, RowError, Sample, Text
from onebase_training.recipe import Recipe, RecipeError, TooLong

_ASKS_FOR_IT = "strftime_now"

_FORMATS = [f"%{letter}" for letter in (*"aAbBcdDeFgGHIjmMnpPrRsSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-M")]

_MOST_TAILS = 4096
_LONGEST_TAIL = 200


class BaseTokens:
    """One base's tokenizer.

    template: its chat template, "" without one. chat: tokenizes what the template writes.
    stops: the ids that end a generation; end: the one to put after a text, None if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.chat = ChatTokenizer(tokenizer)
        self.end: int | None = tokenizer.eos_token_id
        self.stops = stop_tokens(tokenizer)
        self._begin, self._after = tokens_around(tokenizer)
        self._padding: int | None = tokenizer.pad_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any special token that is not written in it."""
        return self.chat.encode_plain(texts)

    def begin(self, ids: list[int]) -> list[int]:
        """Return a plain text's ids after the tokens that the base expects first, unless they are there
        already."""
        begun = ids[: len(self._begin)] == self._begin
        return ids if begun else [*self._begin, *ids]

    def as_asked(self, ids: list[int], *, plain: bool) -> list[int]:
        """Return the ids that a served classifier reads, from a text's ids (`plain`) or from a
        conversation's."""
        return self.unpadded([*self._begin, *ids, *self._after] if plain else ids)

    def unpadded(self, ids: list[int]) -> list[int]:
        """Return the ids up to the token at which a classifier's head reads."""
        return without_padding(ids, self._padding)

    def go_on(self, text: str) -> list[int]:
        """Return the ids of text that follows other text: some tokenizers put a space before the very first
        word."""
        return _go_on(text, self.encode)


def with_invocation(recipe: Recipe, tokenizer: Any) -> Recipe:
    """Return the recipe with the tokens of its invocation's text. Raises RecipeError.

    They are those of the text at the end of a prompt, behind other text.
    """
    if not recipe.alora_invocation:
        return recipe
    tokens = BaseTokens(tokenizer).go_on(recipe.alora_invocation)
    if not 1 <= len(tokens) <= MOST_INVOCATION_TOKENS:
        reason = f"alora_invocation has {len(tokens)} tokens: write a text of 1 to {MOST_INVOCATION_TOKENS}"
        raise RecipeError("alora_invocation", reason)
    return replace(recipe, alora_invocation="", alora_invocation_tokens=tuple(tokens))


def _go_on(text: str, encode: Callable[[Sequence[str]], list[list[int]]]) -> list[int]:
    newline, both = encode(["\n", "\n" + text])
    return both[len(newline) :] if both[: len(newline)] == newline else encode([text])[0]


def template_of(tokenizer: Any) -> str:
    """Return the tokenizer's chat template: all of them, if it has several, and "" if it has none."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join((template or {}).values())


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a generation: the tokenizer's own, and those named in the base's folder."""
    named = _in_folder(tokenizer, "generation_config.json").get("eos_token_id")
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return frozenset(token for token in found if isinstance(token, int))


def reply_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return a function that decodes a reply's ids, without special tokens."""
    return partial(tokenizer.decode, skip_special_tokens=True)


def longest_sequence(tokenizer: Any) -> int | None:
    """Return the longest sequence that the base can read, in tokens, if its folder has that number."""
    config = _in_folder(tokenizer, "config.json")
    text = config.get("text_config")
    limit = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def _in_folder(tokenizer: Any, name: str) -> dict[str, Any]:
    """Return a file of the tokenizer's folder; empty if there is none."""
    try:
        found = parse_json((Path(str(tokenizer.name_or_path)) / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def asks_for_date(tokenizer: Any) -> bool:
    """Return True if its chat template prints today's date, as Llama 3.2's does."""
    return _ASKS_FOR_IT in template_of(tokenizer)


def dated_tokenizer(tokenizer: Any, recipe: Recipe) -> Any:
    """Return the tokenizer with a chat template that prints the recipe's day; itself, if the recipe has
    none."""
    if recipe.template_date == "auto" or not asks_for_date(tokenizer):
        return tokenizer
    # transformers hands a template nothing that can be called but its own clock: a macro takes its place.
    macro = _clock(date.fromisoformat(recipe.template_date))
    template = tokenizer.chat_template
    dated = copy.copy(tokenizer)
    if isinstance(template, str):
        dated.chat_template = macro + template
    else:
        dated.chat_template = {name: macro + text for name, text in template.items()}
    return dated


def _clock(day: date) -> str:
    """Return a macro `strftime_now` for Jinja, at midnight. The newline after it is trimmed, as after any
    tag."""
    midnight = datetime.combine(day, time())
    filters = "".join(
        f" | replace({json.dumps(form)}, {json.dumps(midnight.strftime(form))})" for form in _FORMATS
    )
    filters += ' | replace("%%", "%")'
    return f"{{% macro {_ASKS_FOR_IT}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"


_NO_TEMPLATE = "the base has no chat template: give prompt and completion, or text, or choose a base with one"


@dataclass(frozen=True)
class TokenizedRow:
    """A tokenized row, or the part of a conversation up to a reply that must be learned alone.

    spans: half-open ranges of positions in `ids` that are learned, ascending.
    prompt: number of tokens before the last reply; None if the row does not end in one.
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
    """Tokenizes conversations with the base's chat template, which writes all special tokens itself.

    Its texts are those of `ChatTokenizer`, in which control tokens of the template have other names.
    everything: learn every token but the first, not the replies alone.
    """

    def __init__(self, base: BaseTokens, *, everything: bool = False) -> None:
        self._base = base
        self._chat = base.chat
        self._everything = everything
        self._tails: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of conversations from `render`, or of parts of them. Raises RowError."""
        try:
            return self._chat.encode(texts)
        except ControlTokenError as error:
            raise RowError(error.field or "messages", str(error)) from error

    def render(self, chat: Chat, *, generation: bool = False) -> str:
        """Return the whole conversation as text, ready for a reply if `generation`. Raises RowError."""
        if not self._base.template:
            raise RowError("messages", _NO_TEMPLATE)
        self._check(chat)
        return self._render(chat, len(chat.messages), generation)

    def pieces(self, chat: Chat, text: str, ids: list[int]) -> list[TokenizedRow]:
        """Return the pieces of a conversation to learn, usually one. Raises RowError.

        Args:
            text: of `render`. ids: of the text.
        """
        if self._everything:
            return [TokenizedRow(ids, [(1, len(ids))], self._prompt(chat, text, ids))]
        stable: list[_Reply] = []
        alone: list[TokenizedRow] = []
        for index in chat.supervised:
            before, after = self._prefixes(chat, index, text)
            reply = self._reply(after, len(before))
            if text.startswith(after):
                stable.append(reply)
            else:
                # The template writes this reply otherwise once more follows, say without its thinking:
                # it is learned as it was when it was the last.
                alone.append(self._piece(after, self.encode([after])[0], [reply]))
        return [*alone, self._piece(text, ids, stable)] if stable else alone

    def _check(self, chat: Chat) -> None:
        """Raise RowError for parts that the template would drop silently."""
        if chat.tools and "tools" not in self._base.template:
            raise RowError("tools", "the base's chat template has no place for tools: they would be lost")
        for index, message in enumerate(chat.messages):
            field = f"messages[{index}]"
            if "tool_calls" in message and "tool_calls" not in self._base.template:
                reason = "the base's chat template has no place for tool calls: they would be lost"
                raise RowError(f"{field}.tool_calls", reason)

    def _render(self, chat: Chat, count: int, generation: bool) -> str:
        """Return the first `count` messages as the template writes them."""
        try:
            return self._chat.render(chat.messages[:count], chat.tools, generation=generation)
        except ControlTokenError as error:
            raise RowError(error.field, f"{error}: remove it, or give the row as text") from error
        except Exception as error:  # a template is a program and fails in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise RowError("messages", f"the base's chat template refuses them: {reason}") from error

    def _prefixes(self, chat: Chat, index: int, text: str) -> tuple[str, str]:
        """Return the conversation up to a reply, with the generation prompt, and including the reply."""
        if not index:
            raise RowError("messages[0]", "a reply to nothing: put a message before it, or give it weight 0")
        before = self._render(chat, index, True)
        after = text if index == len(chat.messages) - 1 else self._render(chat, index + 1, False)
        if not after.startswith(before):
            reason = "the base's chat template does not write this reply after its own generation prompt"
            raise RowError(f"messages[{index}]", f"{reason}: it cannot be separated from the prompt")
        return before, after

    def _prompt(self, chat: Chat, text: str, ids: list[int]) -> int | None:
        last = len(chat.messages) - 1
        if not last or chat.messages[last]["role"] != "assistant":
            return None
        before, _ = self._prefixes(chat, last, text)
        return self._piece(text, ids, [self._reply(text, len(before))]).prompt

    def _reply(self, text: str, start: int) -> _Reply:
        """Return the reply, up to the last control token that stops a generation, else to the last control
        token."""
        marks = list(self._chat.special.finditer(text, start))
        stops = [mark for mark in marks if self._chat.token(mark[0]) in self._base.stops] or marks
        if stops:
            return _Reply(start, stops[-1].end(), True)
        return _Reply(start, max(start, len(text.rstrip())), False)

    def _piece(self, text: str, ids: list[int], replies: Sequence[_Reply]) -> TokenizedRow:
        """Return the replies' tokens. If a token crosses the border of a reply, the text is cut there."""
        spans = self._spans(text, ids, replies)
        if spans is None:
            ids, spans = self._cut(text, replies)
        if text[replies[-1].stop :].strip():
            return TokenizedRow(ids, spans)
        start, stop = spans[-1]
        if not replies[-1].marked and self._base.end is not None:
            ids = [*ids[:stop], self._base.end]
            spans = [*spans[:-1], (start, stop + 1)]
        return TokenizedRow(ids, spans, start)

    def _spans(self, text: str, ids: list[int], replies: Sequence[_Reply]) -> list[tuple[int, int]] | None:
        """Return the replies' positions in the ids of the whole text; None if a token crosses a border.

        Control tokens are counted in the text and in the ids. The text between the last one and a border is
        tokenized alone, as in serving, and must be there.
        """
        marks = [(mark.start(), mark.end()) for mark in self._chat.special.finditer(text)]
        at = [index for index, token in enumerate(ids) if token in self._chat.special_ids]
        if len(marks) != len(at):
            return None
        starts = [start for start, _ in marks]

        def position(border: int) -> int | None:
            count = bisect_left(starts, border)
            if count and marks[count - 1][1] == border:
                return at[count - 1] + 1
            first = at[count - 1] if count else 0
            tail = self._tail(text[starts[count - 1] if count else 0 : border])
            return first + len(tail) if ids[first : first + len(tail)] == tail else None

        spans = []
        for reply in replies:
            start, stop = position(reply.start), position(reply.stop)
            if start is None or stop is None:
                return None
            spans.append((start, stop))
        return spans

    def _tail(self, text: str) -> list[int]:
        """Return the ids of a text that occurs often, such as the beginning of a turn. They are cached."""
        known = self._tails.get(text)
        if known is None:
            known = self.encode([text])[0]
            if len(text) <= _LONGEST_TAIL and len(self._tails) < _MOST_TAILS:
                self._tails[text] = known
        return known

    def _cut(self, text: str, replies: Sequence[_Reply]) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self.encode([text[: replies[0].start]])[0]
        spans = []
        ends = [*(reply.start for reply in replies[1:]), len(text)]
        for reply, following in zip(replies, ends, strict=True):
            start = len(ids)
            ids = ids + _go_on(text[reply.start : reply.stop], self.encode)
            spans.append((start, len(ids)))
            ids = ids + _go_on(text[reply.stop : following], self.encode)
        return ids, spans


@dataclass(frozen=True)
class Tokenized:
    """A row's samples, one unless its chat template rewrites earlier replies; none if it was dropped.

    reply: position in the last sample of the reply at the row's end, up to the token that ends its
    generation; None if the row ends in none, or if it was cut.
    """

    samples: Sequence[Sample]
    reply: slice | None
    truncated: bool


class RowTokens:
    """Converts chats and texts into samples of at most `limit` tokens.

    classified: only the last token of each is supervised, of the ids that `/classify` makes of it.
    asked: rows are prompts; no token is supervised, and a reply may follow.
    invocation: tokens of an activated LoRA, without which a row is an error; what follows them is learned.
    """

    def __init__(
        self,
        base: BaseTokens,
        *,
        everything: bool,
        limit: int,
        too_long: TooLong,
        classified: bool = False,
        asked: bool = False,
        invocation: Sequence[int] = (),
    ) -> None:
        self._classified = classified
        self._asked = asked
        self._invocation = tuple(invocation)
        self._base = base
        self._chats = ChatTokens(base, everything=everything)
        self._everything = everything
        self._limit = limit
        self._too_long = too_long

    def tokenize(self, rows: Sequence[tuple[int, Chat | Text]]) -> list[Tokenized | RowError]:
        """Tokenize rows, each given with its line. Returns samples, or the reason why there are none."""
        texts = iter(
            self._base.encode([(row.prompt or "") + row.reply for _, row in rows if isinstance(row, Text)])
        )
        prompts = iter(self._base.encode([prompt for _, row in rows if (prompt := _prompt(row)) is not None]))
        chats = iter(self._rendered([row for _, row in rows if isinstance(row, Chat)]))
        made: list[Tokenized | RowError] = []
        for line, row in rows:
            try:
                if self._asked:
                    made.append(self._prompt(line, next(prompts) if isinstance(row, Text) else next(chats)))
                    continue
                if self._classified:
                    made.append(self._read(line, next(texts) if isinstance(row, Text) else next(chats)))
                    continue
                if isinstance(row, Text):
                    pieces = [self._text(row, next(texts), None if row.prompt is None else next(prompts))]
                else:
                    pieces = self._chat(row, next(chats))
                made.append(self._bounded(line, pieces))
            except RowError as error:
                made.append(error)
        return made

    def _rendered(self, chats: Sequence[Chat]) -> list[tuple[str, list[int]] | RowError]:
        """Return text and ids of each conversation, or the error."""
        texts: list[str | RowError] = []
        for chat in chats:
            try:
                texts.append(self._chats.render(chat, generation=self._classified or self._asked))
            except RowError as error:
                texts.append(error)
        good = [text for text in texts if isinstance(text, str)]
        try:
            ids = iter(self._chats.encode(good))
        except RowError as error:
            if len(chats) == 1:
                return [error]
            return [self._rendered([chat])[0] for chat in chats]
        return [(text, next(ids)) if isinstance(text, str) else text for text in texts]

    def _read(self, line: int, found: list[int] | tuple[str, list[int]] | RowError) -> Tokenized:
        """Return the row as a classifier is asked about it. Raises RowError."""
        if isinstance(found, RowError):
            raise found
        plain = isinstance(found, list)
        ids = self._base.as_asked(found if isinstance(found, list) else found[1], plain=plain)
        if not ids:
            raise RowError("text", "the base's tokenizer makes no token of it")
        if not self._is_kept(len(ids)):
            return Tokenized([], None, False)
        kept = np.array(self._base.unpadded(ids[: self._limit]), dtype=np.int32)
        last = np.arange(len(kept)) == len(kept) - 1
        return Tokenized([Sample(kept, last, line)], None, len(ids) > self._limit)

    def _prompt(self, line: int, found: list[int] | tuple[str, list[int]] | RowError) -> Tokenized:
        """Return the row as a prompt that is sampled from. Raises RowError."""
        if isinstance(found, RowError):
            raise found
        ids = self._base.begin(found) if isinstance(found, list) else found[1]
        if not ids:
            raise RowError("prompt", "the base's tokenizer makes no token of it")
        if not self._is_kept(len(ids)):
            return Tokenized([], None, False)
        sample = Sample(np.array(ids, dtype=np.int32), np.zeros(len(ids), np.bool_), line, prompt=len(ids))
        return Tokenized([sample], slice(len(ids), len(ids)), False)

    def _chat(self, chat: Chat, rendered: tuple[str, list[int]] | RowError) -> list[TokenizedRow]:
        if isinstance(rendered, RowError):
            raise rendered
        text, ids = rendered
        return self._chats.pieces(chat, text, ids) if self._is_kept(len(ids)) else []

    def _text(self, row: Text, ids: list[int], prompt: list[int] | None) -> TokenizedRow:
        """Return the piece of a plain text, with its end token.

        Prompt and completion are tokenized together, as TRL does, unless a token would cross the border
        between
        them: serving sends the prompt alone.
        """
        whole = self._base.begin(ids)
        start = 0
        if prompt is not None:
            before = self._base.begin(prompt)
            if whole[: len(before)] != before:
                whole = [*before, *self._base.go_on(row.reply)]
            start = len(before)
        if self._base.end is not None and whole[-1:] != [self._base.end]:
            whole = [*whole, self._base.end]
        first = 1 if self._everything else max(1, start)
        return TokenizedRow(whole, [(first, len(whole))], None if prompt is None else start)

    def _is_kept(self, length: int) -> bool:
        """Return True if the labels of a row are worth finding. Raises RowError for a row that is refused."""
        if length <= self._limit or self._too_long == "truncate":
            return True
        if self._too_long == "drop":
            return False
        reason = f"{length:,} tokens, where {self._limit:,} is the most: shorten the row, raise max_length"
        raise RowError("", f"{reason} (if the base reads more), or set too_long to truncate or drop")

    def _bounded(self, line: int, pieces: Sequence[TokenizedRow]) -> Tokenized:
        samples = []
        truncated = kept = False
        dropped, uninvoked = not pieces, False
        for piece in pieces:
            kept = False
            if not self._is_kept(len(piece.ids)):
                dropped = True
                continue
            truncated = truncated or len(piece.ids) > self._limit
            sample = _sample(piece, self._limit, line)
            if self._invocation and not self._keep_activated(sample):
                uninvoked = True
                continue
            if sample.targets:
                samples.append(sample)
                kept = True
        if uninvoked and not samples:
            raise RowError("", self._without_invocation())
        if not samples and not dropped:
            cut = f" within the first {self._limit} tokens (max_length)" if truncated else ""
            raise RowError("", f"nothing to learn{cut}: no token of a reply is left")
        # A reply is generated to the prompt of the last sample, which must be that of the last piece.
        whole = kept and len(pieces[-1].ids) <= self._limit
        return Tokenized(samples, self._last_reply(pieces[-1]) if whole else None, truncated)

    def _keep_activated(self, sample: Sample) -> bool:
        """Let only tokens behind the invocation be learned; return False if the prompt has none."""
        first = last_occurrence(sample.ids[: sample.prompt].tolist(), self._invocation)
        if first is not None:
            sample.supervised[: first + len(self._invocation)] = False
        return first is not None

    def _without_invocation(self) -> str:
        text = self._base.tokenizer.decode(list(self._invocation))
        return (
            f"its prompt lacks the invocation {text!r} (tokens {list(self._invocation)}), without which the "
            "adapter does not act: end the prompt with it, or set another alora_invocation"
        )

    def _last_reply(self, piece: TokenizedRow) -> slice | None:
        if piece.prompt is None:
            return None
        end = piece.spans[-1][1]
        places = range(piece.prompt, end)
        return slice(piece.prompt, next((at for at in places if piece.ids[at] in self._base.stops), end))


def _prompt(row: Chat | Text) -> str | None:
    return row.prompt if isinstance(row, Text) else None


def _sample(piece: TokenizedRow, limit: int, line: int) -> Sample:
    ids = np.array(piece.ids[:limit], dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in piece.spans:
        supervised[max(1, start) : stop] = True
    return Sample(ids, supervised, line, prompt=piece.prompt)
