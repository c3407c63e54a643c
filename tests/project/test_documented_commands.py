"""Every command and snippet of the documentation runs: for real where that is cheap, else up to its parser.

A line that no row of TABLE knows fails: say there how it is to be run.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.clients.real_server import Server
from tests.clients.test_end_to_end_adapters import copied
from tests.hub_standin import HubStandIn
from tests.server.support import serving

from onebase import Client
from onebase._core import requests
from onebase.cli import adapters, batches, files, jobs
from onebase.cli import main as onebase_command

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "adapters"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "examples").rglob("README.md"))),
    "benchmarks/README.md",
]
SHELLS = ("sh", "bash", "console")
PATIENCE = 600
"""Seconds after which a command does not end any more."""
PROGRAMS = r"sudo|git|make|tinker|curl|docker|helm|python[\d.]*|pip|onebase|accelerate|\.venv/bin/\w+"

RUN = "run"
"""In a shell, against a server that has the example adapters, and whose engine, verifier and trainers are
scripted: what real ones make of the same requests is tested in tests/clients. MORE makes some shorter."""
PARSE = "parse"
"""In a shell, up to the real parser of its options; of `make` the real rules, without doing what they say."""

OF_A_JOB = r"(\bID\b|DIGEST|\btickets$|--adapter mine\b)"
"""Arguments that only the job of a reader gives."""

TABLE: tuple[tuple[str, str], ...] = (
    (r"curl http://127\.0\.0\.1:8000/(?!v1/(adapters/support/rollout|feedback) )", RUN),
    (
        r"curl http://127\.0\.0\.1:8000/v1/(adapters/support/rollout|feedback) ",
        "a reader's own version and answer; tests/server/test_rollouts.py asks the like",
    ),
    (r"curl 'http://127\.0\.0\.1:8000/", RUN),
    (rf"onebase (generate|models|version|usage)( (?!--help|.*{OF_A_JOB})|$)", RUN),
    (r"onebase --url \S+ --json models$", PARSE),  # tests/clients/test_cli.py runs it
    (r"onebase top( --once)?$", RUN),
    (r"onebase top --json ", PARSE),  # never ends
    (
        rf"onebase (adapters|jobs) (?!(rollout|gates|approve|evaluate|bom) )\w+( (?!.*{OF_A_JOB})[^-]|$)",
        RUN,
    ),
    (r"onebase gates (?!.*--help$)", PARSE),  # tests/server/test_gates.py runs it, with keys
    (r"onebase adapters (gates|approve|evaluate|bom) [^-]", PARSE),  # and these; bom: test_bom.py
    (r"onebase adapters rollout [^-]", PARSE),  # tests/server/test_rollouts.py runs it
    (rf"onebase (adapters|jobs|generate) .*{OF_A_JOB}", PARSE),
    (r"onebase (batches|files) (create|list|upload)", RUN),
    (r"onebase (batches|files) (show|results|cancel|download|rm) ", PARSE),  # of nobody's
    (r"head -n \d+ examples/data/", "a part of a file of examples"),
    (r"git diff \| onebase generate ", RUN),
    (r"onebase chat$", RUN),
    (r"onebase judge (?!--help)", PARSE),  # of a reader's conversation; tests/clients/test_judging.py runs it
    (r"onebase [a-z]+( [a-z]+)? --help$", RUN),
    (r"onebase data check [\w/]+\.", RUN),
    (r"onebase estimate --base ", RUN),
    (r"python examples/data/make_\w+\.py$", RUN),
    (r"python examples/(orders_tool|judges)\.py data$", RUN),
    (r"python examples/judges\.py chat$", PARSE),  # ends with its terminal
    (r"python examples/orders_tool\.py ask( |$)", PARSE),  # a minute
    (r"make ", PARSE),  # sets up, or runs every test
    (
        r"onebase serve --(base|adapter|adapters-dir|data-dir|otlp-endpoint|signatures|request-log) ",
        PARSE,
    ),  # other bases, and folders that are not there
    (r"mkdir -p out/\.vllm_lora$", "a folder of a reader's own"),
    (r"onebase base check ([\w.-]+/|REPO$)", PARSE),  # a repository on the Hub
    (r"onebase route --host 0.0.0.0 ", PARSE),  # tests/server/test_route.py runs it
    (
        r"onebase cluster (up|status|scale|restart|drain|down)"
        r"( [^-]| --(replicas|address|config|min-replicas)|$)",
        PARSE,
    ),
    (r"onebase backup (/|FOLDER$)", PARSE),  # tests/server/test_backup.py runs it, while a server serves
    (r"onebase serve --host ", PARSE),  # the whole network
    (r"onebase (requests|replay) (?!--help$)", PARSE),  # a reader's own; test_request_log.py runs them
    (r"onebase conform (?!--help$)", PARSE),  # of any server; tests/clients/test_conform.py runs it
    (r"onebase audit (?!.*--help$)", PARSE),  # another server's names; --follow never ends
    (
        r"onebase (keys|tenants) (?!.*--help$)",
        PARSE,
    ),  # the other lines have none
    (r"onebase (train|sweep) --data ", PARSE),  # minutes to hours
    (r"onebase migrate openai --(file|record|recorded) ", PARSE),  # tests/clients run them
    (r"accelerate launch -m onebase_training\.cli\.train ", PARSE),  # several GPUs
    (r"accelerate launch$", "only named"),
    (r"for name in (orders pirate|on-topic polite secret); do\n", PARSE),  # an hour of training
    (r"python benchmarks/\w+\.py", PARSE),  # minutes each, and other programs to compare with
    # What others made, or what changes the machine, is not run at all.
    (r"sudo apt-get install -y git make python3-venv$", "Debian's packages"),
    (r"git clone <this repository> onebase && cd onebase$", "has no address yet"),
    (r"sudo apt-get install (-y prometheus|gcc)$", "Debian's package"),
    (r"prometheus --config", "Debian's package; serves for ever"),
    (r"sudo (mkdir|cp) ", "changes the machine"),
    (r"docker (build|login|push|run|exec|inspect)", "Docker; test_container.py reads the Dockerfile"),
    (r"(docker compose|kubectl) ", "Docker; test_deploy.py reads the files"),
    (r"helm ", "a cluster; test_helm.py renders the chart"),
    (
        r"while IFS=|for customer in |cp deploy/|useradd |systemctl |runuser |printf ",
        "a reader's own files or machine",
    ),
    (r"python3(\.11)? -m venv ", "another environment"),
    (r"pip (install|wheel) ", "downloads"),
    (r"python -m tinker_cookbook\.", "a package of others, which asks the Hub"),
    (r"export TINKER_", "a reader's own key"),
    (r"tinker checkpoint ", "a reader's own run; tests/server/test_tinker.py fetches weights so"),
    (r"(openssl|model_signing) ", "a reader's own keys; tests/adapters/test_signatures.py makes some"),
    (r"sigstore |cp ~/\.cache/sigstore-python/", "downloads"),
    (r"tar xf onebase-gpu-check\.tar\.gz ", "on a machine with a GPU"),
    (r"(mv|cp -a|pg_dump|pg_restore|aws s3 sync) ", "other programs, on what is not there"),
)

MORE = {
    "onebase generate ": " --max-tokens 4",
    "onebase chat": " --max-tokens 4",
    "onebase jobs create ": " --set max_steps=1 --set max_length=32 --set batch_size=2",
    "curl ": " --silent --show-error --fail-with-body",
}
"""What keeps a line short, and lets it fail."""
PROGRAMS_UP_TO_PARSER = {
    "sitecustomize.py": """
