"""The wire models of the routes about adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from onebase_server.http.schemas.wire import Name, Wire

Text = Annotated[str, Field(min_length=1, max_length=250)]


class HubSource(Wire):
    """A repository on the Hub, or a subfolder of it."""

    repo: Annotated[str, Field(min_length=3, max_length=200)]
    revision: Text | None = Field(
        default=None, description="branch, tag or commit; the default branch if null"
    )
    subfolder: Text | None = None


class PullRequest(Wire):
    """Body of POST /v1/adapters as JSON; files are sent as multipart/form-data."""

    name: Name | None = Field(default=None, description="by default hub:org/repo, as requests may name it")
    hub: HubSource
    activate: bool = False
    allow_noop: bool = False
    any_base: bool = False


class ActivateRequest(Wire):
    version: Annotated[str, Field(min_length=1, max_length=80)]
    expected: Annotated[str, Field(max_length=80)] | None = Field(
        default=None, description="the digest that must be active now; null: none is; not given: any"
    )


class ExpectedRequest(Wire):
    """Body of POST .../rollback."""

    expected: Annotated[str, Field(max_length=80)] | None = None


class EmptyRequest(Wire):
    """A body that says nothing, which is allowed."""


class PinRequest(Wire):
    pinned: bool


class ShareRequest(Wire):
    shared: bool


class LoadLoraRequest(Wire):
    """Body of vLLM's POST /v1/load_lora_adapter."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadLoraRequest(Wire):
    """Body of vLLM's POST /v1/unload_lora_adapter."""

    lora_name: Name
    lora_int_id: int | None = None
