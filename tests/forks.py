"""Python programs that begin as forks of one that has imported torch and transformers, which takes seconds.

`python forks.py FD` is that one: it starts a program for each request that comes through the socket.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT / part) for part in ("", "engine", "server", "adapters", "clients/python", "benchmarks")]
PR_SET_CHILD_SUBREAPER = 36
ABOVE = 500
"""Descriptors from here on are nobody's."""
GIVEN = "ONEBASE_TEST_NURSERY"
"""In the environment of a program that has a nursery of its own: the descriptor for its requests."""
CONFINED = "onebase_server.jobs.python_grader"
"""Program that is never a fork: it confines itself by what it has when it begins."""
Popen: type[subprocess.Popen[Any]] = subprocess.Popen
"""As Python has it: `subprocess.Popen` is replaced where programs begin as forks."""
ROOM = "." * 200
"""In the command line of the program that forks, for those of what it starts."""


class Nursery:
    """The program that forks. What it starts are children of this process, as others are."""

    def __init__(self, requests: socket.socket, process: subprocess.Popen[Any] | None = None) -> None:
        self._socket = requests
        self._process = process
        self._lock = threading.Lock()

    @classmethod
    def begin(cls) -> Nursery:
        """A new one, which imports everything."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), ROOM],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)},
            )
        return cls(ours, process)

    @classmethod
    def given(cls) -> Nursery | None:
        """That of this process, which is a fork itself."""
        number = os.environ.pop(GIVEN, None)
        return None if number is None else cls(socket.socket(fileno=int(number)))

    @classmethod
    def fork(cls) -> Nursery:
        """Another one for this process, which is a fork of the first."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            serve(theirs)
            os._exit(0)
        theirs.close()
        return cls(ours)

    def start(self, request: dict[str, Any], descriptors: Sequence[int]) -> int:
        """Start a program; its process id."""
        adopt = ctypes.CDLL(None).prctl
        with self._lock:
            adopt(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
                return int(self._socket.recv(1 << 10))
            finally:
                adopt(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def close(self) -> None:
        self._socket.close()
        if self._process is not None:
            self._process.wait()

    def popen(
        self, children: Literal["plain", "forks", "forks of forks", "own"] = "plain"
    ) -> type[subprocess.Popen[Any]]:
        """`subprocess.Popen`, but for how programs of this Python begin.

        Their own children begin as any process, or as forks too, whose children may be forks as well, or as
        what they ask of `Nursery.given()`.

        A `preexec_fn` is not run; Ctrl-C reaches what is forked.
        """
        whole = inspect.signature(Popen._execute_child)  # type: ignore[attr-defined]

        class ForkingPopen(Popen):  # type: ignore[misc, valid-type]
            def _execute_child(popen, *arguments: Any) -> None:  # noqa: N805
                how = whole.bind(popen, *arguments).arguments
                words = [how["args"]] if isinstance(how["args"], str) else [str(one) for one in how["args"]]
                options = {word for word in words[1:3] if word in ("-u", "-P")}
                words = [word for word in words if word not in options]
                known = words[1:] and (words[1] in ("-m", "-c") or not words[1].startswith("-"))
                if how["shell"] or words[0] != sys.executable or not known or CONFINED in words:
                    super()._execute_child(*arguments)  # type: ignore[misc]
                    return
                ends = [how[end] for end in ("p2cread", "c2pwrite", "errwrite")]
                standard = [number if end == -1 else end for number, end in enumerate(ends)]
                request = {
                    "words": words[1:],
                    "folder": os.fspath(how["cwd"] or Path.cwd()),
                    "environment": dict(os.environ if how["env"] is None else how["env"]),
                    "numbers": [0, 1, 2, *how["pass_fds"]],
                    "session": how["start_new_session"],
                    "umask": how["umask"] if how["umask"] >= 0 else own_umask(),
                    "unbuffered": "-u" in options,
                    "children": children,
                }
                popen.pid = self.start(request, [*standard, *how["pass_fds"]])
                popen._child_created = True  # type: ignore[attr-defined]
                pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
                popen._close_pipe_fds(*(how[end] for end in pipes))  # type: ignore[attr-defined]

        return ForkingPopen


def serve(requests: socket.socket) -> None:
    """Returns in the processes that are to run a program, and when nobody asks any more."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 100)
        if not data:
            return
        told, tell = os.pipe()
        if (between := os.fork()) == 0:
            # The one in between ends at once, and leaves its child to who asked.
            middle = os.getpid()
            if (child := os.fork()) != 0:
                os.write(tell, str(child).encode())
                os._exit(0)
            while os.getppid() == middle:  # a program may ask to end with its parent
                time.sleep(0.001)
            os.close(told)
            os.close(tell)
            requests.close()
            become(json.loads(data), descriptors)
            return
        os.close(tell)
        os.waitpid(between, 0)
        requests.send(os.read(told, 100))
        for descriptor in (told, *descriptors):
            os.close(descriptor)


def own_umask() -> int:
    """Return this process's umask, which a child would have, without changing it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"^Umask:\s*(\d+)", status, re.MULTILINE)[1], 8)  # type: ignore[index]


def become(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Have what a new process would have, and run its program."""
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, ABOVE) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, request["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["session"]:
        os.setsid()
    if request["umask"] >= 0:
        os.umask(request["umask"])
    name(request["words"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    open_standard_streams(unbuffered=request["unbuffered"])
    if torch := sys.modules.get("torch"):
        read_settings_of_the_hub()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    if request["children"] == "own":
        os.environ[GIVEN] = str(Nursery.fork()._socket.detach())
    if request["children"] in ("forks", "forks of forks"):
        deeper: Literal["plain", "forks"] = "plain" if request["children"] == "forks" else "forks"
        subprocess.Popen = Nursery.fork().popen(deeper)  # type: ignore[misc]
        asyncio.create_subprocess_exec = create_subprocess_exec  # type: ignore[assignment]
    end_with(lambda: run(request["words"]))


def open_standard_streams(*, unbuffered: bool) -> None:
    """Those of before have in mind what the descriptors were."""
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or None
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, number, errors in (("stdout", 1, None), ("stderr", 2, "backslashreplace")):
        stream = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=number == 2 or stream.isatty(), write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(words: Sequence[str]) -> None:
    """What `python *words` runs."""
    first, *rest = words
    if first in ("-m", "-c"):
        program, *rest = rest
    sys.argv = [first, *rest]
    if first == "-m":
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    else:
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def end_with(program: Callable[[], None]) -> NoReturn:
    """Run it, and end as Python does after it, but for taking every module apart, which takes a second."""
    status: object = 0
    interrupted = False
    try:
        program()
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((status or 0) & 0xFF)


def read_settings_of_the_hub() -> None:
    """huggingface_hub and transformers read them when they are imported."""
    import huggingface_hub.constants as settings
    from huggingface_hub import hf_api
    from huggingface_hub.utils import _cache_manager
    from transformers.utils import hub

    importlib.reload(settings)
    hf_api.api.endpoint, _cache_manager.HF_HUB_CACHE = settings.ENDPOINT, settings.HF_HUB_CACHE
    hub.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", f"{settings.HF_HOME}/modules")


def name(words: Sequence[str]) -> None:
    """Have a command line of one's own, by which tests find processes."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    line = "\0".join(("python", *words)).encode()[: end - start - 1]
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(line.ljust(end - start, b"\0"))


class Started:
    """What `asyncio.create_subprocess_exec` gives, of a process that began as a fork."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._process = process
        self.pid, self.kill, self.send_signal = process.pid, process.kill, process.send_signal

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def wait(self) -> int:
        if self._process.poll() is None:
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            handle = os.pidfd_open(self.pid)
            loop.add_reader(handle, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(handle)
                os.close(handle)
        return self._process.wait()


async def create_subprocess_exec(*command: str, **how: Any) -> Started:
    return Started(subprocess.Popen(command, **how))


def import_all() -> None:
    """What our programs import, but the SDK; nothing is computed, which would start threads."""
    from onebase_engine.imports import quick_imports

    with quick_imports():
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        for module in ("run", "cli.train", "cli.sweep"):
            importlib.import_module(f"onebase_training.{module}")
        for module in ("engine", "trainer", "verifier"):
            importlib.import_module(f"onebase_server.processes.{module}")
        for module in ("app.cli", "app.startup"):
            importlib.import_module(f"onebase_server.{module}")
    # Trainers measure the machine in three passes, not for a third of a second: no test looks at it.
    estimate = importlib.import_module("onebase_training.estimate")
    estimate._PROBE_SECONDS = 0.0  # type: ignore[attr-defined]
    gc.freeze()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        import_all()
        serve(requests)
    os._exit(0)  # without taking every module apart, of which Triton's bindings write a page