import argparse, sys
whole = argparse.ArgumentParser.parse_args
def parse_args(*arguments, **settings):
    whole(*arguments, **settings)
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse_args
""",
    "accelerate": '#!/bin/sh\nshift\nexec python "$@"\n',
    "make": f'#!/bin/sh\nPATH=/usr/local/bin:/usr/bin:/bin exec make --dry-run -C "{ROOT}" "$@"\n',
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Line:
    """One command, with its continuation lines, as written in a page."""

    page: str
    text: str

    @property
    def how(self) -> list[str]:
        """RUN, PARSE, or why neither: what TABLE says, once if it is right."""
        return [how for pattern, how in TABLE if re.match(pattern, self.text)]


def lines(page: str) -> list[Line]:
    """First what stands in the page's blocks, then what does in its sentences."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [one for language, block in blocks for one in of_block(language, block)]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [span.replace("\n", " ") for span in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", outside)]
    # Where a sentence only names a command, there must be such a one.
    named = [re.sub(r"^(onebase [a-z]+(?: [a-z]+)?)$", r"\1 --help", span) for span in spans]
    return [Line(page, plain(command)) for command in (*commands, *dict.fromkeys(named))]


def of_block(language: str, block: str) -> list[str]:
    """The commands of a block; of a block with a `$` the other lines are output."""
    if language not in SHELLS and (language or not re.match(rf"(\$ )?({PROGRAMS}) ", block)):
        return []
    block = block.replace("\\\n", " ")
    if block.startswith("$ "):
        return re.findall(r"^\$ (.+)$", block, re.MULTILINE)
    # A quote may go on over lines, as the body of a curl does; so does a loop.
    piece = r"(?:^(?:for|while) .+?^done[^\n]*$|'[^']*'|\"[^\"\n]*\"|[^\n'\"])+"
    pieces = re.findall(piece, block, re.MULTILINE | re.DOTALL)
    return [piece for piece in pieces if piece.strip()]


