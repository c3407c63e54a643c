"""The command in this process, against a scripted server on a real port.

What is said is in `golden/`; here is what is sent, what scripts get, and what is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert
from tests.clients.golden import Transcript

from onebase import Adapter, __version__
from onebase._terminal.ui import printable
from onebase.cli import (
    COMMANDS,
    EXTRA_COMMANDS,
    HELP,
    PLUGINS,
    adapters,
    batches,
    files,
    find_plugin,
    gates,
    jobs,
    main,
    run_plugin,
)
from onebase.cli.command import adapter_of
from onebase.cli.server import table_rows
from onebase.types import AdapterWeight, Model

Serve = Callable[..., Any]
DIGEST = "3f2a" * 16
ADAPTER = {"id": "pirate", "object": "adapter", "name": "pirate", "version": DIGEST, "active": True}
ADAPTER |= {"state": "ready", "kinds": ["lora"], "rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}
ADAPTER |= {"parameters": 1_234_567, "bytes": 4_938_268, "base": "tiny", "tenant": "default", "shared": False}
ADAPTER |= {"pinned": False, "tier": "slot", "versions": 1, "created_at": 1.0, "updated_at": 1.0}
MODELS = [{"id": name, "object": "model", "created": 1, "owned_by": "onebase"} for name in ("tiny", "pirate")]


@pytest.fixture
def server(serve: Serve, wire: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with one adapter that answers each message with its number and who speaks."""

    def script(request: Any) -> None:
        if request.path == "/v1/adapters":
            request.reply(200, {"object": "list", "data": [ADAPTER]})
        elif request.path == "/v1/models":
            request.reply(200, {"object": "list", "data": MODELS})
        elif request.path == "/version":
            request.reply(200, {"version": "9.9"})
        elif request.body["adapter"] == "unknown":
            request.reply(404, wire.error("no adapter 'unknown'", param="adapter", code="adapter_not_found"))
        else:
            turns = len(request.body.get("messages", [0]))
            request.begin_stream()
            request.send(wire.sse(*wire.answer(f"{turns}: ", "arr 🏴", adapter=request.body["adapter"])))
            request.end_stream()

    made = serve(script)
    monkeypatch.setenv("ONEBASE_URL", made.url)
    return made


@pytest.fixture
def shell(transcript: Callable[[str], Transcript], server: Any) -> Transcript:
    return transcript(server.url)


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def asked(server: Any) -> list[Any]:
    return [request.body for request in server.requests if request.path == "/generate"]


def test_generate_streams_the_answer_to_stdout_and_its_speed_to_stderr(
    server: Any, shell: Transcript, serve: Serve, wire: Any
) -> None:
    options = ["--temperature", "0", "--stop", "a", "--stop", "b"]
    shell.run("generate", "Hello", "--adapter", "pirate", *options)
    assert asked(server) == [
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "adapter": "pirate",
            "temperature": 0.0,
            "stop": ["a", "b"],
            "stream": True,
        }
    ]
    shell.run("generate", "--adapter", "unknown", "x")
    shell.check("generate")


