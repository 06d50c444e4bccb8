"""The queue on a real Valkey, without workers."""

import asyncio
import contextlib
import contextvars
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.exceptions import OutOfMemoryError

from ncml.limits import MAX_SHEET_BYTES
from tests.conftest import Valkey, eventually, free_port
from worker.changes import RECONNECT_S
from worker.contract import CalibrateJob, GenerateJob, JobStatus, Lane, Pixels, Priority, ScanJob, ScoreJob
from worker.descriptors import Batching, ModelDescriptor, Preprocessing, PublishedWorker, WorkerInfo, WorkerState
from worker.job_results import (
    CANCELED,
    Event,
    JobEnding,
    JobError,
    JobView,
    ModelRef,
    Progress,
    Score,
    ScoreResult,
    Timing,
)
from worker.leases import Claim, Leases
from worker.publications import Publications
from worker.queue import DuplicateJob, JobNotFound, JobQueue, QueueError, QueueFull
from worker.records import parse_job
from worker.redis_keys import WORKERS, descriptor_key, job_key, pictures_key, worker_key

PIXELS = Pixels(height=2, width=2, data=bytes(range(12)))


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    with contextlib.closing(JobQueue.from_url(valkey_url)) as queue:
        yield queue


def test_a_submitted_job_waits_in_its_queue_and_keeps_its_specification(queue: JobQueue) -> None:
    job = ScoreJob(model="m", images=(PIXELS,), priority=Priority.HIGH, request_id="r1")
    job_id = queue.submit(job)

    view = queue.view(job_id)
    assert (view.status, view.task, view.model_name, view.n, view.request_id) == ("queued", "score", "m", 1, "r1")
    assert view.timing
    assert 0 <= view.timing.queue_s < 5
    assert parse_job(queue.redis.hget(job_key(job_id), "data")) == job
    assert queue.result(job_id) is None
    assert [d.depth for d in queue.monitor.depths()] == [1, 0, 0, 0, 0, 0]
    assert 0 <= queue.monitor.depths()[0].oldest_age_s < 5


def test_one_of_fifty_concurrent_submissions_with_one_id_succeeds(queue: JobQueue) -> None:
    def submit(_: int) -> bool:
        try:
            queue.submit(GenerateJob(model="m"), job_id="mine")
        except DuplicateJob:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(submit, range(50))) == 1
    assert queue.monitor.depth(Lane.GENERATE) == 1


def test_a_full_lane_accepts_exactly_its_limit_and_stores_nothing_of_refused_jobs(queue: JobQueue) -> None:
    def submit(_: int) -> bool:
        try:
            queue.submit(GenerateJob(model="m"), limit=8)
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(submit, range(60))) == 8
    assert len(queue.redis.keys("rq:job:*")) == 8
    queue.submit(ScoreJob(model="m", images=(PIXELS,)), limit=1)  # the other lane is not full


def test_the_position_of_a_job_counts_the_jobs_ahead(queue: JobQueue) -> None:
    low, first, second = (
        queue.submit(GenerateJob(model="m", priority=priority))
        for priority in (Priority.LOW, Priority.NORMAL, Priority.NORMAL)
    )
    queue.submit(ScoreJob(model="m", images=(PIXELS,), priority=Priority.HIGH))  # another lane
    assert [queue.position(queue.view(job_id)) for job_id in (first, second, low)] == [0, 1, 2]
    high = queue.submit(GenerateJob(model="m", priority=Priority.HIGH))
    assert [queue.position(queue.view(job_id)) for job_id in (high, first, second, low)] == [0, 1, 2, 3]
    view = queue.view(first)
    queue.cancel(first)
    assert queue.position(view) is None  # it left the queue after the view was read
    assert queue.position(queue.view(first)) is None
    assert queue.position(queue.view(low)) == 2


def test_a_job_keeps_its_owner(queue: JobQueue) -> None:
    assert queue.view(queue.submit(GenerateJob(model="m"), owner="ann")).owner == "ann"
    assert queue.view(queue.submit(GenerateJob(model="m"))).owner == ""


def test_the_pace_of_a_lane_is_the_sum_of_its_workers(queue: JobQueue) -> None:
    assert queue.monitor.pace(Lane.SCORE) == 0
    for name, pace in (("a", {Lane.SCORE: 2.0}), ("b", {Lane.SCORE: 3.0, Lane.GENERATE: 0.5}), ("c", {})):
        info = WorkerInfo(name=name, lanes=tuple(Lane), state=WorkerState.IDLE, models=(), started_at=0, pace=pace)
        queue.redis.set(worker_key(name), PublishedWorker(info=info, descriptors=()).model_dump_json())
        queue.redis.zadd(WORKERS, {name: 0})
    assert queue.monitor.pace(Lane.SCORE) == 5
    assert queue.monitor.pace(Lane.GENERATE) == 0.5


