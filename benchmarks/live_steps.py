"""Measure how soon a step is sampled: from `optim_step` to the first token of the new weights.

The client is the Tinker API's own (`pip install 'onebase[tinker]'`), against a server that runs already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--key", default=os.environ.get("TINKER_API_KEY", "tml-dummy"), help="API key")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured, after two others")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter, on all linear layers")
    parser.add_argument("--rows", type=int, default=4, help="rows of each pass, of 64 tokens")
    arguments = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    for line in table(measured(arguments)):
        print(line)


def measured(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of each part, by its name, of each step."""
    import numpy as np
    import tinker
    from tinker import types

    client = tinker.ServiceClient(base_url=arguments.url, api_key=arguments.key)
    base = str(client.get_server_capabilities().supported_models[0].model_name)
    training = client.create_lora_training_client(base_model=base, rank=arguments.rank, seed=0).result()
    tokens = np.random.default_rng(0).integers(1000, 5000, (arguments.rows, 65))
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(row[1:]),
                "weights": types.TensorData.from_numpy(np.ones(64, np.float32)),
            },
        )
        for row in tokens
    ]
    prompt = types.ModelInput.from_ints(tokens[0, :32].tolist())
    parts: dict[str, list[float]] = {name: [] for name in ("pass", "step", "save", "sample", "whole")}

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
    client.close("success").result()
    return {name: values[2:] for name, values in parts.items()}


def table(parts: dict[str, list[float]]) -> list[str]:
    """Return the lines of the result: median, fastest and slowest of each part, and all as JSON."""
    names = {
        "pass": "forward_backward",
        "step": "optim_step",
        "save": "save_weights_and_get_sampling_client",
        "sample": "sample, one token",
        "whole": "from optim_step to the first token",
    }
    lines = [f"{'':38}{'median':>9}{'fastest':>9}{'slowest':>9}   ms"]
    for name, told in names.items():
        values = parts[name]
        lines.append(f"{told:38}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}")
    medians = {name: round(statistics.median(values), 1) for name, values in parts.items()}
    return [*lines, json.dumps(medians)]


if __name__ == "__main__":
    main()
