"""The parts of the GPU check about what is compiled and how sums come out to the last bit.

`python -m bench.gpu_forms NAME FILE SETUP` is a part. `python -m bench.gpu_forms absent CAPABILITY COUNT
FOLDER` compiles the first forms for a GPU that is not there, and prints them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from bench import random_base as bases
from bench.gpu_kernels import exact_weight
from bench.gpu_parts import BLOCK, make_kernels, new_base, own_kernels
from bench.gpu_report import (
    Findings,
    NotHereError,
    Setup,
    find_sanitizer,
    run_part,
    sanitizer_command,
    sanitizer_findings,
)
from bench.processes import tail
from onebase_engine.base.layers import adaptable_layers
from onebase_engine.engine import forms as served_forms
from onebase_engine.engine import fusion
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]
LIMITS = SchedulerLimits(64, 2048, 8192)
KEY = 1000
"""Characters of the types and constants of a form that are kept."""
FIELDS = (
    "registers",
    "spilled",
    "shared",
    "warps",
    "stages",
    "kWidth",
    "MMA",
    "barriers",
    "local",
    "seconds",
    "cached",
)


# ---- forms ---------------------------------------------------------------------------------------


def forms(setup: Setup, found: Findings) -> None:
    """Compile all forms that a server of this shape asks for, side by side, into Triton's cache."""
    found.stage("compiling")
    listed = _of_an_absent_device(setup) if setup.interpreted else _compiled(setup, found)
    (setup.folder / "forms.json").write_text(json.dumps(listed, indent=1))
    add = found.table("Forms of kernels", ("kernel", *FIELDS))
    for one in listed:
        add(one["kernel"], *(one[field] for field in FIELDS))
    found.check("there are forms of the products", any(one["kernel"] == "_products" for one in listed))
    spilled = [
        f"{one['kernel']} {one['key']}"
        for one in listed
        if isinstance(one["spilled"], int) and one["spilled"]
    ]
    found.check("no form spills registers", not spilled, "; ".join(spilled)[:300])


def _compiled(setup: Setup, found: Findings) -> list[dict[str, Any]]:
    base = new_base(setup)
    began = time.perf_counter()
    model = ServedModel(base, 4, step_tokens=LIMITS.step_tokens)
    model.allocate_kv(RESERVED_BLOCKS + 8, BLOCK)
    found.figure("making the model, with its trials", time.perf_counter() - began, "s")
    found.figure("kernels", model.kernels.name)
    wanted = served_forms.wanted_forms(model, adaptable_layers(base), LIMITS, BLOCK)
    began = time.perf_counter()
    listed = compile_all(wanted, model.device, os.cpu_count() or 1)
    found.figure("compiling the other forms", time.perf_counter() - began, "s")
    found.figure("forms", len(listed))
    known = {(one["kernel"], one["key"]) for one in listed}
    for name, key, kernel in compiled_before():
        if (name, key[:KEY]) not in known:
            listed.append(described(name, key, kernel, None))
    found.figure("forms, with those of trials", len(listed))
    return listed


def compile_all(wanted: Iterable[cuda.Form], device: torch.device, threads: int) -> list[dict[str, Any]]:
    """Compile forms in threads; describe each, with its seconds and whether Triton's cache had it."""
    here = threading.local()

    def note(*, cache_hit: bool, **more: Any) -> None:
        here.cached = cache_hit  # in the thread that compiles

    def compiled(form: cuda.Form) -> dict[str, Any]:
        began, here.cached = time.perf_counter(), None
        kernel = form.compiled()
        return described(form.name, form.key, kernel, time.perf_counter() - began, cached=here.cached)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(compiled, wanted))
    finally:
        triton.knobs.compilation.listener = before


def compiled_before() -> Iterable[tuple[str, str, Any]]:
    """Yield name, key and compiled kernel of all forms that this process has."""
    for value in vars(cuda).values():
        for caches in getattr(value, "device_caches", {}).values():
            for key, kernel in caches[0].items():
                yield getattr(value, "__name__", "kernel"), str(key), kernel