def plain(command: str) -> str:
    """Without comments, and with programs found by PATH."""
    command = re.sub(r"\s+# .*$", "", command, flags=re.MULTILINE)
    command = re.sub(r"(^|&& |\| )\s*(?:\.venv|~/\w+)/bin/", r"\1", command, flags=re.MULTILINE)
    return re.sub(r" {2,}", " ", command).strip()


def pages(how: str) -> list[str]:
    return [page for page in PAGES if any(how in line.how for line in lines(page))]


def run_pages() -> list[Any]:
    """Those of other pages than the README take as long again."""
    return [pytest.param(page, marks=() if page == "README.md" else pytest.mark.full) for page in pages(RUN)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "tests/server/serve_scripted.py"), "words"]
    options = ("--adapters-dir", str(EXAMPLES), "--hub-allow", "acme/*")
    with (
        HubStandIn() as hub,
        serving(command, *options, environment=hub.environment(tmp_path_factory.mktemp("hf"))) as running,
        Client(running.url) as client,
    ):
        made = Server(running.url, hub)
        running.wait_for(lambda: [one.active for one in client.adapters.list()] == [True, True])
        support = {f"support/{file.name}": file.read_bytes() for file in (EXAMPLES / "orders").iterdir()}
        plain = {file.name: file.read_bytes() for file in (EXAMPLES / "orders").iterdir()}
        made.hub.add_repo("acme/repo", plain)
        made.hub.add_repo("acme/repo", support, ("v2",))
        made.hub.add_repo("acme/orders-lora", plain)
        made.hub.add_repo("meta-llama/Llama-3.1-8B", {"config.json": json.dumps(LLAMA_8B).encode()})
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the pages speak of; of pirates one topic, since the base answers each question."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    words = tmp_path / "examples/data/pirate_words.json"
    content = json.loads(words.read_text())
    one = {name: values[:1] for name, values in content["topics"][0].items()}
    words.write_text(json.dumps(content | {"topics": [one]}))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for file in (EXAMPLES / "orders").iterdir():
        shutil.copy(file, tmp_path)
    outputs = (
        ("acme-support", "orders", 30),
        ("acme-support-2", "orders", 31),
        ("legal", "pirate", 15),
        ("chat", "orders", 29),
    )
    for place, source, alpha in outputs:
        copied(EXAMPLES / source, tmp_path / "outputs" / place, lora_alpha=alpha)
    for place, source in (("first", "pirate"), ("second", "orders")):
        shutil.copytree(EXAMPLES / source, tmp_path / place)
    copied(EXAMPLES / "orders", tmp_path / "runs" / "acme" / "adapter", lora_alpha=28)
    for file in ("train.jsonl", "eval.jsonl", "held-out.jsonl", "rows.jsonl"):
        rows = [{"prompt": f"{file} {number} until-paused ", "completion": "yes"} for number in range(4)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "smollm2-135m-instruct", "messages": messages, "max_tokens": 2}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(row) + "\n")
    subprocess.run(
        "git init -q . && git add train.jsonl && echo >> train.jsonl", shell=True, cwd=tmp_path, check=True
    )
    return tmp_path


