"""Text from anybody on a terminal."""

from __future__ import annotations

import pytest

from onebase_adapters.training.cli.printable import printable


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\udce9", "\U000e0041"]
)
def test_what_steers_a_terminal_or_cannot_be_encoded_is_replaced(character: str) -> None:
    shown = printable(f"a{character}b")
    assert shown == "a\N{REPLACEMENT CHARACTER}b"
    assert shown.encode()


@pytest.mark.parametrize("text", ["two\nlines\tof text", "40\u00a0€", "日本語 עברית नमस्ते", "👩\u200d🔬", ""])
def test_text_of_any_script_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
