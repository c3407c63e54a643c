"""`onebase estimate`: what a training run takes, or with `--serve` how many servers a load takes.

It needs neither of the extras' web servers nor a database: `onebase[train]` is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from onebase_adapters.training.cli import estimate as training
from onebase_adapters.training.cli.options import (
    Parser,
    UsageError,
    add_base_options,
    base_settings,
    open_console,
    positive,
    print_error,
    printable,
    size,
)
from onebase_engine.base.default_base import BaseError
from onebase_server.routing.capacity import (
    BANDWIDTHS,
    GRAPH_ROWS,
    REACHED,
    WORST,
    BaseFigures,
    Capacity,
    Demand,
    Device,
    Point,
    Serving,
    UnservableError,
    bytes_read,
    capacity,
)
from onebase_server.settings import PREFIX_PART

if TYPE_CHECKING:
    import torch

_ABOUT = """\
How many servers a load takes, what binds, and what one more would give.

From the base's config alone: bytes and operations of a step, then a simulation of requests that are
placed as `onebase route` does it. A prediction: no GPU was measured.

  onebase estimate --serve --base meta-llama/Llama-3.1-8B --gpu h100 --adapters 1000 --requests 20
"""
_BANDWIDTH_SHARE = REACHED[WORST]
"""Share of the bandwidth, as a data sheet or a copy shows it, that a decode step is assumed to reach."""
_LAYER_SECONDS = {"cuda": 0.25e-3, "cpu": 0.06e-3}
"""Python's part of a step, by layer: 8 ms of 30 layers, as measured on a CPU, where no CUDA graph spares it;
1.8 ms where layers are recorded (docs/performance.md)."""
_BLOCKSIZE = 64
"""Number of 4-bit weights per quantization block, as the server quantizes by default."""
_PROBE_BYTES = 256 << 20


def main(argv: Sequence[str]) -> int:
    """`onebase estimate`. Exit status: 0 it can be done, 1 it cannot or cannot be said, 2 wrong options."""
    arguments = list(argv)
    if "--serve" not in arguments:
        return training.main(arguments)
    options = _parser().parse_args(arguments)
    try:
        return _estimate(options)
    except UsageError as error:
        print_error(open_console(stderr=True), str(error))
        return 2
    except (BaseError, UnservableError) as error:
        print_error(open_console(stderr=True), str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="onebase estimate --serve", usage="onebase estimate --serve [options]", description=_ABOUT
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    add_base_options(parser)
    load = parser.add_argument_group("the load")
    load.add_argument("--adapters", type=positive, default=100, metavar="N", help="adapters (default: 100)")
    load.add_argument("--rank", type=positive, default=16, metavar="N", help="their rank (default: 16)")
    load.add_argument(
        "--targets", default="all-linear", help="their targets, as in training (default: all-linear)"
    )
    load.add_argument(
        "--zipf",
        type=_number,
        default=0.9,
        metavar="S",
        help="how uneven they are asked: the n-th has 1/n^S of the first one's requests (default: 0.9)",
    )
    load.add_argument(
        "--requests", type=_number, default=10.0, metavar="N", help="requests a second (default: 10)"
    )
    load.add_argument(
        "--prompt", type=positive, default=500, metavar="N", help="tokens of a prompt (default: 500)"
    )
    load.add_argument(
        "--answer", type=positive, default=200, metavar="N", help="tokens of a mean answer (default: 200)"
    )
    goals = parser.add_argument_group("the goals")
    goals.add_argument(
        "--ttft",
        type=_number,
        default=1.0,
        metavar="SECONDS",
        help="until the first token, for 99 of 100 requests (default: 1)",
    )
    goals.add_argument(
        "--token-time", type=_number, metavar="MS", help="from one token to the next (default: any)"
    )
    goals.add_argument(
        "--replicas", type=positive, metavar="N", help="say what so many servers do, instead of how many"
    )
    machine = parser.add_argument_group("each server")
    machine.add_argument(
        "--gpu", metavar="NAME", help="a GPU, as in l4, a100-80 or h100 (default: this machine)"
    )
    machine.add_argument(
        "--memory", type=size, metavar="SIZE", help="its memory, as in 20GB (default: what it has)"
    )
    machine.add_argument(
        "--bandwidth",
        type=_number,
        metavar="GB/S",
        help="its memory's, as reached (default: 60%% of the data sheet's)",
    )
    machine.add_argument(
        "--host-memory", type=size, default=64 << 30, metavar="SIZE", help="as the server's (default: 64GiB)"
    )
    machine.add_argument(
        "--slot-memory", type=size, metavar="SIZE", help="for slots (default: what takes the fewest servers)"
    )
    machine.add_argument(
        "--kv-dtype", choices=("auto", "int8"), default="auto",
        help="type of keys and values in the KV cache (default: auto, which is --dtype)",
    )  # fmt: skip
    machine.add_argument("--max-rows", type=positive, default=256, metavar="N", help="at most (default: 256)")
    machine.add_argument(
        "--max-slots", type=positive, default=1024, metavar="N",
        help="at most (default: 1024, or what fits)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON, sizes in bytes")
    return parser


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _estimate(options: argparse.Namespace) -> int:
    base, adapter_bytes = _figures(options)
    device = _device(options)
    demand = Demand(
        adapters=options.adapters,
        adapter_bytes=adapter_bytes,
        requests=options.requests,
        prompt=options.prompt,
        answer=options.answer,
        ttft=options.ttft,
        skew=options.zipf,
        token=None if options.token_time is None else options.token_time / 1e3,
    )
    serving = Serving(
        rows=options.max_rows,
        slots=options.max_slots,
        slot_memory=options.slot_memory,
        host_memory=options.host_memory - options.host_memory // PREFIX_PART,
    )
    with open_console(stderr=True).status("simulating ...") as status:  # nothing through a pipe
        found = capacity(
            device,
            base,
            demand,
            serving,
            replicas=options.replicas,
            tick=lambda count: status.update(f"simulating {count} servers ..."),
        )
    if options.json:
        sys.stdout.write(json.dumps(_as_json(found, device, base, demand, serving)) + "\n")
    else:
        show(open_console(), found, device, base, demand, options)
    return 0 if found.meets else 1


# ---- figures of the base and the device -------------------------------------------------------------


def _figures(options: argparse.Namespace) -> tuple[BaseFigures, int]:
    """Return the base's figures, and the bytes of one adapter in memory. Raises BaseError, UsageError."""
    import torch

    from onebase_adapters.training.estimate import adapter_parameters
    from onebase_adapters.training.recipe import RecipeError
    from onebase_adapters.training.trainable import target_layers
    from onebase_engine.base.layers import empty_base
    from onebase_engine.base.load import estimate_memory

    config: Any = training.find_config(options.base)
    dtype = getattr(torch, options.dtype)
    model = empty_base(config)
    memory = estimate_memory(model, options.quantization, dtype=dtype)
    linear = target_layers(model, ["all-linear"]).values()
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = head is None or config.get_text_config().tie_word_embeddings
    try:
        targets = target_layers(model, options.targets.split(","))
    except RecipeError as error:
        raise UsageError(f"--targets: {error}") from error
    weights = sum(layer.in_features * layer.out_features for layer in linear)
    head_weights = embedding.weight.numel() if head is None else head.weight.numel()
    return (
        BaseFigures(
            bytes=memory.total,
            read=bytes_read(
                memory.total - (0 if tied else embedding.weight.numel() * dtype.itemsize),
                weights if options.quantization == "nf4" else 0,
                _BLOCKSIZE,
            ),
            flops=2 * (weights + head_weights),
            kv_bytes=_kv_bytes(config.get_text_config(), torch.int8 if options.kv_dtype == "int8" else dtype),
            layers=config.get_text_config().num_hidden_layers,
        ),
        4 * adapter_parameters(targets, dict.fromkeys(targets, options.rank), dora=False),
    )


