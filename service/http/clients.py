"""The names under which clients are counted, and the limit of event streams per client."""

import ipaddress
from collections import Counter

from fastapi import Request

from service.http.problems import Problem
from service.metrics import Metrics


def client_name(request: Request) -> str:
    """Return the name under which a client is counted: the owner of its key, else its address."""
    if request.state.owner:
        return f"key:{request.state.owner}"
    return address_name(request.client.host if request.client else "")


def address_name(host: str) -> str:
    """Return the name under which an address is counted: for IPv6 its /64 network, which one customer usually has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket has none
        return f"address:{host}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return f"address:{address.ipv4_mapped}"
        return f"address:{ipaddress.ip_network((int(address), 64), strict=False)}"
    return f"address:{address}"


class StreamLimit:
    """Counts the open event streams of each client."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._metrics = metrics
        self._open: Counter[str] = Counter()

    def open(self, client: str) -> None:
        """Count a stream, or raise the 429 `Problem`."""
        if self._open[client] >= self._limit:
            self._metrics.rejected.labels(reason="streams").inc()
            detail = f"This client has {self._limit} event streams open already; close one, or poll the job."
            raise Problem(429, detail, kind="too-many-streams")
        self._open[client] += 1

    def close(self, client: str) -> None:
        """Stop counting a stream."""
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]
