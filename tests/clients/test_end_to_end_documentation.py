"""What docs/sdk.md shows does work: every snippet, against the real server.

Its commands are run by tests/project/test_documented_commands.py.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.clients.real_server import Server
from tests.clients.test_end_to_end_adapters import copied

from onebase import Client
from onebase._core import requests, training

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
