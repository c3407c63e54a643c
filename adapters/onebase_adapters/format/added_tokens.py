"""Read what an adapter's tokenizer has that its base's has not: added tokens, a chat template, its ends.

A version consists of two files, so this goes into `adapter_config.json`, as the names of labels do; PEFT
ignores the field. The files are data here: no tokenizer is built of them, and no template is rendered.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from onebase_adapters.format.config import AdapterFormatError, parse_config
from onebase_adapters.format.conversion import tensor_names
from onebase_adapters.format.strict_json import shown
from onebase_engine.environment import computing_environment
from onebase_engine.machine import BESIDE_SERVING, count_seconds, step_aside
from onebase_protocol.adapters import AddedToken, TokenizerAdditions

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FIELD = "onebase_tokenizer"
"""Field of the config that holds the additions, or `{"problem": ...}`: why the tokenizer cannot be used."""
TOKENIZER_FILES: Mapping[str, int] = {
    TOKENIZER_FILE: 64 << 20,
    "tokenizer_config.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
}
"""Files of a tokenizer that are read, and the largest size of each, in bytes."""
MOST_ADDED = 1024
LONGEST_TOKEN = 200
"""Largest number of characters of an added token."""
MOST_CHARACTERS = 16 << 10
"""Largest number of characters of all added tokens: a tokenizer takes hundreds of bytes for each."""
LONGEST_TEMPLATE = 64 << 10
"""Largest number of characters of a chat template."""
_OF_TOKENS = re.compile(r"embed|head|wte|tok|output")
"""Part of the name of an embedding or a head."""
_DIGEST_SECONDS = 60.0
_MOST_ENDS = 16
_LONGEST_PROBLEM = 400

Read = Callable[[str], bytes | None]
"""Function from the name of one of TOKENIZER_FILES to its content; None if the folder does not have it."""


@dataclass(frozen=True)
class BaseVocabulary:
    """The tokens of a base's tokenizer. `ids`: by their texts, added ones included."""

    ids: Mapping[str, int]
    digests: frozenset[str]
    """Digests of its model, as its file has it and as it is loaded: see `vocabulary_digests`."""

    @property
    def count(self) -> int:
        """Id of the first token that can be added."""
        return max(self.ids.values(), default=-1) + 1


def read_folder(folder: Path) -> Read:
    """Return a function that reads a tokenizer's files in a folder, unless one is too large."""

    def read(name: str) -> bytes | None:
        file = folder / name
        if not file.is_file() or file.stat().st_size > TOKENIZER_FILES[name]:
            return None
        return file.read_bytes()

    return read


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    merges: list[str | tuple[str, str]] = []


class _TokenizerFile(msgspec.Struct):
    model: msgspec.Raw
    added_tokens: list[AddedToken] = []


class _ProblemError(ValueError):
    """The tokenizer is no extension of the base's; the message says why."""


def vocabulary_digests(tokenizer: bytes | str) -> Iterator[str]:
    """Return the digests of the model in the text of a `tokenizer.json`: of its text, which takes no time and
    is the same in files that the same library wrote, and of its vocabulary and merges.

    Raises msgspec.DecodeError if it is none, and ValueError where the second one is none.
    """
    return _digests(msgspec.json.decode(tokenizer, type=_TokenizerFile).model)


def _digests(model: msgspec.Raw) -> Iterator[str]:
    yield hashlib.sha256(model).hexdigest()
    yield _digest_apart(model)


