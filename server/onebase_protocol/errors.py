"""Errors in answers, in OpenAI's format and in Anthropic's on its routes, and what their codes mean."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from onebase_protocol.common import Sparse

Message = Annotated[str, Meta(description="what is wrong, and the way out")]
ErrorCode = Annotated[str | None, Meta(description="stable, for programs")]
ErrorParam = Annotated[str | None, Meta(description="the field of the request")]


class ErrorDetails(msgspec.Struct, frozen=True):
    """Some errors have more fields, as their quota or the version that is active."""

    message: Message
    type: str
    param: ErrorParam
    code: ErrorCode


class Error(msgspec.Struct, frozen=True):
    """Error of every route but Anthropic's."""

    error: ErrorDetails


class AnthropicErrorDetails(Sparse, frozen=True):
    """Fields of an error that Anthropic's format has no place for."""

    error_code: ErrorCode
    param: ErrorParam | msgspec.UnsetType = msgspec.UNSET


class AnthropicErrorBody(msgspec.Struct, frozen=True):
    type: str
    message: Message
    details: AnthropicErrorDetails


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["error"] = "error"
    error: AnthropicErrorBody
    request_id: str


class CodeMeaning(NamedTuple):
    """Codes that come with one HTTP status for one kind of reason."""

    status: int
    codes: tuple[str, ...]
    when: str
    """Markdown, with links relative to `docs/`."""


def _meaning(status: int, codes: str, when: str) -> CodeMeaning:
    return CodeMeaning(status, tuple(codes.split()), when)


