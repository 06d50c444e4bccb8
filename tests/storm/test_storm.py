"""Processes die while jobs run: no job may be lost or end twice, and no key may be left behind.

The short form runs with the other tests; the long form is `pytest -m slow tests/storm`.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from tests.conftest import Valkey, eventually
from tests.worker.fleet import Fleet, generate, score
from tests.worker.synthetic import SyntheticModel, write_model
from worker.contract import JobStatus, Lane, Pixels, Priority
from worker.job_results import ScoreResult
from worker.leases import Leases

LEASE = {"lease_s": 1.5}


def short_and_long(short: Sequence[object], long: Sequence[object]) -> list:
    return [pytest.param(*short, id="short"), pytest.param(*long, id="long", marks=[pytest.mark.slow, LONG])]


LONG = pytest.mark.timeout(900)


@pytest.fixture
def fleet(valkey_url: str, tmp_path: Path) -> Iterator[Fleet]:
    models = tmp_path / "models"
    write_model(models, batch_s=0.05, image_s=0.002)
    fleet = Fleet(valkey_url, models, tmp_path / "log")
    yield fleet
    fleet.stop()


def submit_many(fleet: Fleet, n: int, start: int = 0) -> list[str]:
    """Return scores and generations in turn; job i, from `start` on, has its own pixels or its own seed."""
    return [
        fleet.queue.submit(score(images=(pixels(i),)) if i % 2 else generate(seed=i, noise=float(i % 4)))
        for i in range(start, start + n)
    ]


def submit_slow(fleet: Fleet) -> str:
    """Submit a job that runs 20 times as long as others, before all that wait."""
    return fleet.queue.submit(generate(class_name="slow", priority=Priority.HIGH))


def pixels(i: int) -> Pixels:
    return Pixels(height=8, width=8, data=bytes([i % 256]) * 192)


def check_answers(fleet: Fleet, ids: Sequence[str]) -> None:
    """Assert that each job has its one correct result, however often it was computed."""
    model = SyntheticModel(fleet.models / "synthetic")
    for i, job_id in enumerate(ids):
        result = fleet.queue.result(job_id)
        if isinstance(result, ScoreResult):
            assert result.results[0].bpd == (i % 256) / 32
        else:
            assert fleet.images(job_id) == model._image(i, False).tobytes()


@pytest.mark.parametrize(("jobs", "kills"), short_and_long((80, 3), (300, 8)))
def test_jobs_survive_killed_workers(fleet: Fleet, jobs: int, kills: int) -> None:
    write_model(fleet.models, batch_s=0.1, image_s=0.0)
    for _ in range(2):
        fleet.start(max_batch=4, **LEASE)
    ids = submit_many(fleet, jobs)
    interrupted: list[str] = []
    for _ in range(kills):
        interrupted.append(submit_slow(fleet))
        victim = fleet.worker_of(interrupted[-1])
        victim.kill()
        victim.wait()
        fleet.start(max_batch=4, **LEASE)
    views = fleet.wait([*ids, *interrupted])
    assert [view.status for view in views] == [JobStatus.SUCCEEDED] * (jobs + kills)
    assert all(int(fleet.queue.redis.hget(f"rq:job:{job_id}", "attempts")) >= 2 for job_id in interrupted)
    check_answers(fleet, ids)
    fleet.check([*ids, *interrupted])


@pytest.mark.parametrize(("jobs", "stops"), short_and_long((120, 3), (400, 8)))
def test_jobs_survive_terminated_workers(fleet: Fleet, jobs: int, stops: int) -> None:
    write_model(fleet.models, batch_s=0.1, image_s=0.0)
    for _ in range(2):
        fleet.start(max_batch=4)
    ids: list[str] = []
    running: list[str] = []
    for _ in range(stops):
        ids += submit_many(fleet, jobs // stops, len(ids))
        running.append(submit_slow(fleet))
        stopped = fleet.worker_of(running[-1])
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(timeout=300) == 0
        fleet.start(max_batch=4)
    everything = [*ids, *running]
    assert [view.status for view in fleet.wait(everything)] == [JobStatus.SUCCEEDED] * len(everything)
    assert {fleet.queue.redis.hget(f"rq:job:{job_id}", "attempts") for job_id in everything} == {b"1"}
    check_answers(fleet, ids)
    fleet.check(everything)


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=[pytest.mark.slow, LONG])])
def test_a_job_that_kills_its_engine_fails_alone(fleet: Fleet, rounds: int) -> None:
    fleet.start()
    for i in range(rounds):
        jobs = [generate(seed=seed, class_name="lethal" if seed == i % 8 else "good") for seed in range(8)]
        ids = [fleet.queue.submit(job) for job in jobs]
        views = fleet.wait(ids)
        failed = [seed for seed, view in enumerate(views) if view.status is not JobStatus.SUCCEEDED]
        assert failed == [i % 8]
        error = views[i % 8].error
        assert error
        assert error.detail.startswith("the engine died while computing the job alone (killed by signal 9")
        fleet.check(ids)


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=[pytest.mark.slow, LONG])])
def test_the_queue_s_server_is_killed_and_restarted(
    new_valkey: Callable[..., Valkey], tmp_path: Path, rounds: int
) -> None:
    server = new_valkey(aof=True)
    write_model(tmp_path / "models", batch_s=0.2, image_s=0.01)
    fleet = Fleet(server.url, tmp_path / "models", tmp_path / "log")
    try:
        workers = [fleet.start(max_batch=8, **LEASE), fleet.start(max_batch=8, **LEASE)]
        for i in range(rounds):
            ids = submit_many(fleet, 48)
            eventually(lambda ids=ids: any(fleet.queue.view(job_id).status is JobStatus.RUNNING for job_id in ids))
            time.sleep(0.05 * i)
            server.kill()
            time.sleep(0.5)
            server.start()
            eventually(lambda: _answers(fleet))
            assert [view.status for view in fleet.wait(ids)] == [JobStatus.SUCCEEDED] * 48
            check_answers(fleet, ids)
            fleet.check(ids)
        assert [worker.poll() for worker in workers] == [None, None]  # they survived
    finally:
        fleet.stop()


def _answers(fleet: Fleet) -> bool:
    try:
        return fleet.queue.monitor.ping()
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=[pytest.mark.slow, LONG])])
def test_a_canceled_job_and_one_over_its_time_limit_leave_the_others_of_their_batch(fleet: Fleet, rounds: int) -> None:
    write_model(fleet.models, batch_s=1.0, image_s=0.0, rows=30)
    fleet.start()
    for i in range(rounds):
        blocker = submit_slow(fleet)
        fleet.worker_of(blocker)
        eight = [fleet.queue.submit(generate(seed=seed)) for seed in range(8)]
        five = [fleet.queue.submit(generate(noise=1.0, timeout_s=0.2 if n == i % 5 else 60)) for n in range(5)]
        fleet.queue.cancel(blocker)
        eventually(lambda ids=eight: fleet.queue.view(ids[0]).progress, every_s=0.005)
        fleet.queue.cancel(eight[i % 8])
        views = fleet.wait([*eight, *five, blocker])
        ended = [view.status for view in views]
        expected = [*[JobStatus.SUCCEEDED] * 13, JobStatus.CANCELED]
        expected[i % 8], expected[8 + i % 5] = JobStatus.CANCELED, JobStatus.FAILED
        assert ended == expected
        assert {
            view.timing.batch_size for view in views[:13] if view.status is JobStatus.SUCCEEDED and view.timing
        } == {
            8,
            5,
        }
        fleet.check([blocker, *eight, *five])


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=[pytest.mark.slow, LONG])])
def test_a_frozen_worker_that_resumes_changes_nothing(fleet: Fleet, rounds: int) -> None:
    write_model(fleet.models, batch_s=2.0, image_s=0.0)
    for _ in range(rounds):
        frozen = fleet.start(**LEASE)
        ids = [fleet.queue.submit(generate(seed=seed)) for seed in range(4)]
        eventually(lambda ids=ids: fleet.queue.view(ids[0]).status is JobStatus.RUNNING)
        frozen.send_signal(signal.SIGSTOP)
        other = fleet.start(**LEASE)
        views = fleet.wait(ids)
        assert [view.status for view in views] == [JobStatus.SUCCEEDED] * 4
        before = [fleet.queue.redis.dump(f"rq:job:{job_id}") for job_id in ids]
        frozen.send_signal(signal.SIGCONT)
        other.send_signal(signal.SIGTERM)
        other.wait(timeout=300)
        later = fleet.queue.submit(generate())  # served by the worker that was frozen
        fleet.wait([later])
        assert [fleet.queue.redis.dump(f"rq:job:{job_id}") for job_id in ids] == before
        frozen.send_signal(signal.SIGTERM)
        frozen.wait(timeout=300)
        assert "taken away" in fleet.log.read_text()
        fleet.check([*ids, later])


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=[pytest.mark.slow, LONG])])
def test_thirty_concurrent_recoveries_requeue_each_job_once(fleet: Fleet, rounds: int) -> None:
    queue = fleet.queue
    for _ in range(rounds):
        for key in queue.redis.scan_iter("ncml:serving:*"):  # a stopped worker's models count as served for a while
            queue.redis.delete(key)
        lost = Leases(queue, list(Lane), "lost", lease_s=0.05)
        ids = submit_many(fleet, 40)
        claimed: list[str] = []
        while claims := lost.claim(64)[1]:
            claimed += [claim.id for claim in claims]
        assert sorted(claimed) == sorted(ids)
        time.sleep(0.1)

        def recover(i: int) -> int:
            name = f"ncml:{'score' if i % 2 else 'generate'}:normal"
            # RQ's clean-up, which every `rq info` runs, must not touch these jobs
            StartedJobRegistry(name, connection=queue.redis, serializer=JSONSerializer).cleanup()
            return Leases(queue, list(Lane), f"w{i}").recover()[0]

        with ThreadPoolExecutor(30) as pool:
            assert sum(pool.map(recover, range(30))) == 40
        waiting = [i for lane in Lane for i in queue.redis.lrange(f"rq:queue:ncml:{lane}:normal", 0, -1)]
        assert sorted(waiting) == sorted(job_id.encode() for job_id in ids)
        fleet_worker = fleet.start()
        fleet.wait(ids)
        check_answers(fleet, ids)
        fleet.check(ids)
        _end(fleet_worker)


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=[pytest.mark.slow, LONG])])
def test_an_image_is_the_same_after_a_retry(fleet: Fleet, rounds: int) -> None:
    write_model(fleet.models, batch_s=1.5, image_s=0.0)
    for seed in range(rounds):
        worker = fleet.start(**LEASE)
        undisturbed = fleet.queue.submit(generate(seed=seed, n=5))
        fleet.wait([undisturbed])
        retried = fleet.queue.submit(generate(seed=seed, n=5))
        eventually(lambda job_id=retried: fleet.queue.view(job_id).progress)
        worker.kill()
        worker.wait()
        replacement = fleet.start(**LEASE)
        fleet.wait([retried])
        assert fleet.queue.redis.hget(f"rq:job:{retried}", "attempts") == b"2"
        assert fleet.images(retried) == fleet.images(undisturbed)
        _end(replacement)


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=300) == 0