def _digest_apart(model: msgspec.Raw) -> str:
    """Return the digest of a model, computed by another process: to decode one holds up every thread.

    Its processor time counts as this thread's. Raises _ProblemError, and OSError if the process fails.
    """
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "onebase_adapters.format.added_tokens"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=computing_environment(),
    )
    with child:
        step_aside(child.pid, BESIDE_SERVING)
        try:
            said, _ = child.communicate(bytes(model), timeout=_DIGEST_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            count_seconds(_DIGEST_SECONDS)
            raise OSError(f"a tokenizer was not read within {_DIGEST_SECONDS:g} s") from None
    used, _, answer = said.decode().partition("\n")
    count_seconds(float(used or time.monotonic() - began))
    found, _, problem = answer.partition("\n")
    if problem:
        raise _ProblemError(problem)
    if not found:
        raise OSError("the process that reads a tokenizer failed")
    return found


def has_token_rows(raw: bytes, weights: Path) -> bool:
    """Return True if an adapter may have rows of its own for tokens, so that its tokenizer matters.

    Raises OSError: the weights cannot be read.
    """
    try:
        config = parse_config(raw)
    except AdapterFormatError:
        return False
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        return True
    return any(_OF_TOKENS.search(name) for name in tensor_names(weights))


def with_tokens(
    raw: bytes, weights: Path, read: Read, vocabulary: Callable[[], BaseVocabulary | None]
) -> bytes:
    """Return the bytes of an `adapter_config.json` with what the adapter's tokenizer adds to the base's.

    They are unchanged if the adapter has no rows for tokens, or its folder no tokenizer, or one without
    further tokens.

    Args:
        weights: the adapter's weights, in PEFT's form.
        vocabulary: returns the base's tokens; None if it has no tokenizer, and none is used.

    Raises OSError: the weights or the tokenizer cannot be read.
    """
    tokenizer = read(TOKENIZER_FILE) if has_token_rows(raw, weights) else None
    base = None if tokenizer is None else vocabulary()
    if tokenizer is None or base is None:
        return raw
    try:
        added = _additions(tokenizer, read, base)
        field = None if added is None else msgspec.to_builtins(added)
    except (_ProblemError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        field = {"problem": str(error)[:_LONGEST_PROBLEM]}
    if field is None:
        return raw
    try:
        config = parse_config(raw)
        return json.dumps({**config, TOKENIZER_FIELD: field}, sort_keys=True).encode()
    except (AdapterFormatError, RecursionError):
        return raw  # which is refused by who checks it


def _additions(tokenizer: bytes, read: Read, base: BaseVocabulary) -> TokenizerAdditions | None:
    file = msgspec.json.decode(tokenizer, type=_TokenizerFile)
    names = {token: text for text, token in base.ids.items()}
    new = sorted((one for one in file.added_tokens if one.id not in names), key=lambda one: one.id)
    if not new:
        return None
    for one in file.added_tokens:
        if names.get(one.id, one.content) != one.content:
            raise _ProblemError(
                f"its token {one.id} is {shown(one.content)}, and the base's is {shown(names[one.id])}"
            )
    if base.digests.isdisjoint(_digests(file.model)):
        raise _ProblemError("its vocabulary or its merges are not the base's, tokens that it added aside")
    if len(new) > MOST_ADDED:
        raise _ProblemError(f"it adds {len(new)} tokens, and {MOST_ADDED} are served at most")
    if [one.id for one in new] != list(range(base.count, base.count + len(new))):
        raise _ProblemError(
            f"its added tokens must have the ids from {base.count} on, which follow the base's; one is "
            f"{next(one.id for place, one in enumerate(new) if one.id != base.count + place)}"
        )
    settings = _json(read("tokenizer_config.json"), "tokenizer_config.json")
    ids = {**base.ids, **{one.content: one.id for one in new}}
    ends = (*_ids_of(settings.get("eos_token"), ids), *_ends(read("generation_config.json"), len(ids)))
    found = TokenizerAdditions(
        tokens=tuple(new), end_tokens=tuple(dict.fromkeys(ends)), chat_template=_template(read, settings)
    )
    _check(found)
    return found


def checked_additions(value: Any) -> tuple[TokenizerAdditions | None, str]:
    """Return the additions in a config's TOKENIZER_FIELD, and why the tokenizer cannot be used, if so.

    Raises:
        AdapterFormatError: code `bad_config`.
    """
    if value is None:
        return None, ""
    if isinstance(value, dict) and value.keys() == {"problem"}:
        problem = value["problem"]
        if isinstance(problem, str) and len(problem) <= _LONGEST_PROBLEM and _is_utf8(problem):
            return None, problem
    try:
        found = msgspec.convert(value, TokenizerAdditions)
        _check(found)
    except (msgspec.ValidationError, _ProblemError) as error:
        raise AdapterFormatError(
            "bad_config", f"{TOKENIZER_FIELD}: {str(error)[:_LONGEST_PROBLEM]}"
        ) from None
    return found, ""


def _check(added: TokenizerAdditions) -> None:
    """Raise _ProblemError unless all parts are within their limits."""
    tokens = added.tokens
    if not 1 <= len(tokens) <= MOST_ADDED:
        raise _ProblemError(f"it adds {len(tokens)} tokens, and 1 to {MOST_ADDED} are served")
    for place, token in enumerate(tokens):
        if not 1 <= len(token.content) <= LONGEST_TOKEN or not token.content.isprintable():
            raise _ProblemError(
                f"its token {token.id} must be a text of 1 to {LONGEST_TOKEN} printable characters, "
                f"got {shown(token.content)}"
            )
        if token.id != tokens[0].id + place or not 0 <= token.id < 1 << 31:
            raise _ProblemError(f"its added tokens do not follow one another: {shown(token.content)}")
    if (characters := sum(len(token.content) for token in tokens)) > MOST_CHARACTERS:
        raise _ProblemError(
            f"its added tokens have {characters} characters, and {MOST_CHARACTERS} are served at most"
        )
    if len({token.content for token in tokens}) < len(tokens):
        raise _ProblemError("two of its added tokens have the same text")
    if len(added.end_tokens) > _MOST_ENDS or not all(0 <= one <= tokens[-1].id for one in added.end_tokens):
        raise _ProblemError(f"its eos_token_id must be up to {_MOST_ENDS} of its tokens")
    if added.chat_template is not None and len(added.chat_template) > LONGEST_TEMPLATE:
        raise _ProblemError(f"its chat template is over {LONGEST_TEMPLATE} characters")
    if not _is_utf8(added.chat_template or ""):
        raise _ProblemError("its chat template is no text in UTF-8")


def _is_utf8(text: str) -> bool:
    """Return False if a text has a lone surrogate, which JSON can write and no message can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(model: _Model) -> str:
    total = hashlib.sha256()
    vocab = model.vocab
    entries = sorted(vocab.items(), key=lambda item: item[1]) if isinstance(vocab, dict) else vocab
    total.update(msgspec.json.encode(entries))
    for merge in model.merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) and " " in merge else (merge, "")
        total.update(msgspec.json.encode(merge if isinstance(merge, tuple) else (left, right)))
    return total.hexdigest()


def _json(raw: bytes | None, name: str) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        return parse_config(raw, name, TOKENIZER_FILES[name])
    except AdapterFormatError as error:
        raise _ProblemError(str(error)) from None


def _ids_of(token: Any, ids: Mapping[str, int]) -> tuple[int, ...]:
    text = token.get("content") if isinstance(token, dict) else token
    return (ids[text],) if isinstance(text, str) and text in ids else ()


def _ends(raw: bytes | None, count: int) -> tuple[int, ...]:
    value = _json(raw, "generation_config.json").get("eos_token_id")
    ends = value if isinstance(value, list) else [value]
    return tuple(one for one in ends if type(one) is int and 0 <= one < count)


def _template(read: Read, settings: Mapping[str, Any]) -> str | None:
    file = read("chat_template.jinja")
    if file is not None:
        return file.decode()
    value = settings.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = (one for one in value if isinstance(one, dict) and one.get("name") == "default")
        value = next(named, {}).get("template")
    return value if isinstance(value, str) and value else None


# ---- the process -------------------------------------------------------------------------------------


def main() -> None:
    """Write the processor time that this has taken, in seconds, and the digest of the model on stdin, or an
    empty line and what is wrong with it."""
    try:
        answer = _digest(msgspec.json.decode(sys.stdin.buffer.read(), type=_Model))
    except (msgspec.DecodeError, RecursionError) as error:
        answer = f"\n{error}"
    print(time.process_time(), answer, sep="\n", end="")


if __name__ == "__main__":
    main()
