"""Keys made from a request: who is limited, such that no client gets a second limit by claiming to be another.

Promise  the key is a user, an API key that you gave out, or the address; of IPv6 the /64 network that one client
         commonly has for itself.
Not      for `Forwarded` (RFC 7239), which is not read. Your server may replace the address before: uvicorn believes
         X-Forwarded-For from 127.0.0.1 unless told --no-proxy-headers.
Units    none.
Errors   errors that your functions raise pass.
Source   RFC 4291 2.5.4 (interface identifiers), 2.5.5.2 (IPv4-mapped); MDN, X-Forwarded-For, "Selecting an IP address".
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from distsys._support.http import Scope


def by_client(
    *,
    user: Callable[[Scope], Any] | None = None,
    api_key: Callable[[str], Any] | None = None,
    header: str = "x-api-key",
    proxies: int | Sequence[str] = 0,
) -> Callable[[Scope], Awaitable[str]]:
    """Return a key function: the user, else the API key, else the address. A key that a client made up is not one.

    user      returns who is logged in, as your authentication found out, or None; may be async
    api_key   says whether the value of `header` is a key that you gave out; may be async. The key is hashed, never kept
    proxies   see client_address
    """
    address = client_address(proxies=proxies)

    async def key(scope: Scope) -> str:
        who = await awaited(user(scope)) if user else None
        if who not in (None, ""):
            return f"user:{who}"
        if api_key and (given := next(_header(scope, header), "")) and await awaited(api_key(given)):
            return f"key:{hashed(given)}"
        return f"address:{address(scope)}"

    return key


def client_address(*, proxies: int | Sequence[str] = 0) -> Callable[[Scope], str]:
    """Return a key function: the client's IPv4 address, or the /64 network that an IPv6 client commonly has for itself.

    proxies  the proxies you trust: how many in a row, if nobody can go around them, or the networks they are in.
             Without them X-Forwarded-For is not believed; with them only the entries that one of them wrote

    If such an entry is no address, all its clients share the limit of the proxy that wrote it. ValueError for a
    negative count or a network that is none.
    """
    count = proxies if isinstance(proxies, int) else 0
    given: Sequence[str] = () if isinstance(proxies, int) else [proxies] if isinstance(proxies, str) else proxies
    networks = [ip_network(one) for one in given]
    if count < 0:
        raise ValueError(f"proxies={proxies!r}: how many in a row, 0 or more, or their networks")

    def address(scope: Scope) -> str:
        connected = str((scope.get("client") or ("",))[0])
        if not proxies:
            return _client(connected)
        found = _ip(connected)
        for hop, entry in enumerate(reversed(",".join(_header(scope, "x-forwarded-for")).split(","))):
            trusted = hop < count or (found and any(found in network for network in networks))
            if not trusted or (before := _ip(entry)) is None:
                break
            found = before
        return _client(str(found or ""))

    return address


@functools.lru_cache(10_000)  # the same clients come again
def _client(text: str) -> str:
    found = _ip(text)
    if isinstance(found, IPv6Address):
        return f"{IPv6Address(int(found) >> 64 << 64)}/64"
    return str(found or "unknown")


def hashed(word: str) -> str:
    """Return what to keep of a secret or of a long key: the first 128 bits of its SHA-256, in hex."""
    return hashlib.sha256(word.encode(errors="surrogatepass")).hexdigest()[:32]


async def awaited(given: Any) -> Any:
    """Return the value, awaited if it is an awaitable."""
    return await given if inspect.isawaitable(given) else given


def _header(scope: Scope, name: str) -> Iterator[str]:
    wanted = name.lower().encode()
    return (value.decode("latin-1").strip() for key, value in scope.get("headers", ()) if key.lower() == wanted)


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address, given with or without a port, or None; an IPv4-mapped IPv6 address is an IPv4 address."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
