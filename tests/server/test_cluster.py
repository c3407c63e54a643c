"""`onebase cluster`: servers on a Ray of its own, behind one address: killed, scaled and drained."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import yaml

from .support import HERE, ROOT, SOURCES, Server, alive, children, free_port, launch, upload
from .test_route import BASE, counted, generate, wait

if importlib.util.find_spec("ray") is None:  # what collects tests does not import it, for a second
    pytest.skip("Ray is not installed: pip install 'onebase[ray]'", allow_module_level=True)

COMMAND = """
import sys
from onebase_route.cli import cluster
sys.exit(cluster(sys.argv[2:], [sys.executable, sys.argv[1], "words"]))
"""
GPUS = 3
ENVIRONMENT = os.environ | {
    "PYTHONPATH": SOURCES,
    "COLUMNS": "200",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # else it kills servers where other tests take the memory
    "RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": GPUS}),  # claimed, and handed out as if they were there
}
NAMES = [f"shop{number}" for number in range(3)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, str(HERE / "serve_scripted.py"), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`onebase cluster` on servers whose engines are scripted."""
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def _no_pandas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray Serve imports pandas where it is installed, which each of its processes takes a second for."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "pandas.py").write_text('raise ImportError("pandas is hidden")\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", f"{folder}{os.pathsep}{SOURCES}")
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two servers, which have some adapters."""
    data = tmp_path_factory.mktemp("cluster")
    port = free_port()
    options = ["--replicas", "2", "--port", str(port), "--data-dir", str(data), "--drain-timeout", "30"]
    process = launch(command("up", *options), ENVIRONMENT, -1)
    made = Server(process, port, data)
    try:
        made.wait_for(lambda: servers(made) == 2)
        with made.client() as http:
            for name in NAMES:
                upload(http, name, name.encode(), query="wait=true&activate=true").raise_for_status()
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


@pytest.fixture
def http(cluster: Server) -> Iterator[httpx2.Client]:
    with cluster.client() as client:
        yield client


def addresses(cluster: Server) -> list[str]:
    """Of the servers that are ready."""
    with contextlib.suppress(httpx2.TransportError):
        text = httpx2.get(f"{cluster.url}/metrics", timeout=10).text
        return re.findall(r'onebase_route_ready\{replica="(.*)"\} 1', text)
    return []


def servers(cluster: Server) -> int:
    return len(addresses(cluster))


def listening(cluster: Server, url: str) -> int:
    """The process that serves at an address."""
    port = url.rpartition(":")[2]
    wanted = {f"--port\0{port}\0", "ingress-replicas" if url == cluster.url else "serve_scripted"}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            told = (folder / "cmdline").read_text() if folder.name.isdigit() else ""
            if all(part in told for part in wanted):
                return int(folder.name)
    raise AssertionError(f"nobody serves {url}")


def serving(cluster: Server) -> set[int]:
    """The processes of the servers that are ready."""
    found = set()
    for url in addresses(cluster):
        with contextlib.suppress(AssertionError):  # it was killed a moment ago
            found.add(listening(cluster, url))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def manage(cluster: Server, *arguments: str) -> str:
    done = run(*arguments, "--data-dir", str(cluster.data_dir))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_address_answers_as_a_server_does(http: httpx2.Client, cluster: Server) -> None:
    urls = addresses(cluster)
    assert len(urls) == 2
    for url in urls:
        assert os.getpriority(os.PRIO_PROCESS, listening(cluster, url)) == os.getpriority(os.PRIO_PROCESS, 0)
    for url in urls:  # what one was told, all know, within the second in which they look at SQLite
        with httpx2.Client(base_url=url, timeout=60) as direct:
            assert wait(lambda: len(direct.get("/v1/adapters").json()["data"]) == len(NAMES))
    body = {"prompt": "a b", "max_tokens": 3, "stream": True, "adapter": NAMES[0]}
    with http.stream("POST", "/generate", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))
    assert http.get("/console").status_code in (200, 404)  # it may not be built
    kept = http.post("/v1/responses", json={"model": BASE, "input": "a b", "max_output_tokens": 16}).json()
    assert http.get(f"/v1/responses/{kept['id']}").json()["id"] == kept["id"]
    file = {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 4)}
    sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files=file).json()
    job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": sent["id"]}).json()
    assert wait(lambda: http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "succeeded")


def gpu_of(pid: int) -> str:
    """What a process's environment names."""
    parts = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(part for part in parts if part.startswith("CUDA_VISIBLE_DEVICES=")).partition("=")[2]


