"""`python -m onebase_server.processes.verifier --fd N [--base-fd M]`: started by the api, never by hand."""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import socket
import sys
import tempfile
import warnings

import transformers

from onebase_server.processes.scratch import make_scratch
from onebase_server.processes.verifier_process import run, step_aside


def main() -> int:
    parser = argparse.ArgumentParser(description="OneBase verifier process; the api starts it.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the api")
    parser.add_argument("--base-fd", type=int, help="file descriptor of the memory that holds the base")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s verifier %(message)s", stream=sys.stderr)
    # Advice for people who call the libraries themselves; here nobody could follow it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    # Ctrl-C in a terminal reaches every process; the api decides when the verifier ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step_aside()
    scratch = make_scratch()
    # All temporary files of this process, so that the api finds them when it had to be killed.
    tempfile.tempdir = str(scratch)
    try:
        return run(socket.socket(fileno=arguments.fd), arguments.base_fd, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
