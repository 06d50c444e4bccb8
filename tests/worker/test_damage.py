"""Hostile and damaged records in the queue end only their own job, or are ignored."""

import contextlib
import zlib
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import eventually
from tests.worker.fleet import Fleet, generate, score
from worker.contract import GenerateJob, JobStatus, Lane
from worker.job_results import DAMAGED, JobEnding
from worker.leases import Leases
from worker.queue import JobNotFound, JobQueue
from worker.records import MAX_PAYLOAD_BYTES, parse_job
from worker.redis_keys import LEASES, WORKERS


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    with contextlib.closing(JobQueue.from_url(valkey_url)) as queue:
        yield queue


def nested(depth: int = 100_000) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zlib",
        zlib.compress(b""),
        zlib.compress(nested()),
        zlib.compress(b'["ncml.generate", null, ["' + b"[" * 100_000 + b'"], {}]'),
        zlib.compress(b'["ncml.generate", null, [17], {}]'),
        zlib.compress(b"\xff\xfe"),
        zlib.compress(b"{}")[:-3],
    ],
    ids=["empty", "plain", "nothing", "nested", "nested inside", "number", "not UTF-8", "cut"],
)
def test_a_damaged_payload_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="payload"):
        parse_job(data)


def test_a_payload_is_decompressed_up_to_the_largest_job_only() -> None:
    compressor = zlib.compressobj(9)
    bomb = b"".join(compressor.compress(bytes(2**24)) for _ in range(MAX_PAYLOAD_BYTES // 2**24 + 1))
    with pytest.raises(ValueError, match="payload"):
        parse_job(bomb + compressor.flush())


def write_fields(queue: JobQueue, job_id: str, **fields: object) -> None:
    queue.redis.hset(f"rq:job:{job_id}", mapping=fields)


DAMAGES: dict[str, Callable[[JobQueue, str], object]] = {
    "payload": lambda queue, job: write_fields(queue, job, data=zlib.compress(nested())),
    "another task": lambda queue, job: write_fields(
        queue, job, data=queue.redis.hget(f"rq:job:{queue.submit(score(), job_id='other-lane')}", "data")
    ),
    "attempts": lambda queue, job: write_fields(queue, job, attempts="many"),
    "number of images": lambda queue, job: write_fields(queue, job, n="nan"),
    "deadline": lambda queue, job: write_fields(queue, job, start_by="soon"),
    "time": lambda queue, job: write_fields(queue, job, submitted="yesterday"),
    "task": lambda queue, job: write_fields(queue, job, task="paint"),
    "encoding": lambda queue, job: write_fields(queue, job, request_id=b"\xff\xfe", progress=nested()),
    "type of the record": lambda queue, job: (
        queue.redis.delete(f"rq:job:{job}"), queue.redis.set(f"rq:job:{job}", "x")
    ),
    "type of the events": lambda queue, job: (
        queue.redis.delete(f"ncml:events:{job}"), queue.redis.set(f"ncml:events:{job}", "x")
    ),
    "no record": lambda queue, job: queue.redis.delete(f"rq:job:{job}"),
    "an id of other bytes": lambda queue, job: queue.redis.lpush("rq:queue:ncml:generate:high", b"\xff\xfe", b"a b"),
}  # fmt: skip


def test_damaged_records_end_their_jobs_and_no_others(fleet: Fleet) -> None:
    others: list[str] = []
    damaged: dict[str, str] = {}
    for name, damage in DAMAGES.items():
        first, damaged[name], last = (fleet.queue.submit(generate(seed=seed)) for seed in range(3))
        damage(fleet.queue, damaged[name])
        others += first, last
    assert {depth.lane for depth in fleet.queue.monitor.depths()} == set(Lane)
    worker = fleet.start("generate", lease_s=1.5)
    assert [view.status for view in fleet.wait(others)] == [JobStatus.SUCCEEDED] * len(others)
    eventually(lambda: fleet.queue.monitor.depth(Lane.GENERATE) == 0 and not fleet.queue.redis.zcard(LEASES))
    for name, job_id in damaged.items():
        with contextlib.suppress(JobNotFound):
            assert fleet.queue.view(job_id).status.is_terminal, name
    assert worker.poll() is None


def test_damaged_leases_and_workers_are_ignored(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    lost = Leases(queue, [Lane.GENERATE], "lost", lease_s=0.0)
    (claim,) = lost.claim(1)[1]
    broken = queue.submit(GenerateJob(model="m"))
    (second,) = lost.claim(1)[1]
    write_fields(queue, broken, origin="nowhere")
    members = [b"\xff\xfe:\xff", b"no colon", b"a:b:c", b"ghost:" + b"0" * 32, b""]
    queue.redis.zadd(LEASES, dict.fromkeys(members, 1.0))
    queue.redis.zadd(WORKERS, {b"\xff\xfe": 1.0, b"": 2.0})
    queue.redis.sadd("rq:workers", b"rq:worker:\xff")
    assert queue.monitor.workers() == []
    assert Leases(queue, [Lane.GENERATE], "w").recover() == (1, [JobEnding(JobStatus.FAILED, DAMAGED)])
    assert queue.redis.zcard(LEASES) == 0
    assert queue.view(job_id).status is JobStatus.QUEUED
    assert queue.view(broken).status is JobStatus.FAILED
    assert (
        lost.finish([(claim, JobEnding(JobStatus.SUCCEEDED)), (second, JobEnding(JobStatus.SUCCEEDED))]) == [None] * 2
    )


def test_a_worker_starts_beside_a_worker_whose_name_is_not_text(fleet: Fleet) -> None:
    fleet.queue.redis.sadd("rq:workers", b"rq:worker:\xff")
    fleet.queue.redis.sadd("rq:workers:ncml:generate:normal", b"rq:worker:\xff")
    fleet.queue.redis.zadd(WORKERS, {b"\xff\xfe": 1.0})
    fleet.start("generate")
    assert fleet.wait([fleet.queue.submit(generate())])[0].status is JobStatus.SUCCEEDED


def test_damaged_progress_of_one_job_leaves_the_leases_of_others(queue: JobQueue) -> None:
    leases = Leases(queue, [Lane.GENERATE], "w")
    ids = [queue.submit(GenerateJob(model="m")) for _ in range(2)]
    claims = leases.claim(8)[1]
    queue.redis.delete(f"ncml:events:{ids[0]}", f"rq:job:{ids[0]}")
    queue.redis.mset({f"ncml:events:{ids[0]}": "x", f"rq:job:{ids[0]}": "x"})
    assert leases.renew(claims, dict.fromkeys(ids, '{"kind":"progress"}')) == ["held", "held"]
    ending = JobEnding(JobStatus.SUCCEEDED)
    assert leases.finish([(claim, ending) for claim in claims]) == [ending, ending]
    assert queue.view(ids[1]).status is JobStatus.SUCCEEDED
    with pytest.raises(JobNotFound):
        queue.view(ids[0])


def test_damaged_results_events_and_previews_are_not_found(queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"))
    queue.redis.xadd(f"ncml:events:{job_id}", {"event": nested()})
    queue.redis.xadd(f"ncml:events:{job_id}", {"other": b"\xff"})
    queue.redis.set(f"ncml:blob:{job_id}:preview", nested())
    assert queue.preview(job_id) is None
    queue.cancel(job_id)
    events, _ = queue._events_after(job_id, "0")
    assert [event.status for event in events] == [JobStatus.QUEUED, JobStatus.CANCELED]
    write_fields(queue, job_id, result=nested())
    with pytest.raises(JobNotFound, match="damaged"):
        queue.result(job_id)
