"""Submit, claim, cancel, crash, freeze, lapse, expire and finish in any order, against a real Valkey.

Two workers hold leases on the same queues. Time passes by setting a lease or a deadline back, so that nothing sleeps.
"""

import itertools
from collections import defaultdict

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from worker.contract import GenerateJob, JobStatus, Lane, Priority
from worker.job_results import JobEnding, JobError
from worker.leases import MAX_ATTEMPTS, Claim, Leases
from worker.queue import JobQueue, QueueFull
from worker.records import parse_job
from worker.redis_keys import LEASES

LIMIT = 12
QUEUES = [f"rq:queue:ncml:generate:{priority}" for priority in Priority]


class Protocol(RuleBasedStateMachine):
    """`state` holds the expected state of every job; `ended` its terminal state, which never changes."""

    url = ""
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.queue = JobQueue(redis.Redis.from_url(self.url))
        self.queue.redis.flushall()
        self.workers = [Leases(self.queue, [Lane.GENERATE], name, lease_s=600) for name in "ab"]
        self.names = (f"job{i}" for i in itertools.count())
        self.jobs: dict[str, GenerateJob] = {}
        self.holders: dict[str, str] = {}  # by job: the valid token
        self.ended: dict[str, JobStatus] = {}
        self.flagged: set[str] = set()
        self.late: set[str] = set()
        self.alone: set[str] = set()

    def teardown(self) -> None:
        self.queue.close()

    @rule(n=st.integers(1, 6), noise=st.sampled_from([0.0, 1.0]), priority=st.sampled_from(Priority))
    def submit(self, n: int, noise: float, priority: Priority) -> None:
        job, name = GenerateJob(model="m", n=n, noise=noise, priority=priority), next(self.names)
        waiting = len(self.waiting())
        if waiting >= LIMIT:
            with pytest.raises(QueueFull):
                self.queue.submit(job, job_id=name, limit=LIMIT)
        else:
            assert self.queue.submit(job, job_id=name, limit=LIMIT) == name
            self.jobs[name] = job

    @rule(target=claims, worker=st.integers(0, 1), room=st.integers(1, 8))
    def claim(self, worker: int, room: int) -> list[Claim]:
        before = self.waiting()
        key, claims = self.workers[worker].claim(room)
        assert bool(claims) == bool(before)
        for claim in claims:
            assert claim.id in before
            assert claim.late == (claim.id in self.late)
            assert claim.data == b"" if claim.late else parse_job(claim.data) == self.jobs[claim.id]
            self.holders[claim.id] = claim.token
        on_time = [claim for claim in claims if not claim.late]
        assert len({self.jobs[claim.id].noise for claim in on_time}) <= 1
        assert len(on_time) <= 1 or sum(self.jobs[claim.id].n for claim in on_time) <= room
        if self.alone & {claim.id for claim in on_time}:
            assert len(on_time) == 1
            assert key == ""
        elif on_time and sum(claim.images for claim in on_time) < room:
            assert key != ""  # more jobs may still join
        return claims

    @rule(claims=consumes(claims), worker=st.integers(0, 1))
    def finish(self, claims: list[Claim], worker: int) -> None:
        self.end(claims, worker, JobStatus.SUCCEEDED)

    @rule(claims=consumes(claims), worker=st.integers(0, 1))
    def fail(self, claims: list[Claim], worker: int) -> None:
        self.end(claims, worker, JobStatus.FAILED)

    def end(self, claims: list[Claim], worker: int, status: JobStatus) -> None:
        error = JobError(reason="engine", detail="as planned") if status is JobStatus.FAILED else None
        ended = self.workers[worker].finish([(claim, JobEnding(status, error)) for claim in claims])
        assert [bool(ending) for ending in ended] == [self.holders.get(claim.id) == claim.token for claim in claims]
        for claim, ending in zip(claims, ended, strict=True):
            if ending:
                del self.holders[claim.id]
                self.ended[claim.id] = JobStatus.CANCELED if claim.id in self.flagged else status
                assert ending.status is self.ended[claim.id]

    @rule(claims=claims)
    def finish_twice(self, claims: list[Claim]) -> None:
        """Let a frozen worker resume and finish its jobs twice."""
        self.end(claims, 0, JobStatus.SUCCEEDED)
        self.end(claims, 1, JobStatus.FAILED)

    @rule(claims=consumes(claims), alone=st.booleans(), refund=st.booleans())
    def requeue(self, claims: list[Claim], alone: bool, refund: bool) -> None:
        """A job whose cancellation was accepted ends instead."""
        moved = self.workers[0].requeue(claims, alone=alone, refund=refund)
        held = [claim for claim in claims if self.holders.get(claim.id) == claim.token]
        expected = {claim.id for claim in held if claim.id not in self.flagged}
        assert {claim.id for claim, is_moved in zip(claims, moved, strict=True) if is_moved} == expected
        for claim in held:
            del self.holders[claim.id]
            if claim.id in self.flagged:
                self.ended[claim.id] = JobStatus.CANCELED
            elif alone:
                self.alone.add(claim.id)

    @rule(claims=claims)
    def renew(self, claims: list[Claim]) -> None:
        lease_states = self.workers[0].renew(claims, {claim.id: '{"kind":"progress"}' for claim in claims})
        for claim, lease_state in zip(claims, lease_states, strict=True):
            if self.holders.get(claim.id) != claim.token:
                assert lease_state == "lost"
            else:
                assert lease_state == ("canceled" if claim.id in self.flagged else "held")

    @rule(claims=claims)
    def crash(self, claims: list[Claim]) -> None:
        """Let the worker that holds these jobs be silent for longer than a lease; both workers notice it."""
        for claim in claims:
            self.queue.redis.zadd(LEASES, {f"{claim.id}:{claim.token}": 1.0}, xx=True)
        lapsed = [claim for claim in claims if self.holders.get(claim.id) == claim.token]
        attempts = {c.id: int(self.queue.redis.hget(f"rq:job:{c.id}", "attempts")) for c in lapsed}
        moved = sum(worker.recover()[0] for worker in self.workers)
        for claim in lapsed:
            del self.holders[claim.id]
            if claim.id in self.flagged:
                self.ended[claim.id] = JobStatus.CANCELED
            elif attempts[claim.id] >= MAX_ATTEMPTS:
                self.ended[claim.id] = JobStatus.FAILED
            elif attempts[claim.id] >= 2:
                self.alone.add(claim.id)
        assert moved == sum(claim.id not in self.ended for claim in lapsed)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            name = data.draw(st.sampled_from(sorted(self.jobs)))
            if name in self.ended:
                assert self.queue.cancel(name).status is self.ended[name]
            elif name in self.holders:
                assert self.queue.cancel(name).status is JobStatus.RUNNING
                self.flagged.add(name)
            else:
                is_late = name in self.late and name not in self.flagged
                self.ended[name] = JobStatus.EXPIRED if is_late else JobStatus.CANCELED
                assert self.queue.cancel(name).status is self.ended[name]

    @rule(data=st.data(), look=st.booleans())
    def wait_too_long(self, data: st.DataObject, look: bool) -> None:
        waiting = sorted(self.waiting())
        if waiting:
            name = data.draw(st.sampled_from(waiting))
            self.queue.redis.hset(f"rq:job:{name}", "start_by", 1.0)
            self.late.add(name)
            if look:
                self.ended[name] = JobStatus.CANCELED if name in self.flagged else JobStatus.EXPIRED
                assert self.queue.view(name).status is self.ended[name]

    def waiting(self) -> set[str]:
        return {name for name in self.jobs if name not in self.holders and name not in self.ended}

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        places: dict[str, list[str]] = defaultdict(list)
        for key in QUEUES:
            for job_id in self.queue.redis.lrange(key, 0, -1):
                places[job_id.decode()].append("queue")
        for member in self.queue.redis.zrange(LEASES, 0, -1):
            job_id, token = member.decode().split(":")
            places[job_id].append(token)
        expected_places = {name: ["queue"] for name in self.waiting()} | {
            name: [token] for name, token in self.holders.items()
        }
        assert places == expected_places
        mirrored = [m for p in Priority for m in self.queue.redis.zrange(f"rq:wip:ncml:generate:{p}", 0, -1)]
        assert sorted(mirrored) == sorted(f"{name}:{token}".encode() for name, token in self.holders.items())

    @invariant()
    def every_ended_job_has_ended_once(self) -> None:
        for name, status in self.ended.items():
            entries = [entry[b"event"] for _, entry in self.queue.redis.xrange(f"ncml:events:{name}")]
            terminal = [e for e in entries if any(f'"{s}"'.encode() in e for s in JobStatus if s.is_terminal)]
            assert len(terminal) == 1
            assert entries[-1] == terminal[0]
            assert self.queue.redis.hget(f"rq:job:{name}", "outcome").decode() == status
            assert self.queue.redis.ttl(f"rq:job:{name}") > 0


def test_no_order_of_events_loses_or_repeats_a_job(valkey_url: str) -> None:
    Protocol.url = valkey_url
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
