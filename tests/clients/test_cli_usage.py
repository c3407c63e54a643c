"""`onebase usage` in this process, against a scripted server on a real port; see also golden/usage.txt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.clients.golden import Transcript

from onebase.cli import main

ROW = {"requests": 1200, "prompt_tokens": 34567, "cached_tokens": 4000, "completion_tokens": 8910}
ROW |= {"training_seconds": 0.0, "training_tokens": 0}
ROWS = [
    {"day": "2026-11-25", "tenant": "acme", "adapter": "", **ROW},
    {"day": "2026-11-26", "tenant": "acme", "adapter": "support", **ROW, "training_seconds": 3725.0},
]
CSV = "tenant,requests\nacme,1200\n"


@pytest.fixture
def server(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    def script(request: Any) -> None:
        asked = parse_qs(urlsplit(request.path).query)
        if asked.get("tenant") == ["nobody"]:
            request.reply(200, {"object": "list", "group_by": ["day"], "data": []})
        elif "format" in asked:
            request.begin_stream()
            request.send(CSV.encode())
            request.end_stream()
        elif asked["group_by"] == ["tenant"]:
            request.reply(200, {"data": [{"tenant": "acme", **ROW}]})
        else:
            request.reply(200, {"data": ROWS})

    made = serve(script)
    monkeypatch.setenv("ONEBASE_URL", made.url)
    return made


def test_use_is_shown_by_what_was_asked_for(server: Any, transcript: Callable[[str], Transcript]) -> None:
    shell = transcript(os.environ["ONEBASE_URL"])
    shell.run("usage")
    shell.run("usage", "--by", "tenant", "--days", "7")
    shell.run("usage", "--by", "tenant", "--csv")
    shell.run("usage", "--price", "0.5/20")
    shell.run("usage", "--price", "0.01/0.01")
    shell.run("usage", "--price", "0.5/20", "--csv")
    shell.run("usage", "--tenant", "nobody")
    shell.run("usage", "--days", "0")
    shell.run("usage", "--json", "--csv")
    shell.run("usage", "--help")
    shell.check("usage")


def test_scripts_get_json(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["day"], row["adapter"], row["base"]) for row in rows] == [
        ("2026-11-25", "", None),
        ("2026-11-26", "support", None),
    ]
