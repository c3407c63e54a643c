"""Tokenize conversations: control tokens come from the base's chat template, never from a message.

`<|im_start|>` in a message is text about a control token, and is tokenized letter by letter. To distinguish
what the template writes from what a message contains, the conversation is rendered with a mark inside each
occurrence in a message. The whole rendered text is then tokenized at once, so that nothing changes at the
seams, by a twin of the base's tokenizer which knows the control tokens by secret names only. Torch is not
imported here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from onebase_engine.machine import count_seconds, step_aside_in_thread

_RARE = [chr(point) for point in range(0xA000, 0xA48D)]
"""Letters of Yi: normalizers, filters and JSON writers of templates leave them, and so does Python's `repr`,
which a template calls that writes a list or an object as it is."""
_SECRET_CHARACTERS = 8
_ROLES_OF_THE_APPLICATION = ("assistant", "system", "developer")
_SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
_KEYS = frozenset(
    ("id", "type", "function", "name", "arguments", "parameters", "properties", "required", "description",
     "enum", "items", "anyOf", "oneOf", "allOf", "additionalProperties", "default", "title", "const",
     "format", "return", "response", "strict")
)  # fmt: skip
"""Keys of tools and tool calls that templates look up. They are exempt from the check for control tokens,
since `name` is part of StarCoder's `<reponame>`."""
_ENCODING = ("encode", "__call__", "_encode_plus")
"""Methods with which transformers' tokenizers encode. A class that has its own does more than its backend."""
LONG_CHARACTERS = 100_000
"""Length, in characters, above which texts are tokenized one call after the other, in the threads of the
tokenizers' library."""
_PADDING = "▁" + "".join(chr(point) for point in range(0x3001) if chr(point).isspace())
"""Characters that templates trim: all of Unicode's white space, and the tokenizers' mark for a space."""

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None
Options = Mapping[str, Any]
"""Additional variables of a chat template, such as Qwen3's `enable_thinking`."""
Look = Literal["none", "part", "whole"]
_NO_OPTIONS: Options = {}


