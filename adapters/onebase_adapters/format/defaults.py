"""Read the defaults of requests that come with an adapter: `onebase.json` in its folder.

A version consists of two files, so they go into `adapter_config.json`, as a tokenizer's tokens do; PEFT
ignores the field. Thereby they belong to the version: its digest covers them, and activating another version
switches them too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from onebase_adapters.format.config import AdapterFormatError
from onebase_adapters.format.strict_json import parse_json, shown
from onebase_protocol.adapters import AdapterDefaults

DEFAULTS_FILE = "onebase.json"
DEFAULTS_FIELD = "onebase_defaults"
"""Field of the config that holds the defaults."""
MAX_DEFAULTS_BYTES = 256 << 10
"""Largest size of the file; and of all defaults together, as JSON."""
MOST_CHOICES = 1024
MOST_DEPTH = 64
MOST_NOTES = 16
_FORMS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_OTHER_NAMES = {"system_prompt": "system", "schema": "guided_json", "choices": "guided_choice"}


def parse_defaults(raw: bytes, name: str = DEFAULTS_FILE) -> dict[str, Any]:
    """Return the fields of an `onebase.json`, checked.

    Raises:
        AdapterFormatError: with code `bad_defaults`.
    """
    if len(raw) > MAX_DEFAULTS_BYTES:
        raise AdapterFormatError("bad_defaults", f"{name} is over {MAX_DEFAULTS_BYTES} bytes")
    try:
        value = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_defaults", f"{name} is not plain JSON: {error}") from None
    checked_defaults(value, name)
    given: dict[str, Any] = value
    return given


def checked_defaults(value: Any, name: str = DEFAULTS_FIELD) -> AdapterDefaults | None:
    """Return the defaults in a config's DEFAULTS_FIELD; None if it has none. A field that is null is not
    given.

    Raises:
        AdapterFormatError: with code `bad_defaults`.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise AdapterFormatError("bad_defaults", f"{name} must be a JSON object, got {shown(value)}")
    known = AdapterDefaults.__struct_fields__
    for field in value:
        if field not in known:
            near = (
                [_OTHER_NAMES[field]] if field in _OTHER_NAMES else difflib.get_close_matches(field, known, 1)
            )
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise AdapterFormatError("bad_defaults", f"{name} has an unknown field {field[:80]!r}. {hint}")
    given = {field: item for field, item in value.items() if item is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    _check_depth(given, name)
    try:
        size = len(json.dumps(given, ensure_ascii=False, allow_nan=False).encode())
        found = msgspec.convert(given, AdapterDefaults)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise AdapterFormatError("bad_defaults", f"{name}: {_in_words(str(error))}") from None
    if size > MAX_DEFAULTS_BYTES:
        raise AdapterFormatError("bad_defaults", f"{name} is over {MAX_DEFAULTS_BYTES} bytes")
    _check_together(found, name)
    return found


def _check_depth(value: dict[str, Any], name: str) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise AdapterFormatError("bad_defaults", f"{name} is nested more than {MOST_DEPTH} deep")


def _in_words(error: str) -> str:
    """Return msgspec's message with the field first."""
    said, separator, place = error.partition(" - at `$.")
    return f"{place.rstrip('`')}: {said[:1].lower()}{said[1:]}" if separator else said


def _check_together(found: AdapterDefaults, name: str) -> None:
    """Raise AdapterFormatError for fields that do not go together."""
    forms = [form for form in _FORMS if getattr(found, form) not in (None, ())]
    if len(forms) > 1:
        raise AdapterFormatError("bad_defaults", f"{name} has {' and '.join(forms)}: give one of them")
    if len(found.guided_choice) > MOST_CHOICES:
        raise AdapterFormatError(
            "bad_defaults", f"{name}: guided_choice has more than {MOST_CHOICES} entries"
        )
    if found.min_tokens and found.max_tokens and found.min_tokens > found.max_tokens:
        raise AdapterFormatError("bad_defaults", f"{name}: min_tokens is over max_tokens")


def with_defaults(raw: bytes, *given: Mapping[str, Any] | None) -> bytes:
    """Return the bytes of an `adapter_config.json` with defaults added.

    Args:
        given: fields, of which later ones replace earlier ones and what the config has; null removes a field.
    """
    if not any(given):
        return raw
    try:
        config = parse_json(raw)
        known = config.get(DEFAULTS_FIELD) or {}
        merged = {name: value for fields in (known, *given) for name, value in (fields or {}).items()}
        merged = {name: value for name, value in merged.items() if value is not None}
        return json.dumps({**config, DEFAULTS_FIELD: merged}, sort_keys=True).encode()
    except (AttributeError, TypeError, ValueError, RecursionError):
        return raw  # which is refused by who checks it


# ---- files of a folder -------------------------------------------------------------------------------

IO_FILE = "io.yaml"
"""File next to IBM's adapters for Granite, which describes what they read and write."""
MODELFILE = "Modelfile"
"""File by which Ollama makes a model of a base and an adapter."""
DEFAULTS_FILES: Mapping[str, int] = {
    DEFAULTS_FILE: MAX_DEFAULTS_BYTES,
    IO_FILE: 16 << 10,
    MODELFILE: 64 << 10,
}
"""Files with defaults, of which the first that is there is read, and the largest size of each, in bytes."""
_GRANITE_NAMES = {"max_completion_tokens": "max_tokens"}
_OLLAMA_NAMES = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repeat_penalty": ("repetition_penalty", float),
    "num_predict": ("max_tokens", int),
}
_PARAMETERS = ("temperature", "top_p", "top_k", "max_tokens", "presence_penalty", "frequency_penalty", "stop")
_INSTRUCTION = re.compile(
    r"(FROM|ADAPTER|SYSTEM|TEMPLATE|PARAMETER|MESSAGE|LICENSE|REQUIRES)\s+", re.IGNORECASE
)


