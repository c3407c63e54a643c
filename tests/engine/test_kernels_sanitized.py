"""The kernels in C read and write only what is theirs, and do nothing that C leaves undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine import test_kernels, test_sampling

from onebase_engine.environment import KERNELS
from onebase_engine.kernels import cpu

SOURCES = KERNELS.parent
MASKS = (
    test_sampling.test_what_a_grammar_forbids_is_as_if_its_logit_were_not_there,
    test_sampling.test_a_row_whose_grammar_allows_nothing_gets_no_token_and_others_get_theirs,
)


def runtime(name: str) -> Path | None:
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    path = Path(subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip())
    return path if path.is_absolute() and path.exists() else None


@pytest.mark.full
def test_no_kernel_leaves_its_memory_or_the_rules_of_c(tmp_path: Path) -> None:
    runtimes = [runtime("libasan.so"), runtime("libubsan.so")]
    if shutil.which("cmake") is None or None in runtimes:
        pytest.skip("needs cmake, gcc and its sanitizers")
    sanitized = ["-DONEBASE_SANITIZE=address,undefined", "-DCMAKE_C_COMPILER=gcc"]
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        sanitized.append("-DKNOWS_mamx_bf16=OFF")  # compiled, they would not run
    subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path, *sanitized], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    environment = {
        "ONEBASE_EXAMPLES": "few",
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, runtimes)),
        "ASAN_OPTIONS": "detect_leaks=0",
        cpu.OTHER_LIBRARY: str(tmp_path / KERNELS.name),
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test_kernels.__file__]
    tests += ["-k", "not (the_order_in_which_pytorch_sums and 4096)"]  # a minute, most of it PyTorch's
    tests += [f"{test_sampling.__file__}::{one.__name__}" for one in MASKS]
    result = subprocess.run(tests, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
