"""Who works on what: claiming jobs, keeping them, giving them back and ending them, each by one atomic script.

A claimed job is leased: it belongs to whoever holds its token until the lease lapses, and any worker may take a
lapsed one. Every step names the token, so a worker that was frozen past its lease and comes back changes nothing.
"""

import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.contract import JobError, JobStatus, Lane, Preview, Result, Timing
from worker.queue import (
    CANCELED,
    EVENTS_CAP,
    LEASES,
    JobQueue,
    events_key,
    in_order,
    job_key,
    preview_key,
    queue_key,
    script,
    status_event,
    wake_key,
)

LEASE_S = 15.0
"""How long a worker may be silent before its jobs are taken from it."""

MAX_ATTEMPTS = 5
"""How often a job is started again after its worker vanished, before it counts as the cause."""

log = logging.getLogger("ncml.worker")


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds."""

    id: str
    token: str
    origin: str
    attempts: int
    late: bool = False
    images: int = 1
    waited_s: float = 0.0
    data: bytes = b""


@dataclass(frozen=True)
class Ending:
    """How a job is to end."""

    status: JobStatus
    error: JobError | None = None
    result: Result | None = None
    blob: bytes = b""
    timing: Timing | None = None


Standing = Literal["held", "canceled", "lost"]


class Leases:
    """The jobs of some lanes, as one worker sees them. Times are the server's, so clocks need not agree."""

    def __init__(self, queue: JobQueue, lanes: Sequence[Lane], worker: str, *, lease_s: float = LEASE_S) -> None:
        self.queue = queue
        self.lease_s = lease_s
        self._worker = worker
        self._redis = queue.redis
        self._names = in_order(lanes)
        self._wakes = [wake_key(lane) for lane in lanes]
        self._claim = script(self._redis, "claim")
        self._renew = script(self._redis, "renew")
        self._requeue = script(self._redis, "requeue")

    def wait(self, timeout_s: float) -> None:
        """Sleep until a job may have arrived."""
        self._redis.blpop(self._wakes, timeout=timeout_s)

    def claim(self, room: int, want: str = "", *, scan: int = 128) -> tuple[str, list[Claim]]:
        """Take compatible jobs of up to `room` images in all; a first job larger than that comes alone.

        `want` limits it to a batch key. Returns the batch key that more jobs may join with ('' for none) and the jobs.
        """
        token = uuid.uuid4().hex
        key, rows = self._claim(
            keys=[LEASES, *map(queue_key, self._names)],
            args=[token, self.lease_s, self._worker, self.queue.result_ttl_s, room, scan, want,
                  status_event(JobStatus.RUNNING)],
        )  # fmt: skip
        return key.decode(), [
            Claim(id.decode(), token, origin.decode(), int(attempts), bool(late), int(images), float(waited), data)
            for id, origin, late, attempts, images, waited, data in rows
        ]

    def renew(self, claims: Sequence[Claim], progress: dict[str, str]) -> list[Standing]:
        """Keep the claims, publish what progress there is (event JSON by job id), and learn where each stands."""
        if not claims:
            return []
        args: list[Any] = [self.lease_s, self.queue.result_ttl_s, EVENTS_CAP]
        for claim in claims:
            args += [claim.id, claim.token, progress.get(claim.id, "")]
        return [standing.decode() for standing in self._renew(keys=[LEASES], args=args)]

    def finish(self, endings: Iterable[tuple[Claim, Ending]], *, lapsed: bool = False) -> list[bool]:
        """End claims; for each, whether this call was the one that did. A lost claim stays as it is."""
        pipe = self._redis.pipeline(transaction=False)
        for claim, end in endings:
            self.queue.finish(
                claim.id,
                claim.origin,
                end.status,
                token=claim.token,
                lapsed=lapsed,
                error=end.error,
                result=end.result,
                blob=end.blob,
                timing=end.timing,
                client=pipe,
            )
        return [bool(ended) for ended in pipe.execute()]

    def give_back(
        self, claims: Iterable[Claim], *, alone: bool = False, refund: bool = False, lapsed: bool = False
    ) -> list[bool]:
        """Put claims at the front of their queues again; for each, whether this call did.

        `alone` keeps it out of batches from now on; `refund` does not count the attempt.
        """
        pipe = self._redis.pipeline(transaction=False)
        for claim in reversed(list(claims)):  # each goes in front of the one before
            self._requeue(
                keys=[LEASES, job_key(claim.id), events_key(claim.id), queue_key(claim.origin),
                      wake_key(Lane(claim.origin.split(":")[1])), f"rq:wip:{claim.origin}"],
                args=[claim.id, claim.token, int(lapsed), int(alone), int(refund), self.queue.result_ttl_s,
                      status_event(JobStatus.QUEUED)],
                client=pipe,
            )  # fmt: skip
        return [bool(done) for done in pipe.execute()][::-1]

    def recover(self) -> int:
        """Take jobs from workers that fell silent; returns how many went back to their queues.

        Any number of workers may do this at once: each job changes hands once. A job that was lost with its worker
        twice runs alone; after `MAX_ATTEMPTS` it fails.
        """
        seconds, micros = self._redis.time()
        members: list[bytes] = self._redis.zrangebyscore(LEASES, "-inf", seconds + micros / 1e6, start=0, num=256)
        again: dict[bool, list[Claim]] = {False: [], True: []}
        over: list[tuple[Claim, Ending]] = []
        for member in members:
            job_id, _, token = member.decode().rpartition(":")
            h: list[bytes | None] = self._redis.hmget(job_key(job_id), ["origin", "attempts", "cancel"])
            if h[0] is None:
                self._redis.zrem(LEASES, member)  # its record is gone: nothing to go on with
                continue
            claim = Claim(job_id, token, h[0].decode(), int(h[1] or 1))
            if h[2]:
                over.append((claim, Ending(JobStatus.CANCELED, CANCELED)))
            elif claim.attempts >= MAX_ATTEMPTS:
                detail = f"the worker vanished {claim.attempts} times while computing the job"
                over.append((claim, Ending(JobStatus.FAILED, JobError(reason="worker", detail=detail))))
            else:
                again[claim.attempts >= 2].append(claim)
        self.finish(over, lapsed=True)
        moved = 0
        for alone, claims in again.items():
            for claim, done in zip(claims, self.give_back(claims, alone=alone, lapsed=True), strict=True):
                moved += done
                if done:
                    log.warning("job taken from a silent worker", extra={"job": claim.id, "attempts": claim.attempts})
        return moved

    def preview(self, job_id: str, preview: Preview) -> None:
        """Keep a job's preview for a while, in place of the one before."""
        self._redis.set(preview_key(job_id), preview.model_dump_json(), ex=self.queue.result_ttl_s)
