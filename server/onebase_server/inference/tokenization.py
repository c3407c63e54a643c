"""The base's own tokenizer, as the api needs it: prompts to ids, ids to text, chat by the base's template."""

from __future__ import annotations

import copy
import logging
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from onebase_adapters.format.added_tokens import TOKENIZER_FILE, BaseVocabulary, vocabulary_digests
from onebase_adapters.format.config import AdapterFormatError
from onebase_edge.errors import InvalidRequestError, UnavailableError
from onebase_edge.settings import RawControlTokens
from onebase_engine.base.chat import (
    ChatTokenizer,
    ControlTokenError,
    encode_texts,
    tokenized_aside,
    tokens_around,
)
from onebase_engine.imports import quick_imports
from onebase_engine.machine import return_freed_memory
from onebase_protocol.adapters import TokenizerAdditions
from onebase_server.inference import harmony, thoughts
from onebase_server.inference.detokenizer import BytePieces, PieceDecoder, ShownPieces, WindowPieces
from onebase_server.inference.harmony import HarmonyFormat, HarmonyTools
from onebase_server.inference.own_templates import Budget, OwnTemplateError, OwnTemplates
from onebase_server.inference.thoughts import Switch, ThoughtFormat
from onebase_server.inference.tool_format import ToolFormat, UnreadableCallsError, read_format, reason_of

T = TypeVar("T")
U = TypeVar("U")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


_GENERATION_BLOCK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks for training, which a template may have and plain Jinja does not know."""
_THINKS = re.compile(r"\b(?:reasoning_content|thinking)\b")
"""Pattern of the names that thoughts have in chat templates."""
MOST_TOKENIZERS = 64
"""Number of adapters' tokenizers that are kept."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_OWN_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "raise_exception",
        "strftime_now",
    }
)
"""Variables that every chat template gets anyway."""


@dataclass(frozen=True)
class TemplateInput:
    """Input of a chat template. options: further variables."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class TokenizerError(Exception):
    """The base's folder holds no tokenizer that can be used; the message says why."""


@dataclass(frozen=True)
class ChatSupport:
    """Abilities of a base's tokenizer for conversations. None where the folder has no usable tokenizer."""

    chat_template: bool | None
    tools: bool | None
    """Whether the format of tool calls can be read off the chat template."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Reasons why chats, tools or thinking are not served, by these names."""


def chat_support(folder: Path) -> ChatSupport:
    """Return what the tokenizer in a folder can do for conversations."""
    if not any(folder.glob("*token*")):
        return ChatSupport(None, None)
    try:
        tokenizer = BaseTokenizer(str(folder))
    except TokenizerError:
        return ChatSupport(None, None)
    return ChatSupport(tokenizer.has_chat_template, tokenizer.tool_format is not None, tokenizer.unserved)


