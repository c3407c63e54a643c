"""What the api and the engine say to each other: msgspec messages, length-prefixed, over one socket.

The api owns names, text and tenants; the engine knows token ids, digests and rows. No message
carries a Python object, so neither side can make the other execute anything.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A longer message is a bug on the sending side; the receiver closes the socket."""

MAX_ADAPTER_TERMS = 16
"""Adapters of one row."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine needs to start. The base is a local folder: the engine never downloads."""

    base_folder: str
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    gpus: int = 1
    """Over so many the base's layers are spread."""
    max_rank: int = 256
    max_slots: int = 8
    slot_memory: int = 0
    """Bytes of the versions in slots; 0: a tenth of what is free on an accelerator, no limit on the CPU."""
    max_rows: int = 64
    max_length: int = 0
    """Longest prompt plus completion, in tokens; 0 takes the base's own limit."""
    step_tokens: int = 0
    """Token budget of one step (decodes plus prefill chunks); 0 chooses by device."""
    draft_tokens: int = 7
    """Of a row's own text, tried in one step."""
    cpu_weights: Literal["quantized", "bf16"] = "quantized"
    """As which the CPU multiplies with 4-bit weights: unpacked in each step, or once."""
    block_size: int = 16
    kv_memory: int = 0
    """Bytes for the KV cache; 0 takes what is free less `train_memory`."""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """Of keys and values in the KV cache; auto is `dtype`."""
    prefix_memory: int = 0
    """Bytes of host memory for prefix blocks that leave the KV cache; 0: they are dropped."""
    train_memory: int = 0
    train_jobs: int = 1
    """Trainers that may run at once, each with a context of its own on a GPU."""
    threads: int = 0
    """CPU threads of the engine; 0 takes every core."""
    deterministic: bool = False


class AdapterRef(msgspec.Struct, frozen=True):
    """One term of a row's adapter sum: a version and its weight."""

    digest: str
    weight: float = 1.0


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen. Values are already validated by the api."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """The api draws one when the caller gave none."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the chosen token's logprob and the k most likely alternatives."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for every prompt token but the first; bypasses the prefix cache."""

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the row's text."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one token under the raw (unpenalized, temperature 1) distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """Most likely tokens first."""


# ---- api -> engine ---------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message: load the base."""

    config: EngineConfig


class Grammar(msgspec.Struct, frozen=True):
    """What a row's text must be: a JSON schema as JSON, a regular expression of all of it, or a grammar: in
    Lark's notation or GBNF (`grammar`), or in Lark's for sure (`lark`)."""

    kind: Literal["json_schema", "regex", "grammar", "lark"]
    text: str


class Pooling(msgspec.Struct, frozen=True):
    """What is made of a prompt's hidden states behind the last norm: the last one, the mean, or each."""

    kind: Literal["last", "mean", "each"] = "last"
    head: bool = False
    """As the adapter's classifier sees it."""


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Run one request; it becomes `n` rows that share the prompt.

    With `pooling` or `branches` the rows are only read: each ends with its prompt, and generates nothing.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: list[AdapterRef] = []
    n: int = 1
    tenant: str = "default"
    priority: int = 0
    """From -4 to 4: each step doubles the part of the engine that the rows may have. Beyond, it is cut."""
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    branches: list[list[int]] = []
    """Of each row, what follows the prompt. The logprobs of these tokens are its `prompt_logprobs`."""
    background: bool = False
    """Rows that only fill what others leave free, whatever their priority: batches."""
    begun: dict[int, list[int]] | None = None
    """Where it goes on: by choice the tokens that each row has generated already, elsewhere. Rows that have
    ended are not among them."""

    @property
    def choices(self) -> list[int]:
        """The numbers of its rows."""
        return list(range(self.n)) if self.begun is None else sorted(self.begun)


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request (all rows, or one choice). Unknown ids are ignored: it may just have finished."""

    id: str
    choice: int | None = None


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load one proven version into host memory; answered by AdapterLoaded or AdapterFailed.

    A thread reads it while the engine steps on.
    """

    digest: str
    path: str
    """The packed adapter: the finished tensors that the verifier proved."""
    sha256: str
    """Hex digest of that file; another content is refused."""


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget a version once no row uses it; answered by AdapterUnloaded."""

    digest: str


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Compute no step until another one says that it may go on. Rows are kept, versions still come and go."""

    paused: bool


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Exit with status 0. The api has drained first."""


ToEngine = Start | Submit | Cancel | LoadAdapter | UnloadAdapter | Pause | Shutdown


# ---- engine -> api ---------------------------------------------------------------------------


class BaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded and what it can take."""

    architecture: str
    parameters: int
    quantization: str
    dtype: str
    device: str
    """Or several, as in `cuda:0, cuda:1`."""
    kernels: str = "torch"
    """What computes: `torch`, or the kernels in C by their set of instructions; on a GPU with its kind, as
    `triton sm_90`. A version that was proved with others is proved again."""
    gpu_sharing: str = ""
    """How the engine, the verifier and trainers share a GPU: `mps` or `time slices`; empty without one."""
    spread: str = ""
    """That the base's layers lie on several GPUs, in a sentence, and that this is slow; empty on one."""
    promise: str = ""
    """What is kept of a row's bits, in a sentence or two."""
    base_bytes: int
    kv_bytes: int
    kv_dtype: str = "bfloat16"
    """Of keys and values in the KV cache: the base's dtype, or int8."""
    kv_blocks: int
    block_size: int
    max_length: int
    max_rows: int
    max_slots: int
    max_rank: int
    vocab_size: int
    hidden_size: int = 0
    """Numbers of a vector."""
    load_seconds: float


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress, for the person who waits."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    base: BaseInfo
    manifest: bytes = b""
    """How a verifier attaches the base (`onebase_engine.base.attach`); empty when it was not published."""


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot serve and exits: a base that is not supported, no memory, and so on."""

    message: str


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The version is in host memory: from now on requests may name it."""

    digest: str
    bytes: int
    load_seconds: float


class AdapterFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    digest: str
    code: str
    message: str


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    """The version's memory is free again."""

    digest: str


class SlotsChanged(msgspec.Struct, frozen=True, tag=True):
    """The versions that sit in slots now, in no order. Sent when that changes."""

    digests: list[str]
    seconds: dict[str, float] = {}
    """What it took to bring those that are new from host memory into their slots."""


class RowOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step gave one row. Every row ends with exactly one output whose `finish` is set."""

    id: str
    choice: int = 0
    tokens: list[int] = []
    """New tokens; a stop or end-of-sequence token that ended the row is included, last."""
    logprobs: list[TokenLogprob] | None = None
    """One per entry of `tokens`, when asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Once, before or with the first token: one per token of the prompt but the first, or of the branch."""
    vector: bytes | None = None
    """What was pooled, fp32, little-endian; of `each`, one token after the other."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The token id that ended the row, when one did; it is not part of the text."""
    cached_tokens: int | None = None
    """With the first output: prompt tokens that came from the prefix cache."""
    queue_seconds: float | None = None
    """With the first output: from arrival in the engine to the first step."""
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    retry_after: float | None = None
    """Seconds after which the request may be sent again, where the error passes."""


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    rows_running: int
    rows_waiting: int
    kv_blocks_free: int
    kv_blocks_cached: int
    """Free blocks that still hold a reusable prefix; counted in `kv_blocks_free` too."""
    kv_blocks_total: int
    slots_used: int
    steps: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    adapters_loaded: int
    draft_tokens: int = 0
    """Tokens of drafts that were computed, and those among them that were right."""
    right_draft_tokens: int = 0
    paused: bool = False
    background_waiting: int = 0
    """Of `rows_waiting`, those in the background."""
    kv_blocks_on_host: int = 0
    """Prefix blocks in host memory, of which some may be in the KV cache too."""
    kv_blocks_host_total: int = 0
    restored_tokens: int = 0
    """Whose keys and values were copied back from there."""
    awaits_grammars: bool = False
    """Whether nothing is computed because all sequences wait for grammars or masks of other processes."""


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """After every step (also one that only prefilled: it is progress), and once a second when idle."""

    rows: list[RowOutput]
    stats: Stats
    at: float
    """When the step had ended, on the monotonic clock that all processes of a machine share."""


ToApi = Loading | Ready | Fatal | AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged | StepDone


_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One frame: the payload's length in 4 bytes (little-endian), then the payload."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(payload)} bytes is over {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a byte stream into payloads. Feed it what `recv` gave; it keeps the incomplete rest."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Complete payloads in `data` and what was kept; raises ValueError on an oversized frame."""
        self._buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"frame of {length} bytes is over {MAX_MESSAGE_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return payloads


def to_engine_decoder() -> msgspec.msgpack.Decoder[ToEngine]:
    return msgspec.msgpack.Decoder(ToEngine)


def to_api_decoder() -> msgspec.msgpack.Decoder[ToApi]:
    return msgspec.msgpack.Decoder(ToApi)
