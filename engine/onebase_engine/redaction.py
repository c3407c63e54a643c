"""Addresses of stores and databases without the passwords that they may carry."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"


def redacted(url: str) -> str:
    """Hide the parts of a URL that may be credentials: those before `@`, after `?` and after `#`."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url.partition("?")[0]
    # The last `@` counts: a password may hold one, and then also `/`, `?` and `#`.
    userinfo, at, place = rest.rpartition("@")
    place = place.partition("?")[0].partition("#")[0]
    return f"{scheme}://{HIDDEN}@{place}" if at and userinfo else f"{scheme}://{place}"


def without_secrets(text: str, url: str) -> str:
    """Remove the URL's credentials from `text`, since libraries like to quote their inputs."""
    text = text.replace(url, redacted(url))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(url: str) -> Iterator[str]:
    _, _, rest = url.partition("://")
    userinfo, _, place = rest.rpartition("@")
    candidates = [userinfo, *userinfo.split(":", 1)[1:]]
    query = place.partition("?")[2].partition("#")[0]
    candidates += [query, *(value for _, value in parse_qsl(query))]
    for candidate in candidates:
        for form in (candidate, unquote(candidate)):
            if len(form) > 2:
                yield form
