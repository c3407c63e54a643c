"""Measure how soon a step is sampled: from `optim_step` to the first token of the new weights.

With `--compare` it also samples so many tokens from the last step's weights, and compares their logprobs with
the trainer's, as the cookbook's `kl_sample_train` does. The client is the Tinker API's own
(`pip install 'onebase[tinker]'`), against a server that runs already.

With `--tenants SECONDS` it starts a server of its own instead, and measures three loads for so long each: 16
streams; two tenants that train three adapters of ranks 4, 16 and 64 with other targets; and both at once. A
load with training lasts until each adapter has had two passes. The rate of an adapter is that between its
first and its last pass of the load.

With `--vllm-python PYTHON` it measures the same step as TRL and PEFT with a vLLM beside them take it: a pass
over the base in bf16, PyTorch's AdamW, PEFT's `save_pretrained`, vLLM's reload of the adapter in place, and a
token. PEFT's `all-linear` leaves out the head, which the adapter of the other measurement has.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import functools
import itertools
import json
import os
import shlex
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from bench import machine, report, targets
from bench.command import COMMON
from bench.processes import StartError, end_on_signals, make_key, onebase_server, tail
from bench.stream import DONE, HttpError, fetch_json, request
from bench.workload import Prompts, Shape
from onebase_engine.base.default_base import fetch_default_base

EACH, COMPARED = 8, 160
"""Samples of each prompt whose logprobs are compared, and their tokens."""
TENANTS = ("acme", "globex")
RUNS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "acme: rank 4 on attention": ("acme", {"rank": 4, "train_mlp": False, "train_unembed": False}),
    "acme: rank 16 on attention and MLP": ("acme", {"rank": 16, "train_unembed": False}),
    "globex: rank 64 on these and the unembedding": ("globex", {"rank": 64}),
}
"""Tenant and settings of each adapter that is trained, by its name in the table."""
STREAMS, TRAINED = "16 streams, 8 of each tenant", "all three"
ROW_TOKENS = 64
"""Tokens of each row of a pass."""
WARM_SECONDS = 5.0
"""Seconds of each load, at least, before its tokens are counted; all its parts have got some by then."""
MOST_WAITED = 4
"""Largest multiple of a load's length for which it waits for passes: beside streams they may hardly come."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "": ("url", "key", "steps", "rank", "compare"),
    "tenants": ("base", "onebase_args", "busy"),
    "vllm_python": ("steps", "rank", "base", "vllm_args", "busy"),
}
"""Options of each measurement, by the option that asks for it."""
NAMES = {
    "pass": "forward_backward",
    "step": "optim_step",
    "save": "save_weights_and_get_sampling_client",
    "sample": "sample, one token",
    "whole": "from the step to the first token",
}
"""Parts of a step, in their order, and what they are called."""
RELOADED = "live"
"""Name of the adapter that vLLM reloads."""
T = TypeVar("T")


class Rate(NamedTuple):
    """Tokens a second of a part of a load, and how many of its passes were finished; None of streams."""

    tokens: float
    passes: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--key", default=os.environ.get("TINKER_API_KEY", "tml-dummy"), help="API key")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured, after two others")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter, on all linear layers")
    parser.add_argument("--rows", type=int, default=4, help="rows of each pass, of 64 tokens")
    parser.add_argument("--compare", type=int, default=0, help="tokens whose logprobs are compared; 0: none")
    parser.add_argument(
        "--tenants", type=float, default=0.0, metavar="SECONDS",
        help="length of each of three loads: streams, training, both",
    )  # fmt: skip
    for name in ("base", "onebase-args", "vllm-python", "vllm-args", "busy"):
        parser.add_argument(f"--{name}", **COMMON[name])
    arguments = parser.parse_args()
    if arguments.tenants < 0:
        parser.error(f"--tenants is {arguments.tenants:g}: it must be a number of seconds above 0")
    asked = next((name for name in OPTIONS if name and getattr(arguments, name)), "")
    for name in sorted({*OPTIONS, *itertools.chain(*OPTIONS.values())} - {"", asked, *OPTIONS[asked]}):
        if getattr(arguments, name) != parser.get_default(name):
            where = f"with --{asked}" if asked else "without --tenants or --vllm-python"
            parser.error(f"--{name} does nothing {where}: leave it out".replace("_", "-"))
    if asked == "vllm_python" and not arguments.vllm_python.with_name("vllm").exists():
        parser.error(f"--vllm-python is {arguments.vllm_python}: there is no vllm next to it")
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    if asked:
        end_on_signals()
        console = Console()
        machine.demand_quiet(arguments.busy, console)
        try:
            asyncio.run((tenants if asked == "tenants" else reloads)(arguments, console))
        except (StartError, HttpError) as error:
            raise SystemExit(str(error)) from error
        return
    import tinker

    client = tinker.ServiceClient(base_url=arguments.url, api_key=arguments.key)
    base = str(client.get_server_capabilities().supported_models[0].model_name)
    training = client.create_lora_training_client(base_model=base, rank=arguments.rank, seed=0).result()
    for line in table(measured(training, arguments)):
        print(line)
    if arguments.compare:
        print(comparison(training, arguments.compare))
    client.close("success").result()