class BaseTokenizer:
    """One base's tokenizer and chat template, or an adapter's with further tokens. Raises TokenizerError."""

    words = 0
    """Number of tokens of the adapter's own vocabulary; 0: it is the base's."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a text besides the base's."""
    own_templates: OwnTemplates | None = None
    """Process that renders the chat template, if that came with an adapter."""
    _budget: Budget | None = None

    def __init__(self, folder: str, *, raw_control_tokens: RawControlTokens = "allow") -> None:
        """`raw_control_tokens`: what `<|im_end|>` and the like are in the text of a plain prompt."""
        self._letters = raw_control_tokens == "letters"
        self._folder = folder
        self._set_up(_load(folder))
        self.longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        """Characters of a text that one token can stand for, at most."""

    def _set_up(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(
            token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special
        )
        """Ids of the special tokens, whose names are left out of texts."""
        _never_cut_or_pad(self._tokenizer)
        try:
            self._chat = ChatTokenizer(self._tokenizer)
            self._before, self._after = tokens_around(self._tokenizer)
        except Exception as error:  # what loads may hold settings of any type
            raise TokenizerError(f"it cannot encode: {reason_of(error)}") from error
        self._byte_level = _is_byte_level(self._tokenizer)
        self._byte_of_character = _byte_level_alphabet() if self._byte_level else {}
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def vocabulary(self) -> BaseVocabulary:
        """Return the tokenizer's tokens, with which those of adapters are compared."""
        texts = [self._tokenizer.backend_tokenizer.to_str(pretty=True)]
        file = Path(self._folder) / TOKENIZER_FILE
        if file.is_file():
            texts.append(file.read_text())
        digests: set[str] = set()
        for text in texts:
            with suppress(ValueError):
                found = vocabulary_digests(text)
                if (first := next(found)) not in digests:
                    digests |= {first, *found}
        return BaseVocabulary(self._tokenizer.get_vocab(), frozenset(digests))

    def extended(
        self,
        added: TokenizerAdditions | None,
        words: int,
        templates: OwnTemplates,
        template: str | None = None,
    ) -> BaseTokenizer:
        """Return the tokenizer of an adapter, which shares this one's vocabulary.

        Args:
            added: what the adapter's tokenizer has that this one has not.
            words: number of tokens of the adapter's vocabulary; 0: it is the base's.
            templates: process that renders the adapter's own chat template.
            template: its chat template, in place of that of its tokenizer.

        Raises:
            TokenizerError: the additions do not fit this tokenizer.
        """
        other = BaseTokenizer.__new__(BaseTokenizer)
        other._letters, other._folder, other.words = self._letters, self._folder, words
        other.longest_token = self.longest_token
        made = self._tokenizer if added is None else _extended(self._tokenizer, added)
        if template is None and added is not None:
            template = added.chat_template
        if template is not None:
            made = _with_own_template(made, template, templates)
            other.own_templates, other._budget = templates, Budget()
        other._set_up(made)
        if added is not None:
            other.end_tokens = added.end_tokens
            other.longest_token = max(self.longest_token, *(len(token.content) for token in added.tokens))
        return other

    @property
    def end(self) -> int | None:
        """The token with which a text ends."""
        token: int | None = self._tokenizer.eos_token_id
        return token

    @property
    def padding(self) -> int | None:
        """The token with which shorter texts are made as long as others."""
        token: int | None = self._tokenizer.pad_token_id
        return token

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str:
        """Return the template's text, or the texts of all templates joined."""
        template = self._tokenizer.chat_template or ""
        return template if isinstance(template, str) else "".join(template.values())

    @cached_property
    def template_options(self) -> frozenset[str]:
        """Variables of the chat template that a caller may set."""
        if self.own_templates is not None:
            with suppress(OwnTemplateError):
                return self.own_templates.options(self.chat_template, self._budget)
            return frozenset()
        return options_of(self.chat_template)

    @property
    def tool_format(self) -> ToolFormat | None:
        """Return the chat template's format of tool calls, or None if it writes none or none that can be
        read."""
        return None if isinstance(self._tool_format, str) else self._tool_format

    @property
    def tools_refusal(self) -> str | None:
        """Return what of the chat template keeps tools from being served, as the rest of a sentence of which
        it is the subject."""
        return self._tool_format if isinstance(self._tool_format, str) else None

    @cached_property
    def _tool_format(self) -> ToolFormat | str:
        if "tools" not in self.chat_template:
            return "has no place for tools"
        if "tool_calls" not in self.chat_template:
            return "writes no calls"
        if self._harmony is not None:
            return self._harmony[1]
        try:
            return self._read(lambda render: read_format(render, self._control_names))
        except UnreadableCallsError as error:
            return str(error)

    @cached_property
    def _harmony(self) -> tuple[HarmonyFormat, HarmonyTools] | None:
        """Formats of thoughts and of calls, if the chat template writes Harmony."""
        return self._read(lambda render: harmony.read_formats(render, self._control_names))

    @property
    def _control_names(self) -> dict[str, int]:
        """Ids of the added tokens, by their texts."""
        added = self._tokenizer.added_tokens_decoder
        return {text.content: token for token, text in added.items() if len(text.content.strip()) > 1}

    @cached_property
    def thought_format(self) -> ThoughtFormat | None:
        """Return the chat template's format of thoughts, or None if the base does not think, or in a way that
        cannot be separated from its answer."""
        if not self.has_chat_template:
            return None
        if self._harmony is not None:
            return self._harmony[0]
        names, variables = self._control_names, self.template_options
        return self._read(lambda render: thoughts.read_format(render, self.chat_template, names, variables))

    @property
    def thinking_switch(self) -> Switch | None:
        """Return the chat template's variable that switches thinking on and off."""
        return None if self.thought_format is None else self.thought_format.switch

    def opens_thought(self, prompt: Sequence[int]) -> bool | None:
        """Return whether a conversation's prompt opens a thought (True), or opens and closes one (False)."""
        if self.thought_format is None:
            return None
        return self.thought_format.opened_by(self.decode(prompt[-thoughts.TAIL_TOKENS :], special=True))

    def answer_header(self) -> list[int]:
        """Return the tokens between a conversation's prompt and an answer without a thought."""
        text = "" if self.thought_format is None else self.thought_format.answer_header
        return self.encode_marks(text) if text else []

    @cached_property
    def chat_refusal(self) -> str | None:
        """Return what of the chat template keeps conversations without tools from being served, or None."""
        try:
            self._render([{"role": "user", "content": "?"}], tools=None, generation=True)
        except Exception as error:  # a template is a program and fails in any way
            return f"cannot write a message: {reason_of(error)}"
        return None

    @property
    def unserved(self) -> dict[str, str]:
        """Return what is not served with this base's chat template, and why, by `chat`, `tools` and
        `thinking`."""
        if not self.has_chat_template:
            return {"chat": "not served: this base has no chat template"}
        template = "this base's chat template"
        chat, tools = self.chat_refusal, self.tools_refusal
        if chat and tools:
            return {"chat": f"not served: {template} cannot be used at all, as it {chat}"}
        if chat:
            return {"chat": f"served with tools alone: without them {template} {chat}"}
        found = {"tools": f"not served: {template} {tools}"} if tools else {}
        if self.thought_format is None and _THINKS.search(self.chat_template):
            found["thinking"] = (
                f"not separated from the text: {template} writes it in a way that cannot be read"
            )
        return found

    def _read(self, read: Callable[[Callable[..., str]], T]) -> T:
        """Return what `read` finds out by rendering. It takes a template that fails as one that refuses.

        Raises UnavailableError if the template cannot be rendered now, so that this is not taken for a
        refusal.
        """
        failed: list[UnavailableError] = []

        def render(*given: Any, **named: Any) -> str:
            if failed:
                raise failed[0]
            try:
                return self._render(*given, **named)
            except UnavailableError as error:
                failed.append(error)
                raise

        try:
            return read(render)
        finally:
            if failed:
                raise failed[0]

    def _render(self, messages: Any, *, tools: Any, generation: bool, **options: Any) -> str:
        if self.own_templates is not None:
            options["add_generation_prompt"] = generation
            own: str = self._tokenizer.write_own_template(messages, tools, options, self._budget)
            return own
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation, **options
        )
        return text

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a plain prompt, with the special tokens that the base expects around it, or
        without.

        Raises InvalidRequestError where control tokens are to be letters, and this base cannot write them.
        """
        if self._letters:
            try:
                ids = self._chat.encode_letters(text)
                return [*self._before, *ids, *self._after] if special else ids
            except ControlTokenError as error:
                raise _control_token("prompt", error) from error
        (ids,) = encode_texts(self._tokenizer, [text], special)
        return ids

    def encode_marks(self, text: str) -> list[int]:
        """Return the ids of a text in which the names of control tokens are those tokens."""
        (ids,) = encode_texts(self._tokenizer, [text])
        return ids

    def encode_chat(self, chat: TemplateInput) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next words.

        The template writes all special tokens itself, so that none is there twice; in a message they are
        letters. Raises InvalidRequestError when the base has no template, the template refuses the messages,
        or a message cannot be kept from writing control tokens.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "This base has no chat template. Send a plain prompt, to /generate or /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        from jinja2 import TemplateError

        try:
            return self._chat.encode_messages(chat.messages, chat.tools, chat.options)
        except ControlTokenError as error:
            raise _control_token(error.field or "messages", error) from error
        except TemplateError as error:
            raise InvalidRequestError(
                f"The base's chat template refuses these messages: {error}", param="messages"
            ) from error
        except OwnTemplateError as error:
            raise InvalidRequestError(
                f"messages: {error}.", param="messages", code="chat_template_failed"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequestError(
                f"The base's chat template cannot write these messages: {reason_of(error)}", param="messages"
            ) from error

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Return the text of all tokens together. special: with the names of special ones, else without."""
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return the vocabulary's names of tokens, "" for an id that it does not have."""
        return [name or "" for name in self._tokenizer.convert_ids_to_tokens(list(tokens))]

    @property
    def info(self) -> dict[str, Any]:
        """Return all that another machine needs to write prompts as this base's tokenizer and chat template
        do."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        special = {name: getattr(self._tokenizer, name) for name in _SPECIAL}
        return {"tokenizer_class": type(self._tokenizer).__name__, **special, "chat_template": template}

    def pieces(self, shown: frozenset[int] = frozenset()) -> PieceDecoder:
        """Return a new incremental decoder whose pieces add up to `decode` of the tokens.

        shown: special tokens whose names are part of the text.
        """
        if self._byte_level:
            if not shown:
                return BytePieces(self.text_bytes)
            return BytePieces(
                lambda token: self.token_bytes(token) if token in shown else self.text_bytes(token)
            )
        if shown:
            names = {token: self.token_text(token) for token in shown}
            return ShownPieces(self.decode, names, self.encode_marks("a"))
        return WindowPieces(self.decode)

    def text_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text: none if it is special."""
        return b"" if token in self.special else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, special ones by their name; empty for an unused id."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._read_bytes(token)
        return known

    def token_text(self, token: int) -> str:
        """Return a token as OpenAI writes it in logprobs: its text, or `bytes:\\xf0\\x9f` where it is
        none."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read_bytes(self, token: int) -> bytes:
        name: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self._byte_level:
            try:
                return bytes(self._byte_of_character[character] for character in name)
            except KeyError:
                return name.encode()
        byte = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()


def options_of(template: str) -> frozenset[str]:
    """Return the variables of a chat template that a caller may set."""
    from jinja2 import Environment, TemplateError, meta, nodes

    try:
        tree = Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"]).parse(
            _GENERATION_BLOCK.sub("", template)
        )
    except TemplateError:
        return frozenset()
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    asked |= {
        each.node.name
        for each in tree.find_all(nodes.Filter)
        if each.name == "default" and isinstance(each.node, nodes.Name)
    }
    set_here, given = (
        {name.name for name in tree.find_all(nodes.Name) if name.ctx == kind} for kind in ("store", "param")
    )
    return frozenset(meta.find_undeclared_variables(tree)) - _OWN_VARIABLES - (set_here - asked) - given


def _extended(tokenizer: Any, added: TokenizerAdditions) -> Any:
    """Return a copy of transformers' tokenizer with further tokens; it shares the model's vocabulary.

    Raises TokenizerError: the tokens would not get their ids.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError("this base's tokenizer takes no further tokens")
    own = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(own, part, getattr(backend, part))
    known = backend.get_added_tokens_decoder()
    tokens = [known[token] for token in sorted(known)]
    tokens += [
        AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
        for token in added.tokens
    ]
    for special, some in groupby(tokens, lambda token: bool(token.special)):
        (own.add_special_tokens if special else own.add_tokens)(list(some))
    ids = {known[token].content: token for token in known} | {
        token.content: token.id for token in added.tokens
    }
    first = added.tokens[0]
    wrong = any(own.token_to_id(text) != token for text, token in ids.items())
    if wrong or backend.id_to_token(first.id) is not None:
        raise TokenizerError(
            f"the token {first.content} would not get the id {first.id} in this base's tokenizer"
        )
    twin = copy.copy(tokenizer)
    twin._tokenizer = own
    twin._special_tokens_map = dict(tokenizer._special_tokens_map)
    if added.end_tokens:
        twin.eos_token = own.id_to_token(added.end_tokens[0])
    return twin