def test_generate_takes_the_prompt_from_a_pipe(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, "two\nlines\n")
    assert main(["generate", "--system", "Be brief"]) == 0
    assert asked(server)[0]["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "two\nlines\n"},
    ]


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--url", "{url}", "--json", "generate", "Hello"], "Hello"),
        (["--url={url}", "--key", "ob-1", "--timeout", "60", "generate", "--", "--json"], "--json"),
    ],
)
def test_options_of_every_command_may_stand_before_it(
    server: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], prompt: str
) -> None:
    monkeypatch.setenv("ONEBASE_URL", "http://127.0.0.1:1")
    assert main([one.format(url=server.url) for one in arguments]) == 0
    (request,) = server.requests
    assert request.body["messages"] == [{"role": "user", "content": prompt}]
    assert request.headers.get("authorization") == ("Bearer ob-1" if "--key" in arguments else None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--url", "x", "models", "--url", "y"], "--url: it is given twice. Give it once."),
        (["--no-such", "models"], "--no-such"),
        (["--url"], "--url: expected one argument"),
        (["--json"], "a command is missing after these options."),
    ],
)
def test_wrong_options_before_a_command_exit_with_2_and_name_the_option(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_pipe_without_a_text_is_no_prompt(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    piped(monkeypatch, text)
    with pytest.raises(SystemExit) as caught:
        main(["generate"])
    assert caught.value.code == 2
    assert "there is no prompt on stdin" in capsys.readouterr().err
    assert not asked(server)


def test_bytes_that_are_no_text_are_replaced_and_do_not_fail(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["generate", "--raw"]) == 0
    assert asked(server)[0]["prompt"] == "caf\ufffd"


def test_generate_raw_sends_the_text_as_it_is(server: Any) -> None:
    assert main(["generate", "--raw", "Once upon"]) == 0
    assert asked(server) == [{"prompt": "Once upon", "adapter": None, "stream": True}]


def test_generate_json_prints_the_whole_result(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "--adapter", "a=0.5", "--adapter", "b=2", "x"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["choices"][0]["text"] == "1: arr 🏴"
    assert result["adapter"] == [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 2.0}]


def test_a_failure_half_way_keeps_what_came_and_is_reported(
    serve: Serve, wire: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(request: Any) -> None:
        request.begin_stream()
        request.send(wire.sse(wire.piece("so far"), wire.error("the engine stopped")))
        request.end_stream()

    assert main(["generate", "--url", serve(script).url, "x"]) == 1
    assert capsys.readouterr() == ("so far\n", "onebase: the engine stopped\n")


@pytest.mark.parametrize("command", [["generate", "hi"], ["models"], ["version"], ["chat"]])
def test_without_a_server_every_command_says_how_to_start_one(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    slept: list[float],
) -> None:
    piped(monkeypatch, "hi\n")
    monkeypatch.setenv("ONEBASE_URL", "http://127.0.0.1:1")
    assert main(command) == 3
    err = capsys.readouterr().err
    assert "No server answers at http://127.0.0.1:1" in err
    assert "onebase serve" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--temperature", "warm", "x"], "--temperature: 'warm' is not a number\n"),
        (["generate", "--temperature", "nan", "x"], "temperature cannot be sent"),
        (["generate", "--adapter", "a=heavy", "x"], "write NAME=WEIGHT"),
        (["generate", "--raw", "--system", "s", "x"], "--system does not go with --raw"),
        (["generate", "--url", "nowhere", "x"], "url must look like"),
        (["models", "--timeout", "0"], "--timeout: '0' is not a number of seconds above 0\n"),
        (["models", "--no-such"], "--no-such"),
        (["chat", "--adapter", "a=heavy"], "write NAME=WEIGHT"),
    ],
)
def test_wrong_arguments_exit_with_2_and_name_the_option(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "usage:" not in said
    assert said.endswith(f"`onebase {arguments[0]} --help` explains the command.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--seed", "1", "--seed", "2", "x"],
        ["chat", "--system", "a", "--url", "http://a", "--system", "b"],
        ["adapters", "push", "--name", "a", "--name", "b", "x"],
        ["jobs", "create", "--name", "a", "--name=b", "x"],
        ["usage", "--by", "day", "--by", "adapter"],
        ["keys", "create", "--scope", "train", "--tenant", "a", "--tenant", "b"],
        ["tenants", "set", "a", "--quota", "sequences=1", "--quota", "sequences=2"],
        ["backup", "x", "--data-dir", "a", "--data-dir", "b"],
        ["train", "--data", "x", "--name", "y", "--r", "1", "--r", "2"],
        ["estimate", "--dtype", "bfloat16", "--dtype", "float32"],
    ],
)
def test_an_option_of_one_value_that_is_given_twice_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    option = next(one for one in reversed(arguments) if one.startswith("--")).partition("=")[0]
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"onebase: {option}: ")
    assert "given twice. Give it once." in told


def test_chat_keeps_the_conversation_across_adapters(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(
        monkeypatch,
        "Hello\n\n/adapter pirate\nAgain\n/adapter a=1 pirate=0.5\n/adapter base\n//Slash\n/quit\nLost\n",
    )
    assert main(["chat", "--seed", "7"]) == 1  # `a` is unknown: a script must notice
    assert capsys.readouterr().out == "1: arr 🏴\n3: arr 🏴\n"
    piped(monkeypatch, "Hello\n/adapter pirate\nAgain\n/adapter base\n//Slash\n/quit\nLost\n")
    server.requests.clear()
    assert main(["chat", "--seed", "7"]) == 0
    assert capsys.readouterr().out == "1: arr 🏴\n3: arr 🏴\n5: arr 🏴\n"
    assert [request["adapter"] for request in asked(server)] == [None, "pirate", None]
    assert [request["seed"] for request in asked(server)] == [7, 7, 7]
    assert asked(server)[2]["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "1: arr 🏴"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "3: arr 🏴"},
        {"role": "user", "content": "/Slash"},
    ]


def test_chat_instructions_come_first_and_survive_a_reset(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "One\n/system Rhyme\nTwo\n/reset\nThree\n/system\nFour\n")
    assert main(["chat", "--system", "Be brief"]) == 0
    roles = [[turn["role"] for turn in request["messages"]] for request in asked(server)]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
        ["user", "assistant", "user"],
    ]
    assert [request["messages"][0]["content"] for request in asked(server)] == [
        "Be brief",
        "Rhyme",
        "Rhyme",
        "Three",
    ]


