"""What of the processor and of the memory a process may take from others."""

from __future__ import annotations

import os
from pathlib import Path


def assert_behind(pid: int, niceness: int) -> None:
    """Assert that a process leaves the processor to this one, and is killed before it when memory is short.

    It must be of this session: Linux shares the processor evenly between sessions, whatever the niceness.
    """
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, own + niceness) > own
    assert os.getsid(pid) == os.getsid(0)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
