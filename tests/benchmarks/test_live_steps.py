"""The benchmark of live training: what it prints is what the server did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.training.runs import talking_base

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_two_tenants_train_beside_streams_and_none_is_counted_before_all_got_tokens(tmp_path: Path) -> None:
    base = talking_base(tmp_path / "base")
    command = [sys.executable, str(ROOT / "benchmarks/live_steps.py"), "--tenants", "3", "--busy"]
    command += ["--base", str(base), "--onebase-args", "--kv-memory 100MB --threads 1"]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(re.findall(r"^ *(.*?)((?: +[\d.]+%?| +-){5}) *$", done.stdout, re.MULTILINE))
    assert [name.split(":")[0] for name in found] == [
        "16 streams, 8 of each tenant", "acme", "acme", "globex", "all three",
    ]  # fmt: skip
    for name, told in found.items():
        alone, together, left, *passes = told.split()
        assert float(alone) > 0, name
        assert float(together) > 0, name
        assert left.endswith("%")
        if name == "16 streams, 8 of each tenant":
            assert passes == ["-", "-"]
        else:
            assert min(map(int, passes)) >= (6 if name == "all three" else 2), name


@pytest.mark.parametrize(
    "options", [["--tenants", "3", "--steps", "5"], ["--onebase-args", "--threads 1"], ["--tenants", "-1"]]
)
def test_an_option_that_does_nothing_is_refused_by_name(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/live_steps.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f"error: {options[-2]} " in done.stderr