def test_chat_is_less_bold_than_the_server_until_it_is_told(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "One\n/temperature 1.5\nTwo\n/temperature\n/temperature hot\n")
    assert main(["chat"]) == 1
    assert main(["chat", "--temperature", "0"]) == 0
    piped(monkeypatch, "Three\n")
    assert main(["chat", "--temperature", "0"]) == 0
    assert [request["temperature"] for request in asked(server)] == [0.7, 1.5, 0]


def test_chat_lists_and_mixes_adapters_and_explains_itself(
    server: Any, shell: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "/adapters\n/adapter pirate=0.5\n/adapter\n/system Rhyme\n/reset\n/help\nHi\n")
    shell.run("chat")
    assert asked(server)[0]["adapter"] == [{"name": "pirate", "weight": 0.5}]
    for wrong in ("/nonsense", "/adapter pirate=heavy", "/adapter pirate a=1", "/adapter pirat"):
        piped(monkeypatch, f"One\n{wrong}\nTwo\n")
        shell.run("chat")
    shell.check("chat")
    assert len(asked(server)) == 1 + 4  # a script ends at its first failure


def test_chat_leaves_it_to_the_server_whether_a_hub_reference_can_be_pulled(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "/adapter hub:acme/x@main\nHi\n")
    assert main(["chat"]) == 0
    assert asked(server)[0]["adapter"] == "hub:acme/x@main"


def test_models_prints_every_name_with_tabs_through_a_pipe(shell: Transcript) -> None:
    shell.run("models")
    shell.check("models")


def test_models_shows_an_adapter_that_is_not_active() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("version", "rank", "alpha", "parameters", "bytes", "tier"))
    waiting = convert(ADAPTER | nothing | {"active": False, "kinds": [], "targets": []}, Adapter)
    assert table_rows([Model(id="tiny"), Model(id="pirate")], [waiting]) == [
        ("tiny", "base", "", "", "", "", ""),
        ("pirate", "adapter, not active", "", "", "", "", ""),
    ]


