"""Routes of vLLM's server besides OpenAI's: adapters by folder, a pause, and facts about the server.

TRL's AsyncGRPO is one: it trains an adapter, and loads each version here to sample from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse

from onebase_adapters.registry import VersionRecord
from onebase_edge.errors import AdapterNotFoundError, ForbiddenError, InvalidRequestError, VersionFailedError
from onebase_protocol.serving import (
    PauseAnswer,
    PausedAnswer,
    ServerInfoAnswer,
    TextAnswer,
    TokenizerAnswer,
    TokensAnswer,
    WorldSizeAnswer,
)
from onebase_server.adapters.catalog import HUB_PREFIX, check_name
from onebase_server.adapters.service import VersionOptions
from onebase_server.adapters.sources import FolderError, check_folder, hub_reference
from onebase_server.http.answers import answer, refused
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response, off_loop
from onebase_server.http.routes.models import find_model
from onebase_server.http.schemas.adapters import LoadLoraRequest, UnloadLoraRequest
from onebase_server.requests.schemas.generation import AdapterFields
from onebase_server.requests.schemas.tokens import DetokenizeRequest, TokenizeRequest
from onebase_server.tenancy.access import Caller

router = APIRouter(route_class=StrictRoute, tags=["vllm"])
_ACTOR = "load_lora_adapter"


@router.post(
    "/v1/load_lora_adapter", response_class=PlainTextResponse, responses=refused(404, 409, 422, 429, 507)
)
@needs("adapters")
async def load_lora_adapter(body: LoadLoraRequest, services: Provided, caller: Calling) -> Response:
    """Serve an adapter: a folder under --adapters-dir, or a Hub repository that --hub-allow permits."""
    services.refuse_if_draining()
    name = check_name(body.lora_name, services.catalog.base_name)
    record = services.catalog.of(caller.tenant).own(name)
    if record is not None and record.active is not None and not body.load_inplace:
        raise InvalidRequestError(
            f"lora_name: the lora adapter {name!r} has already been loaded. Send load_inplace to replace it.",
            param="lora_name",
            code="adapter_exists",
        )
    folder = _allowed_folder(services, caller, body.lora_path)
    version = await (
        _from_hub(services, caller.tenant, name, body.lora_path)
        if folder is None
        else services.folders.add(caller.tenant, name, folder, actor=_ACTOR, allow_noop=True)
    )
    finished = await services.adapters.wait(caller.tenant, name, version.digest)
    if finished.error is not None:
        raise VersionFailedError(f"lora_path: {finished.error.message}", code=finished.error.code)
    await services.activation.activate(caller.tenant, name, version.digest, actor=_ACTOR)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=refused(404, 507))
@needs("adapters")
async def unload_lora_adapter(body: UnloadLoraRequest, services: Provided, caller: Calling) -> Response:
    """Stop serving an adapter. Its versions stay, until DELETE /v1/adapters/{name}."""
    services.refuse_if_draining()
    record = services.catalog.of(caller.tenant).own(body.lora_name)
    if record is None or record.active is None:
        raise AdapterNotFoundError(
            f"lora_name: the lora adapter {body.lora_name[:80]!r} cannot be found.", param="lora_name"
        )
    await services.activation.deactivate(caller.tenant, body.lora_name, actor="unload_lora_adapter")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/pause", responses=answer(PauseAnswer))
@needs("admin")
async def pause(
    services: Provided,
    mode: Annotated[str, Query(max_length=40)] = "keep",
    clear_cache: Annotated[bool, Query()] = True,
) -> Response:
    """Pause the engine until /resume. Requests wait, running ones too; adapters can be loaded and unloaded.

    `clear_cache` changes nothing: what is cached is kept by the content of the adapter that it belongs to.
    """
    services.refuse_if_draining()
    if mode != "keep":
        raise InvalidRequestError(
            f"mode: {mode!r} is not served. Send keep: what runs continues after /resume.", param="mode"
        )
    await services.supervisor.pause(True)
    return json_response(PauseAnswer("paused"))


@router.post("/resume", responses=answer(PauseAnswer))
@needs("admin")
async def resume(services: Provided) -> Response:
    """Resume after /pause."""
    await services.supervisor.pause(False)
    return json_response(PauseAnswer("resumed"))


@router.get("/is_paused", responses=answer(PausedAnswer))
@needs("admin")
async def is_paused(services: Provided) -> Response:
    """Return whether the engine is paused."""
    return json_response(PausedAnswer(services.supervisor.paused))


@router.get("/server_info", responses=answer(ServerInfoAnswer))
@needs("admin")
async def server_info(
    services: Provided, config_format: Annotated[str, Query(max_length=40)] = "json"
) -> Response:
    """Return the part of vLLM's configuration that its clients read."""
    if config_format != "json":
        raise InvalidRequestError("config_format: only json is served.", param="config_format")
    base = services.supervisor.base
    if base is None:
        raise services.supervisor.unavailable() or RuntimeError("ready without a base")
    return json_response(
        ServerInfoAnswer(
            {
                "model_config": {
                    "model": services.catalog.base_name,
                    "dtype": f"torch.{base.dtype}",
                    "max_model_len": base.max_length,
                },
                "lora_config": {"max_lora_rank": base.max_rank, "max_loras": base.max_slots},
                "parallel_config": {
                    "data_parallel_size": 1,
                    "tensor_parallel_size": 1,
                    "pipeline_parallel_size": 1,
                },
            }
        )
    )


