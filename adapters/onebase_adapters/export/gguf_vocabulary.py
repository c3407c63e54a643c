"""Convert a base's byte-level BPE tokenizer to GGUF, where llama.cpp knows the pre-tokenizer by name.

The fields are those of llama.cpp's `conversion/base.py` (https://github.com/ggml-org/llama.cpp, MIT). It
finds the name from the tokens of one text. Here the tokenizer's own rule is compared with those that
llama.cpp has, and a rule that it lacks is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.export.base_files import ExportError

_TOKENIZER_FILE = "tokenizer.json"
_REMEDY = "export it as merged, and convert that with llama.cpp's own convert_hf_to_gguf.py"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _by_regex(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return split, {**_BYTES, "use_regex": False}


_RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-2": (_BYTES,),
    "smollm": (_DIGITS, _BYTES),
    "llama-bpe": _by_regex(_ENDINGS + _WORDS + r"|\p{N}{1,3}" + _REST),
    "qwen2": _by_regex(_ENDINGS + _WORDS + r"|\p{N}" + _REST),
}
"""Pre-tokenizers of tokenizer.json, by llama.cpp's names for them."""
_WHOLE_WORDS = frozenset({"llama-bpe"})
"""Pre-tokenizers whose words that are tokens llama.cpp does not split further (`ignore_merges`)."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer as llama.cpp needs it. `kinds`: a gguf.TokenType for each token."""

    rule: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    """Ids of `bos`, `eos`, `unk` and `pad`, as far as they exist."""
    begins: bool
    """Whether each text begins with `bos`."""
    ends: bool
    chat_template: str | None

    def add_to(self, writer: Any) -> None:
        """Write it with a gguf.GGUFWriter."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read the tokenizer of the base in a folder. `size`: rows of its embedding. Raises ExportError."""
    from transformers import AutoTokenizer

    file = folder / _TOKENIZER_FILE
    if not file.is_file():
        raise ExportError(f"{folder} has no {_TOKENIZER_FILE}, from which its tokens are read: {_REMEDY}")
    whole = json.loads(file.read_text(encoding="utf-8"))
    rule = _rule(whole)
    tokens, kinds = _tokens(whole, size)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    begins, ends = _frame(tokenizer, ids)
    template = tokenizer.chat_template
    return Vocabulary(
        rule=rule,
        tokens=tokens,
        kinds=kinds,
        merges=[_merge(pair) for pair in whole["model"]["merges"]],
        special={name: number for name, number in ids.items() if number is not None},
        begins=begins,
        ends=ends,
        chat_template=template if isinstance(template, str) else None,
    )


def _rule(whole: dict[str, Any]) -> str:
    model, normalizer = whole["model"], whole.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(f"the base's tokenizer is no byte-level BPE (such as Llama 2's is not): {_REMEDY}")
    if normalizer not in (None, {"type": "NFC"}):
        raise ExportError(f"the base's tokenizer changes texts by {normalizer['type']} first: {_REMEDY}")
    found = whole.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    for name, rule in _RULES.items():
        if len(steps) == len(rule) and all(
            step | part == step for step, part in zip(steps, rule, strict=True)
        ):
            if bool(model.get("ignore_merges")) != (name in _WHOLE_WORDS):
                break
            return name
    raise ExportError(f"the base's tokenizer splits texts in a way that is not known here: {_REMEDY}")


def _tokens(whole: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    known = [(text, number, TokenType.NORMAL) for text, number in whole["model"]["vocab"].items()]
    for added in whole.get("added_tokens", []):
        text = added["content"]
        control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        known.append((text, added["id"], TokenType.CONTROL if control else TokenType.USER_DEFINED))
    for text, number, kind in known:
        if number >= size:
            raise ExportError(f"the base's tokenizer has token {number}, and its embedding {size} rows")
        tokens[number], kinds[number] = text, int(kind)
    return tokens, kinds


def _merge(pair: str | list[str]) -> str:
    """Return two tokens joined by a blank; a blank inside a token is written as byte-level BPE writes it."""
    return (
        pair if isinstance(pair, str) else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)
    )


def _frame(tokenizer: Any, ids: dict[str, int | None]) -> tuple[bool, bool]:
    """Return whether a text gets a first token (`bos`) and a last one (`eos`). Raises ExportError."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a")
    begins = ids["bos"] is not None and framed[:1] == [ids["bos"]] and framed != plain
    ends = ids["eos"] is not None and framed[-1:] == [ids["eos"]] and framed != plain
    if framed != [*([ids["bos"]] if begins else []), *plain, *([ids["eos"]] if ends else [])]:
        raise ExportError(
            f"the base's tokenizer puts {framed} around a text, which GGUF cannot say: {_REMEDY}"
        )
    return begins, ends
