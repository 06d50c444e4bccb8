"""The HTTP server of `python -m service`, with limits on the connections of clients."""

import asyncio
import functools
import logging
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from service.http.protocol import BoundedProtocol, ConnectionLimits
from service.settings import read_settings

RESERVED_FILES = 96
"""File descriptors reserved for everything but the connections of clients: the queue, uploads, modules."""

ANSWER_S = 3.0
"""Seconds before the end of a graceful stop at which requests that still wait are answered."""

LAST_ROUNDS, ROUND_S = 5, 0.05
"""Rounds of the event loop after the last connection was accepted, for its request; each takes at least this time."""

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which announces a stop to the application before it waits for the open connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; requests in progress are answered within the graceful time."""
        graceful_s = self.config.timeout_graceful_shutdown or 0
        answer_within_s = max(0.0, graceful_s - ANSWER_S)
        began = time.monotonic()
        self.lifespan.state["stop"].begin(answer_within_s)
        await self._receive_last_requests(began + answer_within_s)
        self.config.timeout_graceful_shutdown = max(0, graceful_s - math.ceil(time.monotonic() - began))
        await super().shutdown(sockets)

    async def _receive_last_requests(self, deadline: float) -> None:
        """Accept the connections that wait, and read what they have sent: closing the socket would reset them.

        Stop at a time of the monotonic clock: connections may arrive without end.
        """
        waiting = select.poll()
        for server in self.servers:
            for listener in server.sockets:
                waiting.register(listener.fileno(), select.POLLIN)
        rounds = LAST_ROUNDS
        while rounds and time.monotonic() < deadline:
            await asyncio.sleep(ROUND_S)
            rounds = LAST_ROUNDS if waiting.poll(0) else rounds - 1


def main(*, host: str = "127.0.0.1", port: int = 8000, graceful_s: int = 35) -> None:
    """Serve until SIGTERM. The settings are read from the environment.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        graceful_s: Seconds after SIGTERM within which requests in progress are answered, if need be with 202 or 503.
    """
    settings = read_settings()
    limits = ConnectionLimits(
        connections=connection_limit(settings.max_connections),
        header_s=settings.header_timeout_s,
        body_s=settings.body_timeout_s,
    )
    protocol: Any = functools.partial(BoundedProtocol, limits=limits)
    config = uvicorn.Config(
        "service.app:from_environment",
        factory=True,
        host=host,
        port=port,
        http=protocol,
        access_log=False,  # the application has its own
        # uvicorn would trust the X-Forwarded-For of every program on this machine
        forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS") or [],
        timeout_keep_alive=settings.idle_timeout_s,
        timeout_graceful_shutdown=graceful_s,
    )
    # uvicorn raises the signal that stopped it again. By default it would end the process before its exit handlers have
    # removed temporary files.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    Server(config).run()


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def connection_limit(requested: int) -> int:
    """Raise the process's limit of open files if necessary; return how many of the connections it then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = requested + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return requested
    connections = max(soft - RESERVED_FILES, 1)
    log.warning("the limit of %d open files allows %d connections instead of %d", soft, connections, requested)
    return connections