def _with_own_template(tokenizer: Any, template: str, templates: OwnTemplates) -> Any:
    """Return a copy of a tokenizer whose chat template is this one, rendered in another process."""

    def write_own_template(
        self: Any,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        budget: Budget | None = None,
    ) -> str:
        special = {name: str(token) for name, token in self.special_tokens_map.items() if token is not None}
        return templates.render(self.chat_template, conversation, tools, {**special, **options}, budget)

    def apply_chat_template(
        self: Any,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        text = write_own_template(self, conversation, tools, options)
        if not tokenize:
            return text
        return self(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]

    own = {"apply_chat_template": apply_chat_template, "write_own_template": write_own_template}
    kind, twin = type(tokenizer), copy.copy(tokenizer)
    twin.chat_template = template
    twin.__class__ = type(kind.__name__, (kind,), own)
    return twin


class Tokenizers:
    """The base's tokenizer, and those of adapters, of which the ones used last are kept. Thread-safe."""

    def __init__(self, base: BaseTokenizer) -> None:
        self.base = base
        self.templates = OwnTemplates()
        self._lock = threading.Lock()
        self._recent: OrderedDict[BaseTokenizer, None] = OrderedDict()
        # No others are kept alive here, and none is built twice while a request has it.
        self._by_additions: WeakValueDictionary[
            tuple[TokenizerAdditions | None, int, str | None], BaseTokenizer
        ] = WeakValueDictionary()
        self._of_versions: WeakValueDictionary[tuple[str, bool], BaseTokenizer] = WeakValueDictionary()

    def of_version(
        self, digest: str, report: Mapping[str, Any], template: str | None = None
    ) -> BaseTokenizer:
        """Return the tokenizer for a version's requests, by its report; the base's if it has no other.

        template: the version's chat template, if requests have it by default.

        Raises TokenizerError: the version was proved with another tokenizer of the base.
        """
        if not report.get("vocabulary") and not report.get("tokenizer") and template is None:
            return self.base
        key = digest, template is not None
        with self._lock:
            known = self._of_versions.get(key)
            if known is not None:
                return self._keep(known)
        added = report.get("tokenizer")
        given = None if added is None else msgspec.convert(added, TokenizerAdditions)
        found = self.of(given, report.get("vocabulary", 0), template)
        with self._lock:
            self._of_versions[key] = found
        return found

    def check(self, added: TokenizerAdditions) -> None:
        """Raise AdapterFormatError if an adapter's tokens do not fit the base's tokenizer."""
        try:
            self.base.extended(added, 0, self.templates)
        except TokenizerError as error:
            raise AdapterFormatError("bad_tokenizer", f"{error}") from error

    def of(self, added: TokenizerAdditions | None, words: int, template: str | None = None) -> BaseTokenizer:
        """Return the base's tokenizer with additions. Raises TokenizerError: they do not fit it."""
        with self._lock:
            found = self._by_additions.get((added, words, template))
            if found is None:
                found = self.base.extended(added, words, self.templates, template)
                self._by_additions[added, words, template] = found
            return self._keep(found)

    def _keep(self, tokenizer: BaseTokenizer) -> BaseTokenizer:
        """Keep a tokenizer, instead of the one that was not used for longest."""
        self._recent[tokenizer] = None
        self._recent.move_to_end(tokenizer)
        while len(self._recent) > MOST_TOKENIZERS:
            self._recent.popitem(last=False)
        return tokenizer


def _control_token(param: str, error: ControlTokenError) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}: {error}. Remove it, or write it otherwise.", param=param, code="control_token"
    )


