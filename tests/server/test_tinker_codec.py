"""Messages of the Tinker API against those that its own client writes and reads."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
import torch
import zstandard
from tinker.proto import tinker_public_pb2
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from onebase_edge.errors import BodyTooLargeError, InvalidRequestError
from onebase_server.live import codec
from onebase_server.live.codec import SampledSequence, SampleResult
from onebase_training.live_operations import Computed, DenseArray

MOST = 1_000_000
"""Bytes that sparse tensors may take."""


def body_of(*data: tinker.Datum, loss: Any = "ppo", **config: float | str) -> bytes:
    """What the client sends."""
    given = tinker.types.ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config or None)
    request = tinker.types.ForwardBackwardRequest(
        forward_backward_input=given, model_id="run:train:0", seq_id=7
    )
    encoded: bytes = forward_backward_request_to_proto(request).SerializeToString()
    return encoded


def datum(*tokens: int, **inputs: tinker.TensorData) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def test_a_pass_arrives_as_the_client_meant_it() -> None:
    weights = np.array([0.5, -1.25, 0.0], np.float32)
    targets = np.array([2, 3, 49_151], np.int64)
    body = body_of(
        datum(
            1, 2, 3,
            target_tokens=tinker.TensorData.from_numpy(targets),
            weights=tinker.TensorData.from_numpy(weights),
        ),
        clip_low_threshold=0.8, mode="strict",
    )  # fmt: skip
    read = codec.read_pass(body, MOST)
    assert (read.model_id, read.seq_id) == ("run:train:0", 7)
    assert read.operation is not None
    assert read.operation.loss == "ppo"
    assert not read.operation.forward_only
    assert read.operation.config == {"clip_low_threshold": 0.8, "mode": "strict"}
    (row,) = read.operation.data
    assert np.frombuffer(row.tokens, "<i4").tolist() == [1, 2, 3]
    assert (row.inputs["weights"].array() == weights).all()
    assert (row.inputs["target_tokens"].array() == targets).all()


def test_a_sparse_tensor_arrives_dense() -> None:
    dense = torch.zeros(6, 8, dtype=torch.int64)
    dense[1, 2], dense[4, 7], dense[4, 0] = 5, 6, 7
    sparse = tinker.TensorData.from_torch_sparse(dense)
    assert sparse.sparse_crow_indices is not None
    read = codec.read_pass(body_of(datum(*range(6), target_tokens=sparse)), MOST)
    assert read.operation is not None
    assert read.operation.data[0].inputs["target_tokens"].array().tolist() == dense.tolist()


def test_an_image_is_refused_by_name_and_keeps_its_place_in_the_order() -> None:
    image = tinker.types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=3)
    one = tinker.Datum(model_input=tinker.ModelInput(chunks=[image]), loss_fn_inputs={})
    read = codec.read_pass(body_of(one), MOST)
    assert read.operation is None
    assert read.seq_id == 7
    assert read.refused.startswith("data[0].model_input: image is not served")


def test_a_tensor_that_lies_about_its_shape_is_refused() -> None:
    message = tinker_public_pb2.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    tensor = message.data.add().loss_fn_inputs["weights"]
    tensor.dtype = tinker_public_pb2.DTYPE_FLOAT32

    def refusal(*shape: int) -> str:
        tensor.shape[:] = shape
        return codec.read_pass(message.SerializeToString(), MOST).refused

    tensor.dense = b"\0" * 8
    assert "weights: its shape [3]" in refusal(3)
    tensor.dense = b"\0" * 4
    assert "weights: it has 65 dimensions" in refusal(*[1] * 65)
    tensor.dense = b""
    assert "weights: it has 3 dimensions" in refusal(0, 2**62, 2**62)
    assert "does not fit its 0 values" in refusal(0, 2**62)
    tensor.sparse_csr.values = b"\0" * 4
    tensor.sparse_csr.crow_indices = np.array([0, 1], np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.array([9], np.int64).tobytes()
    assert "do not fit its shape [1, 4]" in refusal(1, 4)
    assert "may take 1000000 bytes" in refusal(1, 2**62)
    tensor.sparse_csr.values = tensor.sparse_csr.col_indices = b""
    tensor.sparse_csr.crow_indices = np.array([0], np.int64).tobytes()
    assert "may take 1000000 bytes" in refusal(0, 2**62)


def test_the_sparse_tensors_of_a_request_have_one_limit_together() -> None:
    message = tinker_public_pb2.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(4):
        tensor = message.data.add().loss_fn_inputs["weights"]
        tensor.dtype = tinker_public_pb2.DTYPE_FLOAT32
        tensor.shape.extend([1, 1000])
        tensor.sparse_csr.crow_indices = np.array([0, 0], np.int64).tobytes()
    assert codec.read_pass(message.SerializeToString(), 16_000).operation is not None
    refused = codec.read_pass(message.SerializeToString(), 15_999)
    assert refused.refused.startswith("data[3].loss_fn_inputs.weights: the sparse tensors")


def test_maps_that_were_filled_in_another_order_are_the_same_operation_or_refusal() -> None:
    names = [f"name_{number:02}" for number in range(32)]

    def read(order: list[str], length: int) -> codec.PassRequest:
        message = tinker_public_pb2.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="ppo")
        inputs = message.data.add().loss_fn_inputs
        for name in order:
            message.loss_fn_config_v2[name].text = name
            inputs[name].dtype = tinker_public_pb2.DTYPE_FLOAT32
            inputs[name].shape.append(length)
            inputs[name].dense = b"\0" * 4
        return codec.read_pass(message.SerializeToString(), MOST)

    orders = names, names[::-1]
    passes = [read(order, 1) for order in orders]
    assert len({msgspec.msgpack.encode(one) for one in passes}) == 1
    assert passes[0].operation is not None
    assert list(passes[0].operation.config) == list(passes[0].operation.data[0].inputs) == names
    refused = "data[0].loss_fn_inputs.name_00: its shape [3] does not fit its 1 values."
    assert [read(order, 3).refused for order in orders] == [refused] * 2


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no ForwardBackwardRequest"):
        codec.read_pass(b"\xff" * 40, MOST)


def test_a_compressed_body_may_not_grow_beyond_the_limit() -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(b"a" * 5_000_000)
    assert codec.decompressed(packed, 5_000_000) == b"a" * 5_000_000
    with pytest.raises(BodyTooLargeError):
        codec.decompressed(packed, 4_999_999)
    with pytest.raises(InvalidRequestError, match="cannot be decompressed"):
        codec.decompressed(b"no zstd", 100)


def test_results_of_rows_of_any_width_are_what_the_client_reads() -> None:
    arrays: list[Any] = [
        np.full((3,), -1.5, np.float32),
        np.arange(8, dtype=np.float32).reshape(4, 2),
        np.zeros((0,)),
    ]
    outputs = [{"logprobs": DenseArray.of(one)} for one in arrays]
    computed = Computed(outputs=outputs, metrics={"loss:sum": 4.5}, tokens=7, seconds=0.1)
    read = deserialize_forward_backward_output(codec.write_pass(computed))
    assert read.metrics == {"loss:sum": 4.5}
    made = [one["logprobs"].to_numpy() for one in read.loss_fn_outputs]
    assert [one.shape for one in made] == [(3,), (4, 2), (0,)]
    assert all((one == other).all() for one, other in zip(made, arrays, strict=True))


def test_a_sample_is_what_the_client_reads() -> None:
    result = SampleResult(
        sequences=[
            SampledSequence([5, 6], [-0.5, -1.0], True, [[(5, -0.5)], [(6, -1.0), (7, -2.0)]]),
            SampledSequence([8], [-3.0], False, [[]]),
        ],
        cached=16,
        prompt_logprobs=[None, -0.25],
        prompt_top=[[], [(9, -0.25)]],
        targets={"shape": (1, 2), "values": [-4.0, 0.0]},
        top_width=2,
        prompt_top_width=1,
    )
    read = deserialize_sample_response(codec.write_sample(result))
    assert [one.stop_reason for one in read.sequences] == ["stop", "length"]
    assert read.sequences[0].tokens == [5, 6]
    assert read.sequences[0].logprobs == [-0.5, -1.0]
    assert read.sequences[0].topk_logprobs == [[(5, -0.5)], [(6, -1.0), (7, -2.0)]]
    assert read.prompt_logprobs == [None, -0.25]
    assert read.topk_prompt_logprobs == [None, [(9, -0.25)]]
    assert read.target_prompt_logprobs is not None
    assert read.target_prompt_logprobs.to_numpy().tolist() == [[-4.0, 0.0]]
    assert read.prompt_cache_hit_tokens == 16


@pytest.mark.parametrize("number", [1, 127, 128, 70_000, 2**31 - 1])
def test_the_place_of_a_pass_is_read_from_its_beginning(number: int) -> None:
    row = datum(*range(200))
    given = tinker.types.ForwardBackwardInput(data=[row], loss_fn="ppo")
    request = tinker.types.ForwardBackwardRequest(
        forward_backward_input=given, model_id="run:train:0", seq_id=number
    )
    body = forward_backward_request_to_proto(request).SerializeToString()
    packed = zstandard.ZstdCompressor().compress(body)
    assert codec.read_place(body[:300], False) == ("run:train:0", number)
    assert codec.read_place(packed, True) == ("run:train:0", number)
    for other in (b"", b"x" * 300, b"\x0a\x7f" + b"x" * 300, b"\x0a\x01a\x10" + b"\xff" * 300):
        assert codec.read_place(other, False) is None
    assert codec.read_place(b"x" * 300, True) is None
