"""Jobs in the engine: their progress while they run, their results, their batches, and the pace of a lane."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.contract import CalibrateJob, Job, Lane, LongJob, ScanJob, ScoreJob, Task, UpdateJob, batch_key
from worker.job_results import (
    CalibrateResult,
    Event,
    ImagesResult,
    JobError,
    ModelRef,
    Preview,
    Progress,
    Result,
    ScanResult,
    ScoreResult,
    StoredImages,
    Timing,
)
from worker.leases import Claim
from worker.messages import Outcome, Step
from worker.records import parse_job, write_event
from worker.redis_keys import blob_key
from worker.traces import trace_id

_TIMEOUT_REMEDIES = {
    Task.SCORE: "send fewer images at once",
    Task.SCAN: "send a smaller image, or parts of it",
    Task.GENERATE: "request fewer images or steps at once",
    Task.COMPLETE: "request fewer images or steps at once",
    Task.CALIBRATE: "send fewer images",
    Task.UPDATE: "update the detector with ncml adapt --update, or raise NCML_JOB_TIMEOUT_S",
}
"""What makes a job shorter."""


@dataclass
class RunningJob:
    """A job in the engine, and the progress event that is not yet published."""

    claim: Claim
    job: Job
    progress: str = ""
    has_preview: bool = False  # whether any step so far had one
    started_at: float = field(default_factory=time.time)
    stages: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of each stage of its batch, once it has ended."""

    @classmethod
    def parse(cls, claim: Claim, batch: Iterable[RunningJob] = ()) -> RunningJob:
        """Read the job of a claim, to be computed with a batch. Raises `ValueError` if it is not a job, or not like it.

        The records have keys by which jobs are claimed together; these may be those of another version of the service.
        """
        job = parse_job(claim.data)
        first = next(iter(batch), None)
        if first and batch_key(job) != batch_key(first.job):
            raise ValueError("the payload is not like its batch, as the record claims")
        return cls(claim, job)

    @property
    def log_fields(self) -> dict[str, str]:
        """The fields of its log lines."""
        fields = {"job": self.claim.id, "request": self.job.request_id, "model": self.job.model}
        trace = trace_id(self.claim.traceparent)
        return fields | {"trace": trace} if trace else fields

    @property
    def timeout_error(self) -> JobError:
        """The error of a job that runs for longer than its time limit."""
        detail = f"the job ran for more than {self.job.timeout_s:g} s; {_TIMEOUT_REMEDIES[self.job.task]}"
        return JobError(reason="timeout", detail=detail)

    def update(self, step: Step) -> None:
        """Set the progress event."""
        progress = Progress.of(step, done=step.done[self.claim.id], n=self.job.n, preview=self.has_preview)
        self.progress = write_event(Event(id="", kind="progress", progress=progress))

    def preview(self, step: Step) -> Preview | None:
        """Return the preview in a step, if it has one."""
        if self.claim.id not in step.previews:
            return None
        n, height, width, data = step.previews[self.claim.id]
        return Preview.of(step, done=step.done[self.claim.id], n=n, height=height, width=width, data=data)

    def result(self, outcome: Outcome, model: ModelRef, timing: Timing) -> tuple[Result, bytes]:
        """Return the result of a successful outcome, and the images to store."""
        job = self.job
        if isinstance(job, ScoreJob):
            height, width = job.images[0].height, job.images[0].width
            scores = tuple(outcome.scores)
            return ScoreResult(model=model, height=height, width=width, results=scores, timing=timing), b""
        if isinstance(job, ScanJob):
            assert outcome.scan is not None
            return ScanResult(model=model, scan=outcome.scan, timing=timing), b""
        if isinstance(job, CalibrateJob | UpdateJob):
            assert outcome.calibration is not None
            skipped = job.skipped if isinstance(job, CalibrateJob) else ()
            result = CalibrateResult(
                task=job.task, model=model, calibration=outcome.calibration, skipped=skipped, timing=timing
            )
            return result, b""
        height, width = outcome.size
        images = StoredImages(blob=blob_key(self.claim.id), n=job.n, height=height, width=width)
        result = ImagesResult(task=job.task, model=model, images=images, seeds=job.seeds, timing=timing)
        return result, b"".join(outcome.images)


@dataclass
class RunningBatch:
    """A batch in the engine: its jobs that have not ended, and for how long it has been computed."""

    number: int
    jobs: dict[str, RunningJob]
    size: int
    """The number of its jobs at the start."""
    lane: Lane
    _computed_s: float = 0.0
    _resumed_at: float | None = None

    @classmethod
    def of(cls, number: int, jobs: dict[str, RunningJob]) -> RunningBatch:
        """Return a batch that is not computed yet."""
        return cls(number, jobs, len(jobs), next(iter(jobs.values())).job.task.lane)

    @property
    def is_interruptible(self) -> bool:
        """Whether short jobs interrupt it: it is a long job, and was not interrupted by a failure before.

        If the engine ended while it had two batches, either can be the cause; the second time, a job has the engine to
        itself.
        """
        entries = self.jobs.values()
        return bool(entries) and all(isinstance(entry.job, LongJob) and entry.claim.attempts == 1 for entry in entries)

    @property
    def computed_s(self) -> float:
        """Seconds for which it has been computed, without interruptions."""
        return self._computed_s + self.slice_s

    @property
    def slice_s(self) -> float:
        """Seconds since the start or the last interruption; 0 while it is interrupted."""
        return 0.0 if self._resumed_at is None else time.monotonic() - self._resumed_at

    def resume(self) -> None:
        """Note that the engine computes it from now on."""
        if self._resumed_at is None:
            self._resumed_at = time.monotonic()

    def pause(self) -> None:
        """Note that the engine interrupts it."""
        self._computed_s, self._resumed_at = self.computed_s, None


@dataclass
class Pace:
    """Jobs per second of a lane while it is busy: a mean over batches, each weighted 0.8 times as much as the next."""

    jobs: float = 0.0
    seconds: float = 0.0

    def add(self, jobs: int, seconds: float) -> None:
        """Add a batch."""
        self.jobs, self.seconds = 0.8 * self.jobs + jobs, 0.8 * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return self.jobs / self.seconds
