"""Measure how soon a step is sampled: from `optim_step` to the first token of the new weights.

With `--compare` it also samples so many tokens from the last step's weights, and compares their logprobs with
the trainer's, as the cookbook's `kl_sample_train` does. The client is the Tinker API's own
(`pip install 'onebase[tinker]'`), against a server that runs already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

EACH, COMPARED = 8, 160
"""Samples of each prompt whose logprobs are compared, and their tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--key", default=os.environ.get("TINKER_API_KEY", "tml-dummy"), help="API key")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured, after two others")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter, on all linear layers")
    parser.add_argument("--rows", type=int, default=4, help="rows of each pass, of 64 tokens")
    parser.add_argument("--compare", type=int, default=0, help="tokens whose logprobs are compared; 0: none")
    arguments = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    import tinker

    client = tinker.ServiceClient(base_url=arguments.url, api_key=arguments.key)
    base = str(client.get_server_capabilities().supported_models[0].model_name)
    training = client.create_lora_training_client(base_model=base, rank=arguments.rank, seed=0).result()
    for line in table(measured(training, arguments)):
        print(line)
    if arguments.compare:
        print(comparison(training, arguments.compare))
    client.close("success").result()


def measured(training: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of each part, by its name, of each step."""
    import numpy as np
    from tinker import types

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
    return {name: values[2:] for name, values in parts.items()}


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
