"""Notifications of changed jobs: one connection per process wakes all followers of a job in it.

The scripts in `lua/` publish the ids of jobs whose state or progress changed. Messages carry no data: a follower that
wakes up reads the job itself, so a lost message only costs time.
"""

import asyncio
import contextlib
import contextvars
import inspect
import logging
from collections.abc import AsyncGenerator
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.outages import Outages
from worker.redis_keys import PROGRESS_CHANNEL, STATE_CHANNEL

RECONNECT_S = 0.2
"""Pause before the connection is opened again after an error."""

PING_S = 5.0
"""Silence after which the server is sent a ping; as long again without an answer ends the connection."""

log = logging.getLogger("ncml.queue")


class Follower:
    """Waits for changes of one job."""

    __slots__ = ("_has_changed", "progress")

    def __init__(self, *, progress: bool) -> None:
        self.progress = progress
        self._has_changed = asyncio.Event()

    def wake(self) -> None:
        """End the current wait, or the next one."""
        self._has_changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Return True once the job may have changed since the last wait, False after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_changed.wait()
        has_changed = self._has_changed.is_set()
        self._has_changed.clear()
        return has_changed


class Changes:
    """Dispatches what the scripts publish to the followers in this process, over one connection."""

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._followers: dict[str, set[Follower]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._first_attempt = asyncio.Event()  # set once the first subscription has succeeded or failed
        self._outages = Outages()

    @contextlib.asynccontextmanager
    async def follow(self, job_id: str, *, progress: bool = False) -> AsyncGenerator[Follower]:
        """Yield a follower of a job's state, and of its progress if requested.

        Changes after this call wake it. Nothing wakes it while the server is unreachable.
        """
        if self._listener is None:
            self._first_attempt = asyncio.Event()
            # In an empty context: in that of the first request, the log would add its id to every message of the task.
            self._listener = asyncio.get_running_loop().create_task(self._listen(), context=contextvars.Context())
        follower = Follower(progress=progress)
        self._followers.setdefault(job_id, set()).add(follower)
        try:
            await self._first_attempt.wait()
            yield follower
        finally:
            self._followers[job_id].discard(follower)
            if not self._followers[job_id]:
                del self._followers[job_id]

    async def aclose(self) -> None:
        """Close the connection."""
        if self._listener:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
            self._listener = None

    async def _listen(self) -> None:
        async with _asynchronous(self._pool) as client:
            while True:
                try:
                    async with client.pubsub() as channels, _disconnecting(channels):
                        await channels.subscribe(STATE_CHANNEL, PROGRESS_CHANNEL)
                        await self._receive(channels)
                except (redis.RedisError, OSError) as error:
                    self._outages.report(log, "changes of jobs are not received", error)
                    self._first_attempt.set()
                    await asyncio.sleep(RECONNECT_S)

    async def _receive(self, channels: Any) -> None:
        """Dispatch messages until an error, or until the server does not answer a ping.

        redis-py's health check of a subscription sends pings but does not notice that their answers are missing.
        """
        is_pinged = False
        while True:
            if message := await channels.get_message(timeout=PING_S):
                is_pinged = False
                self._dispatch(message)
            elif is_pinged:
                raise redis.TimeoutError(f"no answer to a ping for {PING_S:g} s")
            else:
                await channels.ping()
                is_pinged = True

    def _dispatch(self, message: dict[str, Any]) -> None:
        is_progress = message["channel"] == PROGRESS_CHANNEL.encode()
        if message["type"] == "message":
            for job_id in message["data"].decode(errors="replace").split():
                for follower in self._followers.get(job_id, ()):
                    if follower.progress or not is_progress:
                        follower.wake()
        elif is_progress:  # both subscriptions are confirmed: wake all, since earlier changes may have been missed
            self._first_attempt.set()
            for followers in self._followers.values():
                for follower in followers:
                    follower.wake()


@contextlib.asynccontextmanager
async def _disconnecting(channels: Any) -> AsyncGenerator[None]:
    """On exit, wait until the connection is closed (over TLS, the server must answer); redis-py does not wait."""
    try:
        yield
    finally:
        with contextlib.suppress(redis.RedisError, OSError):  # the server may not answer
            if channels.connection:
                await channels.connection.disconnect()


_OPTIONS = {"host", "port", "db", "username", "password", "socket_connect_timeout"} | {
    name for name in inspect.signature(redis.asyncio.Redis).parameters if name.startswith("ssl_")
}
"""Options that redis-py's synchronous and asynchronous connections share."""


def _asynchronous(pool: Any) -> Any:
    """Return an asynchronous client of the server of a pool."""
    options = {name: value for name, value in pool.connection_kwargs.items() if name in _OPTIONS}
    if "path" in pool.connection_kwargs:
        options["unix_socket_path"] = pool.connection_kwargs["path"]
    is_tls = issubclass(pool.connection_class, redis.SSLConnection)
    client: Any = redis.asyncio.Redis  # redis-py's types are those of both its clients
    return client(**options, ssl=is_tls, socket_keepalive=True, retry=Retry(NoBackoff(), 0))
