"""`onebase serve` with a scripted engine, a scripted verifier and scripted trainers.

`python serve_scripted.py ENGINE[,WORKSHOP[,real]] [options of onebase serve]`: how each of them behaves; with
`real` trainers are real ones, which check files without a base. A trainer that died is followed
at once by the next.
"""

import os
import sys
from pathlib import Path

from onebase_server.background import Backoff
from onebase_server.cli import serve
from onebase_server.jobs.state import Death
from onebase_server.processes.supervisor import RestartPolicy
from onebase_server.processes.trainer_client import TRAINER_COMMAND
from onebase_server.wiring import Commands


def command(script: str, *behaviour: str) -> tuple[str, ...]:
    pace = os.environ.get("ONEBASE_TEST_PACE")  # an engine would not inherit it
    given = ("/usr/bin/env", f"ONEBASE_TEST_PACE={pace}") if pace else ()
    return *given, sys.executable, str(Path(__file__).with_name(script)), *behaviour


if __name__ == "__main__":
    engine, verifier, trainer = (*sys.argv[1].split(","), "", "")[:3]
    commands = Commands(
        command("scripted_engine.py", engine),
        command("scripted_verifier.py", verifier or "proves"),
        TRAINER_COMMAND if trainer == "real" else command("scripted_trainer.py"),
        RestartPolicy(backoff=Backoff(0.02, 30.0)) if engine == "die-ready" else RestartPolicy(),
    )
    Death.pause = property(lambda death: 0.0)  # type: ignore[assignment, method-assign]
    sys.exit(serve(sys.argv[2:], commands))
