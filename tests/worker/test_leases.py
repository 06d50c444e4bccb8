"""Leases, and the limits of the data in Redis."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis.exceptions
import rq

from tests.conftest import Valkey
from tests.worker.synthetic import load
from worker.contract import GenerateJob, JobStatus, Lane, Priority
from worker.job_results import CANCELED, Event, JobEnding, Preview, Progress, Timing
from worker.leases import MAX_ATTEMPTS, Claim, Leases
from worker.messages import EngineSettings, Step
from worker.queue import EVENTS_CAP, JobQueue, QueueOutOfMemory
from worker.redis_keys import job_key
from worker.running import RunningBatch, RunningJob
from worker.worker import BatchWorker, WorkerSettings


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    with contextlib.closing(JobQueue.from_url(valkey_url)) as queue:
        yield queue


def new_worker(queue: JobQueue) -> BatchWorker:
    """Return a worker whose engine is not started."""
    settings = WorkerSettings(lanes=(Lane.GENERATE,), engine=EngineSettings(directories=(), load=load))
    return BatchWorker(queue, settings)


@pytest.fixture
def worker(queue: JobQueue) -> BatchWorker:
    return new_worker(queue)


def test_a_progress_stream_is_capped_and_keeps_its_latest_entries(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(GenerateJob(model="m"))
    claims = leases.claim(8)[1]
    for step in range(EVENTS_CAP + 100):
        progress = Progress(stage="refine", step=step, total=1000)
        event = Event(id="", kind="progress", progress=progress).model_dump_json(exclude={"id"}, exclude_none=True)
        assert leases.renew(claims, {job_id: event}) == ["held"]
    assert queue.redis.xlen(f"ncml:events:{job_id}") == EVENTS_CAP
    view = queue.view(job_id)
    assert view.progress
    assert view.progress.step == EVENTS_CAP + 99


def test_an_ended_job_frees_its_input_and_later_expires(queue: JobQueue) -> None:
    queue.result_ttl_s = 3
    leases = Leases(queue, [Lane.GENERATE], "w")
    ids = [queue.submit(GenerateJob(model="m")) for _ in range(20)]
    claims = leases.claim(64)[1]
    leases.store_previews({ids[0]: Preview(stage="refine", step=1, total=2, n=1, height=1, width=1, data=b"abc")})
    ending = JobEnding(JobStatus.SUCCEEDED, blob=b"abc")
    assert leases.finish([(claim, ending) for claim in claims]) == [ending] * 20
    assert queue.blob(f"ncml:blob:{ids[0]}") == b"abc"
    assert not queue.redis.hget(f"rq:job:{ids[0]}", "data")
    time.sleep(3.2)
    later = queue.submit(GenerateJob(model="m"))
    queue.cancel(later)
    left = {key.decode() for key in queue.redis.keys("*")}
    assert left == {
        "rq:queues", "ncml:wake:generate", "rq:finished:ncml:generate:normal", "rq:canceled:ncml:generate:normal",
        f"rq:job:{later}", f"ncml:events:{later}",
    }  # fmt: skip
    again = queue.submit(GenerateJob(model="m"))
    assert leases.finish([(leases.claim(1)[1][0], ending)]) == [ending]
    assert queue.redis.zrange("rq:finished:ncml:generate:normal", 0, -1) == [again.encode()]


def test_times_are_read_from_the_clock_of_the_server(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w", lease_s=100)
    queue.submit(GenerateJob(model="m"))
    (claim,) = leases.claim(1)[1]
    lapse = queue.redis.zscore("ncml:leases", f"{claim.id}:{claim.token}")
    assert lapse - queue.redis.time()[0] == pytest.approx(100, abs=50)
    leases.lease_s = 1000
    assert leases.renew([claim], {}) == ["held"]
    assert queue.redis.zscore("ncml:leases", f"{claim.id}:{claim.token}") - lapse == pytest.approx(900, abs=50)
    assert 0 <= claim.waited_s < 600
    assert leases.recover() == (0, [])


def test_a_server_short_of_memory_refuses_new_jobs_and_ends_the_others(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "a")
    ids = [queue.submit(GenerateJob(model="m"), job_id=name) for name in ("kept", "stopped")]
    _, claims = leases.claim(2)
    ids.append(queue.submit(GenerateJob(model="m"), job_id="waits"))
    used = queue.redis.info("memory")["used_memory"]
    try:
        queue.redis.config_set("maxmemory", int(used / 0.85))
        with pytest.raises(QueueOutOfMemory, match="short of memory"):
            queue.submit(GenerateJob(model="m"))
        queue.cancel(ids[2])
        queue.redis.config_set("maxmemory", used // 2)  # results of jobs accepted earlier may exceed it
        assert leases.renew(claims, {ids[0]: '{"kind": "progress"}'}) == ["held", "held"]
        assert leases.requeue(claims) == [True, True]
        _, claims = leases.claim(2)
        assert queue.cancel(ids[1]).is_canceling
        ending = JobEnding(JobStatus.SUCCEEDED, blob=bytes(1000), timing=Timing(queue_s=1))
        canceled = JobEnding(JobStatus.CANCELED, CANCELED, timing=ending.timing)
        assert leases.finish([(claim, ending) for claim in claims]) == [ending, canceled]
    finally:
        queue.redis.config_set("maxmemory", 0)
    assert [queue.view(job_id).status for job_id in ids] == ["succeeded", "canceled", "canceled"]
    assert len(queue.redis.keys("rq:job:*")) == 3


def test_a_canceled_job_ends_when_its_worker_gives_it_back(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    kept, stopped = (queue.submit(GenerateJob(model="m")) for _ in range(2))
    _, claims = leases.claim(2)
    assert queue.cancel(stopped).is_canceling
    assert leases.requeue(claims, refund=True) == [True, False]
    assert [queue.view(job_id).status for job_id in (kept, stopped)] == ["queued", "canceled"]
    assert queue.view(stopped).error == CANCELED
    assert queue.monitor.depth(Lane.GENERATE) == 1
    assert [claim.id for claim in leases.claim(2)[1]] == [kept]


def test_a_job_that_expired_has_not_started(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(GenerateJob(model="m"))
    queue.redis.hset(f"rq:job:{job_id}", "start_by", time.time() - 1)  # a view that finds it late would end it
    (claim,) = leases.claim(1)[1]
    assert claim.late
    assert leases.finish([(claim, JobEnding(JobStatus.EXPIRED))]) != [None]
    view = queue.view(job_id)
    assert (view.status, view.started_at) == ("expired", None)


def test_a_worker_on_a_server_out_of_memory_stays_visible_and_does_without_previews(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    ids = [queue.submit(GenerateJob(model="m")) for _ in range(32)]
    running = {claim.id: RunningJob.parse(claim) for claim in worker.leases.claim(32)[1]}
    worker._batches = {1: RunningBatch.of(1, running)}
    pixels = (1, 1, 1, b"abc")
    step = Step("refine", 1, 2, done=dict.fromkeys(ids, 0), previews=dict.fromkeys(ids, pixels))
    try:
        queue.redis.config_set("maxmemory", 1)
        with monkeypatch.context() as patch:
            patch.setattr("worker.outages.time.sleep", pauses.append)
            worker._beat(force=True)
            worker._store_progress(step)
        assert len(pauses) <= 2  # none for each preview
        assert [info.name for info in queue.monitor.workers()] == [worker.name]
    finally:
        queue.redis.config_set("maxmemory", 0)
    assert all('"preview":false' in entry.progress for entry in running.values())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the queue refuses a command"]
    worker._store_progress(step)
    assert all('"preview":true' in entry.progress for entry in running.values())
    assert all(queue.preview(job_id) for job_id in ids)


def test_a_worker_serves_before_rq_lists_it(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        queue.redis.config_set("maxmemory", 1)  # a worker that waited for memory would not free it
        worker._beat(force=True)
    finally:
        queue.redis.config_set("maxmemory", 0)
    assert [info.name for info in queue.monitor.workers()] == [worker.name]
    assert rq.Worker.all(connection=queue.redis) == []
    with monkeypatch.context() as patch:
        patch.setattr("worker.worker.clean_worker_registry", fail)
        worker._beat(force=True)
    worker._beat(force=True)
    assert [entry.name for entry in rq.Worker.all(connection=queue.redis)] == [worker.name]
    assert worker._is_registered


def fail(*_: object) -> None:
    raise redis.exceptions.ConnectionError


def test_a_worker_that_is_stopped_while_it_waits_leaves_the_next_job_to_others(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_before_a_job_arrives(_: float) -> None:
        worker._on_signal(signal.SIGTERM, None)
        queue.submit(GenerateJob(model="m"))

    monkeypatch.setattr(worker.leases, "wait", stop_before_a_job_arrives)
    assert worker._gather() == []
    assert queue.monitor.depth(Lane.GENERATE) == 1


def test_workers_with_different_clocks_do_not_remove_each_other(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    workers = [new_worker(queue) for _ in range(3)]
    for worker, error_s in zip(workers, (0, 7200, -7200), strict=True):
        monkeypatch.setattr(time, "time", lambda error_s=error_s: now() + error_s)
        worker._beat(force=True)
    queue.redis.zadd("ncml:workers", {"long gone": now() - 3700})
    workers[0]._beat(force=True)
    assert set(queue.redis.zrange("ncml:workers", 0, -1)) == {worker.name.encode() for worker in workers}


def test_a_late_job_is_claimed_without_its_payload_and_stays_late(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    queue.redis.hset(f"rq:job:{job_id}", "start_by", 1.0)
    leases = Leases(queue, [Lane.GENERATE], "w", lease_s=0.0)
    [claim] = leases.claim(1)[1]
    assert (claim.late, claim.data) == (True, b"")
    assert leases.recover() == (1, [])  # its worker died before it ended the job
    assert leases.claim(1)[1][0].late


def lose(leases: Leases) -> list[Claim]:
    """Claim all jobs of a batch as a worker that then falls silent; return its claims once they have lapsed."""
    leases.lease_s = 0.001
    claims = leases.claim(8)[1]
    time.sleep(0.01)
    return claims


def test_a_worker_whose_job_was_taken_over_changes_nothing(queue: JobQueue) -> None:
    silent, other = (Leases(queue, [Lane.GENERATE], name) for name in ("silent", "other"))
    job_id = queue.submit(GenerateJob(model="m"))
    (lost,) = lose(silent)
    assert other.recover() == (1, [])
    (claim,) = other.claim(8)[1]
    ending = JobEnding(JobStatus.SUCCEEDED)
    assert silent.renew([lost], {}) == ["lost"]
    assert silent.requeue([lost]) == [False]
    assert silent.finish([(lost, ending)]) == [None]
    assert queue.view(job_id).status is JobStatus.RUNNING
    assert other.finish([(claim, ending)]) == [ending]
    assert queue.view(job_id).status is JobStatus.SUCCEEDED


def test_a_job_is_not_damaged_because_the_server_refuses_to_read_it(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise redis.exceptions.ResponseError("BUSY Valkey is busy running a script")

    leases = Leases(queue, [Lane.GENERATE], "w")
    queue.submit(GenerateJob(model="m"))
    lose(leases)
    with monkeypatch.context() as patch:
        patch.setattr(queue.redis, "hmget", refuse)
        with pytest.raises(redis.exceptions.ResponseError):
            leases.recover()
    assert leases.recover() == (1, [])


def test_a_job_is_taken_back_only_with_its_lease_and_a_refund_does_not_count_the_attempt(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    job_id = queue.submit(GenerateJob(model="m"))
    for refund, attempts in ((True, 1), (False, 1), (False, 2)):
        [claim] = leases.claim(1)[1]
        assert claim.attempts == attempts
        assert leases.requeue([claim], lapsed=True) == [False]  # it was renewed after it had been found lapsed
        assert leases.requeue([claim], refund=refund) == [True]
    assert queue.view(job_id).start_by is None  # it started in time


@pytest.mark.parametrize("attempts", [1, MAX_ATTEMPTS])
def test_a_job_whose_lease_is_renewed_after_it_was_found_lapsed_goes_on(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    slow, other = (Leases(queue, [Lane.GENERATE], name) for name in ("slow", "other"))
    job_id = queue.submit(GenerateJob(model="m"))
    claims = lose(slow)
    slow.lease_s = 15.0
    queue.redis.hset(job_key(job_id), "attempts", attempts)
    fields = queue.fields

    def renew_and_read(*args: Any) -> Any:
        slow.renew(claims, {})
        return fields(*args)

    monkeypatch.setattr(queue, "fields", renew_and_read)
    assert other.recover() == (0, [])
    assert slow.renew(claims, {}) == ["held"]
    assert queue.view(job_id).status is JobStatus.RUNNING


def test_a_worker_keeps_its_own_jobs_after_an_outage(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an outage, leases lapse of jobs that the engine computes; other workers may take them, not their own."""
    job_id = queue.submit(GenerateJob(model="m"))
    claims = lose(worker.leases)
    worker._batches[1] = RunningBatch.of(1, {job_id: RunningJob.parse(claims[0], [])})
    worker._beat(force=True)  # as the engine has opened a model meanwhile
    worker.leases.lease_s = 15.0
    assert worker.leases.renew(claims, {}) == ["held"]
    order: list[str] = []
    monkeypatch.setattr(worker, "_beat", lambda: order.append("beat"))
    renew = worker.leases.renew
    monkeypatch.setattr(worker.leases, "renew", lambda *args: order.append("renew") or renew(*args))
    worker._tick(None)
    assert order == ["renew", "beat"]
    assert queue.view(job_id).status is JobStatus.RUNNING


