"""The protocol's table of error codes is what the sources raise: each code, with its status, and no other."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from onebase_edge import errors
from onebase_protocol.errors import ERROR_CODES

ROOT = Path(__file__).parents[2]
TOLD = {(status, code) for status, codes, _ in ERROR_CODES for code in codes}
STATUS = {kind.__name__: status for kind, (status, _) in errors._TABLE.items()}
"""HTTP status of each error, by its class."""
ELSEWHERE = {"SequenceFailedError"}
"""Errors whose status comes from their code, and not from their class."""


@functools.cache
def sources() -> list[tuple[Path, ast.Module]]:
    return [
        (file, ast.parse(file.read_text(encoding="utf-8")))
        for folder in ("server", "adapters", "engine")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]


def raised() -> Iterator[tuple[int, str, str]]:
    """Status, code and place of each error that the server raises with a code in its own words."""
    for file, tree in sources():
        owners = [(node.name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for owner, scope in [("", tree), *owners]:
            for call in ast.walk(scope):
                if not isinstance(call, ast.Call):
                    continue
                kind = getattr(call.func, "id", None)
                if kind is None and getattr(call.func, "attr", None) == "__init__":
                    kind = owner
                if kind not in STATUS or kind in ELSEWHERE:
                    continue
                for keyword in call.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        yield (
                            STATUS[kind],
                            str(keyword.value.value),
                            f"{file.relative_to(ROOT)}:{call.lineno}",
                        )


def test_every_code_that_the_server_raises_is_in_the_table_with_its_status() -> None:
    found = list(raised())
    assert len(found) > 80
    unknown = [f"{status} {code} in {place}" for status, code, place in found if (status, code) not in TOLD]
    assert not unknown, "\n".join(unknown)


def test_every_error_of_the_api_has_a_status_and_none_takes_its_parents() -> None:
    kinds = [
        node.name
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", None) in {"ApiError", *STATUS} for base in node.bases)
    ]
    assert len(kinds) > 20
    assert sorted(set(kinds) - set(STATUS)) == []


def test_codes_of_the_engine_that_a_caller_can_cure_are_in_the_table_with_their_status() -> None:
    cured = {(status, code) for code, status in errors.CALLER_CODES.items()}
    assert cured - TOLD == set()


def test_the_reasons_for_which_an_adapter_is_not_accepted_are_in_the_table() -> None:
    kinds = {"AdapterFormatError", "HubError", "RejectedError", "Rejected"}
    told = {code for _, code in TOLD}
    found = {
        (call.args[0].value, f"{file.relative_to(ROOT)}:{call.lineno}")
        for file, tree in sources()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) in kinds and call.args
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }
    assert len(found) > 30
    assert sorted((code, place) for code, place in found if code not in told) == []


def test_every_code_of_the_table_is_raised_somewhere() -> None:
    words = {
        node.value
        for file, tree in sources()
        if file.parent.name != "onebase_protocol"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert sorted({code for _, code in TOLD} - words) == []


def test_a_code_is_told_once_for_each_status() -> None:
    told = [(status, code) for status, codes, _ in ERROR_CODES for code in codes]
    assert len(told) == len(set(told))
    assert [status for status, _, _ in ERROR_CODES] == sorted(status for status, _, _ in ERROR_CODES)
