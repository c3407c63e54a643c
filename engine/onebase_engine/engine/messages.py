"""Messages between the api and the engine: msgspec structs, length-prefixed, over one socket.

The api owns names, text and tenants; the engine knows token ids, digests and sequences. No message
carries a Python object, so neither side can make the other execute anything.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A longer message is a bug on the sending side; the receiver closes the socket."""

MAX_ADAPTER_TERMS = 16
"""Largest number of adapters of one sequence."""

MAX_SLOTS = 1024
"""Largest number of versions in slots."""

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
    max_rank: int = 256
    max_slots: int = 8
    """Number of versions in slots; 0: as many as `max_sequences`, up to MAX_SLOTS, on the CPU at least
    MAX_ADAPTER_TERMS."""
    slot_memory: int = 0
    """Bytes of the versions in slots; 0: a quarter of what is free on an accelerator, no limit on the CPU."""
    max_sequences: int = 64
    max_length: int = 0
    """Longest prompt plus completion, in tokens; 0 takes the base's own limit."""
    step_tokens: int = 0
    """Token budget of one step (decodes plus prefill chunks); 0 chooses by device."""
    draft_tokens: int = 7
    """Largest number of draft tokens of one sequence in one step."""
    cpu_weights: Literal["quantized", "bf16"] = "quantized"
    """Form of 4-bit weights in the CPU's products: unpacked in each step, or once to bf16."""
    block_size: int = 16
    kv_memory: int = 0
    """Bytes for the KV cache; 0 takes what is free less what others need."""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """Dtype of keys and values in the KV cache; auto is `dtype`."""
    prefix_memory: int = 0
    """Bytes of host memory for prefix blocks that leave the KV cache; 0: they are dropped."""
    train_memory: int = 0
    """Bytes for jobs; 0: on a GPU what the default recipe takes, on the CPU a part of what is free."""
    train_jobs: int = 1
    """Trainers that may run at once, each with a context of its own on a GPU."""
    threads: int = 0
    """CPU threads of the engine; 0 takes every core."""
    deterministic: bool = False


class AdapterRef(msgspec.Struct, frozen=True):
    """One term of a sequence's adapter sum: a version and its weight."""

    digest: str
    weight: float = 1.0


class ThoughtBudget(msgspec.Struct, frozen=True):
    """Largest number of tokens of the thought with which an answer begins: then its end is generated."""

    tokens: int
    end: int
    """Token that ends a thought."""
    begin: int | None = None
    """Token that begins one, among the first that are generated; None: the prompt has begun it."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings of one request, already validated by the api."""

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
    """Seed of the draws; the api chooses one if the caller sets none."""
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a text besides the base's own, by the tokenizer of the adapter."""
    min_tokens: int = 0
    max_tokens: int = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives reported next to the chosen token's logprob; None reports no logprobs."""
    prompt_logprobs: int | None = None
    """Like `logprobs`, for every prompt token but the first; bypasses the prefix cache."""
    prompt_targets: dict[int, list[int]] = {}
    """Tokens that are scored as well, by the place in the prompt at which they might stand; with
    `prompt_logprobs`."""
    thought: ThoughtBudget | None = None

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the sequence's text."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one token under the raw (unpenalized, temperature 1) distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """Alternatives: the most likely tokens with their logprobs, in descending order."""
    named: list[float] = []
    """Logprobs of the tokens that the request names at this place."""


# ---- api -> engine ---------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message: load the base."""

    config: EngineConfig


class Grammar(msgspec.Struct, frozen=True):
    """Constraint on a sequence's text.

    It is a JSON schema as JSON, a regular expression for the whole text, or a grammar: in either Lark's
    notation or GBNF (`grammar`), or in Lark's (`lark`).
    """

    kind: Literal["json_schema", "regex", "grammar", "lark"]
    text: str
    before: str = ""
    """Rules in Lark's notation of what stands before that text, such as a thought. The rule `before` is their
    start."""