async def tenants(arguments: argparse.Namespace, console: Console) -> None:
    """Measure streams and training, alone and together, on a server of its own, and print a table."""
    folder = arguments.base or fetch_default_base()
    options = ["--base", folder] if arguments.base else []
    with tempfile.TemporaryDirectory(prefix="onebase-tenants-") as place:
        data, log = Path(place) / "data", Path(place) / "server.log"
        keys = {tenant: make_key(data, tenant) for tenant in TENANTS}
        options += ["--data-dir", data, *shlex.split(arguments.onebase_args)]
        async with onebase_server(log, *options) as (url, process):
            prompts = Prompts(folder, Shape().prompt_tokens, 0)
            loads = asyncio.create_task(measured_loads(url, keys, prompts, arguments))
            try:
                while not loads.done():
                    await asyncio.wait({loads}, timeout=0.5)
                    if process.poll() is not None:  # the client would wait for it
                        raise StartError(f"The server ended with {process.returncode}:\n{tail(log)}")
                alone, both = loads.result()
            finally:
                loads.cancel()
                await asyncio.gather(loads, return_exceptions=True)
    rows = []
    for name in (STREAMS, *RUNS, TRAINED):
        passes = ["-" if rate.passes is None else str(rate.passes) for rate in (alone[name], both[name])]
        before, after = alone[name].tokens, both[name].tokens
        left = f"{after / before:.0%}" if before else "-"
        rows.append([name, f"{before:.1f}", f"{after:.1f}", left, *passes])
    titles = ["tokens a second", "alone", "together", "left", "passes alone", "together"]
    console.print(report.table(titles, rows))


async def measured_loads(
    url: str, keys: Mapping[str, str], prompts: Prompts, arguments: argparse.Namespace
) -> tuple[dict[str, Rate], dict[str, Rate]]:
    """Return the rates of streams and training alone, and those of both at once."""
    base, trained = await in_thread(lambda: begin_runs(url, keys))  # the client is not asynchronous
    load = TenantsLoad(url, base, keys, prompts, trained, arguments.rows)
    alone = await load.rates(arguments.tenants, streams=True)
    alone |= await load.rates(arguments.tenants, trains=True)
    return alone, await load.rates(arguments.tenants, streams=True, trains=True)


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Return what comes of work in a thread that does not keep the process from ending, unlike those of
    `asyncio.to_thread`: the client waits for a server that is gone."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run_work() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run_work, daemon=True).start()
    return asyncio.wrap_future(future)