def leave_torch_out() -> None:
    """Keep torch out of this process for good: tokenizers do not need it, and it takes 250 MB.

    `AutoTokenizer` then does what it does where torch is not installed: it finds the same classes, which give
    the same ids. Without effect where torch is loaded already; child processes are not concerned.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's mark for "not there"
    logging.disable(logging.WARNING)  # transformers says once that it found no torch
    try:
        with quick_imports():
            import transformers  # noqa: F401  (it looks for torch when it is imported)
    finally:
        logging.disable(logging.NOTSET)


def encode_aside(encode: Callable[[T], U], text: T) -> U:
    """Return `encode(text)` of a long text, let the engine go before it, and free memory. A tokenizer takes
    hundreds of bytes for each character for a moment, and the C library would keep them for the next text."""
    with tokenized_aside():
        made = encode(text)
    return_freed_memory()
    return made


def _load(folder: str) -> Any:
    """Raises TokenizerError, whatever the libraries raise."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise TokenizerError(str(error)) from error


def _never_cut_or_pad(tokenizer: Any) -> None:
    """Switch off truncation and padding of a tokenizer file, here and not at a first request: threads share
    it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _is_byte_level(tokenizer: Any) -> bool:
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.decoder, ByteLevel)


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-ins: each byte that is no printable Latin-1 character gets one from
    256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