def described(
    name: str, key: str, kernel: Any, seconds: float | None, *, cached: bool | None = None
) -> dict[str, Any]:
    """Return what decides a form's speed. Registers are known once a device has loaded it."""
    if torch.cuda.is_available():
        kernel._init_handles()
    layouts, code, facts = kernel.asm.get("ttgir", ""), kernel.asm.get("ptx", ""), kernel.metadata
    return {
        "kernel": name,
        "key": key[:KEY],
        "registers": getattr(kernel, "n_regs", None),
        "spilled": getattr(kernel, "n_spills", None),
        "shared": facts.shared,
        "warps": facts.num_warps,
        "stages": facts.num_stages,
        "kWidth": " ".join(sorted(set(re.findall(r"kWidth = (\d+)", layouts)))),
        "MMA": " ".join(sorted(set(re.findall(r"versionMajor = (\d+)", layouts)))),
        "barriers": len(re.findall(r"\bbar\.sync|barrier\.", code)),
        "local": len(re.findall(r"\b(?:ld|st)\.local", code)),
        "seconds": seconds,
        "cached": {None: "", True: "yes", False: "no"}[cached],
    }


def _of_an_absent_device(setup: Setup) -> list[dict[str, Any]]:
    """Compile some forms in another process, since this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_forms", "absent", "90", "2", str(setup.folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    listed: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return listed


def absent(capability: int, count: int, folder: Path) -> None:
    """Print the forms of a base for a GPU that is not there, of which `count` are compiled."""
    from tests.engine.triton_device import stand_in

    stand_in(capability)
    # Nothing is computed, so that whatever trials compare differs.
    patched: Any = (cuda, fusion._Trial)
    patched[0].norm_of = lambda module: (module.weight, 1e-5, False)
    patched[1].passes = lambda self, switches, *more, **named: [on() for on, _ in switches] or True
    with cuda.collecting():
        base = bases.random_base(bases.write_folder("tiny", folder / "base").folder, torch.device("cpu"))
        model = ServedModel(base, 4, kernels=cuda.CudaKernels(cuda.usual_switches()))
        model.allocate_kv(RESERVED_BLOCKS + 8, BLOCK)
    wanted = served_forms.wanted_forms(model, adaptable_layers(base), LIMITS, BLOCK)
    print(f"{len(wanted)} forms: {dict(Counter(one.name for one in wanted))}", file=sys.stderr)
    print(json.dumps(compile_all(wanted[:count], model.device, 2)))


# ---- bits ----------------------------------------------------------------------------------------


@torch.inference_mode()
def bits(setup: Setup, found: Findings) -> None:
    """Compare fp32 sums to the last bit: of each form with those of 16 rows, and of cuBLAS with ours."""
    # One sum is one accumulator there too, if its terms are not split.
    os.environ |= cuda.WHOLE_SUMS
    own: Any = own_kernels(setup, found)
    draw = torch.Generator(setup.device).manual_seed(0)
    shape = bases.SHAPES[setup.shape]
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    counts = (
        (1, 17, 65) if setup.interpreted else (1, 16, 17, 64, 65, 128, 129, 256, 257, 511, 512, 1024, 2048)
    )
    add = found.table(
        "fp32 sums with other bits than in steps of 16 rows",
        (
            "layer",
            "rows",
            "ours",
            "of",
            "cuBLAS",
            "by ulps",
            "first at",
            f"cuBLAS by {cuda.LIBRARY_ROWS} rows",
        ),
    )
    layers: dict[str, Any] = {
        "o": bases.one_layer(hidden, shape["num_attention_heads"] * shape["head_dim"], draw),
        "gate": bases.one_layer(hidden, wide, draw),
        "down": bases.one_layer(wide, hidden, draw),
    }
    usual: cuda.Switches = own.switches
    turned = {name: replace(usual, **{name: not getattr(usual, name)}) for name in ("permuted", "wide")}
    add_other = found.table(
        "fp32 sums with other bits than in steps of 16 rows, by other forms",
        ("layer", "rows", "a program's rows", *(f"{name} turned" for name in turned), "weights in bf16"),
    )
    for name, layer in layers.items():
        linear, weight = own.linear(layer, 1), exact_weight(layer)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        made: list[Any] = [make_kernels(setup, switches) for switches in turned.values()]
        others = [*(kernels.linear(layer, 1) for kernels in made), own.linear(plain, 1)]
        for one in (linear, *others):
            one.use_library(False)  # which the kernel's sums are compared with
        x = torch.randn(max(counts), layer.in_features, device=setup.device, generator=draw).to(
            torch.bfloat16
        )
        few = torch.cat([linear.sums(some) for some in torch.split(x, 16)])
        wrong = list[str]()
        chunked = _by_chunks(x, weight)
        for rows in counts:
            ours, theirs = linear.sums(x[:rows]), _multiplied(x[:rows], weight)
            count, largest, first = difference(ours, few[:rows])
            other, ulps, place = difference(theirs, few[:rows])
            size = next(size for size in cuda.STAGES if size >= min(rows, cuda.MOST_ROWS))
            if count:
                rounded = int((ours.bfloat16() != few[:rows].bfloat16()).sum())
                said = f"{count}, {rounded} of them in bf16, by {largest} ulps, the first at {first}"
                wrong.append(f"{rows} rows, {size} a program: {said}")
            add_other(name, rows, size, *(difference(one.sums(x[:rows]), few[:rows])[0] for one in others))
            add(
                name, rows, count, ours.numel(), other, ulps, place, difference(chunked[:rows], few[:rows])[0]
            )
        found.check(
            f"{name}: sums have the same bits in steps of any size", not wrong, "; ".join(wrong)[:400]
        )


def _multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T in fp32, by the device's library."""
    if x.device.type == "cuda":
        multiply: Callable[..., torch.Tensor] = torch.mm
        return multiply(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _by_chunks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T in fp32 as an engine has the library compute it.

    That is LIBRARY_ROWS rows at a time, padded, into columns of a wider tensor.
    """
    count, size = len(x), len(weight)
    x = functional.pad(x, (0, 0, 0, -count % cuda.LIBRARY_ROWS))
    sums = torch.empty(len(x), -(-size // cuda.WIDE) * cuda.WIDE, device=x.device)[:, :size]
    for first in range(0, len(x), cuda.LIBRARY_ROWS):
        rows = slice(first, first + cuda.LIBRARY_ROWS)
        if x.device.type == "cuda":
            cuda.library_product(x[rows], weight, sums[rows])
        else:
            sums[rows] = _multiplied(x[rows], weight)
    return sums[:count]


def difference(got: torch.Tensor, wanted: torch.Tensor) -> tuple[int, int, str]:
    """Return how many fp32 numbers have other bits, by how many ulps at most, and the first's row and
    column."""
    wrong = got.view(torch.int32) != wanted.view(torch.int32)
    count = int(wrong.sum())
    if not count:
        return 0, 0, ""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous().view(torch.int32).long()
        return torch.where(whole < 0, -(whole & 0x7FFFFFFF), whole)

    row, column = (int(one[0]) for one in wrong.nonzero(as_tuple=True))
    return count, int((ordered(got) - ordered(wanted)).abs().max()), f"{row}, {column}"


# ---- out of bounds -------------------------------------------------------------------------------


def sanitizer(setup: Setup, found: Findings) -> None:
    """Run some steps of a tiny base under compute-sanitizer, which sees accesses out of bounds."""
    if setup.device == "cpu":
        raise NotHereError("compute-sanitizer is for a GPU")
    program = find_sanitizer()
    if program is None:
        raise NotHereError("there is no compute-sanitizer here")
    command, variables = sanitizer_command(program)
    told = json.dumps({"device": setup.device, "shape": "tiny", "folder": str(setup.folder)})
    step = sys.executable, "-m", "bench.gpu_parts", "step", str(setup.folder / "step.json"), told
    log = setup.folder / "sanitizer.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, *step], stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables
        )
    said = "; ".join(sanitizer_findings(log)) or tail(log, 12)[-600:]
    found.check("steps read and write within bounds", done.returncode == 0, said)


PARTS = {"forms": forms, "bits": bits, "sanitizer": sanitizer}

if __name__ == "__main__":
    if sys.argv[1] == "absent":
        absent(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        sys.exit(0)
    sys.exit(run_part(PARTS, sys.argv[1:]))
