"""A worker in this process: it claims, reports and ends jobs as any worker does, but has no engine."""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from tests.service.outcomes import INFO, MODEL, TIMING, outcome
from worker.contract import CalibrateJob, CompleteJob, GenerateJob, Job, JobStatus, Lane, UpdateJob, held_name
from worker.descriptors import ModelDescriptor, WorkerInfo
from worker.job_results import CANCELED, EXPIRED, JobEnding, JobError, ModelRef
from worker.leases import Leases
from worker.messages import Step
from worker.outages import Outages
from worker.publications import Publications
from worker.queue import JobQueue
from worker.records import parse_job
from worker.redis_keys import SETTLING, WORKERS, job_key, wake_key, worker_key
from worker.running import RunningJob

ROOM = 64
"""Images of the jobs that are claimed at once."""
TICK_S, IDLE_S = 0.01, 20.0
"""Pauses between looks for changes, with and without running jobs; an idle worker is woken."""


class StandIn:
    """A worker that ends each job at once, with the error `error(job)` or with its `outcome`."""

    def __init__(self, queue: JobQueue) -> None:
        self.claimed: dict[str, Job] = {}
        """The jobs that it has claimed, whose records lose their input when they end."""
        self.error: Callable[[Job], JobError | None] = lambda job: None
        self.is_deaf = False
        """Whether it continues jobs that are canceled, as a worker does for up to a step."""
        self._redis = queue.redis
        self._leases = Leases(queue, list(Lane), INFO.name, lease_s=3600)
        self._models: tuple[ModelDescriptor, ...] = (MODEL,)
        self._infos: tuple[WorkerInfo, ...] = (INFO,)
        self._running: dict[str, RunningJob] = {}
        self._outages = Outages()
        self._changed = threading.Condition()
        self._mode: Literal["working", "holding", "paused"] = "working"
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="stand-in worker")
        self._publish()
        self._thread.start()

    # -- what it publishes

    def serve(self, *models: ModelDescriptor) -> None:
        """Publish these models instead of `MODEL`; /models lists the last one first."""
        self._models = models
        self._publish()

    def appear_as(self, *infos: WorkerInfo) -> None:
        """Publish these workers instead of `INFO`, or none."""
        self._infos = infos
        self._publish()

    def _publish(self) -> None:
        for name in self._redis.zrange(WORKERS, 0, -1):
            self._redis.delete(worker_key(name.decode()))  # as a worker that ends
        for info in self._infos:
            Publications(self._redis, info.name).publish(info, self._models)
        self._redis.delete(SETTLING)  # they have the names of those that ended, as after an outage

    # -- what it does with jobs from now on

    def pause(self) -> None:
        """Claim no jobs: they wait."""
        self._set_mode("paused")

    def hold(self) -> None:
        """Claim jobs and report their progress, but do not end them unless they are canceled."""
        self._set_mode("holding")

    def resume(self) -> None:
        """Claim and end jobs."""
        self._set_mode("working")

    def _set_mode(self, mode: Literal["working", "holding", "paused"]) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify()

    def stop(self) -> None:
        """End the thread and publish no worker."""
        self._is_stopping = True
        self.resume()
        self._redis.rpush(wake_key(Lane.SCORE), 1)
        self._thread.join()
        self.appear_as()

    # -- its thread

    def _work(self) -> None:
        while not self._is_stopping:
            with self._outages.tolerated():
                with self._changed:
                    self._changed.wait_for(lambda: self._mode != "paused")
                    self._claim()
                    self._end_jobs()
                self._leases.wait(TICK_S if self._running else IDLE_S)

    def _claim(self) -> None:
        """Claim the next jobs; if there are more, the script wakes this worker again."""
        claims = self._leases.claim(ROOM)[1]
        if late := [claim for claim in claims if claim.late]:
            self._leases.finish([(claim, JobEnding(JobStatus.EXPIRED, EXPIRED)) for claim in late])
        entries = {claim.id: RunningJob.parse(claim) for claim in claims if not claim.late}
        self.claimed |= {job_id: entry.job for job_id, entry in entries.items()}
        self._running |= entries
        if sampling := [entry for entry in entries.values() if isinstance(entry.job, GenerateJob | CompleteJob)]:
            self._report(sampling)

    def _report(self, entries: list[RunningJob]) -> None:
        """Publish the first of two steps, with a black preview."""
        sizes = {entry.claim.id: entry.job.n for entry in entries}
        previews = {job_id: (n, 8, 8, bytes(n * 8 * 8 * 3)) for job_id, n in sizes.items()}
        step = Step("refine", 1, 2, dict.fromkeys(sizes, 0), previews)
        self._leases.store_previews({entry.claim.id: entry.preview(step) for entry in entries})
        for entry in entries:
            entry.has_preview = True
            entry.update(step)
        self._leases.renew([entry.claim for entry in entries], {entry.claim.id: entry.progress for entry in entries})

    def _end_jobs(self) -> None:
        """End all jobs; while holding them, only those that are canceled."""
        entries = list(self._running.values())
        if self._mode == "holding":
            states = self._leases.renew([entry.claim for entry in entries], {})
            canceled = [entry.claim for entry, state in zip(entries, states, strict=True) if state == "canceled"]
            endings = [(claim, JobEnding(JobStatus.CANCELED, CANCELED)) for claim in canceled if not self.is_deaf]
        else:
            endings = [(entry.claim, self._ending(entry)) for entry in entries]
        if endings:
            self._leases.finish(endings)
        for claim, _ in endings:
            del self._running[claim.id]

    def _ending(self, entry: RunningJob) -> JobEnding:
        if error := self.error(entry.job):
            status = JobStatus.EXPIRED if error.reason == "expired" else JobStatus.FAILED
            return JobEnding(status, error, timing=TIMING)
        job = entry.job
        model = next(m for m in self._models if m.name == job.model and job.version in (None, m.version))
        name = job.name if isinstance(job, CalibrateJob | UpdateJob) else model.name
        result, blob = entry.result(outcome(job, model), ModelRef(name=name, version=model.version), TIMING)
        return JobEnding(JobStatus.SUCCEEDED, None, result, blob, TIMING)


class Jobs(Mapping[str, Job]):
    """The jobs in the records of a queue by id, in the order of their submission, with the input that they had then."""

    def __init__(self, queue: JobQueue, worker: StandIn) -> None:
        self._redis = queue.redis
        self._worker = worker

    def __getitem__(self, job_id: str) -> Job:
        data = self._redis.hget(job_key(job_id), "data")
        return parse_job(data) if data else self._worker.claimed[job_id]

    def __iter__(self) -> Iterator[str]:
        ids = [key.decode().removeprefix(job_key("")) for key in self._redis.keys(job_key("*"))]
        return iter(sorted(ids, key=lambda job_id: float(self._redis.hget(job_key(job_id), "submitted"))))

    def __len__(self) -> int:
        return len(self._redis.keys(job_key("*")))

    @property
    def claimable(self) -> list[Job]:
        """The jobs that a worker may claim or has claimed: those that are not held, and were not when they ended."""
        held = {held_name(lane).encode() for lane in Lane}
        return [self[job_id] for job_id in self if self._redis.hget(job_key(job_id), "origin") not in held]
