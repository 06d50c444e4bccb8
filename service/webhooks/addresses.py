"""Which addresses webhooks contact: names are resolved once, and exactly the addresses that were checked are used.

Requests of clients must not reach what only the service can: its queue, its host, the private network, or the metadata
of a cloud. So an address must be public, or the operator must have listed it.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore2

from service.webhooks.targets import Address

CONNECT_S = 4.0
"""Seconds after which the next address of a host is tried, if there is one."""

_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")))
"""Ranges that some releases of Python call global: those of protocols, among them Teredo and 6to4, which embed IPv4
addresses, and documentation. Mapped addresses and NAT64 are outside 2000::/3."""


class ForbiddenAddress(Exception):
    """A host resolves to no address that may be contacted."""


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a host of the internet, and to no special range."""
    is_special = address.is_multicast or address.is_reserved or any(address in network for network in _SPECIAL)
    return address.is_global and not is_special and (address.version == 4 or address in _PUBLIC_IPV6)


class CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to permitted addresses only."""

    def __init__(self, permits: Callable[[Address], bool], resolver: ThreadPoolExecutor) -> None:
        """resolver: resolves names, which can take long, apart from the other work in threads."""
        self._permits = permits
        self._resolver = resolver
        new_backend: Any = httpcore2.AnyIOBackend  # its type is that of the case that anyio is missing
        self._backend: httpcore2.AsyncNetworkBackend = new_backend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first permitted address of a host that answers; raise `ForbiddenAddress` if it has none."""
        addresses = await asyncio.get_running_loop().run_in_executor(self._resolver, _resolve, host, port)
        permitted = [address for address in addresses if self._permits(address)]
        fault: Exception = ForbiddenAddress("it has no public or listed address")
        for address in permitted:
            limit_s = timeout if address == permitted[-1] else CONNECT_S
            try:
                return await self._backend.connect_tcp(str(address), port, limit_s, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                fault = error
        raise fault


def _resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host. Raises `OSError`."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(answer[4][0]) for answer in answers]
