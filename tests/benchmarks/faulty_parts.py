"""Parts of a GPU check that end in every way: run as `bench.gpu_parts` is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from bench.gpu_report import Findings, NotHereError, Setup, run_part


def good(setup: Setup, found: Findings) -> None:
    found.figure("steps", 3, "s")
    found.check("it holds", True)
    found.table("Products", ("rows", "ours"))(1, 2.5)


def raises(setup: Setup, found: Findings) -> None:
    found.figure("before", 1)
    raise ValueError("a | kernel is wrong")


def tried(setup: Setup, found: Findings) -> None:
    found.launches.names.append("_products")
    found.trying("a product", raises, setup, found)
    found.check("the others are done", True)


def hangs(setup: Setup, found: Findings) -> None:
    found.check("before it hung", True)
    found.stage("a long sleep")
    begun = subprocess.Popen(["sleep", "600"], start_new_session=True)
    found.figure("left behind", begun.pid)
    time.sleep(600)


def dies(setup: Setup, found: Findings) -> None:
    found.figure("before", 1)
    os.kill(os.getpid(), signal.SIGSEGV)


def wrong(setup: Setup, found: Findings) -> None:
    found.check("a row's bits", False, "2 of 3 rows differ")


def unchecked(setup: Setup, found: Findings) -> None:
    found.figure("steps", 3, "s")


def nothing(setup: Setup, found: Findings) -> None:
    raise NotHereError("there is no such thing here")


if __name__ == "__main__":
    sys.exit(
        run_part(
            {f.__name__: f for f in (good, raises, tried, hangs, dies, wrong, unchecked, nothing)},
            sys.argv[1:],
        )
    )
