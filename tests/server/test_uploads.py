"""What is sent as an upload and is not one: refused with the reason, and nothing of it stays on the disk."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load, save

from onebase_adapters.store.store import Store
from onebase_server.adapters.sources import find_adapters, folder_digest, take_folder

from .support import CONFIG, Server, Starter, make_folder, upload

LIMIT = 2_000_000
WEIGHTS = b"w" * 1000


@pytest.fixture(scope="module")
def server(serve_scripted: Starter) -> Iterator[Server]:
    with serve_scripted("words", "--max-upload", str(LIMIT), "--max-body", "1MB") as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def stored(server: Server) -> set[str]:
    """Every file of the store, temporary or not."""
    return {str(path) for path in (server.data_dir / "store").rglob("*") if path.is_file()}


def part(name: str, content: bytes, filename: str | None = None, more: bytes = b"") -> bytes:
    shown = "" if filename is None else f'; filename="{filename}"'
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n'.encode()
    return head + more + b"\r\n" + content + b"\r\n"


NAME = part("name", b"x")
CONFIG_PART = part("files", CONFIG.encode(), "adapter_config.json")
WEIGHTS_PART = part("files", WEIGHTS, "adapter_model.safetensors")
END = b"--B--\r\n"


def send(http: httpx2.Client, body: bytes, kind: str = "multipart/form-data; boundary=B") -> httpx2.Response:
    return http.post("/v1/adapters?wait=true", content=body, headers={"Content-Type": kind})


MLX_CONFIG = b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 1, "scale": 2.0}}'
MLX_WEIGHTS = save({"model.layers.0.q_proj.lora_a": np.ones((3, 1), np.float32)})

BAD = {
    "no name": (CONFIG_PART + WEIGHTS_PART + END, "name"),
    "no weights": (NAME + CONFIG_PART + END, "adapter_model.safetensors"),
    "no config": (NAME + WEIGHTS_PART + END, "adapter_config.json"),
    "config twice": (NAME + CONFIG_PART + CONFIG_PART + END, "twice"),
    "name twice": (NAME + NAME + CONFIG_PART + WEIGHTS_PART + END, "twice"),
    "another file": (NAME + part("files", b"x", "adapter_model.bin") + END, "adapter_model.bin"),
    "a path": (NAME + part("files", b"{}", "../adapter_config.json") + END, "../adapter_config.json"),
    "no file name": (NAME + part("files", b"{}") + END, "adapter_config.json"),
    "another field": (NAME + part("shell", b"x") + END, "shell"),
    "a name that is a path": (part("name", b"../../etc") + CONFIG_PART + WEIGHTS_PART + END, "name"),
    "a name of bytes": (part("name", b"\xff\xfe") + CONFIG_PART + WEIGHTS_PART + END, "UTF-8"),
    "an endless name": (part("name", b"x" * 5000) + CONFIG_PART + WEIGHTS_PART + END, "1000 bytes"),
    "a flag that is none": (
        NAME + part("activate", b"perhaps") + CONFIG_PART + WEIGHTS_PART + END,
        "activate",
    ),
    "a model's config too large": (
        NAME + CONFIG_PART + part("files", b" " * (1 << 20) + b"{}", "config.json"),
        "1048576",
    ),
    "a classifier's config of no JSON": (
        NAME
        + part("files", b'{"task_type": "TOKEN_CLS"}', "adapter_config.json")
        + part("files", b"[", "config.json")
        + WEIGHTS_PART
        + END,
        "config.json is not valid JSON",
    ),
    "a config too large": (NAME + part("files", b" " * (1 << 20) + b"{}", "adapter_config.json"), "1048576"),
    "a full fine-tune of mlx-lm": (
        NAME
        + part("files", b'{"fine_tune_type": "full"}', "adapter_config.json")
        + part("files", MLX_WEIGHTS, "adapters.safetensors")
        + END,
        "fine_tune_type",
    ),
    "weights of both kinds": (
        NAME + WEIGHTS_PART + part("files", MLX_WEIGHTS, "adapters.safetensors") + END,
        "twice",
    ),
    "many parts": (NAME + part("activate", b"1") * 50 + END, "activate"),
    "many headers": (part("name", b"x", None, b"X-A: b\r\n" * 50) + END, "header"),
    "a huge header": (part("name", b"x", None, b"X-A: " + b"b" * 10_000 + b"\r\n") + END, "header"),
    "no disposition": (b"--B\r\nX: y\r\n\r\nz\r\n" + END, "Content-Disposition"),
    "cut short": (NAME + CONFIG_PART + WEIGHTS_PART, "boundary"),
    "another boundary": ((NAME + CONFIG_PART + WEIGHTS_PART + END).replace(b"--B", b"--C"), "multipart"),
    "no multipart at all": (b"hello", "multipart"),
    "nothing": (b"", "boundary"),
}


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapter_of_mlx_lm_is_stored_in_the_format_of_peft(
    server: Server, http: httpx2.Client, name: str
) -> None:
    weights, config = part("files", MLX_WEIGHTS, name), part("files", MLX_CONFIG, "adapter_config.json")
    answer = send(http, part("name", b"mlx") + weights + config + END)

    assert answer.status_code == 200, answer.text
    files = f"/v1/adapters/mlx/versions/{answer.json()['version']}/files"
    found = load(http.get(f"{files}/adapter_model.safetensors").content)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "base_model.model.model.layers.0.q_proj.lora_A.weight": (1, 3)
    }
    assert http.get(f"{files}/adapter_config.json").json()["lora_alpha"] == 2.0
    assert not [path for path in stored(server) if Path(path).read_bytes() == MLX_WEIGHTS]


def test_a_folder_of_mlx_lm_is_converted_alike(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "mlx")
    (folder / "adapter_config.json").write_bytes(MLX_CONFIG)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapters.safetensors").write_bytes(MLX_WEIGHTS)
    assert find_adapters([], str(tmp_path), "base") == [("mlx", folder)]
    store = Store(str(tmp_path / "store"), tmp_path / "cache")

    files = take_folder(store, folder)

    assert load(store.local(files.weights.sha256).read_bytes()).keys() == {
        "base_model.model.model.layers.0.q_proj.lora_A.weight"
    }
    assert files.digest == folder_digest(folder)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_form_is_refused_by_what_is_wrong_and_leaves_nothing(
    server: Server, http: httpx2.Client, what: str
) -> None:
    body, said = BAD[what]
    before = stored(server)

    answer = send(http, body)

    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert stored(server) == before
    assert http.get("/v1/adapters/x").status_code == 404
    assert "multipart" not in server.log  # who sends such forms does not fill the disk with lines


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=" + "b" * 300, 400),
        ("text/plain", 400),
        ("application/json", 400),
    ],
)
def test_a_body_of_another_kind_is_refused(http: httpx2.Client, kind: str, status: int) -> None:
    answer = send(http, NAME + CONFIG_PART + WEIGHTS_PART + END, kind)

    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_an_upload_over_the_limit_is_refused_by_its_announced_length_or_while_it_comes(
    server: Server, http: httpx2.Client
) -> None:
    before = stored(server)
    large = NAME + CONFIG_PART + part("files", b"w" * LIMIT, "adapter_model.safetensors") + END
    kind = {"Content-Type": "multipart/form-data; boundary=B"}

    announced = http.post("/v1/adapters", content=large, headers=kind)
    chunked = http.post("/v1/adapters", content=iter([large[:1_500_000], large[1_500_000:]]), headers=kind)

    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"
        assert "--max-upload" in answer.json()["error"]["message"]
    assert stored(server) == before


def test_an_upload_may_be_larger_than_other_bodies(http: httpx2.Client) -> None:
    assert upload(http, "large", b"w" * 1_500_000).status_code == 200
    assert http.post("/generate", json={"prompt": "w" * 1_500_000}).status_code == 413


@pytest.mark.parametrize(
    "kinds",
    [
        ("application/json", "multipart/form-data; boundary=B"),
        ("multipart/form-data-not; boundary=B",),
    ],
)
def test_a_body_that_no_form_is_read_from_is_held_to_the_limit_of_bodies(
    http: httpx2.Client, kinds: tuple[str, ...]
) -> None:
    body = b'{"name": "x", "hub": {"repo": "' + b"a" * 1_500_000 + b'"}}'
    answer = http.post("/v1/adapters", content=body, headers=[("Content-Type", kind) for kind in kinds])
    assert answer.status_code == 413
    assert "--max-body" in answer.json()["error"]["message"]


def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(server: Server) -> None:
    before = stored(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: multipart/form-data; boundary=B\r\n"
            "Content-Length: 1900000\r\n\r\n"
        )
        connection.sendall(head.encode() + NAME + CONFIG_PART + WEIGHTS_PART[:-2] + b"w" * 1_200_000)
        server.wait_for(lambda: len(stored(server)) > len(before))

    server.wait_for(lambda: stored(server) == before)


def test_two_files_in_any_order_with_the_fields_last_are_an_upload(http: httpx2.Client) -> None:
    body = WEIGHTS_PART + CONFIG_PART + part("activate", b"true") + part("name", b"anyorder") + END

    answer = send(http, body)

    assert answer.status_code == 200
    assert answer.json()["active"] is True


def test_a_full_disk_is_507_and_what_was_stored_goes_on_being_served(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with serve_scripted("words", data_dir=data_dir) as server, server.client() as http:
        kept = upload(http, "kept", b"kept", query="wait=true&activate=true").json()["id"]
        before = stored(server)
        # No file of this process may grow beyond 500 kB from now on: a write fails as on a full disk.
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))

        refused = upload(http, "more", b"m" * 1_000_000)

        assert refused.status_code == 507
        assert refused.json()["error"]["code"] == "store_full"
        assert stored(server) == before
        body = {"prompt": "word", "max_tokens": 1, "adapter": "kept"}
        assert http.post("/generate", json=body).json()["adapter"] == kept
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert upload(http, "more", b"m" * 1_000_000).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0


def begun(server: Server, more: int) -> socket.socket:
    """An upload that the server is writing to its disk, and of which `more` bytes are still to come."""
    first = NAME + CONFIG_PART + WEIGHTS_PART[:-2] + b"w" * 1_200_000
    before = stored(server)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = (
        "POST /v1/adapters?wait=true HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: {len(first) + more}\r\n\r\n"
    )
    connection.sendall(head.encode() + first)
    server.wait_for(lambda: len(stored(server)) > len(before))
    return connection


def answer_on(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as answer:
        return answer.read()


def test_an_upload_that_has_begun_is_a_running_request_when_the_server_stops(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("words") as server:
        rest = b"\r\n" + END
        connection = begun(server, len(rest))
        server.signal(signal.SIGTERM)
        # A request that asks whether the server is ready would be counted too: the log is read instead.
        server.wait_for(lambda: "1 running requests may end" in server.log)

        connection.sendall(rest)

        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        assert server.exit_status() == 0


def test_an_upload_that_outlasts_the_drain_is_told_that_the_server_stops(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--drain-timeout", "0.1") as server:
        connection = begun(server, 500_000)
        server.signal(signal.SIGTERM)

        answer = answer_on(connection)

        assert answer.startswith(b"HTTP/1.1 503 "), answer
        assert b"server_stopping" in answer
        assert server.exit_status() == 0
        assert "Traceback" not in server.log
