"""An object store for tests: moto's, which answers as S3 does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from moto.server import ThreadedMotoServer


@contextmanager
def object_store() -> Iterator[str]:
    """Run an object store without buckets, and yield its address.

    moto keeps buckets by process: what tests before have left there is forgotten.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        httpx2.post(f"{url}/moto-api/reset", timeout=120).raise_for_status()
        yield url
    finally:
        server.stop()
