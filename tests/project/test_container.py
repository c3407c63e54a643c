"""The Dockerfile, as far as it can be checked without an engine that builds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(params=[200, 503])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A server whose /health has one status: (status, port)."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield request.param, http.server_port
        http.shutdown()
        thread.join()


def test_the_health_check_succeeds_exactly_when_the_server_is_healthy(server: tuple[int, int]) -> None:
    status, port = server
    found = re.search(r"HEALTHCHECK.*\\\n\s+CMD (\[.*\])", DOCKERFILE)
    assert found
    python, *arguments = json.loads(found[1])
    assert python == "python"
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "ONEBASE_PORT": str(port)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode == 0) == (status == 200)


def test_everything_that_is_copied_exists_and_reaches_the_build() -> None:
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert allowed <= copied
    assert all(any(f"{name}/".startswith(f"{one}/") for one in allowed) for name in copied)
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_serves_as_an_ordinary_user_with_its_own_environment(target: str) -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert ("runtime", target) in stages
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") : DOCKERFILE.index("FROM runtime")]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", runtime, re.MULTILINE)
    assert 'ENTRYPOINT ["onebase", "serve", "--host", "0.0.0.0"]' in runtime
    own = DOCKERFILE[DOCKERFILE.index(f"AS {target}\n") :].split("FROM")[0]
    assert f"COPY --from=build-{target} /opt/onebase /opt/onebase" in own
    assert "COPY --from=own /opt/onebase /opt/onebase" in own


def test_the_images_are_given_the_requirements_of_every_extra_that_a_server_uses(tmp_path: Path) -> None:
    command = re.search(r"^RUN (python -c .*?> requirements\.txt)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert command
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-ec", command[1]], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    project = tomllib.loads(text)["project"]
    extras = {name: set(some) for name, some in project["optional-dependencies"].items()}
    wanted = set(project["dependencies"]).union(*(extras[name] for name in extras.keys() - {"dev", "track"}))
    assert set((tmp_path / "requirements.txt").read_text(encoding="utf-8").splitlines()) == wanted
