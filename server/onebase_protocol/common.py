"""Lists, pages of lists, deletions and times, and the bases of answers that leave fields out."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

Json = dict[str, Any]
T = TypeVar("T")


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


def shown_as(**schema: Any) -> Meta:
    """Return an annotation of a field that readers take more widely than the server sends it: `schema` says
    what it sends."""
    return Meta(extra_json_schema={"x-sent": schema})


UnixTime = Annotated[float, shown_as(type="integer")]
"""Time in seconds since 1970, without a fraction."""
TrueOnly = Annotated[bool, shown_as(type="boolean", const=True)]
FalseOnly = Annotated[bool, shown_as(type="boolean", const=False)]


class Sparse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of answers whose fields are left out where they have their defaults."""


class Stored(msgspec.Struct, frozen=True):
    """Base of parts that are sent as they were stored. What an older server stored may lack fields that have
    defaults."""


class ListAnswer(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A whole list."""

    object: Literal["list"] = "list"
    data: tuple[T, ...]


class PageAnswer(msgspec.Struct, Generic[Item], frozen=True, kw_only=True):
    """A page of a list. The next one is that after `last_id`."""

    object: Literal["list"] = "list"
    data: tuple[Item, ...]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False

    @property
    def next_after(self) -> str | None:
        """Id after which the next page begins, or None if there is none."""
        return self.data[-1].id if self.data and self.has_more else None


def page_of(data: list[Item], *, more: bool) -> PageAnswer[Item]:
    """Return a page as OpenAI's clients read it: `after` of the next page is `last_id`."""
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return PageAnswer(data=tuple(data), first_id=ends[0], last_id=ends[1], has_more=more)


class DeletedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Confirmation of a deletion."""

    id: str
    object: str
    deleted: TrueOnly = True


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0