def test_version_shows_both_ends(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"client {__version__}\nserver 9.9 at {server.url}\n"


def test_help_names_every_command(shell: Transcript, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(f"\n  {name} " in HELP for name in (*COMMANDS, *EXTRA_COMMANDS))
    shell.run("--help")
    shell.run("genrate")
    shell.run("xyzzy")
    shell.check("help")
    assert main([]) == 2
    assert capsys.readouterr() == ("", HELP)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onebase {__version__}\n"


HELPS = [
    *([command] for command in sorted({**COMMANDS, **EXTRA_COMMANDS})),
    *(["adapters", action] for action in adapters.ACTIONS),
    *(["jobs", action] for action in jobs.ACTIONS),
    ["migrate", "openai"],
    *(["batches", action] for action in batches.ACTIONS),
    *(["files", action] for action in files.ACTIONS),
    *(["gates", action] for action in gates.ACTIONS),
    ["base", "fetch"],
    ["base", "check"],
    *(["cluster", action] for action in ("up", "status", "scale", "restart", "drain", "down")),
    ["data", "check"],
]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_each_help_fits_a_terminal_of_100_columns_and_says_every_default(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 100] == []
    options = re.findall(r"^  (--[a-z-]+ [^a-z\s]\S*)\s+((?:.*\n)(?: {6,}\S.*\n)*)", out, re.MULTILINE)
    assert [name for name, text in options if "default" not in text] == NO_DEFAULT.get(" ".join(command), [])


NO_DEFAULT = {
    "chat": ["--system TEXT", "--stop TEXT"],
    "conform": ["--base FOLDER", "--write FOLDER"],
    "generate": [
        "--system TEXT",
        "--stop TEXT",
        "--schema FILE",
        "--regex REGEX",
        "--choice TEXT",
        "--grammar FILE",
    ],
    "judge": [
        "--judge NAME=TEXT",
        "--judges FILE",
        "--stop TEXT",
        "--schema FILE",
        "--regex REGEX",
        "--choice TEXT",
        "--grammar FILE",
    ],
    "jobs create": ["--grader GRADER", "--set NAME=VALUE", "--metadata KEY=VALUE"],
    "migrate openai": ["--file FILE", "--set NAME=VALUE"],
    "batches create": ["--metadata KEY=VALUE"],
    "train": ["--data FILE", "--name NAME", "--push ORG/REPO"],
    "adapters export": ["--format {peft,merged,gguf-lora,gguf}"],
    "adapters evaluate": ["--data FILE"],
    "adapters merge": ["--name NAME", "--density D"],
    "sweep": ["--data FILE"],
    "estimate": ["--data FILE", "--rows N"],
    "route": ["--replica URL", "--replicas FILE", "--key-file FILE"],
    "cluster up": ["--key-file FILE"],
}
"""Options that are required, or without which there is nothing of the kind."""


@pytest.mark.parametrize(
    "command", sorted(COMMANDS.keys() - {"adapters", "jobs", "batches", "files", "gates", "migrate"})
)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: onebase {command}" in capsys.readouterr().out


PLUGIN = """
import sys
def echo(argv):
    print(argv)
    return 7
def needs_torch(argv):
    import a_package_that_is_not_installed.part
def is_broken(argv):
    import onebase_server.no_such_module
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution that brings commands, as the server's packages do."""
    (tmp_path / "plugin_of_a_test.py").write_text(PLUGIN)
    info = tmp_path / "plugin_of_a_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: plugin-of-a-test\nVersion: 1\n")
    names = ("echo", "needs_torch", "is_broken")
    lines = "".join(f"{name} = plugin_of_a_test:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[{PLUGINS}]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_a_command_of_another_package_gets_its_arguments_untouched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["echo", "--help", "--url=x", "-h"]) == 7
    assert capsys.readouterr().out == "['--help', '--url=x', '-h']\n"


@pytest.mark.usefixtures("plugin")
def test_a_missing_package_leads_to_the_extra_that_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["needs_torch"]) == 1
    assert capsys.readouterr().err == (
        "onebase: `onebase needs_torch` needs the package 'a_package_that_is_not_installed'.\n"
        "The server is an extra of this package. Install it with: pip install 'onebase[server]'\n"
    )


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("serve", "server"),
        ("cluster", "server,ray"),
        ("train", "train"),
        ("data", "train"),
        ("sweep", "train"),
    ],
)
def test_a_command_that_is_not_installed_names_its_extra(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onebase.cli.find_plugin", lambda command: None)
    assert main([command, "--anything"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"onebase: `onebase {command}` is not installed here.\n")
    assert err.endswith(f"pip install 'onebase[{extra}]'\n")


def test_a_package_that_training_needs_leads_to_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    train = EntryPoint("train", "x:y", PLUGINS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: missing)
    assert run_plugin(train, []) == 1
    assert capsys.readouterr().err == (
        "onebase: `onebase train` needs the package 'torch'.\n"
        "Training is an extra of this package. Install it with: pip install 'onebase[train]'\n"
    )


@pytest.mark.usefixtures("plugin")
def test_a_broken_own_module_is_not_mistaken_for_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match="onebase_server"):
        main(["is_broken"])


@pytest.mark.parametrize("command", ["serve", "base"])
def test_the_servers_commands_are_registered_by_this_distribution(command: str) -> None:
    found = find_plugin(command)
    assert isinstance(found, EntryPoint)
    assert found.value == f"onebase_server.app.cli:{command}"


def test_text_of_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\x9b31mc\r\n\td🙂é") == "a]0;titleb31mc\n\td🙂é"


def test_adapter_options_are_one_name_or_weights() -> None:
    assert adapter_of([]) is None
    assert adapter_of(["a@3f2a"]) == "a@3f2a"
    assert adapter_of(["a", "b=0.5"]) == (AdapterWeight("a", 1.0), AdapterWeight("b", 0.5))


@pytest.mark.parametrize("arguments", [["generate", "x"], ["models"], ["--help"]])
def test_a_reader_that_has_enough_ends_the_command_quietly(server: Any, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "onebase.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
