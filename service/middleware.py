"""Around every request: its id, its line in the log, its metrics, its size, and the headers that protect a browser."""

import contextvars
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics
from service.problems import Problem, response
from worker.logs import JsonFormatter, configure

log = logging.getLogger("service.access")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a page served here may load: its own files, and pictures that its scripts have made."""
_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Around:
    """Pure ASGI middleware, the outermost one: nothing is answered without an id and a line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = scope["method"]
        if asked == "HEAD":  # a GET, of whose answer the server sends the head alone
            scope = {**scope, "method": "GET"}
        started, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})  # a route's guards add to it
        state |= {"request_id": own, "owner": "", "headers": {}}
        token = request_id.set(own)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(raw=message["headers"])
                out["X-Request-Id"] = own
                for name, value in (_HEADERS | state["headers"]).items():
                    out.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            route: Any = scope.get("route")
            path = str(getattr(route, "path", "")) or "unmatched"
            method = asked if asked in _METHODS else "OTHER"
            status = status or 499  # the client went away before it was answered
            self.metrics.requests.labels(route=path, method=method, code=status).inc()
            self.metrics.request_seconds.labels(route=path, code=status).observe(seconds)
            whose = {"owner": state["owner"]} if state["owner"] else {}
            log.info("%s %s %s", method, path, status, extra={"seconds": round(seconds, 4)} | whose)
            request_id.reset(token)


class Guard:
    """Pure ASGI middleware that refuses bodies beyond the limit and answers defects.

    It stands inside what lets pages of other origins read answers, so that they can read these, too.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, received = False, 0

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise self.too_large()
            return message

        async def refuse(problem: Problem) -> None:
            await response(problem, scope["state"]["request_id"])(scope, receive, send)

        try:
            length = Headers(scope=scope).get("content-length", "0")
            if length.isdecimal() and (len(length) > 18 or int(length) > self.max_body_bytes):
                await refuse(self.too_large())
            else:
                await self.app(scope, receive_counted, send_noted)
        except ClientDisconnect:
            pass  # in the middle of its body: there is nobody to answer
        except Exception:
            log.exception("a defect")
            if begun:  # the response is under way: cutting the connection is all that is left
                raise
            await refuse(Problem(500, "Something went wrong here; the log has it under this request's id."))

    def too_large(self) -> Problem:
        """The 413 for a body beyond the limit."""
        most = f"at most {self.max_body_bytes} bytes are accepted"
        detail = f"The request body is too large: {most}; send fewer pictures at once, or smaller ones."
        return Problem(413, detail, kind="too-large")


class JsonLines(JsonFormatter):
    """The lines that the workers write, with the id of the request in hand."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        if identity := request_id.get():
            record.request = identity
        return super().format(record)


def log_to_stderr(level: str) -> None:
    """Send the log of this process to standard error as JSON lines."""
    configure(level, JsonLines())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True
