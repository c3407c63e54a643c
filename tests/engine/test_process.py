"""The real engine process on a tiny Llama, spoken to over a socket as the api does."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tests.tiny import ADAPTERS, load_folder, save_adapter, save_base, save_model
from transformers import AutoConfig, RobertaConfig

from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base, read_config
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.messages import FrameReader, SequenceOutput
from onebase_engine.kernels.weights import LoraWeights, ModuleWeights, SavedModule, TokenRows
from onebase_engine.lora.packed_adapter import write_packed_adapter
from onebase_server.processes import engine as process

pytestmark = pytest.mark.usefixtures("forks")
Message = TypeVar("Message", bound=protocol.ToApi)
PATIENCE = 120.0
"""Seconds before a test gives up on a process that says nothing; passing tests never wait for it."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class EngineClient:
    """The api's end of the socket to one engine process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(PATIENCE)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onebase_server.processes", "engine", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._reader, self._decoder = FrameReader(), protocol.to_api_decoder()
        self._messages: list[protocol.ToApi] = []

    def start(self, folder: Path, **config: Any) -> None:
        settings = {"quantization": "none", "dtype": "float32", "compute_dtype": "float32"} | config
        settings = {"device": "cpu", "threads": 1, "kv_memory": 4_000_000, **settings}
        self.send(protocol.Start(protocol.EngineConfig(base_folder=str(folder), **settings)))

    def send(self, *messages: protocol.ToEngine) -> None:
        self.send_bytes(b"".join(protocol.encode(message) for message in messages))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hang_up(self) -> None:
        self._socket.close()

    def receive(self) -> protocol.ToApi:
        """The next message; raises EOFError when the engine has closed its end."""
        while not self._messages:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._messages += [self._decoder.decode(payload) for payload in self._reader.feed(data)]
        return self._messages.pop(0)

    def wait_for(self, kind: type[Message]) -> Message:
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def outputs(self, name: str, rows: int) -> list[SequenceOutput]:
        """All events of a request, up to the final one of each of its rows."""
        found: list[SequenceOutput] = []
        while sum(output.finish is not None for output in found) < rows:
            found += [output for output in self.wait_for(protocol.StepResult).outputs if output.id == name]
        return found

    def status(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("process") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """The prepared file of an adapter."""
    model = load_base(BaseSettings(folder=base, quantization="none"))
    folder = save_adapter(model, ADAPTERS[0], base.parent / "adapter", seed=1, std=0.5)
    prepared = base.parent / "prepared.safetensors"
    write_packed_adapter(prepared, load_folder(model, folder).weights, base_id="b")
    return prepared


def load(digest: str, prepared: Path) -> protocol.LoadAdapter:
    return protocol.LoadAdapter(digest, str(prepared), hashlib.sha256(prepared.read_bytes()).hexdigest())


@pytest.fixture
def spawn() -> Iterator[Callable[[], EngineClient]]:
    clients: list[EngineClient] = []

    def new() -> EngineClient:
        clients.append(EngineClient())
        return clients[-1]

    yield new
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def shared(base: Path) -> Iterator[EngineClient]:
    """One engine for all tests that leave it running."""
    client = EngineClient()
    client.start(base, max_length=256)
    client.wait_for(protocol.Ready)
    yield client
    client.close()


def submit(
    name: str, prompt: list[int], *, n: int = 1, adapters: tuple[str, ...] = (), **sampling: Any
) -> protocol.Submit:
    return protocol.Submit(
        id=name,
        prompt=prompt,
        sampling=protocol.Sampling(**{**GREEDY, **sampling}),
        adapters=[protocol.AdapterRef(digest) for digest in adapters],
        n=n,
    )


def tokens(outputs: list[SequenceOutput], choice: int = 0) -> list[int]:
    return [token for output in outputs if output.choice == choice for token in output.tokens]


def test_a_start_is_answered_by_progress_then_ready_then_idle_reports_also_for_very_short_texts(
    base: Path, spawn: Callable[[], EngineClient]
) -> None:
    client = spawn()
    client.start(base, max_length=4, max_sequences=3, prefix_memory=1_000_000)
    progress: list[protocol.Loading] = []
    while isinstance(message := client.receive(), protocol.Loading):
        progress.append(message)
    assert len(progress) >= 2
    assert [p.fraction for p in progress] == sorted(p.fraction for p in progress)
    assert isinstance(message, protocol.Ready)
    assert message.base.architecture == "LlamaForCausalLM"
    assert (message.base.max_length, message.base.max_sequences, message.base.vocab_size) == (4, 3, 320)
    idle = client.wait_for(protocol.StepResult)
    assert idle.outputs == []
    assert idle.stats.generated_tokens == 0
    block_bytes = message.base.kv_bytes // (message.base.kv_blocks + RESERVED_BLOCKS)
    assert (idle.stats.kv_blocks_on_host, idle.stats.kv_blocks_host_total) == (0, 1_000_000 // block_bytes)
    client.send(submit("r", [5, 6], max_tokens=2))
    assert len(tokens(client.outputs("r", 1))) == 2
    client.send(protocol.Shutdown())
    assert client.status() == 0


@pytest.mark.parametrize("started", [False, True])
def test_the_engine_ends_when_the_api_hangs_up(
    base: Path, spawn: Callable[[], EngineClient], started: bool
) -> None:
    client = spawn()
    if started:
        client.start(base)
        client.wait_for(protocol.Ready)
        client.send(submit("r", [5] * 20, max_tokens=400))
        client.wait_for(protocol.StepResult)
    client.hang_up()
    assert client.status() == 0


def test_other_threads_of_the_engine_keep_a_step_waiting_for_a_small_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step gives its turn away with each of its calls of the kernels, some hundred times."""
    monkeypatch.setattr(process, "GOODBYE_SECONDS", None)  # this process goes on without an api
    before = sys.getswitchinterval()
    ours, theirs = socket.socketpair()
    ours.close()
    try:
        assert process.run_engine(theirs) == 0
        assert sys.getswitchinterval() < 0.0005
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x03\0\0\0\xc1\xc1\xc1",
        *(pytest.param(more, marks=pytest.mark.full) for more in (b"\xff" * 64, b"\x01\0\0\0\x01")),
    ],
)
def test_bytes_that_are_no_message_end_the_engine_cleanly(
    spawn: Callable[[], EngineClient], garbage: bytes
) -> None:
    client = spawn()
    client.send_bytes(garbage)
    with pytest.raises(EOFError):
        client.receive()
    assert client.status() == 0


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5"]}))