def read_defaults(read: Callable[[str], bytes | None]) -> dict[str, Any] | None:
    """Return the defaults in the files next to an adapter; None if there are none.

    What is wrong with a vendor's file is noted: the adapter can be used without it.

    Args:
        read: returns the content of one of DEFAULTS_FILES, or None if it is not there; raises what
            `too_large` returns.

    Raises:
        AdapterFormatError: with code `bad_defaults`.
    """
    if (own := read(DEFAULTS_FILE)) is not None:
        return parse_defaults(own)
    for name, parse in ((IO_FILE, _of_granite), (MODELFILE, _of_ollama)):
        try:
            if (raw := read(name)) is None:
                continue
            found = parse(raw.decode())
            checked_defaults(found, name)
        except (AdapterFormatError, UnicodeDecodeError) as error:
            found = {"notes": [f"{name} is not used: {error}"[:400]]}
        return found or None
    return None


def too_large(name: str) -> AdapterFormatError:
    """Return the error for a file with defaults that is over its limit."""
    return AdapterFormatError("bad_defaults", f"{name} is over {DEFAULTS_FILES[name]} bytes")


def read_limited(file: Path, name: str) -> bytes:
    """Return the content of one of DEFAULTS_FILES. Raises AdapterFormatError, OSError."""
    with file.open("rb") as opened:
        found = opened.read(DEFAULTS_FILES[name] + 1)
    if len(found) > DEFAULTS_FILES[name]:
        raise too_large(name)
    return found


def defaults_in(folder: Path) -> dict[str, Any] | None:
    """Return the defaults in an adapter's folder. Raises AdapterFormatError, OSError."""

    def read(name: str) -> bytes | None:
        return read_limited(folder / name, name) if (folder / name).is_file() else None

    return read_defaults(read)


