"""Responses that wait: a request that waits for its job holds neither its body nor the frames of its route."""

from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


class DeferredResponse(Response):
    """What a route returns to respond later: `respond` runs once everything that the route used is released."""

    def __init__(self, respond: ASGIApp) -> None:
        super().__init__()
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave the response to `call_and_respond`."""
        scope["state"]["deferred"] = self._respond, receive, send


async def call_and_respond(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Call an application; if it defers its response, release what it put into the scope and send the response.

    Exceptions of the deferred response become problem documents, as those of routes do.
    """
    inherited = scope.keys() | {"route", "starlette.exception_handlers"}
    await app(scope, receive, send)
    if "deferred" not in scope["state"]:
        return
    respond, receive, send = scope["state"].pop("deferred")
    for name in scope.keys() - inherited:
        del scope[name]
    try:
        await respond(scope, receive, send)
    except Exception as error:

        async def fail(*_: object, error: Exception = error) -> None:
            raise error

        await wrap_app_handling_exceptions(fail, Request(scope))(scope, receive, send)
