"""What a service that stops answers to the requests in progress."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient
from starlette.types import Message

from service import local, server
from tests.service.test_waiting import HANG_S, IMAGE, run_within
from worker.contract import JobStatus
from worker.queue import JobQueue

ROOT = Path(__file__).parents[2]


class Exchange:
    """One request, and what the application sends; the client keeps the connection open."""

    def __init__(self, client: TestClient, method: str, path: str, body: bytes = b"", *, is_whole: bool = True) -> None:
        self.started = asyncio.Event()
        self.status, self.headers, self.body = 0, {}, b""
        headers = [(b"host", b"localhost"), (b"prefer", b"wait=600"), (b"content-type", b"image/png" if body else b"")]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        arriving = iter([{"type": "http.request", "body": body, "more_body": not is_whole}])

        async def receive() -> Message:
            for message in arriving:
                return message
            return await asyncio.Future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            self.body += message.get("body", b"")
            self.started.set()

        self.task = asyncio.ensure_future(client.app(scope, receive, send))

    @property
    def problem(self) -> str:
        return json.loads(self.body)["type"].removeprefix("urn:ncml:problem:")


def run(client: TestClient, check: Callable[[Callable[[], None]], Coroutine[Any, Any, None]]) -> None:
    """Run a check, which receives a function that stops the service; answers are due at once."""
    run_within(client, lambda: check(lambda: client.app.state.jobs.stop.begin(0)))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/generate", "/jobs/job-0/result"])
def test_requests_that_wait_get_the_address_of_their_job(
    new_client: Callable[..., TestClient], queue, worker, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    worker.pause()
    client = new_client(wait_s=600)
    if path != "/generate":
        client.post("/generate", headers={"prefer": "respond-async"})
    waiting, wait = asyncio.Event(), JobQueue.wait

    def wait_observed(*arguments: Any) -> Awaitable[object]:
        waiting.set()
        return wait(*arguments)

    monkeypatch.setattr(JobQueue, "wait", wait_observed)

    async def check(stop: Callable[[], None]) -> None:
        exchange = Exchange(client, "POST" if path == "/generate" else "GET", path)
        await waiting.wait()
        stop()
        await exchange.task
        assert exchange.status == 202
        assert exchange.headers["location"] == "/jobs/job-0"
        assert queue.view("job-0").status is JobStatus.QUEUED

    run(client, check)


def test_a_request_whose_images_are_being_decoded_gets_a_503(
    client: TestClient, jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = asyncio.Event()

    async def decode(*_: object) -> None:
        decoding.set()
        await asyncio.Future()

    monkeypatch.setattr(client.app.state.jobs.decoding.pool, "run", decode)

    async def check(stop: Callable[[], None]) -> None:
        exchange = Exchange(client, "POST", "/score", IMAGE)
        await decoding.wait()
        stop()
        await exchange.task
        assert (exchange.status, exchange.problem) == (503, "stopping")
        assert exchange.headers["retry-after"]
        assert not jobs

    run(client, check)


def test_a_request_whose_body_is_arriving_gets_a_503(client: TestClient) -> None:
    async def check(stop: Callable[[], None]) -> None:
        exchange = Exchange(client, "POST", "/score", IMAGE, is_whole=False)
        await asyncio.sleep(0.1)
        stop()
        await exchange.task
        assert (exchange.status, exchange.problem) == (503, "stopping")

    run(client, check)


def test_a_job_that_is_being_submitted_is_reported(
    new_client: Callable[..., TestClient], worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.pause()
    client = new_client(wait_s=600)
    submit, begun, may_end = JobQueue.submit, threading.Event(), threading.Event()

    def submit_slowly(*arguments: Any, **options: Any) -> str:
        begun.set()
        assert may_end.wait(HANG_S)
        return submit(*arguments, **options)

    monkeypatch.setattr(JobQueue, "submit", submit_slowly)

    async def check(stop: Callable[[], None]) -> None:
        exchange = Exchange(client, "POST", "/generate")
        await until(begun.is_set)
        stop()
        await asyncio.sleep(0.1)
        may_end.set()
        await exchange.task
        assert exchange.status == 202
        assert exchange.headers["location"] == "/jobs/job-0"

    run(client, check)


def test_requests_that_are_canceled_at_the_end_are_answered(
    new_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue does not respond, so that the state of the job is not known when the server cancels its requests."""
    client = new_client(wait_s=600)

    waiting = asyncio.Event()

    async def wait(*_: object) -> None:
        waiting.set()
        await asyncio.Future()

    monkeypatch.setattr(JobQueue, "wait", wait)

    async def check(_: Callable[[], None]) -> None:
        accepted = Exchange(client, "POST", "/generate")
        await waiting.wait()
        arriving = Exchange(client, "POST", "/score", IMAGE, is_whole=False)
        await asyncio.sleep(0.1)
        for exchange in (accepted, arriving):
            exchange.task.cancel()
            await exchange.task
        assert (accepted.status, accepted.headers["location"]) == (202, "/jobs/job-0")
        assert (arriving.status, arriving.problem) == (503, "stopping")

    run(client, check)


def test_a_response_that_has_begun_continues(client: TestClient) -> None:
    """The last part of a page arrives after the answers are due."""

    async def check(stop: Callable[[], None]) -> None:
        exchange = Exchange(client, "GET", "/docs/assets/swagger-ui-bundle.js")
        await exchange.started.wait()
        stop()
        await exchange.task
        assert exchange.status == 200
        assert len(exchange.body) == int(exchange.headers["content-length"])

    run(client, check)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_stream_ends_with_an_event_unless_its_job_has_ended(
    new_client: Callable[..., TestClient], worker, has_ended: bool
) -> None:
    client = new_client(wait_s=600)
    if not has_ended:
        worker.hold()
    client.post("/generate", headers={"prefer": "wait=600" if has_ended else "respond-async"})

    async def check(_: Callable[[], None]) -> None:
        stop = client.app.state.jobs.stop
        if has_ended:
            stop.begin(HANG_S)
        exchange = Exchange(client, "GET", "/jobs/job-0/events")
        if not has_ended:
            await until(lambda: b"event: progress" in exchange.body)
            stop.begin(HANG_S)
        await exchange.task
        last = exchange.body.decode().strip().rpartition("\n\n")[2]
        assert last.startswith("event: succeeded\n" if has_ended else "event: stopping\ndata: {")

    run(client, check)


def test_a_container_gets_more_time_to_stop_than_its_requests() -> None:
    """The containers start the service without options; on Kubernetes, the hook before the stop takes its share."""
    graceful_s = server.main.__kwdefaults__["graceful_s"]
    assert server.ANSWER_S < local.DRAIN_S < graceful_s
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["service"]
    assert int(compose["stop_grace_period"].removesuffix("s")) >= graceful_s + 5
    manifests = yaml.safe_load_all((ROOT / "docker/k8s/base/service.yaml").read_text())
    pod = next(each for each in manifests if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    hook_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= hook_s + graceful_s + 5