ERROR_CODES = (
    _meaning(
        400,
        "invalid_value",
        "a field is wrong; `param` names it, the message says what would be right",
    ),
    _meaning(
        400,
        "control_token",
        "messages that this base [cannot be kept from reading as control tokens](security.md#messages)",
    ),
    _meaning(
        400,
        "no_chat_template chat_template_failed",
        "a base that takes plain prompts alone; messages that the template does not take",
    ),
    _meaning(
        400,
        "adapter_task",
        "an adapter that classifies is asked to write, or the reverse",
    ),
    _meaning(
        400,
        "tools_not_supported thinking_budget_not_supported",
        "the base's template has no place for tools, or no token that ends a thought",
    ),
    _meaning(
        400,
        "grammar_refused",
        "a schema, a regular expression or a grammar that cannot be followed; the message says why",
    ),
    _meaning(
        400,
        "invalid_http host_not_allowed",
        "a request that is no HTTP/1.1, or has no one Host",
    ),
    _meaning(
        400,
        "invalid_transcript too_many_values",
        "a transcript that this server does not continue; a body with more values than any request has",
    ),
    _meaning(
        400,
        "context_length_exceeded conversation_too_large empty_prompt",
        "it could not run even alone; the message names the limit and its option",
    ),
    _meaning(
        400,
        "kv_memory_exceeded slot_memory_exceeded too_many_adapters",
        "it needs more memory, or more adapters, than may be; the message says which",
    ),
    _meaning(
        400,
        "prompt_logprobs_too_large vector_too_large",
        "its answer would be longer than one may be; the message names the limit",
    ),
    _meaning(
        400,
        "invalid_multipart",
        "an upload that cannot be read as a form, or holds something else",
    ),
    _meaning(
        400,
        "bad_defaults",
        "the [defaults of requests](reference/adapters.md#defaults-of-requests) that came with it are wrong",
    ),
    _meaning(
        400,
        "host_memory_exceeded",
        "a version, or all pinned ones, take more than `--host-memory`",
    ),
    _meaning(
        400,
        "hub_invalid file_not_found",
        "a field names no Hub repository, or no file",
    ),
    _meaning(
        400,
        "adapter_exists adapter_not_composable",
        "an adapter that is loaded already (in vLLM's words), or adapters that do not go together",
    ),
    _meaning(
        400,
        "sequence_conflict session_finished",
        "[live training](how-to/tinker.md): another request was accepted under this `seq_id`; the session "
        "has finished",
    ),
    _meaning(
        400,
        "too_many_checkpoints other_base",
        "the tenant has as many named checkpoints as are kept; the run or the checkpoint was trained on "
        "another base",
    ),
    _meaning(
        400,
        "not_installed training_off",
        "the server was installed without `onebase[tinker]`; `--train-jobs` is 0",
    ),
    _meaning(
        400,
        "not_supported",
        "a route of the Tinker API that this server does not have; the message says what to do instead",
    ),
    _meaning(
        400,
        "of_one_server",
        "behind `onebase route`: a request of the [Tinker API](how-to/tinker.md), whose clients need the "
        "address of one server",
    ),
    _meaning(
        400,
        "thread_unsupported_request",
        "Anthropic's routes keep no conversations: send all messages",
    ),
    _meaning(
        400,
        "python_graders_off",
        "a grader in Python, which this server does not run: `--python-graders off`, or a machine that "
        "cannot confine it",
    ),
    _meaning(
        401,
        "invalid_api_key",
        "no API key, or one that is unknown, expired or revoked; with `WWW-Authenticate`",
    ),
    _meaning(
        403,
        "host_not_allowed origin_not_allowed",
        "the server does not go by this name, or a page of another site asks: "
        "[security](security.md#at-the-door)",
    ),
    _meaning(
        403,
        "key_needed",
        "the server has no API key, and a proxy brings the request from another machine: "
        "[security](security.md#who-may-do-what)",
    ),
    _meaning(
        403,
        "insufficient_scope",
        "the API key lacks the scope of the route, which the message names",
    ),
    _meaning(
        403,
        "link_invalid",
        "the address of a file of [external weights](how-to/tinker.md#take-the-weights-elsewhere) was "
        "changed, or its time is over",
    ),
    _meaning(
        403,
        "judge_refused",
        "the key of a job, or of a request to a grader, may not ask the grader's judge",
    ),
    _meaning(
        403,
        "approval_refused",
        "this key cannot approve the version, or evaluate it: it made it, or the [gates](how-to/gates.md) "
        "name other keys",
    ),
    _meaning(
        403,
        "adapter_read_only first_key",
        "the adapter is shared by another tenant; the first key is made on the server's machine",
    ),
    _meaning(
        403,
        "base_not_deletable",
        "the base is no adapter",
    ),
    _meaning(
        403,
        "hub_not_allowed hub_gated path_not_allowed",
        "`--hub-allow` or `--adapters-dir` does not permit it, or the Hub does not",
    ),
    _meaning(
        404,
        "adapter_not_found version_not_found model_not_found hub_not_found",
        "no such name, version or repository; also if another tenant has it",
    ),
    _meaning(
        404,
        "file_not_found job_not_found checkpoint_gone batch_not_found",
        "no such file, job, checkpoint or batch; also if another tenant has it",
    ),
    _meaning(
        404,
        "request_not_found key_not_found gate_not_found rollout_not_found answer_not_found",
        "no such logged request, key, gate, rollout or answer",
    ),
    _meaning(
        404,
        "response_not_found conversation_not_found item_not_found generation_not_found",
        "no such response, conversation, item or running text",
    ),
    _meaning(
        404,
        "session_not_found run_not_found sampler_not_found",
        "[live training](how-to/tinker.md) has none such; also if another tenant or server has it",
    ),
    _meaning(
        404,
        "checkpoint_not_found result_not_found",
        "live training has no such checkpoint or result; also if another tenant or server has it",
    ),
    _meaning(
        404,
        "http_404 console_missing",
        "there is nothing at this path; the server was installed without the console",
    ),
    _meaning(
        405,
        "http_405",
        "the path has no such method; `Allow` says which it has",
    ),
    _meaning(
        408,
        "request_timeout",
        "headers or body came too slowly; the connection closes",
    ),
    _meaning(
        409,
        "base_mismatch version_not_ready stale_activation nothing_to_roll_back",
        "the adapter's state does not allow it; the message says what would",
    ),
    _meaning(
        409,
        "rollout_state adapter_in_use adapter_not_composable ranks_differ",
        "this does not go with the adapter as it is; the message says why",
    ),
    _meaning(
        409,
        "gate_signature gate_proof gate_evaluation",
        "[a gate](how-to/gates.md) does not let the version answer under this name; `error.gates` has all",
    ),
    _meaning(
        409,
        "gate_weights gate_approval",
        "a gate does not let the version answer under this name; `error.gates` says how to open it",
    ),
    _meaning(
        409,
        "job_state batch_state file_in_use training_off",
        "the job's or batch's state does not allow it, one needs the file, or `--train-jobs` is 0",
    ),
    _meaning(
        409,
        "adapter_deleted",
        "the adapter, or its version, was deleted while the request ran",
    ),
    _meaning(
        409,
        "replay_base replay_no_answer replay_no_text",
        "a [logged request](how-to/request-log.md) is of another base, or has no answer, or no text",
    ),
    _meaning(
        409,
        "replay_prompt replay_route replay_version",
        "its prompt would be another one, its route gives no text, or its version is gone",
    ),
    _meaning(
        410,
        "result_gone",
        "the result of a request of live training is not kept any more: send the request again",
    ),
    _meaning(
        413,
        "payload_too_large hub_too_large",
        "the body is over `--max-body`, the adapter over `--max-upload`, or the file over `--max-train-file`",
    ),
    _meaning(
        422,
        "bad_config unknown_field missing_file empty",
        "files of the version are missing, or its config is [not served](reference/adapters.md)",
    ),
    _meaning(
        422,
        "bad_weights bad_shape incomplete foreign_tensor",
        "its tensors are wrong; the message names the file and the tensor",
    ),
    _meaning(
        422,
        "unknown_module untargeted unsupported_kind rank_too_large not_finite",
        "its layers, its kind, its rank or its numbers are not served",
    ),
    _meaning(
        422,
        "no_effect bad_defaults bad_tokenizer",
        "it changes nothing, or what comes with it is wrong; the message names the field",
    ),
    _meaning(
        422,
        "hub_no_adapter",
        "the Hub's repository holds no adapter",
    ),
    _meaning(
        422,
        "signature_missing signature_invalid signature_expired",
        "the server's [policy](how-to/signatures.md) requires a signature that holds",
    ),
    _meaning(
        422,
        "signer_not_allowed",
        "it is signed by one who may not sign this name",
    ),
    _meaning(
        422,
        "proof_failed proof_timeout proof_crashed proof_error",
        "the version was not proved, and is not served; the message says what its proof found",
    ),
    _meaning(
        422,
        "prepared_damaged base_changed device_error no_memory",
        "the machine kept the version from being proved; the message says how",
    ),
    _meaning(
        422,
        "crashes_engine",
        "the engine died each time this request was running: [below](#when-the-engine-dies)",
    ),
    _meaning(
        429,
        "rate_limit_exceeded",
        "beyond a [quota](security.md#quotas) of the key or the tenant: wait for `Retry-After` seconds",
    ),
    _meaning(
        429,
        "insufficient_quota",
        "beyond a quota, and waiting does not help; the message says what does",
    ),
    _meaning(
        429,
        "queue_full",
        "`--queue-limit` sequences are waiting, or as many requests for adapters to be loaded, and the "
        "tenant has its part of them; or the tenant has [10,000 promised samples](how-to/tinker.md#limits) "
        "that are not there yet; `Retry-After` says how many seconds to wait",
    ),
    _meaning(
        431,
        "headers_too_large",
        "over `--max-header` or `--max-header-lines`; the connection closes",
    ),
    _meaning(
        499,
        "client_closed_request slow_reader",
        "in the log and the metrics: the caller went, or did not read its stream",
    ),
    _meaning(
        500,
        "change_uncertain",
        "the change was made, or may have been, and the database cannot tell now: look before you send the "
        "request again; with `x-should-retry: false`",
    ),
    _meaning(
        500,
        "not_finite row_failed",
        "the engine ended this request, for instance because its adapter overflows; others go on",
    ),
    _meaning(
        500,
        "step_failed",
        "computing failed for every request that ran, so that none of them is to blame",
    ),
    _meaning(
        501,
        "not_served",
        "a route of OpenAI's that this server does not have; the message says what to do instead",
    ),
    _meaning(
        501,
        "transfer_coding_not_supported",
        "a body in another `Transfer-Encoding` than `chunked`; the connection closes",
    ),
    _meaning(
        503,
        "grammars_busy",
        "the tenant's grammars take all the memory that they may (256 MB), 64 tenants use some, or their "
        "process does not start",
    ),
    _meaning(
        503,
        "engine_starting engine_restarting engine_restarted",
        "nothing can be generated now; with `Retry-After`",
    ),
    _meaning(
        503,
        "engine_busy server_stopping timeout",
        "nothing can be generated now, or not in time; with `Retry-After`",
    ),
    _meaning(
        503,
        "no_replica replica_lost of_one_server",
        "behind `onebase route`: no server answers, the one that did is lost, or only one knows; "
        "`Retry-After`",
    ),
    _meaning(
        503,
        "too_many_connections",
        "`--max-connections` or `--max-connections-per-host` are open; with `Retry-After`",
    ),
    _meaning(
        503,
        "too_many_bodies",
        "the bodies of connections take all the memory that they may; with `Retry-After`",
    ),
    _meaning(
        503,
        "memory_refused",
        "the machine refuses the server more memory or threads: its log says what limits them; with "
        "`Retry-After`. A request that changes something is answered by 500, `internal_error` and "
        "`x-should-retry: false`, since it may have been carried out",
    ),
    _meaning(
        503,
        "body_unread",
        "the process that reads bodies over 128 KiB does not answer; with `Retry-After`",
    ),
    _meaning(
        503,
        "merges_busy pulls_busy",
        "as many merges, or pulls from the Hub, run or wait already as may; with `Retry-After`",
    ),
    _meaning(
        503,
        "crash_suspect",
        "it is not this request's turn: [below](#when-the-engine-dies); with `Retry-After`",
    ),
    _meaning(
        503,
        "adapter_unavailable adapter_timeout verifier_unavailable",
        "this adapter cannot be had now, others can; with `Retry-After`",
    ),
    _meaning(
        503,
        "hub_unreachable hub_offline hub_damaged hub_wrong_answer",
        "the Hub does not answer, or not as it should; with `Retry-After`",
    ),
    _meaning(
        503,
        "registry_unavailable store_unavailable request_log_unavailable",
        "the database, the store's files or the log of requests cannot be reached",
    ),
    _meaning(
        505,
        "http_version_not_supported",
        "neither HTTP/1.1 nor 1.0; the connection closes",
    ),
    _meaning(
        507,
        "store_full",
        "no space for it: nothing of it was kept, and serving continues",
    ),
)
"""Every code of an error in an answer, by status. The page on HTTP has this table."""
