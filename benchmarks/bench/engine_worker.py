"""OneBase's engine in a process of its own, without a server: it takes the same jobs as `peft_worker.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from onebase_adapters.proof.loader import load_adapter
from onebase_adapters.store.blobs import CONFIG_FILE, WEIGHTS_FILE
from onebase_engine.base.load import eos_ids
from onebase_engine.base.quantized_cache import load_kept_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, EngineConfig, Sampling, Submit
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_server.processes.engine import DEFAULT_STEP_TOKENS, base_settings, warm_up

KV_TOKENS = 65536


def load(folder: str, adapters: dict[str, str], rank: int, draft_tokens: int) -> Engine:
    """An engine with a server's defaults and every adapter; a row names a version by the adapter's name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_kept_base(base_settings(EngineConfig(base_folder=folder), device))
    limits = SchedulerLimits(64, DEFAULT_STEP_TOKENS[device.type], 2048, draft_tokens)
    engine = Engine(
        base,
        name="bench",
        limits=limits,
        kv_blocks=KV_TOKENS // 16,
        slots=max(1, len(adapters)),
        eos_ids=eos_ids(base),
        tokenizer=Path(folder),
    )
    for name, path in adapters.items():
        loaded = load_adapter(base, Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE, rank)
        engine.put_adapter(name, loaded.weights)
    warm_up(engine)
    return engine


def generate(engine: Engine, tokenizer: Tokenizer, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests at once; one sample each."""
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    for index, request in enumerate(requests):
        prompt = tokenizer.encode(request["prompt"]).ids
        sampling = Sampling(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True)
        adapters = [] if request["adapter"] is None else [AdapterRef(request["adapter"])]
        engine.submit(Submit(id=str(index), prompt=prompt, sampling=sampling, adapters=adapters))
        samples.append({"started": started, "ttft": 0.0, "ended": 0.0, "tokens": 0})
    tokens: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        engine.step()
        now = time.perf_counter()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(output.error_message)
            sample, own = samples[int(output.id)], tokens[int(output.id)]
            if not own:
                sample["ttft"] = now - started
            own += output.tokens
            sample["tokens"], sample["ended"] = len(own), now
    return [{**one, "text": tokenizer.decode(own)} for one, own in zip(samples, tokens, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", required=True, help="JSON object: name to folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True, help="the largest of the adapters'")
    parser.add_argument("--draft-tokens", type=int, default=7)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    engine = load(options.base, json.loads(options.adapters), options.rank, options.draft_tokens)
    tokenizer = Tokenizer.from_file(str(Path(options.base) / "tokenizer.json"))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(generate(engine, tokenizer, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