class ControlTokenError(ValueError):
    """A message would become a control token, and this base's tokenizer has no other way to read it.

    field: where it stands, as in `messages[0].content`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class _Controls:
    """The texts of some control tokens, and how they can be found in another text, whole or in part."""

    def __init__(
        self, texts: Sequence[str], normalize: Callable[[str], str] | None, kept: Sequence[str] = ()
    ) -> None:
        """Compile the patterns of `texts`.

        Args:
            normalize: the tokenizer's normalizer, if it also looks for one of them in normalized text.
            kept: other control tokens, at which a template may cut a text, drop a piece and join the rest.
        """
        self._normalize = normalize
        needles = set(texts)
        if normalize is not None:
            needles |= {normalize(text).strip(_PADDING) or text for text in texts}
        self.pattern = _any_of(texts)
        self._kept = _any_of(kept, group=True) if kept else None
        self._any = _any_of(needles)
        self._beginnings = {needle[:2] for needle in needles}
        self._first = frozenset(needle[0] for needle in needles)
        self._last = frozenset(needle[-1] for needle in needles)
        self._longest = max(map(len, needles), default=0)
        self._prefixes = {needle[:end] for needle in needles for end in range(1, len(needle))}
        self._suffixes = {needle[start:] for needle in needles for start in range(1, len(needle))}
        self._joined = "\0".join(sorted(needles))

    def look(self, text: str) -> Look:
        """Return "whole" if a text holds a control token, "part" if its surroundings could complete one."""
        seen = {self._look(piece) for piece in self._pieces(text)}
        return "whole" if "whole" in seen else "part" if "part" in seen else "none"

    def marked(self, text: str, mark: str) -> str:
        """Return the text with a mark in each control token and, if it could be part of one, at its ends."""
        return "".join(self._marked(piece, mark) for piece in self._pieces(text))

    def inert(self, text: str) -> str:
        """Return the text with other letters in place of control tokens, and of parts of them at its ends."""
        return "".join(map(self._inert, self._pieces(text)))

    def _pieces(self, text: str) -> list[str]:
        return [text] if self._kept is None else self._kept.split(text)

    def _look(self, text: str) -> Look:
        for form in (text,) if self._normalize is None else (text, self._normalize(text)):
            if any(beginning in form for beginning in self._beginnings) and self._any.search(form):
                return "whole"
            if self._is_part(form.strip(_PADDING)):
                return "part"
        return "none"

    def _is_part(self, text: str) -> bool:
        longest = self._longest
        head, tail = text[:longest], text[-longest:]
        if not self._first.isdisjoint(tail) and any(tail[-n:] in self._prefixes for n in range(1, longest)):
            return True
        if not self._last.isdisjoint(head) and any(head[:n] in self._suffixes for n in range(1, longest)):
            return True
        return 0 < len(text) <= longest and text in self._joined

    def _marked(self, text: str, mark: str) -> str:
        if self._look(text) == "none":
            return text
        while self.pattern.search(text):  # they may overlap
            text = self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        inner = text.strip(_PADDING)
        return text.replace(inner, f"{mark}{inner}{mark}", 1) if self._is_part(inner) else text

    def _inert(self, text: str) -> str:
        text = self.pattern.sub(lambda found: _RARE[0] * len(found[0]), text)
        return re.sub(r"\S", _RARE[0], text) if self._look(text) != "none" else text


def encode_texts(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Return the ids of texts as a transformers tokenizer gives them, without what else it makes of a text.

    A long text takes half to two thirds of the processor time of `tokenizer(texts)`, and the interpreter's
    lock for a quarter as long.

    Args:
        tokenizer: the tokenizer, which is set to neither cut nor pad.
        texts: texts in which control tokens are recognized.
        special: whether the tokens that the base expects around a text are added.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or any(
        getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in _ENCODING
    ):  # it may make something else of its texts
        made: list[list[int]] = tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
        )["input_ids"]
        return made
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return _encode(backend, texts, special)


class _LibraryThreads:
    """Threads of the tokenizers' library, which compute what it is given at once if that is several texts.

    They hold no lock of the interpreter, so that with a high niceness they hold up nobody.
    """

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._ids: list[str] = []

    def step_aside(self) -> None:
        """Begin them, all with the niceness of the thread that calls for them first, which ends."""

        def begin() -> None:
            from tokenizers import Tokenizer, models

            step_aside_in_thread()
            Tokenizer(models.BPE()).encode_batch_fast(["", ""])

        before = os.listdir("/proc/self/task")
        first = threading.Thread(target=begin)
        first.start()
        first.join()
        self._ids = [one for one in os.listdir("/proc/self/task") if one not in before]

    def encode(self, backend: Any, texts: list[str], special: bool) -> list[Any]:
        """Return the encodings of texts, and count the processor time of these threads as this one's."""
        with self._one_at_a_time:
            before = self._seconds()
            made = backend.encode_batch_fast([*texts, ""], add_special_tokens=special)[:-1]
            count_seconds(self._seconds() - before)
        found: list[Any] = made
        return found

    def _seconds(self) -> float:
        nanoseconds = 0
        for one in self._ids:
            with suppress(OSError):  # not every kernel tells
                nanoseconds += int(Path(f"/proc/self/task/{one}/schedstat").read_text().split()[0])
        return nanoseconds / 1e9


_library_threads = _LibraryThreads()
_here = threading.local()
"""Has `is_aside`: see tokenized_aside."""


def begin_tokenizing_aside() -> None:
    """Begin the threads of `tokenized_aside`. Call it before anything is tokenized: the library begins its
    threads once."""
    _library_threads.step_aside()


@contextmanager
def tokenized_aside() -> Iterator[None]:
    """Have the processor time of long texts' tokens, which this thread asks for, spent with the niceness of
    what waits beside serving."""
    _here.is_aside = True
    try:
        yield
    finally:
        _here.is_aside = False


