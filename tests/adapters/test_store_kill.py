"""kill -9 at any step of any write: the old state or the new one, never half; orphans are swept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def every(request: pytest.FixtureRequest) -> int:
    """Steps from one kill to the next: a run of all tests leaves none out, which has the other's in it."""
    return 4 if request.config.getoption("markexpr") == "not full" else 1


def test_a_process_killed_at_any_step_leaves_the_old_state_or_the_new_one(
    quick_folder: Path, every: int
) -> None:
    paths = [str(ROOT), str(ROOT / "adapters")]
    folder = quick_folder / str(every)
    folder.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "adapters" / "kill_loop.py"),
            str(folder),
            str(every),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # If no step was left out, one was within every operation.
    ended = report["operations"]
    assert (report["steps"] > 150, report["killed"] > 5, len(ended) > 150 // every) == (True, True, True)
    if every == 1:
        assert sorted(set(ended)) == list(range(14))
