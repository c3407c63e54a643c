"""`onebase serve` and `onebase base fetch | check`: help, wrong options, and what is printed."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.forks import Nursery
from tests.hub_standin import HubStandIn

from onebase_edge.folder_lock import lock_folder
from onebase_edge.settings import environment_name, option_name, setting_fields
from onebase_engine.base.default_base import BaseFetchError, BaseSpecError
from onebase_server.app import startup
from onebase_server.app.cli import base, serve
from onebase_server.app.startup import LEAST_FILES, StartupError

from .support import ROOT, Starter, make_folder, serving, upload

Check = Callable[..., subprocess.CompletedProcess[str]]


def test_the_commands_are_found_by_the_sdk() -> None:
    found = {entry.name: entry.load() for entry in entry_points(group="onebase.commands")}

    assert (found["serve"], found["base"]) == (serve, base)
    assert found.keys() == {
        "serve",
        "route",
        "cluster",
        "base",
        "keys",
        "tenants",
        "backup",
        "train",
        "data",
        "estimate",
        "sweep",
    }


def test_help_explains_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serve(["--help"])

    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for item, _ in setting_fields():
        assert option_name(item.name) in text
    assert "curl" in text
    assert "(default: 8000)" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "eighty"], "--port"),
        (["--quantization", "fp4"], "nf4"),
        (["--kv-memory", "lots"], "2GB"),
        (["--kv-dtype", "fp8"], "int8"),
        (["--adapter", "acme"], "NAME=FOLDER"),
        (["--max-sequences", "0"], "--max-sequences"),
        (["--adaptor", "x=y"], "--adaptor"),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        serve(options)

    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "usage:" not in error


def test_a_port_in_use_is_reported_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        status = serve(["--port", str(port)])

    assert status == 1
    text = capsys.readouterr().err
    assert "--port" in text
    assert "loading" not in text


def test_a_taken_port_or_folder_is_refused_before_the_libraries_are_imported(tmp_path: Path) -> None:
    program = """
import sys
from onebase_server.app.cli import serve
status = serve(sys.argv[1:])
print(status, *({"torch", "fastapi", "sqlalchemy", "transformers"} & sys.modules.keys()))
"""

    def serve_again(*options: str) -> tuple[str, str]:
        ended = subprocess.run(
            [sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=120
        )
        return ended.stdout, " ".join(ended.stderr.split())

    folder = tmp_path / "data"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told, error = serve_again("--port", port, "--data-dir", str(folder))
    assert told == "1\n"
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "--port" in error
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, stdin=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    told, error = serve_again("--port", "0", "--data-dir", str(folder))
    assert told == "1\n"
    assert f"the data folder {folder} is in use by another server (process {holder.pid})" in error
    assert "--data-dir" in error
    holder.kill()
    holder.wait()
    lock_folder(folder).close()  # what it has left there keeps nobody out


HOLDER = """
import sys
from pathlib import Path
from onebase_edge.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("files", [16, pytest.param(LEAST_FILES - 1, marks=pytest.mark.full)])
def test_too_few_open_files_are_reported_in_a_sentence_with_the_remedy(files: int, tmp_path: Path) -> None:
    command = 'ulimit -n "$1"; exec "$2" -m onebase_server --port 0 --data-dir "$3"'
    ended = subprocess.run(
        ["sh", "-c", command, "sh", str(files), sys.executable, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = " ".join(ended.stderr.split())
    assert ended.returncode == 1
    assert f"only {files} files may be open at once" in said
    assert "run `ulimit -n 1024` first" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "refused",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_the_system_refuses_at_the_start_is_reported_in_a_sentence_with_the_remedy(
    refused: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(*_: object) -> None:  # under a real limit a library may end the process first
        raise refused

    monkeypatch.setattr(startup, "resolve", resolve)
    status = serve(["--port", "0", "--data-dir", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert status == 1, said
    assert "the system refuses more memory or threads" in said
    assert "raise what limits memory (ulimit -v and -d" in said
    assert "Traceback" not in said


def test_the_least_open_files_are_enough_for_an_upload_and_several_requests() -> None:
    command = f'ulimit -n {LEAST_FILES}; exec "$@"'
    server_command = [sys.executable, str(ROOT / "tests/server/serve_scripted.py"), "words"]
    with serving(["sh", "-c", command, "sh", *server_command]) as server, server.client() as http:
        assert upload(http, "acme", b"weights").json()["state"] == "ready"
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(http.post, "/generate", json={"prompt": "Hello"}) for _ in range(8)]
        assert [one.result().status_code for one in asked] == [200] * 8


def test_a_base_that_does_not_exist_is_reported_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = serve(["--port", "0", "--base", "./no/such/folder", "--data-dir", str(tmp_path)])

    assert status == 2
    text = capsys.readouterr().err
    assert "no/such/folder" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("error", "status"), [(BaseFetchError("the Hub is away"), 1), (BaseSpecError("no base"), 2)]
)
def test_the_exit_status_tells_whether_another_start_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_parts: object) -> None:
        raise error

    monkeypatch.setattr("onebase_engine.base.default_base.resolve_base", fail)
    assert serve(["--port", "0", "--data-dir", str(tmp_path)]) == status


def test_a_base_without_a_usable_tokenizer_is_reported_as_such(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).symlink_to(base_folder / name)
    (base / "tokenizer.json").write_text("{}")

    assert serve(["--base", str(base), "--port", "0", "--data-dir", str(tmp_path / "data")]) == 2
    assert f"the base in {base} has no usable tokenizer" in told(capsys)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(24, "Too many open files"), "the server cannot be set up: [Errno 24] Too many open files"),
        (KeyError("name"), "the server cannot be set up: KeyError: 'name'"),
    ],
)
def test_what_else_fails_while_the_server_is_set_up_is_not_called_a_tokenizer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    sentence: str,
) -> None:
    def fail(*_parts: object, **_named: object) -> None:
        raise error

    monkeypatch.setattr("onebase_server.app.startup.assemble", fail)

    assert serve(["--port", "0", "--data-dir", str(tmp_path / "data")]) == 1
    text = told(capsys)
    assert sentence in text
    assert "no usable tokenizer" not in text


