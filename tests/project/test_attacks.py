"""Each line of docs/attacks.md names tests that there are."""

from __future__ import annotations

import re

import pytest
from tests.server.support import ROOT

PAGE = (ROOT / "docs" / "attacks.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_an_attack_is_held_by_a_test_that_there_is(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()


def test_every_attack_names_its_test() -> None:
    attacks = re.findall(r"^- .+(?:\n  .+)*", PAGE, re.MULTILINE)

    assert len(attacks) > 140
    held = re.compile(r" Held\s+by\s.*\.py::\w+`\.$", re.DOTALL)
    assert [attack for attack in attacks if not held.search(attack)] == []
