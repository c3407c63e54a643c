"""Resume state (transcript) that a stream has between its events, so that another server can continue it.

`onebase route` asks for it, removes it from the stream, and stores it. If the server dies, another one gets
the same request with the transcript: it makes the same events of it, byte for byte, and continues after the
last token. A transcript gives its sender no rights: its tokens might as well have been written into the
prompt, and its versions are looked up among the names of whoever sends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from onebase_edge.errors import InvalidRequestError
from onebase_edge.forwarded import MARK, MOST_TRANSCRIPT
from onebase_engine.engine.messages import ScoredToken, SequenceOutput

_LINE = re.compile(rb": onebase (\d{1,4}) (.*)")
_NUMBER = re.compile(r"[0-9]{1,6}")
"""Number of a prompt: Python refuses to read one of thousands of digits."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag="opening"):
    """Values that were drawn, looked up or read from the clock before the first token."""

    id: Annotated[str, msgspec.Meta(pattern="^[a-z]{1,12}[-_][0-9a-f]{24}$")]
    created: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    adapters: list[str]
    """`name@digest` of each term."""


class AnswerEnd(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Figures of an answer's end, recorded after its last token."""

    queue_s: float
    ttft_s: float
    decode_s: float
    at: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]


Record = Opening | AnswerEnd | list[SequenceOutput]
_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(list[Record])


def line(records: Sequence[Record], number: int = 0) -> bytes:
    """Return the line that stands before the events made of these records.

    Args:
        number: of the request, among those of one stream.
    """
    return b"%s%d %s\n" % (MARK, number, _encode(records))


def refused(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The transcript {why}. Send the request without one.", code="invalid_transcript"
    )


@dataclass
class Transcript:
    """Transcript of one request. outputs: in groups that became events together, with the prompt's number as
    their id."""

    opening: Opening
    outputs: list[list[SequenceOutput]] = field(default_factory=list)
    ended: AnswerEnd | None = None

    def check_outputs(
        self, prompts: Sequence[int], n: int, vocabulary: int, logprobs: bool, scores: bool
    ) -> None:
        """Raise InvalidRequestError for outputs that no server can have sent.

        Args:
            prompts: the length of each prompt in tokens, of which come `n` choices.
            vocabulary: how many token ids there are.
            logprobs, scores: whether those of the answer, and of the prompts, were asked for.
        """
        for output in self.all():
            prompt = int(output.id) if _NUMBER.fullmatch(output.id) else -1
            if not (0 <= prompt < len(prompts) and 0 <= output.choice < n):
                raise refused("has outputs of no choice")
            cached, given = output.cached_tokens, output.prompt_logprobs
            found = [] if output.logprobs is None else output.logprobs
            if output.vector is not None or (output.logprobs is None) == (logprobs and bool(output.tokens)):
                raise refused("has what was not asked for, or lacks it")
            if given is not None and not (scores and len(given) == prompts[prompt] - 1):
                raise refused("has logprobs of another prompt")
            if logprobs and len(found) != len(output.tokens):
                raise refused("has tokens without logprobs")
            if cached is not None and not 0 <= cached <= prompts[prompt]:
                raise refused("has a prompt of another length")
            told = (token for one in (*found, *(given or ())) for token in _tokens(one))
            if not all(0 <= token < vocabulary for token in (*output.tokens, *told)):
                raise refused("has tokens that this base has not")

    def all(self) -> Iterator[SequenceOutput]:
        return (output for outputs in self.outputs for output in outputs)


def _tokens(scored: ScoredToken) -> Iterable[int]:
    return scored.token, *(token for token, _ in scored.top)


def read(data: bytes) -> tuple[dict[int, Transcript], list[int]]:
    """Return the transcripts by number of the request, and the order of those numbers. Raises
    InvalidRequestError."""
    if len(data) > MOST_TRANSCRIPT:
        raise refused(f"is over {MOST_TRANSCRIPT} bytes")
    found: dict[int, Transcript] = {}
    order: list[int] = []
    for one in data.split(b"\n")[:-1]:
        match = _LINE.fullmatch(one)
        if match is None:
            raise refused("has a line that is none")
        try:
            records = _decoder.decode(match[2])
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise refused(f"has a line that cannot be read ({error})") from error
        number = int(match[1])
        order.append(number)
        for record in records:
            known = found.get(number)
            if known is None and isinstance(record, Opening):
                found[number] = Transcript(record)
            elif known is None or known.ended is not None or isinstance(record, Opening):
                raise refused("has a record where none may be")
            elif isinstance(record, AnswerEnd):
                known.ended = record
            else:
                known.outputs.append(record)
    return found, order
