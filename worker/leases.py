"""Leases: claim, renew, requeue and finish jobs, each by one atomic script.

A claimed job is leased: it belongs to the holder of its token until the lease lapses, and any worker may take a lapsed
one. Every script checks the token, so a worker that resumes after its lease has lapsed changes nothing.
"""

import logging
import re
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.contract import JOB_ID, JobStatus, Lane
from worker.job_results import CANCELED, DAMAGED, JobEnding, JobError, Preview
from worker.queue import EVENTS_CAP, JobQueue
from worker.records import status_event
from worker.redis_keys import LEASES, WORKERS, job_key, preview_key, queue_key, queue_names, script, wake_key

LEASE_S = 15.0
"""How long a worker may be silent before others take over its jobs."""

MAX_ATTEMPTS = 5
"""How often a job is started before it fails because its workers died."""

SCAN, REACH = 128, 1024
"""Jobs of each queue that one claim inspects, without and with those that it leaves: to workers with other models, or
until the engine has no other."""

YIELD_S = 0.1
"""Pause of an idle worker after it left jobs to others, which may be busy: their wake-up would end its wait at once."""

_ORIGINS = frozenset(name.encode() for name in queue_names(list(Lane)))

log = logging.getLogger("ncml.worker")


@dataclass(frozen=True)
class Claim:
    """A job leased to this worker."""

    id: str
    token: str
    origin: str
    attempts: int
    late: bool = False
    images: int = 1
    waited_s: float = 0.0
    data: bytes = b""
    batch_key: str = ""
    traceparent: str = ""
    is_served: bool = True
    """Whether a worker of the lane served the model when the job was claimed."""


LeaseState = Literal["held", "canceled", "lost"]
"""States of a claim: still leased; leased, and its cancellation was accepted; taken by another worker."""