@router.get("/get_world_size", responses=answer(WorldSizeAnswer))
@needs("admin")
async def get_world_size() -> Response:
    """Return the number of processes that hold a part of the base: one."""
    return json_response(WorldSizeAnswer(1))


@router.post("/tokenize", responses=answer(TokensAnswer, 404))
@needs("generate")
async def tokenize(body: TokenizeRequest, request: Request, services: Provided, caller: Calling) -> Response:
    """Return the tokens of a prompt, or of messages as the base's chat template writes them."""
    services.refuse_if_draining()
    if body.model is not None:
        find_model(services, caller, body.model)
    planner = services.planner
    fields = AdapterFields(adapter_defaults=body.adapter_defaults)
    parts = await planner.parts_of(caller.tenant, body.model, fields)
    own = parts.tokenizer
    if body.messages is not None:
        chat = await off_loop(request, body.conversation)
        tokens = await planner.chat_tokens(caller.tenant, chat, body.messages, own=parts)
    else:
        special, texts = body.add_special_tokens is not False, [parts.prefixed(body.prompt or "")]
        (tokens,) = await planner.texts(caller.tenant, "prompt", texts, special=special, tokenizer=own)
    names = await planner.names_of(caller.tenant, tokens, own) if body.return_token_strs else None
    return json_response(TokensAnswer(len(tokens), planner.max_length, tokens, names))


@router.post("/detokenize", responses=answer(TextAnswer, 404))
@needs("generate")
async def detokenize(body: DetokenizeRequest, services: Provided, caller: Calling) -> Response:
    """Return the text that tokens stand for, special ones by their names."""
    services.refuse_if_draining()
    if body.model is not None:
        find_model(services, caller, body.model)
    own = await services.planner.tokenizer_of(caller.tenant, body.model)
    return json_response(TextAnswer(await services.planner.text_of(caller.tenant, body.tokens, own)))


@router.get("/tokenizer_info", responses=answer(TokenizerAnswer))
@needs("any")
async def tokenizer_info(services: Provided) -> Response:
    """Return the base's special tokens and its chat template."""
    return json_response(services.tokenizer.info)


def _allowed_folder(services: Services, caller: Caller, path: str) -> Path | None:
    """Return the folder, if it lies under --adapters-dir; None when the path is no folder here.

    The folders are the operator's: other callers are told the same whether there is one or not.

    Raises ForbiddenError, InvalidRequestError.
    """
    parent = services.settings.adapters_dir if caller.is_admin else None
    root = Path(parent).expanduser().resolve() if parent else None
    try:
        folder = (root / path if root is not None else Path(path)).resolve()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"lora_path: {path[:80]!r} is not a path.", param="lora_path") from error
    if root is not None and folder != root and folder.is_relative_to(root) and folder.is_dir():
        try:
            check_folder(services.catalog.base_name, folder)
        except FolderError as error:
            raise InvalidRequestError(f"lora_path: {error}.", param="lora_path") from error
        return folder
    if path.startswith(("/", ".", "~")):
        raise ForbiddenError(
            "lora_path: this server loads only folders under its --adapters-dir, and Hub repositories that "
            "--hub-allow permits. Upload the adapter with POST /v1/adapters instead.",
            code="path_not_allowed",
            param="lora_path",
        )
    return None


async def _from_hub(services: Services, tenant: str, name: str, path: str) -> VersionRecord:
    reference = hub_reference(HUB_PREFIX + path.removeprefix(HUB_PREFIX), "lora_path")
    services.hub.check_allowed(reference, "lora_path")
    return await services.hub.pull(tenant, name, reference, VersionOptions(), _ACTOR).arrived()