class Pooling(msgspec.Struct, frozen=True):
    """Pooling of a prompt's hidden states behind the last norm: the last one, the mean, or each."""

    kind: Literal["last", "mean", "each"] = "last"
    head: bool = False
    """Whether the adapter's classifier is applied to the hidden states."""


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Run one request; it becomes `n` sequences that share the prompt.

    With `pooling` or `branches` nothing is generated: each sequence ends with its prompt.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: list[AdapterRef] = []
    n: int = 1
    tenant: str = "default"
    priority: int = 0
    """Priority from -4 to 4, to which it is clamped; each step doubles the sequences' share of the engine."""
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    branches: list[list[int]] = []
    """Continuation of the prompt for each sequence. The logprobs of these tokens are its
    `prompt_logprobs`."""
    background: bool = False
    """Whether the sequences only use what others leave free, whatever their priority: batches."""
    resume_tokens: dict[int, list[int]] | None = None
    """Resume state: by choice, the tokens that each sequence has already generated elsewhere. Sequences that
    have ended are left out."""

    @property
    def choices(self) -> list[int]:
        """Numbers of the request's sequences."""
        return list(range(self.n)) if self.resume_tokens is None else sorted(self.resume_tokens)


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request: all sequences, or one choice. Unknown ids are ignored: it may just have finished."""

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
    """Drop a version once no sequence uses it; answered by AdapterUnloaded."""

    digest: str


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Stop or resume computing steps. While paused, sequences stay and versions still load and unload."""

    paused: bool


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Exit with status 0. The api has drained first."""


ToEngine = Start | Submit | Cancel | LoadAdapter | UnloadAdapter | Pause | Shutdown


# ---- engine -> api ---------------------------------------------------------------------------


class BaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Description of the loaded base and of the engine's limits."""

    architecture: str
    parameters: int
    quantization: str
    dtype: str
    device: str
    kernels: str = "torch"
    """Name of the back-end: `torch`, or the instruction set of the kernels in C; on a GPU with its kind, as
    `triton sm_90`. A version that was proved with another one is proved again."""
    gpu_sharing: str = ""
    """Mode of sharing a GPU with the verifier and trainers: `mps` or `time slices`; empty without a GPU."""
    promise: str = ""
    """Guarantee about a sequence's bits, in a sentence or two."""
    base_bytes: int
    kv_bytes: int
    kv_dtype: str = "bfloat16"
    """Dtype of keys and values in the KV cache: the base's dtype, or int8."""
    kv_blocks: int
    """Number of KV blocks. With several groups a block holds `block_size` tokens of one of them."""
    kv_groups: int = 1
    """Number of groups of layers that have KV blocks of their own, since some release those before a
    window."""
    kv_tokens: int
    """Number of tokens that fit, in sequences as long as they may be."""
    kv_longest: int
    """Number of tokens of the longest sequence that may be and fits."""
    block_size: int
    max_length: int
    max_sequences: int
    max_slots: int
    max_rank: int
    vocab_size: int
    hidden_size: int = 0
    """Length of a vector."""
    load_seconds: float


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of the start, for display."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    base: BaseInfo
    manifest: bytes = b""
    """Manifest by which a verifier attaches the base (`onebase_engine.base.attach`); empty if unpublished."""


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
    """Time, in seconds, in which each new version moved from host memory into its slot."""


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Output of one sequence in one step. Every sequence ends with exactly one output that sets `finish`."""

    id: str
    choice: int = 0
    tokens: list[int] = []
    """New tokens; a stop or end-of-sequence token that ended the sequence is included, last."""
    logprobs: list[ScoredToken] | None = None
    """Logprobs, one per entry of `tokens`, if requested."""
    prompt_logprobs: list[ScoredToken] | None = None
    """Logprobs of the prompt's tokens but the first, or of the branch's; sent once, before or with the first
    token."""
    vector: bytes | None = None
    """Pooled vector, fp32, little-endian; with `each`, one token after the other."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """Token id that ended the sequence, if one did; it is not part of the text."""
    cached_tokens: int | None = None
    """Number of prompt tokens from the prefix cache, with the first output."""
    queue_seconds: float | None = None
    """Time, in seconds, from arrival in the engine to the first step, with the first output."""
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    retry_after: float | None = None
    """Time, in seconds, after which the request may be sent again, if the error is temporary."""


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    sequences_running: int
    sequences_waiting: int
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
    """Number of draft tokens that were computed; below, of those that were right."""
    right_draft_tokens: int = 0
    paused: bool = False
    background_waiting: int = 0
    """Number of sequences among `sequences_waiting` that are in the background."""
    kv_blocks_on_host: int = 0
    """Number of prefix blocks in host memory, some of which may be in the KV cache too."""
    kv_blocks_host_total: int = 0
    restored_tokens: int = 0
    """Number of tokens whose keys and values were copied back from host memory."""
    awaits_grammars: bool = False
    """Whether nothing is computed because all sequences wait for grammars or masks of other processes."""


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """Results of a step. Sent after every step, even if it only prefilled, and once a second when idle."""

    outputs: list[SequenceOutput]
    stats: Stats
    at: float
    """End of the step, in seconds on the monotonic clock that all processes of a machine share."""


ToApi = Loading | Ready | Fatal | AdapterLoaded | AdapterFailed | AdapterUnloaded | SlotsChanged | StepResult


_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode one frame: the payload's length in 4 bytes (little-endian), then the payload."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(payload)} bytes is over {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Splits a byte stream into payloads. `feed` takes the result of `recv` and stores an incomplete rest."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes. Raises ValueError for an oversized frame."""
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
