"""The Tinker API's protocol buffers: forward and backward passes in, their results and samples out.

The messages are those of its client's package, of which only this one module is loaded: the package itself
imports torch, which this process leaves out.
"""

from __future__ import annotations

import importlib.util
import math
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from onebase_edge.errors import BodyTooLargeError, InvalidRequestError
from onebase_training.live_operations import Computed, Datum, DenseArray, ForwardBackward

MEDIA_TYPE = "application/x-protobuf"
MISSING_LOGPROB = -99999.0
"""Log-probability of an empty cell among the most likely tokens."""
DENSE_TIMES = 8
"""Size that the sparse tensors of a body may have once they are dense, in times the largest body."""
_PART = 1 << 20
_MOST_DIMENSIONS = 2
_HEAD, _SECOND, _MORE = 160, 0x10, 0x80
"""Bytes that hold a request's place; the tag of a number in field 2; the bit of a number that goes on."""
_WIDTH = {"float32": 4, "int64": 8}
_INTS, _LONGS, _FLOATS = "i", "q", "f"


@cache
def messages() -> Any:
    """Return the module of the messages. Raises InvalidRequestError if the package is not installed."""
    found = importlib.util.find_spec("tinker")
    for folder in () if found is None else found.submodule_search_locations or ():
        file = Path(folder) / "proto" / "tinker_public_pb2.py"
        spec = importlib.util.spec_from_file_location("onebase_server.live.tinker_public_pb2", file)
        if file.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise InvalidRequestError(
        "This server lacks the Tinker API's protocol buffers. Its operator installs them with "
        "pip install 'onebase[tinker]'.",
        code="not_installed",
    )


class RefusedOperationError(Exception):
    """A request that has a place in its run's order and cannot be computed. `message` names the field."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class PassRequest(msgspec.Struct, frozen=True):
    """A forward pass, with or without a backward pass, and its place in its run's order. operation: None if
    it was refused."""

    model_id: str
    seq_id: int
    operation: ForwardBackward | None
    refused: str = ""


def decompressed(body: bytes, most: int) -> bytes:
    """Return a body that was compressed by zstd. Raises InvalidRequestError, BodyTooLargeError."""
    import zstandard

    pieces, size = [], 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            while piece := reader.read(_PART):
                size += len(piece)
                if size > most:
                    raise BodyTooLargeError(most)
                pieces.append(piece)
    except zstandard.ZstdError as error:
        raise InvalidRequestError(f"The body cannot be decompressed: {error}.") from error
    return b"".join(pieces)


def read_pass(body: bytes, most: int) -> PassRequest:
    """Read the body of /forward_backward. Raises InvalidRequestError if not even its place can be read.

    Maps are read in the order of their names: a message that is encoded again may have another order, and is
    the same operation or refusal.

    most: bytes that all sparse tensors together may take once they are dense.
    """
    wire = messages()
    message = wire.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # a class of its own in each of protobuf's back-ends
        raise InvalidRequestError(f"The body is no ForwardBackwardRequest: {error}.") from error
    config: dict[str, float | str] = dict(message.loss_fn_config)
    config |= {
        name: value.text if value.WhichOneof("value") == "text" else value.number
        for name, value in message.loss_fn_config_v2.items()
    }
    room = _Room(most)
    try:
        data = [_datum(wire, index, datum, room) for index, datum in enumerate(message.data)]
    except RefusedOperationError as error:
        return PassRequest(message.model_id, message.seq_id, None, error.message)
    operation = ForwardBackward(
        data=data,
        loss=message.loss_fn,
        config=dict(sorted(config.items())),
        forward_only=message.forward_only,
    )
    return PassRequest(message.model_id, message.seq_id, operation)


class _Room:
    """Bytes that the sparse tensors of one request may still take."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def reserve(self, place: str, size: int) -> None:
        """Raises RefusedOperationError."""
        if size > self._left:
            raise RefusedOperationError(
                f"{place}: the sparse tensors of one request may take {self._most} bytes when dense. "
                "Send fewer rows, or narrower tensors."
            )
        self._left -= size