def _of_granite(text: str) -> dict[str, Any]:
    """Return the defaults in an `io.yaml`: its instruction, its schema and its parameters.

    Transformations of the answer are the client's: they are noted. So is an instruction with placeholders.
    """
    config, notes, found = _plain_yaml(text), list[str](), dict[str, Any]()
    instruction = config.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        plain = instruction.replace("{{", "").replace("}}", "")
        if "{" in plain or "}" in plain:
            notes.append(
                f"{IO_FILE}: its instruction has placeholders, which requests must fill in themselves"
            )
        else:
            found["instruction"] = instruction.replace("{{", "{").replace("}}", "}").strip("\n")
    schema = config.get("response_format")
    if schema is not None:
        try:
            given = schema if isinstance(schema, str) else json.dumps(schema)
            found["guided_json"] = parse_json(given.encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterFormatError("bad_defaults", f"{IO_FILE}: response_format: {error}") from None
    for name, value in (config.get("parameters") or {}).items():
        name = _GRANITE_NAMES.get(name, name)
        if name in _PARAMETERS:
            found[name] = value
        else:
            notes.append(f"{IO_FILE}: the parameter {str(name)[:80]!r} is not used")
    notes += [f"{IO_FILE}: {name} are not applied" for name in ("transformations",) if config.get(name)]
    return {**found, "notes": notes} if notes else found


def _plain_yaml(text: str) -> dict[str, Any]:
    """Return a YAML document without anchors: an alias could stand for as much as one likes."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias")
            return super().compose_node(parent, index)

    try:
        found = yaml.load(text, Loader)
        if isinstance(found, dict) and isinstance(found.get("parameters") or {}, dict):
            return found
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise AdapterFormatError("bad_defaults", f"{IO_FILE} cannot be read: {str(error)[:200]}") from None
    raise AdapterFormatError("bad_defaults", f"{IO_FILE} must be a mapping with a mapping of parameters")


def _of_ollama(text: str) -> dict[str, Any]:
    """Return the defaults in a Modelfile: SYSTEM, and those PARAMETERs that requests have too.

    A TEMPLATE is in another language than chat templates are, and is noted.
    """
    found, notes, stops = dict[str, Any](), list[str](), list[str]()
    for instruction, value in _instructions(text):
        if instruction == "SYSTEM":
            found["system"] = value
        elif instruction == "PARAMETER":
            name, _, given = value.partition(" ")
            given = _unquoted(given.strip())
            try:
                if name == "stop":
                    stops.append(given)
                elif name in _OLLAMA_NAMES:
                    ours, kind = _OLLAMA_NAMES[name]
                    found[ours] = kind(given)
                else:
                    notes.append(f"{MODELFILE}: PARAMETER {name[:80]} is not used")
            except ValueError:
                raise AdapterFormatError(
                    "bad_defaults", f"{MODELFILE}: PARAMETER {name} must be a number, got {given[:80]!r}"
                ) from None
        elif instruction in ("TEMPLATE", "MESSAGE"):
            notes.append(f"{MODELFILE}: {instruction} is not used; the base's chat template writes prompts")
    if found.get("max_tokens", 1) < 1:
        del found["max_tokens"]  # as many as fit
    if stops:
        found["stop"] = list(dict.fromkeys(stops))
    if notes:
        found["notes"] = list(dict.fromkeys(notes))[:MOST_NOTES]
    return found


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Modelfile with their values, which three quotes may spread over lines."""
    lines = iter(text.splitlines())
    for line in lines:
        begun = _INSTRUCTION.match(line.strip())
        if begun is None:
            continue
        value = line.strip()[begun.end() :]
        if value.startswith('"""'):
            value = value[3:]
            while '"""' not in value:
                following = next(lines, None)
                if following is None:
                    raise AdapterFormatError("bad_defaults", f'{MODELFILE}: """ is not closed')
                value += f"\n{following}"
            value = value.partition('"""')[0]
        elif begun[1].upper() != "PARAMETER":
            value = _unquoted(value)
        yield begun[1].upper(), value


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
