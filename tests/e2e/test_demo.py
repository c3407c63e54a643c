"""`make demo`'s script, for real: the default base in NF4, both adapters, over HTTP."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from onebase_adapters.registry.database import Database

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["demo_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_script = load_script()


@contextmanager
def demo(*options: str) -> Iterator[subprocess.Popen[str]]:
    """The script; it is ended however the test ends, and after TIMEOUT_S in any case."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--tokens", "24", *options]
    environment = {**os.environ, "COLUMNS": "110", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watchdog = threading.Timer(TIMEOUT_S, process.terminate)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.terminate()


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """What the script prints up to and including the line that holds `wanted`."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if wanted in line:
            return text
    raise AssertionError(f"{wanted!r} did not come; the script said:\n{text}")


def answers(text: str) -> dict[str, str]:
    """Title to answer, for the sections of the form `--- title (speed)`."""
    parts = re.split(r"^--- (.+) \((\d+) tokens, [\d.]+ tokens/s\)$", text, flags=re.MULTILINE)
    return {title: answer.strip() for title, answer in zip(parts[1::3], parts[3::3], strict=True)}


def port_of(text: str) -> int:
    found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
    assert found, text
    return int(found[1])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_answers(text: str, taken: int) -> int:
    """The port, not the taken one, of a script that has shown what the base and both adapters say."""
    assert "is taken by another program" in text
    port = port_of(text[text.index("Ready") :])
    assert port != taken
    said = answers(re.split("Stopping the server|The server is running", text)[0])
    assert set(said) == {"base", "adapter orders", "adapter pirate"}
    assert said["adapter orders"].startswith('{"customer": "Anna Keller", "quantity": 3')
    assert len(set(said.values())) == 3
    return port


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def kept_data(folder: Path, change: str) -> Path:
    """The data folder of a demo whose registry was then changed."""
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    database.migrate()
    database.close()
    with closing(sqlite3.connect(folder / "registry.db")) as connection:
        connection.execute(change)
        connection.commit()
    return folder


@pytest.mark.parametrize(
    ("change", "is_kept"),
    [
        ("PRAGMA user_version = 0", True),
        ("UPDATE alembic_version SET version_num = '0042'", False),
        ("ALTER TABLE training_jobs DROP COLUMN hold", False),
    ],
)
def test_data_of_another_version_is_set_aside_and_told(tmp_path: Path, change: str, is_kept: bool) -> None:
    data, said = kept_data(tmp_path / "demo", change), io.StringIO()
    (tmp_path / "demo-1").mkdir()
    demo_script.set_aside_if_unusable(data, Console(file=said, width=999))
    assert data.exists() == is_kept
    assert (tmp_path / "demo-2" / "registry.db").exists() != is_kept
    assert said.getvalue() == "" if is_kept else str(tmp_path / "demo-2") in said.getvalue()


def test_data_that_is_no_registry_is_set_aside_and_what_another_version_uses_is_not(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    demo_script.set_aside_if_unusable(tmp_path / "none", console)
    data = tmp_path / "broken"
    data.mkdir()
    (data / "registry.db").write_bytes(b"x" * 4096)
    demo_script.set_aside_if_unusable(data, console)
    assert (tmp_path / "broken-1").exists()
    used = kept_data(tmp_path / "used", "UPDATE alembic_version SET version_num = '0042'")
    with closing(sqlite3.connect(used / "registry.db")) as other:
        other.execute("SELECT * FROM alembic_version").fetchall()
        with pytest.raises(demo_script.DemoError, match="is using"):
            demo_script.set_aside_if_unusable(used, console)
    assert used.exists()


@pytest.mark.full
def test_a_demo_that_runs_once_ends_with_its_server() -> None:
    with taken_port() as taken, demo("--once", "--port", str(taken)) as process:
        text, _ = process.communicate()
    assert process.returncode == 0, text
    assert not is_listening(check_answers(text, taken))


def readme_blocks(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.+?)^```$", readme, re.MULTILINE | re.DOTALL)


def send(curl: str, port: int) -> dict[str, Any]:
    """What a curl command of the form `curl URL -H HEADER -d BODY` would get from the server at `port`."""
    program, url, *options = shlex.split(curl.replace("\\\n", " "))
    assert program == "curl"
    given = dict(zip(options[::2], options[1::2], strict=True))
    name, _, value = given["-H"].partition(": ")
    request = urllib.request.Request(
        re.sub(r":\d+/", f":{port}/", url), given["-d"].encode(), headers={name: value}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return dict(json.load(response))


def run_python(source: str, port: int) -> str:
    source = source.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{port}")
    result = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "ONEBASE_URL": f"http://127.0.0.1:{port}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_base_and_adapters_answer_differently_and_the_server_does_as_the_readme_says_until_ctrl_c() -> None:
    with taken_port() as taken, demo("--port", str(taken)) as process:
        text = read_until(process, "Ctrl-C stops the server")
        port = check_answers(text, taken)
        (curl,) = [block for block in readme_blocks("") if block.startswith("curl")]
        (printed,) = re.findall(r"^  (curl .+?)\n\n", text, re.MULTILINE | re.DOTALL)
        answer = send(curl, port)
        assert json.loads(answer["choices"][0]["text"])["customer"] == "Anna"
        assert answer["adapter"].startswith("orders@")
        assert send(printed, port)["choices"][0]["text"]
        outputs = [run_python(block, port) for block in readme_blocks("python")]
        assert outputs
        assert all(output.strip() for output in outputs)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "Stopped." in text
    assert not is_listening(port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def servers(port: int) -> list[int]:
    """The processes that were started with `--port PORT`: the script, and its server."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"\0--port\0{port}\0".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(int(TIMEOUT_S / 0.1)):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError(what)


@contextmanager
def on_a_terminal(shell: str, port: int) -> Iterator[tuple[int, int]]:
    """A shell's command on a terminal of its own: its pid, and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "-c", shell])
    try:
        wait_until(lambda: is_listening(port), "the server was not started")
        assert servers(port), "it listens, and no process is found that was started with its port"
        yield pid, terminal
        wait_until(lambda: not is_listening(port) and not servers(port), "the server goes on")
    finally:
        for left in servers(port):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        with suppress(OSError):
            os.close(terminal)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def script(port: int) -> str:
    return shlex.join([sys.executable, str(ROOT / "examples" / "demo.py"), "--port", str(port)])


def test_ctrl_c_in_a_pipeline_leaves_no_server_behind(tmp_path: Path) -> None:
    port = free_port()
    with on_a_terminal(f"{script(port)} 2>&1 | tee {tmp_path / 'log'}", port) as (_, terminal):
        os.write(terminal, b"\x03")


@pytest.mark.full
def test_a_terminal_that_is_closed_leaves_no_server_behind() -> None:
    port = free_port()
    with on_a_terminal(script(port), port) as (_, terminal):
        os.close(terminal)


def test_the_server_ends_with_a_demo_that_is_killed() -> None:
    port = free_port()
    with on_a_terminal(f"exec {script(port)}", port) as (pid, _):
        os.kill(pid, signal.SIGKILL)
