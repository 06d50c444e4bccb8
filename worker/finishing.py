"""Finishing: a worker ends its jobs, or returns them to their queues, and waits for the server as long as it takes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import ResponseError

from worker.contract import JobStatus, ScoreJob
from worker.job_results import JobEnding, Timing
from worker.leases import Claim, Leases
from worker.messages import BatchResult, Catalogue
from worker.metrics import WorkerMetrics
from worker.outages import Outages
from worker.running import RunningJob
from worker.spans import record_job

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger("ncml.worker")

T = TypeVar("T")


class JobFinisher:
    """Ends the jobs of one worker, counts and logs them."""

    def __init__(
        self,
        leases: Leases,
        metrics: WorkerMetrics,
        outages: Outages,
        tracer: Tracer | None,
        stop_at: Callable[[], float | None],
    ) -> None:
        """stop_at: returns when the time of a worker that stops is over, by `time.monotonic`; None: it does not."""
        self._stop_at = stop_at
        self._leases = leases
        self._metrics = metrics
        self._outages = outages
        self._tracer = tracer

    def conclude(self, running: Mapping[str, RunningJob], done: BatchResult, catalogue: Catalogue) -> None:
        """End the jobs of a batch with their outcomes; return those to the queue that another worker can compute.

        catalogue: what the engine serves now.
        """
        self._metrics.count_batch(done.stages, done.memory_bytes)
        endings: list[tuple[Claim, JobEnding]] = []
        returned: list[Claim] = []
        for job_id, entry in running.items():
            outcome = done.outcomes[job_id]
            if outcome.is_unserved and entry.claim.is_served and not catalogue.serves(entry.job):
                returned.append(entry.claim)
                continue
            entry.stages = done.stages
            timing = Timing(
                queue_s=entry.claim.waited_s, compute_s=done.compute_s, batch_size=outcome.batch_size or None
            )
            if outcome.error or outcome.model is None:
                endings.append((entry.claim, JobEnding(JobStatus.FAILED, outcome.error, timing=timing)))
                continue
            result, blob = entry.result(outcome, outcome.model, timing)
            endings.append((entry.claim, JobEnding(JobStatus.SUCCEEDED, None, result, blob, timing)))
        if returned:  # a folder changed meanwhile; another worker may serve the model
            log.info("the model is no longer served here; returning %d jobs to their queues", len(returned))
            self.requeue(returned, refund=True)
        if endings:
            first = next(iter(running.values())).job
            largest = max((outcome.batch_size for outcome in done.outcomes.values()), default=0)
            self._metrics.batch_size.labels(first.task).observe(largest)
            for job_id in self.end(endings, running):
                job, outcome = running[job_id].job, done.outcomes[job_id]
                self._metrics.images.labels(job.task, job.model).inc(job.n)
                if isinstance(job, ScoreJob) and outcome.model:
                    self._metrics.count_scores(job, outcome.scores, catalogue.find(outcome.model))

    def end(self, endings: Sequence[tuple[Claim, JobEnding]], running: Mapping[str, RunningJob]) -> list[str]:
        """End jobs, those that started as a part of the batch `running`; return the ids of those that succeeded.

        A job that was taken away meanwhile does not change.
        """
        succeeded: list[str] = []
        if not endings:
            return succeeded
        ended = self.retry(lambda: self._leases.finish(endings))
        for (claim, planned), actual in zip(endings, ended, strict=False):
            ending = actual or planned
            entry = running.get(claim.id)
            task, model = (entry.job.task, entry.job.model) if entry else ("unknown", "unknown")
            extra: dict[str, Any] = (entry.log_fields if entry else {"job": claim.id}) | {"status": ending.status}
            if actual is None:
                self._metrics.fenced.inc()
                log.warning("job was taken away or has ended already; its result is dropped", extra=extra)
                continue
            if ending.error:
                extra |= ending.error.for_operators
            if ending.status is JobStatus.SUCCEEDED:
                succeeded.append(claim.id)
            self._metrics.count_end(task, model, ending, claim.waited_s)
            if ending.timing and ending.timing.compute_s is not None:
                extra |= {"compute_s": round(ending.timing.compute_s, 4), "batch_size": ending.timing.batch_size}
            log.info("job ended", extra=extra)
            if self._tracer and entry:
                record_job(self._tracer, entry, ending, running.values())
        return succeeded

    def requeue(self, claims: Sequence[Claim], *, alone: bool = False, refund: bool = False) -> int:
        """Return jobs to the front of their queues, as `Leases.requeue` does; return how many this call moved."""
        return sum(self.retry(lambda: self._leases.requeue(claims, alone=alone, refund=refund)))

    def retry(self, step: Callable[[], list[T]]) -> list[T]:
        """Retry a step until the server answers, however long that takes: the step changes no job that others took.

        Give up once the server has refused it for twice the time of a lease, or the time after SIGTERM has passed.
        """
        refused_until: float | None = None
        while True:
            stop_at = self._stop_at()
            deadline = math.inf if stop_at is None else stop_at + 1.0
            with self._outages.tolerated():
                try:
                    return step()
                except ResponseError:
                    refused_until = refused_until or time.monotonic() + 2 * self._leases.lease_s
                    deadline = min(deadline, refused_until)
                    raise
            if time.monotonic() > deadline:
                log.error("giving up on the batch: its jobs are computed again once their leases lapse")
                return []
