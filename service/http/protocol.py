"""Limits on connections: how many may be open, and how long a client may take to send a request or read a response.

uvicorn itself only closes connections that are idle after a response. One that never sends a request, sends it byte by
byte, or never reads its response would stay open and keep the unread data in memory.
"""

import asyncio
import json
import select
import socket
import struct
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.problems import MEDIA_TYPE, RETRY_AFTER_S, Problem

MAX_HEAD_BYTES = 64 * 2**10
"""Maximum bytes of a request's line and headers, and of what follows a body in chunks."""

RESET_CHECK_S = 0.25
"""Seconds between two checks of whether a client that sends nothing more is gone."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of one process."""

    connections: int
    header_s: float
    body_s: float


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits. A connection that exceeds one receives a problem document and is closed."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._read_deadline: asyncio.TimerHandle | None = None
        self._reset_check: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._is_in_trailers = False
        self._is_refused = False
        self._head_bytes = self._header_bytes = self._block_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, unless too many are open."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(HIGH_WATER_LIMIT, low=0)  # `resume_writing` means that all was read
        if len(self.connections) > self._limits.connections:
            self._refuse(503, "The service has too many connections; retry in a few seconds.", "no-room")
        else:
            self._set_deadline(self._limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadlines of the connection."""
        self._set_deadline(None)
        self._cancel_read_deadline()
        if self._reset_check:
            self._reset_check.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open: the client may have shut down its sending side only.

        Until something is sent to it, a client that is gone looks the same. Therefore it is sent an interim response,
        which clients discard, and the system of a client that is gone resets the connection. Clients of HTTP/1.0, which
        may not be sent interim responses, and those that follow a stream count as gone.
        """
        cycle: Any = self.cycle  # None before the first request
        if self._is_refused or self._is_in_head or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if cycle.scope["http_version"] == "1.0" or cycle.chunked_encoding:
            return False
        cycle.keep_alive = False
        if not cycle.response_started and not self.pipeline:  # otherwise, the connection is amid a response
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._reset_check = self.loop.call_later(RESET_CHECK_S, self._check_reset)
        return True

    def _check_reset(self) -> None:
        """Close a connection that the client's system has reset: the event loop does not notice it after the end."""
        connection: socket.socket = self.transport.get_extra_info("socket")
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        if poll.poll(0):
            self.transport.abort()
        else:
            self._reset_check = self.loop.call_later(RESET_CHECK_S, self._check_reset)

    def data_received(self, data: bytes) -> None:
        """Parse data, and check the size of an unfinished head or of unfinished trailers."""
        if self._is_refused:
            return
        self._block_bytes = len(data)
        super().data_received(data)
        cycle: Any = self.cycle  # None before the first request
        if (self._is_in_head or self._is_in_trailers) and not self._is_refused:
            self._head_bytes += len(data)
            self._check_head(self._head_bytes)
        elif cycle and cycle.response_complete and not self._deadline and not self.transport.is_closing():
            self._set_deadline(self._limits.header_s)  # blank lines, which have ended uvicorn's idle timeout

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed."""
        self._refuse(400, "The request is not valid HTTP; send it with an HTTP client.", "malformed")

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._is_in_head, self._head_bytes, self._header_bytes = True, 0, 0
        self._is_in_trailers = False
        self._set_deadline(self._limits.header_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Process a header, and count its bytes; discard a trailer.

        uvicorn would add trailers to the headers without limit. A proxy checks the headers only, and a trailer could
        pretend to be one that it sets.
        """
        if self._is_in_head:
            super().on_header(name, value)
            self._header_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Pass the request to the application, unless its head is too large."""
        self._is_in_head = False
        self._check_head(self._header_bytes + len(self.url))
        if not self._is_refused:
            super().on_headers_complete()
            self._set_deadline(self._limits.body_s)

    def on_chunk_header(self) -> None:
        """Begin a chunk: its data follows, or trailers after the last one. Their bytes count from the next block on."""
        self._is_in_trailers, self._head_bytes = True, -self._block_bytes

    def on_body(self, body: bytes) -> None:
        """Process a part of the body."""
        self._is_in_trailers = False
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request; its response may take any time."""
        self._is_in_trailers = False
        self._set_deadline(None)
        if not self._is_refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """Pause until the client has read what was sent."""
        super().pause_writing()
        self._set_read_deadline()

    def resume_writing(self) -> None:
        """Resume, since the client has read everything."""
        self._cancel_read_deadline()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """End the response, which the client may not have read completely."""
        super().on_response_complete()
        self._set_read_deadline()

    def _set_read_deadline(self) -> None:
        """Set the time by which the client must have read what was sent so far."""
        self._cancel_read_deadline()
        self._read_deadline = self.loop.call_later(self._limits.body_s, self._abort_unread)

    def _cancel_read_deadline(self) -> None:
        if self._read_deadline:
            self._read_deadline.cancel()

    def _abort_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            # a reset: after an ordinary close, transport and kernel would keep the data for the client
            connection: socket.socket = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def _set_deadline(self, timeout_s: float | None) -> None:
        """Set the time by which the next part of a request must have arrived; None: no part is expected."""
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(timeout_s, self._on_timeout) if timeout_s is not None else None

    def _on_timeout(self) -> None:
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle  # None before the first request
        if not self._is_in_head and (cycle is None or cycle.response_complete):
            self.transport.close()  # the client has sent nothing of a request
        else:
            self._refuse(408, "The request did not arrive in time; send it faster.", "timeout")

    def _check_head(self, size: int) -> None:
        if size > MAX_HEAD_BYTES:
            detail = f"The headers have more than {MAX_HEAD_BYTES} bytes; send fewer or shorter ones."
            self._refuse(431, detail, "too-large")

    def _refuse(self, status: int, detail: str, kind: str) -> None:
        """Answer with a problem, unless a response has begun, and close the connection."""
        self._is_refused = True
        self._set_deadline(None)
        cycle: Any = self.cycle  # None before the first request
        if cycle is None or cycle.response_complete or not cycle.response_started:
            problem = Problem(status, detail, kind=kind)
            if problem.is_refusal:
                self.app_state["metrics"].rejected.labels(reason=problem.reason).inc()
            body = json.dumps(problem.document("").model_dump()).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {MEDIA_TYPE}\r\n"
            head += f"Retry-After: {RETRY_AFTER_S}\r\n" if status == 503 else ""
            self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        if cycle is not None and not cycle.response_complete:  # notify the application of the disconnection
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._set_read_deadline()
