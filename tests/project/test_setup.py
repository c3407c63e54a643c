"""What `make demo` and `make test` do before anything else, on machines that lack something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_that(folder: Path, fails_on: str) -> Path:
    """A Python of this version that cannot run code containing `fails_on`."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{fails_on}*) exit 1;; esac\nexec {sys.executable} "$@"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return script


def set_up(venv: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "setup.sh", venv],
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


def test_an_environment_that_is_installed_already_is_left_alone(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    script = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
    stamp = script[script.index("wanted_stamp() {") : script.index("\n}\n", script.index("wanted_stamp() {"))]
    subprocess.run(
        ["bash", "-c", f'{stamp}\n}}\nvenv="$1"; wanted_stamp >"$venv/.installed"', "stamp", venv],
        cwd=ROOT,
        check=True,
    )
    result = set_up(venv, "/bin/false")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
