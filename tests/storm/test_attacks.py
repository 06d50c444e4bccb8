"""Many or hostile clients: the work and memory of the service stay bounded, and others are served.

The short form runs with the other tests; the long form is `pytest -m slow tests/storm`.
"""

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import numpy as np
import psutil
import pytest

from ncml.images import to_png
from tests.conftest import Valkey, eventually
from tests.memory import Peak
from tests.storm.service import MIB, SLOW, Service, store_scan, store_scores
from tests.worker.fleet import Fleet, generate
from tests.worker.synthetic import write_model


def address(i: int) -> str:
    """Return one of many addresses of this machine."""
    return f"127.1.{i // 250}.{i % 250 + 1}"


async def exchange(port: int, request: str, source: str = "127.0.0.1", timeout_s: float = 600) -> tuple[int, str]:
    """Send the head of a request; return the status, and the whole response once the server has closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        head = f"{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
        async with asyncio.timeout(timeout_s):
            answer = (await reader.read()).decode("latin-1")
    finally:
        writer.close()
    return int(answer.split(" ", 2)[1]) if answer else 0, answer


@contextmanager
def most_connections(process: psutil.Process, port: int) -> Iterator[list[int]]:
    """Yield a list that holds, after the context, the maximum number of connections of a process to a port."""
    counts, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            current = sum(bool(c.raddr) and c.raddr.port == port for c in process.net_connections("tcp"))
            counts[0] = max(counts[0], current)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=SLOW)])
def test_every_request_and_stream_of_a_burst_is_answered(
    fleet: Fleet, serve: Callable[..., Service], valkey_server: Valkey, count: int
) -> None:
    write_model(fleet.models, batch_s=count / 1000, image_s=0.0)
    fleet.start(max_batch=64)
    # the process of the crowd may be slower to send than ordinary clients
    service = serve(max_waiting=4096, max_streams=1, wait_s=300, header_timeout_s=120)
    followed = [fleet.queue.submit(generate(seed=seed)) for seed in range(50)]

    async def crowd() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        waiting = [exchange(service.port, f"POST /generate?seed={i}") for i in range(count)]
        streams = [exchange(service.port, f"GET /jobs/{followed[i % 50]}/events", address(i)) for i in range(count)]
        answers = await asyncio.gather(*waiting, *streams)
        return answers[:count], answers[count:]

    asyncio.run(exchange(service.port, "POST /generate?seed=1"))
    with Peak(service.process) as memory, most_connections(service.process, valkey_server.port) as connections:
        answers, streams = asyncio.run(crowd())
    codes, stream_codes = Counter(code for code, _ in answers), Counter(code for code, _ in streams)
    print(f"{codes}, streams {stream_codes}, {connections[0]} connections, memory +{memory.growth / MIB:.1f} MiB")
    assert codes[200] + codes[202] == count
    assert all("\r\nlocation: /jobs/" in answer.lower() for code, answer in answers if code == 202)
    assert stream_codes == {200: count}
    assert all(answer.count("event: succeeded") == 1 for _, answer in streams)
    assert connections[0] <= 32
    assert memory.growth < 128 * MIB  # 32 KiB for each of 4,000 connections
    eventually(lambda: sum(depth.depth for depth in fleet.queue.monitor.depths()) == 0)


def get(port: int, path: str, source: str = "127.0.0.1", *, reads: bool = True) -> socket.socket:
    """Request a path; a client that does not read has buffers and segments as small as in a network."""
    connection = socket.socket()
    if not reads:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    connection.bind((source, 0))
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


@pytest.mark.parametrize("addresses", [1, 64])
def test_clients_that_do_not_read_large_results_leave_the_service_to_others(
    fleet: Fleet, serve: Callable[..., Service], addresses: int
) -> None:
    """64 stalled readers of a result of half a megabyte, who would be disconnected after ten minutes."""
    path = f"/jobs/{store_scores(fleet.queue)}/result"
    fleet.start("score", ready=False)
    service = serve(body_timeout_s=600, ready_lanes='["score"]')
    image = to_png(np.zeros((8, 8, 3), np.uint8))
    with service.client() as http:

        def seconds(requests: int) -> list[float]:
            """Return how long each of some scores took."""
            took: list[float] = []
            for _ in range(requests):
                began = time.perf_counter()
                assert http.post("/score", files={"image": image}).status_code == 200
                took.append(time.perf_counter() - began)
            return sorted(took)

        idle = seconds(100)
        sources = ["127.0.0.1"] * 64 if addresses == 1 else [address(i) for i in range(64)]
        unread = [get(service.port, path, source, reads=False) for source in sources]
        busy = seconds(100)
        result = http.get(path)
        assert result.status_code == 200
        assert len(result.content) > 400_000
        for connection in unread:
            connection.close()
    print(f"/score p95 idle {idle[94] * 1e3:.1f} ms, beside 64 stalled readers {busy[94] * 1e3:.1f} ms")


@pytest.mark.parametrize("side", [1440, pytest.param(5760, marks=SLOW)])
def test_renderings_whose_clients_have_left_are_not_finished(
    fleet: Fleet, serve: Callable[..., Service], side: int
) -> None:
    path = f"/jobs/{store_scan(fleet.queue, side)}/result"
    fleet.start(ready=False)
    service = serve()

    def cpu_s() -> float:
        return sum(service.process.cpu_times()[:2])

    def get_json(source: str) -> float:
        """Return how long a client waits for the same result as JSON."""
        began = time.perf_counter()
        with httpx2.Client(transport=httpx2.HTTPTransport(local_address=source), timeout=300) as http:
            assert http.get(f"{service.url}{path}").status_code == 200
        return time.perf_counter() - began

    get_json("127.0.0.1")
    with service.client() as http:
        before = cpu_s()
        assert http.get(f"{path}?format=npz").status_code == 200
        whole = cpu_s() - before
    before = cpu_s()
    for _ in range(24):
        connection = get(service.port, f"{path}?format=npz")
        time.sleep(0.05)
        connection.close()
    waited = get_json("127.0.0.2"), get_json("127.0.0.1")
    time.sleep(1)
    spent = cpu_s() - before
    print(f"CPU of a rendering {whole:.2f} s, of 24 that were left {spent:.2f} s; JSON after {waited[0]:.2f} s")
    assert spent < max(6 * whole, 1)