def _cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")


def _other_positions(folder: Path) -> None:
    save_model(
        RobertaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, is_decoder=True), folder
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_config, "no base"),
        (_encoder_decoder, "encoder-decoder"),
        (_cut_weights, "cannot"),
        (_other_positions, "RobertaForCausalLM (roberta) cannot be served, because it cannot be proved"),
    ],
)
def test_a_base_that_cannot_be_served_is_fatal_with_a_sentence(
    tmp_path: Path, spawn: Callable[[], EngineClient], spoil: Callable[[Path], None], words: str
) -> None:
    folder = save_base("llama", tmp_path / "base")
    spoil(folder)
    client = spawn()
    client.start(folder)
    assert words in client.wait_for(protocol.Fatal).message
    assert client.status() == 2


def test_memory_that_the_system_refuses_is_fatal_with_the_remedy(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(process, "GOODBYE_SECONDS", None)  # this process goes on without an engine
    monkeypatch.setattr(process, "_start", refuse)
    before = sys.getswitchinterval()
    ours, theirs = socket.socketpair()
    try:
        ours.sendall(protocol.encode(protocol.Start(protocol.EngineConfig(base_folder=str(base)))))
        assert process.run_engine(theirs) == 2
        (payload,) = FrameReader().feed(ours.recv(1 << 16))
    finally:
        ours.close()
        sys.setswitchinterval(before)
    fatal = protocol.to_api_decoder().decode(payload)
    assert isinstance(fatal, protocol.Fatal)
    assert fatal.message.startswith("the system refuses more memory or threads (std::bad_alloc): ")
    assert "ulimit -v" in fatal.message


def test_memory_that_is_refused_while_a_config_is_read_says_nothing_of_the_base(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(MemoryError):
        read_config(base)


def test_too_little_kv_memory_is_fatal_and_names_the_setting(
    base: Path, spawn: Callable[[], EngineClient]
) -> None:
    client = spawn()
    client.start(base, kv_memory=100)
    assert "--kv-memory" in client.wait_for(protocol.Fatal).message
    assert client.status() == 2


def test_a_request_streams_its_tokens_and_ends_once(shared: EngineClient) -> None:
    shared.send(submit("plain", [5, 6, 7], max_tokens=6, logprobs=1))
    outputs = shared.outputs("plain", 1)
    assert [len(output.tokens) for output in outputs] == [1] * 6
    assert [output.finish for output in outputs] == [None] * 5 + ["length"]
    assert outputs[0].cached_tokens == 0
    assert outputs[0].queue_seconds is not None
    assert all(o.logprobs and o.logprobs[0].top[0][0] == o.tokens[0] for o in outputs)


def test_choices_share_the_prompt_and_draw_for_themselves(shared: EngineClient) -> None:
    prompt = list(range(3, 43))
    shared.send(submit("two", prompt, n=2, temperature=2.0, seed=3, max_tokens=8))
    outputs = shared.outputs("two", 2)
    first = {o.choice: o.cached_tokens for o in outputs if o.cached_tokens is not None}
    assert first == {0: 0, 1: 32}
    assert len(tokens(outputs, 0)) == len(tokens(outputs, 1)) == 8
    assert tokens(outputs, 0) != tokens(outputs, 1)


def test_one_choice_can_be_cancelled_while_the_other_goes_on(shared: EngineClient) -> None:
    shared.send(submit("pair", [8, 9], n=2, max_tokens=60), protocol.Cancel("pair", 0))
    outputs = shared.outputs("pair", 2)
    ends = {output.choice: output.finish for output in outputs if output.finish}
    assert ends == {0: "cancelled", 1: "length"}
    assert len(tokens(outputs, 1)) == 60
    shared.send(protocol.Cancel("pair"), protocol.Cancel("unknown"), submit("after", [4], max_tokens=1))
    assert shared.outputs("after", 1)[-1].finish == "length"


def test_an_adapter_acts_once_loaded_and_is_refused_once_unloaded(
    shared: EngineClient, adapter: Path
) -> None:
    prompt = [5, 6, 7, 8]
    shared.send(submit("before", prompt, adapters=("d",)))
    assert shared.outputs("before", 1)[0].error_code == "adapter_not_loaded"
    shared.send(load("d", adapter))
    loaded = shared.wait_for(protocol.AdapterLoaded)
    assert loaded.digest == "d"
    assert loaded.bytes > 0
    shared.send(submit("bare", prompt), submit("adapted", prompt, adapters=("d",), max_tokens=40))
    # Unloaded while in use: the running row keeps it to its end.
    shared.send(protocol.UnloadAdapter("d"), submit("late", prompt, adapters=("d",)))
    outputs: dict[str, list[SequenceOutput]] = {"bare": [], "adapted": [], "late": []}
    unloaded: list[str] = []
    while sum(o.finish is not None for found in outputs.values() for o in found) < 3 or not unloaded:
        message = shared.receive()
        if isinstance(message, protocol.AdapterUnloaded):
            assert outputs["adapted"], "not before its row has run"
            unloaded.append(message.digest)
        for output in message.outputs if isinstance(message, protocol.StepResult) else ():
            outputs[output.id].append(output)
    assert len(tokens(outputs["adapted"])) == 40
    assert tokens(outputs["adapted"])[:16] != tokens(outputs["bare"])
    assert outputs["late"][0].error_code == "adapter_not_loaded"
    assert unloaded == ["d"]
    assert shared.wait_for(protocol.StepResult).stats.adapters_loaded == 0


def test_the_engine_says_which_versions_sit_in_slots(shared: EngineClient, adapter: Path) -> None:
    shared.send(load("s", adapter))
    shared.wait_for(protocol.AdapterLoaded)
    shared.send(submit("one", [5, 6], adapters=("s",), max_tokens=2))
    assert shared.wait_for(protocol.SlotsChanged).digests == ["s"]
    shared.outputs("one", 1)
    shared.send(protocol.UnloadAdapter("s"))
    assert shared.wait_for(protocol.SlotsChanged).digests == []


def test_a_version_that_is_unloaded_while_it_loads_is_never_served(
    shared: EngineClient, adapter: Path
) -> None:
    shared.send(load("u", adapter), protocol.UnloadAdapter("u"))
    assert shared.wait_for(protocol.AdapterUnloaded).digest == "u"
    shared.send(submit("none", [5], adapters=("u",)))
    assert shared.outputs("none", 1)[0].error_code == "adapter_not_loaded"


@pytest.mark.parametrize("fault", ["missing", "another content", "cut"])
def test_a_prepared_file_that_is_not_the_proven_one_fails_alone(
    shared: EngineClient, adapter: Path, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "prepared"
    content = bytearray(adapter.read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    if fault == "another content":
        content[-1] ^= 1
    if fault != "missing":
        path.write_bytes(content[:-1] if fault == "cut" else content)
    shared.send(protocol.LoadAdapter("x", str(path), sha256))
    failed = shared.wait_for(protocol.AdapterFailed)
    assert (failed.digest, failed.code) == ("x", "damaged")
    shared.send(submit("base", [5], max_tokens=1))
    assert shared.outputs("base", 1)[-1].finish == "length"


def linear(size_in: int, size_out: int) -> LoraWeights:
    return LoraWeights(torch.ones(2, size_in), torch.ones(size_out, 2), 1.0)


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        ("model.layers.0.mixer.q_proj", linear(128, 128)),
        ("model.layers.0.self_attn.q_proj", linear(128, 129)),
        ("model.layers.0.self_attn.q_proj", linear(129, 128)),
        ("model.norm", linear(128, 128)),
        ("model.norm", SavedModule(torch.ones(129))),
        ("model.embed_tokens", linear(320, 128)),
        ("model.embed_tokens", TokenRows(torch.tensor([320]), torch.ones(1, 128))),
        ("model.embed_tokens", TokenRows(torch.tensor([5]), torch.ones(1, 129))),
    ],
)
def test_a_proven_file_of_a_base_with_other_modules_fails_alone(
    shared: EngineClient, tmp_path: Path, module: str, weights: ModuleWeights
) -> None:
    path = tmp_path / "prepared"
    write_packed_adapter(path, {module: weights}, base_id="b")
    shared.send(load("odd", path))
    while not isinstance(answer := shared.receive(), protocol.AdapterFailed | protocol.AdapterLoaded):
        pass
    shared.send(submit("odd", [5], adapters=("odd",), max_tokens=1), submit("base", [5], max_tokens=1))
    assert shared.outputs("base", 1)[-1].finish == "length"
    assert isinstance(answer, protocol.AdapterFailed)
    assert answer.code == "damaged"
    assert module in answer.message


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (submit("bad", [5] * 250, max_tokens=10), "max_tokens"),
        (submit("bad", []), "prompt"),
        (submit("bad", [5, -1]), "prompt"),
        (submit("bad", [5, 320]), "prompt"),
        (submit("bad", [5], logit_bias={320: 1.0}), "logit_bias"),
        (submit("bad", [5], stop_token_ids=(-7,), min_tokens=1), "stop_token_ids"),
        (submit("bad", [5], adapters=("nobody",)), "adapter"),
    ],
)
def test_a_request_that_can_never_run_names_its_field_and_harms_no_other(
    shared: EngineClient, request_: protocol.Submit, param: str
) -> None:
    shared.send(submit("good", [9, 8, 7], max_tokens=30), request_)
    ends: dict[str, SequenceOutput] = {}
    while len(ends) < 2:
        ends |= {o.id: o for o in shared.wait_for(protocol.StepResult).outputs if o.finish}
    assert ends["good"].finish == "length"
    assert (ends["bad"].finish, ends["bad"].error_param) == ("error", param)
    assert ends["bad"].error_message


