"""The control process: claims batches, sends them to the engine, keeps their leases, and ends each job once.

It registers, sends heartbeats and can be suspended as an RQ worker, so RQ's tools list it. Unlike RQ's workers, it has
batches computed by one engine process, which keeps the models loaded. Must not import torch: only the engine does.
"""

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import ResponseError
from rq import Queue
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.worker import SimpleWorker
from rq.worker_registration import clean_worker_registry

from worker.contract import JobStatus, Lane, ScoreJob
from worker.descriptors import WorkerInfo, WorkerState
from worker.keys import queue_names, worker_key
from worker.leases import LEASE_S, Claim, Leases
from worker.messages import Batch, BatchResult, Catalogue, Drop, EngineSettings, Opening, Step
from worker.metrics import WorkerMetrics
from worker.outages import Outages
from worker.process import EngineDied, EngineProcess
from worker.publications import Publications
from worker.queue import JobQueue
from worker.results import CANCELED, EXPIRED, JobEnding, JobError, ModelRef, Timing
from worker.running import Pace, RunningJob
from worker.spans import record_job
from worker.supervisor import EngineSupervisor

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

BEAT_S = 2.0
"""How often a worker publishes its state, and takes over the jobs of silent workers."""

TICK_S = 0.1
"""How often leases are renewed, progress is published and cancellations are read while a batch runs."""

