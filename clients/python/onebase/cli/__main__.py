"""`python -m onebase.cli` is `onebase`."""

from . import run_process

run_process()
