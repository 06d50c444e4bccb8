"""Deferred responses: a request that waits for its job holds neither its body nor the frames of its route."""

import asyncio
import contextlib
import logging

from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.origins import OPEN_PATHS
from service.http.stopping import Stop

log = logging.getLogger(__name__)

MAX_CONCURRENT_ROUTES = 64
"""Maximum number of routes that run at once for requests without a body."""


class DeferredResponse(Response):
    """What a route returns to respond later: `respond` runs once everything that the route used is released."""

    def __init__(self, respond: ASGIApp) -> None:
        super().__init__()
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave the response to `call_and_respond`."""
        scope["state"]["deferred"] = self._respond, receive, send


def _needs_slot(scope: Scope) -> bool:
    """Return whether the route of a request waits until it is one of few that run, so that a burst takes little memory.

    Requests with a body are exempt, because their clients determine how long the body takes. For the same reason a
    route keeps its slot until its response begins.
    """
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return not has_body and scope["path"] not in OPEN_PATHS


async def call_and_respond(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, slots: asyncio.Semaphore, stop: Stop
) -> None:
    """Call an application; if it defers its response, release what it put into the scope and send the response.

    Exceptions of the deferred response become problem documents, as those of routes do; if it has begun, it is cut off.
    A stop interrupts the route with a 503 `Problem`, unless its response has begun or it has lifted the interruption
    in the scope's state.
    """
    inherited = scope.keys() | {"route", "starlette.exception_handlers"}
    async with stop.interruption() as interruption, contextlib.AsyncExitStack() as slot:
        scope["state"]["interruption"] = interruption
        if _needs_slot(scope):
            await slot.enter_async_context(slots)

        async def send_without_slot(message: Message) -> None:
            interruption.lift()
            await slot.aclose()
            await send(message)

        await app(scope, receive, send_without_slot)
    del scope["state"]["interruption"]
    if "deferred" not in scope["state"]:
        return
    respond, *channels = scope["state"].pop("deferred")
    for name in scope.keys() - inherited:
        del scope[name]
    try:
        await respond(scope, *channels)
    except Exception as error:
        if scope["state"]["has_begun"]:
            expected, _ = scope["starlette.exception_handlers"]
            if not isinstance(error, tuple(expected)):
                raise
            log.warning("a response was cut off: %s", error)  # the server closes the connection
            return

        async def fail(*_: object, error: Exception = error) -> None:
            raise error

        await wrap_app_handling_exceptions(fail, Request(scope))(scope, *channels)


async def disconnected(receive: Receive) -> None:
    """Return when the client closes its connection; drop what arrives of its body."""
    while (await receive())["type"] != "http.disconnect":
        pass