@pytest.mark.full
def test_each_server_has_a_gpu_of_its_own_and_there_are_no_more_servers_than_gpus(cluster: Server) -> None:
    gpus = set(map(gpu_of, serving(cluster)))
    assert len(gpus) == 2
    assert gpus < set(map(str, range(GPUS)))
    refused = run("scale", str(GPUS + 1), "--data-dir", str(cluster.data_dir))
    assert refused.returncode == 1
    assert f"{GPUS + 1} servers take {GPUS + 1} GPUs, and Ray finds {GPUS} here" in refused.stderr
    assert servers(cluster) == 2


@pytest.mark.full
@pytest.mark.parametrize("victim", ["server", "actor"])
def test_one_that_is_killed_costs_no_stream_and_comes_back(
    http: httpx2.Client, cluster: Server, victim: str
) -> None:
    with contextlib.ExitStack() as stack:
        body = {"prompt": "a b", "max_tokens": 80_000, "stream": True}
        streams = [stack.enter_context(http.stream("POST", "/generate", json=body)) for _ in range(8)]
        lines = [stream.iter_lines() for stream in streams]
        for one in lines:
            assert next(one).startswith("data: ")
        server = min(serving(cluster))
        engines = children(server)
        before = counted(http, "onebase_route_resumed_total")[""]
        os.kill(server if victim == "server" else parent(server), signal.SIGKILL)
        for name in NAMES:  # whoever had them
            assert generate(http, name).status_code == 200
        assert wait(lambda: counted(http, "onebase_route_resumed_total")[""] > before)
        for one in lines:
            assert not [line for line in islice(one, 400) if "replica_lost" in line]
    assert wait(lambda: not any(map(alive, [server, *engines])))
    assert wait(lambda: len(serving(cluster) - {server}) == 2)


@pytest.mark.full
def test_an_address_that_is_killed_comes_back(http: httpx2.Client, cluster: Server) -> None:
    route = listening(cluster, cluster.url)
    os.kill(route, signal.SIGKILL)

    assert wait(lambda: not alive(route) and servers(cluster) == 2)
    assert generate(http, NAMES[0]).status_code == 200


@pytest.mark.full
def test_no_request_is_lost_while_servers_come_and_go(http: httpx2.Client, cluster: Server) -> None:
    with four_clients(cluster) as answers:
        manage(cluster, "scale", "3")
        assert servers(cluster) == 3
        shown = manage(cluster, "status")
        assert "servers: 3 running" in shown
        pids = {
            int(pid) for pid in re.findall(r"^  http\S+  ready .* pid (\d+) on \S+  up ", shown, re.MULTILINE)
        }
        assert pids == serving(cluster)
        logs = re.findall(r"  log (/\S+)$", shown, re.MULTILINE)
        assert len(logs) == 4  # the route's too
        assert all(Path(log).is_file() for log in logs)
        asked_by_handle(cluster)
        manage(cluster, "scale", "2")
        assert servers(cluster) == 2

    assert set(answers) == {"right"}
    assert answers["right"] > 20


@pytest.mark.full
def test_a_restart_replaces_every_server_and_the_route_and_answers_each_request(
    http: httpx2.Client, cluster: Server
) -> None:
    before, address = serving(cluster), listening(cluster, cluster.url)
    with four_clients(cluster) as answers:
        manage(cluster, "restart")

    assert servers(cluster) == len(before)
    assert not serving(cluster) & before
    assert wait(lambda: not alive(address))
    assert listening(cluster, cluster.url) != address
    assert set(answers) == {"right"}
    assert answers["right"] > 20


