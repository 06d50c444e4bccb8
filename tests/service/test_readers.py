"""Clients that do not read their results, or leave while these are rendered, do not hinder others."""

import asyncio
import io
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Message

from ncml.images import heat, to_png
from ncml.images.tiling import Tiling, blend
from service.http import client_limits
from service.http.client_limits import MAX_RESULT_BYTES_OF_CLIENT, ResultReading
from service.jobs import JobService
from service.rendering import PartedResult
from tests.service.test_waiting import IMAGE, call, run_within
from worker.queue import JobQueue

RESULT = "/jobs/job-0/result"


async def get_unread(client: TestClient, path: str = RESULT, address: str = "192.0.2.1") -> None:
    """Request a result and do not read it.

    As uvicorn does, `send` returns once the data is in a buffer, unless more than 64 KiB are in it already.
    """
    buffered = 0

    async def send(message: Message) -> None:
        nonlocal buffered
        if buffered >= 2**16:
            await asyncio.Future()
        buffered += len(message.get("body", b""))

    async def never() -> Message:
        return await asyncio.Future()

    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
    }
    scope |= {"headers": [(b"host", b"localhost")], "client": (address, 1000)}
    await client.app(scope, never, send)


async def end(requests: list[asyncio.Task[None]]) -> None:
    for request in requests:
        request.cancel()
    await asyncio.wait(requests)


@pytest.fixture
def rendered(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each rendering of the only job's result, which has a megabyte."""
    renderings: list[None] = []

    def render(*_: object) -> Response:
        renderings.append(None)
        return Response(bytes(10**6))

    client.post("/score", files=[("image", IMAGE)])
    monkeypatch.setattr(JobService, "_render", render)
    return renderings


def test_small_results_do_not_wait_for_readers(client: TestClient, rendered: list[None]) -> None:
    async def run() -> None:
        unread = [asyncio.ensure_future(get_unread(client)) for _ in range(128)]
        while len(rendered) < 128:
            await asyncio.sleep(0.01)
        assert await call(client, "GET", RESULT, address="192.0.2.1") == 200
        await end(unread)

    run_within(client, run)


@pytest.mark.parametrize("address", ["192.0.2.1", "192.0.2.99"])
def test_readers_without_progress_are_dropped_if_others_wait_for_memory(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, rendered: list[None], address: str
) -> None:
    """The results of one client fill its own limit, those of all clients the total."""
    size = MAX_RESULT_BYTES_OF_CLIENT // 2 + 1
    monkeypatch.setattr(JobQueue, "result_size", lambda *_: size)
    monkeypatch.setattr(client_limits, "MAX_RESULT_BYTES", 4 * size)
    monkeypatch.setattr(client_limits, "STALL_S", 0.5)

    async def run() -> None:
        unread = [asyncio.ensure_future(get_unread(client, address=f"192.0.2.{i}")) for i in range(1, 5)]
        while len(rendered) < 4:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert not any(reader.done() for reader in unread)  # no one waits for their memory
        assert await call(client, "GET", RESULT, address=address) == 200
        assert sum(reader.done() for reader in unread) == 1
        await end(unread)
        assert await call(client, "GET", RESULT, address=address) == 200

    run_within(client, run)


def test_a_reader_may_be_dropped_only_while_the_service_waits_for_it() -> None:
    async def run() -> None:
        droppable: list[float] = []

        async def send(_: Message) -> None:
            droppable.append(reading.droppable_at)

        async with ResultReading("ann", 10**6) as reading:
            assert reading.droppable_at == math.inf
            await reading.send(send)({"type": "http.response.body", "body": bytes(100_000)})
            assert reading.droppable_at == math.inf
        assert len(droppable) == 2
        assert max(droppable) < math.inf

    asyncio.run(run())


# Renderings in parts


@pytest.fixture
def scanned(client: TestClient) -> TestClient:
    """A client with one scan, whose map is 24 pixels wide and 20 high."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    assert client.post("/score?tile=1&map=1", files=[("image", to_png(pixels))]).status_code == 200
    return client


@pytest.mark.parametrize("band_pixels", [24, 24 * 7, 10**6])
def test_a_map_in_parts_is_that_in_one_piece(
    scanned: TestClient, monkeypatch: pytest.MonkeyPatch, band_pixels: int
) -> None:
    monkeypatch.setattr("ncml.images.tiling.BAND_PIXELS", band_pixels)
    answer = scanned.get(RESULT, headers={"accept": "application/x-npz"})
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        tiles, map_HW = arrays["tiles"], arrays["map"]
    monkeypatch.undo()
    assert np.array_equal(map_HW, blend(tiles, Tiling(8, 8), 20, 24))
    assert map_HW.dtype == np.float32
    png = scanned.get(RESULT, headers={"accept": "image/png"})
    rendered = np.asarray(Image.open(io.BytesIO(png.content)))
    assert np.array_equal(rendered, heat.render(map_HW, *heat.score_range(map_HW, 100)))


@pytest.fixture
def endless(scanned: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each part of the renderings of the scan's map, which have no end."""
    parts: list[None] = []
    render = JobService._render

    def endless_parts() -> Iterator[bytes]:
        while True:
            parts.append(None)
            yield bytes(1000)

    def render_endlessly(self: JobService, view: object, media: str) -> object:
        return render(self, view, media) if "json" in media else PartedResult({}, media, endless_parts())

    monkeypatch.setattr(JobService, "_render", render_endlessly)
    return parts


def test_a_rendering_ends_when_its_client_is_gone(scanned: TestClient, endless: list[None]) -> None:
    async def run() -> None:
        messages = {"type": "http.request"}, {"type": "http.disconnect"}
        await asyncio.gather(*(call(scanned, "GET", RESULT, *messages, accept="image/png") for _ in range(24)))
        count = len(endless)
        await asyncio.sleep(0.1)
        assert len(endless) == count

    run_within(scanned, run)


def test_a_rendering_waits_for_its_reader_and_leaves_its_turn_to_others(
    scanned: TestClient, endless: list[None]
) -> None:
    async def run() -> None:
        path = f"{RESULT}?format=npz"
        readers = [asyncio.ensure_future(get_unread(scanned, path, "192.0.2.1")) for _ in range(3)]
        while len(endless) < 3 * 66:  # each buffer takes 66 parts
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(endless) <= 3 * 67
        assert await call(scanned, "GET", RESULT, address="192.0.2.1") == 200
        await end(readers)

    run_within(scanned, run)


def test_one_part_of_one_client_is_rendered_at_a_time() -> None:
    turns, running, most = client_limits.RenderingTurns(), [0], [0]
    order: list[str] = []
    lock = threading.Lock()

    def render(client: str) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
            order.append(client)
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1

    async def run() -> None:
        await asyncio.gather(*(turns.run("ann", render, "ann") for _ in range(20)), turns.run("bob", render, "bob"))

    asyncio.run(run())
    assert most == [1]
    assert order.index("bob") < 3