def _datum(wire: Any, index: int, message: Any, room: _Room) -> Datum:
    place = f"data[{index}]"
    tokens = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text" or len(chunk.encoded_text.tokens) % 4:
            raise RefusedOperationError(
                f"{place}.model_input: {kind or 'an empty chunk'} is not served, for this server's bases "
                "read text alone. Send encoded_text."
            )
        tokens.append(chunk.encoded_text.tokens)
    inputs = {
        name: _tensor(wire, f"{place}.loss_fn_inputs.{name}", tensor, room)
        for name, tensor in sorted(message.loss_fn_inputs.items())
    }
    return Datum(tokens=b"".join(tokens), inputs=inputs)


def _tensor(wire: Any, place: str, message: Any, room: _Room) -> DenseArray:
    kinds: dict[int, Literal["float32", "int64"]] = {wire.DTYPE_FLOAT32: "float32", wire.DTYPE_INT64: "int64"}
    kind, shape = kinds.get(message.dtype), tuple(message.shape)
    if kind is None:
        raise RefusedOperationError(f"{place}: its dtype is not served. Send float32 or int64.")
    if len(shape) > _MOST_DIMENSIONS:
        raise RefusedOperationError(
            f"{place}: it has {len(shape)} dimensions. Send {_MOST_DIMENSIONS} at most."
        )
    if message.HasField("sparse_csr"):
        csr = message.sparse_csr
        crow, columns = _numbers(_LONGS, csr.crow_indices), _numbers(_LONGS, csr.col_indices)
        cells = dense_cells(place, shape, crow, columns)
        width = _WIDTH[kind]
        if len(csr.values) != len(cells) * width:
            raise RefusedOperationError(f"{place}: it has another number of values than of columns.")
        room.reserve(place, max(1, shape[0]) * shape[1] * width)
        data = bytearray(shape[0] * shape[1] * width)
        for number, cell in enumerate(cells):
            data[cell * width : (cell + 1) * width] = csr.values[number * width : (number + 1) * width]
        return DenseArray(dtype=kind, shape=shape, data=bytes(data))
    count = len(message.dense) // _WIDTH[kind]
    shape = shape or (count,)
    fits = min(shape) >= 0 and math.prod(shape) * _WIDTH[kind] == len(message.dense)
    if not fits or (not count and any(shape)):
        raise RefusedOperationError(f"{place}: its shape {list(shape)} does not fit its {count} values.")
    return DenseArray(dtype=kind, shape=shape, data=message.dense)


def dense_cells(place: str, shape: Sequence[int], crow: Sequence[int], columns: Sequence[int]) -> list[int]:
    """Return the places of a sparse matrix's values in the dense one, row by row.

    Raises RefusedOperationError.
    """
    fits = len(shape) == 2 and min(shape) >= 0 and len(crow) == shape[0] + 1 and crow[0] == 0
    fits = fits and crow[-1] == len(columns) and all(a <= b for a, b in pairwise(crow))
    if not fits or not all(0 <= column < shape[1] for column in columns):
        raise RefusedOperationError(f"{place}: its rows and columns do not fit its shape {list(shape)}.")
    return [
        row * shape[1] + column for row in range(shape[0]) for column in columns[crow[row] : crow[row + 1]]
    ]


