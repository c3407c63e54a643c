"""`onebase serve` with a scripted engine: `python serve_scripted.py BEHAVIOUR [options of onebase serve]`."""

import sys
from pathlib import Path

from onebase_server.cli import serve

if __name__ == "__main__":
    engine = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")), sys.argv[1])
    sys.exit(serve(sys.argv[2:], engine_command=engine))
