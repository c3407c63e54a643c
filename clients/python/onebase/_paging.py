"""Lists that come in pages, put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from ._parse import Json

T = TypeVar("T")

PAGE: Final = 100
"""Items that are asked for at once."""


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list. `last` is the id after which the next one begins; None if there is none."""

    items: tuple[T, ...]
    last: str | None


Fetch: TypeAlias = Callable[[str | None, int], Page[T]]
"""Gives the page after an id, of at most so many items."""
AsyncFetch: TypeAlias = Callable[[str | None, int], Awaitable[Page[T]]]


def page_of(build: Callable[[Json], T]) -> Callable[[Json], Page[T]]:
    """What makes a page of a server's list, given what makes an item of it."""

    def made(value: Json) -> Page[T]:
        data = value["data"]
        last = data[-1]["id"] if data and value.get("has_more") else None
        return Page(tuple(build(item) for item in data), last)

    return made


def collect(fetch: Fetch[T], limit: int | None, after: str | None = None) -> tuple[T, ...]:
    """The first `limit` items after an id (None: all).

    Raises:
        ValueError: the limit is below 1.
    """
    items: list[T] = []
    while size := _size(limit, len(items)):
        page = fetch(after, size)
        items += page.items
        after = page.last
        if after is None:
            break
    return tuple(items)


async def acollect(fetch: AsyncFetch[T], limit: int | None, after: str | None = None) -> tuple[T, ...]:
    """As `collect`."""
    items: list[T] = []
    while size := _size(limit, len(items)):
        page = await fetch(after, size)
        items += page.items
        after = page.last
        if after is None:
            break
    return tuple(items)


def _size(limit: int | None, had: int) -> int:
    """How many to ask for next; 0 when there are enough."""
    if limit is None:
        return PAGE
    if limit < 1:
        raise ValueError(f"limit is {limit}: it must be 1 or more; None gives all")
    return min(PAGE, limit - had)
