"""What docs/sdk.md shows does work: every snippet and every command, against the real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.clients.real_server import Server
from tests.clients.test_end_to_end_adapters import copied, files

from onebase import Client
from onebase._core import requests, training
from onebase.cli import main
from onebase.cli.jobs import ACTIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "sdk.md"
TINY: dict[str, Any] = {"max_steps": 1, "max_length": 32, "batch_size": 2}


@pytest.fixture
def outputs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What docs/sdk.md speaks of, and short answers; gives the first digits of a version of acme-support."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEBASE_URL", server.url)
    for folder, source, alpha in (
        ("acme-support", "orders", 30),
        ("acme-support-2", "orders", 31),
        ("legal", "pirate", 15),
    ):
        copied(source, tmp_path / "outputs" / folder, lora_alpha=alpha)
    server.hub.add_repo(
        "acme/repo", files(copied("orders", tmp_path / "hub", lora_alpha=29), "support/"), ("v2",)
    )
    with Client(server.url) as client:
        client.adapters.upload(tmp_path / "outputs" / "legal", name="legal")
        made = client.adapters.upload(tmp_path / "outputs" / "acme-support", name="acme-support")
    for file in ("train.jsonl", "eval.jsonl"):
        rows = [{"prompt": f"{file} {number}", "completion": "yes"} for number in range(4)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, settings = requests.sampling_body, training.check_settings
    monkeypatch.setattr(requests, "sampling_body", lambda sampling: whole({"max_tokens": 4, **sampling}))
    monkeypatch.setattr(training, "check_settings", lambda given: settings(given) | TINY)
    return made.version[:8]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def test_every_snippet_of_the_documentation_runs(outputs: str) -> None:
    known: dict[str, Any] = {}
    snippets = blocks("python")
    assert len(snippets) > 6
    with Client() as client:
        known["answer"] = client.generate("Hello")
        for snippet in snippets:
            known["client"] = client
            text = snippet.replace("3f2a9c41", outputs)
            code = compile(text, str(DOCUMENT), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            value = eval(code, known)  # noqa: S307 (our own documentation)
            if inspect.iscoroutine(value):
                asyncio.run(value)


def test_every_command_of_the_documentation_runs(outputs: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line for block in blocks("console") for line in block.splitlines() if line.startswith("$ onebase ")
    ]
    commands = [shlex.split(line[2:], comments=True)[1:] for line in lines]
    assert {arguments[1] for arguments in commands if arguments[0] == "adapters"} == {
        "push", "pull", "list", "show", "diff", "activate", "rollback", "deactivate", "pin", "rm",
    }  # fmt: skip
    assert {arguments[1] for arguments in commands if arguments[0] == "jobs"} == ACTIONS.keys()
    for arguments in commands:
        if arguments[0] == "chat":
            continue
        words = [word.replace("3f2a9c41", outputs).replace("org/", "acme/") for word in arguments]
        if "ftjob-5b7e0d12" in words:
            words[words.index("ftjob-5b7e0d12")] = the_job(words[1])
        assert main(words) == 0, (words, capsys.readouterr().err)
        assert "".join(capsys.readouterr())


def the_job(action: str) -> str:
    """The newest job, once the action makes sense; as people write it."""
    with Client() as client:
        if action == "cancel":
            client.training.create("train.jsonl")
        (job,) = client.training.list(limit=1)
        with job.stream_events() as events:
            while action == "pause" and job.refresh().status == "validating_files":
                next(events)
        return job.id[:14]
