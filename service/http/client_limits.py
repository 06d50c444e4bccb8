"""The names under which clients are counted, and the limits of their event streams and results."""

import asyncio
import contextlib
import ipaddress
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

import anyio.to_thread
from fastapi import Request
from starlette.types import Message, Send

from service.http.problems import Problem

T = TypeVar("T")

MAX_RESULT_BYTES, MAX_RESULT_BYTES_OF_CLIENT = 128 * 2**20, 32 * 2**20
"""Maximum bytes of the results that are in memory at once, and of those for one client, as the queue stores them."""

SMALL_RESULT_BYTES = 64 * 2**10
"""Bytes of a result that no limit concerns."""

STALL_S = 5.0
"""Seconds without progress after which a reader of a result is dropped, if others wait for its memory."""

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

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, client: str) -> Generator[None]:
        """Return the context in which a stream is open; raise the 429 `Problem` beyond the limit."""
        if self._open[client] >= self._limit:
            detail = f"This client has {self._limit} event streams open already; close one, or poll the job."
            raise Problem(429, detail, kind="too-many-streams")
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


class ResultReading:
    """One result in memory: who reads it, its size, and since when the reader lets the service wait."""

    def __init__(self, client: str, size: int) -> None:
        self.client = client
        self.size = size
        self._stalled_since = math.inf
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        try:
            await self._timeout.__aexit__(*exception)
        except TimeoutError as error:
            detail = "The result was not read while others waited for its memory; request it again and read it at once."
            raise Problem(503, detail, kind="no-room") from error

    @property
    def droppable_at(self) -> float:
        """When the reader may be dropped, by the clock of the event loop; infinite while the service is at work."""
        return self._stalled_since + STALL_S

    def drop(self) -> None:
        """Cut the response off."""
        self._timeout.reschedule(asyncio.get_running_loop().time())

    def send(self, send: Send) -> Send:
        """Return a `send` that passes on a body in parts: uvicorn waits for the reader only before it sends one."""

        async def send_part(message: Message) -> None:
            self._stalled_since = asyncio.get_running_loop().time()
            await send(message)
            self._stalled_since = math.inf

        async def send_parts(message: Message) -> None:
            body: bytes = message.get("body", b"")
            last = max(0, len(body) - 1) // PART_BYTES * PART_BYTES
            for start in range(0, last, PART_BYTES):
                part = body[start : start + PART_BYTES]
                await send_part({"type": "http.response.body", "body": part, "more_body": True})
            await send_part({**message, "body": body[last:]} if last else message)

        return send_parts


class ResultLimit:
    """Limits the bytes of results in memory, from loading them until their last part is sent.

    Small results pass at once. Others wait for room, those of one client and those of all in turn; while they wait,
    readers that have read nothing for `STALL_S` are dropped to make room.
    """

    def __init__(self) -> None:
        self._readings: set[ResultReading] = set()
        self._released = asyncio.Event()
        self._turn = asyncio.Lock()
        self._client_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def hold(self, client: str, size: int) -> AsyncGenerator[ResultReading]:
        """Return the context in which a result of `size` bytes may be loaded and sent.

        Raises the 503 `Problem` in it if the reader is dropped.
        """
        reading = ResultReading(client, size)
        if size > SMALL_RESULT_BYTES:
            async with self._client_turns.setdefault(client, asyncio.Lock()):
                await self._make_room(size, MAX_RESULT_BYTES_OF_CLIENT, client)
                async with self._turn:
                    await self._make_room(size, MAX_RESULT_BYTES)
                self._readings.add(reading)
        try:
            async with reading:
                yield reading
        finally:
            self._readings.discard(reading)
            self._released.set()

    async def _make_room(self, size: int, limit: int, client: str | None = None) -> None:
        """Wait until a result fits into the limit of all clients or of one; any size fits if it is the only one."""
        while True:
            readings = [reading for reading in self._readings if client in (None, reading.client)]
            if not readings or sum(reading.size for reading in readings) + size <= limit:
                return
            slowest = min(readings, key=lambda reading: reading.droppable_at)
            self._released.clear()
            try:
                async with asyncio.timeout_at(min(slowest.droppable_at, asyncio.get_running_loop().time() + STALL_S)):
                    await self._released.wait()
            except TimeoutError:
                if slowest.droppable_at <= asyncio.get_running_loop().time():
                    self._readings.discard(slowest)
                    slowest.drop()


class RenderingTurns:
    """Lets clients take turns with costly renderings: one thread computes one part at a time, of one of each client."""

    def __init__(self) -> None:
        self._thread = anyio.CapacityLimiter(1)
        self._client_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, client: str, render: Callable[..., T], *arguments: Any) -> T:
        """Return `render(*arguments)`, computed in a turn of the client."""
        async with self._client_turns.setdefault(client, asyncio.Lock()):
            return await anyio.to_thread.run_sync(render, *arguments, limiter=self._thread)

    async def render_parts(self, client: str, parts: Iterator[bytes]) -> AsyncGenerator[bytes]:
        """Yield the parts that are not empty, each computed in a turn of its own."""

        def next_part() -> bytes | None:
            return next(parts, None)

        while (part := await self.run(client, next_part)) is not None:
            if part:
                yield part
