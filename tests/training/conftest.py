"""One tiny base for the tests of training, and one thread, so that sums have one order."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import talking_base, tiny_base

from onebase_engine.base.load import BaseSettings
from onebase_training import estimate, run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_read_once() -> Iterator[None]:
    """Jobs on a folder that is as it was share its tokenizer, which takes a tenth of a second to read."""
    whole = run.load_tokenizer

    @functools.lru_cache(maxsize=8)
    def read(base: BaseSettings, files: tuple[tuple[str, int], ...]) -> Any:
        return whole(base)

    def load(base: BaseSettings) -> Any:
        files = sorted((file.name, file.stat().st_mtime_ns) for file in Path(base.folder).iterdir())
        return read(base, tuple(files))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_tokenizer", load)
        yield


@pytest.fixture(scope="session", autouse=True)
def _machine_measured_briefly() -> Iterator[None]:
    """Each run measures the machine in three passes, not for a third of a second: no test looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "_PROBE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training-base")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> torch.nn.Module:
    """NF4, bfloat16. No test may write to it."""
    return tiny_base(base_folder)


@pytest.fixture(scope="session")
def exact_base(base_folder: Path, base: torch.nn.Module) -> torch.nn.Module:
    """NF4 in fp32: sums in another order differ in the last digits only."""
    return tiny_base(base_folder, dtype=torch.float32, compute_dtype=torch.float32)


@pytest.fixture(scope="session")
def talking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base with a real tokenizer."""
    return talking_base(tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def quick_collections() -> None:
    """Keep what is there already out of the garbage collections of tests that collect at each step."""
    gc.collect()
    gc.freeze()
