"""What a request holds while it waits for its job: no space for uploads, and no slot of the routes."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from ncml.images import to_png
from service.http.deferred import MAX_CONCURRENT_ROUTES
from worker.contract import JobStatus
from worker.queue import JobQueue

IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))
HANG_S = 60
"""Time after which a test that hangs is ended."""


def run_within(client: TestClient, run: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run a coroutine in the event loop of the application, as its requests are."""
    assert client.portal
    client.portal.call(asyncio.wait_for, run(), HANG_S)


async def call(
    client: TestClient, method: str, path: str, *messages: Message, address: str = "", key: str = "", accept: str = ""
) -> int:
    """Send one request whose client disconnects after the messages, or never; return the status of the response."""
    headers = [(b"host", b"localhost"), (b"prefer", b"wait=600")]
    headers += [(b"idempotency-key", key.encode())] if key else []
    headers += [(b"accept", accept.encode())] if accept else []
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    scope |= {"client": (address, 1000)} if address else {}
    arriving = iter(messages)
    statuses: list[int] = []

    async def receive() -> Message:
        for message in arriving:
            return message
        return await asyncio.Future()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await client.app(scope, receive, send)
    return statuses[0]


def test_the_body_of_an_event_stream_takes_no_space_from_uploads(new_client: Callable[..., TestClient]) -> None:
    client = new_client(max_body_bytes=1024, max_receiving_bytes=2048)
    client.post("/score", files=[("image", IMAGE)])
    for _ in range(4):
        assert client.request("GET", "/jobs/job-0/events", content=bytes(1000)).status_code == 200
    assert client.post("/score", files=[("image", IMAGE)]).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/jobs/job-0/result", 200), ("DELETE", "/jobs/job-0", 204)]
)
def test_any_number_of_requests_can_wait_for_a_job(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int
) -> None:
    client.post("/score", files=[("image", IMAGE)])
    wait = JobQueue.wait

    async def run() -> None:
        ended = asyncio.Event()

        async def wait_longer(*arguments: Any):
            await ended.wait()
            return await wait(*arguments)

        monkeypatch.setattr(JobQueue, "wait", wait_longer)
        monkeypatch.setattr(JobQueue, "forget", lambda *_: None)
        requests = [asyncio.ensure_future(call(client, method, path)) for _ in range(MAX_CONCURRENT_ROUTES)]
        await asyncio.sleep(0)
        assert await call(client, "GET", "/version") == 200
        ended.set()
        assert set(await asyncio.gather(*requests)) == {status}

    run_within(client, run)


def test_clients_that_do_not_read_leave_the_routes_to_others(client: TestClient) -> None:
    async def run() -> None:
        reads = asyncio.Event()

        async def receive() -> Message:
            await reads.wait()
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            await reads.wait()

        scope = {"type": "http", "method": "GET", "query_string": b"", "headers": [(b"host", b"localhost")]}
        path = "/docs/assets/swagger-ui-bundle.js"
        unread = [
            asyncio.ensure_future(client.app(scope | {"path": path}, receive, send))
            for _ in range(MAX_CONCURRENT_ROUTES)
        ]
        await asyncio.sleep(0)
        assert await call(client, "GET", "/version") == 200
        assert not any(request.done() for request in unread)
        reads.set()
        await asyncio.gather(*unread)

    run_within(client, run)


def test_a_request_for_a_result_ends_when_its_client_disconnects(
    new_client: Callable[..., TestClient], queue, worker
) -> None:
    worker.pause()
    client = new_client(wait_s=600)
    client.post("/score", files=[("image", IMAGE)], headers={"prefer": "respond-async"})

    async def run() -> None:
        messages = {"type": "http.request"}, {"type": "http.disconnect"}
        assert await call(client, "GET", "/jobs/job-0/result", *messages) == 202

    run_within(client, run)
    assert queue.view("job-0").status is JobStatus.QUEUED


@pytest.mark.parametrize("key", ["", "order-1"])
def test_a_disconnected_client_cancels_its_job_unless_it_can_retry(
    new_client: Callable[..., TestClient], queue, jobs, worker, key: str
) -> None:
    worker.pause()
    client = new_client(wait_s=600)
    messages = {"type": "http.request"}, {"type": "http.disconnect"}
    run_within(client, lambda: call(client, "POST", "/generate", *messages, key=key))
    (job_id,) = jobs
    assert queue.view(job_id).status is (JobStatus.QUEUED if key else JobStatus.CANCELED)


def test_uploads_of_many_clients_share_a_limit(new_client: Callable[..., TestClient]) -> None:
    client = new_client(max_body_bytes=1024, max_receiving_bytes=2500)
    part = {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def run() -> None:
        addresses = ("192.0.2.1", "192.0.2.2", "192.0.2.3")
        uploads = [asyncio.ensure_future(call(client, "POST", "/score", part, address=each)) for each in addresses]
        refused, receiving = await asyncio.wait(uploads, return_when=asyncio.FIRST_COMPLETED)
        assert [upload.result() for upload in refused] == [503]
        assert len(receiving) == 2
        for upload in receiving:
            upload.cancel()
        await asyncio.wait(receiving)

    run_within(client, run)
