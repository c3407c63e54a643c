"""System calls that are refused to a stranger's code have the kernel's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onebase_adapters.hub import confinement

INCLUDE = Path("/usr/include")
HEADERS = {
    "x86_64": INCLUDE / "x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": INCLUDE / "asm-generic/unistd.h",  # arm64 takes all of its calls from the generic table
}


@pytest.mark.parametrize("machine", HEADERS)
def test_refused_calls_have_the_numbers_of_the_kernels_headers(machine: str) -> None:
    header = HEADERS[machine]
    if not header.exists():
        pytest.skip("no kernel headers are installed (apt-get install linux-libc-dev)")
    known = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text())
    }
    aliases = re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", header.read_text())
    known |= {alias: known[name] for alias, name in aliases if name in known}
    column = list(confinement._MACHINES).index(machine)
    # Calls that are newer than the headers are not in them.
    newest = max(known.values())
    table = {name: numbers[column] for name, numbers in confinement._CALLS.items()}
    wrong = {
        name: (number, known.get(name))
        for name, number in table.items()
        if number != known.get(name) and (number is None or number <= newest)
    }
    assert wrong == {}