def test_a_queued_job_is_canceled_at_once_and_only_once(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    view = queue.cancel(job_id)
    assert view.status is JobStatus.CANCELED
    assert view.error
    assert view.error.reason == "canceled"
    assert queue.monitor.depth(Lane.GENERATE) == 0
    assert queue.cancel(job_id) == view
    assert queue.redis.ttl(f"rq:job:{job_id}") > 0


def test_changes_are_received_again_after_an_outage_of_the_server(
    new_valkey: Callable[..., Valkey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.TICK_S", 600)  # without a change, a waiting request looks no earlier
    server = new_valkey(aof=True)
    with contextlib.closing(JobQueue.from_url(server.url)) as queue:
        job_id = queue.submit(GenerateJob(model="m"))

        async def cancel_after_an_outage() -> None:
            waiting = asyncio.ensure_future(_wait(queue, job_id, 120.0))
            await asyncio.sleep(0.5)
            server.kill()
            server.start()
            await asyncio.sleep(3 * RECONNECT_S)
            queue.cancel(job_id)
            assert (await waiting).status is JobStatus.CANCELED

        asyncio.run(cancel_after_an_outage())


def test_a_connection_that_dies_silently_is_opened_again(
    valkey_server: Valkey, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy passes the changes on, and then falls silent without closing its connections."""
    monkeypatch.setattr("worker.changes.PING_S", 2.0, raising=False)
    connections: list[asyncio.Task[None]] = []
    silent: set[asyncio.Task[None] | None] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(2**16):
                if asyncio.current_task() in silent:
                    await asyncio.Event().wait()
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", valkey_server.port)
        for ends in ((reader, server_writer), (server_reader, writer)):
            connections.append(asyncio.create_task(copy(*ends)))

    async def follow() -> None:
        proxy = await asyncio.start_server(accept, "127.0.0.1", free_port())
        host, port = proxy.sockets[0].getsockname()
        with contextlib.closing(JobQueue.from_url(f"redis://{host}:{port}/0")) as queue:
            async with queue._changes.follow("job") as follower:
                await follower.wait(0.1)  # for the subscription
                assert not await follower.wait(5.0)  # the answers to pings keep the connection open
                silent.update(connections)
                assert await follower.wait(20.0)
            await queue.aclose()
        for task in connections:
            task.cancel()
        await asyncio.wait(connections)
        proxy.close()

    asyncio.run(follow())


def test_the_monitor_reports_a_server_that_hangs_within_seconds(new_valkey: Callable[..., Valkey]) -> None:
    """Prometheus waits 10 s for the metrics."""
    server = new_valkey()
    assert server.process
    with contextlib.closing(JobQueue.from_url(server.url)) as queue:
        for monitor in (queue.monitor, JobQueue.from_url(server.url).monitor):
            if monitor is queue.monitor:
                monitor.ping()  # it is connected when the server begins to hang; the other one connects later
            os.kill(server.process.pid, signal.SIGSTOP)
            started = time.monotonic()
            try:
                with pytest.raises(redis.TimeoutError):
                    monitor.ping()
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            assert time.monotonic() - started < 25  # other connections wait for 30 s


def test_an_outage_is_reported_once_and_for_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.changes.RECONNECT_S", 0.01)
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    reported_for: list[str] = []
    monkeypatch.setattr(caplog.handler, "filters", [lambda record: reported_for.append(request.get()) or True])
    with contextlib.closing(JobQueue.from_url(f"redis://127.0.0.1:{free_port()}/0")) as queue:

        async def follow() -> None:
            request.set("the first")
            async with queue._changes.follow("job"):
                await asyncio.sleep(0.3)
            await queue.aclose()

        asyncio.run(follow())
    assert reported_for == ["none"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["changes of jobs are not received"]


def test_a_job_that_is_not_started_in_time_expires(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m", start_within_s=0.01))
    view = asyncio.run(_wait(queue, job_id, 2.0))
    assert view.status is JobStatus.EXPIRED
    assert view.error
    assert "in time" in view.error.detail


def test_late_jobs_end_without_a_worker_whatever_else_is_in_their_queue(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored queue can hold a job twice, and jobs without a record; those that were returned to it come first."""
    late = [queue.submit(GenerateJob(model="m")) for _ in range(2)]
    waiting = [queue.submit(GenerateJob(model="m")) for _ in range(40)]
    for job_id in late:
        queue.redis.hset(job_key(job_id), "start_by", 1.0)
    name = "rq:queue:ncml:generate:normal"
    queue.redis.lpush(name, late[0], *(f"ghost-{i}" for i in range(20)), late[0])
    returned = [queue.submit(GenerateJob(model="m")) for _ in range(20)]
    for job_id in returned:
        queue.redis.hdel(job_key(job_id), "start_by")
        queue.redis.lmove(name, name, "RIGHT", "LEFT")
    viewed: list[str] = []
    view = queue.view

    def view_few(job_id: str) -> JobView:
        viewed.append(job_id)
        assert len(viewed) < 80
        return view(job_id)

    monkeypatch.setattr(queue, "view", view_few)
    queue.expire_late()
    assert [queue.redis.hget(job_key(job_id), "outcome") for job_id in late] == [b"expired"] * 2
    assert waiting[-1] not in viewed


def test_each_waiting_job_that_this_process_ends_is_reported_once(queue: JobQueue) -> None:
    ended: list[JobView] = []
    queue.on_end = ended.append
    late = queue.submit(GenerateJob(model="m", start_within_s=0.01))
    assert asyncio.run(_wait(queue, late, 3.0)).status is JobStatus.EXPIRED
    queue.view(late)
    canceled = queue.submit(GenerateJob(model="m"))
    for _ in range(2):
        queue.cancel(canceled)
    queue.submit(GenerateJob(model="m"))
    claims = Leases(queue, [Lane.GENERATE], "w").claim(1)[1]
    queue.cancel(claims[0].id)  # its worker ends it
    assert [(view.id, view.status) for view in ended] == [(late, "expired"), (canceled, "canceled")]


def test_the_longest_wait_of_each_kind_of_job_is_measured(queue: JobQueue) -> None:
    ids = [queue.submit(job) for job in (GenerateJob(model="m"), ScoreJob(model="m", images=(PIXELS,)))]
    ids.append(queue.submit(GenerateJob(model="m", priority=Priority.LOW)))
    for job_id, wait_s in zip(ids, (100, 50, 200), strict=True):
        queue.redis.hincrbyfloat(job_key(job_id), "submitted", -wait_s)
    damaged = queue.submit(GenerateJob(model="m"))
    queue.redis.delete(job_key(damaged))
    queue.redis.set(job_key(damaged), "no record")
    waits = {task.value: round(wait_s, -1) for task, wait_s in queue.monitor.longest_waits().items()}
    assert waits == {"score": 50, "generate": 200, "scan": 0, "complete": 0, "calibrate": 0, "update": 0}


def test_the_age_of_a_job_is_by_the_clock_of_the_server(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.submit(GenerateJob(model="m"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1000)
    assert all(depth.oldest_age_s < 60 for depth in queue.monitor.depths())


@pytest.mark.parametrize("job_id", ["nothing", "a b", "../x", "*", "", "x" * 65])
def test_unknown_and_malformed_ids_are_not_found(queue: JobQueue, job_id: str) -> None:
    for call in (queue.view, queue.result, queue.cancel):
        with pytest.raises(JobNotFound):
            call(job_id)


def test_the_stream_of_a_job_can_be_resumed_and_ends_with_its_last_state(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))

    async def follow(after: str) -> list[tuple[str, str | None]]:
        events = [event async for event in queue.events(job_id, after, tick_s=0.05) if event]
        return [(event.id, event.status) for event in events]

    async def main() -> None:
        following = asyncio.create_task(follow("0"))
        await asyncio.sleep(0.15)
        await asyncio.to_thread(queue.cancel, job_id)
        events_read = await following
        assert [status for _, status in events_read] == ["queued", "canceled"]
        assert await follow(events_read[0][0]) == events_read[1:]
        assert await follow(events_read[1][0]) == []
        queue.redis.delete(f"ncml:events:{job_id}")  # it may expire before the job does
        assert [status for _, status in await follow(events_read[0][0])] == ["canceled"]
        await queue.aclose()

    asyncio.run(main())


def test_every_change_of_a_job_wakes_its_stream(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    leases, claims = Leases(queue, [Lane.GENERATE], "w"), list[Claim]()
    event = Event(id="", kind="progress", progress=Progress(stage="refine", step=1, total=2))
    progress = event.model_dump_json(exclude={"id"}, exclude_none=True)
    changes: Iterator[Callable[[], object]] = iter(
        [
            lambda: claims.extend(leases.claim(1)[1]),
            lambda: leases.renew(claims, {job_id: progress}),
            lambda: leases.requeue(claims),
            lambda: queue.cancel(job_id),
        ]
    )

    async def follow() -> list[str | None]:
        statuses = list[str | None]()
        async with contextlib.aclosing(queue.events(job_id, tick_s=30)) as events:
            async for event in events:
                assert event, "it was not woken within the tick"
                statuses.append(event.status)
                if change := next(changes, None):
                    asyncio.get_running_loop().call_later(0.3, change)  # when the stream waits
        await queue.aclose()
        return statuses

    assert asyncio.run(follow()) == ["queued", "running", None, "queued", "canceled"]


@pytest.mark.parametrize("after", ["99999999999999999999", "1-99999999999999999999", "x", "", "1-", "٣"])
def test_an_invalid_event_id_is_not_found(queue: JobQueue, after: str) -> None:
    job_id = queue.submit(GenerateJob(model="m"))

    async def follow(after: str) -> object:
        try:
            async with contextlib.aclosing(queue.events(job_id, after, tick_s=0.01)) as events:
                return await anext(events)
        finally:
            await queue.aclose()

    with pytest.raises(JobNotFound):
        asyncio.run(follow(after))


def test_the_largest_event_id_is_accepted(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    queue.cancel(job_id)

    async def follow() -> list[object]:
        events = [event async for event in queue.events(job_id, f"{10**19 - 1}-{10**19 - 1}")]
        await queue.aclose()
        return events

    assert asyncio.run(follow()) == []


def test_a_unix_socket_works_for_every_method(valkey_server: Valkey, valkey_url: str) -> None:
    with contextlib.closing(JobQueue.from_url(valkey_server.unix_url)) as queue:
        job_id = queue.submit(GenerateJob(model="m", start_within_s=0.01))
        assert asyncio.run(_wait(queue, job_id, 3.0)).status is JobStatus.EXPIRED


def test_every_key_of_an_ended_job_expires(queue: JobQueue) -> None:
    queue.cancel(queue.submit(GenerateJob(model="m")))
    without = [key for key in queue.redis.keys("*") if queue.redis.ttl(key) < 0]
    assert sorted(without) == [b"ncml:wake:generate", b"rq:canceled:ncml:generate:normal", b"rq:queues"]


def test_what_describes_the_request_is_kept_in_the_view(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"), fingerprint="abc", files=["a.png", "画像.png"], format="npz")
    queue.cancel(job_id)
    assert queue.view(job_id).fingerprint == "abc"
    assert queue.view(job_id).format == "npz"
    assert queue.view(job_id).files == ("a.png", "画像.png")


def test_a_job_whose_cancellation_was_accepted_ends_canceled(queue: JobQueue) -> None:
    """This holds even if its worker finishes it before it notices the cancellation."""
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(GenerateJob(model="m"))
    _, claims = leases.claim(1)
    assert not queue.view(job_id).is_canceling
    view = queue.cancel(job_id)
    assert (view.status, view.is_canceling) == (JobStatus.RUNNING, True)
    assert leases.finish([(claims[0], JobEnding(JobStatus.SUCCEEDED))]) == [JobEnding(JobStatus.CANCELED, CANCELED)]
    view = queue.view(job_id)
    assert (view.status, view.error, view.is_canceling) == (JobStatus.CANCELED, CANCELED, False)


def test_a_cancellation_reports_the_job_that_ended_meanwhile(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(GenerateJob(model="m"))
    [claim] = leases.claim(1)[1]
    cancel = queue._cancel

    def cancel_after_the_end(**arguments: object) -> bytes:
        leases.finish([(claim, JobEnding(JobStatus.SUCCEEDED))])
        return cancel(**arguments)

    monkeypatch.setattr(queue, "_cancel", cancel_after_the_end)
    assert queue.cancel(job_id).status is JobStatus.SUCCEEDED


def test_a_result_that_is_not_finite_can_be_read(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.SCORE], "w")
    job_id = queue.submit(ScoreJob(model="m", images=(PIXELS,)))
    score = Score(bpd=math.nan, log_likelihood=-math.inf)
    result = ScoreResult(
        model=ModelRef(name="m", version="v"), height=2, width=2, results=(score,), timing=Timing(queue_s=1)
    )
    leases.finish([(leases.claim(1)[1][0], JobEnding(JobStatus.SUCCEEDED, None, result))])
    stored = queue.result(job_id)
    assert isinstance(stored, ScoreResult)
    assert math.isnan(stored.results[0].bpd)
    assert stored.results[0].log_likelihood == -math.inf


def test_an_ended_job_can_be_forgotten_and_its_id_used_again(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"), job_id="mine")
    with pytest.raises(QueueError):
        queue.forget(job_id)
    queue.cancel(job_id)
    queue.forget(job_id)
    assert [key for key in queue.redis.keys("*") if b"mine" in key] == []
    with pytest.raises(JobNotFound):
        queue.forget(job_id)
    assert queue.submit(GenerateJob(model="m"), job_id="mine") == "mine"


def test_a_worker_of_another_version_is_ignored(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    current_worker = PublishedWorker(
        info=WorkerInfo(name="a", lanes=(Lane.SCORE,), state=WorkerState.IDLE, models=(), started_at=0), descriptors=()
    )
    queue.redis.zadd(WORKERS, {"a": 1, "b": 2, "c": 3})
    queue.redis.set(worker_key("a"), current_worker.model_dump_json())
    queue.redis.set(worker_key("b"), '{"info": {"surprise": 1}, "descriptors": []}')
    queue.redis.set(worker_key("c"), f'{{"info": {current_worker.info.model_dump_json()}, "models": []}}')  # of 0.1.0
    assert queue.monitor.workers() == [current_worker.info]
    assert [queue.monitor.service(lane)[0] for lane in Lane] == [1, 0]
    assert "ignoring a worker of another version" in caplog.text


def test_a_newer_worker_whose_messages_have_more_fields_is_served(queue: JobQueue) -> None:
    publish(queue, "a", MODEL)
    published = json.loads(queue.redis.get(worker_key("a")))
    key = descriptor_key(published["descriptors"][0])
    descriptor = json.loads(queue.redis.get(key))
    for part in (published, published["info"], descriptor, descriptor["preprocessing"]):
        part["surprise"] = 1
    queue.redis.set(worker_key("a"), json.dumps(published))
    queue.redis.set(key, json.dumps(descriptor))
    assert queue.monitor.models() == [MODEL]
    assert [info.name for info in queue.monitor.workers()] == ["a"]


MODEL = ModelDescriptor(
    name="m", version="ab" * 32, height=1, width=1, classes=(), noise=1, keeps=(), solver="s", stepped_solver="s",
    solvers={}, preprocessing=Preprocessing(name="p", version=1),
)  # fmt: skip


def publish(queue: JobQueue, name: str, model: ModelDescriptor, lane: Lane = Lane.SCORE) -> None:
    """Publish a worker, which started after those of names before its own, and its model."""
    started_at = float(ord(name))
    info = WorkerInfo(name=name, lanes=(lane,), state=WorkerState.IDLE, models=(), started_at=started_at)
    queue.redis.zadd(WORKERS, {name: 1})
    text = model.model_dump_json()
    digest = hashlib.sha256(text.encode()).hexdigest()
    queue.redis.set(descriptor_key(digest), text)
    queue.redis.set(worker_key(name), PublishedWorker(info=info, descriptors=(digest,)).model_dump_json())


def test_a_descriptor_is_published_once_and_read_once(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of them take megabytes, which every request and every heartbeat would transfer."""
    models = tuple(MODEL.model_copy(update={"name": f"m{i}"}) for i in range(70))
    info = WorkerInfo(name="a", lanes=(Lane.SCORE,), state=WorkerState.IDLE, models=(), started_at=0)
    publications = Publications(queue.redis, "a")
    publications.publish(info, models)
    assert len(queue.redis.get(worker_key("a"))) < 80 * len(models)
    assert queue.monitor.models() == list(reversed(models))
    read, stored = [], []
    monkeypatch.setattr("worker.monitor._parse_descriptor", read.append)
    monkeypatch.setattr(publications, "_describe", lambda keys, args: stored.extend(keys))
    publications.publish(info.model_copy(update={"state": WorkerState.BUSY}), models)
    assert queue.monitor.models() is queue.monitor.models()
    assert queue.monitor.workers()[0].state is WorkerState.BUSY
    assert (read, stored) == ([], [])
    assert queue.redis.pttl(descriptor_key(json.loads(queue.redis.get(worker_key("a")))["descriptors"][0])) > 0


def test_a_model_whose_descriptor_is_missing_or_damaged_is_left_out(queue: JobQueue) -> None:
    info = WorkerInfo(name="a", lanes=(Lane.SCORE,), state=WorkerState.IDLE, models=(), started_at=0)
    Publications(queue.redis, "a").publish(info, [MODEL.model_copy(update={"name": name}) for name in "mno"])
    first, second, _ = json.loads(queue.redis.get(worker_key("a")))["descriptors"]
    queue.redis.delete(descriptor_key(first))
    queue.redis.set(descriptor_key(second), "{}")
    assert [model.name for model in queue.monitor.models()] == ["o"]


def test_pictures_are_stored_once_while_they_are_published(queue: JobQueue, tmp_path: Path) -> None:
    file = tmp_path / "detector.jpg"
    file.write_bytes(b"a sheet")
    digest = hashlib.sha256(b"a sheet").hexdigest()
    publications = Publications(queue.redis, "a")
    assert queue.monitor.pictures(digest) is None
    publications.publish_pictures({digest: file})
    assert queue.monitor.pictures(digest) == b"a sheet"
    file.unlink()  # it is not read again while it is stored
    queue.redis.pexpire(pictures_key(digest), 5000)
    publications.publish_pictures({digest: file})
    assert queue.redis.pttl(pictures_key(digest)) > 5000
    assert queue.monitor.pictures(digest) == b"a sheet"


def test_pictures_of_another_detector_or_too_large_ones_are_not_published(
    queue: JobQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {"other": b"a sheet of an earlier detector", "large": bytes(MAX_SHEET_BYTES + 1), "good": b"a sheet"}
    files: dict[str, Path] = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files["0" * 64 if name == "other" else hashlib.sha256(content).hexdigest()] = tmp_path / name
    files["f" * 64] = tmp_path / "missing"
    publications = Publications(queue.redis, "a")
    for _ in range(2):
        publications.publish_pictures(files)
    assert [queue.monitor.pictures(digest) for digest in files] == [None, None, b"a sheet", None]
    assert sorted(record.args[0].name for record in caplog.records) == ["large", "missing", "other"]  # once each


def test_pictures_wait_until_the_server_has_memory(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sheet").write_bytes(b"a sheet")
    digest = hashlib.sha256(b"a sheet").hexdigest()
    publications = Publications(queue.redis, "a")

    def refuse(*args: object, **options: object) -> None:
        raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    with monkeypatch.context() as patch:
        patch.setattr(publications._client, "set", refuse)
        publications.publish_pictures({digest: tmp_path / "sheet"})
    assert queue.monitor.pictures(digest) is None
    publications.publish_pictures({digest: tmp_path / "sheet"})
    assert queue.monitor.pictures(digest) == b"a sheet"


def test_a_model_has_the_batching_of_the_latest_worker_that_generates(queue: JobQueue) -> None:
    passed, failed = (
        Batching(groups=groups, check=check, detail="d") for groups, check in (("fast", "passed"), ("fixed", "failed"))
    )
    publish(queue, "a", MODEL.model_copy(update={"batching": passed, "card": "old"}), Lane.GENERATE)
    publish(queue, "b", MODEL.model_copy(update={"batching": failed, "card": "newer"}), Lane.GENERATE)
    publish(queue, "c", MODEL.model_copy(update={"card": "newest"}))
    assert queue.monitor.models() == [MODEL.model_copy(update={"batching": failed, "card": "newest"})]


def test_models_are_in_the_order_of_the_latest_worker_that_serves_each(queue: JobQueue) -> None:
    """After a rollback, that is the former version again."""
    for name, version in (("a", "one"), ("b", "two"), ("c", "one")):
        publish(queue, name, MODEL.model_copy(update={"version": version}))
    assert [model.version for model in queue.monitor.models()] == ["one", "two"]


async def _wait(queue: JobQueue, job_id: str, timeout_s: float):
    try:
        return await queue.wait(job_id, timeout_s)
    finally:
        await queue.aclose()


def test_an_idle_stream_yields_none_each_tick(queue: JobQueue) -> None:
    """The tick is longer than redis-py's default timeout of 5 s."""
    job_id = queue.submit(GenerateJob(model="m"))

    async def look() -> list[float]:
        began, ticks = time.monotonic(), list[float]()
        async with contextlib.aclosing(queue.events(job_id, tick_s=5.5)) as events:
            async for event in events:
                if event is None:
                    ticks.append(time.monotonic() - began)
                    break
        await queue.aclose()
        return ticks

    [tick] = asyncio.run(look())
    assert 5 < tick < 30


def test_a_live_job_has_no_time_to_live(queue: JobQueue) -> None:
    """With a time to live, a jump of the clock would erase waiting jobs without a final event."""
    job_id = queue.submit(GenerateJob(model="m"))
    keys = [job_key(job_id), f"ncml:events:{job_id}"]
    assert [queue.redis.ttl(key) for key in keys] == [-1, -1]
    leases = Leases(queue, [Lane.GENERATE], "w")
    _, claims = leases.claim(1)
    leases.renew(claims, {job_id: '{"kind":"progress"}'})
    assert [queue.redis.ttl(key) for key in keys] == [-1, -1]
    leases.requeue(claims)
    assert [queue.redis.ttl(key) for key in keys] == [-1, -1]
    queue.cancel(job_id)
    assert all(0 < queue.redis.ttl(key) <= 3600 for key in keys)


def test_two_deletions_leave_a_job_that_takes_the_id_meanwhile(queue: JobQueue) -> None:
    old = queue.view(queue.submit(GenerateJob(model="m"), job_id="mine"))
    queue.cancel("mine", old.created_at)  # both deletions do
    queue.forget("mine", old.created_at)  # the first one ends
    queue.submit(GenerateJob(model="m"), job_id="mine")
    for step in (queue.cancel, queue.forget):  # the second one goes on
        with pytest.raises(JobNotFound):
            step("mine", old.created_at)
    assert queue.view("mine").status is JobStatus.QUEUED
    assert queue.monitor.depth(Lane.GENERATE) == 1
    assert queue.cancel("mine", queue.view("mine").created_at).status is JobStatus.CANCELED


def test_fifty_deletions_and_submissions_at_once_lose_no_job(queue: JobQueue) -> None:
    def delete_or_submit(i: int) -> None:
        with contextlib.suppress(JobNotFound, DuplicateJob, QueueError):
            if i % 2:
                queue.submit(GenerateJob(model="m"), job_id="mine")
            else:
                view = queue.view("mine")
                queue.cancel("mine", view.created_at)
                queue.forget("mine", view.created_at)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(delete_or_submit, range(200)))
    waiting = queue.redis.lrange("rq:queue:ncml:generate:normal", 0, -1)
    record = queue.redis.hget(job_key("mine"), "status")
    assert (waiting, record) in (([], None), ([b"mine"], b"queued"), ([], b"canceled"))


def test_a_job_that_vanishes_while_it_is_canceled_leaves_nothing(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    view = queue.view(job_id)
    queue.redis.flushall()
    monkeypatch.setattr(queue, "view", lambda _: view)  # it was read before
    with pytest.raises(JobNotFound):
        queue.cancel(job_id)
    assert queue.redis.keys("*") == []


def test_the_bytes_that_wait_in_a_lane_are_limited(queue: JobQueue) -> None:
    noise = np.random.default_rng(0).bytes(30_000)
    large = ScanJob(model="m", file=noise, height=1, width=1)
    limit = 100_000
    ids = [queue.submit(large, byte_limit=limit) for _ in range(3)]
    with pytest.raises(QueueFull, match="100000 bytes"):
        queue.submit(large, byte_limit=limit)
    assert queue.submit(ScoreJob(model="m", images=(PIXELS,)), byte_limit=limit)  # the other lane has room
    queue.cancel(ids[0])
    ids[0] = queue.submit(large, byte_limit=limit)
    leases = Leases(queue, [Lane.GENERATE], "w")
    claims = leases.claim(1)[1]  # a running job does not wait
    ids.append(queue.submit(large, byte_limit=limit))
    assert leases.requeue(claims) == [True]  # an accepted job returns in any case
    with pytest.raises(QueueFull):
        queue.submit(large, byte_limit=limit)
    for job_id in ids:
        queue.cancel(job_id)
    assert queue.redis.hget("ncml:waiting", "generate") is None
    assert queue.submit(large, byte_limit=1000)  # alone, a job of any size is accepted


def test_a_server_that_refuses_writes_is_detected(queue: JobQueue) -> None:
    assert queue.monitor.refusal() is None
    try:
        queue.redis.config_set("maxmemory", int(queue.redis.info("memory")["used_memory"] / 0.85))
        assert queue.monitor.refusal() == "it is short of memory"
        used, limit = queue.monitor.memory()
        assert 0.75 * limit < used < limit
        queue.redis.config_set("maxmemory", 1)
        assert "not allowed when used memory" in (queue.monitor.refusal() or "")
        queue.redis.config_set("maxmemory", 0)
        queue.redis.replicaof("127.0.0.1", 1)
        assert "read only replica" in (queue.monitor.refusal() or "")
    finally:
        queue.redis.replicaof("no", "one")
        queue.redis.config_set("maxmemory", 0)
    assert queue.monitor.refusal() is None
    assert queue.monitor.memory()[1] == 0


def test_the_address_is_looked_up_again_after_the_server_has_become_a_replica(queue: JobQueue) -> None:
    former = queue.redis.client_id()
    queue.redis.replicaof("127.0.0.1", 1)
    try:
        with pytest.raises(redis.exceptions.ReadOnlyError):
            queue.submit(GenerateJob(model="m"))
    finally:
        queue.redis.replicaof("no", "one")
    assert queue.redis.client_id() != former
    queue.submit(GenerateJob(model="m"))
    assert queue.redis.llen("rq:queue:ncml:generate:normal") == 1


CALIBRATION = CalibrateJob(model="m", name="new", images=0, height=1, width=2, pixels=b"")
PREPARED = CALIBRATION.model_copy(update={"images": 2, "pixels": bytes(range(12))})


def test_a_held_job_is_claimed_only_after_its_release(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(CALIBRATION, held_s=60)
    view = queue.view(job_id)
    assert (view.status, queue.position(view), queue.monitor.depth(Lane.GENERATE)) == ("queued", None, 0)
    assert not leases.claim(8)[1]
    with pytest.raises(DuplicateJob):
        queue.submit(CALIBRATION, job_id=job_id, held_s=60)

    assert queue.release(job_id, PREPARED)
    assert queue.position(queue.view(job_id)) == 0
    ((claim,),) = leases.claim(8)[1:]
    assert parse_job(claim.data) == PREPARED
    assert queue.view(job_id).created_at == view.created_at
    assert not queue.release(job_id, PREPARED)
    assert leases.finish([(claim, JobEnding(JobStatus.CANCELED, CANCELED))])
    assert not queue.redis.exists("ncml:waiting")


def test_a_held_job_can_be_canceled_and_ended_once(queue: JobQueue) -> None:
    ended: list[JobView] = []
    queue.on_end = ended.append
    canceled, failed = (queue.submit(CALIBRATION, held_s=60) for _ in range(2))
    assert queue.cancel(canceled).status == "canceled"
    ending = JobEnding(JobStatus.FAILED, JobError(reason="input", field="image", detail="no"))
    for job_id in (canceled, failed, failed):
        queue.end_held(job_id, CALIBRATION, ending)
        assert not queue.release(job_id, PREPARED)
    assert [(view.id, view.status) for view in ended] == [(canceled, "canceled"), (failed, "failed")]
    assert queue.view(failed).error == ending.error


def test_a_held_job_stays_held_if_its_images_find_no_room(queue: JobQueue) -> None:
    job_id = queue.submit(CALIBRATION, held_s=60)
    queue.submit(GenerateJob(model="m"))
    with pytest.raises(QueueFull):
        queue.release(job_id, PREPARED, byte_limit=1)
    assert queue.position(queue.view(job_id)) is None
    assert queue.release(job_id, PREPARED)


def test_a_held_job_that_a_killed_service_left_expires_with_the_next(queue: JobQueue) -> None:
    left = queue.submit(CALIBRATION, held_s=-2)
    queue.submit(CALIBRATION, held_s=60)
    assert queue.redis.hget(job_key(left), "outcome") == b"expired"
    assert queue.redis.llen("rq:queue:ncml:generate:held") == 1


def test_a_held_job_that_a_killed_service_left_ends_without_another(queue: JobQueue) -> None:
    left = queue.submit(CALIBRATION, held_s=-2)
    queue.expire_late()
    assert queue.redis.hget(job_key(left), "outcome") == b"expired"


def test_what_was_deleted_is_erased_from_the_append_only_file_once_an_hour(
    new_valkey: Callable[..., Valkey],
) -> None:
    server = new_valkey(aof=True)
    queue = JobQueue.from_url(server.url)

    def leave(marker: str) -> Callable[[], bool]:
        """Delete a job with this text; return whether a file of the server contains it."""
        job_id = queue.submit(ScoreJob(model="m", images=(PIXELS,)), files=[marker])
        queue.cancel(job_id)
        queue.forget(job_id)
        return lambda: any(marker.encode() in path.read_bytes() for path in server.directory.rglob("*.aof"))

    first = leave("jane-doe.png")
    eventually(first)
    queue.erase_deleted()
    eventually(lambda: not first())
    second = leave("john-doe.png")
    queue.erase_deleted()
    eventually(lambda: queue.redis.info("persistence")["aof_rewrite_in_progress"] == 0)
    assert second(), "not again within the hour"
    queue.close()
    without = JobQueue.from_url(new_valkey().url)
    without.erase_deleted()
    assert without.redis.info("persistence")["aof_rewrite_in_progress"] == 0
    assert without.redis.info("persistence")["aof_last_cow_size"] == 0
    without.close()
