"""Frames survive any cut of the byte stream, and every message comes back as it was sent."""

from __future__ import annotations

import struct
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_engine.engine import messages as protocol
from onebase_engine.engine.messages import (
    MAX_MESSAGE_BYTES,
    FrameReader,
    encode,
    to_api_decoder,
    to_engine_decoder,
)

SAMPLING = protocol.Sampling(
    temperature=0.5, logit_bias={3: -1.5}, seed=2**63, stop_token_ids=(1, 2), logprobs=2, prompt_logprobs=0
)
STATS = protocol.Stats(
    sequences_running=1,
    sequences_waiting=2,
    kv_blocks_free=3,
    kv_blocks_cached=4,
    kv_blocks_total=5,
    slots_used=6,
    steps=7,
    preemptions=8,
    prompt_tokens=9,
    generated_tokens=10,
    cached_tokens=11,
    adapters_loaded=12,
)
ROW = protocol.SequenceOutput(
    id="r",
    choice=1,
    tokens=[5, 6],
    logprobs=[protocol.ScoredToken(5, -0.5, [(5, -0.5), (7, -1.5)])],
    prompt_logprobs=[protocol.ScoredToken(9, -2.0, [])],
    finish="error",
    stop_token=6,
    cached_tokens=16,
    queue_seconds=0.25,
    error_code="code",
    error_message="überrascht",
    error_param="prompt",
)
BASE = protocol.BaseInfo(
    architecture="LlamaForCausalLM",
    parameters=1,
    quantization="nf4",
    dtype="bfloat16",
    device="cpu",
    base_bytes=2,
    kv_bytes=3,
    kv_blocks=4,
    kv_groups=2,
    kv_tokens=48,
    kv_longest=40,
    block_size=16,
    max_length=5,
    max_sequences=6,
    max_slots=7,
    max_rank=8,
    vocab_size=9,
    load_seconds=0.5,
)
TO_ENGINE: list[protocol.ToEngine] = [
    protocol.Start(protocol.EngineConfig(base_folder="/b", quantization="int8", kv_memory=2**40)),
    protocol.Submit(
        id="r", prompt=[1, 2], sampling=SAMPLING, adapters=[protocol.AdapterRef("d", 0.5)], n=3, tenant="t"
    ),
    protocol.Submit(id="v", prompt=[1], sampling=SAMPLING, pooling=protocol.Pooling("mean")),
    protocol.Submit(id="b", prompt=[1], sampling=SAMPLING, n=2, branches=[[2], [3, 4]]),
    protocol.Submit(id="g", prompt=[1], sampling=SAMPLING, n=3, resume_tokens={0: [2, 3], 2: []}),
    protocol.Cancel("r", 1),
    protocol.Cancel("r"),
    protocol.LoadAdapter("d", "/a", "0" * 64),
    protocol.UnloadAdapter("d"),
    protocol.Pause(paused=True),
    protocol.Shutdown(),
]
TO_API: list[protocol.ToApi] = [
    protocol.Loading("base", 0.5),
    protocol.Ready(BASE),
    protocol.Fatal("no"),
    protocol.AdapterLoaded(digest="d", bytes=2, load_seconds=0.5),
    protocol.AdapterUnloaded("d"),
    protocol.SlotsChanged(["d", "e"], {"e": 0.25}),
    protocol.AdapterFailed(digest="d", code="c", message="m"),
    protocol.StepResult(
        [ROW, protocol.SequenceOutput(id="s"), protocol.SequenceOutput(id="v", vector=b"1234")], STATS, 0.5
    ),
]


def test_the_examples_here_cover_every_message_type() -> None:
    assert {type(message) for message in TO_ENGINE} == set(get_args(protocol.ToEngine))
    assert {type(message) for message in TO_API} == set(get_args(protocol.ToApi))


@given(st.data())
def test_messages_come_back_whole_from_any_cut_of_the_stream(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(TO_ENGINE), max_size=6))
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader, decoder = FrameReader(), to_engine_decoder()
    read = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read += [decoder.decode(payload) for payload in reader.feed(stream[start:stop])]
    assert read == messages


def test_messages_come_back_whole_byte_by_byte() -> None:
    reader, decoder = FrameReader(), to_api_decoder()
    stream = b"".join(encode(message) for message in TO_API)
    read = [decoder.decode(p) for byte in stream for p in reader.feed(bytes([byte]))]
    assert read == TO_API


def test_a_frame_over_the_limit_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(ValueError, match=str(MAX_MESSAGE_BYTES)):
        FrameReader().feed(struct.pack("<I", MAX_MESSAGE_BYTES + 1))


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ValueError, match="over"):
        encode(protocol.Fatal("x" * MAX_MESSAGE_BYTES))


def test_each_side_refuses_the_other_sides_messages() -> None:
    (payload,) = FrameReader().feed(encode(protocol.Fatal("no")))
    with pytest.raises(msgspec.ValidationError):
        to_engine_decoder().decode(payload)
