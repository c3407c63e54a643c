"""A process that publishes or attaches a base and tells what that took: `attach_process.py WHAT FOLDER ...`.

Figures come as one JSON line on stdout, in bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from onebase_engine.base.attach import attach, publish
from onebase_engine.base.load import BaseSettings, base_bytes, base_tensors, load_base

TOKENS = torch.arange(3, 40)[None]
COMPILER = "torch._inductor.compile_fx"
"""Comes with torch.compile, and takes a second to import."""


def memory() -> dict[str, int]:
    """Of this process: `RssAnon` and `RssShmem` of its status, `Private_Dirty` of its mappings."""
    lines = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    found = {}
    for line in lines.splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "Private_Dirty"):
            found[name] = int(value.split()[0]) * 1024
    return found


@torch.inference_mode()
def checksum(base: torch.nn.Module) -> str:
    logits: torch.Tensor = base(TOKENS).logits
    return logits.double().sum().item().hex()


def publisher(folder: str) -> None:
    """Load, publish, let a second process attach and write, and look whether anything is seen of that."""
    warm = load_base(BaseSettings(Path(folder), quantization="nf4"))
    checksum(warm)
    del warm
    before = memory()
    base = load_base(BaseSettings(Path(folder), quantization="nf4"))
    loaded = checksum(base)
    fd = os.memfd_create("base")
    manifest = publish(base, fd)
    after = memory()
    published = checksum(base)
    values = {name: tensor.clone() for name, tensor in base_tensors(base).items()}
    child = subprocess.run(
        [sys.executable, __file__, "attacher", folder, str(fd), manifest.hex()],
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        check=True,
    )
    tensors = base_tensors(base)
    report = {
        "base_bytes": base_bytes(base),
        "grown": {name: after[name] - before[name] for name in after},
        "checksums": [loaded, published, checksum(base)],
        "unchanged": all(torch.equal(value, tensors[name]) for name, value in values.items()),
        "compiler": COMPILER in sys.modules,
        "child": json.loads(child.stdout),
    }
    print(json.dumps(report))


def attacher(folder: str, fd: str, manifest: str) -> None:
    settings = BaseSettings(Path(folder), quantization="nf4")
    attach(settings, bytes.fromhex(manifest), int(fd))  # what is imported and built once
    before = memory()
    base = attach(settings, bytes.fromhex(manifest), int(fd))
    attached = memory()
    first = checksum(base)
    used = memory()
    with torch.no_grad():
        for tensor in base_tensors(base).values():
            tensor.zero_()
    report = {
        "attaching": {name: attached[name] - before[name] for name in before},
        "forward": {name: used[name] - before[name] for name in before},
        "checksums": [first, checksum(base)],
        "compiler": COMPILER in sys.modules,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"publisher": publisher, "attacher": attacher}[sys.argv[1]](*sys.argv[2:])
