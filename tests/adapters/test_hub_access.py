"""Bases and data from a Hub that gives nothing: one sentence after one question, and what is here is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hub_standin import HubStandIn

_FETCH = """
import json, sys
from onebase_engine.base.default_base import BaseFetchError
from onebase_engine.base.default_base import resolve_base
from onebase_training.cli.estimate import find_config, find_tokenizer
from onebase_training.data.dataset import DataError
from onebase_training.data.hub import fetch, parse_dataset_id

def data(name):
    return fetch(parse_dataset_id(name), "train")[0]

said = []
for find in (find_config, resolve_base, data)[: int(sys.argv[1])]:
    try:
        said.append(type(find("acme/base")).__name__)
    except (BaseFetchError, DataError) as error:
        said.append(str(error))
print(json.dumps(said))
"""
pytestmark = pytest.mark.usefixtures("forks")

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as standin:
        yield standin


def fetched(hub: HubStandIn, home: Path, things: int = 3, **more: str) -> list[str]:
    """What came of the config, of the base and of the data set; nothing else may have been printed."""
    done = subprocess.run(
        [sys.executable, "-c", _FETCH, str(things)],
        env={**os.environ, **hub.environment(home), **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(hub: HubStandIn, tmp_path: Path) -> None:
    hub.stop()
    config, base, data = fetched(hub, tmp_path)
    reason = f"is not on this machine, and {hub.url} cannot be reached (Connection refused)"
    assert config.startswith(f"the config of 'acme/base' {reason}. Check the network")
    assert base.startswith(f"the base 'acme/base' {reason}. Check the network")
    assert data.endswith(f"it {reason}")


def test_a_hub_that_fails_is_asked_once_for_each_thing(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.status = 503
    said = fetched(hub, tmp_path)
    assert len(said) == 3
    assert all(f"is not on this machine, and {hub.url} answers with status 503" in one for one in said)
    assert hub.requests() == ["/api/models/acme/base"] * 2 + ["/api/datasets/acme/base"]


def test_a_hub_that_never_answers_is_given_up(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.hang = True
    (config,) = fetched(hub, tmp_path, things=1)
    assert f"{hub.url} does not answer (nothing came within 5 s)" in config


def test_a_network_that_swallows_everything_is_given_up(hub: HubStandIn, tmp_path: Path) -> None:
    # An address of the block that is kept for documentation: no route leads there, or one without an end.
    (config,) = fetched(hub, tmp_path, things=1, HF_ENDPOINT="http://192.0.2.1")
    assert "is not on this machine, and http://192.0.2.1 cannot be reached" in config


def test_what_was_fetched_is_used_without_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"x" * 50_000}
    hub.add_repo("acme/base", {**files, "train.jsonl": b"{}"})
    found = ["LlamaConfig", "ResolvedBase", "PosixPath"]
    assert fetched(hub, tmp_path) == found
    hub.stop()
    assert fetched(hub, tmp_path) == fetched(hub, tmp_path, SSL_CERT_FILE="/gone.pem") == found


def test_the_command_says_it_in_one_line_and_fails(hub: HubStandIn, tmp_path: Path) -> None:
    hub.stop()
    done = subprocess.run(
        [sys.executable, "-m", "onebase.cli", "estimate", "--base", "acme/base", "--json"],
        env={**os.environ, **hub.environment(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("onebase: the config of 'acme/base' is not on this machine")
