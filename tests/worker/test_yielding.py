"""A long job (a scan or a calibration) is interrupted for short ones, and each ends as it would alone.

The gates of the synthetic model keep a scan, or images, in the engine for as long as a test needs.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import eventually
from tests.worker.fleet import Fleet, complete, generate, scan, score
from tests.worker.synthetic import HEIGHT, WIDTH, SyntheticModel, load, write_model
from worker.contract import CalibrateJob, JobStatus, Lane
from worker.job_results import Progress, ScanResult
from worker.leases import Leases
from worker.messages import Batch, BatchResult, Drop, EngineSettings, Interruption, Outcome, Step
from worker.process import EngineProcess
from worker.queue import JobQueue
from worker.redis_keys import LEASES
from worker.running import RunningBatch, RunningJob
from worker.worker import BatchWorker, WorkerSettings

AT_ONCE = {"slice_s": 0.0}
"""The setting of a worker that interrupts a long job as soon as short ones wait."""

LARGE = np.zeros((20, 24, 3), np.uint8)
LARGE[10:18, 4:12] = 200


class Gates:
    """Gates of the model `synthetic`: a scan passes `scan`, images of the class `gated` pass `images`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def open(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()


@pytest.fixture
def gates(fleet: Fleet, tmp_path: Path) -> Gates:
    gates = Gates(tmp_path / "gates")
    write_model(fleet.models, batch_s=0.02, image_s=0.0, gates=str(gates.folder))
    return gates


def begin(fleet: Fleet, job: Any) -> str:
    """Submit a job, and return its id once the engine computes it."""
    job_id = fleet.queue.submit(job)
    eventually(lambda: fleet.queue.view(job_id).progress)
    return job_id


def statuses(fleet: Fleet, *ids: str) -> list[str]:
    return [fleet.queue.view(job_id).status for job_id in ids]


def attempts(fleet: Fleet, *ids: str) -> list[int]:
    return [int(fleet.queue.redis.hget(f"rq:job:{job_id}", "attempts")) for job_id in ids]


def test_short_jobs_behind_a_scan_end_before_it(fleet: Fleet, gates: Gates) -> None:
    fleet.start()
    long = begin(fleet, scan(LARGE, map=True))
    short = [fleet.queue.submit(job) for job in (complete(seed=3), generate(seed=5, n=40), score())]
    views = fleet.wait(short, timeout_s=60)
    assert [view.status for view in views] == ["succeeded"] * 3
    assert statuses(fleet, long) == ["running"]
    gates.open("scan")
    fleet.wait([long])
    result = fleet.queue.result(long)
    assert isinstance(result, ScanResult)
    model = SyntheticModel(fleet.models / "synthetic")
    image = model.scan(LARGE, tile_size=None, batch_size=16, callback=lambda _: None)
    assert result.scan.tiles == image.grid.astype("<f4").tobytes()
    assert fleet.images(short[0])[HEIGHT * WIDTH * 3 // 2 :] == model._image(3, False)[HEIGHT // 2 :].tobytes()
    assert fleet.images(short[1]) == b"".join(model._image(seed, False).tobytes() for seed in range(5, 45))
    assert attempts(fleet, long, *short) == [1] * 4
    fleet.check([long, *short])


def test_the_time_of_a_long_job_excludes_interruptions(fleet: Fleet, gates: Gates) -> None:
    fleet.start(**AT_ONCE)
    long = begin(fleet, scan(LARGE))
    short = begin(fleet, generate(class_name="gated"))
    time.sleep(3.0)
    gates.open("images", "scan")
    computed_s = [view.timing.compute_s if view.timing else None for view in fleet.wait([long, short])]
    lasted_s = fleet.queue.view(long).ended_at - fleet.queue.view(long).started_at  # type: ignore[operator]
    assert computed_s[1] >= 3.0
    assert computed_s[0] <= lasted_s - 3.0


def test_progress_of_both_is_reported_to_each(fleet: Fleet, gates: Gates) -> None:
    fleet.start(**AT_ONCE)
    long, short = begin(fleet, scan(LARGE)), begin(fleet, generate(class_name="gated"))
    progress = [fleet.queue.view(job_id).progress for job_id in (long, short)]
    assert [moment.stage for moment in progress if moment] == ["tiles", "noisy_sampling"]
    eventually(lambda: fleet.queue.preview(short))
    assert not fleet.queue.preview(long)
    gates.open("images")
    fleet.wait([short])
    events = fleet.queue.redis.xlen(f"ncml:events:{long}")
    eventually(lambda: fleet.queue.redis.xlen(f"ncml:events:{long}") > events)
    gates.open("scan")
    fleet.wait([long])
    fleet.check([long, short])


def test_a_long_job_is_computed_for_a_slice_between_two_interruptions(fleet: Fleet, gates: Gates) -> None:
    fleet.start(slice_s=1.0)
    long = begin(fleet, scan(LARGE))
    ids = [fleet.queue.submit(generate(noise=float(i))) for i in range(3)]  # of different batches
    views = fleet.wait(ids)
    starts = [view.started_at or 0.0 for view in views]
    ends = [fleet.queue.view(long).started_at or 0.0, *(view.ended_at or 0.0 for view in views[:2])]
    assert all(start - end >= 1.0 for start, end in zip(starts, ends, strict=True))
    assert statuses(fleet, long) == ["running"]
    gates.open("scan")
    fleet.wait([long])


def test_no_long_job_interrupts_another(fleet: Fleet, gates: Gates) -> None:
    fleet.start(**AT_ONCE)
    first, second = begin(fleet, scan(LARGE)), fleet.queue.submit(scan(LARGE[:8]))
    short = fleet.queue.submit(generate())  # behind the second scan
    fleet.wait([short])
    assert statuses(fleet, first, second) == ["running", "queued"]
    gates.open("scan")
    fleet.wait([first, second])
    fleet.check([first, second, short])


@pytest.mark.parametrize("canceled", ["long", "short"])
def test_canceling_one_of_two_batches_leaves_the_other(fleet: Fleet, gates: Gates, canceled: str) -> None:
    fleet.start(**AT_ONCE)
    ids = {"long": begin(fleet, scan(LARGE)), "short": begin(fleet, generate(class_name="gated"))}
    fleet.queue.cancel(ids[canceled])
    (view,) = fleet.wait([ids.pop(canceled)])
    assert view.status is JobStatus.CANCELED
    [other] = ids.values()
    assert statuses(fleet, other) == ["running"]
    gates.open("scan", "images")
    (view,) = fleet.wait([other])
    assert view.status is JobStatus.SUCCEEDED
    after = fleet.queue.submit(generate(class_name="gated"))
    fleet.wait([after])
    fleet.check([view.id, other, after])


def test_the_leases_of_both_batches_are_renewed(fleet: Fleet, gates: Gates) -> None:
    fleet.start(lease_s=1.0, **AT_ONCE)
    long, short = begin(fleet, scan(LARGE)), begin(fleet, generate(class_name="gated"))
    fleet.start(lease_s=1.0)  # it would take jobs whose leases have lapsed
    time.sleep(4.0)
    assert fleet.queue.redis.zcard(LEASES) == 2
    gates.open("scan", "images")
    assert [view.status for view in fleet.wait([long, short])] == ["succeeded"] * 2
    assert attempts(fleet, long, short) == [1, 1]
    assert "taken" not in fleet.log.read_text()
    fleet.check([long, short])


def test_both_batches_of_a_killed_worker_are_computed_by_another(fleet: Fleet, gates: Gates) -> None:
    worker = fleet.start(lease_s=1.0, **AT_ONCE)
    long, short = begin(fleet, scan(LARGE)), begin(fleet, generate(class_name="gated"))
    worker.kill()
    worker.wait()
    gates.open("scan", "images")
    fleet.start()
    assert [view.status for view in fleet.wait([long, short])] == ["succeeded"] * 2
    assert attempts(fleet, long, short) == [2, 2]
    fleet.check([long, short])


def test_a_short_job_that_kills_the_engine_fails_alone_and_the_long_one_is_not_interrupted_again(
    fleet: Fleet, gates: Gates
) -> None:
    fleet.start(**AT_ONCE)
    long = begin(fleet, scan(LARGE))
    (lethal,) = fleet.wait([fleet.queue.submit(generate(class_name="lethal"))])
    assert lethal.error
    assert lethal.error.detail == (
        "the engine died while computing the job alone (killed by signal 9, probably for lack of memory)"
    )
    eventually(lambda: fleet.queue.view(long).progress)
    assert attempts(fleet, long) == [2]
    waiting, events = fleet.queue.submit(generate()), fleet.queue.redis.xlen(f"ncml:events:{long}")
    eventually(lambda: fleet.queue.redis.xlen(f"ncml:events:{long}") > events + 10)  # a second of its progress
    assert statuses(fleet, long, waiting) == ["running", "queued"]
    gates.open("scan")
    assert [view.status for view in fleet.wait([long, waiting])] == ["succeeded"] * 2
    fleet.check([long, lethal.id, waiting])


def test_no_job_of_an_engine_that_dies_with_two_batches_is_blamed(fleet: Fleet, gates: Gates) -> None:
    """The short job runs for the second time: alone in its batch, but not in the engine."""
    worker = fleet.start(**AT_ONCE)
    short = begin(fleet, generate(class_name="gated"))
    os.kill(fleet.engine_of(worker), signal.SIGKILL)
    eventually(lambda: attempts(fleet, short) == [2])
    fleet.queue.cancel(short)
    fleet.wait([short])
    long = begin(fleet, scan(LARGE))
    short = fleet.queue.submit(generate(class_name="gated"), held_s=60)
    fleet.queue.redis.hset(f"rq:job:{short}", "attempts", 1)  # as of a worker that was killed
    assert fleet.queue.release(short, generate(class_name="gated"))
    eventually(lambda: fleet.queue.view(short).progress)
    os.kill(fleet.engine_of(worker), signal.SIGKILL)
    gates.open("scan", "images")
    assert [view.status for view in fleet.wait([long, short])] == ["succeeded"] * 2
    assert attempts(fleet, long, short) == [2, 3]
    ends = [fleet.queue.view(job_id).ended_at or 0.0 for job_id in (long, short)]
    assert ends[1] < ends[0]  # it returned to the place before the long job
    fleet.check([long, short])


def test_sigterm_lets_both_batches_finish_and_claims_nothing_more(fleet: Fleet, gates: Gates) -> None:
    worker = fleet.start(**AT_ONCE)
    long, short = begin(fleet, scan(LARGE)), begin(fleet, generate(class_name="gated"))
    worker.send_signal(signal.SIGTERM)
    eventually(lambda: [info.state for info in fleet.queue.monitor.workers()] == ["draining"])
    waiting = fleet.queue.submit(generate())
    gates.open("images")
    fleet.wait([short])
    gates.open("scan")
    assert worker.wait(timeout=300) == 0
    assert statuses(fleet, long, short, waiting) == ["succeeded", "succeeded", "queued"]


def test_two_batches_too_long_to_drain_return_to_their_queue_without_counting_as_attempts(
    fleet: Fleet, gates: Gates
) -> None:
    worker = fleet.start(drain_s=0.5, **AT_ONCE)
    long, short = begin(fleet, scan(LARGE)), begin(fleet, generate(class_name="gated"))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=300) == 0
    assert statuses(fleet, long, short) == ["queued"] * 2
    assert attempts(fleet, long, short) == [0, 0]
    assert fleet.queue.redis.lrange("rq:queue:ncml:generate:normal", 0, -1) == [short.encode(), long.encode()]


# -- the engine


def test_a_batch_that_arrives_too_late_to_interrupt_is_computed_next(tmp_path: Path) -> None:
    write_model(tmp_path, batch_s=0.0)
    engine = EngineProcess(EngineSettings(directories=(tmp_path,), load=load))
    try:
        engine.send(Batch(1, {"a": generate()}))
        engine.send(Batch(2, {"b": generate(), "c": generate(seed=2)}))
        engine.send(Drop(2, frozenset({"b"})))  # it waits
        results: list[BatchResult] = []
        while len(results) < 2:
            message = engine.receive(100)
            assert not isinstance(message, Interruption)
            if isinstance(message, BatchResult):
                results.append(message)
    finally:
        engine.stop()
    assert [result.number for result in results] == [1, 2]
    assert results[1].outcomes["b"] == Outcome()
    assert results[1].outcomes["c"].images


# -- without processes


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    queue = JobQueue.from_url(valkey_url)
    yield queue
    queue.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for batches."""
    now_s = 0.0

    def advance(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr("worker.running.time", SimpleNamespace(monotonic=lambda: now_s, time=time.time))
    return advance


class RecordingEngine:
    """An engine to which batches are sent, and which computes none."""

    def __init__(self) -> None:
        self.messages: list[Batch | Drop] = []

    def send(self, message: Batch | Drop) -> None:
        self.messages.append(message)


def new_worker(queue: JobQueue, **fields: Any) -> BatchWorker:
    settings = WorkerSettings(lanes=(Lane.GENERATE,), engine=EngineSettings(directories=(), load=load), **fields)
    return BatchWorker(queue, settings)


def test_time_limits_count_the_time_in_which_a_job_is_computed(queue: JobQueue, clock: Callable[[float], None]) -> None:
    worker, engine = new_worker(queue), RecordingEngine()
    tick: Callable[[], None] = lambda: worker._tick(engine)  # type: ignore[arg-type]  # noqa: E731
    long = queue.submit(scan(LARGE, timeout_s=10))
    worker._start(engine, worker.leases.claim(8)[1])  # type: ignore[arg-type]
    clock(6)
    short = queue.submit(generate(timeout_s=10))
    worker._claim_beside(engine)  # type: ignore[arg-type]
    assert [message.number for message in engine.messages] == [1, 2]
    clock(3)  # until the scan reports progress
    tick()
    worker._interrupt(Interruption(2))
    clock(9)
    tick()
    assert [queue.view(job_id).status for job_id in (long, short)] == ["running"] * 2
    clock(2)
    tick()
    error = queue.view(short).error
    assert error
    assert error.detail == "the job ran for more than 10 s; request fewer images or steps at once"
    assert queue.view(long).status is JobStatus.RUNNING
    assert engine.messages[-1] == Drop(2, frozenset({short}))


def test_a_long_job_is_interrupted_only_while_the_worker_claims_jobs(
    queue: JobQueue, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, engine = new_worker(queue, slice_s=2.0), RecordingEngine()
    beside: Callable[[], None] = lambda: worker._claim_beside(engine)  # type: ignore[arg-type]  # noqa: E731
    queue.submit(scan(LARGE))
    worker._start(engine, worker.leases.claim(8)[1])  # type: ignore[arg-type]
    short = queue.submit(generate())
    clock(1.9)
    beside()
    clock(0.2)
    with monkeypatch.context() as patch:
        patch.setattr("worker.worker.is_suspended", lambda client: True)
        beside()
        patch.undo()
        patch.setattr(worker, "_stop_at", 1e9)
        beside()
    assert queue.view(short).status is JobStatus.QUEUED
    beside()
    assert queue.view(short).status is JobStatus.RUNNING


def test_only_a_long_job_on_its_first_attempt_is_interruptible(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    for job, interruptible in ((scan(LARGE), True), (CALIBRATION, True), (generate(), False)):
        queue.submit(job)
        for is_first in (True, False):
            claims = leases.claim(8)[1]
            batch = RunningBatch.of(1, {claim.id: RunningJob.parse(claim) for claim in claims})
            assert batch.is_interruptible == (interruptible and is_first)
            if is_first:
                leases.requeue(claims)
    batch.jobs.clear()
    assert not batch.is_interruptible


CALIBRATION = CalibrateJob(model="synthetic", name="new", images=0, height=8, width=8, pixels=b"")


def test_a_claim_beside_a_long_job_leaves_long_and_suspect_jobs_and_finds_those_behind(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    suspect = queue.submit(generate())
    leases.requeue(leases.claim(8)[1], alone=True)
    left = [suspect, *(queue.submit(scan(LARGE)) for _ in range(200)), queue.submit(CALIBRATION)]
    assert leases.claim(8, beside=True) == ("", [])
    late = queue.submit(scan(LARGE))
    queue.redis.hset(f"rq:job:{late}", "start_by", 1.0)
    short = queue.submit(generate(n=3))
    key, claims = leases.claim(8, beside=True)
    assert [(claim.id, claim.late) for claim in claims] == [(late, True), (short, False)]
    assert key
    assert queue.redis.lrange("rq:queue:ncml:generate:normal", 0, -1) == [job_id.encode() for job_id in left]


def test_progress_of_a_batch_does_not_reach_the_other(queue: JobQueue) -> None:
    worker, engine = new_worker(queue, slice_s=0.0), RecordingEngine()
    long = queue.submit(scan(LARGE))
    worker._start(engine, worker.leases.claim(8)[1])  # type: ignore[arg-type]
    short = queue.submit(generate())
    worker._claim_beside(engine)  # type: ignore[arg-type]
    worker._store_progress(Step("tiles", 1, 2, done={long: 0}))
    worker._tick(engine)  # type: ignore[arg-type]
    progress = queue.view(long).progress
    assert progress == Progress(stage="tiles", step=1, total=2)
    assert queue.view(short).progress is None