def _kv_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a token in the KV cache: keys and values in each layer."""
    from onebase_engine.engine.kv_cache import bytes_per_token

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size_of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = int(heads), int(size_of_head), int(size_of_head)
    return bytes_per_token(dict.fromkeys(range(config.num_hidden_layers), shape), dtype)


def _device(options: argparse.Namespace) -> Device:
    """A GPU of the table, or this machine, whose products and memory are timed for a moment."""
    own = None if options.bandwidth is None else options.bandwidth * 1e9
    if options.gpu:
        try:
            known = training.known_gpu(options.gpu, options.memory)
        except training.UnknownMachineError as error:
            raise UsageError(f"--gpu: {error}") from error
        sheet = BANDWIDTHS[known.name]
        bandwidth = own or sheet * 1e9 * _BANDWIDTH_SHARE
        how = f"{known.how}; " + (
            f"{_BANDWIDTH_SHARE:.0%} of {sheet:g} GB/s"
            if own is None
            else f"{bandwidth / 1e9:g} GB/s as given"
        )
        host = _LAYER_SECONDS["cuda"], _graph_rows("cuda", options)
        return Device(known.name, known.memory, bandwidth, known.rate, how, *host)
    settings = base_settings(options, Path())
    machine = training.this_machine(settings.device, settings.dtype, options.memory)
    bandwidth = own or measured_bandwidth(settings.device) * _BANDWIDTH_SHARE
    how = f"measured on this machine, {bandwidth / 1e9:.1f} GB/s taken"
    host = _LAYER_SECONDS[machine.kind], _graph_rows(machine.kind, options)
    return Device(machine.name, machine.memory, bandwidth, machine.rate, how, *host)


def _graph_rows(kind: str, options: argparse.Namespace) -> int:
    """Rows of which a step is a CUDA graph at most. What PyTorch computes with adapters is in none."""
    captured = kind == "cuda" and options.dtype == "bfloat16" and options.quantization != "int8"
    return GRAPH_ROWS if captured else 0


def measured_bandwidth(device: Any) -> float:
    """Bytes a second that this machine's memory gives: of a copy, which reads and writes. Takes a moment."""
    import torch

    source = torch.ones(_PROBE_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, max(time.perf_counter() - started, 1e-9))
    return 2 * _PROBE_BYTES / best


