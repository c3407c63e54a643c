"""Batches and files by the SDK and the command, against the real server: a small base, a few rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.clients.golden import Transcript
from tests.clients.real_server import Server

from onebase import AsyncClient, BadRequestError, Batch, BatchError, Client, ConflictError, NotFoundError
from onebase._terminal.batches import BatchDisplay
from onebase.cli import main
from onebase_protocol.batches import BatchCounts, BatchProblems

BASE = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    with Client(server.url) as made:
        yield made


def requests(path: Path, *models: str, tokens: int = 2, **changes: Any) -> Path:
    """A file with a request to each of the models."""
    lines = []
    for place, model in enumerate(models):
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens}
        row = {"custom_id": f"row-{place}", "method": "POST", "url": CHAT, "body": body, **changes}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_batch_is_made_waited_for_and_read(client: Client, tmp_path: Path) -> None:
    file = requests(tmp_path / "requests.jsonl", BASE, "orders", "nobody")
    told: list[Batch] = []

    made = client.batches.create(file, metadata={"team": "night"})
    batch = client.batches.wait(made.id, progress=told.append)

    assert (made.status, made.metadata) == ("validating", {"team": "night"})
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 3, 2, 1)
    assert batch.ended
    assert batch.done == 3
    assert batch.output_tokens == 4
    assert told[-1] == batch
    rows = {row.custom_id: row for row in client.batches.results(batch)}
    assert [rows[f"row-{place}"].status for place in range(3)] == [200, 200, 404]
    assert [row.ok for row in rows.values()] == [True, True, False]
    body = rows["row-1"].body
    assert body is not None
    assert body["usage"]["completion_tokens"] == 2
    assert client.batches.results(batch.id) == tuple(rows.values())
    assert client.batches.list(limit=1) == (batch,)
    with pytest.raises(ConflictError, match="nothing left to cancel"):
        client.batches.cancel(batch.id)
    with pytest.raises(NotFoundError):
        client.batches.retrieve("batch_none")
    with pytest.raises(ValueError, match=r"no\.jsonl is not there: give the path of a \.jsonl file"):
        client.batches.create("no.jsonl")
    with pytest.raises(BadRequestError, match="endpoint"):
        client.batches.create(file, endpoint="/v1/models")


def test_the_asynchronous_client_does_the_same(client: Client, server: Server, tmp_path: Path) -> None:
    file = requests(tmp_path / "wrong.jsonl", BASE, method="GET")

    async def run() -> Batch:
        async with AsyncClient(server.url) as asynchronous:
            made = await asynchronous.batches.create(file)
            return await asynchronous.batches.wait(made.id, progress=False)

    batch = anyio.run(run)
    assert batch.status == "failed"
    assert [(error.line, error.code, error.param) for error in batch.errors] == [
        (1, "invalid_method", "method")
    ]
    assert client.batches.results(batch) == ()


def test_the_command_makes_waits_shows_and_cancels(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = requests(tmp_path / "requests.jsonl", BASE, "orders", "pirate")

    batch = printed(capsys, "batches", "create", str(file), "--wait", "--metadata", "team=night")

    assert (batch["status"], batch["completed"], batch["metadata"]) == ("completed", 3, {"team": "night"})
    assert printed(capsys, "batches", "list", "--limit", "1")[0]["id"] == batch["id"]
    short = batch["id"][:20]
    assert printed(capsys, "batches", "show", short)["output_file_id"] == batch["output_file_id"]
    assert {row["custom_id"] for row in printed(capsys, "batches", "results", short)} == {
        "row-0", "row-1", "row-2",
    }  # fmt: skip
    target = tmp_path / "answers.jsonl"
    assert main(["batches", "results", short, "--output", str(target)]) == 0
    assert len(target.read_text().splitlines()) == 3
    assert main(["batches", "cancel", short]) == 1
    assert "nothing left to cancel" in capsys.readouterr().err
    assert main(["batches", "show", "zz"]) == 2

    long = requests(tmp_path / "long.jsonl", BASE, tokens=20_000)
    made = printed(capsys, "batches", "create", str(long))
    assert main(["batches", "results", made["id"]]) == 2
    assert printed(capsys, "batches", "cancel", made["id"])["status"] == "cancelling"
    assert client.batches.wait(made["id"], progress=False).status == "cancelled"

    wrong = requests(tmp_path / "wrong.jsonl", BASE, method="GET")
    assert main(["batches", "create", str(wrong), "--wait"]) == 1
    assert "line 1: method: it is 'GET'; write POST." in capsys.readouterr().out
    assert main(["batches", "create", "no.jsonl"]) == 2


def test_the_command_sends_lists_gets_and_deletes_files(
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = requests(tmp_path / "mine.jsonl", BASE, "orders", "nobody else")
    monkeypatch.chdir(tmp_path)

    sent = printed(capsys, "files", "upload", str(file), "--purpose", "batch")
    again = printed(capsys, "files", "upload", str(file), "--purpose", "batch")

    assert sent == again, "the same content is stored once"
    assert client.batches.create(file).input_file_id == sent["id"]
    assert printed(capsys, "files", "show", sent["id"]) == sent
    listed = printed(capsys, "files", "list", "--purpose", "batch")
    assert [one["id"] for one in listed].count(sent["id"]) == 1
    assert main(["files", "download", sent["id"]]) == 2
    assert "mine.jsonl is there already" in capsys.readouterr().err
    file.rename(tmp_path / "kept.jsonl")
    assert main(["files", "download", sent["id"]]) == 0
    assert capsys.readouterr().out.startswith("mine.jsonl  ")
    assert file.read_bytes() == (tmp_path / "kept.jsonl").read_bytes()
    out = TextIOWrapper(BytesIO())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["files", "download", sent["id"], "--output", "-"]) == 0
    assert out.buffer.getvalue() == file.read_bytes()  # type: ignore[attr-defined]
    for batch in client.batches.list():
        client.batches.wait(batch.id, progress=False)
    assert printed(capsys, "files", "rm", sent["id"]) == [sent["id"]]
    assert main(["files", "show", sent["id"]]) == 1
    assert "onebase files list" in capsys.readouterr().err


def test_what_the_commands_say(transcript: Callable[[str], Transcript]) -> None:
    shell = transcript("http://127.0.0.1:8000")
    for command in ("batches", "files"):
        shell.run(command, "--help")
        shell.run(command, "creat")
    shell.run("batches", "create", "--help")
    shell.run("files", "upload", "--help")
    shell.check("batches")


def test_a_waiting_batch_is_shown_line_by_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def batch(status: str, done: int = 0, total: int = 0, **changes: Any) -> Batch:
        counts = BatchCounts(total, done, changes.pop("failed", 0))
        known: dict[str, Any] = dict.fromkeys(Batch.__struct_fields__)
        known |= {"id": "batch_1", "status": status, "request_counts": counts}
        problems = BatchProblems(data=(BatchError(code="x", message="no"),))
        return Batch(**known | {"problems": problems} | changes)

    with BatchDisplay() as shown:
        for now in (
            batch("validating"),
            batch("in_progress", 0, 100),
            batch("in_progress", 1, 100),
            batch("in_progress", 5, 100, failed=1, waiting="no \x1b[31mroom"),
            batch("finalizing", 100, 100),
            batch("completed", 100, 100),
        ):
            shown.show(now)

    assert capsys.readouterr().err.splitlines() == [
        "checking the file",
        "answering  0/100 rows",
        "answering  6/100 rows, 1 failed  waiting: no [31mroom",
        "keeping the answers  100/100 rows",
    ]
