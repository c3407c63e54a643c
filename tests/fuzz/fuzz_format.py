"""Coverage-guided fuzzing of the adapter format with atheris; not part of the test suite.

    pip install atheris
    PYTHONPATH=adapters:engine:. python tests/fuzz/fuzz_format.py -max_total_time=600 -rss_limit_mb=1024 \\
        -timeout=1 CORPUS

CORPUS is a folder for the inputs that it finds; it is seeded with valid adapters. An input is the length of
the config in two bytes, the config, and the weights file. Anything but an `AdapterFormatError`, more than a
second, or more memory than the limit ends the run, and leaves the input in a file in the current folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["onebase_adapters", "onebase_engine"]):
    from onebase_adapters.format import canonical as adapter_format

from tests.adapters.format_support import BASE, CONFIG, LAYERS, WEIGHTS, write
from tests.adapters.test_format_fuzz import VALID, check_canonical


def packed(config: bytes, weights: bytes) -> bytes:
    return len(config).to_bytes(2, "little") + config + weights


def seed(corpus: Path) -> None:
    """Write a valid adapter of each kind into the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, (fields, tensors) in VALID.items():
            write(Path(folder), tensors, **fields)
            files = ((Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS))
            (corpus / f"seed-{kind}").write_bytes(packed(*files))


def once(data: bytes) -> None:
    """Read one input as an adapter."""
    size = int.from_bytes(data[:2], "little")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as target:
        config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        config.write_bytes(data[2 : 2 + size])
        weights.write_bytes(data[2 + size :])
        try:
            spec = adapter_format.canonicalize(
                config, weights, LAYERS, 64, Path(target), base_tensor=BASE.get
            )
        except adapter_format.AdapterFormatError as error:
            str(error).encode()
            return
        check_canonical(spec, Path(target))


if __name__ == "__main__":
    for place in (Path(word) for word in sys.argv[1:] if not word.startswith("-")):
        place.mkdir(exist_ok=True)
        seed(place)
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