def begin_runs(url: str, keys: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the base's name, and a training client for each of RUNS by its name."""
    import tinker

    clients = {
        tenant: tinker.ServiceClient(base_url=url, api_key=f"tml-{key}") for tenant, key in keys.items()
    }
    base = str(clients["acme"].get_server_capabilities().supported_models[0].model_name)
    runs = {
        name: clients[tenant].create_lora_training_client(base_model=base, seed=0, **settings)
        for name, (tenant, settings) in RUNS.items()
    }
    return base, {name: future.result() for name, future in runs.items()}


class TenantsLoad:
    """Streams of the base and passes of live adapters, whose tokens are counted as they come.

    keys: by tenant. trained: the Tinker API's training clients, by the names of RUNS. rows: of each pass.
    """

    def __init__(
        self,
        url: str,
        base: str,
        keys: Mapping[str, str],
        prompts: Prompts,
        trained: Mapping[str, Any],
        rows: int,
    ) -> None:
        self._url = url
        self._base = base
        self._keys = keys
        self._prompts = prompts
        self._trained = trained
        self._rows = rows
        self._tokens = 0
        """Tokens of all streams of this load so far."""
        self._finished: dict[str, list[float]] = {}
        """Times at which passes of this load were finished, by adapter."""
        self._numbers = itertools.count()
        self._ended = threading.Event()

    async def rates(self, seconds: float, *, streams: bool = False, trains: bool = False) -> dict[str, Rate]:
        """Return the rate of each part of a load that runs for so long. Raises what one fails of."""
        self._ended.clear()
        self._tokens, self._finished = 0, {name: [] for name in RUNS if trains}
        keys = itertools.islice(itertools.cycle(self._keys.values()), Shape().streams if streams else 0)
        streaming = [asyncio.create_task(self._stream(key)) for key in keys]
        training = [in_thread(functools.partial(self._train, name)) for name in self._finished]
        parts = [*streaming, *training]
        try:
            longest = MOST_WAITED * max(seconds, WARM_SECONDS)
            started = time.perf_counter()
            await _pause(WARM_SECONDS, parts)
            while not (all(self._finished.values()) and (self._tokens or not streams)):
                if time.perf_counter() - started > longest:
                    break
                await _pause(0.1, parts)
            began, before = time.perf_counter(), self._tokens
            await _pause(seconds, parts)
            while any(len(self._since(began, name)) < 2 for name in self._finished):
                if time.perf_counter() - began > longest:
                    break
                await _pause(0.1, parts)
            lasted = time.perf_counter() - began
            rates = {STREAMS: Rate((self._tokens - before) / lasted)} if streams else {}
            rates |= {name: self._rate(self._since(began, name)) for name in self._finished}
            self._ended.set()
            for one in streaming:
                one.cancel()
            await asyncio.gather(*training)  # the next load begins without them
        finally:
            self._ended.set()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        if trains:
            runs = [rates[name] for name in RUNS]
            rates[TRAINED] = Rate(sum(one.tokens for one in runs), sum(one.passes or 0 for one in runs))
        return rates

    def _since(self, began: float, name: str) -> list[float]:
        return [at for at in self._finished[name] if at >= began]

    def _rate(self, finished: list[float]) -> Rate:
        if len(finished) < 2:
            return Rate(0.0, len(finished))
        tokens = (len(finished) - 1) * self._rows * ROW_TOKENS
        return Rate(tokens / (finished[-1] - finished[0]), len(finished))

    async def _stream(self, key: str) -> None:
        """Stream one text after the other."""
        shape = Shape()
        while True:
            body = {
                "model": self._base,
                "prompt": self._prompts.make("stream", next(self._numbers)),
                "max_tokens": shape.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
            before = 0
            async with request(f"{self._url}/v1/completions", "POST", body, key) as response:
                if response.status != 200:
                    raise HttpError(response.status, (await response.body()).decode(errors="replace"))
                async for event in response.events():
                    if event == DONE:
                        break
                    parsed = json.loads(event)
                    if "error" in parsed:
                        raise HttpError(200, json.dumps(parsed["error"]))
                    usage = parsed.get("usage")
                    if usage is not None:
                        self._tokens += usage["completion_tokens"] - before
                        before = usage["completion_tokens"]
                else:
                    raise HttpError(200, f"a stream ended after {before} tokens without {DONE.decode()}")

    def _train(self, name: str) -> None:
        """Train one adapter step by step: a pass and a step in flight."""
        from tinker import types

        training, data = self._trained[name], rows_of(self._rows)
        while not self._ended.is_set():
            passed = training.forward_backward(data, "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=1e-4))
            passed.result()
            self._finished[name].append(time.perf_counter())
            stepped.result()


async def _pause(seconds: float, parts: Sequence[asyncio.Future[None]]) -> None:
    """Wait for so long. Raises what a part of the load fails of meanwhile."""
    done, _ = await asyncio.wait(parts, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for part in done:
        part.result()


def rows_of(count: int) -> list[Any]:
    """Return rows of random tokens for cross-entropy, all of whose tokens are learned."""
    import numpy as np
    from tinker import types

    tokens = np.random.default_rng(0).integers(1000, 5000, (count, ROW_TOKENS + 1))
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(row[1:]),
                "weights": types.TensorData.from_numpy(np.ones(ROW_TOKENS, np.float32)),
            },
        )
        for row in tokens
    ]


def measured(training: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of each part, by its name, of each step."""
    from tinker import types

    data = rows_of(arguments.rows)
    prompt = types.ModelInput.from_ints(data[0].model_input.to_ints()[:32])
    parts: dict[str, list[float]] = {name: [] for name in NAMES}

    def timed(name: str, future: Any) -> Any:
        begin = time.perf_counter()
        result = future().result()
        parts[name].append((time.perf_counter() - begin) * 1e3)
        return result

    for _ in range(arguments.steps + 2):
        timed("pass", lambda: training.forward_backward(data, "cross_entropy"))
        begin = time.perf_counter()
        timed("step", lambda: training.optim_step(types.AdamParams(learning_rate=1e-4)))
        sampler = timed("save", training.save_weights_and_get_sampling_client)
        timed("sample", lambda of=sampler: of.sample(prompt, 1, types.SamplingParams(max_tokens=1)))
        parts["whole"].append((time.perf_counter() - begin) * 1e3)
    return {name: values[2:] for name, values in parts.items()}


async def reloads(arguments: argparse.Namespace, console: Console) -> None:
    """Measure each part of a step of PEFT and PyTorch whose adapter a vLLM reloads, and print a table."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = arguments.base or fetch_default_base()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rank = arguments.rank
    model = get_peft_model(plain, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    rows = [
        [*row.model_input.to_ints(), row.loss_fn_inputs["target_tokens"].data[-1]]
        for row in rows_of(arguments.rows)
    ]
    ids = torch.tensor(rows)
    parts: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="onebase-reload-") as place:
        folders = itertools.cycle([str(Path(place) / name) for name in ("one", "other")])
        model.save_pretrained(first := next(folders))
        setup = targets.Setup(base, {RELOADED: Path(first)}, rank, os.cpu_count() or 1)
        running = targets.vllm(
            setup, Path(place) / "vllm.log", arguments.vllm_python, shlex.split(arguments.vllm_args)
        )
        async with running as vllm:
            asked = {"model": RELOADED, "prompt": rows[0][:32], "max_tokens": 1, "temperature": 0}
            for _ in range(arguments.steps + 2):
                times = [time.perf_counter()]
                model(input_ids=ids, labels=ids).loss.backward()
                times.append(time.perf_counter())
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.perf_counter())
                model.save_pretrained(folder := next(folders))
                reload = {"lora_name": RELOADED, "lora_path": folder, "load_inplace": True}
                async with request(f"{vllm.url}/v1/load_lora_adapter", "POST", reload) as response:
                    body = await response.body()
                    if response.status != 200:
                        raise HttpError(response.status, body.decode(errors="replace"))
                times.append(time.perf_counter())
                await fetch_json(f"{vllm.url}/v1/completions", "POST", asked)
                times.append(time.perf_counter())
                took = [(after - before) * 1e3 for before, after in itertools.pairwise(times)]
                for name, value in zip(parts, [*took, sum(took[1:])], strict=True):
                    parts[name].append(value)
    measured = {name: values[2:] for name, values in parts.items()}
    for line in table(measured, NAMES | {"step": "AdamW", "save": "save_pretrained, load_lora_adapter"}):
        console.print(line)


def comparison(training: Any, tokens: int) -> str:
    """Return a line about logprobs of at least so many sampled tokens: the sampler's and the trainer's."""
    import numpy as np
    from tinker import types

    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=COMPARED, temperature=1.0, stop=[], seed=0)
    prompts = np.random.default_rng(1).integers(1000, 5000, (-(-tokens // (EACH * COMPARED)), 8)).tolist()
    drawn = [sampler.sample(types.ModelInput.from_ints(prompt), EACH, params) for prompt in prompts]
    differences = []
    for prompt, future in zip(prompts, drawn, strict=True):
        data, sampled = [], []
        for sequence in future.result().sequences:
            before = [0.0] * (len(prompt) - 1)
            inputs = {
                "target_tokens": np.array(prompt[1:] + sequence.tokens),
                "logprobs": np.array(before + sequence.logprobs, np.float32),
                "advantages": np.array(before + [1.0] * COMPARED, np.float32),
            }
            arrays = {name: types.TensorData.from_numpy(one) for name, one in inputs.items()}
            model_input = types.ModelInput.from_ints(prompt + sequence.tokens[:-1])
            data.append(types.Datum(model_input=model_input, loss_fn_inputs=arrays))
            sampled.append(inputs["logprobs"])
        outputs = training.forward(data, "importance_sampling").result().loss_fn_outputs
        for own, output in zip(sampled, outputs, strict=True):
            differences.append((own - output["logprobs"].to_numpy())[len(prompt) - 1 :].astype(np.float64))
    gaps = np.concatenate(differences)
    return (
        f"{len(gaps):,} sampled tokens, {np.count_nonzero(gaps):,} with other logprobs in the trainer; "
        f"kl_sample_train_v1 {gaps.mean():g}, _v2 {0.5 * (gaps**2).mean():g}"
    )


def table(parts: dict[str, list[float]], names: Mapping[str, str] = NAMES) -> list[str]:
    """Return the lines of the result: median, fastest and slowest of each part, and all as JSON."""
    lines = [f"{'':38}{'median':>9}{'fastest':>9}{'slowest':>9}   ms"]
    for name, told in names.items():
        values = parts[name]
        lines.append(f"{told:38}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}")
    medians = {name: round(statistics.median(values), 1) for name, values in parts.items()}
    return [*lines, json.dumps(medians)]


if __name__ == "__main__":
    main()