def shell(command: str, folder: Path, environment: dict[str, str], typed: str = "") -> str:
    """What the command prints through pipes. It must end well, and print nothing but text."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return printed(command, done.returncode, done.stdout, done.stderr)[0]


def printed(command: str, status: object, out: str, error: str) -> tuple[str, str]:
    """All that was printed, and the standard output alone."""
    assert status == 0, (command, out, error)
    assert not re.search(r"\x1b|Traceback|Warning", out + error), (command, out, error)
    return out + error, out


NEEDS_NO_SHELL = re.compile(r"(onebase|python (examples|benchmarks)/\w+\.py)[^|<>;&$]*$")
READS_AT_IMPORT = ("estimate --base", "base fetch")
"""These ask a Hub that is named in the environment, which its client reads once in a process."""


def run_command(command: str, folder: Path, environment: dict[str, str], typed: str = "") -> tuple[str, str]:
    """As `shell`, in this process where the command allows it: to start a Python takes seconds."""
    if not NEEDS_NO_SHELL.match(command) or any(words in command for words in READS_AT_IMPORT):
        return shell(command, folder, environment, typed), ""
    words = shlex.split(command, comments=True)
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdin", "stdout", "stderr")}
    streams["stdin"].write(typed)
    streams["stdin"].seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", words[words[0] == "python" :])
        with ended_after(PATIENCE):
            status = called(words)
    texts = {}
    for name, stream in streams.items():
        stream.seek(0)
        texts[name] = stream.read()
    return printed(command, status, texts["stdout"], texts["stderr"])


@contextlib.contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the middle of what takes longer."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def called(words: list[str]) -> object:
    """The exit status of `onebase` or of a script, in this process."""
    try:
        if words[0] == "onebase":
            return onebase_command(words[1:])
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """Commands that ran for another page, and give the same wherever they run."""
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_known(page: str) -> None:
    for line in lines(page):
        assert len(line.how) == 1, f"{line.text!r} matches {len(line.how)} rows of TABLE: say how it is run"


def test_no_row_of_the_table_is_left_over() -> None:
    written = [line.text for page in PAGES for line in lines(page)]
    assert not [pattern for pattern, _ in TABLE if not any(re.match(pattern, text) for text in written)]


def test_every_action_is_documented() -> None:
    words = [line.text.split() for line in lines("docs/sdk.md") if line.text.startswith("onebase ")]
    assert {word[2] for word in words if word[1] == "adapters"} >= adapters.ACTIONS.keys() - {
        "unpin",
        "unshare",
    }
    for command in (jobs, batches, files):
        name = command.__name__.rpartition(".")[2]
        assert {word[2] for word in words if word[1] == name} >= command.ACTIONS.keys()


@pytest.mark.parametrize("page", run_pages())
def test_what_a_page_shows_runs(page: str, server: Server, folder: Path, asked: set[str]) -> None:
    environment = {"ONEBASE_URL": server.url, **server.hub.environment(folder / "hf")}
    with Client(server.url) as client:
        version = ""
        if any("acme-support@" in line.text for line in lines(page)):
            client.adapters.upload(folder / "outputs" / "legal", name="legal")
            version = client.adapters.upload(folder / "outputs" / "acme-support", name="acme-support").version
        for line in lines(page):
            if RUN in line.how:
                command = line.text.replace("3f2a9c41", version[:8]).replace("org/", "acme/")
                if "ftjob-5b7e0d12" in command:
                    command = command.replace("ftjob-5b7e0d12", the_job(client, command.split()[2], folder))
                command = command.replace("http://127.0.0.1:8000", server.url) + MORE.get(first(command), "")
                if command not in asked:
                    assert run_command(command, folder, environment, "Hello\n")[0]
                if re.search(r"--help$|^onebase estimate", command):
                    asked.add(command)
        for job in client.training.list():
            if job.status in ("validating_files", "queued", "running"):
                job.cancel()


def first(command: str) -> str:
    """The command that a line is about."""
    return next((words for words in MORE if words in command), "")


def the_job(client: Client, action: str, folder: Path) -> str:
    """The newest job, once the action makes sense; as people write it."""
    if action == "cancel":
        client.training.create(folder / "train.jsonl", max_steps=1, max_length=32)
    if action == "stop":
        (folder / "slow.jsonl").write_text("slow")
        client.training.create(folder / "slow.jsonl")
    (job,) = client.training.list(limit=1)
    with job.stream_events() as events:
        while action in ("pause", "stop") and next(events).type != "metrics":
            pass  # a job without a step has nothing to keep, and begins again when it is resumed
    return job.id[:14]


@pytest.mark.parametrize("page", pages(PARSE))
def test_what_a_page_shows_has_options_that_exist(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = folder / "bin"
    programs.mkdir()
    for name, script in PROGRAMS_UP_TO_PARSER.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for text in dict.fromkeys(line.text for line in lines(page) if PARSE in line.how):
        for command in in_loop(text.replace("<this folder>", ".")):
            if NEEDS_NO_SHELL.match(command):
                parse(shlex.split(command, comments=True), monkeypatch)
            else:
                shell(command, folder, {"PYTHONPATH": str(programs)})


def in_loop(text: str) -> list[str]:
    """The commands of the first round of a loop; else the text itself."""
    loop = re.fullmatch(r"for (\w+) in (\w+)[^;]*; do\n(.*)\ndone", text, re.DOTALL)
    if not loop:
        return [text]
    name, first, body = loop.groups()
    return body.replace(f"${name}", first).splitlines()


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that needs no shell, in this process, up to its parser: to start a Python takes a second."""
    whole, part = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    is_whole = False

    def parse_args(*arguments: Any, **settings: Any) -> None:
        nonlocal is_whole
        is_whole = True
        whole(*arguments, **settings)
        sys.exit(0)

    def parse_known_args(*arguments: Any, **settings: Any) -> Any:
        found = part(*arguments, **settings)
        return found if is_whole else sys.exit(0)

    own = words[0] == "onebase"
    printed = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.chdir(ROOT)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        if not own:  # a benchmark that leaves options to another one
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(sys, "argv", words if own else words[1:])
        with pytest.raises(SystemExit) as end:
            onebase_command(words[1:]) if own else runpy.run_path(words[1], run_name="__main__")
    assert end.value.code == 0, (words, printed.getvalue())


