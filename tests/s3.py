"""A server of the S3 protocol (moto) on this machine, which counts requests and can refuse them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

from ncml.object_storage.filesystems import open_filesystem
from tests.conftest import free_port

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}

REFUSAL = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>%s</Message></Error>"


class _QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None: ...


class S3:
    """Buckets of one server; `line` is there from the start."""

    def __init__(self) -> None:
        self.port = free_port()
        self.requests: list[tuple[str, str]] = []
        """Method and path, with the query of listings."""
        self.refuse: Callable[[str, str], tuple[str, str] | None] = lambda method, path: None
        """Returns the status and the code of an error for a request, or None."""
        self.before: Callable[[str, str], None] = lambda method, path: None
        """Called before a request is answered."""
        self.expired = ""
        """Access key that is refused."""
        self.fraction = "000"
        """Of the times in listings; those of single objects are in whole seconds."""
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._buckets.create_bucket("line", "us-east-1")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which programs use this server."""
        return ENVIRONMENT | {"AWS_ENDPOINT_URL": self.url}

    def put(self, key: str, data: bytes, bucket: str = "line") -> None:
        self._buckets.put_object(bucket, key, data)

    def get(self, key: str, bucket: str = "line") -> bytes | None:
        found = self._buckets.get_object(bucket, key)
        return None if found is None else bytes(found.value)

    def remove(self, key: str, bucket: str = "line") -> None:
        self._buckets.delete_object(bucket, key)

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Copy the files of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def listed(self, bucket: str = "line") -> list[str]:
        return sorted(self._buckets.buckets[bucket].keys.keys())

    def paths(self, method: str) -> list[str]:
        """Return the paths of the requests with this method."""
        return [path for requested, path in self.requests if requested == method]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        s3_backends.reset()

    @property
    def _buckets(self) -> Any:
        return s3_backends["123456789012"]["aws"]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.before(method, path)
        self.requests.append((method, path if "list-type" not in environ["QUERY_STRING"] else f"{path}?list"))
        has_expired = bool(self.expired) and f"Credential={self.expired}/" in environ.get("HTTP_AUTHORIZATION", "")
        if refusal := ("403 Forbidden", "ExpiredToken") if has_expired else self.refuse(method, path):
            status, code = refusal
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"" if method == "HEAD" else REFUSAL % (code.encode(), code.encode())
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        parts = self._application(environ, start_response)
        is_listing = "list-type" in environ["QUERY_STRING"]
        return [part.replace(b".000Z<", f".{self.fraction}Z<".encode()) for part in parts] if is_listing else parts


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Run a server and use it in this process."""
    server = S3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    open_filesystem.cache_clear()
    try:
        yield server
    finally:
        open_filesystem.cache_clear()
        server.stop()
