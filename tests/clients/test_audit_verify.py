"""`onebase audit verify` finds each entry of an exported audit log that was changed, added or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onebase.cli import main
from onebase_protocol.access import audit_chain


def log(count: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    before = ""
    for number in range(1, count + 1):
        facts: dict[str, Any] = {
            "at": 1_795_577_980.25 + number,
            "tenant": "acme",
            "key": "ob-1",
            "actor": "",
            "action": "adapter.uploaded",
            "target": f"grüße-{number}",
            "version": "ab" * 32,
            "base_id": "base-1",
            "server": "server-1",
            "request": "",
            "details": {"bytes": number, "kind": "upload"},
        }
        before = audit_chain(before, **facts)
        entries.append(
            {"object": "audit.entry", "id": f"audit-{number}", "base": "base", "chain": before, **facts}
        )
    return entries


def verify(file: Path, entries: list[dict[str, Any]], *options: str, lines: bool = False) -> int:
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    file.write_text(text)
    return main(["audit", "verify", str(file), *options])


@pytest.mark.parametrize("lines", [False, True], ids=["a list", "a line an entry"])
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_log_as_it_was_written_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: bool, newest_first: bool
) -> None:
    entries = log(12)
    given = entries[::-1] if newest_first else entries
    assert verify(tmp_path / "audit", given, lines=lines) == 0
    assert entries[-1]["chain"] in capsys.readouterr().out


@pytest.mark.parametrize("field", ["at", "tenant", "key", "action", "target", "version", "details"])
def test_a_changed_entry_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    entries = log(5)
    entries[2][field] = {"bytes": 0} if field == "details" else 1.0 if field == "at" else "other"
    assert verify(tmp_path / "audit", entries) == 1
    assert "audit-3" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 2])
def test_a_removed_entry_is_found(tmp_path: Path, number: int) -> None:
    entries = log(5)
    del entries[number]
    assert verify(tmp_path / "audit", entries) == 1


def test_entries_that_are_missing_are_named_as_a_possible_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = log(5)
    assert verify(tmp_path / "audit", [*entries[:2], *entries[3:]]) == 1
    assert "missing from this list" in capsys.readouterr().err
    entries[2]["target"] = "other"
    assert verify(tmp_path / "audit", entries) == 1
    assert "missing from this list" not in capsys.readouterr().err


def test_a_log_whose_oldest_entries_were_removed_is_right_after_the_sum_of_the_last_of_them(
    tmp_path: Path,
) -> None:
    entries = log(5)
    assert verify(tmp_path / "audit", entries[2:], "--first", entries[1]["chain"]) == 0
    assert verify(tmp_path / "audit", entries[3:], "--first", entries[1]["chain"]) == 1


def test_an_end_that_was_cut_off_is_found_by_the_sum_of_an_earlier_check(tmp_path: Path) -> None:
    entries = log(5)
    last = entries[-1]["chain"]
    assert verify(tmp_path / "audit", entries, "--last", last) == 0
    assert verify(tmp_path / "audit", log(6), "--last", last) == 0
    assert verify(tmp_path / "audit", entries[:-1]) == 0
    assert verify(tmp_path / "audit", entries[:-1], "--last", last) == 1
