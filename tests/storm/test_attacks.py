"""Many or hostile clients: the work and memory of the service stay bounded, and others are served.

The short form runs with the other tests; the long form is `pytest -m slow tests/storm`.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.conftest import Valkey, eventually
from tests.memory import Peak
from tests.storm.service import MIB, SLOW, Service
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
    assert memory.growth < 100 * MIB
    eventually(lambda: sum(depth.depth for depth in fleet.queue.monitor.depths()) == 0, 120)
