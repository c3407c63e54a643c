"""`onebase serve` with a scripted engine, a scripted workshop and scripted trainers.

`python serve_scripted.py ENGINE[,WORKSHOP] [options of onebase serve]`: how each of them behaves.
"""

import sys
from pathlib import Path

from onebase_server.cli import serve
from onebase_server.startup import Commands


def command(script: str, *behaviour: str) -> tuple[str, ...]:
    return sys.executable, str(Path(__file__).with_name(script)), *behaviour


if __name__ == "__main__":
    engine, _, workshop = sys.argv[1].partition(",")
    commands = Commands(
        command("scripted_engine.py", engine),
        command("scripted_workshop.py", workshop or "proves"),
        command("scripted_trainer.py"),
    )
    sys.exit(serve(sys.argv[2:], commands))
