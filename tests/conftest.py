"""Which tests run in one process, and in which order: the slowest begin, so that no worker ends late."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2._transports import default as transports
from hypothesis import HealthCheck, settings
from tests.forks import Nursery

from onebase_engine.machine import with_room
from onebase_protocol.command_line import end_process

# On a busy machine an example may take any time; fixtures that a function shares are meant so. Each run draws
# other examples; `make check-long` draws ten times as many where a test does not say how many. Kernels under
# sanitizers, which are slow, get few.
for name, examples in (("few", 12), ("short", 40), ("long", 400)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
settings.load_profile(os.environ.get("ONEBASE_EXAMPLES", "short"))

# Each client reads the certificates of all authorities, which takes 6 ms: those of a process share them.
transports.create_ssl_context = functools.cache(transports.create_ssl_context)

# Read when Triton is imported, which PyTorch does: its kernels run on the CPU here.
if not Path("/dev/nvidiactl").exists() and os.environ.get("ONEBASE_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("seconds.json")
"""Seconds of each file; ONEBASE_SECONDS=write in the environment writes what a run took."""
SECONDS: dict[str, float] = json.loads(TABLE.read_text())
UNKNOWN_SECONDS = 10.0
SHARED = {
    "tests/server": "api: Any",
    "tests/clients": "server: Server",
    "tests/console": "real: Server",
    "tests/verifier": "bench: Bench",
}
"""What a whole folder shares takes many seconds to start: its files that use it run in one process."""


def group_of(file: str) -> str:
    """What runs in one process: the file, or what it shares with others."""
    folder = file.rpartition("/")[0]
    shared = SHARED.get(folder)
    return folder if shared and shared in (ROOT / file).read_text(encoding="utf-8") else file


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is imported and collected stays: no search for garbage goes through it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.runtest = functools.partial(with_room, item.runtest)  # type: ignore[method-assign]
    if not hasattr(config, "workerinput"):
        return
    groups = {file: group_of(file) for file in {file_of(item.nodeid) for item in items}}
    seconds: Counter[str] = Counter()
    for file, group in groups.items():
        seconds[group] += SECONDS.get(file, UNKNOWN_SECONDS)
    items.sort(key=lambda item: (-seconds[groups[file_of(item.nodeid)]], groups[file_of(item.nodeid)]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(file_of(nodeid))

    return Groups(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """The processes that run tests begin as forks as well."""
    warm = Nursery.begin()
    config.add_cleanup(warm.close)
    subprocess.Popen = warm.popen("own")  # type: ignore[misc]


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class Stopwatch:
    """Writes TABLE."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        found = {file: round(seconds, 1) for file, seconds in (SECONDS | self.seconds).items()}
        kept = {file: found[file] for file in sorted(found) if (ROOT / file).exists()}
        TABLE.write_text(json.dumps(kept, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup it is ignored, and every server that a test starts would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if os.environ.get("ONEBASE_SECONDS") == "write" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stopwatch())


def pytest_sessionstart(session: pytest.Session) -> None:
    """The last lines are the results, and not what Triton's bindings say of the interpreter's end."""
    if not hasattr(session.config, "workerinput"):
        session.config.add_cleanup(lambda: end_process(int(session.exitstatus)))


@pytest.fixture(scope="module")
def quick_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is room: a kill loses nothing that was written, synced or not."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 64 << 20:
        yield tmp_path_factory.mktemp("quick")
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery.given() or Nursery.begin()
    yield made
    made.close()


@pytest.fixture(scope="module")
def forks(nursery: Nursery) -> Iterator[None]:
    """Python programs that the module's tests start are forks of one that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", nursery.popen())
        yield