@contextlib.contextmanager
def four_clients(cluster: Server) -> Iterator[Counter[object]]:
    """Requests until the block ends. What they got is counted: `right`, or the text of another answer."""
    answers: Counter[object] = Counter()
    stop = threading.Event()

    def ask(number: int) -> None:
        with cluster.client() as client:
            while not stop.wait(0.2):
                name = [*NAMES, None][number % 4]
                answer = generate(client, name, prompt=f"{number}", max_tokens=20)
                told = answer.json()
                right = answer.status_code == 200 and (told["adapter"] or "").startswith(name or "")
                answers["right" if right else answer.text] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


HANDLE = """
import asyncio, json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
async def main():
    servers = serve.get_deployment_handle("Server", "onebase").options(stream=True)
    for number in range(6):
        body = json.dumps({"prompt": f"{number}", "adapter": "shop0", "max_tokens": 2, "seed": 77}).encode()
        pieces = [piece async for piece in servers.ask.remote("/generate", body)]
        assert json.loads(b"".join(pieces))["adapter"].startswith("shop0"), pieces
asyncio.run(main())
"""


def asked_by_handle(cluster: Server) -> None:
    """As another application on Ray Serve asks."""
    known = json.loads((cluster.data_dir / "cluster.json").read_text())
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": known["token"]}
    command = [sys.executable, "-c", HANDLE, known["address"]]
    done = subprocess.run(command, env=ENVIRONMENT | token, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_secrets_are_in_no_command_and_in_no_state(cluster: Server) -> None:
    known = json.loads((cluster.data_dir / "cluster.json").read_text())
    token = Path(known["token"])
    assert (cluster.data_dir / "cluster.json").stat().st_mode & 0o77 == 0
    assert token.parent.stat().st_mode & 0o77 == 0
    server = listening(cluster, addresses(cluster)[0])
    assert children(server)
    for pid in (server, *children(server), parent(server)):
        assert token.read_text() not in Path(f"/proc/{pid}/cmdline").read_text()
    assert "RAY_AUTH" not in Path(f"/proc/{server}/environ").read_text()


@pytest.mark.full
def test_a_drain_lets_a_running_stream_end_and_leaves_nothing_behind(
    http: httpx2.Client, cluster: Server
) -> None:
    pids = [listening(cluster, url) for url in (*addresses(cluster), cluster.url)]
    assert len(pids) >= 2
    body = {"prompt": "a b", "max_tokens": 300, "stream": True}
    with http.stream("POST", "/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        cluster.signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) >= 299
    assert cluster.exit_status() == 0
    assert not any(map(alive, pids))
    assert not (cluster.data_dir / "cluster.json").exists()
    away = run("status", "--data-dir", str(cluster.data_dir))
    assert away.returncode == 1
    assert "onebase cluster up" in away.stderr


# ---- without a cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "queued", "busy", "ttft", "waiting", "wanted"),
    [
        (0, [], [], [], 0, 0),
        (0, [], [], [], 1, 1),  # from none
        (2, [0, 0], [0.9, 0.8], [0.1, 0.1], 0, 2),
        (2, [3000, 6000], [1, 1], [0.1, 0.1], 0, 4),  # one for each 4000 tokens that wait
        (2, [0, 300], [0.1, 0.1], [0.1, 0.1], 0, 2),  # too few wait for one more, and too many for one less
        (2, [0, 0], [1, 1], [9, 4], 0, 3),  # the first token comes late
        (4, [0, 0, 0, 0], [0.2, 0.2, 0.1, 0.1], [0, 0, 0, 0], 0, 1),
        (1, [0], [0], [0], 0, 0),
        (2, [0], [0], [0], 0, 2),  # one has not told of itself yet
    ],
)
def test_there_are_more_servers_where_tokens_wait_and_fewer_where_rows_are_free(
    there: int, queued: list[float], busy: list[float], ttft: list[float], waiting: int, wanted: int
) -> None:
    from onebase_route.cluster import ByQueuedTokens

    told = {"queued_tokens": queued, "busy": busy, "ttft": ttft}
    context: Any = SimpleNamespace(  # of its many fields those that are looked at
        current_num_replicas=there,
        target_num_replicas=there,
        total_queued_requests=waiting,
        aggregated_metrics={name: dict(enumerate(values)) for name, values in told.items()},
    )
    assert ByQueuedTokens()(context)[0] == wanted


def test_what_config_prints_and_what_kubernetes_gets_is_what_ray_serve_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray.serve.schema import ServeDeploySchema

    from onebase_route import cli
    from onebase_route.cluster import ClusterConfig

    options = [
        "up", "--config", "--min-replicas", "0", "--max-replicas", "4", "--store", "s3://bucket/a",
        "--registry", "postgresql://db/onebase", "--host", "0.0.0.0", "--kv-memory", "2GB",
        "--adapter", "a=/b", "--no-double-quant", "--allowed-host", "llm.example.com",
        "--key-file", "/keys/admin",
    ]  # fmt: skip
    assert cli.cluster(options) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    manifest = next(
        one
        for one in yaml.safe_load_all((ROOT / "deploy/kubernetes/rayservice.yaml").read_text())
        if one["kind"] == "RayService"
    )
    for config in (printed, yaml.safe_load(manifest["spec"]["serveConfigV2"])):
        app, front = ServeDeploySchema.model_validate(config).applications
        plan = ClusterConfig(**app.args)
        assert plan.server[:2] == ["onebase", "serve"]
        assert not plan.one_machine
        assert app.import_path == "onebase_route.cluster:build"
        assert ClusterConfig(**front.args).ingress[:2] == ["onebase", "route"]
        assert front.import_path == "onebase_route.cluster:build_ingress"
    server = " ".join(ClusterConfig(**printed["applications"][0]["args"]).server)
    assert "--kv-memory 2000000000" in server
    assert "--adapter a=/b" in server
    assert "--no-double-quant" in server
    assert "0.0.0.0" not in server
    assert printed["applications"][1]["args"]["wait"] > 0
    assert [one["args"]["key_file"] for one in printed["applications"]] == ["/keys/admin"] * 2


@pytest.mark.parametrize(
    ("there", "each", "servers", "said"),
    [
        (0, None, 9, ""),
        (4, 1, 4, ""),
        (4, 1, 1, "GPUs: 1 of 4 used; --replicas 4 uses all"),
        (4, 1, 5, "5 servers take 5 GPUs, and Ray finds 4 here, enough for 4"),
        (4, 2, 2, ""),
        (3, 2, 2, "2 servers take 4 GPUs, and Ray finds 3 here, enough for 1"),
        (1, 0.4, 2, ""),
        (1, 0.4, 3, "enough for 2"),
        (0, 1, 1, "enough for 0"),
    ],
)
def test_more_servers_than_gpus_are_refused_and_unused_gpus_are_told(
    there: int, each: float | None, servers: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onebase_route import cluster as on_ray

    monkeypatch.setattr(on_ray.ray, "cluster_resources", lambda: {"GPU": there} if there else {})
    options = {} if each is None else {"num_gpus": each}
    apps = on_ray.applications(
        on_ray.ClusterConfig(), {"num_replicas": servers, "ray_actor_options": options}
    )
    if "enough" in said:
        with pytest.raises(on_ray.ClusterError, match=said):
            on_ray.gpus_left(apps, servers)
    else:
        assert on_ray.gpus_left(apps, servers) == said


def test_a_password_in_an_option_is_refused_without_being_told(capsys: pytest.CaptureFixture[str]) -> None:
    from onebase_route import cli

    assert cli.cluster(["up", "--config", "--registry", "postgresql://me:secret@db/onebase"]) == 1
    said = capsys.readouterr().err
    assert "PGPASSWORD" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        ("postgresql://me:s3cr3t@db/x", True),
        ("postgresql://me:s3/cr3t@db/x", True),
        ("postgresql://db/x?user=me&password=s3cr3t", True),
        ("postgresql://me@db/x", False),
        ("http://host:8000/me@home", False),
    ],
)
def test_a_password_in_a_command_is_found_wherever_an_address_holds_one(address: str, refused: bool) -> None:
    from onebase_route.cluster import ClusterConfig

    with pytest.raises(ValueError, match="PGPASSWORD") if refused else contextlib.nullcontext():
        ClusterConfig(server=["onebase", "serve", f"--registry={address}"])