class Leases:
    """The leases of one worker on jobs of some lanes. Times are the server's, so clocks need not agree."""

    def __init__(self, queue: JobQueue, lanes: Sequence[Lane], worker: str, *, lease_s: float = LEASE_S) -> None:
        self.queue = queue
        self.lease_s = lease_s
        self._worker = worker
        self._redis = queue.redis
        self._names = queue_names(lanes)
        self._wakes = [wake_key(lane) for lane in lanes]
        self._claim = script(self._redis, "claim")
        self._renew = script(self._redis, "renew")
        self._requeue = script(self._redis, "requeue")
        self._left_jobs = False

    def wait(self, timeout_s: float) -> None:
        """Block until a job may have arrived."""
        if self._left_jobs:
            time.sleep(min(YIELD_S, timeout_s))
        self._redis.blpop(self._wakes, timeout=timeout_s)

    def claim(self, room: int, key: str = "", *, beside: bool = False) -> tuple[str, list[Claim]]:
        """Claim compatible jobs of up to `room` images in total; a larger first job is claimed alone.

        Jobs for models that only other workers of the lane have published are left to them.
        `key` restricts the claim to a batch key, `beside` to jobs that may be computed while the engine has others: not
        long ones, nor those in suspicion of ending it. Returns the batch key that more jobs may join with ('' for none)
        and the claims.
        """
        token = uuid.uuid4().hex
        next_key, left, rows = self._claim(
            keys=[LEASES, WORKERS, *map(queue_key, self._names)],
            args=[token, self.lease_s, self._worker, room, SCAN, REACH, key,
                  status_event(JobStatus.RUNNING), int(beside)],
        )  # fmt: skip
        self._left_jobs = left > 0
        return next_key.decode(errors="replace"), [
            Claim(
                id.decode(), token, origin.decode(), int(attempts), bool(late), int(images), float(waited), data,
                batch_key.decode(errors="replace"), traceparent.decode(errors="replace"), bool(is_served),
            )
            for id, origin, late, attempts, images, waited, data, batch_key, traceparent, is_served in rows
        ]  # fmt: skip

    def renew(self, claims: Sequence[Claim], progress: dict[str, str]) -> list[LeaseState]:
        """Renew the leases, publish progress (event JSON by job id), and return the state of each lease."""
        if not claims:
            return []
        args: list[Any] = [self.lease_s, EVENTS_CAP]
        for claim in claims:
            args += [claim.id, claim.token, progress.get(claim.id, "")]
        return [lease_state.decode() for lease_state in self._renew(keys=[LEASES], args=args)]

    def finish(self, endings: Sequence[tuple[Claim, JobEnding]], *, lapsed: bool = False) -> list[JobEnding | None]:
        """End claims; return how each ended, None for a lost claim, which does not change.

        One whose cancellation was accepted ends canceled.
        """
        pipe = self._redis.pipeline(transaction=False)
        for claim, ending in endings:
            self.queue.finish(claim.id, claim.origin, ending, token=claim.token, lapsed=lapsed, client=pipe)
        return [
            (None, ending, JobEnding(JobStatus.CANCELED, CANCELED, timing=ending.timing))[answer]
            for (_, ending), answer in zip(endings, pipe.execute(), strict=True)
        ]

    def requeue(
        self, claims: Iterable[Claim], *, alone: bool = False, refund: bool = False, lapsed: bool = False
    ) -> list[bool]:
        """Put claims back at the front of their queues; return for each whether this call moved it.

        One whose cancellation was accepted ends canceled instead.
        `alone`: compute each job alone from now on. `refund`: do not count the attempt.
        """
        pipe = self._redis.pipeline(transaction=False)
        for claim in reversed(list(claims)):  # each is put in front of the previous one
            self._requeue(
                keys=[LEASES, job_key(claim.id), queue_key(claim.origin),
                      wake_key(Lane(claim.origin.split(":")[1])), f"rq:wip:{claim.origin}"],
                args=[claim.id, claim.token, int(lapsed), int(alone), int(refund),
                      status_event(JobStatus.QUEUED), self.queue.result_ttl_s,
                      status_event(JobStatus.CANCELED, CANCELED), CANCELED.model_dump_json()],
                client=pipe,
            )  # fmt: skip
        return [bool(done) for done in pipe.execute()][::-1]

    def recover(self, *, spare: Collection[str] = ()) -> tuple[int, list[JobEnding]]:
        """Take jobs from silent workers; return how many went back to their queues, and how others ended.

        spare: tokens of the caller's own claims, whose leases lapse during an outage although it computes them.

        Any number of workers may do this at once: each job moves once. A job whose worker died twice runs alone; after
        `MAX_ATTEMPTS` it fails.
        """
        seconds, micros = self._redis.time()
        members: list[bytes] = self._redis.zrangebyscore(LEASES, "-inf", seconds + micros / 1e6, start=0, num=256)
        retries: dict[bool, list[Claim]] = {False: [], True: []}
        endings: list[tuple[Claim, JobEnding]] = []
        for member in members:
            job_id, _, token = member.decode(errors="replace").partition(":")
            if token in spare:
                continue
            is_lease = re.fullmatch(JOB_ID, job_id) and re.fullmatch("[0-9a-f]{32}", token)
            if not is_lease or not self._redis.exists(job_key(job_id)):
                self._redis.zrem(LEASES, member)  # no lease, or its record is gone
                continue
            origin, attempts, canceled = self.queue.fields(job_id, ("origin", "attempts", "cancel"))
            if origin is None or origin not in _ORIGINS:
                claim = Claim(job_id, token, self._names[0], 1)
                endings.append((claim, JobEnding(JobStatus.FAILED, DAMAGED)))
                continue
            claim = Claim(job_id, token, origin.decode(), int(attempts) if attempts and attempts.isdigit() else 1)
            if canceled:
                endings.append((claim, JobEnding(JobStatus.CANCELED, CANCELED)))
            elif claim.attempts >= MAX_ATTEMPTS:
                detail = f"the worker died {claim.attempts} times while computing the job"
                endings.append((claim, JobEnding(JobStatus.FAILED, JobError(reason="worker", detail=detail))))
            else:
                retries[claim.attempts >= 2].append(claim)
        ended: list[JobEnding] = []
        for (claim, _), ending in zip(endings, self.finish(endings, lapsed=True), strict=True):
            if ending:
                ended.append(ending)
                error = ending.error.for_operators if ending.error else {}
                log.warning("job of a silent worker ended", extra={"job": claim.id, "status": ending.status} | error)
        moved = 0
        for alone, claims in retries.items():
            for claim, done in zip(claims, self.requeue(claims, alone=alone, lapsed=True), strict=True):
                moved += done
                if done:
                    log.warning("job taken from a silent worker", extra={"job": claim.id, "attempts": claim.attempts})
        return moved, ended

    def store_previews(self, previews: Mapping[str, Preview]) -> None:
        """Store previews by job id, in place of the previous ones, until their time to live ends."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id, preview in previews.items():
            pipe.set(preview_key(job_id), preview.model_dump_json(), ex=self.queue.result_ttl_s)
        pipe.execute()
