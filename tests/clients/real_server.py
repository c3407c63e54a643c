"""`onebase serve` as a user starts it: the real base, the example adapters, and a Hub on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hub_standin import HubStandIn

from onebase import APIConnectionError, Client

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@dataclass(frozen=True)
class Server:
    """Where it is, and the Hub that it pulls from: repositories of `acme` are permitted."""

    url: str
    hub: HubStandIn


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start the server, with its data in `folder`, and stop it; it must end well on SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [sys.executable, "-m", "onebase.cli", "serve", "--port", str(port), "--kv-memory", "400MB"]
    command += ["--adapters-dir", str(EXAMPLES), "--data-dir", str(folder / "data"), "--hub-allow", "acme/*"]
    with HubStandIn() as hub, log.open("w") as out:
        made = Server(f"http://127.0.0.1:{port}", hub)
        process = subprocess.Popen(
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
                if client.ready().ok and all(one.active for one in client.adapters.list()):
                    return
            time.sleep(0.1)
    raise TimeoutError(f"the server never got ready:\n{log.read_text()}")
