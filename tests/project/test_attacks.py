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
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| tried")]

    assert len(rows) > 40
    assert [row for row in rows if not re.search(r"\.py::\w+` \|$", row)] == []
