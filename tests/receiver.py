"""A receiver of webhooks, which verifies signatures with the reference library and can stop, start and refuse."""

import base64
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook
from starlette.testclient import TestClient

from tests.conftest import free_port

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def write_secret(folder: Path) -> Path:
    """Write a file with the secret; return its path."""
    path = folder / "webhook-secret"
    path.write_text(f"{SECRET}\n")
    return path


class Receiver:
    """Listens on a port of 127.0.0.1."""

    def __init__(self) -> None:
        self.port = free_port()
        self.messages: list[tuple[str, Any]] = []
        """The id and the document of each message that it has accepted."""
        self.bodies: dict[str, set[bytes]] = {}
        """The bodies that arrived under each id, accepted or not."""
        self.paths: list[str] = []
        self.faults: list[str] = []
        self.status: Callable[[], int] = lambda: 200
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.body = b""
        self.drips: list[bytes] = []
        """Parts of a response in place of the usual one, which are sent one by one."""
        self.at_once = self.most_at_once = 0
        self._server: ThreadingHTTPServer | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=t"

    @property
    def entry(self) -> str:
        """Its entry in NCML_WEBHOOK_HOSTS."""
        return f"127.0.0.1:{self.port}"

    @property
    def counts(self) -> Counter[str]:
        """How often each message was accepted."""
        return Counter(message_id for message_id, _ in self.messages)

    def start(self, certificate: Path | None = None, key: Path | None = None) -> None:
        """Listen, with a certificate by HTTPS."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._receive(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _receive(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.delay_s)
            size = int(request.headers.get("Content-Length", 0))
            body = request.rfile.read(size)
            if len(body) < size:
                return  # the sender was killed
            message_id = request.headers.get("webhook-id", "")
            with self._lock:
                self.paths.append(request.path)
                self.bodies.setdefault(message_id, set()).add(body)
                status = self.status()
                try:
                    Webhook(SECRET).verify(body, dict(request.headers.items()))
                except Exception as error:
                    self.faults.append(repr(error))
                    status = 400
                if status == 200:
                    self.messages.append((message_id, json.loads(body)))
            for part in self.drips:
                request.wfile.write(part)
                time.sleep(0.05)
            if self.drips:
                return
            request.send_response(status)
            for name, value in self.headers.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(self.body)
        except OSError:
            pass  # the sender was killed
        finally:
            with self._lock:
                self.at_once -= 1


def submit_with(client: TestClient, url: str, **headers: str) -> str:
    """Submit a job with a webhook; return its id."""
    response = client.post("/generate", params={"webhook": url}, headers={"Prefer": "respond-async"} | headers)
    assert "X-Job-Id" in response.headers, response.text
    return response.headers["X-Job-Id"]