def test_jobs_whose_workers_died_twice_run_alone(queue: JobQueue) -> None:
    ids = {queue.submit(GenerateJob(model="m")) for _ in range(2)}
    leases = Leases(queue, [Lane.GENERATE], "w")
    for _ in range(2):
        assert {claim.id for claim in lose(leases)} == ids
        assert leases.recover() == (2, [])
    (first,), (second,) = leases.claim(8)[1], leases.claim(8)[1]
    assert {first.id, second.id} == ids


def test_jobs_of_a_worker_that_died_too_often_are_reported(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    leases = Leases(queue, [Lane.GENERATE], "w", lease_s=0.0)
    endings: list[JobEnding] = []
    for _ in range(MAX_ATTEMPTS):
        assert len(leases.claim(1)[1]) == 1
        endings += leases.recover()[1]
    [ending] = endings
    assert ending.error is not None
    assert (ending.status, ending.error.reason) == (JobStatus.FAILED, "worker")
    assert [record.job for record in caplog.records if record.message == "job of a silent worker ended"] == [job_id]


def test_jobs_claimed_before_the_server_fails_still_run(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy worker fills a batch with further claims, the second of which fails here."""
    job_id = queue.submit(GenerateJob(model="m"))
    worker._was_idle = False
    key, claims = worker.leases.claim(8)
    answers = iter([(key, claims)])

    def claim(count: int, key: str | None = None) -> tuple[str, list[Claim]]:
        for answer in answers:
            return answer
        raise redis.exceptions.ConnectionError("connection reset")

    monkeypatch.setattr(worker.leases, "claim", claim)
    assert [claim.id for claim in worker._gather()] == [job_id]


def test_finished_work_is_kept_however_long_the_server_is_away(new_valkey: Callable[..., Valkey]) -> None:
    """The step is fenced by the lease, so it may come at any time."""
    server = new_valkey(aof=True)
    with contextlib.closing(JobQueue.from_url(server.url)) as queue:
        settings = WorkerSettings(lanes=(Lane.GENERATE,), engine=EngineSettings(directories=(), load=load), lease_s=0.2)
        worker = BatchWorker(queue, settings)
        job_id = queue.submit(GenerateJob(model="m"))
        [claim] = worker.leases.claim(1)[1]
        queue.redis.waitaof(1, 0, 0)  # a busy disk may delay what the killed server writes
        server.kill()
        thread = threading.Thread(target=worker._finisher.end, args=([(claim, JobEnding(JobStatus.SUCCEEDED))], {}))
        thread.start()
        thread.join(2.0)  # longer than two leases
        assert thread.is_alive()
        server.start()
        thread.join(60)
        assert queue.view(job_id).status is JobStatus.SUCCEEDED


def test_an_outage_does_not_shorten_the_time_of_a_refusal(queue: JobQueue) -> None:
    settings = WorkerSettings(lanes=(Lane.GENERATE,), engine=EngineSettings(directories=(), load=load), lease_s=0.2)
    worker = BatchWorker(queue, settings)
    started, refusals = time.monotonic(), list[float]()

    def finish() -> list[str]:
        if time.monotonic() < started + 1.0:  # longer than two leases
            raise redis.exceptions.ConnectionError
        if not refusals:
            refusals.append(time.monotonic())
            raise redis.exceptions.ReadOnlyError
        return ["finished"]

    assert worker._finisher.retry(finish) == ["finished"]


@pytest.mark.parametrize("is_draining", [False, True])
def test_a_worker_gives_up_when_the_server_refuses_its_work_or_its_time_to_drain_is_over(
    queue: JobQueue, caplog: pytest.LogCaptureFixture, is_draining: bool
) -> None:
    settings = WorkerSettings(lanes=(Lane.GENERATE,), engine=EngineSettings(directories=(), load=load), lease_s=0.2)
    worker = BatchWorker(queue, settings)
    attempts = 0

    def step() -> list[str]:
        nonlocal attempts
        attempts += 1
        if is_draining:
            worker._stop_at = time.monotonic() - 1.0
            raise redis.exceptions.ConnectionError("connection refused")
        raise redis.exceptions.ResponseError("OOM command not allowed")

    started = time.monotonic()
    assert worker._finisher.retry(step) == []
    assert attempts
    assert time.monotonic() - started < 30
    assert "giving up on the batch: its jobs are computed again once their leases lapse" in caplog.messages


def test_the_time_of_the_last_accepted_heartbeat_is_measured(
    queue: JobQueue, worker: BatchWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> float | None:
        return worker.metrics.registry.get_sample_value("ncml_worker_heartbeat_timestamp_seconds")

    assert measured() == 0
    worker._beat(force=True)
    accepted = measured()
    assert accepted == pytest.approx(time.time(), abs=60)

    def refuse(*arguments: object) -> None:
        raise redis.exceptions.ConnectionError("connection refused")

    monkeypatch.setattr(worker._publications, "publish", refuse)
    with pytest.raises(redis.exceptions.ConnectionError):
        worker._beat(force=True)
    assert measured() == accepted


def test_the_restarts_of_engines_are_measured_from_the_start(worker: BatchWorker) -> None:
    """Otherwise Prometheus' `increase` would miss the first one."""
    for reason in ("died", "hung"):
        labels = {"reason": reason}
        assert worker.metrics.registry.get_sample_value("ncml_engine_restarts_total", labels) == 0


def test_a_job_that_must_run_alone_shares_no_batch(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    suspect = queue.submit(GenerateJob(model="m"))
    leases.requeue(leases.claim(8)[1], alone=True)
    before = [queue.submit(GenerateJob(model="m", priority=Priority.HIGH)) for _ in range(2)]
    after = queue.submit(GenerateJob(model="m"))

    key, claims = leases.claim(8)
    assert [claim.id for claim in claims] == [*before, after]
    assert key != ""
    assert leases.claim(5, key)[1] == []  # nor later, while the batch waits for more jobs
    key, claims = leases.claim(8)
    assert ([claim.id for claim in claims], key) == ([suspect], "")


def test_a_request_too_large_for_the_rest_of_a_batch_comes_first_in_the_next(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    a, large, b = (queue.submit(GenerateJob(model="m", n=n)) for n in (3, 8, 5))
    assert [claim.id for claim in leases.claim(8)[1]] == [a, b]
    assert [claim.id for claim in leases.claim(2)[1]] == [large]
