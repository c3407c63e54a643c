"""`python -m onebase_server.processes KIND --fd N ...`: an engine, a verifier or a trainer, for the api."""

import importlib
import sys

from onebase_engine.imports import quick_imports
from onebase_engine.machine import with_room

if __name__ == "__main__":
    with quick_imports():
        process = importlib.import_module(f"{__package__}.{sys.argv.pop(1)}")
    sys.exit(with_room(process.main))