def _encode(backend: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if getattr(_here, "is_aside", False) and sum(map(len, texts)) > LONG_CHARACTERS:
        made = _library_threads.encode(backend, list(texts), special)
    else:
        made = backend.encode_batch_fast(list(texts), add_special_tokens=special)
    return [one.ids for one in made]


@dataclass(frozen=True)
class _Twin:
    """Twin of the base's tokenizer in which control tokens have other names. `ids` maps ids to the base's."""

    backend: Any
    ids: Mapping[int, int]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        made = _encode(self.backend, texts, special=False)
        return [[self.ids.get(token, token) for token in ids] for ids in made] if self.ids else made


class ChatTokenizer:
    """A base's tokenizer and chat template, for messages from untrusted authors.

    In all messages and tools, the tokenizer's special tokens are treated as letters. So are added tokens that
    the chat template names (`<tool_response>`, `<think>`), except in the application's own content: messages
    of the assistant and the system, where a generated reply returns unchanged.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._marks = _secret(), _secret()
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if _can_control(t.content)}
        special = {t.content: i for i, t in added.items() if t.special}
        named = {t.content: i for i, t in added.items() if _is_named(t.content, tokenizer)}
        self._ids = special | named
        normalize = _normalizer(self._backend, {text: added[i] for text, i in self._ids.items()})
        self._everywhere = _Controls(list(special), normalize, list(named.keys() - special.keys()))
        self._of_others = _Controls(list(self._ids), normalize)
        secret = _secret()
        names = {text: secret + _digits(index) for index, text in enumerate(self._ids)}
        self._twin = _twin(self._backend, names)
        if self._twin is not None and not self._agree(names):
            self._twin = None
        self._names = names if self._twin is not None else {text: text for text in names}
        self._id_of: dict[str, int] = {self._names[text]: token for text, token in self._ids.items()}
        self._secret = secret
        self._all = _any_of(self._id_of)
        self._checked = frozenset(self._ids.values()) - {tokenizer.unk_token_id}
        self.special_ids = frozenset(special.values())
        """Ids of the tokenizer's special tokens."""
        self.special = _any_of([self._names[text] for text in special])
        """Pattern of the special tokens' names in the result of `render`."""

    def token(self, name: str) -> int:
        """Return the id of a control token, by its name in the result of `render`."""
        return self._id_of[name]

    def is_plain(self, messages: Messages, tools: Tools = None, options: Options = _NO_OPTIONS) -> bool:
        """Return True if no text in them holds a control token or could be part of one."""
        found = _texts(messages, tools, options)
        return all(self._look(text, trusted) == "none" for _, text, trusted in found)

    def encode_messages(
        self, messages: Messages, tools: Tools = None, options: Options = _NO_OPTIONS
    ) -> list[int]:
        """Return the ids of a conversation, by default with the assistant's header at its end.

        The template writes all control tokens itself, so that none is there twice. Raises ControlTokenError,
        and what the template raises.
        """
        if self.is_plain(messages, tools, options):
            plain = self._write(messages, tools, {"add_generation_prompt": True, **options})
            return self.encode_plain([plain])[0]
        return self.encode([self.render(messages, tools, generation=True, options=options)])[0]

    def render(
        self,
        messages: Messages,
        tools: Tools = None,
        *,
        generation: bool,
        options: Options = _NO_OPTIONS,
    ) -> str:
        """Render the conversation for `encode` alone: control tokens have other names in the result.

        Raises ControlTokenError where the template's control tokens cannot be told from a message's text, and
        what the template raises.
        """
        options = {"add_generation_prompt": generation, **options}
        plain = self._write(messages, tools, options)
        found = [
            (field, text, seen)
            for field, text, trusted in _texts(messages, tools, options)
            if (seen := self._look(text, trusted)) != "none"
        ]
        if not found:
            return self._renamed(plain)

        def write(change: Callable[[_Controls, str], str]) -> str:
            return self._write(*self._changed(messages, tools, options, change))

        mark, other = self._marks
        text = write(lambda controls, part: controls.marked(part, mark))
        whole = [field for field, _, seen in found if seen == "whole"]
        if not whole and self._count(plain) == self._count(text):
            return self._renamed(plain)
        field = whole[0] if whole else found[0][0]

        def refused(why: str) -> ControlTokenError:
            return ControlTokenError(field, f"{self._shown(found)}, which {why}")

        if self._twin is None or any(one in part for _, part, _ in found for one in (self._secret, mark)):
            raise refused("this base reads as a control token")
        if self._count(text) != self._count(write(lambda controls, part: controls.inert(part))):
            raise refused("the chat template makes more of")
        if (bare := text.replace(mark, "")) != plain:
            # The template looked at what is said, and wrote it otherwise; or it cut a mark, or escaped it.
            again = write(lambda controls, part: controls.marked(part, other))
            if bare != again.replace(other, ""):
                raise refused("the chat template does not write as it is")
        return self._renamed(text).replace(mark, "")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts from `render`, or of parts of such texts. Raises ControlTokenError."""
        if self._twin is None:
            return self.encode_plain(texts)
        made = self._twin.encode(texts)
        for text, ids in zip(texts, made, strict=True):
            wanted = [
                token for name in self._all.findall(text) if (token := self._id_of[name]) in self._checked
            ]
            if wanted != [token for token in ids if token in self._checked]:
                raise ControlTokenError("", "this base's tokenizer makes a control token of other letters")
        return made

    def encode_letters(self, text: str) -> list[int]:
        """Return the ids of a plain text in which nothing is a control token, without BOS or EOS.

        Raises ControlTokenError.
        """
        if self._twin is None and self._of_others.look(text) == "whole":
            raise ControlTokenError("", "it holds what this base reads as a control token")
        (ids,) = self.encode([text])
        return ids

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which control tokens are recognized, without BOS or EOS."""
        if not texts:
            return []
        return encode_texts(self._tokenizer, texts)

    def _look(self, text: str, trusted: bool) -> Look:
        return (self._everywhere if trusted else self._of_others).look(text)

    def _changed(
        self, messages: Messages, tools: Tools, options: Options, change: Callable[[_Controls, str], str]
    ) -> tuple[list[Any], list[Any] | None, Options]:
        of_others = partial(change, self._of_others)
        of_application = partial(change, self._everywhere)
        made: list[Any] = []
        for message in messages:
            new = dict(message)
            for key in new.keys() - {"role"}:
                new[key] = _mapped(new[key], of_application if _is_trusted(message, key) else of_others)
            made.append(new)
        others = None if tools is None else _mapped(list(tools), of_others)
        return made, others, {key: _mapped(value, of_others) for key, value in options.items()}

    def _write(self, messages: Messages, tools: Tools, options: Options) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            **options,
        )
        return text

    def _count(self, text: str) -> Counter[str]:
        return Counter(self._of_others.pattern.findall(text))

    def _renamed(self, text: str) -> str:
        if self._twin is None:
            return text
        return self._of_others.pattern.sub(lambda found: self._names[found[0]], text)

    def _shown(self, found: Sequence[tuple[str, str, Look]]) -> str:
        """Describe, for an error message, what the refused texts hold."""
        whole = (self._of_others.pattern.search(text) for _, text, _ in found)
        first = next((each[0] for each in whole if each), None)
        return f"it holds {first!r}" if first else "it holds, with what stands next to it, a piece of text"

    def _agree(self, names: Mapping[str, str]) -> bool:
        """Return True if the twin encodes as the tokenizer does, and control tokens' texts as letters."""
        if self._twin is None:
            return False
        mine = "".join(f"{text}user\nIt is {text} 1{text}{text}\n" for text in names)
        twins = "".join(f"{name}user\nIt is {name} 1{name}{name}\n" for name in names.values())
        letters = self._twin.encode(["x".join(names), " ".join(names), *names])
        control = frozenset(self._ids.values()) - {self._tokenizer.unk_token_id}
        same = self._twin.encode([twins, "It is\n\n1"]) == self.encode_plain([mine, "It is\n\n1"])
        return same and not any(token in control for ids in letters for token in ids)


def tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after any text of its own accord, such as its BOS."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False)
    whole: list[int] = tokenizer.encode("a")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def without_padding(tokens: list[int], padding: int | None) -> list[int]:
    """Drop the padding at the end, since transformers' classifiers use the last token that is no padding."""
    count = len(tokens)
    while count > 1 and tokens[count - 1] == padding:
        count -= 1
    return tokens[:count]


def last_occurrence(tokens: list[int], wanted: Sequence[int]) -> int | None:
    """Return the index at which `wanted` begins for the last time in `tokens`; None if it is not there.

    PEFT looks for the invocation of an activated LoRA in the same way (`calculate_alora_offsets`).
    """
    wanted, found, start = list(wanted), None, -1
    with suppress(ValueError):
        while True:
            start = tokens.index(wanted[0], start + 1)
            if tokens[start : start + len(wanted)] == wanted:
                found = start
    return found


def _texts(messages: Messages, tools: Tools, options: Options) -> Iterator[tuple[str, str, bool]]:
    """Yield field, text and whether the application wrote it, for every text that a template may write."""
    for index, message in enumerate(messages):
        for key, value in message.items():
            if key == "role":
                continue
            trusted = _is_trusted(message, key)
            for text in (value,) if isinstance(value, str) else _strings(value):
                yield f"messages[{index}].{key}", text, trusted
    for text in _strings(tools):
        yield "tools", text, False
    for text in _strings(list(options.values())):
        yield "chat_template_kwargs", text, False