log = logging.getLogger("ncml.worker")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of a worker; times are in seconds."""

    lanes: tuple[Lane, ...]
    engine: EngineSettings
    window_s: float = 0.01
    """How long a batch less than half full waits for more jobs if the engine was busy; a third of it for each job."""
    drain_s: float = 25.0
    """How long a running batch may continue after SIGTERM; then its jobs go back to their queues."""
    hang_s: float = 300.0
    """How long the engine may be silent, during a batch or while loading, before it is replaced."""
    lease_s: float = LEASE_S


class BatchWorker(SimpleWorker):
    """Claims compatible jobs of its lanes in batches, and ends each job once."""

    def __init__(
        self,
        queue: JobQueue,
        settings: WorkerSettings,
        metrics: WorkerMetrics | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        queues = [
            Queue(name, connection=queue.redis, serializer=JSONSerializer) for name in queue_names(settings.lanes)
        ]
        rq: Any = super()
        rq.__init__(queues, connection=queue.redis, serializer=JSONSerializer, worker_ttl=30, prepare_for_work=False)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self.settings = settings
        self.metrics = metrics or WorkerMetrics()
        self.leases = Leases(queue, settings.lanes, self.name, lease_s=settings.lease_s)
        self._tracer = tracer
        self._client: Any = queue.redis
        self._publications = Publications(queue.redis, self.name)
        self._supervisor = EngineSupervisor(
            settings.engine, self.metrics, hang_s=settings.hang_s, on_catalogue=lambda: self._beat(force=True)
        )
        self._stop_at: float | None = None
        self._started_at = time.time()
        self._outages = Outages()
        self._beat_at = 0.0
        self._batch_number = 0
        self._busy = False
        self._was_idle = True
        self._paces: dict[Lane, Pace] = {}

    # -- the worker's life cycle

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Serve until SIGTERM or SIGINT; return True."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        try:
            while not self._register():
                if self._stop_at is not None:
                    return True
            while self._stop_at is None:
                with self._outages.survived():
                    self._beat()
                    engine = self._supervisor.ready_engine()
                    if engine is None or is_suspended(self._client):
                        time.sleep(0.2)
                        continue
                    claims = self._gather()
                    if claims:
                        self._run(engine, claims)
            return True
        finally:
            self._supervisor.stop()
            with self._outages.survived():
                self._client.delete(worker_key(self.name))
                self.register_death()
            log.info("worker ended", extra={"worker": self.name})

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.settings.drain_s

    def _register(self) -> bool:
        with self._outages.survived():
            self.register_birth()
            try:
                for queue in self.queues:  # remove workers that were killed
                    clean_worker_registry(queue)
            except UnicodeDecodeError as error:
                log.warning("RQ's list of workers is damaged: %s", error)
            log.info("worker started", extra={"worker": self.name, "lanes": list(self.settings.lanes)})
            return True
        return False

    def _beat(self, *, force: bool = False) -> None:
        """Publish this worker and its models; take over the jobs of silent workers."""
        now = time.monotonic()
        if not force and now < self._beat_at:
            return
        self._beat_at = now + BEAT_S
        models = self._supervisor.catalogue.models
        info = WorkerInfo(
            name=self.name,
            lanes=self.settings.lanes,
            state=self._current_state(),
            models=tuple(ModelRef(name=m.name, version=m.version) for m in models),
            started_at=self._started_at,
            pace={lane: pace.rate for lane, pace in self._paces.items()},
        )
        self._publications.publish(info, models)
        self.metrics.heartbeat.set_to_current_time()
        with self._outages.survived(pause_s=0):  # only RQ's tools read the rest
            pipe = self._client.pipeline(transaction=False)
            self.heartbeat(pipeline=pipe)
            self.set_state("busy" if self._busy else "idle", pipeline=pipe)
            pipe.execute()
        for state in WorkerState:
            self.metrics.state.labels(state).set(state is info.state)
        moved, ended = self.leases.recover()
        self.metrics.retries.labels("worker").inc(moved)
        for ending in ended:
            self.metrics.finished.labels("unknown", "unknown", ending.status).inc()

    def _current_state(self) -> WorkerState:
        if self._stop_at is not None:
            return WorkerState.DRAINING
        if not self._supervisor.has_models:
            return WorkerState.LOADING
        return WorkerState.BUSY if self._busy else WorkerState.IDLE

    # -- one batch

    def _gather(self) -> list[Claim]:
        """Claim the next batch; if the engine was busy, wait briefly for more jobs to fill it."""
        max_batch = self.settings.engine.max_batch
        key, claims = self.leases.claim(max_batch)
        if not claims:
            self._was_idle = True
            self.leases.wait(1.0)
            key, claims = self.leases.claim(max_batch)
        if not self._was_idle and key:
            with self._outages.survived():  # the jobs claimed already run in any case
                self._top_up(key, claims)
        self._was_idle = not claims
        return claims

    def _top_up(self, key: str, claims: list[Claim]) -> None:
        started = latest = time.monotonic()
        room = self.settings.engine.max_batch - sum(claim.images for claim in claims)
        while key and room > self.settings.engine.max_batch // 2 and self._stop_at is None:
            now = time.monotonic()
            if now - started > self.settings.window_s or now - latest > self.settings.window_s / 3:
                break  # no more jobs come while the engine is idle
            key, new_claims = self.leases.claim(room, key)
            claims += new_claims
            room -= sum(claim.images for claim in new_claims)
            if new_claims:
                latest = time.monotonic()
            else:
                time.sleep(min(0.001, self.settings.window_s / 10))
        self.metrics.batch_wait_seconds.observe(time.monotonic() - started)

    def _run(self, engine: EngineProcess, claims: list[Claim]) -> None:
        """Run a batch. In every case, each of its jobs ends or returns to its queue."""
        running: dict[str, RunningJob] = {}
        endings = [(claim, JobEnding(JobStatus.EXPIRED, EXPIRED)) for claim in claims if claim.late]
        for claim in claims:
            if claim.late:
                continue
            try:
                running[claim.id] = RunningJob.parse(claim, running.values())
            except ValueError as error:
                log.error("%s", error, extra={"job": claim.id})
                detail = "the payload is not a job of this worker's version; send the request again"
                endings.append((claim, JobEnding(JobStatus.FAILED, JobError(reason="worker", detail=detail))))
        self._end(endings, {})
        if not running:
            return
        self._busy = True
        self.metrics.running.set(len(running))
        try:
            self._compute(engine, running)
        finally:
            self.metrics.running.set(0)
            self._busy = False

    def _compute(self, engine: EngineProcess, running: dict[str, RunningJob]) -> None:
        self._batch_number += 1
        lane, jobs = next(iter(running.values())).job.task.lane, len(running)
        for entry in running.values():
            log.info(
                "job started", extra=entry.log_fields | {"batch": self._batch_number, "attempt": entry.claim.attempts}
            )
        engine.send(Batch(self._batch_number, {job_id: entry.job for job_id, entry in running.items()}))
        started = last_message = last_tick = time.monotonic()
        while True:
            try:
                message = engine.receive(TICK_S / 2)
            except EngineDied:
                self._engine_lost(running, "died")
                return
            now = time.monotonic()
            if isinstance(message, BatchResult) and message.number == self._batch_number:
                self._conclude(running, message)
                self._paces.setdefault(lane, Pace()).add(jobs, time.monotonic() - started)
                return
            if message is not None:
                last_message = now
            if isinstance(message, Step):
                self._store_progress(running, message)
            elif isinstance(message, Opening | Catalogue):
                with self._outages.survived():
                    self._supervisor.note(message)
            if now - last_message > self.settings.hang_s:
                self._engine_lost(running, "hung")
                return
            if self._stop_at is not None and now > self._stop_at:
                log.warning("no time left to finish %d jobs; returning them to their queues", len(running))
                self._retry(lambda: self.leases.requeue([entry.claim for entry in running.values()], refund=True))
                return
            if now - last_tick >= TICK_S:
                last_tick = now
                with self._outages.survived():
                    self._tick(engine, running, now - started)

    def _store_progress(self, running: dict[str, RunningJob], step: Step) -> None:
        """Store the previews of a step, and prepare the progress event of each job."""
        previews = {job_id: preview for job_id, entry in running.items() if (preview := entry.preview(step))}
        with self._outages.survived(pause_s=0):  # a preview is expendable
            self.leases.store_previews(previews)
            for job_id in previews:
                running[job_id].has_preview = True
        for entry in running.values():
            entry.update(step)

    def _tick(self, engine: EngineProcess, running: dict[str, RunningJob], elapsed_s: float) -> None:
        """Renew the leases; drop jobs that were canceled, ran out of time or were taken away."""
        self._beat()
        entries = list(running.values())
        lease_states = self.leases.renew(
            [entry.claim for entry in entries], {entry.claim.id: entry.progress for entry in entries}
        )
        endings: list[tuple[Claim, JobEnding]] = []
        dropped: set[str] = set()
        for entry, lease_state in zip(entries, lease_states, strict=True):
            entry.progress = ""
            timing = Timing(queue_s=entry.claim.waited_s, compute_s=elapsed_s)
            if lease_state == "lost":
                log.warning("job was taken away", extra=entry.log_fields)
                self.metrics.fenced.inc()
                dropped.add(entry.claim.id)
            elif lease_state == "canceled":
                endings.append((entry.claim, JobEnding(JobStatus.CANCELED, CANCELED, timing=timing)))
            elif elapsed_s > entry.job.timeout_s:
                endings.append((entry.claim, JobEnding(JobStatus.FAILED, entry.timeout_error, timing=timing)))
        dropped |= {claim.id for claim, _ in endings}
        if dropped:
            engine.send(Drop(self._batch_number, frozenset(dropped)))
            self._end(endings, running)
            for job_id in dropped:
                del running[job_id]

    def _conclude(self, running: dict[str, RunningJob], done: BatchResult) -> None:
        """End the jobs that the engine has computed."""
        self.metrics.count_batch(done.stages, done.memory_bytes)
        endings: list[tuple[Claim, JobEnding]] = []
        returned: list[Claim] = []
        for job_id, entry in running.items():
            outcome = done.outcomes[job_id]
            if outcome.is_unserved and entry.claim.is_served and not self._supervisor.catalogue.serves(entry.job):
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
            self._retry(lambda: self.leases.requeue(returned, refund=True))
        if endings:
            first = next(iter(running.values())).job
            largest = max((outcome.batch_size for outcome in done.outcomes.values()), default=0)
            self.metrics.batch_size.labels(first.task).observe(largest)
            for job_id in self._end(endings, running):
                job, outcome = running[job_id].job, done.outcomes[job_id]
                self.metrics.images.labels(job.task, job.model).inc(job.n)
                if isinstance(job, ScoreJob) and outcome.model:
                    self.metrics.count_scores(job, outcome.scores, self._supervisor.catalogue.find(outcome.model))

    def _engine_lost(self, running: dict[str, RunningJob], reason: str) -> None:
        """Replace the engine, and have each of its jobs computed alone, so that a bad one fails alone.

        A job fails if the engine ended while computing it alone, and this was not its first attempt.
        """
        claims = [entry.claim for entry in running.values()]
        if len(claims) == 1 and claims[0].attempts >= 2:
            error = JobError(reason="engine", detail=f"the engine {reason} while computing the job alone")
            self._end([(claims[0], JobEnding(JobStatus.FAILED, error))], running)
        elif claims:
            moved = self._retry(lambda: self.leases.requeue(claims, alone=True))
            self.metrics.retries.labels("engine").inc(sum(moved))
        self._supervisor.replace(reason)

    def _end(self, endings: Sequence[tuple[Claim, JobEnding]], running: dict[str, RunningJob]) -> list[str]:
        """End jobs, count and log them; return the ids of those that succeeded.

        A job that was taken away meanwhile does not change.
        """
        succeeded: list[str] = []
        if not endings:
            return succeeded
        ended = self._retry(lambda: self.leases.finish(endings))
        for (claim, planned), actual in zip(endings, ended, strict=False):
            ending = actual or planned
            entry = running.get(claim.id)
            task, model = (entry.job.task, entry.job.model) if entry else ("unknown", "unknown")
            extra: dict[str, Any] = (entry.log_fields if entry else {"job": claim.id}) | {"status": ending.status}
            if actual is None:
                self.metrics.fenced.inc()
                log.warning("job was taken away or has ended already; its result is dropped", extra=extra)
                continue
            if ending.error:
                extra |= {"reason": ending.error.reason, "detail": ending.error.detail}
            if ending.status is JobStatus.SUCCEEDED:
                succeeded.append(claim.id)
            self.metrics.count_end(task, model, ending, claim.waited_s)
            if ending.timing and ending.timing.compute_s is not None:
                extra |= {"compute_s": round(ending.timing.compute_s, 4), "batch_size": ending.timing.batch_size}
            log.info("job ended", extra=extra)
            if self._tracer and entry:
                record_job(self._tracer, entry, ending, running.values())
        return succeeded

    def _retry(self, step: Callable[[], list[T]]) -> list[T]:
        """Retry a step until the server answers, however long that takes: the step changes no job that others took.

        Give up once the server has refused it for twice the time of a lease, or the time after SIGTERM has passed.
        """
        refused_until: float | None = None
        while True:
            deadline = math.inf if self._stop_at is None else self._stop_at + 1.0
            with self._outages.survived():
                try:
                    return step()
                except ResponseError:
                    refused_until = refused_until or time.monotonic() + 2 * self.settings.lease_s
                    deadline = min(deadline, refused_until)
                    raise
            if time.monotonic() > deadline:
                log.error("giving up on the batch: its jobs are computed again once their leases lapse")
                return []
