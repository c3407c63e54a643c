"""What a package index and an installed package show: the page's links, the extras, how a command ends."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tools.package_page import absolute_links, dynamic_metadata, source_address

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def test_every_link_of_a_released_package_is_whole_and_leads_to_a_file_of_the_repository_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://forge.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "acme/base")
    made = dynamic_metadata({}, PROJECT)
    assert made["readme"]["content-type"] == "text/markdown"
    assert made["urls"]["Source"] == "https://forge.example/acme/base"
    tree = f"https://forge.example/acme/base/blob/v{PROJECT['version']}/"
    links = re.findall(r"\]\(([^)\s]+)\)", made["readme"]["text"])
    ours = [link.removeprefix(tree) for link in [*links, *made["urls"].values()] if link.startswith(tree)]
    assert len(ours) > 12
    assert all(link.startswith("https://") for link in links)
    assert [path for path in ours if not (ROOT / path.partition("#")[0]).exists()] == []


def test_a_package_that_no_release_makes_has_no_links_but_those_of_its_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert dynamic_metadata({}, PROJECT)["urls"] == {}
    metadata = (
        "Name: onebase\nProject-URL: Source, https://forge.example/acme/base\n\nProject-URL: Source, no\n"
    )
    (tmp_path / "PKG-INFO").write_text(metadata)
    assert source_address({}, tmp_path) == "https://forge.example/acme/base"


def test_links_in_code_and_whole_ones_stay_as_they_are() -> None:
    page = "[a](b.md#c) ![d](e.png) [f](#g) [h](https://i)\n```\n[j](k)\n```\n"
    assert absolute_links(page, "T") == (
        "[a](T/b.md#c) ![d](T/e.png) [f](#g) [h](https://i)\n```\n[j](k)\n```\n"
    )


def test_all_brings_every_extra_but_those_of_developers() -> None:
    extras = PROJECT["optional-dependencies"]
    named = re.findall(r"onebase\[([a-z0-9,]+)\]", " ".join(extras["all"]))
    assert {name for part in named for name in part.split(",")} == extras.keys() - {"all", "dev"}


def test_every_package_says_that_it_has_types() -> None:
    packages = PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert [name for name in packages if not (ROOT / name / "py.typed").exists()] == []


LEAVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from onebase_protocol.command_line import end_process
pool = ThreadPoolExecutor()
pool.submit(lambda: (time.sleep(0.2), print("thread")))
atexit.register(lambda: print("atexit"))
class Last:
    def __del__(self):
        print("taken apart")
last = Last()
print("done", end="\\n")
end_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ends_waits_for_threads_and_writes_all_but_takes_nothing_apart(status: int) -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING, str(status)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "done\nthread\natexit\n", "")
