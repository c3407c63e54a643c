"""`onebase serve` as a user starts it: a small base, two adapters on it, and a Hub on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.hub_standin import HubStandIn
from tests.training.runs import talking_base
from transformers import AutoModelForCausalLM

from onebase import APIConnectionError, Client

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@dataclass(frozen=True)
class Server:
    """Where it is, the Hub that it pulls from (repositories of `acme` are permitted), and the folder with
    the adapters that it began with: orders and pirate."""

    url: str
    hub: HubStandIn
    adapters: Path = EXAMPLES


def small_base(folder: Path) -> Path:
    """With room for texts that do not end while a test looks away."""
    base = talking_base(folder / "smollm2-135m-instruct")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32_768}))
    return base


def make_adapter(base: Path, folder: Path, seed: int) -> None:
    """As PEFT saves it; random but far from the base."""
    torch.manual_seed(seed)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=attention, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


@contextmanager
def running_server(folder: Path, popen: type[subprocess.Popen[Any]]) -> Iterator[Server]:
    """Start the server, with its data in `folder`, and stop it; it must end well on SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    with warnings.catch_warnings(action="ignore"):
        base, adapters = small_base(folder), folder / "adapters"
        for seed, name in enumerate(("orders", "pirate")):
            make_adapter(base, adapters / name, seed)
    command = [sys.executable, "-m", "onebase.cli", "serve", "--port", str(port), "--kv-memory", "100MB"]
    command += ["--base", str(base), "--adapters-dir", str(adapters)]
    command += ["--data-dir", str(folder / "data"), "--hub-allow", "acme/*"]
    with HubStandIn() as hub, log.open("w") as out:
        made = Server(f"http://127.0.0.1:{port}", hub, adapters)
        process = popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | hub.environment(folder / "hf")
        )
        try:
            _wait_until_ready(made.url, process, log)
            yield made
            process.terminate()
            if process.wait(60) != 0:
                raise AssertionError(log.read_text())
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes requests and has proven the adapters that it began with."""
    with Client(url, max_retries=0) as client:
        for _ in range(3000):
            if process.poll() is not None:
                raise AssertionError(log.read_text())
            with contextlib.suppress(APIConnectionError):
                if client.ready().ok and [one.active for one in client.adapters.list()] == [True, True]:
                    return
            time.sleep(0.1)
    raise TimeoutError(f"the server never got ready:\n{log.read_text()}")
