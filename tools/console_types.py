#!/usr/bin/env python3
"""Writes clients/web/src/api/schema.d.ts, the console's types, from the server's OpenAPI file.

The file comes from the app, put together here without a server. With --check it only says whether the types
are current, by its exit status. Needs what `npm ci` installs in clients/web.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from onebase_edge.settings import Settings
from onebase_server.http.app import create_app
from onebase_server.http.deps import Services

WEB = Path(__file__).resolve().parents[1] / "clients/web"
TARGET = WEB / "src/api/schema.d.ts"
COMMAND = ("node", "node_modules/openapi-typescript/bin/cli.js")
HEADER = "// Generated from the server's OpenAPI file by tools/console_types.py; do not edit.\n"


def types() -> str:
    """Return the types, as TypeScript."""
    logging.getLogger("onebase_server").setLevel(logging.ERROR)
    api = create_app(cast(Services, SimpleNamespace(settings=Settings()))).openapi()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "openapi.json", Path(folder) / "schema.d.ts"
        source.write_text(json.dumps(api))
        node = Path(sys.executable).with_name(COMMAND[0])
        command = [
            str(node) if node.exists() else COMMAND[0],
            *COMMAND[1:],
            str(source),
            "--output",
            str(made),
        ]
        done = subprocess.run(command, cwd=WEB, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"openapi-typescript failed: {done.stdout}{done.stderr}")
        return HEADER + made.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing: say whether they are current")
    check = parser.parse_args().check
    made = types()
    if TARGET.exists() and TARGET.read_text() == made:
        return 0
    if check:
        print(
            f"{TARGET} is not what the server's OpenAPI file says: run tools/console_types.py",
            file=sys.stderr,
        )
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