def _is_trusted(message: Mapping[str, Any], key: str) -> bool:
    return key in _SPOKEN and message.get("role") in _ROLES_OF_THE_APPLICATION


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a value, keys included, except the common keys in `_KEYS`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _KEYS:
                yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if key in _KEYS else _mapped(key, change): _mapped(part, change)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(part, change) for part in value]
    return value


def _can_control(text: str) -> bool:
    """Return False for white space (Gemma) and single characters, which are treated as letters."""
    return len(text.strip()) > 1


def _is_named(text: str, tokenizer: Any) -> bool:
    """Return True if the chat template names an added token."""
    chosen = getattr(tokenizer, "chat_control_tokens", None)
    if chosen is not None:
        return text in chosen
    template = tokenizer.chat_template
    templates = [template] if isinstance(template, str) else list((template or {}).values())
    return any(text in one for one in templates)


def _any_of(texts: Iterable[str], *, group: bool = False) -> re.Pattern[str]:
    """Compile a pattern that finds the longest of several texts that begins at a place.

    It is written as a tree, since a base may have hundreds of texts that begin alike. With `group` it is a
    capturing group, for `split`.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    pattern = _branches(tree) if tree else "(?!)"
    return re.compile(f"({pattern})" if group else pattern)


def _branches(tree: Mapping[str, Any]) -> str:
    ways = []
    for character, node in tree.items():
        written = re.escape(character)
        while len(node) == 1 and "" not in node:
            ((character, node),) = node.items()
            written += re.escape(character)
        if character:
            ways.append(written + (_branches(node) if node.keys() != {""} else ""))
    if len(ways) == 1 and "" not in tree:
        return ways[0]
    return f"(?:{'|'.join(ways)})" + ("?" if "" in tree else "")


def _secret() -> str:
    return "".join(secrets.choice(_RARE) for _ in range(_SECRET_CHARACTERS))


def _digits(index: int) -> str:
    """Write a number as two rare characters."""
    return _RARE[index // len(_RARE)] + _RARE[index % len(_RARE)]


def _normalizer(backend: Any, tokens: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return the tokenizer's normalizer if control tokens can come out of it. `tokens`: by their texts."""
    if backend is None or backend.normalizer is None:
        return None
    if not any(token.normalized for token in tokens.values()) and not _is_of_letters(backend.model, tokens):
        return None
    normalize: Callable[[str], str] = backend.normalizer.normalize_str
    return normalize


def _is_of_letters(model: Any, texts: Iterable[str]) -> bool:
    """Return True if the model may build one of these tokens from letters that nothing matched before."""
    from tokenizers import models

    merges = isinstance(model, models.BPE) and not model.ignore_merges
    return not merges and any(model.token_to_id(text) is not None for text in texts)


def _twin(backend: Any, names: Mapping[str, str]) -> _Twin | None:
    """Return the tokenizer with other names for its control tokens, or None if that cannot be built."""
    if backend is None:
        return None
    from tokenizers import Tokenizer, models

    model, added = backend.model, sorted(backend.get_added_tokens_decoder().items())
    if any(token.single_word for _, token in added if token.content in names):
        return None
    if isinstance(model, models.BPE) and not _is_of_letters(model, names):
        # The model itself can be shared; `_agree` looks that no merges lead to a control token.
        twin = Tokenizer(model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(backend, part) is not None:
                setattr(twin, part, getattr(backend, part))
        for special, some in groupby((token for _, token in added), lambda token: bool(token.special)):
            renamed = [_renamed_token(token, names) for token in some]
            (twin.add_special_tokens if special else twin.add_tokens)(renamed)
    else:
        twin = Tokenizer.from_str(renamed_json(json.loads(backend.to_str()), names))
    ids = {twin.token_to_id(names.get(token.content, token.content)): i for i, token in added}
    return _Twin(twin, {own: token for own, token in ids.items() if own is not None and own != token})


def _renamed_token(token: Any, names: Mapping[str, str]) -> Any:
    from tokenizers import AddedToken

    return AddedToken(
        names.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def renamed_json(data: dict[str, Any], names: Mapping[str, str]) -> str:
    """Return a tokenizer's file in which the model does not know the control tokens' texts either."""
    data.update(post_processor=None, truncation=None, padding=None)
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): token for text, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    return json.dumps(data)
