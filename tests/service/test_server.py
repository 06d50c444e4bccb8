"""A service process limits connections and uploads, and trusts only named proxies."""

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from service.server import RESERVED_FILES
from tests.conftest import Valkey, eventually, free_port

MIB = 2**20


@pytest.fixture(scope="module")
def port(valkey_server: Valkey) -> Iterator[int]:
    """A service without workers: at most 20 connections, 1 MiB of uploads, one second for each part of a request."""
    settings = {
        "NCML_MAX_CONNECTIONS": "20", "NCML_MAX_BODY_BYTES": str(MIB // 2), "NCML_MAX_RECEIVING_BYTES": str(MIB),
        "NCML_RATE_LIMIT": "4/hour",
        "NCML_HEADER_TIMEOUT_S": "1", "NCML_BODY_TIMEOUT_S": "1", "NCML_IDLE_TIMEOUT_S": "1",
    }  # fmt: skip
    with serving(valkey_server, settings) as port:
        yield port


@contextlib.contextmanager
def serving(valkey: Valkey, settings: dict[str, str]) -> Iterator[int]:
    """Run a service; yield its port."""
    port = free_port()
    settings = settings | {"NCML_REDIS_URL": valkey.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "--port", str(port)], env=os.environ | settings, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: answers(port), every_s=0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


def send(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def answer(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n"


def test_a_silent_connection_is_closed(port: int) -> None:
    began = time.monotonic()
    assert answer(send(port, b"")) == b""
    assert 0.5 < time.monotonic() - began < 20


def test_blank_lines_after_a_response_do_not_keep_a_connection_open(port: int) -> None:
    connection = send(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    connection.sendall(b"\r\n")
    began = time.monotonic()
    answer(connection)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("start", [b"POST", HEAD, HEAD + b"\r\nhalf"], ids=["line", "headers", "body"])
def test_a_request_that_does_not_arrive_in_time_is_refused(port: int, start: bytes) -> None:
    received = answer(send(port, start))
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"urn:ncml:problem:timeout"' in received


def test_a_request_that_arrives_byte_by_byte_is_refused(port: int) -> None:
    connection = send(port, b"GET /healthz HTTP/1.1\r\nX-Slow: ")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 300:
            connection.sendall(b"a")
            sent += 1
            time.sleep(0.1)
    assert sent < 300  # the connection was closed while bytes arrived
    received = answer(connection)
    assert not received or received.startswith(b"HTTP/1.1 408 ")  # closed before or after its response was read


@pytest.mark.parametrize("ends", [b"", b"\r\n\r\n"])
def test_headers_without_end_are_refused(port: int, ends: bytes) -> None:
    received = answer(send(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"a" * 80_000 + ends))
    assert received.startswith(b"HTTP/1.1 431 ")


REVIEW = b"POST /models/a/reviews HTTP/1.1\r\nContent-Type: image/png\r\n"
"""The beginning of a request whose body is read and whose client has no quota."""
CHUNKED = b"Host: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def test_trailers_are_no_headers(port: int) -> None:
    """All arrives at once, so that the trailer is read before the request is handled."""
    trailer = b"1\r\na\r\n0\r\nX-Request-Id: of-the-trailer\r\n\r\n"
    received = answer(send(port, b"GET /healthz HTTP/1.1\r\n" + CHUNKED + trailer))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"of-the-trailer" not in received


@pytest.mark.parametrize("part", [b"a:b\r\n" * 10_000, b"a" * 50_000], ids=["many", "one"])
def test_trailers_without_end_are_refused(port: int, part: bytes) -> None:
    connection = send(port, REVIEW + CHUNKED + b"1\r\na\r\n0\r\nb:")
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            connection.sendall(part)
            time.sleep(0.005)
    received = answer(connection)
    assert not received or received.startswith(b"HTTP/1.1 431 ")  # reset before or after its response was read


def test_chunks_of_a_body_count_as_no_trailers(port: int) -> None:
    """The blocks in which a body arrives often end between the size of a chunk and its data."""
    connection = send(port, REVIEW + CHUNKED)
    connection.sendall(b"18000\r\n")
    for _ in range(4):
        time.sleep(0.02)
        connection.sendall(b"a" * 0x18000 + b"\r\n18000\r\n")
    connection.sendall(b"a" * 0x18000 + b"\r\n0\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 422 ")


@pytest.mark.parametrize("start", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a b: 1\r\n" * 10_000])
def test_a_request_that_is_not_http_is_a_problem(port: int, start: bytes) -> None:
    head, _, body = answer(send(port, start)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Type: application/problem+json" in head
    assert json.loads(body)["type"] == "urn:ncml:problem:malformed"


def test_connections_beyond_the_limit_are_refused_and_closed_ones_make_room(port: int) -> None:
    silent = [send(port, b"") for _ in range(20)]
    received = answer(send(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert received == b"" or (received.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in received)
    assert [answer(connection) for connection in silent] == [b""] * 20  # after their second
    assert 'ncml_jobs_rejected_total{reason="no-room"}' in httpx2.get(f"http://127.0.0.1:{port}/metrics").text


def test_a_client_that_does_not_read_its_responses_is_disconnected(port: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(50 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")  # several megabytes
        poll = select.poll()
        poll.register(connection, 0)
        assert poll.poll(30_000) == [(connection.fileno(), select.POLLERR | select.POLLHUP)]
    assert answers(port)


@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_has_shut_down_its_sending_side_gets_its_responses(port: int, count: int) -> None:
    connection = send(port, count * b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    received = answer(connection).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 503 ")
    assert received.count(b'"urn:ncml:problem:not-ready"') == count
    assert answers(port)


def test_uploads_beyond_the_limit_are_refused(port: int) -> None:
    head = HEAD.replace(b"1000", b"500000") + b"\r\n"
    connections = [send(port, head + bytes(300_000)) for _ in range(2)]  # more than half of the limit from one client
    (received,) = (text for text in map(answer, connections) if text.startswith(b"HTTP/1.1 429 "))
    assert b"too-many-uploads" in received
    assert b"retry-after" in received
    assert answers(port)


def test_a_forwarded_address_is_trusted_from_named_proxies_only(port: int, new_valkey: Callable[..., Valkey]) -> None:
    def codes(port: int) -> list[int]:
        url = f"http://127.0.0.1:{port}/generate"
        return [httpx2.post(url, headers={"x-forwarded-for": f"192.0.2.{i}"}, timeout=60).status_code for i in range(6)]

    assert codes(port).count(429) >= 2  # without workers, the others get a 503
    settings = {"FORWARDED_ALLOW_IPS": "127.0.0.0/8", "NCML_RATE_LIMIT": "4/hour"}
    with serving(new_valkey(), settings) as trusting:
        assert codes(trusting) == [503] * 6


def test_the_limit_of_open_files_bounds_the_connections() -> None:
    code = "from service.server import connection_limit; print(connection_limit(4096))"
    for files, connections in ((256, 256 - RESERVED_FILES), (8192, 4096)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            preexec_fn=lambda files=files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )  # fmt: skip
        assert int(done.stdout) == connections
