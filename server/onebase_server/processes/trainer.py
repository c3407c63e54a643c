"""`python -m onebase_server.trainer --fd N [--base-fd M] [--busy-fd K]`: the api starts it, nobody else."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import warnings

import transformers

from onebase_engine.machine import keep_freed_memory
from onebase_server.processes.trainer_limits import step_aside
from onebase_server.processes.trainer_process import run


def main() -> int:
    parser = argparse.ArgumentParser(description="OneBase trainer process; the api starts it.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the api")
    parser.add_argument("--base-fd", type=int, help="file descriptor of the memory that holds the base")
    parser.add_argument("--busy-fd", type=int, help="file descriptor of the byte that says whether rows run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s trainer %(message)s", stream=sys.stderr)
    # Advice for people who call the libraries themselves; here nobody could follow it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    # Ctrl-C in a terminal reaches every process; the api decides when a trainer ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step_aside()
    keep_freed_memory()
    return run(socket.socket(fileno=arguments.fd), arguments.base_fd, arguments.busy_fd)


if __name__ == "__main__":
    sys.exit(main())
