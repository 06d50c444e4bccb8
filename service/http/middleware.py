"""ASGI middleware: request ids, access log, metrics, security headers, and unexpected errors."""

import asyncio
import contextvars
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.deferred import MAX_CONCURRENT_ROUTES, call_and_respond
from service.http.problems import Problem
from service.http.stopping import Stop, stopping
from service.service_metrics import Metrics
from worker import traces
from worker.logs import JsonFormatter, configure

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger("service.access")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

trace_id: contextvars.ContextVar[str] = contextvars.ContextVar("trace_id", default="")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: a page may load only the service's own files, and images that its scripts create."""
_SECURITY_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestContextMiddleware:
    """The outermost middleware: gives every request an id, a line in the access log, metrics and security headers."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: "Tracer | None" = None) -> None:
        self.app = app
        self.metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # handled as a GET, of which the server sends the head only
            scope = {**scope, "method": "GET"}
        started, status = time.perf_counter(), 0
        client_id = Headers(scope=scope).get("x-request-id", "")
        own_id = client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})  # authentication and rate limits add to it
        span = traces.start_request(self._tracer, Headers(scope=scope), method) if self._tracer else None
        traceparent = traces.format_traceparent(span) if span else ""
        state |= {"request_id": own_id, "owner": "", "headers": {}, "traceparent": traceparent, "has_begun": False}
        state["is_head"] = method == "HEAD"
        token, trace_token = request_id.set(own_id), trace_id.set(traces.trace_id(traceparent))

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, state["has_begun"] = message["status"], True
                headers = MutableHeaders(raw=message["headers"])
                headers["X-Request-Id"] = own_id
                for name, value in (_SECURITY_HEADERS | state["headers"]).items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")  # pages and static files set theirs
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self._record(scope, method, status or 499, time.perf_counter() - started)  # 499: the client disconnected
            if span:
                traces.end_request(span, method, _route_path(scope), status or 499, own_id)
            request_id.reset(token)
            trace_id.reset(trace_token)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        """Count the request and log it."""
        path = _route_path(scope)
        method = method if method in _METHODS else "OTHER"
        self.metrics.requests.labels(route=path, method=method, code=status).inc()
        self.metrics.request_seconds.labels(route=path, code=status).observe(seconds)
        if owner := scope["state"]["owner"]:
            sender = {"owner": owner}
        else:  # such as one whose key is refused
            sender = {"client": scope["client"][0]} if scope.get("client") else {}
        log.info("%s %s %s", method, path, status, extra={"seconds": round(seconds, 4)} | sender)


def _route_path(scope: Scope) -> str:
    route: Any = scope.get("route")
    if path := getattr(route, "path", ""):
        return path
    if "endpoint" in scope:  # the OpenAPI document, and the files below a mount
        return scope["root_path"] or scope["path"]
    return "unmatched"


class UnexpectedErrorMiddleware:
    """Sends deferred responses; answers unexpected exceptions with a 500 and logs their traceback.

    It is inside the CORS middleware, so that pages of other origins can read these responses as well.
    """

    def __init__(self, app: ASGIApp, stop: Stop) -> None:
        self.app = app
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_ROUTES)
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await call_and_respond(self.app, scope, receive, send, self._slots, self._stop)
        except ClientDisconnect:
            log.debug("the client disconnected while sending its body")
        except Problem as problem:  # of an interrupted route
            await problem.response(scope["state"]["request_id"])(scope, receive, send)
        except asyncio.CancelledError:  # the process ends, although the request is not answered
            if scope["state"]["has_begun"]:
                raise
            await stopping().response(scope["state"]["request_id"])(scope, receive, send)
        except Exception:
            log.exception("unexpected error")
            if scope["state"]["has_begun"]:  # the status is sent, so only closing the connection can report the error
                raise
            problem = Problem(500, "The service failed unexpectedly; its log has the details under this request id.")
            await problem.response(scope["state"]["request_id"])(scope, receive, send)


class RequestLogFormatter(JsonFormatter):
    """Formats records like the workers' log, with the ids of the current request and its trace."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        if current_id := request_id.get():
            record.__dict__.setdefault("request", current_id)  # "job ended" names the request of the job
        if current_trace := trace_id.get():
            record.trace = current_trace
        return super().format(record)


def log_to_stderr(level: str) -> None:
    """Send the log of this process to standard error as JSON lines."""
    configure(level, RequestLogFormatter())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True
