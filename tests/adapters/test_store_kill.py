"""kill -9 at any step of any write: the old state or the new one, never half; orphans are swept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is room: a kill loses nothing that was written, synced or not."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 32 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_process_killed_at_any_step_leaves_the_old_state_or_the_new_one(quick_folder: Path) -> None:
    paths = [str(ROOT), str(ROOT / "adapters")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "adapters" / "kill_loop.py"), str(quick_folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # The loop ended because a life came through, and before that one was killed within every operation.
    assert set(report["killed_in_operation"]) == set(range(report["operations"]))
    assert len(report["killed_in_operation"]) > 100
