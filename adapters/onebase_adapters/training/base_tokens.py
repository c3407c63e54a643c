"""The base's tokenizer as training needs it: ids of text in bulk, control tokens, and what ends a reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onebase_adapters.format.strict_json import parse_json

_MOST_TAILS = 4096
_LONGEST_TAIL = 200


class BaseTokens:
    """One base's tokenizer.

    template: its chat template, "" without one. special: finds control tokens in a text.
    stops: the ids that end a generation; end: the one to put after a text, None if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self._ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.special_ids = frozenset(self._ids.values())
        self.end: int | None = tokenizer.eos_token_id
        self.stops = stop_tokens(tokenizer)
        self._tails: dict[str, list[int]] = {}
        self._begin = self._first_tokens()

    def is_stop(self, text: str) -> bool:
        """Whether a control token, by its text, ends a generation."""
        return self._ids.get(text) in self.stops

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any special token that is not written in it."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
        )["input_ids"]
        return ids

    def begin(self, ids: list[int]) -> list[int]:
        """A plain text's ids after the tokens that the base expects first, unless they are there already."""
        begun = ids[: len(self._begin)] == self._begin
        return ids if begun else [*self._begin, *ids]

    def go_on(self, text: str) -> list[int]:
        """Ids of text that follows other text: some tokenizers put a space before the first word of all."""
        newline, both = self.encode(["\n", "\n" + text])
        return both[len(newline) :] if both[: len(newline)] == newline else self.encode([text])[0]

    def tail(self, text: str) -> list[int]:
        """Ids of a text that comes again and again, such as the beginning of a turn."""
        known = self._tails.get(text)
        if known is None:
            known = self.encode([text])[0]
            if len(text) <= _LONGEST_TAIL and len(self._tails) < _MOST_TAILS:
                self._tails[text] = known
        return known

    def _first_tokens(self) -> list[int]:
        """What the tokenizer puts before a plain text: most often nothing, or its BOS."""
        bare = self.encode(["a"])[0]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        for count in range(len(whole) - len(bare) + 1):
            if whole[count : count + len(bare)] == bare:
                return whole[:count]
        return []


def template_of(tokenizer: Any) -> str:
    """Its chat template; all of them, if it has several, and "" if it has none."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join((template or {}).values())


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that end a generation: the tokenizer's own, and those that the base's folder names."""
    named = _in_folder(tokenizer, "generation_config.json").get("eos_token_id")
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return frozenset(token for token in found if isinstance(token, int))


def longest_sequence(tokenizer: Any) -> int | None:
    """The most tokens that the base can read, where its folder says it."""
    config = _in_folder(tokenizer, "config.json")
    text = config.get("text_config")
    limit = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def _in_folder(tokenizer: Any, name: str) -> dict[str, Any]:
    """A file of the folder that the tokenizer comes from; empty if there is none."""
    try:
        found = parse_json((Path(str(tokenizer.name_or_path)) / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
