"""`python -m onebase_server.engine --fd N`: started by the api, never by hand."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import warnings

import transformers

from onebase_server.processes.engine_process import run


def main() -> int:
    parser = argparse.ArgumentParser(description="OneBase engine process; the api starts it.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the api")
    parser.add_argument("--base-fd", type=int, help="memfd to publish the base in, for verifiers")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine %(message)s", stream=sys.stderr)
    # Advice for people who call the libraries themselves; here nobody could follow it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    # Ctrl-C in a terminal reaches both processes; the api decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return run(socket.socket(fileno=arguments.fd), arguments.base_fd)


if __name__ == "__main__":
    sys.exit(main())
