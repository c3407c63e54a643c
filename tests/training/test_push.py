"""Pushing an adapter: what reaches a server that speaks the Hub's upload API, and what a failure says."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from tests.http_server import StandInServer

ROOT = Path(__file__).parents[2]
FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"weights" * 4000,
    "README.md": b"# card",
}


class Uploads:
    """What was uploaded. `status` other than 200 is answered to every request."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.token = ""
        self.status = 200
        self.url = ""


@pytest.fixture
def hub() -> Iterator[Uploads]:
    uploads = Uploads()
    with StandInServer(("127.0.0.1", 0), _handler(uploads)) as http:
        uploads.url = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield uploads
        http.shutdown()


def _handler(hub: Uploads) -> type[BaseHTTPRequestHandler]:
    blobs: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            hub.token = self.headers.get("Authorization", "")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.status != 200:
                self._answer({"error": "no"}, hub.status)
            elif self.path == "/api/repos/create":
                hub.created = json.loads(body)
                self._answer({"url": f"{hub.url}/acme/colours", "name": "acme/colours", "id": "acme/colours"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            elif self.path.endswith("/objects/batch"):
                objects = [
                    {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": self._blob(one)}}}
                    for one in json.loads(body)["objects"]
                ]
                self._answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[line["value"]["path"]] = blobs[line["value"]["oid"]]
                oid = "0" * 40
                self._answer({"commitUrl": f"{hub.url}/acme/colours/commit/{oid}", "commitOid": oid})
            else:
                self._answer({}, 404)

        def do_PUT(self) -> None:
            blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer({})

        def do_GET(self) -> None:
            self._answer({"sha": "0" * 40, "id": "acme/colours", "siblings": []})

        def _blob(self, one: dict[str, Any]) -> str:
            return f"{hub.url}/blobs/{one['oid']}"

        def _answer(self, data: dict[str, Any], status: int = 200) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def push(hub: Uploads, folder: Path, repo: str = "acme/colours", token: str = "hf_test") -> str:
    """What the push prints, in a process that takes the stand-in for the Hub: an URL or an error."""
    folder.mkdir()
    for name, content in {**FILES, "optimizer.pt": b"not to be pushed"}.items():
        (folder / name).write_bytes(content)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "adapters"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
    script = (
        "import sys; from pathlib import Path\n"
        "from onebase_training.cli.train import PushError, push\n"
        "try: print(push(Path(sys.argv[1]), sys.argv[2]))\n"
        "except PushError as error: print('error:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), repo],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_adapter_arrives_whole_with_its_card_and_nothing_else(hub: Uploads, tmp_path: Path) -> None:
    assert push(hub, tmp_path / "adapter").startswith("http")
    assert hub.files == FILES
    assert hub.created["visibility"] == "private"
    assert hub.token == "Bearer hf_test"


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_named(hub: Uploads, tmp_path: Path, status: int) -> None:
    hub.status = status
    assert "use a token with write access" in push(hub, tmp_path / "adapter")


def test_a_wrong_name_is_refused_before_anything_is_sent(hub: Uploads, tmp_path: Path) -> None:
    assert "write ORG/REPO" in push(hub, tmp_path / "adapter", repo="../etc")
    assert not hub.token