def test_servers_of_one_machine_share_its_cores_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_edge.settings import load_settings
    from onebase_route import cli

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cli, "total_memory", lambda: 64 << 30)
    assert cli._shared_out(load_settings({}), 4) == {"threads": 4, "host_memory": 4 << 30}
    monkeypatch.setenv("ONEBASE_HOST_MEMORY", "8GB")
    assert cli._shared_out(load_settings({"threads": 3}), 4) == {}


def test_servers_of_a_machine_take_folders_that_nobody_has_and_keep_their_ports(tmp_path: Path) -> None:
    from onebase_route.cluster import listen_again, take_folder

    def port_of(kept: Path) -> int:
        with listen_again("127.0.0.1", kept) as listener:
            port: int = listener.getsockname()[1]
            return port

    first, lock = take_folder(tmp_path)
    second, other = take_folder(tmp_path)
    assert (first.name, second.name) == ("0", "1")
    os.close(lock)
    again, lock = take_folder(tmp_path)
    assert again == first
    port = port_of(first / "port")
    assert port_of(first / "port") == port
    (first / "port").write_text("99999999")
    assert 0 < port_of(first / "port") < 65536
    os.close(lock)
    os.close(other)


def test_nobody_gets_the_port_of_a_server_before_the_server_has_it() -> None:
    from onebase_route.cluster import Child, ClusterError, listen

    answers = """
import os, socket
with socket.socket(fileno=int(os.environ["ONEBASE_LISTEN_FD"])) as listener:
    listener.accept()[0].sendall(b"the child")
"""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    child = Child([sys.executable, "-c", answers], listener, lambda: None)
    try:
        with pytest.raises(ClusterError, match="Address already in use"):
            listen("127.0.0.1", port)
        listener.close()
        with pytest.raises(ClusterError, match="Address already in use"):
            listen("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            assert connection.recv(100) == b"the child"
    finally:
        child.kill()


def test_a_child_that_cannot_be_started_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_route import cluster

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no process left")

    async def play() -> None:
        monkeypatch.setattr(cluster.subprocess, "Popen", refuse)
        with cluster.listen("127.0.0.1", 0) as listener:
            child = cluster.Child(["onebase", "route"], listener, lambda: None)
            async with httpx2.AsyncClient() as client:
                await asyncio.wait_for(child.ready(client, cluster.address_of(listener)[0]), 60)

    with pytest.raises(cluster.ClusterError, match="before it was ready"):
        asyncio.run(play())


@pytest.mark.parametrize(("status", "refuses"), [(1, False), (2, True), (3, False)])
def test_a_child_that_does_not_start_is_quoted_though_its_own_children_live_on(
    status: int, refuses: bool
) -> None:
    from onebase_route import cluster

    program = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("onebase: first this", file=sys.stderr)
print("onebase: --base: no/such is not a folder\\n", file=sys.stderr)
sys.exit({status})
"""

    async def play() -> None:
        with cluster.listen("127.0.0.1", 0) as listener:
            child = cluster.Child([sys.executable, "-c", program], listener, lambda: None)
            async with httpx2.AsyncClient() as client:
                await asyncio.wait_for(child.ready(client, cluster.address_of(listener)[0]), 50)

    with pytest.raises(cluster.ClusterError, match=r"--base: no/such is not a folder$") as caught:
        asyncio.run(play())
    assert isinstance(caught.value, cluster.SettingsRefusedError) == refuses


def test_a_child_goes_on_where_its_log_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_route import cluster

    program = """
import sys
for _ in range(3000):
    print("x" * 99, file=sys.stderr)
sys.exit("onebase: the last line")
"""

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def play() -> None:
        monkeypatch.setattr(cluster.os, "write", refuse)
        with cluster.listen("127.0.0.1", 0) as listener:
            child = cluster.Child([sys.executable, "-c", program], listener, lambda: None)
            try:
                async with httpx2.AsyncClient() as client:
                    await asyncio.wait_for(child.ready(client, cluster.address_of(listener)[0]), 50)
            finally:
                child.kill()

    with pytest.raises(cluster.ClusterError, match=r"onebase: the last line$"):
        asyncio.run(play())


def test_of_rays_messages_the_servers_own_words_are_left() -> None:
    from onebase_route import cluster

    ray = (
        "A replica failed to start with exception. Retrying 1 more time(s). Error:\n"
        "ray::ServeReplica:onebase:Server.initialize_and_get_metadata() (pid=1)\n  Traceback ...\n"
        "    raise RefusedError(self.last_line)\n"
        "onebase_route.cluster.SettingsRefusedError: adapter 'a': /nowhere is not a folder\n"
    )
    assert (
        cluster._last_error(["", ray], cluster.SettingsRefusedError)
        == "adapter 'a': /nowhere is not a folder"
    )
    assert cluster._last_error([ray], cluster.ClusterError) == ""


ROUTE = """
import http.server, os, socket
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"onebase_route_waiting 1.0\\n")
    def log_message(self, *arguments):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(os.environ["ONEBASE_LISTEN_FD"]))
