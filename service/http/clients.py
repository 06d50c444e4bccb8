"""The names under which clients are counted, and the limits of their event streams and results."""

import asyncio
import contextlib
import ipaddress
from collections import Counter
from collections.abc import AsyncGenerator
from weakref import WeakValueDictionary

from fastapi import Request
from starlette.types import Message, Send

from service.http.problems import Problem
from service.metrics import Metrics

MAX_RESULTS, MAX_RESULTS_OF_CLIENT = 64, 8
"""Maximum number of results that are in memory at once, and of those for one client."""

PART_BYTES = 64 * 2**10
"""Size of the parts in which a result is sent."""


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


class ResultLimit:
    """Limits how many results are in memory at once, from loading them until the last part is sent; others wait."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_RESULTS)
        self._client_slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def slot(self, client: str) -> AsyncGenerator[None]:
        """Return the context in which a result may be loaded and sent."""
        client_slots = self._client_slots.setdefault(client, asyncio.Semaphore(MAX_RESULTS_OF_CLIENT))
        async with client_slots, self._slots:
            yield


def in_parts(send: Send) -> Send:
    """Return a `send` that passes on a body in parts, because uvicorn waits for the reader only before it sends one."""

    async def send_parts(message: Message) -> None:
        body: bytes = message.get("body", b"")
        last = max(0, len(body) - 1) // PART_BYTES * PART_BYTES
        for start in range(0, last, PART_BYTES):
            part = body[start : start + PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({**message, "body": body[last:]} if last else message)

    return send_parts
