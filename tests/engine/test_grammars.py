"""Rows that follow a grammar: their text keeps to it, whatever the base would say, and no other notices."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.runs import talking_base
from tokenizers import Tokenizer
from torch import nn

from onebase_engine.base.load import BaseSettings, eos_ids, load_base
from onebase_engine.engine import grammar_link, grammars
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.grammar_follower import Follower
from onebase_engine.engine.grammar_process import Matchers, check_patterns, load_tokenizer, resident_bytes
from onebase_engine.engine.grammars import Grammars
from onebase_engine.engine.messages import Grammar
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix, SequenceState
from onebase_server.requests.schemas.generation import GenerateRequest

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"city": {"const": "Rom"}}}]},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "boolean"},
    {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 2},
    {"$defs": {"leaf": {"enum": [1, "zwei", None]}}, "type": "object",
     "properties": {"a": {"$ref": "#/$defs/leaf"}}, "required": ["a"], "additionalProperties": False},
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"oneOf": [{"const": "é🙂"}, {"const": 3.5}]},
]  # fmt: skip
PROMPT = list(range(40, 60))


def of_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough on any machine, unless a test says less."""
    monkeypatch.setattr(grammar_link, "START_SECONDS", 300.0)
    monkeypatch.setattr(grammar_link, "COMPILE_SECONDS", 300.0)
    monkeypatch.setattr(grammar_link, "MASK_SECONDS", 300.0)
    monkeypatch.setattr(grammar_link, "STUCK_SECONDS", 300.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_base(tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def base(folder: Path) -> nn.Module:
    return load_base(BaseSettings(folder=folder))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_engine(base: nn.Module, folder: Path, draft_tokens: int = 7) -> Engine:
    limits = SchedulerLimits(16, 96, 512, draft_tokens)
    return Engine(base, name="talking", limits=limits, kv_blocks=400, eos_ids=eos_ids(base), tokenizer=folder)


@pytest.fixture(scope="module")
def engine(base: nn.Module, folder: Path) -> Engine:
    return make_engine(base, folder)


@pytest.fixture(scope="module")
def plain(base: nn.Module, folder: Path) -> Engine:
    """Without drafts."""
    return make_engine(base, folder, 0)


Asked = dict[str, tuple[Grammar | None, dict[str, Any]]]


class Answers:
    """What the rows of some requests got."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self.tokens: dict[str, list[int]] = {}
        self.scores: dict[str, list[protocol.ScoredToken]] = {}
        self.ends: dict[str, protocol.SequenceOutput] = {}

    def submit(self, name: str, grammar: Grammar | None, **changes: Any) -> None:
        n, tenant = changes.pop("n", 1), changes.pop("tenant", "default")
        sampling = protocol.Sampling(**{"temperature": 1.5, "max_tokens": 120, "seed": 5} | changes)
        self._engine.submit(
            protocol.Submit(id=name, prompt=PROMPT, sampling=sampling, grammar=grammar, n=n, tenant=tenant)
        )

    def step(self) -> None:
        self._engine.step()
        self.take()

    def take(self) -> None:
        for output in self._engine.take_outputs():
            name = output.id if output.choice == 0 else f"{output.id}.{output.choice}"
            self.tokens.setdefault(name, []).extend(output.tokens)
            self.scores.setdefault(name, []).extend(output.logprobs or ())
            if output.finish is not None:
                self.ends[name] = output

    def run(self) -> Answers:
        while self._engine.busy:
            self.step()
        self.take()
        return self

    def text(self, name: str) -> str:
        whole: str = self._tokenizer.decode(self.tokens[name], skip_special_tokens=True)
        return whole


def ask(engine: Engine, tokenizer: Tokenizer, asked: Asked) -> Answers:
    answers = Answers(engine, tokenizer)
    for name, (grammar, changes) in asked.items():
        answers.submit(name, grammar, **dict(changes))
    return answers.run()


def keeps_to(schema: Any, answers: Answers, name: str) -> None:
    """Where it was not cut short."""
    end = answers.ends[name]
    assert end.finish in ("stop", "length"), end.error_message
    if end.finish == "stop":
        jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(answers.text(name)))


@settings(max_examples=8)
@given(
    schemas=st.lists(st.sampled_from(SCHEMAS), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 1.0, 2.0]), seed=st.integers(0, 99),
    more=st.sampled_from([{}, {"min_tokens": 9}, {"repetition_penalty": 1.5}, {"top_k": 3, "min_p": 0.1}]),
)  # fmt: skip
def test_whatever_a_base_says_under_a_schema_is_json_that_keeps_to_it(
    engine: Engine, plain: Engine, tokenizer: Tokenizer, schemas: list[Any], temperature: float, seed: int,
    more: dict[str, Any],
) -> None:  # fmt: skip
    changes = {"temperature": temperature, "seed": seed} | more
    asked: Asked = {str(i): (of_schema(schema), changes) for i, schema in enumerate(schemas)}
    asked["free"] = (None, changes | {"max_tokens": 20})
    answers = ask(engine, tokenizer, asked)
    for i, schema in enumerate(schemas):
        keeps_to(schema, answers, str(i))
    assert answers.tokens == ask(plain, tokenizer, asked).tokens, "drafts change the text"


NAMED = {
    "type": "object",
    "properties": {
        "first_and_last_name": {"enum": ["somebody_nobody_knows", "anybody_at_all"]},
        "postal_address": {"const": "a street without any name"},
    },
    "required": ["first_and_last_name", "postal_address"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choices", [1, 5])
def test_what_a_grammar_leaves_no_choice_about_is_computed_together(
    engine: Engine, plain: Engine, tokenizer: Tokenizer, choices: int
) -> None:
    asked: Asked = {"x": (of_schema(NAMED), {"n": choices, "logprobs": 2})}
    before = engine.counters.steps, engine.counters.right_draft_tokens
    answers = Answers(engine, tokenizer)
    answers.submit("x", *asked["x"][:1], **asked["x"][1])
    while engine.busy:
        answers.step()
        while any(follower.drawn for follower in following(engine)._followers.values()):
            following(engine)._receive()  # nobody waits for it but this test
    steps, right = engine.counters.steps - before[0], engine.counters.right_draft_tokens - before[1]
    alone = ask(plain, tokenizer, asked)
    assert answers.tokens == alone.tokens
    assert answers.scores == alone.scores
    keeps_to(NAMED, answers, "x")
    assert 2 * right > sum(map(len, answers.tokens.values()))
    assert 2 * steps < choices + max(map(len, answers.tokens.values()))


def test_no_row_notices_that_its_neighbours_follow_grammars(engine: Engine, tokenizer: Tokenizer) -> None:
    free: Asked = {name: (None, {"logprobs": 2, "max_tokens": 24, "seed": int(name)}) for name in "12"}
    alone = ask(engine, tokenizer, free)
    among = ask(
        engine, tokenizer, free | {"person": (of_schema(PERSON), {}), "no": (Grammar("regex", "("), {})}
    )
    for name in free:
        assert among.tokens[name] == alone.tokens[name]
        assert among.scores[name] == alone.scores[name]


def test_the_logprobs_told_are_those_of_the_base(engine: Engine, tokenizer: Tokenizer) -> None:
    asked: Asked = {"yes": (Grammar("regex", "yes"), {"logprobs": 1, "temperature": 0.0})}
    (*scores, _end) = ask(engine, tokenizer, asked).scores["yes"]
    assert scores
    assert all(score.logprob < score.top[0][1] for score in scores)


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        (Grammar("regex", r"[0-9]{3}-[a-f]{2,4}"), r"[0-9]{3}-[a-f]{2,4}"),
        (Grammar("grammar", 'start: "ja" | "nein, \\"nie\\""'), 'ja|nein, "nie"'),
        (Grammar("grammar", 'root ::= "a"+ tail\ntail ::= "z" | "y"'), "a+[yz]"),
        (Grammar("json_schema", '{"type":"object"}'), r"(?s)\{.*\}"),
    ],
    ids=["regex", "lark", "gbnf", "any-object"],
)
def test_every_choice_is_in_the_language(
    engine: Engine, tokenizer: Tokenizer, grammar: Grammar, wanted: str
) -> None:
    answers = ask(engine, tokenizer, {"x": (grammar, {"n": 3, "temperature": 1.0, "max_tokens": 200})})
    assert len(answers.ends) == 3
    for name, end in answers.ends.items():
        assert end.finish == "length" or re.fullmatch(wanted, answers.text(name)), answers.text(name)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (
            Grammar("json_schema", '{"type": "string", "contentMediaType": 7, "not": {}}'),
            'not supported: "not"',
        ),
        (of_schema({"oneOf": [{"type": "object"}, {"type": "object", "minProperties": 1}]}), "write anyOf"),
        (of_schema({"type": "string", "format": "password"}), "leave it out"),
        (Grammar("json_schema", '{"$ref": "https://example.org/schema.json"}'), "example.org"),
        (Grammar("json_schema", '{"$ref": "file:///etc/hostname"}'), "file:///etc/hostname"),
        (Grammar("json_schema", '{"$ref": "#/$defs/none"}'), "none"),
        (Grammar("json_schema", "{"), ""),
        (Grammar("regex", "[a"), "regex parse error: unclosed character class"),
        (Grammar("regex", "(?=a)b"), "look-ahead"),
        (of_schema({"type": "string", "pattern": "(?!a)b"}), "look-ahead"),
        (
            of_schema({"$ref": "#"}),
            "no text keeps to it",
        ),
        (
            of_schema({"type": "integer", "minimum": 2, "maximum": 1}),
            "minimum (2) is greater than maximum (1)",
        ),
        (Grammar("grammar", "start: nowhere"), "nowhere"),
        (Grammar("grammar", "root ::= " + "(" * 9000), "recursion"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    engine: Engine, tokenizer: Tokenizer, grammar: Grammar, message: str
) -> None:
    end = ask(engine, tokenizer, {"bad": (grammar, {"max_tokens": 3})}).ends["bad"]
    assert (end.finish, end.error_code, end.error_param) == ("error", "grammar_refused", "grammar")
    assert end.error_message
    assert message in end.error_message
    assert len(end.error_message) < 400


def nested(depth: int) -> Grammar:
    return Grammar("json_schema", '{"items":' * depth + "{}" + "}" * depth)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
        Grammar("regex", "(.*a.{20}|.*b.{20}|.*c.{20}){50}"),
        Grammar("regex", "(a|aa|aaa|aaaa)+" * 100),
        of_schema({"enum": ["x" * 100 + str(i) for i in range(2_000)]}),
        of_schema({"allOf": [{"anyOf": [{"const": i}, {"const": i + 1}]} for i in range(40)]}),
        of_schema({"type": "string", "minLength": 100_000_000}),
        of_schema({"type": "array", "items": {"type": "array", "minItems": 9999}, "minItems": 9999}),
        nested(60),
        nested(5000),
        Grammar("grammar", "start: start start | start"),
        Grammar("grammar", 'start: a a a a\na: b b b b\nb: c c c c\nc: ("x" | "xx" | "xxx")*'),
    ],
    ids=range(11),
)
def test_hostile_grammars_are_refused_or_served_and_nobody_else_notices(
    engine: Engine, tokenizer: Tokenizer, grammar: Grammar
) -> None:
    ask(engine, tokenizer, {"begin": (of_schema({"type": "boolean"}), {})})
    process = pid_of(engine)
    answers = ask(engine, tokenizer, {"evil": (grammar, {"max_tokens": 12}), "good": (of_schema(PERSON), {})})
    keeps_to(PERSON, answers, "good")
    end = answers.ends["evil"]
    assert end.finish in ("length", "stop") or end.error_code == "grammar_refused", end
    assert pid_of(engine) == process


def test_rows_end_where_they_are_told_to_while_their_grammar_is_compiled(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    answers = Answers(engine, tokenizer)
    answers.submit("gone", of_schema(SCHEMAS[2] | {"title": "new"}), n=2)
    engine.cancel(protocol.Cancel(id="gone"))
    answers.run()
    assert {end.finish for end in answers.ends.values()} == {"cancelled"}
    assert len(answers.ends) == 2
    assert not engine.busy


@pytest.mark.parametrize("grammar", [of_schema(SCHEMAS[2] | {"title": "newer"}), Grammar("regex", "(")])
def test_choices_that_are_cancelled_while_their_grammar_is_compiled_do_not_run(
    engine: Engine, tokenizer: Tokenizer, grammar: Grammar
) -> None:
    answers = Answers(engine, tokenizer)
    answers.submit("some", grammar, n=4)
    for choice in (1, 3, 3):
        engine.cancel(protocol.Cancel(id="some", choice=choice))
    answers.take()
    assert {name: end.finish for name, end in answers.ends.items()} == dict.fromkeys(
        ("some.1", "some.3"), "cancelled"
    )
    answers.run()
    rest = {answers.ends[name].finish for name in ("some", "some.2")}
    assert rest <= ({"stop", "length"} if grammar.kind == "json_schema" else {"error"})
    assert not answers.tokens["some.1"]
    assert not follower_of(engine, "default").users
    answers.submit("none", of_schema(SCHEMAS[2] | {"title": "newest"}), n=2)
    for choice in (0, 1):
        engine.cancel(protocol.Cancel(id="none", choice=choice))
    assert not engine.busy
    answers.take()
    assert {answers.ends[name].finish for name in ("none", "none.1")} == {"cancelled"}


# ---- the processes ------------------------------------------------------------------------------


@pytest.fixture
def own(base: nn.Module, folder: Path) -> Iterator[Engine]:
    """An engine whose process may be harmed."""
    made = make_engine(base, folder)
    yield made
    following(made).end()


def following(engine: Engine) -> grammars.Grammars:
    assert engine._grammars is not None
    return engine._grammars


def pid_of(engine: Engine) -> int:
    """Id of the process that follows the grammars of the only tenant."""
    process = follower_of(engine).process
    assert process is not None
    assert process.pid is not None
    return process.pid


def follower_of(engine: Engine, tenant: str = "default") -> Follower:
    return following(engine)._followers[tenant]


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_rows_go_on_to_the_same_text_when_the_process_dies_or_hangs(
    own: Engine, engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, harm: signal.Signals
) -> None:
    asked: Asked = {str(i): (of_schema(schema), {"seed": i}) for i, schema in enumerate(SCHEMAS)}
    whole = ask(engine, tokenizer, asked)
    answers = Answers(own, tokenizer)
    for name, (grammar, changes) in asked.items():
        answers.submit(name, grammar, **changes)
    while not any(answers.tokens.values()):
        answers.step()
    monkeypatch.setattr(grammar_link, "STUCK_SECONDS", 3.0 if harm == signal.SIGSTOP else 300.0)
    killed = pid_of(own)
    os.kill(killed, harm)
    while (process := follower_of(own).process) is not None and process.pid == killed:
        answers.step()
    monkeypatch.setattr(grammar_link, "STUCK_SECONDS", 300.0)
    answers.run()
    assert answers.tokens == whole.tokens
    assert pid_of(own) != killed


BAD_PROCESS = """
import json, os, socket, sys, time
from onebase_engine.engine import grammar_process as real

class Matchers(real.Matchers):
    def compile(self, key, grammar, **how):
        if "die" in grammar.text:
            os._exit(1)
        if "hang" in grammar.text:
            time.sleep(1000)
        return super().compile(key, grammar)

    def mask(self, request):
        for word in ("late", "slow"):
            if any(word in self.texts.get(key, "") for _, key, *_ in request.sequences):
                os._exit(1) if word == "late" else time.sleep(0.3)
        return super().mask(request)

    def foresee(self, drawn):
        if any("early" in self.texts.get(key, "") for _, key, *_ in drawn.sequences):
            os._exit(1)
        lies = {n: [2**31 - 1] for n, key, _ in drawn.sequences if "foreign" in self.texts.get(key, "")}
        if any("unknown" in self.texts.get(key, "") for _, key, *_ in drawn.sequences):
            lies[10**6] = [1]
        lies |= {n: "words" for n, key, _ in drawn.sequences if "garbled" in self.texts.get(key, "")}
        return super().foresee(drawn) | lies

    texts = {}

compile_ = Matchers.compile
def noted(self, key, grammar, **how):
    self.texts[key] = grammar.text
    return compile_(self, key, grammar, **how)
Matchers.compile = noted
real.Matchers = Matchers
real.main()
"""


@pytest.fixture
def bad(own: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose process dies and hangs of grammars that say so."""
    program = tmp_path / "bad.py"
    program.write_text(BAD_PROCESS)
    monkeypatch.setattr(grammar_link, "PROGRAM", (str(program),))
    return own


@pytest.mark.parametrize(("word", "seconds"), [("die", 300.0), ("hang", 3.0)])
def test_a_grammar_that_ends_the_process_costs_its_own_request_alone(
    bad: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, word: str, seconds: float
) -> None:
    monkeypatch.setattr(grammar_link, "STUCK_SECONDS", seconds)
    asked: Asked = {
        "before": (of_schema(PERSON), {}),
        "bad": (Grammar("regex", f"{word}"), {}),
        "again": (Grammar("regex", f"{word}"), {"max_tokens": 3}),
        "after": (of_schema(SCHEMAS[1]), {}),
        "free": (None, {"max_tokens": 9}),
    }
    answers = ask(bad, tokenizer, asked)
    keeps_to(PERSON, answers, "before")
    keeps_to(SCHEMAS[1], answers, "after")
    assert answers.ends["free"].finish == "length"
    for name in ("bad", "again"):
        assert answers.ends[name].error_code == "grammar_refused"
    later = ask(bad, tokenizer, {"bad": asked["bad"], "good": asked["after"]})
    assert later.ends["bad"].error_code == "grammar_refused"
    keeps_to(SCHEMAS[1], later, "good")


def test_a_row_whose_masks_end_the_process_fails_alone(bad: Engine, tokenizer: Tokenizer) -> None:
    answers = ask(bad, tokenizer, {"late": (Grammar("regex", "late"), {}), "good": (of_schema(PERSON), {})})
    end = answers.ends["late"]
    assert (end.finish, end.error_code) == ("error", "grammar_refused")
    keeps_to(PERSON, answers, "good")


def test_a_process_that_ends_of_looking_ahead_costs_nobody_an_answer(
    bad: Engine, tokenizer: Tokenizer
) -> None:
    asked: Asked = {"x": (Grammar("regex", "early( on| in a long life)"), {}), "y": (of_schema(PERSON), {})}
    answers = ask(bad, tokenizer, asked)
    assert answers.text("x") in ("early on", "early in a long life")
    keeps_to(PERSON, answers, "y")
    pid = pid_of(bad)
    assert ask(bad, tokenizer, {"y": asked["y"]}).ends["y"].finish
    assert pid_of(bad) == pid


def test_in_a_long_text_that_is_forced_nothing_is_looked_ahead(folder: Path, base: nn.Module) -> None:
    size = int(base.config.vocab_size)  # type: ignore[union-attr, arg-type]
    masks = np.zeros((1, -(-size // 32)), dtype=np.int32)
    follower = Matchers(load_tokenizer(folder, size, [*eos_ids(base)]), masks, resident_bytes())
    for key, length in (("short", 200), ("long", 200_000)):
        assert follower.compile(key, of_schema({"const": "word " * (length // 5)})).error is None
    for _ in range(2):
        drawn = grammar_link.TokensDrawn(1, [(0, "short", []), (1, "long", []), (2, "long", [])])
        seen = follower.foresee(drawn)
        assert seen.keys() == {0}


@pytest.mark.parametrize("word", ["foreign", pytest.param("unknown", marks=pytest.mark.full), "garbled"])
def test_a_process_that_names_tokens_or_rows_that_there_are_not_costs_nobody_an_answer(
    bad: Engine, tokenizer: Tokenizer, word: str
) -> None:
    asked: Asked = {"x": (Grammar("regex", f"{word} (words|letters)"), {}), "y": (of_schema(PERSON), {})}
    answers = ask(bad, tokenizer, asked | {"free": (None, {"max_tokens": 9})})
    assert answers.text("x") in (f"{word} words", f"{word} letters")
    keeps_to(PERSON, answers, "y")
    assert answers.ends["free"].finish == "length"


def test_a_tokenizer_that_cannot_be_used_is_said(
    base: nn.Module, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    engine = make_engine(base, tmp_path)
    answers = ask(engine, tokenizer, {"x": (of_schema(PERSON), {}), "free": (None, {"max_tokens": 3})})
    assert "this base's tokenizer cannot be used" in (answers.ends["x"].error_message or "")
    assert answers.ends["free"].finish == "length"
    following(engine).end()


def test_an_engine_without_a_tokenizer_refuses_grammars(base: nn.Module) -> None:
    engine = Engine(base, name="plain", limits=SchedulerLimits(4, 96, 512, 0), kv_blocks=40)
    engine.submit(
        protocol.Submit(id="x", prompt=PROMPT, sampling=protocol.Sampling(), grammar=Grammar("regex", "a"))
    )
    (output,) = engine.take_outputs()
    assert output.error_code == "grammar_refused"


USED_PROCESS = """
import json, os, sys
from onebase_engine.engine import grammar_process as real

class Matchers(real.Matchers):
    def forget(self, rows, keys):
        super().forget(rows, keys)
        open(sys.argv[0] + ".new", "w").write(json.dumps([len(self._used), len(self._sequences)]))
        os.replace(sys.argv[0] + ".new", sys.argv[0] + ".json")

real.Matchers = Matchers
real.main()
"""


def test_what_nobody_follows_any_more_is_let_go(
    own: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "used.py"
    program.write_text(USED_PROCESS)
    monkeypatch.setattr(grammar_link, "PROGRAM", (str(program),))
    ask(own, tokenizer, {str(i): (of_schema(schema), {}) for i, schema in enumerate(SCHEMAS)})
    ask(own, tokenizer, {"bad": (Grammar("regex", "["), {})})
    answers = Answers(own, tokenizer)
    for i, schema in enumerate(SCHEMAS):
        answers.submit(f"gone-{i}", of_schema({"title": "more", **schema}))
        own.cancel(protocol.Cancel(id=f"gone-{i}"))
    answers.run()
    # What came after they had left is let go with the next answer that is taken.
    for number in range(200):
        ask(own, tokenizer, {"x": (Grammar("regex", f"x{number}"), {"max_tokens": 2})})
        if json.loads(program.with_suffix(".py.json").read_text()) == [0, 0]:
            break
    assert json.loads(program.with_suffix(".py.json").read_text()) == [0, 0]
    follower = follower_of(own)
    assert not any((follower.users, follower.grammars, follower.reported, follower.answered))
    assert not following(own)._trials


def test_an_engine_is_idle_when_those_have_left_whose_grammars_ended_a_process(
    bad: Engine, tokenizer: Tokenizer
) -> None:
    answers = Answers(bad, tokenizer)
    for name in ("die", "die or not"):
        answers.submit(name, Grammar("regex", name))
    while not any(trial.deaths for trial in following(bad)._trials.values()) and bad.busy:
        answers.step()
    for name in ("die", "die or not"):
        bad.cancel(protocol.Cancel(id=name))
    answers.run()
    assert not bad.busy
    assert {end.finish for end in answers.ends.values()} <= {"cancelled", "error"}


def test_a_process_that_does_not_read_holds_up_nobody(own: Engine, tokenizer: Tokenizer) -> None:
    ask(own, tokenizer, {"begin": (of_schema({"type": "boolean"}), {})})
    process = pid_of(own)
    os.kill(process, signal.SIGSTOP)
    answers = Answers(own, tokenizer)
    for number in range(8):
        answers.submit(str(number), of_schema({"enum": ["x" * 200_000, number]}))
    answers.submit("free", None, max_tokens=5)
    while "free" not in answers.ends:
        answers.step()
    os.kill(process, signal.SIGCONT)
    for number in range(8):
        own.cancel(protocol.Cancel(id=str(number)))
    answers.run()
    keeps_to(PERSON, ask(own, tokenizer, {"good": (of_schema(PERSON), {})}), "good")


def test_lines_of_nothing_are_read_in_no_time(engine: Engine, tokenizer: Tokenizer) -> None:
    ask(engine, tokenizer, {"begin": (of_schema({"type": "boolean"}), {})})
    process = pid_of(engine)
    asked: Asked = {
        "lark": (Grammar("grammar", "\n" * 200_000 + 'start: "a"'), {}),
        "gbnf": (Grammar("grammar", "\n" * 200_000 + 'root ::= "a"'), {}),
        "none": (Grammar("grammar", "\n" * 200_000 + "x"), {}),
    }
    answers = ask(engine, tokenizer, asked)
    assert answers.text("lark") == answers.text("gbnf") == "a"
    assert answers.ends["none"].error_code == "grammar_refused"
    assert pid_of(engine) == process


def test_the_process_ends_with_its_engine(folder: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from onebase_engine.engine import grammars\n"
        "grammars.link.START_SECONDS = 300.0\n"
        "from onebase_engine.engine.messages import Grammar\n"
        "made = grammars.Grammars(Path(sys.argv[1]), 49152, [2], 8)\n"
        "made.open_grammar(Grammar('regex', 'a'), 'acme', 1)\n"
        "while not made.opened(1.0): pass\n"
        "pid = made._followers['acme'].process.pid\n"
        "os.kill(pid, 19)\n"  # it does not even see that the socket is closed
        "print(pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, check=False
    )
    pid = int(done.stdout)
    for _ in range(600):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it outlives its engine")


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|im_start|>x", "<|im_end|> yes", "a\u2028b\0c", 'a\nb\tc\bd\fe"', "x/y\\z.*[a]{2}^$"],
)
def test_a_text_of_any_letters_can_be_asked_for(engine: Engine, tokenizer: Tokenizer, text: str) -> None:
    choices = GenerateRequest(prompt="x", guided_choice=[text]).grammar
    assert choices is not None
    asked: Asked = {"const": (of_schema({"const": text}), {}), "choice": (choices.grammar, {})}
    answers = ask(engine, tokenizer, asked)
    assert json.loads(answers.text("const")) == text
    assert answers.text("choice") == text


def test_many_long_choices_can_be_told_apart(engine: Engine, tokenizer: Tokenizer) -> None:
    choices = GenerateRequest(prompt="x", guided_choice=[f"{i} " + "word " * 40 for i in range(1000)]).grammar
    assert choices is not None
    answers = ask(engine, tokenizer, {"x": (choices.grammar, {"max_tokens": 100})})
    assert re.fullmatch("[0-9]{1,3} (word ){40}", answers.text("x"))


# ---- nobody waits for others' grammars ----------------------------------------------------------


@pytest.mark.parametrize("grace", [0.0, 0.01])
@pytest.mark.parametrize("draft_tokens", [0, 7])
def test_masks_that_come_late_change_no_text_and_hold_up_nobody(
    base: nn.Module, folder: Path, tokenizer: Tokenizer, bad: Engine, engine: Engine,
    monkeypatch: pytest.MonkeyPatch, grace: float, draft_tokens: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(grammars, "GRACE_SECONDS", grace)
    own = make_engine(base, folder, draft_tokens)
    asked: Asked = {
        "x": (Grammar("regex", "slow (words|letters) and [a-z ]{9}"), {"max_tokens": 12}),
        "y": (of_schema(PERSON), {"max_tokens": 12}),
    }
    whole = ask(engine, tokenizer, asked)
    answers = Answers(own, tokenizer)
    for name, (grammar, changes) in asked.items():
        answers.submit(name, grammar, **changes)
    answers.submit("free", None, max_tokens=200, temperature=0.0)
    ahead = 0
    while own.busy:
        had = len(answers.tokens.get("x", ())), len(answers.tokens.get("free", ()))
        answers.step()
        ahead += len(answers.tokens.get("x", ())) == had[0] and len(answers.tokens.get("free", ())) > had[1]
    following(own).end()
    assert {name: answers.tokens[name] for name in asked} == whole.tokens
    assert ahead > 20, "the sequence without a grammar waited for the others"


UNBOUNDED_PROCESS = """
from onebase_engine.engine import grammar_process as real

real.MOST_PATTERNS = 10**6
real.main()
"""


@pytest.fixture
def unbounded(own: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that finds out only by trying which grammars take for ever, in a tenth of the usual time."""
    program = tmp_path / "unbounded.py"
    program.write_text(UNBOUNDED_PROCESS)
    monkeypatch.setattr(grammar_link, "PROGRAM", (str(program),))
    monkeypatch.setattr(grammar_link, "COMPILE_SECONDS", 1.0)
    monkeypatch.setattr(grammars, "COMPILE_BUDGET", 2.0)
    return own


def hanging(number: int) -> Grammar:
    patterns = [{"type": "string", "pattern": f"^.*[a-z]{{{n}}}.*$"} for n in range(3, 60)]
    return of_schema({"title": f"{number}", "allOf": patterns})


def test_a_plain_stream_goes_on_beside_sixty_grammars_that_are_large_or_hang(
    unbounded: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    poll = Grammars._poll

    def noted(self: Grammars, processes: Any, seconds: float) -> None:
        waits.append(seconds)
        poll(self, processes, seconds)

    answers = Answers(unbounded, tokenizer)
    answers.submit("good", None, tenant="good", max_tokens=400, temperature=0.0, ignore_eos=True)
    while not answers.tokens.get("good"):
        answers.step()
    monkeypatch.setattr(Grammars, "_poll", noted)
    large = {f"p{n}": {"type": "string", "format": "date-time"} for n in range(2000)}
    for number in range(24):
        schema = {"type": "object", "properties": large, "title": f"{number}"}
        answers.submit(f"large-{number}", of_schema(schema), tenant="evil", max_tokens=60)
    for number in range(36):
        answers.submit(f"hangs-{number}", hanging(number), tenant="evil")
    steps = 0
    while "good" not in answers.ends:
        had = len(answers.tokens["good"])
        answers.step()
        steps += 1
        assert len(answers.tokens["good"]) > had, "a step gave the plain stream nothing"
        assert sum(waits) <= grammars.GRACE_SECONDS, "a step waited for another tenant's grammars"
        waits.clear()
    answers.run()
    assert len(answers.ends) == 61
    hung = [answers.ends[f"hangs-{number}"] for number in range(36)]
    assert {end.error_code for end in hung} <= {"grammar_refused", "grammar_limit"}
    limited = [end for end in hung if end.error_code == "grammar_limit"]
    assert len(limited) > 30
    assert all((end.retry_after or 0) > 1 for end in limited)


def test_a_tenant_that_has_used_its_time_for_new_grammars_keeps_those_that_are_known(
    unbounded: Engine, tokenizer: Tokenizer
) -> None:
    known, new = of_schema(PERSON), of_schema({"enum": ["something", "else"]})
    ask(unbounded, tokenizer, {"known": (known, {"tenant": "evil"})})
    ask(unbounded, tokenizer, {str(n): (hanging(n), {"tenant": "evil"}) for n in range(3)})
    asked: Asked = {
        "known": (known, {"tenant": "evil"}),
        "new": (new, {"tenant": "evil"}),
        "other": (new, {"tenant": "good"}),
        "again": (hanging(0), {"tenant": "good"}),
    }
    answers = ask(unbounded, tokenizer, asked)
    keeps_to(PERSON, answers, "known")
    assert answers.ends["new"].error_code == "grammar_limit"
    assert "2 s of a processor in the last 60 s" in (answers.ends["new"].error_message or "")
    assert answers.text("other") in ('"something"', '"else"')
    assert answers.ends["again"].error_code == "grammar_refused", "a harmful grammar was tried again"


def test_a_trial_that_nobody_waits_for_any_more_is_ended(unbounded: Engine, tokenizer: Tokenizer) -> None:
    answers = Answers(unbounded, tokenizer)
    answers.submit("gone", hanging(0), tenant="evil")
    while not following(unbounded)._running_trials() or not following(unbounded)._running_trials()[0].pid:
        answers.step()
    pid = following(unbounded)._running_trials()[0].pid
    unbounded.cancel(protocol.Cancel(id="gone"))
    answers.run()
    assert answers.ends["gone"].finish == "cancelled"
    assert not following(unbounded)._trials
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def test_one_tenants_process_ends_without_anothers_noticing(
    bad: Engine, engine: Engine, tokenizer: Tokenizer
) -> None:
    asked: Asked = {"y": (of_schema(PERSON), {"tenant": "good", "max_tokens": 60})}
    whole = ask(engine, tokenizer, asked)
    answers = Answers(bad, tokenizer)
    answers.submit("y", *asked["y"][:1], **asked["y"][1])
    while not answers.tokens.get("y"):
        answers.step()
    process = follower_of(bad, "good").process
    answers.submit("late", Grammar("regex", "late"), tenant="evil")
    answers.run()
    assert answers.ends["late"].error_code == "grammar_refused"
    assert answers.tokens["y"] == whole.tokens["y"]
    assert follower_of(bad, "good").process is process


def test_when_the_process_dies_that_starts_the_others_the_text_is_the_same(
    own: Engine, engine: Engine, tokenizer: Tokenizer
) -> None:
    asked: Asked = {str(i): (of_schema(schema), {"seed": i}) for i, schema in enumerate(SCHEMAS)}
    whole = ask(engine, tokenizer, asked)
    answers = Answers(own, tokenizer)
    for name, (grammar, changes) in asked.items():
        answers.submit(name, grammar, **changes)
    while not any(answers.tokens.values()):
        answers.step()
    template = following(own)._template
    assert template is not None
    os.kill(template._process.pid, signal.SIGKILL)
    assert answers.run().tokens == whole.tokens
    assert following(own)._template is not template


# ---- what may go wrong with processes -----------------------------------------------------------


ODD_PROCESS = """
import os, sys, time
from onebase_engine.engine import grammar_process as real

def first(name, times=1):
    # Return True for the first `times` callers of all processes.
    for number in range(times):
        try:
            os.close(os.open(f"{sys.argv[0]}.{name}{number}", os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            pass
    return False

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

class Matchers(real.Matchers):
    def compile(self, key, grammar, **how):
        follows = self._masks.size > 1
        if "ends" in grammar.text and follows:
            burn(0.3)
            os._exit(1)
        if "heavy" in grammar.text and follows and first("heavy", 2):
            os._exit(1)
        if "raises" in grammar.text:
            raise MemoryError
        if "burns" in grammar.text:
            burn(0.3)
            os._exit(1)
        return super().compile(key, grammar, **how)

    def _matcher(self, grammar):
        if "costs" in grammar.text and self._masks.size > 1:
            burn(0.4)
        if "gate" in grammar.text and self._masks.size > 1 or "door" in grammar.text:
            while not os.path.exists(sys.argv[0] + ".gate"):
                time.sleep(0.01)
        return super()._matcher(grammar)

serve, fork, MODE = real.serve, os.fork, open(sys.argv[0] + ".mode").read()

def dies(sock, matchers):
    if not first("dies"):
        return serve(sock, matchers)
    pid = fork()
    if not pid:
        os._exit(0)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
    sock.sendall(real.encode(real.Started(pid)))

def fails():
    if first("fork", 5):
        raise OSError(11, "Resource temporarily unavailable")
    return fork()

if MODE == "dies":
    real.serve = dies
if MODE == "fork":
    os.fork = fails
if MODE == "keeps nothing":
    real.KEPT_BYTES = -(1 << 40)
real.Matchers = Matchers
real.main()
"""


@dataclass
class Odd:
    """An engine with processes of ODD_PROCESS."""

    engine: Engine
    program: Path

    def open_gate(self) -> None:
        Path(f"{self.program}.gate").touch()


@pytest.fixture
def odd(own: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Odd:
    program = tmp_path / "odd.py"
    program.write_text(ODD_PROCESS)
    Path(f"{program}.mode").write_text(getattr(request, "param", ""))
    monkeypatch.setattr(grammar_link, "PROGRAM", (str(program),))
    return Odd(own, program)


@pytest.mark.parametrize("odd", ["dies", "fork"], indirect=True)
def test_a_process_that_ends_before_it_is_known_or_cannot_be_forked_costs_nobody_an_answer(
    odd: Odd, tokenizer: Tokenizer
) -> None:
    answers = ask(odd.engine, tokenizer, {"x": (of_schema(PERSON), {}), "free": (None, {"max_tokens": 9})})
    keeps_to(PERSON, answers, "x")
    assert answers.ends["free"].finish == "length"


def test_where_no_file_can_be_opened_others_go_on_and_grammars_wait(
    own: Engine, tokenizer: Tokenizer
) -> None:
    ask(own, tokenizer, {"begin": (of_schema({"type": "boolean"}), {})})
    answers = Answers(own, tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [int(name) for name in os.listdir("/proc/self/fd")]
    free = min(set(range(max(opened) + 2)) - set(opened))
    answers.submit("free", None, max_tokens=400, temperature=0.0, ignore_eos=True)
    answers.submit("known", of_schema({"type": "boolean"}), tenant="other")
    answers.submit("new", of_schema(PERSON))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for _ in range(20):
            answers.step()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(answers.tokens["free"]) >= 19
    answers.run()
    keeps_to(PERSON, answers, "new")
    assert answers.text("known") in ("true", "false")


def test_processes_that_end_with_the_one_that_forked_them_put_no_blame_on_a_grammar(
    odd: Odd, tokenizer: Tokenizer
) -> None:
    answers = Answers(odd.engine, tokenizer)
    answers.submit("trial", Grammar("regex", "door"))
    answers.submit("follower", Grammar("regex", "gate"), tenant="other")
    for _ in range(3):
        while not is_compiling(odd.engine, "other") or not any(
            one.pid for one in following(odd.engine)._running_trials()
        ):
            answers.step()
        template = following(odd.engine)._template
        assert template is not None
        os.kill(template._process.pid, signal.SIGKILL)
        while following(odd.engine)._template is template:
            answers.step()
    odd.open_gate()
    answers.run()
    assert (answers.text("trial"), answers.text("follower")) == ("door", "gate")


def is_compiling(engine: Engine, tenant: str) -> bool:
    follower = follower_of(engine, tenant)
    started = follower.process is not None and follower.process.pid is not None
    return started and follower.compiling is not None


def test_a_compilation_without_an_answer_is_found_out_at_once(odd: Odd, tokenizer: Tokenizer) -> None:
    answers = ask(odd.engine, tokenizer, {"bad": (Grammar("regex", "raises"), {})})
    assert answers.ends["bad"].error_code == "grammar_refused"


def test_a_grammar_that_ends_its_process_is_charged_for_the_time_that_it_took(
    odd: Odd, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "COMPILE_BUDGET", 0.5)
    answers = Answers(odd.engine, tokenizer)
    answers.submit("burns", Grammar("regex", "burns"))
    while odd.engine.busy:
        answers.step()
        for one in following(odd.engine)._running_trials():
            while one.pid is not None and Path(f"/proc/{one.pid}").exists():
                time.sleep(0.01)
    answers = ask(odd.engine, tokenizer, {"new": (of_schema(PERSON), {})})
    assert answers.ends["new"].error_code == "grammar_limit"


def test_what_its_own_process_compiles_is_charged_to_a_tenant_too(
    odd: Odd, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "COMPILE_BUDGET", 1.0)
    costly = [Grammar("regex", f"costs {number}") for number in range(4)]
    for number, grammar in enumerate(costly):  # others have shown that they are harmless
        ask(odd.engine, tokenizer, {"x": (grammar, {"tenant": f"good-{number}"})})
    for number, grammar in enumerate(costly[:3]):
        assert ask(odd.engine, tokenizer, {"x": (grammar, {})}).text("x") == f"costs {number}"
    answers = ask(odd.engine, tokenizer, {"kept": (costly[0], {}), "again": (costly[3], {})})
    assert answers.text("kept") == "costs 0"
    assert answers.ends["again"].error_code == "grammar_limit"
    assert (answers.ends["again"].retry_after or 0) > 1
    assert ask(odd.engine, tokenizer, {"x": (costly[3], {"tenant": "other"})}).text("x") == "costs 3"


def test_a_grammar_that_ends_a_tenants_own_process_is_charged_to_it(
    odd: Odd, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "COMPILE_BUDGET", 0.5)
    asked: Asked = {"ends": (Grammar("regex", "ends"), {})}
    assert ask(odd.engine, tokenizer, asked).ends["ends"].error_code == "grammar_refused"
    answers = ask(odd.engine, tokenizer, {"new": (of_schema(PERSON), {})})
    assert answers.ends["new"].error_code == "grammar_limit"


@pytest.mark.parametrize("odd", ["keeps nothing"], indirect=True)
def test_a_grammar_whose_trial_a_tenant_has_paid_is_compiled_and_compiled_again_while_it_is_followed(
    odd: Odd, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "COMPILE_BUDGET", 0.01)
    answers = Answers(odd.engine, tokenizer)
    answers.submit("x", Grammar("regex", "costs (a{60})"), max_tokens=200)
    while not answers.tokens.get("x"):
        answers.step()
    os.kill(pid_of(odd.engine), signal.SIGKILL)
    assert answers.run().text("x") == "costs " + "a" * 60


def test_a_tenant_does_not_pay_for_what_another_has_asked_for_before_it(
    unbounded: Engine, tokenizer: Tokenizer
) -> None:
    answers = Answers(unbounded, tokenizer)
    for number in range(3):
        answers.submit(str(number), hanging(number), tenant="evil")
    for tenant in ("evil", "good"):
        answers.submit(tenant, of_schema(PERSON), tenant=tenant)
    while "good" not in answers.ends:
        answers.step()
    keeps_to(PERSON, answers, "good")
    assert "2" not in answers.ends, "it waited for the other tenant's grammars"
    for number in range(3):
        unbounded.cancel(protocol.Cancel(id=str(number)))
    answers.run()


def test_a_grammar_that_ends_one_tenants_process_is_not_refused_to_others(
    odd: Odd, tokenizer: Tokenizer
) -> None:
    heavy = Grammar("regex", "heavy")
    assert ask(odd.engine, tokenizer, {"x": (heavy, {})}).ends["x"].error_code == "grammar_refused"
    assert ask(odd.engine, tokenizer, {"x": (heavy, {"tenant": "other"})}).text("x") == "heavy"
    assert ask(odd.engine, tokenizer, {"x": (heavy, {})}).ends["x"].error_code == "grammar_refused"


@pytest.mark.parametrize("odd", ["keeps nothing"], indirect=True)
def test_a_grammar_can_be_asked_for_again_while_it_is_compiled_for_those_who_have_left(
    odd: Odd, tokenizer: Tokenizer
) -> None:
    answers = Answers(odd.engine, tokenizer)
    answers.submit("gone", Grammar("regex", "gate"))
    while not is_compiling(odd.engine, "default"):
        answers.step()
    odd.engine.cancel(protocol.Cancel(id="gone"))
    answers.step()
    answers.submit("again", Grammar("regex", "gate"))
    answers.step()
    odd.open_gate()
    assert answers.run().text("again") == "gate"


class Held(grammar_link.Template):
    """In place of the template: the test answers as the process."""

    def __init__(self) -> None:
        pass

    def fork(self, theirs: socket.socket, memory: int | None) -> None:
        self.socket = theirs.dup()

    def answer(self, *messages: Any) -> None:
        self.socket.sendall(b"".join(map(protocol.encode, messages)))


def test_what_a_process_says_before_it_is_lost_is_taken_in() -> None:
    held, follower = Held(), Follower((1, 1), 32)
    follower.users["key"], follower.grammars["key"] = 1, Grammar("regex", "a")
    follower.opening.add("key")
    follower.queue("key")
    follower.work(held)
    compiled = grammar_link.Compiled("key", "it is wrong")
    held.answer(compiled, grammar_link.Forced(0, {99: [1]}))
    told: list[grammar_link.Compiled] = []
    with pytest.raises(grammar_link.ProcessGoneError, match="names tokens"):
        told.extend(follower.receive())
    assert told == [compiled]


def test_a_sequence_whose_grammar_is_not_compiled_again_holds_up_no_other() -> None:
    follower = Follower((1, 1), 32)
    follower.users |= {"bad": 1, "good": 1}
    row = SequenceState(
        "x", 0, [1], protocol.Sampling(), AdapterMix(), arrival=7, arrived_at=0.0, grammar="bad"
    )
    follower.suspects[7] = row
    follower.compiling, follower.deaths["bad"] = "bad", 1
    assert follower.lose("ended") == [("bad", "ended")]
    assert not follower.is_busy


# ---- patterns that have to match at once --------------------------------------------------------


def met_by(count: int) -> list[dict[str, Any]]:
    return [{"pattern": f"^[a-z]*{n}$"} for n in range(count)]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": met_by(9)},
        {"allOf": [{"allOf": met_by(5)}, {"anyOf": [{"const": "x"}, {"allOf": met_by(4)}]}]},
        {"allOf": [{"properties": {"a": part}} for part in met_by(9)]},
        {"allOf": [{"items": part} for part in met_by(9)]},
        {
            "$defs": {f"p{n}": part for n, part in enumerate(met_by(9))},
            "allOf": [{"$ref": f"#/$defs/p{n}"} for n in range(9)],
        },
        {"pattern": "a", "format": "date", "$ref": "#/$defs/x", "$defs": {"x": {"allOf": met_by(7)}}},
        {"properties": {"deep": {"items": {"allOf": met_by(9)}}}},
    ],
)
def test_a_text_that_has_to_match_too_many_patterns_is_refused_before_it_is_compiled(schema: Any) -> None:
    with pytest.raises(ValueError, match="patterns and formats at once, and at most 8 are allowed"):
        check_patterns(schema)


@pytest.mark.parametrize(
    "schema",
    [
        *SCHEMAS,
        True,
        {"anyOf": met_by(300)},
        {"properties": {f"p{n}": part for n, part in enumerate(met_by(300))}},
        {"prefixItems": met_by(300)},
        {"allOf": [{"properties": {f"p{n}": part}} for n, part in enumerate(met_by(300))]},
        {"$defs": {"node": {"pattern": "x", "properties": {"next": {"$ref": "#/$defs/node"}}}},
         "allOf": [{"$ref": "#/$defs/node"}]},
        {"$ref": "#", "pattern": "a"},
        {"$ref": "#/none", "allOf": 3, "properties": [], "anyOf": {}, "items": "x"},
    ],
)  # fmt: skip
def test_patterns_of_different_texts_are_not_added_up(schema: Any) -> None:
    check_patterns(schema)


@pytest.mark.full
def test_patterns_in_the_schema_of_a_grammar_are_counted_too(engine: Engine, tokenizer: Tokenizer) -> None:
    lark = Grammar("lark", 'start: "x" value\nvalue: %json ' + json.dumps({"allOf": met_by(9)}))
    end = ask(engine, tokenizer, {"x": (lark, {})}).ends["x"]
    assert "9 patterns and formats at once" in (end.error_message or "")


def test_references_that_multiply_are_refused_and_not_followed_for_ever() -> None:
    doubling = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}
    with pytest.raises(ValueError, match="references followed"):
        check_patterns({"$defs": {**doubling, "d60": {"type": "string"}}, "$ref": "#/$defs/d0"})
