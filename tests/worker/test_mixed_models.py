"""Workers with different models: a job is computed by a worker that serves its model, and fails if none does."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.fleet import Fleet, generate, score
from tests.worker.synthetic import load, write_model
from worker.contract import Job, JobStatus, Lane
from worker.descriptors import WorkerInfo, WorkerState
from worker.job_results import JobError
from worker.leases import SCAN, Leases
from worker.messages import BatchResult, Catalogue, EngineSettings, Outcome
from worker.publications import Publications
from worker.queue import JobQueue
from worker.redis_keys import SETTLING, WORKERS, serving_key, worker_key
from worker.registry import describe
from worker.running import RunningBatch, RunningJob
from worker.worker import BatchWorker, WorkerSettings


@pytest.fixture
def fleets(valkey_url: str, tmp_path: Path) -> Iterator[tuple[Fleet, Fleet]]:
    """Two fleets without workers on one queue, the models of each, of which `synthetic` is in another version."""
    fleets = (
        Fleet(valkey_url, tmp_path / "old", tmp_path / "log"),
        Fleet(valkey_url, tmp_path / "new", tmp_path / "log"),
    )
    for version, fleet in enumerate(fleets):
        write_model(fleet.models, batch_s=0.004, image_s=0.001, version=version)
        write_model(fleet.models, f"only-{fleet.models.name}", batch_s=0.004, image_s=0.001)
    yield fleets
    for fleet in fleets:
        fleet.stop()


def versions(queue: JobQueue) -> set[str]:
    return {model.version for model in queue.monitor.models() if model.name == "synthetic"}


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_job_fails_during_a_rolling_upgrade_to_another_version_of_a_model(
    fleets: tuple[Fleet, Fleet], count: int
) -> None:
    old, new = fleets
    queue, requests = old.queue, dict[str, Job]()

    def submit(part: int, *references: str) -> list[str]:
        ids: list[str] = []
        for i in range(part):
            name, _, version = references[i % len(references)].partition("@")
            fields = {"model": name, "version": version or None}
            job = score(**fields) if i % 3 else generate(seed=i, **fields)
            ids.append(queue.submit(job))
            requests[ids[-1]] = job
        return ids

    leaving = old.start()
    (before,) = versions(queue)
    submit(count // 4, "synthetic", f"synthetic@{before}", "only-old")
    new.start()
    (after,) = versions(queue) - {before}
    ids = submit(count // 2, "synthetic", f"synthetic@{before}", f"synthetic@{after}", "only-old", "only-new")
    old.wait(ids)
    leaving.send_signal(signal.SIGTERM)
    submit(count // 4, "synthetic", f"synthetic@{after}", "only-new")
    assert {view.status for view in new.wait(requests, timeout_s=120)} == {JobStatus.SUCCEEDED}
    assert leaving.wait(timeout=60) == 0
    for job_id, job in requests.items():
        result = queue.result(job_id)
        assert result
        assert result.model.version == (job.version or result.model.version)
    assert {queue.redis.hget(f"rq:job:{job_id}", "attempts") for job_id in requests} == {b"1"}
    new.check(requests)


def test_jobs_wait_for_the_worker_of_their_model_while_it_restarts_and_fail_without_it(
    fleets: tuple[Fleet, Fleet],
) -> None:
    old, new = fleets
    leaving = old.start()
    new.start()
    leaving.send_signal(signal.SIGTERM)
    assert leaving.wait(timeout=60) == 0
    waiting, unknown = old.queue.submit(score(model="only-old")), old.queue.submit(score(model="nobody"))
    (failed,) = old.wait([unknown])
    assert failed.error
    assert (failed.error.reason, failed.error.field) == ("input", "model")  # the client can request another one
    assert failed.error.detail == "there is no model 'nobody' here; the models here are only-new, synthetic"
    assert old.queue.view(waiting).status is JobStatus.QUEUED
    old.start()
    assert [view.status for view in old.wait([waiting])] == [JobStatus.SUCCEEDED]
    old.check([waiting, unknown])


def test_a_job_that_no_worker_of_its_lane_can_compute_is_refused_with_a_remedy(fleets: tuple[Fleet, Fleet]) -> None:
    """It was accepted, because workers of the other lane serve its model, or some served its version at that time."""
    old, new = fleets
    before = old.queue.submit(generate(version="ab" * 32))
    old.start("score")
    new.start("generate")
    elsewhere, wrong = old.queue.submit(generate(model="only-old")), old.queue.submit(score(model="only-new"))
    views = old.wait([before, elsewhere, wrong])
    errors = [(view.error.reason, view.error.field, view.error.detail) for view in views if view.error]
    current = load(new.models / "synthetic", device="cpu").version[:12]
    assert errors == [
        (
            "input",
            "model",
            f"version {'ab' * 6} of 'synthetic' is no longer served; request {current}, the current one",
        ),
        ("input", "model", "there is no model 'only-old' here; the models here are only-new, synthetic"),
        ("input", "model", "there is no model 'only-new' here; the models here are only-old, synthetic"),
    ]
    old.check([before, elsewhere, wrong])


def test_jobs_wait_after_an_outage_until_the_worker_of_their_model_has_returned(fleets: tuple[Fleet, Fleet]) -> None:
    old, new = fleets
    absent = old.start()
    new.start()
    absent.send_signal(signal.SIGSTOP)
    waiting = old.queue.submit(score(model="only-old"))
    lapse(old.queue)
    assert [view.status for view in new.wait([new.queue.submit(score(model="only-new"))])] == [JobStatus.SUCCEEDED]
    assert old.queue.view(waiting).status is JobStatus.QUEUED
    absent.send_signal(signal.SIGCONT)
    assert [view.status for view in old.wait([waiting])] == [JobStatus.SUCCEEDED]


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    queue = JobQueue.from_url(valkey_url)
    yield queue
    queue.close()


def lapse(queue: JobQueue) -> None:
    """Remove what workers have published, as an outage or a jump of the clock does."""
    keys = [*queue.redis.scan_iter("ncml:worker:*"), *queue.redis.scan_iter("ncml:serving:*")]
    assert queue.redis.delete(*keys) == len(keys) >= 2


def publish(queue: JobQueue, name: str, *models: str) -> None:
    """Publish a worker of the lane `score` that serves these models."""
    queue.redis.zadd(WORKERS, {name: 1})
    queue.redis.set(worker_key(name), "{}")
    queue.redis.sadd(serving_key(Lane.SCORE, name), *models)


def test_jobs_behind_those_of_another_worker_are_claimed(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.leases.REACH", 3 * SCAN)
    publish(queue, "mine", "m", "m@" + "ab" * 32)
    publish(queue, "other", "x")
    for _ in range(2 * SCAN):
        queue.submit(score(model="x"))
    reachable = {queue.submit(score(model="m")), queue.submit(score(model="m", version="ab" * 32))}
    leases = Leases(queue, [Lane.SCORE], "mine")
    claims = [claim for _ in range(2) for claim in leases.claim(8)[1]]
    assert {claim.id for claim in claims} == reachable
    assert all(claim.is_served for claim in claims)
    assert leases.claim(8) == ("", [])
    for _ in range(SCAN):
        queue.submit(score(model="x"))
    queue.submit(score(model="m"))
    assert leases.claim(8) == ("", []), "a claim takes bounded time"


def test_a_job_whose_model_no_worker_of_its_lane_serves_is_claimed_and_marked(queue: JobQueue) -> None:
    publish(queue, "mine", "m")
    job_id = queue.submit(score(model="m", version="cd" * 32))
    queue.redis.set(serving_key(Lane.SCORE, "damaged"), "no set")
    queue.redis.zadd(WORKERS, {"damaged": 1, b"\xff": 2})
    [claim] = Leases(queue, [Lane.SCORE], "mine").claim(8)[1]
    assert (claim.id, claim.is_served) == (job_id, False)


@pytest.mark.parametrize(("is_served", "is_described"), [(True, False), (True, True), (False, False)])
def test_a_job_for_a_version_that_an_engine_has_just_lost_returns_to_the_queue(
    queue: JobQueue, tmp_path: Path, is_served: bool, is_described: bool
) -> None:
    """It fails if the engine still describes the model: this worker would claim the job again and again."""
    worker = BatchWorker(queue, WorkerSettings(lanes=(Lane.SCORE,), engine=EngineSettings(directories=(), load=load)))
    if is_served:
        publish(queue, worker.name, "synthetic")
    if is_described:
        model = describe("synthetic", load(write_model(tmp_path), device="cpu"), None)
        worker._supervisor.catalogue = Catalogue((model,), {})
    job_id = queue.submit(score())
    [claim] = worker.leases.claim(8)[1]
    lost = Outcome(error=JobError(reason="model", field="model", detail="it is not served"), is_unserved=True)
    worker._batches = {1: RunningBatch.of(1, {claim.id: RunningJob.parse(claim)})}
    worker._conclude(BatchResult(1, {claim.id: lost}, 0.1, {}))
    returns = is_served and not is_described
    assert queue.view(job_id).status is (JobStatus.QUEUED if returns else JobStatus.FAILED)
    assert queue.redis.hget(f"rq:job:{job_id}", "attempts") == (b"0" if returns else b"1")
    assert queue.redis.zcard("ncml:leases") == 0


def test_after_an_outage_no_job_is_ended_before_the_other_workers_have_had_time_to_publish_again(
    queue: JobQueue, tmp_path: Path
) -> None:
    def publish_again(name: str) -> None:
        info = WorkerInfo(name=name, lanes=(Lane.SCORE,), state=WorkerState.IDLE, models=(), started_at=0)
        model = describe(f"of-{name}", load(write_model(tmp_path), device="cpu"), None)
        Publications(queue.redis, name).publish(info, (model,))

    for name in ("mine", "other"):
        publish_again(name)
    assert queue.monitor.has_all_models(), "workers that start have nothing to wait for"
    theirs, mine = queue.submit(score(model="of-other")), queue.submit(score(model="of-mine"))
    lapse(queue)
    leases = Leases(queue, [Lane.SCORE], "mine")
    assert leases.claim(8) == ("", []), "this worker has not published again either"
    publish_again("mine")
    assert not queue.monitor.has_all_models()
    assert [claim.id for claim in leases.claim(8)[1]] == [mine]
    assert leases.claim(8) == ("", [])
    assert 29_000 < queue.redis.pttl(SETTLING) <= 30_000
    queue.redis.delete(SETTLING)
    [claim] = leases.claim(8)[1]
    assert (claim.id, claim.is_served) == (theirs, False)
