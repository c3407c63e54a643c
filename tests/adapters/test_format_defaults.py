"""Defaults of requests that come with an adapter: `onebase.json`, and what vendors' files have of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.format.config import AdapterFormatError, check_config
from onebase_adapters.format.defaults import (
    DEFAULTS_FIELD,
    checked_defaults,
    defaults_in,
    parse_defaults,
    read_defaults,
    with_defaults,
)

ALL = {
    "description": "Judges politeness.",
    "system": "Be fair.",
    "instruction": "Is it polite?",
    "invocation": "<|im_start|>judge\n",
    "prompt_prefix": "Query: ",
    "chat_template": "{{ messages }}",
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -1,
    "frequency_penalty": 0.5,
    "min_tokens": 1,
    "max_tokens": 4,
    "stop": ["\n"],
    "guided_choice": ["yes", "no"],
}


def test_every_field_is_read_and_goes_into_the_config() -> None:
    fields = parse_defaults(json.dumps(ALL).encode())
    config = with_defaults(b'{"peft_type": "LORA", "task_type": null}', fields)

    found = checked_defaults(check_config(config).defaults)

    assert found is not None
    assert {name: getattr(found, name) for name in ALL} == {
        **ALL,
        "stop": ("\n",),
        "guided_choice": ("yes", "no"),
    }
    assert with_defaults(config, None, {}) == config


def test_later_fields_replace_earlier_ones_and_null_removes_one() -> None:
    config = json.dumps({"r": 8, DEFAULTS_FIELD: {"system": "Old.", "top_k": 3}}).encode()

    made = json.loads(with_defaults(config, {"system": "New.", "stop": "x"}, {"top_k": None, "stop": ["y"]}))

    assert made == {"r": 8, DEFAULTS_FIELD: {"system": "New.", "stop": ["y"]}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temprature": 1}, "Did you mean temperature?"),
        ({"system_prompt": "x"}, "Did you mean system?"),
        ({"colour": 1}, "There are description, system"),
        ({"temperature": 3}, "temperature: expected `float` <= 2"),
        ({"temperature": "0"}, "temperature: expected `float"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"system": ""}, "system"),
        ({"system": "x" * (64 * 1024 + 1)}, "system"),
        ({"guided_json": []}, "guided_json"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex"),
        ({"guided_choice": ["x"] * 1025}, "guided_choice"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is over max_tokens"),
        ({"system": "\ud800"}, "onebase.json"),
        ([], "JSON object"),
        (7, "JSON object"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_and_the_way_out(given: Any, said: str) -> None:
    raw = json.dumps(given).encode()
    with pytest.raises(AdapterFormatError, match=r"onebase\.json") as refused:
        parse_defaults(raw)
    assert refused.value.code == "bad_defaults"
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b'{"top_p": NaN}',
        b'{"system": "a", "system": "b"}',
        b"\xff",
        b'{"guided_json": ' + b'{"a": ' * 70 + b"1" + b"}" * 71,
        b'{"guided_json": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001,
        b'{"system": "' + b"x" * (300 << 10) + b'"}',
    ],
)
def test_bytes_that_are_no_small_plain_json_are_refused(raw: bytes) -> None:
    with pytest.raises(AdapterFormatError, match=r"onebase\.json"):
        parse_defaults(raw)


def _read(**files: str) -> dict[str, Any] | None:
    raw = {name.replace("_", "."): text.encode() for name, text in files.items()}
    return read_defaults(raw.get)


GRANITE = """\
model: ~
response_format: |
  {"type": "string", "enum": ["answerable", "unanswerable"]}
transformations:
  - type: likelihood
instruction: |
  Is it {{answerable}}?
parameters:
  max_completion_tokens: 6
  temperature: 0.75
  logprobs: true
sentence_boundaries: ~
"""


def test_an_io_config_of_granite_gives_its_instruction_schema_and_parameters() -> None:
    found = _read(io_yaml=GRANITE)

    assert found is not None
    assert found.pop("notes") == [
        "io.yaml: the parameter 'logprobs' is not used",
        "io.yaml: transformations are not applied",
    ]
    assert found == {
        "instruction": "Is it {answerable}?",
        "guided_json": {"type": "string", "enum": ["answerable", "unanswerable"]},
        "max_tokens": 6,
        "temperature": 0.75,
    }
    filled = _read(io_yaml="instruction: 'Rewrite {last_message}'")
    assert filled is not None
    assert "placeholders" in filled["notes"][0]


MODEL = '''\
# a comment
FROM smollm2
ADAPTER ./adapter
SYSTEM """You are
brief."""
PARAMETER temperature 0.5
parameter num_predict 20
PARAMETER num_ctx 4096
PARAMETER stop "User:"
PARAMETER stop <|end|>
TEMPLATE """{{ .Prompt }}
PARAMETER top_p 0.1"""
LICENSE "MIT"
'''


def test_a_modelfile_of_ollama_gives_its_system_message_parameters_and_stops() -> None:
    read = {"Modelfile": MODEL.encode()}
    assert read_defaults(read.get) == {
        "system": "You are\nbrief.",
        "temperature": 0.5,
        "max_tokens": 20,
        "stop": ["User:", "<|end|>"],
        "notes": [
            "Modelfile: PARAMETER num_ctx is not used",
            "Modelfile: TEMPLATE is not used; the base's chat template writes prompts",
        ],
    }
    assert read_defaults({"Modelfile": b"PARAMETER num_predict -1"}.get) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("io.yaml", "a: &x [1]\nb: *x"),
        ("io.yaml", "- 1"),
        ("io.yaml", "parameters: 7"),
        ("io.yaml", "response_format: '{'"),
        ("io.yaml", "a: !!python/object/apply:os.system ['true']"),
        ("io.yaml", "[" * 3000),
        ("io.yaml", "parameters: {temperature: 9}"),
        ("io.yaml", "parameters: {temperature: .nan}"),
        ("io.yaml", "response_format: {default: 2020-01-01}"),
        ("Modelfile", "PARAMETER temperature hot"),
        ("Modelfile", 'SYSTEM """x'),
    ],
)
def test_a_vendors_file_that_cannot_be_used_is_noted_and_the_adapter_served_without_it(
    name: str, text: str
) -> None:
    found = read_defaults({name: text.encode()}.get)
    assert found is not None
    assert found.keys() == {"notes"}
    assert found["notes"][0].startswith(f"{name} is not used")


def test_of_several_files_our_own_is_read_and_one_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(MODEL)
    (tmp_path / "io.yaml").write_text(GRANITE)
    assert (defaults_in(tmp_path) or {})["max_tokens"] == 6
    (tmp_path / "onebase.json").write_text('{"max_tokens": 7}')
    assert defaults_in(tmp_path) == {"max_tokens": 7}
    (tmp_path / "onebase.json").write_text(" " * (257 << 10))
    with pytest.raises(AdapterFormatError, match=r"onebase\.json is over"):
        defaults_in(tmp_path)


@pytest.mark.parametrize("name", ["io.yaml", "Modelfile"])
def test_a_vendors_file_that_is_too_large_is_noted_and_the_adapter_served_without_it(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("# a license\n" * 10_000)
    (note,) = (defaults_in(tmp_path) or {})["notes"]
    assert note.startswith(f"{name} is not used: ")
    assert "is over" in note
