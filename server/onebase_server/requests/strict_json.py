"""JSON as the standard says it, and no more of it than a request can need.

Everything is decided before a model looks at the values: a validator's work for a wrong value is many times
the parser's. Neither of the two readers lets another thread run while it reads numbers, for 20 to 60 ms in
2 MB of them, so that long bodies are read in processes apart, which leave the cores to the engine.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from onebase_edge.background import Threads
from onebase_edge.errors import ContextLengthError, InvalidRequestError, UnavailableError
from onebase_server.processes.helper import HelperProcess, serve_calls, take_pipes

MAX_FIELDS = 50_000
"""Largest number of objects and their fields in one body: a long conversation has about four a message."""
BYTES_PER_VALUE = 4
"""Number of bytes of `--max-body` for each value that a body may hold: a usual token id takes more."""
READERS = 2
"""Number of processes that read long bodies. One tenant has one of them at a time."""
READING_SECONDS = 30.0
"""Longest time, in seconds, of reading a body while there is no processor for it."""

_COMMAND = [sys.executable, "-P", "-m", "onebase_server.requests.strict_json"]


def decode(body: bytes, max_body: int) -> Any:
    """Return the body's value. Raises json.JSONDecodeError, and InvalidRequestError for JSON that is
    refused."""
    most = max(1000, max_body // BYTES_PER_VALUE)
    if sum(map(body.count, b",[{")) > most:
        raise InvalidRequestError(
            f"The body holds over {most} values. Send fewer, or raise --max-body.", code="too_many_values"
        )
    _check_fields(body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from error


class BodyReaders:
    """Processes that read long bodies. Used in one event loop; tenants take turns.

    helpers: processes to use; None: new ones.
    """

    def __init__(self, helpers: Sequence[HelperProcess] | None = None) -> None:
        self.helpers = tuple(HelperProcess() for _ in range(READERS)) if helpers is None else helpers
        self._threads = Threads("bodies", len(self.helpers), each=1)
        self._free = deque(self.helpers)
        self._closed = False

    async def decode(self, tenant: str, body: bytes, max_body: int, max_length: int) -> Any:
        """Return the body's value.

        Raises what `decode` raises, ContextLengthError for a prompt of more than `max_length` token ids, and
        UnavailableError if no process can read it.
        """
        return await self._threads.run_for(tenant, self._decode, body, max_body, max_length)

    def close(self) -> None:
        """End the processes. What they read is answered as if they could not be used."""
        self._closed = True
        for helper in self.helpers:
            helper.kill()

    def _decode(self, body: bytes, max_body: int, max_length: int) -> Any:
        call = max_body.to_bytes(8) + max_length.to_bytes(8) + body
        helper = self._free.popleft()  # there is one for each thread
        try:
            # A number of two bytes, its comma included, takes up to nine as MessagePack.
            answer = self._answer(helper, call, 5 * len(body) + (1 << 16))
        finally:
            self._free.appendleft(helper)
        kind, payload = answer[:1], memoryview(answer)[1:]
        if kind == _VALUE:
            return msgspec.msgpack.decode(payload, ext_hook=_long_integer)
        said = msgspec.msgpack.decode(payload)
        if kind == _NO_JSON:
            raise json.JSONDecodeError(said, "", 0)
        if kind == _TOO_LONG:
            field, tokens = said
            raise ContextLengthError(
                field, f"has {tokens} tokens", max_length, "Shorten it.", ", those of the answer with them"
            )
        message, param, code = said
        raise InvalidRequestError(message, param=param, code=code)

    def _answer(self, helper: HelperProcess, call: bytes, most_bytes: int) -> bytes:
        for last in (False, True):
            try:
                helper.start(_COMMAND)
                return helper.call(call, READING_SECONDS, most_bytes=most_bytes)
            except (OSError, ValueError) as error:  # it may have been killed from outside
                if last or self._closed or isinstance(error, TimeoutError):
                    raise UnavailableError(
                        f"The process that reads long bodies cannot be used now: {error}. Try again.",
                        code="body_unread",
                        retry_after=1.0,
                    ) from None
        raise AssertionError  # the last try returned or raised


def _check_fields(body: bytes) -> None:
    """Raise InvalidRequestError for a field that is given twice, and for too many of them; or
    JSONDecodeError.

    Only Python's reader shows the former. It keeps nothing here, and what is no JSON the other one refuses.
    """
    left = MAX_FIELDS

    def check_pairs(pairs: list[tuple[str, Any]]) -> None:
        nonlocal left
        left -= 1 + len(pairs)
        if left < 0:
            raise InvalidRequestError(
                f"The body holds over {MAX_FIELDS} fields, which no request needs. Send fewer.",
                code="too_many_values",
            )
        if len(pairs) == len(dict(pairs)):
            return
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"{name[:80]}: it is given twice. Give it once.", param=name[:80])
            seen.add(name)

    try:
        # `len` stands in for the numbers, of which nothing is needed here: to read 2 MB of them takes 0.2 s.
        json.loads(body, object_pairs_hook=check_pairs, parse_float=len, parse_int=len)
    except ValueError:
        return
    except RecursionError as error:  # the other reader may go a little deeper
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from error


# ---- the process -------------------------------------------------------------------------------------

_VALUE, _NO_JSON, _REFUSED, _TOO_LONG = b"v", b"j", b"r", b"t"
_INTEGER = 1
"""Code of MessagePack extensions that hold an integer."""


def _answer(call: bytes) -> bytes:
    max_body, max_length = int.from_bytes(call[:8]), int.from_bytes(call[8:16])
    try:
        value = decode(call[16:], max_body)
        if (found := _too_long(value, max_length)) is not None:
            return _TOO_LONG + msgspec.msgpack.encode(found)
        return _VALUE + _encoded(value)
    except json.JSONDecodeError as error:
        return _NO_JSON + msgspec.msgpack.encode(error.msg)
    except InvalidRequestError as error:
        return _REFUSED + msgspec.msgpack.encode((error.message, error.param, error.code))
    except RecursionError:
        return _NO_JSON + msgspec.msgpack.encode("it is nested too deeply")


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:
        return msgspec.msgpack.encode(_with_long_integers(value))


def _with_long_integers(value: Any) -> Any:
    """Return the value with integers of more than 64 bits as extensions, which MessagePack lacks."""
    if isinstance(value, dict):
        return {name: _with_long_integers(field) for name, field in value.items()}
    if isinstance(value, list):
        return [_with_long_integers(item) for item in value]
    if type(value) is int and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, signed=True))
    return value


def _long_integer(code: int, data: memoryview) -> int:
    return int.from_bytes(data, signed=True)


def _too_long(value: Any, max_length: int) -> tuple[str, int] | None:
    """Return the first prompt of more token ids than a text may have, its field and their number: to pass
    them on and to validate them holds up the api for longer than to say so."""
    if not isinstance(value, dict) or "truncate_prompt_tokens" in value:
        return None
    for name in ("prompt", "input"):
        if isinstance(field := value.get(name), list):
            if len(field) > max_length and type(field[0]) is int:
                return name, len(field)
            for index, ids in enumerate(field):
                if isinstance(ids, list) and len(ids) > max_length and type(ids[0]) is int:
                    return f"{name}[{index}]", len(ids)
    return None


if __name__ == "__main__":
    serve_calls(*take_pipes(), _answer)
