"""The example adapter on the default base: published by a real engine, proved by a real verifier."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.verifier.conftest import BASE_ID, new_client
from transformers import AutoTokenizer

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_engine.engine.messages import (
    EngineConfig,
    Fatal,
    Ready,
    Shutdown,
    Start,
    ToApi,
    to_api_decoder,
)
from onebase_engine.lora.packed_adapter import read_packed_adapter
from onebase_server.processes.link import ENGINE_COMMAND, ChildProcess
from onebase_server.processes.verifier_protocol import Prove, Proved

ORDERS = Path(__file__).parents[2] / "examples" / "adapters" / "orders"
QUESTIONS = ("Please send three red lamps to Ada Byron in Oslo.", "What is the capital of France?")


async def publish_and_prove(
    tmp_path: Path, job: Callable[[EngineConfig], Prove]
) -> tuple[Proved, dict[str, int]]:
    """Start an engine and its verifier, prove one version; also the verifier's memory, in bytes."""
    config = EngineConfig(
        base_folder=str(resolve_base(DEFAULT_BASE).folder), device="cpu", threads=1, kv_memory=50_000_000
    )
    ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()

    def receive(message: ToApi) -> None:
        if isinstance(message, Ready):
            ready.set_result(message)
        elif isinstance(message, Fatal):
            ready.set_exception(RuntimeError(message.message))

    fd = os.memfd_create("base")
    engine = await ChildProcess.spawn(
        ENGINE_COMMAND, to_api_decoder(), receive, lambda: None, fds={"--base-fd": fd}
    )
    verifier = new_client(tmp_path)
    try:
        engine.send(Start(config))
        manifest = (await asyncio.wait_for(ready, 240)).manifest
        await verifier.attach(config, manifest, fd)
        proved = await asyncio.wait_for(verifier.ask(job(config), lambda progress: None), 240)
        return proved, _memory(verifier.pid)
    finally:
        os.close(fd)
        await verifier.engine_gone()
        engine.send(Shutdown())
        await engine.end(grace=30)


def _memory(pid: int | None) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    parts = (line.split() for line in lines if line.startswith("Rss"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in parts}


@pytest.mark.full
def test_the_orders_adapter_is_proven_on_the_default_base_of_a_running_engine(tmp_path: Path) -> None:
    prepared = tmp_path / "orders.prepared"

    def job(config: EngineConfig) -> Prove:
        tokenizer = AutoTokenizer.from_pretrained(config.base_folder)
        return Prove(
            digest="0" * 64,
            config_path=str(ORDERS / CONFIG_FILE),
            weights_path=str(ORDERS / WEIGHTS_FILE),
            packed_path=str(prepared),
            probes=[
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
                )
                for text in QUESTIONS
            ],
            probe_tokens=8,
        )

    proved, memory = asyncio.run(publish_and_prove(tmp_path, job))
    report, proof = proved.report, proved.report.proof
    print(f"proved in {proof.seconds:.1f} s: {proof}; {memory}")
    assert report.kinds == ("lora",)
    assert report.base_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    # Every linear layer of 30, the head, the embedding, and 61 norms.
    assert proof.modules_compared == 30 * 7 + 2 + 61
    assert proof.modules_changed == len(report.modules) > 0
    assert (proof.exact, proof.largest_difference, proof.base_unchanged) == (True, 0.0, True)
    assert (proof.texts, proof.tokens_compared) == (2, 16)
    assert proof.texts_changed >= 1
    assert all(module.norm > (module.spectral_norm or 0) > 0 for module in report.modules)
    assert all(0 < (module.relative_norm or 0) < 0.1 for module in report.modules)
    assert report.base_layers == 30
    parts = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
    assert list(report.base_linears) == [
        f"{where}.{one}_proj" for where, names in parts.items() for one in names
    ]
    assert report.warnings == ()
    weights = read_packed_adapter(prepared, proved.sha256, base_id=BASE_ID)
    assert weights.keys() == {module.name for module in report.modules}
    # It has read the engine's 110 MB, and holds no copy of them beside the libraries and a small KV cache.
    assert memory["RssShmem"] > 50e6
    assert memory["RssAnon"] < 700e6
