"""Whether a folder holds an adapter that can be sent, and what to do when it does not."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLE: Final = "adapter_model.bin"

_WANTED: Final = "an adapter is wanted, both files in one folder, as `PeftModel.save_pretrained` saves it."


@dataclass(frozen=True)
class AdapterFolder:
    """The two files of an adapter, as PEFT saves them."""

    config: Path
    weights: Path


def adapter_folder(path: str | Path) -> AdapterFolder:
    """The adapter in a folder.

    Raises:
        ValueError: there is none; the message says what is missing and what to do.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: give a folder that holds {CONFIG} and {WEIGHTS}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {' and '.join(missing)}{_remedy(folder, missing)}")
    return AdapterFolder(folder / CONFIG, folder / WEIGHTS)


def _remedy(folder: Path, missing: list[str]) -> str:
    if WEIGHTS in missing and (folder / PICKLE).is_file():
        return f", it only has {PICKLE}.\n{_conversion(folder)}"
    found = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]
    inside = sorted(str(one.parent.relative_to(folder)) for one in found)
    if inside:
        return f". Did you mean a folder in it? {', '.join(inside[:5])}"
    if any(folder.glob("model*.safetensors")):
        return f".\nIt holds a whole model; {_WANTED}"
    return f".\nHere {_WANTED}"


def _conversion(folder: Path) -> str:
    old, new = str(folder / PICKLE), str(folder / WEIGHTS)
    program = (
        f"import torch, safetensors.torch as s; s.save_file(torch.load({old!r}, weights_only=True), {new!r})"
    )
    return (
        "OneBase opens no pickle files, since they can run code. Convert it once, where torch is installed:\n"
        f"  python -c {shlex.quote(program)}"
    )
