"""`python -m onebase_server.processes KIND --fd N ...`: an engine, a verifier or a trainer, for the api."""

import importlib
import logging
import os
import sys

from onebase_engine.imports import quick_imports
from onebase_engine.machine import with_room

if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # Ctrl-C in the terminal reaches the api alone, which drains first
    with quick_imports():
        process = importlib.import_module(f"{__package__}.{sys.argv.pop(1)}")
    status = with_room(process.main)
    # Python's own end takes half a second, and Triton's bindings write a page about what they left allocated.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
