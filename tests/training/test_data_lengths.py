"""Rows that are too long: refused, cut or left out, and what the base can read at most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.training.data_support import Load, base_tokenizer, chat, reason, rows_loader
from transformers import AutoTokenizer


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return rows_loader(tmp_path)


def test_a_long_row_is_refused_with_its_length_and_the_ways_out(load: Load) -> None:
    found = reason(load, chat("q", "a"), chat("q", "word " * 100), max_length=64)
    assert "1 problem" in found
    assert "line 2: " in found
    assert "tokens, where 64 is the most: shorten the row, raise max_length" in found


def test_long_rows_are_truncated_or_dropped_and_counted(load: Load) -> None:
    rows = [chat("q", "a"), chat("q", "word " * 100)]
    cut = load(*rows, max_length=64, too_long="truncate")
    assert [len(row) for row in cut.rows] == [34, 64]
    assert [place.line for place in cut.report.truncated] == [2]
    kept = load(*rows, max_length=64, too_long="drop")
    assert [row.line for row in kept.rows] == [1]
    assert [place.line for place in kept.report.dropped] == [2]
    assert "every row was dropped" in reason(load, rows[1], max_length=64, too_long="drop")


def test_a_row_whose_reply_is_cut_away_is_an_error(load: Load) -> None:
    found = reason(load, chat("word " * 100, "a"), max_length=64, too_long="truncate")
    assert "nothing to learn within the first 64 tokens (max_length)" in found


def test_no_row_is_longer_than_the_base_can_read(load: Load, tmp_path: Path) -> None:
    tokenizer = base_tokenizer()
    limited = tmp_path / "base"
    tokenizer.save_pretrained(limited)
    (limited / "config.json").write_text(json.dumps({"max_position_embeddings": 40, "model_type": "llama"}))
    (limited / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    small = AutoTokenizer.from_pretrained(limited)
    assert "where 40 is the most" in reason(load, chat("q", "word " * 20), tokenizer=small)
