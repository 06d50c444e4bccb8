"""A bucket of Google Cloud Storage, of which a stand-in answers the requests that listing and reading make."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

OBJECTS = {"in/b.png": b"b", "in/a/1.png": b"one", "in/a-.png": b"a-"}

READ = """
from ncml.errors import InputError
from ncml.object_storage import StoragePath
from ncml.paths import list_files
for path in list_files([StoragePath("gs://bucket/in")]):
    print(path, *path.state(), path.read(100)[1].decode())
try:
    list(list_files([StoragePath("gs://bucket/missing")]))
except InputError as error:
    print(error)
"""


class StandIn(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, _, key = url.path.partition("/o/")
        if url.path.endswith("/o"):
            self._send(json.dumps(self._list(dict(parse_qsl(url.query)))).encode())
        elif not key:
            self._send(b'{"name": "bucket", "kind": "storage#bucket"}')
        elif unquote(key) not in OBJECTS:
            self._send(b'{"error": {"code": 404, "message": "Not Found"}}', 404)
        elif "alt=media" in url.query:
            self._send(OBJECTS[unquote(key)])
        else:
            self._send(json.dumps(self._describe(unquote(key))).encode())

    def _list(self, query: dict[str, str]) -> dict[str, object]:
        prefix = query.get("prefix", "")
        below = [key for key in OBJECTS if key.startswith(prefix)]
        files = [key for key in below if "delimiter" not in query or "/" not in key[len(prefix) :]]
        folders = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in below if key not in files}
        return {"items": [self._describe(key) for key in files], "prefixes": sorted(folders)}

    @staticmethod
    def _describe(key: str) -> dict[str, str]:
        times = dict.fromkeys(("updated", "timeCreated"), "2026-11-29T01:02:03.456Z")
        return {"name": key, "bucket": "bucket", "size": str(len(OBJECTS[key])), "generation": "1"} | times

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_google_bucket_is_listed_and_read(url: str) -> None:
    # The stand-in speaks no gRPC, through which gcsfs would ask for the type of the bucket.
    settings = {"FSSPEC_GS_TOKEN": "anon", "STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "gs://bucket/in/a-.png 2 2026-11-29T01:02:03.456000000Z a-",
        "gs://bucket/in/a/1.png 3 2026-11-29T01:02:03.456000000Z one",
        "gs://bucket/in/b.png 1 2026-11-29T01:02:03.456000000Z b",
        "gs://bucket/missing cannot be read: there is no such bucket, folder or file.",
    ]