def test_a_thread_that_computes_hands_the_interpreter_to_the_event_loop_sooner_than_python_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def look(*_parts: object, **_named: object) -> None:
        seen.append(sys.getswitchinterval())
        raise StartupError("that is all")

    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    monkeypatch.setattr("onebase_server.app.startup.assemble", look)
    try:
        assert serve(["--port", "0", "--data-dir", str(tmp_path / "data")]) == 1
    finally:
        sys.setswitchinterval(before)

    assert seen == [pytest.approx(0.0002)]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to stderr, in one line."""
    return " ".join(capsys.readouterr().err.split())


def test_a_full_disk_keeps_nobody_from_locking_the_data_folder(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        held = lock_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    held.close()
    assert (tmp_path / "server.lock").read_text() == ""


def test_base_fetch_prints_the_folder_as_its_last_line(base_folder: Path) -> None:
    sources = os.pathsep.join(str(ROOT / part) for part in ("engine", "server", "adapters", "clients/python"))
    program = "import sys; from onebase_server.app.cli import base; sys.exit(base(['fetch']))"

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": sources},
    )

    assert Path(done.stdout.splitlines()[-1]) == base_folder


@pytest.fixture
def check(nursery: Nursery) -> Check:
    """`onebase base check` in a process of its own: the Hub's client reads its environment at import."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = (
            "import sys; from onebase_server.app.cli import base; sys.exit(base(['check', *sys.argv[1:]]))"
        )
        process = nursery.popen()(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "200", **environment},
        )
        out, error = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    return run


def test_base_check_says_what_a_base_takes_and_what_its_tokenizer_can_do(
    check: Check, base_folder: Path
) -> None:
    done = check(str(base_folder), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["served"], found["refusal"]) == (0, True, None)
    assert (found["architecture"], found["layers"]) == ("LlamaForCausalLM", {"full_attention": 30})
    assert found["memory"]["nf4"] < found["memory"]["int8"] < found["memory"]["none"]
    assert (found["chat_template"], found["tools"]) == (True, True)


def test_base_check_refuses_with_the_reason(check: Check, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    done = check(str(tmp_path))
    assert done.returncode == 1
    assert "is an encoder-decoder" in done.stdout
    assert "no tokenizer here" in done.stdout


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "acme/base"}'}, "its base is acme/base"),
        ({"adapter_config.json": "[]"}, "its base is not named"),
        ({"model.gguf": ""}, "has no config.json"),
        ({"config.json": '{"model_type": "gpt9"}'}, "no base that transformers knows"),
        ({"config.json": "[" * 100_000}, "no base that transformers knows"),
        ({"config.json": '{"model_type": "llama", "num_hidden_layers": 1000000000000}'}, "no more than 4096"),
        (
            {"config.json": '{"model_type": "gemma4", "text_config": {"num_hidden_layers": 1000000000}}'},
            "num_hidden_layers = 1e+09",
        ),
        ({"config.json": " " * (17 << 20) + "{}"}, "is over 16 MiB"),
    ],
    ids=["adapter", "broken-adapter", "gguf", "unknown", "deep", "layers", "inner-layers", "long"],
)
def test_base_check_of_what_is_no_base_says_what_it_is(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert base(["check", str(tmp_path)]) == 1
    assert said in told(capsys)


def test_base_check_downloads_no_weights(check: Check, base_folder: Path, tmp_path: Path) -> None:
    with HubStandIn() as hub:
        config = (base_folder / "config.json").read_bytes()
        hub.add_repo("acme/base", {"config.json": config, "model.safetensors": b"0" * 20_000})
        hub.add_repo("acme/closed", {"config.json": config}, gated=True)
        environment = hub.environment(tmp_path)
        done = check("acme/base", **environment)
        gated = check("acme/closed", **environment)
        missing = check("acme/nothing", **environment)
        assert not hub.requests("GET", "/cdn/")
    assert (done.returncode, gated.returncode, missing.returncode) == (0, 1, 1)
    assert "LlamaForCausalLM" in done.stdout
    assert "accept its terms at https://huggingface.co/acme/closed" in " ".join(gated.stderr.split())
    assert "Check the name" in " ".join(missing.stderr.split())


def test_the_summary_tells_memory_adapters_and_address(serve_scripted: Starter, tmp_path: Path) -> None:
    make_folder(tmp_path, "acme")
    with serve_scripted("words", "--adapters-dir", str(tmp_path)) as server:
        server.wait_for(lambda: server.url in server.log)

        assert "smollm2-135m-instruct" in server.log
        assert "for the base" in server.log
        assert "acme@" in server.log
        assert "may do everything" not in server.log


def test_listening_on_every_address_is_said_aloud(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--host", "0.0.0.0", "--insecure") as server:
        server.wait_for(lambda: "anyone who reaches 0.0.0.0 may do everything" in server.log)


def test_the_environment_configures_the_server(
    serve_scripted: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment_name("max_length"), "77")
    with serve_scripted("words") as server, server.client() as http:
        assert json.loads(http.get("/status").text)["info"]["max_length"] == 77
