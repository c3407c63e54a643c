"""The documents' list of bases is that of the matrix's last run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("base_matrix", ROOT / "tools" / "base_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_last_run(matrix: ModuleType) -> None:
    assert matrix.PAGE.read_text() == matrix.page(), "run: python tools/base_matrix.py --page"


def test_every_type_and_variant_has_a_state(matrix: ModuleType) -> None:
    results = {one.title: one for one in matrix.read_results()}
    assert matrix.VARIANTS.keys() <= results.keys()
    if matrix.read_versions()["transformers"] == transformers.__version__:
        assert set(matrix.all_types()) <= results.keys()


def test_every_refusal_has_a_reason_that_the_page_names(matrix: ModuleType) -> None:
    refused = [one for one in matrix.read_results() if one.state == "refused"]
    assert all(one.reason for one in refused)
    assert "### Others" not in matrix.page()


def test_nothing_is_served_wrong(matrix: ModuleType) -> None:
    assert [one.title for one in matrix.read_results() if one.state == "wrong"] == []
