"""Headers by which `onebase route` and reverse proxies speak for others: all of them are read here.

A client may send any of them. Those of `onebase route` count only together with the secret of this server,
which the route gets with an admin key (`GET /route_secret`), and are dropped without it, as if they had not
been sent. `X-Forwarded-For` and `X-Forwarded-Proto` count if the route, this machine or a `--trusted-proxy`
sends them.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

SECRET = b"x-onebase-route"
"""Header of a request with the server's secret: what makes its other headers believed."""
CHANGE = b"x-onebase-change"
"""Header with the last of the registry's changes that an answer knows of, or has to know of. The route passes
it from server to server, so that none answers with less than another has answered before."""
NEWEST = 10**18 - 1
"""Number in that header, which no change has: the answer has to know of all that the registry knows of."""
TENANT = b"x-onebase-tenant"
"""Header of an answer to the route: the tenant of the request's key, quoted as in an address."""
TRANSCRIPT_HEADER = "x-onebase-transcript"
"""Header of a request: the length of its own body in bytes, and the seconds since it first arrived; the rest
of the body is the transcript so far. In an answer it says that a transcript is between the events."""
TRANSCRIPT = TRANSCRIPT_HEADER.encode()
OURS = frozenset({SECRET, CHANGE, TENANT, TRANSCRIPT})
"""Headers between `onebase route` and its servers, which clients neither send nor see."""
MARK = b": onebase "
"""Beginning of a transcript's line; other readers of server-sent events take it for a comment."""
MOST_TRANSCRIPT = 1 << 20
"""Largest transcript of a stream, in bytes: some 20,000 tokens. Longer ones are neither stored nor
accepted."""
_SCOPE = "onebase.forwarded"
_FOR, _PROTO = b"x-forwarded-for", b"x-forwarded-proto"
_LISTS = frozenset({_FOR, b"x-original-forwarded-for"})
_ADDRESSES = frozenset(
    {
        b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"x-envoy-external-address",
        b"true-client-ip", b"cf-connecting-ip", b"cf-connecting-ipv6", b"fastly-client-ip",
        b"fly-client-ip", b"x-azure-clientip", b"x-appengine-user-ip",
    }
)  # fmt: skip
"""Headers in which proxies and the networks of hosting companies name one address."""
_STANDARD = b"forwarded"
_STANDARD_FOR = re.compile(r'(?:^|[;,\s])for\s*=\s*("[^"]*"?|[^;,\s]*)', re.IGNORECASE)
_READ = OURS | _LISTS | _ADDRESSES | {_STANDARD, _PROTO}
_ASKED = re.compile(r"(\d{1,12}) (\d{1,9}(?:\.\d{1,6})?)", re.ASCII)
_CHANGE = re.compile(rb"\d{1,18}")


@dataclass(frozen=True)
class Forwarded:
    """Claims of a request's headers on behalf of others, as far as they are believed.

    Args:
        by_route: whether `onebase route` sent the request, by the secret.
        change: the registry's change that the answer has to know of; 0 for none.
        transcript: the bytes of the body that are the request's own, and the seconds since it came first, if
            the route wants a transcript of the stream; else None.
        afar: an address that any of the headers names, believed or not, and that is none of this machine; ""
            if there is none.
    """

    by_route: bool = False
    change: int = 0
    transcript: tuple[int, float] | None = None
    afar: str = ""


_NOTHING = Forwarded()


def forwarded_of(scope: Any) -> Forwarded:
    """Return what the request's headers said. scope: of ASGI, which `ForwardedHeaders.read` has seen."""
    found: Forwarded = scope.get(_SCOPE, _NOTHING)
    return found


def change_of(value: bytes) -> int:
    """Return the number in a header named CHANGE, or 0 if it is none."""
    return int(value) if _CHANGE.fullmatch(value) else 0


class ForwardedHeaders:
    """Reads these headers of each request, once.

    Args:
        trusted_proxy: addresses and networks of proxies, besides this machine.
        secret: what `onebase route` has to send; "" if nobody can be the route.
    """

    def __init__(self, trusted_proxy: Sequence[str], secret: str = "") -> None:
        self._networks = [ip_network(proxy, strict=False) for proxy in trusted_proxy]
        self._secret = secret.encode()

    def read(self, scope: Any) -> None:
        """Take OURS out of the headers, keep what is believed for `forwarded_of`, and name the client."""
        if _SCOPE in scope:
            return
        found: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            if name in _READ:
                found.setdefault(name, []).append(value)
        if not found:
            scope[_SCOPE] = _NOTHING
            return
        by_route = self._is_route(found.get(SECRET, []))
        scope[_SCOPE] = Forwarded(
            afar=_afar(found), by_route=by_route, **(_of_route(found) if by_route else {})
        )
        if not OURS.isdisjoint(found):
            scope["headers"] = [header for header in scope["headers"] if header[0] not in OURS]
        if by_route or self._is_trusted((scope["client"] or ("",))[0]):
            self._name_client(scope, found)

    def _is_route(self, given: list[bytes]) -> bool:
        return bool(self._secret) and len(given) == 1 and hmac.compare_digest(given[0], self._secret)

    def _is_trusted(self, host: str) -> bool:
        address = _address(host)
        return address is not None and (
            address.is_loopback or any(address in network for network in self._networks)
        )

    def _name_client(self, scope: Any, found: dict[bytes, list[bytes]]) -> None:
        """Set the client to the last address that proxies name and that is none of theirs."""
        proto = found.get(_PROTO, [b""])[-1].strip().lower()
        if proto in (b"http", b"https"):
            scope["scheme"] = proto.decode()
        hosts = [_host(host) for host in _listed(found.get(_FOR, []))]
        others = [host for host in hosts if not self._is_trusted(host)]
        claimed = others[-1] if others else next(iter(hosts), "")
        if _address(claimed) is not None:
            scope["client"] = (claimed, 0)


def _of_route(found: dict[bytes, list[bytes]]) -> dict[str, Any]:
    """Read the headers of a route that has shown the secret."""
    asked = _ASKED.fullmatch(found.get(TRANSCRIPT, [b""])[0].decode("latin-1"))
    return {
        "change": change_of(found.get(CHANGE, [b""])[0]),
        "transcript": None if asked is None else (int(asked[1]), float(asked[2])),
    }


def _afar(found: dict[bytes, list[bytes]]) -> str:
    named = [host for name in _LISTS for host in _listed(found.get(name, []))]
    named += [value.decode("latin-1") for name in _ADDRESSES for value in found.get(name, [])]
    for value in found.get(_STANDARD, []):
        named += [host.strip('"') for host in _STANDARD_FOR.findall(value.decode("latin-1"))]
    return next((host for host in map(_host, named) if host and not _is_here(host)), "")


def _is_here(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


def _listed(values: Iterable[bytes]) -> list[str]:
    return b",".join(values).decode("latin-1").split(",")


def _host(text: str) -> str:
    """Return the host of `host`, `host:port`, `[host]` or `[host]:port`."""
    text = text.strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _address(host: str) -> Any:
    """Return the IP address, an IPv4 one for one that IPv6 maps; None if the host is none."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