server.serve_forever()
"""


@pytest.mark.parametrize("faults", [(), (RuntimeError("surprise"),)])
def test_an_address_is_started_again_also_while_it_waits_for_a_server_and_after_a_surprise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: tuple[Exception, ...]
) -> None:
    """No server ever comes: the request for one is answered never."""
    from onebase_route import cluster

    asked, left = asyncio.Event(), list(faults)

    class Servers:
        async def remote(self) -> None:
            asked.set()
            await asyncio.Event().wait()

    class OwnIngress(cluster.Ingress):
        def _start(self) -> Any:
            loop = asyncio.get_running_loop()
            ended = lambda: loop.call_soon_threadsafe(self._ended.set)  # noqa: E731
            return cluster.Child([sys.executable, "-c", ROUTE], self._listener, ended)

        def _write_list(self) -> None:
            if left:
                raise left.pop()
            super()._write_list()

    async def play() -> None:
        monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
        plan = cluster.ClusterConfig(
            ingress=["onebase", "route", "--port", "0"], data_dir=str(tmp_path), wait=5.0
        )
        ingress = OwnIngress.__new__(OwnIngress)
        await ingress.__init__(plan)  # type: ignore[misc]  # as Ray does
        ingress._servers = SimpleNamespace(wake=Servers())
        try:
            await ingress.check_health()
            await asyncio.wait_for(asked.wait(), 60)
            ingress.replicas_are({"http://127.0.0.1:1": {}}) if not faults else ingress._urls.append(
                "http://x"
            )
            first = ingress._child
            first._process.kill()
            while ingress._child is first or not ingress._child.is_ready:
                await asyncio.sleep(0.01)
            await ingress.check_health()
        finally:
            await ingress.kill()
            for task in ingress._following:
                task.cancel()

    asyncio.run(asyncio.wait_for(play(), 120))


REPORTS = "import os, time; os.write(int(os.environ['{ready}']), b'1'); time.sleep(600)"
SILENT = "import time; time.sleep(600)"


@pytest.mark.parametrize("silent", [False, True])
def test_a_route_is_replaced_once_at_a_time_and_one_that_is_not_ready_in_time_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    from onebase_edge.settings import READY
    from onebase_route import cluster

    class OwnIngress(cluster.Ingress):
        def _start(self, *options: str, ready: int | None = None) -> Any:
            program = ROUTE if ready is None else SILENT if silent else REPORTS.format(ready=READY)
            before = options[1:]
            child = cluster.Child([sys.executable, "-c", program], self._listener, lambda: None, ready=ready)
            started.append((before, child))
            return child

    started: list[tuple[Any, Any]] = []

    async def play() -> None:
        monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
        plan = cluster.ClusterConfig(
            ingress=["onebase", "route", "--port", "0"], data_dir=str(tmp_path), wait=5.0
        )
        ingress = OwnIngress.__new__(OwnIngress)
        await ingress.__init__(plan)  # type: ignore[misc]  # as Ray does
        if silent:
            monkeypatch.setattr(cluster, "_NEW_ROUTE_SECONDS", 0.2)
        first = ingress._child
        try:
            answers = await asyncio.gather(ingress.restart(), ingress.restart(), return_exceptions=True)
            _, (_, second), (before, third) = started
            if silent:
                assert all(isinstance(one, cluster.ClusterError) for one in answers)
                assert ingress._child is first
                assert first.is_ready
                while second.status is None or third.status is None:
                    await asyncio.sleep(0.01)
            else:
                assert not any(answers)
                assert before == (str(second.pid),), "it takes the place of the one before it"
                assert ingress._child is third
        finally:
            for _, child in started:
                child.kill()
            await ingress.kill()

    asyncio.run(asyncio.wait_for(play(), 120))


def test_a_server_listens_on_the_socket_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase_edge.listener import bind
    from onebase_edge.settings import LISTENER, load_settings

    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        monkeypatch.setenv(LISTENER, str(os.dup(given.fileno())))
        with bind(load_settings({"port": port})) as listener:
            assert listener.getsockname() == given.getsockname()
            assert not listener.get_inheritable()
        assert LISTENER not in os.environ


def test_a_data_folder_has_one_cluster_and_forgets_one_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from onebase_route import cli

    data = tmp_path / "[data]"

    def said(*arguments: str) -> str:
        assert cli.cluster([*arguments, "--data-dir", str(data)]) == 1
        return capsys.readouterr().err

    assert "no cluster runs" in said("status")
    with cli._alone(data):
        assert "starting" in said("status")
        assert f"{data} already: end it with `onebase cluster down`" in said("up")
        (data / "cluster.json").write_text("{")
        assert "does not say where" in said("down")
    for left in ("", "[]", '{"address": "127.0.0.1:1", "token": "/nowhere/token"}'):
        (data / "cluster.json").write_text(left)
        assert "no cluster runs" in said("status")
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert "cannot listen" in said("up", "--port", str(other.getsockname()[1]))
        assert not (data / "cluster.json").exists()
    data = tmp_path / "file"
    data.touch()
    assert str(data) in said("up")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter", "acme=/no/such"], "adapter 'acme': /no/such is not a folder"),
        (["--adapter", "acme={empty}"], "adapter 'acme': {empty} has no adapter_config.json"),
        (["--adapters-dir", "/no/such"], "--adapters-dir: /no/such is not a folder"),
        (["--base", "./no/such"], "--base: ./no/such is not a folder"),
        (["--max-sequences", "0"], "--max-sequences is 0: the lowest value is 1"),
    ],
)
def test_what_each_server_would_refuse_is_refused_before_ray_starts(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from onebase_route import cli

    monkeypatch.setattr(cli, "_prepare_ray", lambda *_: pytest.fail("Ray would be started"))
    given = [option.format(empty=tmp_path) for option in options]
    assert cli.cluster(["up", "--data-dir", str(tmp_path / "data"), *given]) == 1
    assert says.format(empty=tmp_path) in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onebase_route
    from onebase.cli import main

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "onebase_route.cluster", raising=False)
    monkeypatch.delattr(onebase_route, "cluster", raising=False)
    assert main(["cluster", "up", "--config"]) == 1
    assert "pip install 'onebase[server,ray]'" in capsys.readouterr().err