def test_a_request_id_that_is_running_already_is_ignored(shared: EngineClient) -> None:
    shared.send(submit("twice", [5, 6], max_tokens=20), submit("twice", [7, 8], max_tokens=3))
    assert len(tokens(shared.outputs("twice", 1))) == 20
    shared.send(submit("next", [5], max_tokens=1))
    while not (step := shared.wait_for(protocol.StepResult)).outputs:
        pass
    assert {output.id for output in step.outputs} == {"next"}


@pytest.mark.parametrize("changes", [{"quantization": "none"}, {"quantization": "int8"}])
def test_weights_are_kept_unpacked_only_where_they_are_unpacked(changes: dict[str, Any]) -> None:
    class Channel:
        def send(self, message: object) -> None: ...

    config = protocol.EngineConfig(base_folder="nowhere", device="cpu", cpu_weights="bf16", **changes)
    channel: Any = Channel()
    with pytest.raises(UnsupportedBaseError, match="for 4-bit weights on a CPU"):
        process._start(config, channel, None)


def test_it_is_told_how_processes_share_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    gpu = torch.device("cuda")
    with caplog.at_level("INFO"):
        assert process._gpu_sharing(torch.device("cpu")) == ""
        assert not caplog.messages
        assert process._gpu_sharing(gpu) == "time slices"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
            daemon.bind(str(tmp_path / "control"))
            daemon.listen()
            assert process._gpu_sharing(gpu) == "mps"
    said = caplog.messages
    assert "nvidia-cuda-mps-control -d" in said[0]
    assert said[1:] == ["the processes share the GPU by MPS, at once"]
