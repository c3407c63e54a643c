"""Names in a config mean the modules that PEFT means by them, without its regular expressions."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from tests.adapters.format_support import SETTINGS

from onebase_adapters.format.config import AdapterFormatError, check_config
from onebase_adapters.format.patterns import NamePattern, PatternError, Targets, endings, layer_numbers

PARTS = [
    "q_proj",
    "k_proj",
    "q.proj",
    "layers",
    "layers.0",
    "layers.1",
    "layers.10",
    "model",
    "mlp",
    "lm_head",
]
MODULES = [
    "lm_head",
    "q_proj",
    "model.embed_tokens",
    "layers.1.q_proj",
    "model.layersX1.q_proj",
    *(
        f"model.layers.{i}.{part}_proj"
        for i in (0, 1, 10)
        for part in ("self_attn.q", "self_attn.k", "mlp.q")
    ),
    "model.layers.1.mlp.experts.0.q_proj",
    "model.h.1.q_proj.2.k_proj",
    "model.layers.1",
    "model.1.layers.q_proj",
]

names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join) | st.sampled_from(MODULES)
keys = st.builds(
    lambda start, name, end: f"{start}{name}{end}",
    st.sampled_from(["", "^"]),
    names,
    st.sampled_from(["", "$"]),
)
escaped = keys.map(lambda key: key.replace(".", r"\."))
fast = settings(max_examples=400, database=None)


@fast
@given(pattern=st.dictionaries(keys | escaped, st.integers(1, 99), max_size=5))
def test_a_pattern_gives_each_module_what_peft_gives_it(pattern: dict[str, int]) -> None:
    ours = NamePattern(pattern)
    for module in MODULES:
        assert ours.lookup(module, 0) == pattern.get(get_pattern_key(list(pattern), module), 0)


@fast
@given(
    targets=st.lists(names, min_size=1, max_size=4),
    excluded=st.none() | st.lists(names, max_size=2),
    layers=st.none() | st.integers(0, 10) | st.lists(st.integers(0, 10), max_size=3),
    patterns=st.none()
    | st.sampled_from(["", "layers", "h", "model"])
    | st.lists(st.sampled_from(["layers", "h"]), max_size=2),
)
def test_targets_are_the_modules_that_peft_would_wrap(
    targets: list[str], excluded: Any, layers: Any, patterns: Any
) -> None:
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": patterns,
    }
    facts = check_config(json.dumps({**SETTINGS, **fields}).encode())
    ours = Targets.of(
        facts.target_modules, facts.exclude_modules, facts.layers_to_transform, facts.layers_pattern
    )
    assert ours is not None
    peft = SimpleNamespace(**fields, modules_to_save=None, target_parameters=None)
    for module in MODULES:
        theirs = check_target_module_exists(peft, module)
        assert ours.means(module) == (theirs is True), module


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a+)+$"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "exclude_modules": "(a+)+$"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(a+)+$"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "model.layers"]},
    ],
)
def test_a_regular_expression_is_not_evaluated(fields: dict[str, Any]) -> None:
    facts = check_config(json.dumps({**SETTINGS, **fields}).encode())
    assert (
        Targets.of(
            facts.target_modules, facts.exclude_modules, facts.layers_to_transform, facts.layers_pattern
        )
        is None
    )


@pytest.mark.parametrize(
    "key",
    [
        "(?=a)a",
        "(?<!a)b",
        "(?i)a",
        "(?P<x>a)",
        "(?>a)",
        "(a)\\1",
        "a\\b",
        "\\Aa",
        "a++",
        "a**",
        "a{2}{3}",
        "a{x}",
        "a{3,2}",
        "a{99999}",
        "(" * 40 + "a" + ")" * 40,
        "a)|(b",
        "(a",
        "[a",
        "[z-a]",
        "[[a]]",
        "[a--b]",
        "^*",
        "*",
        "\\",
        "((a{100}){100}){100}",
        "((){1000}){1000}",
        "a" * 1001 + "?",
    ],
)
def test_a_key_that_has_no_bound_is_refused(key: str) -> None:
    with pytest.raises(PatternError, match=r"names of modules"):
        NamePattern({key: 1})
    with pytest.raises(AdapterFormatError, match="rank_pattern"):
        check_config(json.dumps({**SETTINGS, "rank_pattern": {key: 1}}).encode())


def test_regular_expressions_have_a_limit_together() -> None:
    with pytest.raises(PatternError, match="more than"):
        NamePattern({f"(q{number})*": 1 for number in range(257)})
    slow = NamePattern({f"(.?.?.?.?){{{number}}}x": 1 for number in range(90, 92)})

    def look_up_all() -> None:
        for number in range(1000):
            slow.lookup(f"model.layers.{number}.self_attn.q_proj", 1)

    with pytest.raises(PatternError, match="too long"):
        look_up_all()


def test_an_expression_that_makes_others_run_for_years_is_matched_at_once() -> None:
    """`re` would take 2 ** 60 steps for it; this is at most 60 characters times its states."""
    pattern = NamePattern({"((a|a)*)*b|(a?){40}a{40}": 1})
    assert pattern.lookup("a" * 60, 0) == 1
    assert pattern.lookup("a" * 39 + "c", 0) == 0


ATOMS = ["q", "proj", "[a-c]", "[^q]", r"\d", r"\w", ".", r"\.", "layers", "(?:q|k)", "(q_proj)", "[0-9]", ""]
NAMES = ["q_proj", "0.q_proj", "h.11.k", "lm_head", "a", "aab.c", "q", "layers.q"]
"""Short ones: the reference takes a time that doubles with each character."""


@st.composite
def expressions(draw: st.DrawFn, depth: int = 2) -> str:
    if depth == 0:
        atom = draw(st.sampled_from(ATOMS))
    else:
        inner = expressions(depth=depth - 1)
        parts = draw(st.lists(inner, min_size=1, max_size=3))
        atom = draw(st.sampled_from(["({})", "(?:{})"])).format(draw(st.sampled_from(["|", ""])).join(parts))
    if atom:
        atom += draw(
            st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,1}", "{,2}", "*?", "{1,}"])
        )
    return draw(st.sampled_from(["", "", "", "^"])) + atom + draw(st.sampled_from(["", "", "$"]))


@settings(deadline=None, max_examples=500)
@given(st.lists(expressions(), min_size=1, max_size=3, unique=True), st.sampled_from(NAMES))
def test_an_expression_means_what_it_means_to_peft(keys: list[str], name: str) -> None:
    values = {key: place + 1 for place, key in enumerate(keys)}
    try:
        pattern = NamePattern(values)
    except PatternError as error:
        assume("anchor" not in str(error) and "repeats nothing" not in str(error))
        raise
    assert pattern.lookup(name, 0) == values.get(get_pattern_key(keys, name), 0)


def test_endings_are_the_dotted_ends_of_a_name() -> None:
    assert list(endings("a.bc.d")) == ["a.bc.d", "bc.d", "d"]


def test_a_number_that_no_layer_has_is_none() -> None:
    name = f"model.layers.7.{'1' * 5000}.²/٣.x.²"
    assert layer_numbers(name) == {7}
    targets = Targets.at_most(("x",), frozenset({7}))
    assert targets.means("model.layers.7.x")
    assert not targets.means(f"model.layers.{'7' * 5000}.x")
