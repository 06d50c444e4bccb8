"""The HTTP server of `python -m service`, with limits on the connections of clients."""

import functools
import logging
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from service.http.protocol import BoundedProtocol, ConnectionLimits
from service.settings import read_settings

RESERVED_FILES = 96
"""File descriptors reserved for everything but the connections of clients: the queue, uploads, modules."""

log = logging.getLogger(__name__)


def main(*, host: str = "127.0.0.1", port: int = 8000, graceful_s: int = 35) -> None:
    """Serve until SIGTERM. The settings are read from the environment.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        graceful_s: Seconds that requests in progress may take after SIGTERM.
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
    uvicorn.Server(config).run()


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
