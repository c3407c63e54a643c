"""Run as a program: compiles Triton's kernels for a GPU that need not be there, at the sizes of an 8B model.

    python triton_compiled.py CAPABILITY

Prints, by kernel, what of memory and of the tensor cores its code uses, as JSON.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onebase_engine.kernels import cuda
from onebase_engine.kernels import cuda_training as training

POINTERS = {
    "*bf16": "x onto plain q k v keys values key_scales value_scales cosines sines out gradient "
    "gate up y y_1 y_2 y_3 bias kept beta b c",
    "*fp32": "top_p min_p log_sums upstream sums absmax code hidden weight_of part stats decay states dt a "
    "skip sinks",
    "*fp64": "uniform",
    "*i64": "tokens layers targets chosen order bounds owners ends",
    "*i32": "row_of slot_of starts write tiles position table run_of read",
}
"""Of all kernels' arguments, by type; `weight` is bytes for `_unpack` and bf16 for norms."""
FLOATS = ("factor", "eps", "scaling", "softcap", "scale")
UNALIGNED = (
    # Index arrays, which begin anywhere.
    "row_of",
    "slot_of",
    "weight_of",
    "starts",
    "write",
    "tiles",
    "position",
    "table",
    "rows",
    "first_tile",
    "first_row",
    "second",
    "third",
    "pieces",
    "hidden_parts",
    "terms",
    "count",
    "shift",
    "table_width",
    "window",
    "chunk",
    "most_rank",
    "heads",
    "each",
    "shared",
    "vocabulary",
    "weights",
    "top_p",
    "min_p",
    "uniform",
    "tokens",
    "chosen",
    "order",
    "bounds",
    "owners",
    "ends",
    "beta_row",
    "decay_row",
    "dt_row",
)
"""Numbers that are no multiple of 16; where others are, the launch finds that out."""
SIZED, ATTRIBUTES = 4, {0x2F: "registers", 0x11: "stack"}
"""Form of an attribute whose value follows, and attributes (EIATTR_REGCOUNT and EIATTR_FRAME_SIZE)."""
SIZES = {"KEY_SIZE": 128, "VALUE_SIZE": 128}
HEADS = (64, 128, 256, 512)
"""Sizes of heads."""
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    *((cuda._products, {"NF4": nf4, "ROWS": rows, "SIZE": 64}) for nf4 in (1, 2, 0) for rows in cuda.STAGES),
    (cuda._products, {"NF4": 0, "ROWS": 128, "SIZE": cuda.WIDE}),
    *(
        (cuda._expert_products, {"NF4": nf4, "ROWS": rows, "SIZE": 64})
        for nf4, rows in [(1, 16), (1, 64), (1, 128), (0, 128)]
    ),
    (cuda._expert_shrink, {}),
    *((cuda._expert_finish, {"QUANTIZED": quantized}) for quantized in (True, False)),
    *((cuda._unpack, {"NF4": way}) for way in (1, 2)),
    (cuda._shrink, {}),
    *((cuda._finish, {"QUANTIZED": True, "GATED": gated, "ONTO": not gated}) for gated in (False, True)),
    *(
        (cuda._finish_bare, {"ROWS": cuda.FEW_ROWS, "GATED": gated, "ONTO": not gated})
        for gated in (False, True)
    ),
    *((cuda._write, {**SIZES, "TURN": True, "EIGHT": eight}) for eight in (False, True)),
    *(
        (
            cuda._attend,
            {
                **SIZES,
                "BLOCK": 16,
                "KEYS": 64,
                "GROUPS": 4,
                "PADDED": 4,
                "TURN": True,
                "EIGHT": eight,
                "WHOLE": whole,
                "SINKS": sinks,
            },
        )
        for eight, whole, sinks in [
            (False, False, False),
            (False, True, False),
            (False, True, True),
            (True, False, False),
            (True, True, False),
        ]
    ),
    *(
        (
            cuda._attend,
            {
                "KEY_SIZE": size,
                "VALUE_SIZE": size,
                "BLOCK": 16,
                "KEYS": next(tile["KEYS"] for most, tile in cuda.ATTENTION if size <= most),
                "GROUPS": 2,
                "PADDED": 2,
                "TURN": True,
                "EIGHT": eight,
                "WHOLE": False,
                "SINKS": False,
            },
        )
        for size in HEADS
        if size != 128
        for eight in (False, True)
    ),
    *((cuda._merge, {"VALUE_SIZE": 128, "SINKS": sinks}) for sinks in (False, True)),
    (cuda._sum_bytes, {"SIZE": 1024}),
    (cuda._take_sample, {"SIZE": cuda.SAMPLED}),
    (cuda._convolve, {"TAPS": 4, "BIAS": True, "SIZE": cuda.CHANNELS}),
    *(
        (cuda._delta, {"KEYS": 128, "SIZE": cuda.VALUES, "BY_KEY": by_key, "NORMALIZED": True})
        for by_key in (False, True)
    ),
    *(
        (cuda._scan, {"LINES": cuda.NUMBERS // size, "SIZE": size, "BY_SIZE": size == 16, "SKIP": True})
        for size in (16, 128, 256)
    ),
    *((kernel, {"SIZE": 4096}) for kernel in (training._log_sum, training._log_gradient)),
    *(
        (kernel, {"SIZE": training._NUMBERS})
        for kernel in (training._gate, training._gate_gradient, training._split)
    ),
    *((training._turn, {"BACK": back, "HEADS": training._HEADS, "SIZE": 64}) for back in (False, True)),
    *(
        (norm, {"SIZE": 4096, "AROUND_ONE": around})
        for norm in (cuda._norm, training._norm_gradient)
        for around in (False, True)
    ),
]


def type_of(kernel: Any, name: str, constants: dict[str, Any]) -> str:
    if kernel in (training._log_sum, cuda._scan) and name == "y":
        return "*fp32"
    if kernel is training._split and name == "x":
        return "*fp32"
    if kernel is cuda._sum_bytes:
        return "*i64"
    if kernel is cuda._take_sample and name == "weights":
        return "*fp32"
    if name == "weight":
        return "*u8" if kernel is cuda._unpack else "*bf16"
    if name in ("keys", "values") and constants["EIGHT"]:
        return "*i8"
    known = [kind for kind, names in POINTERS.items() if name in names.split()]
    return known[0] if known else "fp32" if name in FLOATS else "i32"


def used(kernel: Any, constants: dict[str, Any], capability: int) -> Counter[str]:
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else type_of(kernel, name, constants) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if name not in (*constants, *UNALIGNED, *FLOATS)
        },
    )
    target = GPUTarget("cuda", capability, 32)
    warps = 8 if constants.get("SIZE") == cuda.WIDE else 4
    warps = cuda.SAMPLING_WARPS if kernel is cuda._take_sample else warps
    options = {"enable_fp_fusion": False, "num_warps": warps}
    if kernel is cuda._attend:
        size = constants["KEY_SIZE"]
        tile = dict(next(options for most, options in cuda.ATTENTION if size <= most))
        options |= {name: value for name, value in tile.items() if name != "KEYS"}
    if kernel in (cuda._products, cuda._expert_products):
        options["num_stages"] = cuda.STAGES[constants["ROWS"]]
    compiled = triton.compile(source, target=target, options=options)
    code = compiled.asm["ptx"]
    found = re.findall(r"\b(?:ld\.global|cp\.async|wgmma\.mma_async|mma\.sync)[.\w:]*|\bfma\.rn\.f32", code)
    found += re.findall(r"kWidth = \d+", compiled.asm["ttgir"])
    binary = compiled.asm["cubin"]
    return Counter(
        {
            "shared": compiled.metadata.shared,
            "cubin": len(binary),
            "threads": 32 * compiled.metadata.num_warps,
            **resources(binary),
            **Counter(found),
        }
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers and the bytes of stack of a thread, by the section `.nv.info` of an ELF file.

    Registers that are spilled lie on the stack, on which these kernels have nothing else.
    """
    (sections,), (size, count, names) = (
        struct.unpack_from("<Q", cubin, 40),
        struct.unpack_from("<3H", cubin, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + number * size) for number in range(count)]
    texts = headers[names][4]
    found: dict[str, int] = {}
    for name, _, _, _, start, length in headers:
        if cubin[texts + name :].startswith(b".nv.info\0"):
            place = start
            while place < start + length:
                form, attribute, value = struct.unpack_from("<BBH", cubin, place)
                if form == SIZED and attribute in ATTRIBUTES:
                    found[ATTRIBUTES[attribute]] = struct.unpack_from("<II", cubin, place + 4)[1]
                place += 4 + (value if form == SIZED else 0)
    return found


if __name__ == "__main__":
    report = {
        " ".join([kernel.__name__, *(f"{name}={value}" for name, value in constants.items())]): used(
            kernel, constants, int(sys.argv[1])
        )
        for kernel, constants in KERNELS
    }
    print(json.dumps(report))