def _numbers(kind: str, data: bytes) -> list[int]:
    numbers: array[int] = array(kind)
    numbers.frombytes(data[: len(data) // numbers.itemsize * numbers.itemsize])
    return numbers.tolist()


def write_pass(computed: Computed) -> bytes:
    """Return the message of a pass's result. Outputs of equal width are one record."""
    wire = messages()
    message = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics.update(computed.metrics)
    for _, group in groupby(computed.outputs, key=_form):
        outputs = list(group)
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
        for name, first in outputs[0].items():
            tensors = [output[name] for output in outputs]
            offsets = [0]
            for tensor in tensors:
                offsets.append(offsets[-1] + len(tensor.data))
            batched = record.fields[name]
            batched.data = b"".join(tensor.data for tensor in tensors)
            batched.offsets = array(_LONGS, offsets).tobytes()
            batched.dtype = wire.DTYPE_INT64 if first.dtype == "int64" else wire.DTYPE_FLOAT32
            batched.trailing_shape.extend(first.shape[1:])
    encoded: bytes = message.SerializeToString()
    return encoded


def _form(output: Mapping[str, DenseArray]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in output.items()]


class SampledSequence(msgspec.Struct, frozen=True):
    """One sampled sequence. top: the most likely tokens at each place, if they were asked for."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    top: list[list[tuple[int, float]]] | None = None


class SampleResult(msgspec.Struct, frozen=True):
    """Result of a sample. prompt_logprobs: one for each of the prompt's tokens, None where there is none;
    targets: those of named tokens, as a tensor of the form that was asked for."""

    sequences: list[SampledSequence]
    cached: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top: list[list[tuple[int, float]]] | None = None
    targets: Mapping[str, Any] | None = None
    top_width: int = 0
    prompt_top_width: int = 0


def write_sample(result: SampleResult) -> bytes:
    """Return the message of a sample."""
    wire = messages()
    message = wire.SampleResponse(prompt_cache_hit_tokens=result.cached)
    for sampled in result.sequences:
        sequence = message.sequences.add(
            stop_reason=wire.STOP_REASON_STOP if sampled.stopped else wire.STOP_REASON_LENGTH,
            tokens=array(_INTS, sampled.tokens).tobytes(),
            logprobs=array(_FLOATS, sampled.logprobs).tobytes(),
        )
        if sampled.top is not None:
            _write_top(sequence.topk_sampled_logprobs, sampled.top, result.top_width)
    if result.prompt_logprobs is not None:
        nan = float("nan")
        values = [nan if value is None else value for value in result.prompt_logprobs]
        message.prompt_logprobs = array(_FLOATS, values).tobytes()
    if result.prompt_top is not None:
        _write_top(message.topk_prompt_logprobs, result.prompt_top, result.prompt_top_width)
    if result.targets is not None:
        _write_targets(wire, message.target_prompt_logprobs, result.targets)
    encoded: bytes = message.SerializeToString()
    return encoded


def _write_top(message: Any, rows: Sequence[Sequence[tuple[int, float]]], width: int) -> None:
    tokens: array[int] = array(_INTS)
    logprobs: array[float] = array(_FLOATS)
    for row in rows:
        missing = width - len(row)
        tokens.extend([token for token, _ in row] + [0] * missing)
        logprobs.extend([value for _, value in row] + [MISSING_LOGPROB] * missing)
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()
    message.k, message.length = width, len(rows)


def _write_targets(wire: Any, message: Any, targets: Mapping[str, Any]) -> None:
    message.dtype = wire.DTYPE_FLOAT32
    message.shape.extend(targets["shape"])
    values = array(_FLOATS, targets["values"]).tobytes()
    if targets.get("crow") is None:
        message.dense = values
        return
    message.sparse_csr.values = values
    message.sparse_csr.crow_indices = array(_LONGS, targets["crow"]).tobytes()
    message.sparse_csr.col_indices = array(_LONGS, targets["columns"]).tobytes()


def read_place(body: bytes, compressed: bool) -> tuple[str, int] | None:
    """Return the run and the number with which a ForwardBackwardRequest begins; None if it does not, as the
    client's do."""
    head = body[:_HEAD]
    if compressed:
        import zstandard

        try:
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                head = reader.read(_HEAD)
        except zstandard.ZstdError:
            return None
    if head[:1] != b"\x0a" or len(head) < _HEAD or head[1] >= _MORE:  # field 1, its length in one byte
        return None
    end, number, shift = 2 + head[1], 0, 0
    if head[end] != _SECOND:
        return None
    for byte in head[end + 1 : end + 10]:
        number |= (byte & (_MORE - 1)) << shift
        shift += 7
        if byte < _MORE:
            return head[2:end].decode(errors="replace"), number
    return None
