"""One real server for all tests of the api, and servers of their own for tests that break one."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.forks import Nursery
from tests.postgres import PostgresServer, postgres_server
from tests.training.runs import talking_base
from transformers import AutoModelForCausalLM

from onebase_adapters.registry import Registry
from onebase_engine.base.default_base import fetch_default_base
from onebase_server.inference.tokenization import BaseTokenizer

from . import support
from .access import Keys
from .support import ForkedServers, Server, Starter, launch, serving


def make_adapter(base_folder: Path, folder: Path, seed: int, rank: int, **settings: Any) -> Path:
    """A PEFT adapter of the default base, saved by PEFT; random but far from the base.

    `settings`: more of LoraConfig.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM", **settings,
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder() -> Path:
    return fetch_default_base()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests of real processes that ask nothing of a text: its engine is ready in a third of the time."""
    return talking_base(tmp_path_factory.mktemp("small") / "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> BaseTokenizer:
    return BaseTokenizer(str(base_folder))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    """The keys of a registry of the module's own; its folder is the data folder of a server on it."""
    made = Keys(tmp_path_factory.mktemp("data"))
    yield made
    made.close()


REGISTRIES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.full)]
"""Parameters of a fixture or a test that is to run on both; `registry_url` makes one."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def registry_url(request: pytest.FixtureRequest, folder: Path, kind: str | None = None) -> str:
    """Return the URL of an empty database of the kind that is the fixture's parameter, or is given."""
    if (kind or request.param) == "sqlite":
        return f"sqlite:///{folder / 'registry.db'}"
    return str(request.getfixturevalue("postgres").database())


@pytest.fixture(scope="session")
def forked_servers(base_folder: Path) -> Iterator[ForkedServers]:
    made = ForkedServers()
    yield made
    made.close()


@pytest.fixture(scope="session")
def serve_scripted(forked_servers: ForkedServers) -> Starter:
    """`with serve_scripted("words", *options) as server`: an engine that misbehaves as named.

    `"words,slow"`: and a verifier that does.
    """

    def start(behaviour: str, *options: str, **how: Any) -> contextlib.AbstractContextManager[Server]:
        return serving([behaviour], *options, start=forked_servers.start, **how)

    return start


@pytest.fixture(scope="session")
def routing(forked_servers: ForkedServers) -> Starter:
    """`with routing(servers, folder, *options) as route`: `onebase route` before the servers, ready."""
    return functools.partial(support.routing, command=("route",), start=forked_servers.start)


@pytest.fixture(scope="module")
def scripted(serve_scripted: Starter) -> Iterator[Server]:
    """One server for tests that end nothing but its engines, verifiers, trainers and their own jobs."""
    with serve_scripted("words") as server:
        yield server


@pytest.fixture(scope="session")
def serve_real(nursery: Nursery) -> Starter:
    """`with serve_real(*options) as server`: `onebase serve`, all of whose processes begin as forks."""
    fork = functools.partial(launch, popen=nursery.popen("forks"))

    def start(*options: str, **how: Any) -> contextlib.AbstractContextManager[Server]:
        return serving([sys.executable, "-m", "onebase_server"], *options, **{"start": fork, **how})

    return start


@dataclass(frozen=True)
class Api:
    """The shared server and what it serves."""

    server: Server
    http: httpx2.Client
    base: str
    adapters: dict[str, Path]
    digests: dict[str, str]
    data_dir: Path

    def copy_of_data(self, target: Path) -> Path:
        """The data folder, with both adapters proved, for a server of one's own."""
        shutil.copytree(self.data_dir, target)
        with contextlib.closing(sqlite3.connect(target / "registry.db")) as database, database:
            database.execute("DELETE FROM servers")  # or the copy would wait for the end of this one's lease
        return target

    def generate(self, **body: Any) -> dict[str, Any]:
        """The answer of POST /generate, greedy unless asked otherwise; raises unless the status is 200."""
        answer = self.http.post("/generate", json={"temperature": 0, "max_tokens": 6, **body})
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        data: dict[str, Any] = answer.json()
        return data

    def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a streamed answer, decoded; the last one is the text `[DONE]`."""
        events: list[Any] = []
        with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.read().decode()}")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    events.append(data if data == "[DONE]" else json.loads(data))
        return events


@pytest.fixture(scope="session")
def api(serve_real: Starter, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The server that all tests share: the default base in NF4 and two adapters made by PEFT."""
    parent = tmp_path_factory.mktemp("adapters")
    adapters = {
        name: make_adapter(base_folder, parent / name, seed, rank)
        for name, seed, rank in (("red", 1, 4), ("blue", 2, 8))
    }
    data_dir = tmp_path_factory.mktemp("data")
    options = [
        "--adapters-dir",
        str(parent),
        "--kv-memory",
        "400MB",
        "--max-sequences",
        "16",
        "--threads",
        "1",
    ]
    with serve_real(*options, data_dir=data_dir) as server, server.client() as http:
        digests = {entry["id"]: entry["version"] for entry in http.get("/v1/adapters").json()["data"]}
        yield Api(server, http, "smollm2-135m-instruct", adapters, digests, data_dir)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="base", base_name="base")
    made.migrate()
    yield made
    made.close()
