"""The application on the real queue, whose jobs a worker in this process ends."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from service.webhooks import deliverer
from tests.receiver import Receiver, write_secret
from tests.service.outcomes import DETECTOR, INFO, MODEL
from tests.service.standin import Jobs, StandIn
from worker.descriptors import DetectorCalibration, ModelDescriptor, WorkerInfo
from worker.queue import JobQueue


@pytest.fixture
def new_queue(valkey_url: str, valkey_connections: redis.ConnectionPool) -> Callable[..., JobQueue]:
    """Return a function that creates a queue on the server with this address."""

    def create(url: str = valkey_url) -> JobQueue:
        if url == valkey_url:
            return JobQueue(redis.Redis(connection_pool=valkey_connections))  # closing it does not close these
        return JobQueue.from_url(url)

    return create


@pytest.fixture
def worker(new_queue: Callable[..., JobQueue]) -> Iterator[StandIn]:
    """A worker in this process. What it publishes does not lapse, and jobs without an id get job-0, job-1 and so on."""
    numbers = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.publications.ALIVE_S", 3600.0)
        patch.setattr("worker.publications.SERVING_S", 3600.0)
        new_id = lambda: SimpleNamespace(hex=f"job-{next(numbers)}")  # noqa: E731
        patch.setattr("worker.queue.uuid", SimpleNamespace(uuid4=new_id))
        worker = StandIn(new_queue())
        yield worker
        worker.stop()


@pytest.fixture
def queue(worker: StandIn, new_queue: Callable[..., JobQueue]) -> JobQueue:
    """The queue, with a worker."""
    return new_queue()


@pytest.fixture
def jobs(queue: JobQueue, worker: StandIn) -> Jobs:
    """The jobs in the queue and those that have ended."""
    return Jobs(queue, worker)


@pytest.fixture
def configure(queue: JobQueue) -> Iterator[Callable[..., None]]:
    """Change settings of the queue's server until the end of the test: `configure(maxmemory=1000)`."""
    before: dict[str, str] = {}

    def change(**settings: object) -> None:
        for name, value in settings.items():
            name = name.replace("_", "-")
            before.setdefault(name, queue.redis.config_get(name)[name])
            queue.redis.config_set(name, value)

    yield change
    for name, value in before.items():
        queue.redis.config_set(name, value)


@pytest.fixture
def new_client(
    worker: StandIn, new_queue: Callable[..., JobQueue], valkey_url: str
) -> Iterator[Callable[..., TestClient]]:
    """Return a function that creates a client of an application with the given settings.

    As each process of a service, each application has its own `JobQueue`.
    """
    clients: list[TestClient] = []

    def create(**options: object) -> TestClient:
        settings = Settings(**{"redis_url": valkey_url} | options)
        app = create_app(settings, new_queue(settings.queue_url))
        clients.append(TestClient(app, base_url="http://localhost", raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield create
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(new_client: Callable[..., TestClient]) -> TestClient:
    return new_client()


@pytest.fixture
def detector(worker: StandIn) -> DetectorCalibration:
    """The calibration of a detector, which the model `tiny` becomes."""
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR}))
    return DETECTOR


@pytest.fixture
def info() -> WorkerInfo:
    return INFO


@pytest.fixture
def model() -> ModelDescriptor:
    return MODEL


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture
def canary() -> Iterator[Receiver]:
    """A server that must not be contacted."""
    canary = Receiver()
    canary.start()
    yield canary
    canary.stop()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliverer, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(deliverer, "PAUSE_GROWTH", 1)
    monkeypatch.setattr(deliverer, "POLL_S", 0.02)


@pytest.fixture
def hooked(new_client: Callable[..., TestClient], receiver: Receiver, short_pauses: None, tmp_path: Path) -> TestClient:
    """A client of a service that may send to the receiver."""
    return new_client(webhook_hosts=(receiver.entry,), webhook_secret_file=write_secret(tmp_path))