# ---- what is told -----------------------------------------------------------------------------------


def _as_json(
    found: Capacity, device: Device, base: BaseFigures, demand: Demand, serving: Serving
) -> dict[str, Any]:
    made = {
        "device": asdict(device),
        "base": asdict(base),
        "demand": asdict(demand),
        "serving": asdict(serving),
        **asdict(found),
    }
    return {name: _finite(part) for name, part in made.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(
    console: Console,
    found: Capacity,
    device: Device,
    base: BaseFigures,
    demand: Demand,
    options: argparse.Namespace,
) -> None:
    """Print it as a table; through a pipe as lines, their columns separated by tabs."""
    training.print_rows(console, _rows(found, device, base, demand, options))
    if not found.meets:
        console.print(
            f"\n[bold red]The goals are not met[/] with {_count(found.chosen.replicas)}.", highlight=False
        )
    console.print(
        "\n[dim]Predicted from bytes and operations; times to the first token are simulated. No GPU was "
        "measured: measure one server under your load before you buy many."
    )


def _rows(
    found: Capacity, device: Device, base: BaseFigures, demand: Demand, options: argparse.Namespace
) -> Iterator[tuple[str, Text, Text]]:
    setup, chosen = found.setup, found.chosen
    name = f"{printable(options.base)}, {options.quantization}"
    yield "base", _gb(base.bytes), Text(f"{name}; a step reads {base.read / 1e9:.2f} GB")
    targets = f"r={options.rank} on {printable(options.targets)}"
    of = f"of {demand.adapter_bytes / 1e6:.1f} MB ({targets}), Zipf {demand.skew:g}"
    yield "adapters", Text(f"{demand.adapters:,}"), Text(of)
    tokens = f"a second, {demand.prompt:,} tokens in and {demand.answer:,} out"
    yield "requests", Text(f"{demand.requests:g}"), Text(tokens)
    yield "device", _gb(device.memory), Text(f"{printable(device.name)} ({device.how})")
    each = f"for {setup.rows} rows (--max-rows {setup.rows}); {base.kv_bytes / 1e3:.0f} kB a token"
    each += " (--kv-dtype int8)" if options.kv_dtype == "int8" else ""
    yield "KV cache", _gb(setup.kv_memory), Text(each)
    slots = f"--slot-memory {math.ceil(setup.slot_memory / 1e6)}MB --max-slots {setup.slots}"
    yield "slots", _gb(setup.slot_memory), Text(f"for {setup.slots} adapters ({slots})")
    host = f"adapters in host memory on each server (--host-memory {options.host_memory / 1e9:.0f}GB)"
    yield "host memory", Text(f"{setup.host_adapters:,}"), Text(host)
    for resource, count in sorted(found.needs.items(), key=lambda item: -item[1]):
        binds = Text("binds", "bold") if resource == found.binds else Text("")
        yield (
            f"  {resource}",
            Text(f"{count:.2f}"),
            Text("servers").append(" " if binds else "").append(binds),
        )
    style = "bold green" if found.meets else "bold red"
    late = f"{found.binds} binds" + ("" if found.binds in found.needs else " (simulated)")
    yield "servers", Text(f"{chosen.replicas:,}", style), Text(late)
    yield from _told(chosen, demand)
    more = found.more
    yield (
        "with one more",
        _seconds(more.ttft[1] if more.ttft else math.inf),
        Text(f"TTFT p99; {more.used:.0%} of compute; a token in {_seconds(more.token)}"),
    )


def _told(point: Point, demand: Demand) -> Iterator[tuple[str, Text, Text]]:
    half, most = point.ttft or (math.inf, math.inf)
    yield "  TTFT p99", _seconds(most), Text(f"p50 {_seconds(half)}; the goal is {demand.ttft:g} s")
    goal = "" if demand.token is None else f"; the goal is {1e3 * demand.token:g} ms"
    yield "  a token", _seconds(point.token), Text(f"with {point.running:.0f} rows at once{goal}")
    yield "  compute", Text(f"{point.used:.0%}"), Text("of each server, busy with prompts and rows")
    yield "  cold starts", Text(f"{point.cold:.2%}"), Text("of the requests wait for the store")


def _gb(count: int) -> Text:
    return Text(f"{count / 1e9:.2f} GB")


def _seconds(value: float) -> Text:
    if math.isinf(value):
        return Text("never ends")
    return Text(f"{1e3 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s")


def _count(replicas: int) -> str:
    return "1 server" if replicas == 1 else f"{replicas:,} servers"
