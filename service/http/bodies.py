"""Limits on the bytes of each request body, and of all bodies that are being received and decoded."""

from collections import Counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.client_limits import address_name
from service.http.problems import Problem


class BodyLimitMiddleware:
    """Refuses bodies above the limit, by their Content-Length or while they arrive, and bodies beyond the total.

    A body counts until its route has returned: a request that waits for its job holds it no longer, and what arrives
    of it then is dropped. One client may occupy half of the total.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_receiving_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_receiving_bytes = max_receiving_bytes
        self._receiving: Counter[str] = Counter()  # bytes by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > self.max_body_bytes):
            await self._too_large().response(scope["state"]["request_id"])(scope, receive, send)
            return
        received_bytes, has_returned = 0, False
        client = address_name(scope["client"][0] if scope.get("client") else "")

        async def receive_counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            size = len(message.get("body", b""))
            received_bytes += size
            if size and not has_returned:
                self._receiving[client] += size
            if received_bytes > self.max_body_bytes:
                raise self._too_large()
            if size and not has_returned:
                self._check_room(client)
            return message

        try:
            await self.app(scope, receive_counted, send)
        finally:
            has_returned = True
            self._receiving[client] -= received_bytes
            if not self._receiving[client]:
                del self._receiving[client]

    def _check_room(self, client: str) -> None:
        if self._receiving.total() > self.max_receiving_bytes:
            raise Problem(503, "There is no space for another upload; retry in a few seconds.", kind="no-room")
        if self._receiving[client] > self.max_receiving_bytes // 2:
            detail = "This client sends too many images at once; wait for its other requests."
            raise Problem(429, detail, kind="too-many-uploads")

    def _too_large(self) -> Problem:
        detail = (
            f"The request body is too large: at most {self.max_body_bytes} bytes are accepted; send fewer or smaller "
            "images."
        )
        return Problem(413, detail, kind="too-large")
