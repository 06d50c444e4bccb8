"""The queue's password from a file, and its connection encrypted with a private certificate."""

import asyncio
import contextlib
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from service.app import from_environment
from tests.conftest import free_port
from tests.packages import require
from tests.worker.fleet import PIXELS, score
from worker.address import AddressError, with_password
from worker.contract import JobStatus
from worker.queue import JobQueue, QueueError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://valkey:6379/0", "redis://:p%40ss%2Fword@valkey:6379/0"),
        (
            "rediss://me@valkey:6379/0?ssl_ca_certs=/ca.pem",
            "rediss://me:p%40ss%2Fword@valkey:6379/0?ssl_ca_certs=/ca.pem",
        ),
        ("redis://:own@valkey:6379/0", "redis://:own@valkey:6379/0"),
        ("unix:///run/valkey.sock", "unix:///run/valkey.sock"),
    ],
)
def test_the_password_is_read_from_the_file_unless_the_address_has_one(tmp_path: Path, url: str, expected: str) -> None:
    (tmp_path / "password").write_text("p@ss/word\n")
    assert with_password(url, tmp_path / "password") == expected
    assert with_password(url, None) == url


@pytest.mark.parametrize("url", ["redis://user:hunter2\u2100@host:6379/0", "redis://:hunter2@[::1:6379/0"])
def test_an_address_that_cannot_be_parsed_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    (tmp_path / "password").write_text("secret")
    with pytest.raises(QueueError, match="this is not the address of a queue") as refused:
        JobQueue.from_url(with_password(url, tmp_path / "password"))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff", b"a" * 5000])
def test_a_file_without_a_password_is_explained(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AddressError, match=str(path)):
        with_password("redis://valkey:6379/0", path)
    monkeypatch.setenv("NCML_REDIS_PASSWORD_FILE", str(path))
    with pytest.raises(SystemExit) as end:
        from_environment()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"ncml: NCML_REDIS_PASSWORD_FILE: {path} ")


def certificate(folder: Path) -> None:
    """Create a certificate authority and a certificate for localhost that it signed."""
    require("openssl")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=300)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # which Python 3.13 and newer require
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2", *usage)
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-out", "server.pem")
    openssl("rehash", ".")  # names by which a folder of certificates is searched


@pytest.fixture
def encrypted_port(valkey_server, valkey_url: str, tmp_path: Path) -> Iterator[int]:
    """The port of a TLS proxy in front of the server, since the server that is installed for tests has no TLS."""
    certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    port, loop = free_port(), asyncio.new_event_loop()

    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", valkey_server.port)
        writers.extend((writer, inner_writer))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer), return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(forward, "127.0.0.1", port, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield port

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("option", ["ssl_ca_certs={}/ca.pem", "ssl_ca_path={}"])
def test_a_queue_is_used_over_tls_with_a_private_certificate_authority(
    encrypted_port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, option: str
) -> None:
    """A job is submitted, looked up, canceled and awaited, by both clients and over the published changes."""
    queue = JobQueue.from_url(f"rediss://localhost:{encrypted_port}/0?{option.format(tmp_path)}")
    job_id = queue.submit(score(images=(PIXELS,)))
    assert queue.view(job_id).status is JobStatus.QUEUED

    async def wait() -> JobStatus:
        waiting = asyncio.ensure_future(queue.wait(job_id, 10))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(queue.cancel, job_id)
        view = await waiting
        queue.close()
        await queue.aclose()
        open_connections = psutil.Process().net_connections("tcp")
        assert [connection for connection in open_connections if connection.raddr[1:] == (encrypted_port,)] == []
        return view.status

    assert asyncio.run(wait()) is JobStatus.CANCELED
    assert "changes of jobs are not received" not in caplog.text


def test_a_server_of_another_certificate_authority_is_refused(encrypted_port: int) -> None:
    queue = JobQueue.from_url(f"rediss://localhost:{encrypted_port}/0")
    with pytest.raises(redis.ConnectionError):
        queue.monitor.ping()
    queue.close()
