"""The Dockerfile, as far as it can be checked without an engine that builds it."""

from __future__ import annotations

import json
import os
import re
import shutil
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


@pytest.mark.parametrize("more", ["", "ray", "tinker"])
def test_the_images_are_given_the_requirements_of_every_extra_that_a_server_uses(
    tmp_path: Path, more: str
) -> None:
    command = re.search(r"^RUN (python -c .*?> requirements\.txt)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert command
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "EXTRAS": more}
    subprocess.run(["sh", "-ec", command[1]], cwd=tmp_path, env=environment, check=True)
    project = tomllib.loads(text)["project"]
    extras = {name: set(some) for name, some in project["optional-dependencies"].items()}
    left_out = {"all", "conform", "dev", "track", "ray", "tinker"} - {more}
    wanted = set(project["dependencies"]).union(*(extras[name] for name in extras.keys() - left_out))
    assert set((tmp_path / "requirements.txt").read_text(encoding="utf-8").splitlines()) == wanted


def test_no_gpu_image_is_built_with_a_triton_that_compiles_launches_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    backend = tmp_path / "triton/backends/nvidia"
    backend.mkdir(parents=True)
    (backend / "driver.c").write_text('{"load_binary", loadBinary, METH_VARARGS, "no launch"}')
    for folder in (backend, backend.parent, backend.parent.parent):
        (folder / "__init__.py").touch()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    built = subprocess.run(
        ["sh", ROOT / "deploy/triton.sh", tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert built.returncode == 1
    assert "take torch 2.13 or newer" in built.stderr
    assert not (tmp_path / "libexec/cc").exists()


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc and nm are needed")
def test_the_gpu_image_starts_triton_without_a_compiler_and_compiles_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    subprocess.run(["sh", ROOT / "deploy/triton.sh", tmp_path], check=True, timeout=120)
    ready = tmp_path / "libexec"
    assert f"CC=/opt/onebase{str(ready / 'cc').removeprefix(str(tmp_path))}" in DOCKERFILE
    # A driver that has all that is called, in place of the one that comes with a GPU.
    undefined = subprocess.check_output(["nm", "-D", "-u", ready / "driver.so"], text=True)
    calls = {"cuInit", *re.findall(r"U (cu\w+)$", undefined, re.MULTILINE)}
    (tmp_path / "driver.c").write_text(
        "\n".join(f"int {call}(void) {{ return 0; }}" for call in sorted(calls))
    )
    driver = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", tmp_path / "driver.c", "-o", driver]
    subprocess.run(command, check=True, timeout=60)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmp", "cp", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))
    script = (
        "from triton.backends.nvidia.driver import CudaUtils\n"
        "from triton.runtime.build import compile_module_from_src\n"
        "print(CudaUtils().launch)\n"
        "compile_module_from_src('int more;', 'more')\n"
    )
    started = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "PATH": str(tools),
            "CC": str(ready / "cc"),
            "LD_LIBRARY_PATH": str(tmp_path),
            "TRITON_LIBCUDA_PATH": str(tmp_path),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "built-in function launch" in started.stdout, started.stderr
    assert "This image has no compiler" in started.stderr
    assert started.returncode == 1
    assert "apt-get" not in DOCKERFILE[DOCKERFILE.index("AS runtime") :]
