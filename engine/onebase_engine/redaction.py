"""Addresses of stores and databases without the passwords that they may carry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*:)?//")
_ADDRESS = re.compile(r"([^:/@\[\]]*|\[[^/@\[\]]*\])(:\d+)?(/[^@]*)?")
"""Host, port and path."""
_QUERY = re.compile(r"[^/?#@=&\s]+=")


def redacted(url: str) -> str:
    """Hide the parts of a URL that may be credentials: those before `@`, after `?` and after `#`."""
    scheme, userinfo, place = _split(url)
    place = place.partition("?")[0].partition("#")[0]
    return f"{scheme}{HIDDEN}@{place}" if userinfo else f"{scheme}{place}"


def without_secrets(text: str, url: str) -> str:
    """Remove the URL's credentials from `text`, since libraries like to quote their inputs."""
    text = text.replace(url, redacted(url))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(url: str) -> Iterator[str]:
    _, userinfo, place = _split(url)
    candidates = [userinfo, *userinfo.split(":", 1)[1:]]
    query = place.partition("?")[2].partition("#")[0]
    candidates += [query, *(value for _, value in parse_qsl(query))]
    for candidate in candidates:
        for form in (candidate, unquote(candidate)):
            if len(form) > 2:
                yield form


def _split(url: str) -> tuple[str, str, str]:
    """Return scheme, credentials and the rest of a URL. The scheme ends with `//`, or is empty.

    The last `@` ends the credentials: a password may hold one, and then also `/`, `?` and `#`. Only an `@`
    after `?name=` is the query's, where what stands before is an address without it.
    """
    scheme = _SCHEME.match(url)
    start, rest = ("", url) if scheme is None else (scheme.group(), url[scheme.end() :])
    if scheme is None and rest.startswith(("/", ".", "~")):
        return "", "", url
    address, _, query = rest.partition("?")
    end = len(rest)
    if _QUERY.match(query) and ("@" in address or _ADDRESS.fullmatch(address)):
        end = len(address)
    at = rest.rfind("@", 0, end)
    return start, rest[: max(at, 0)], rest[at + 1 :]