def test_an_option_that_does_not_exist_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "sitecustomize.py").write_text(PROGRAMS_UP_TO_PARSER["sitecustomize.py"])
    for run in (
        lambda text: shell(text, folder, {"PYTHONPATH": str(folder / "bin")}),
        lambda text: parse(text.split(), monkeypatch),
    ):
        with pytest.raises(AssertionError, match="there is no option --nome"):
            run("onebase sweep --data x --nome acme")


@pytest.mark.parametrize(
    "command",
    [
        "models", "version", "adapters list", "adapters show orders", "jobs list",
        "generate Hi --max-tokens 2", "usage", "data check train.jsonl", "estimate --gpu l4",
    ],
)  # fmt: skip
def test_json_is_one_document(command: str, server: Server, folder: Path) -> None:
    _, out = run_command(f"onebase {command} --json", folder, {"ONEBASE_URL": server.url})
    assert isinstance(json.loads(out), (dict, list))


def test_through_a_pipe_no_line_is_empty_and_none_is_broken(folder: Path) -> None:
    environment = {"COLUMNS": ""}
    (line,) = shell("onebase base fetch", folder, environment).splitlines()
    assert Path(line).is_dir()
    last = shell("unset COLUMNS; onebase estimate --gpu l4", folder, environment).splitlines()[-1]
    assert last.startswith("Measured peaks were")
    assert last.endswith("show it better.")


@pytest.mark.filterwarnings("error")
def test_every_snippet_of_the_sdks_page_runs(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ONEBASE_URL", server.url)
    (folder / "train.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    whole = requests.sampling_body
    monkeypatch.setattr(requests, "sampling_body", lambda sampling: whole({"max_tokens": 4, **sampling}))
    page = (ROOT / "docs/sdk.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) > 6
    with Client() as client:
        client.adapters.upload("outputs/legal", name="legal")
        version = client.adapters.upload("outputs/acme-support", name="acme-support").version
        known: dict[str, Any] = {"answer": client.generate("Hello")}
        for snippet in snippets:
            if "schema=" in snippet:
                continue  # no copy of the prompt keeps to it: see tests/clients/test_end_to_end.py
            known["client"] = client
            text = snippet.replace("3f2a9c41", version[:8])
            code = compile(text, "docs/sdk.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            value = eval(code, known)  # noqa: S307 (our own documentation)
            if inspect.iscoroutine(value):
                asyncio.run(value)
