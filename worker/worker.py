"""The control process: claims batches, sends them to the engine, keeps their leases, and ends each job once.

It registers, sends heartbeats and can be suspended as an RQ worker, so RQ's tools list it. Unlike RQ's workers, it has
batches computed by one engine process, which keeps the models loaded. Must not import torch: only the engine does.
"""

import itertools
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.worker import SimpleWorker
from rq.worker_registration import clean_worker_registry

from ncml.signals import stop_signals
from worker.contract import JobStatus, Lane
from worker.descriptors import WorkerInfo, WorkerState
from worker.finishing import JobFinisher
from worker.job_results import CANCELED, EXPIRED, JobEnding, JobError, ModelRef, Timing
from worker.leases import LEASE_S, Claim, Leases, LeaseState
from worker.messages import Batch, BatchResult, Catalogue, Drop, EngineSettings, Interruption, Opening, Step
from worker.metrics import WorkerMetrics
from worker.outages import Outages
from worker.process import EngineDied, EngineProcess
from worker.publications import Publications
from worker.queue import JobQueue
from worker.redis_keys import queue_names, worker_key
from worker.running import Pace, RunningBatch, RunningJob
from worker.supervisor import EngineSupervisor

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

BEAT_S = 2.0
"""How often a worker publishes its state, and takes over the jobs of silent workers."""

MAX_FAULTS = 20
"""Model folders that cannot be used, of which a worker publishes the reason; its log has all."""

TICK_S = 0.1
"""How often leases are renewed, progress is published and cancellations are read while a batch runs."""

log = logging.getLogger("ncml.worker")


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
    slice_s: float = 1.0
    """How long a long job (a scan or a calibration) is computed, at least, before short ones interrupt it again."""


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
        self._client: Any = queue.redis
        self._publications = Publications(queue.redis, self.name)
        self._supervisor = EngineSupervisor(
            settings.engine, self.metrics, hang_s=settings.hang_s, on_catalogue=lambda: self._beat(force=True)
        )
        self._stop_at: float | None = None
        self._started_at = time.time()
        self._outages = Outages()
        self._beat_at = 0.0
        self._is_registered = False
        self._finisher = JobFinisher(self.leases, self.metrics, self._outages, tracer, lambda: self._stop_at)
        self._batch_number = 0
        self._batches: dict[int, RunningBatch] = {}
        """The batches in the engine by number: one and, beside a long job, at most one of short jobs."""
        self._busy = False
        self._was_idle = True
        self._paces: dict[Lane, Pace] = {}

    # -- the worker's life cycle

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Serve until SIGTERM, SIGINT or SIGHUP; return True."""
        for signum in stop_signals():
            signal.signal(signum, self._on_signal)
        log.info("worker started", extra={"worker": self.name, "lanes": list(self.settings.lanes)})
        try:
            while self._stop_at is None:
                with self._outages.tolerated():
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
            with self._outages.tolerated():
                self._client.delete(worker_key(self.name))
                self.register_death()
            log.info("worker ended", extra={"worker": self.name})

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.settings.drain_s

    def _register(self) -> None:
        """Register with RQ, once."""
        if self._is_registered:
            return
        self._client.delete(self.key)  # an earlier attempt may have failed after it was written, which RQ refuses
        self.register_birth()
        try:
            for queue in self.queues:  # remove workers that were killed
                clean_worker_registry(queue)
        except UnicodeDecodeError as error:
            log.warning("RQ's list of workers is damaged: %s", error)
        self._is_registered = True

    def _public_faults(self, faults: Mapping[str, str]) -> dict[str, str]:
        """Return why model folders cannot be used, of at most `MAX_FAULTS`, without the directories of this machine."""
        directories = re.compile("|".join(re.escape(f"{path}/") for path in self.settings.engine.directories))
        return {name: directories.sub("", fault) for name, fault in itertools.islice(faults.items(), MAX_FAULTS)}

    def _beat(self, *, force: bool = False) -> None:
        """Publish this worker and its models; take over the jobs of silent workers."""
        now = time.monotonic()
        if not force and now < self._beat_at:
            return
        self._beat_at = now + BEAT_S
        catalogue = self._supervisor.catalogue
        models = catalogue.models
        info = WorkerInfo(
            name=self.name,
            lanes=self.settings.lanes,
            state=self._current_state(),
            models=tuple(ModelRef(name=m.name, version=m.version) for m in models),
            started_at=self._started_at,
            pace={lane: pace.rate for lane, pace in self._paces.items()},
            has_all_models=self._supervisor.is_ready and not catalogue.is_partial,
            faults=self._public_faults(catalogue.faults),
        )
        self._publications.publish(info, models)
        self._publications.publish_pictures(catalogue.pictures)
        self.metrics.heartbeat.set_to_current_time()
        with self._outages.tolerated(pause_s=0):  # only RQ's tools read the rest, which a server out of memory refuses
            self._register()
            pipe = self._client.pipeline(transaction=False)
            self.heartbeat(pipeline=pipe)
            self.set_state("busy" if self._busy else "idle", pipeline=pipe)
            pipe.execute()
        for state in WorkerState:
            self.metrics.state.labels(state).set(state is info.state)
        moved, ended = self.leases.recover(spare={claim.token for claim in self._claims()})
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
            if self._stop_at is not None:  # SIGTERM arrived meanwhile
                return []
            key, claims = self.leases.claim(max_batch)
        if not self._was_idle and key:
            with self._outages.tolerated():  # the jobs claimed already run in any case
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
        """Run a batch, and others beside it if it is long. In every case, each job ends or returns to its queue."""
        try:
            if self._start(engine, claims):
                self._busy = True
                self._follow(engine)
        finally:
            self._busy = False
            self._batches.clear()
            self.metrics.running.set(0)

    def _start(self, engine: EngineProcess, claims: list[Claim]) -> bool:
        """Send jobs to the engine as a batch; end those that cannot run. Return whether one can."""
        jobs: dict[str, RunningJob] = {}
        endings = [(claim, JobEnding(JobStatus.EXPIRED, EXPIRED)) for claim in claims if claim.late]
        for claim in claims:
            if claim.late:
                continue
            try:
                jobs[claim.id] = RunningJob.parse(claim, jobs.values())
            except ValueError as error:
                log.error("%s", error, extra={"job": claim.id})
                detail = "the payload is not a job of this worker's version; send the request again"
                endings.append((claim, JobEnding(JobStatus.FAILED, JobError(reason="worker", detail=detail))))
        self._finisher.end(endings, {})
        if not jobs:
            return False
        self._batch_number += 1
        batch = RunningBatch.of(self._batch_number, jobs)
        if not self._batches:
            batch.resume()
        self._batches[batch.number] = batch
        self._count_running()
        for entry in jobs.values():
            log.info("job started", extra=entry.log_fields | {"batch": batch.number, "attempt": entry.claim.attempts})
        engine.send(Batch(batch.number, {job_id: entry.job for job_id, entry in jobs.items()}))
        return True

    def _follow(self, engine: EngineProcess) -> None:
        """Process what the engine reports, until it has computed all batches or they are given up."""
        last_message = last_tick = time.monotonic()
        while self._batches:
            try:
                message = engine.receive(TICK_S / 2)
            except EngineDied as end:
                self._engine_lost("died", str(end))
                return
            now = time.monotonic()
            if message is not None:
                last_message = now
            if isinstance(message, BatchResult):
                self._conclude(message)
            elif isinstance(message, Interruption):
                self._interrupt(message)
            elif isinstance(message, Step):
                self._store_progress(message)
            elif isinstance(message, Opening | Catalogue):
                with self._outages.tolerated():
                    self._supervisor.note(message)
            if now - last_message > self.settings.hang_s:
                self._engine_lost("hung")
                return
            if self._stop_at is not None and now > self._stop_at:
                claims = self._claims()
                log.warning("no time left to finish %d jobs; returning them to their queues", len(claims))
                self._finisher.requeue(claims, refund=True)
                return
            if now - last_tick >= TICK_S:
                last_tick = now
                with self._outages.tolerated():
                    self._tick(engine)
                    self._claim_beside(engine)

    def _claim_beside(self, engine: EngineProcess) -> None:
        """Claim short jobs while the engine computes a long one, which it interrupts for them between two slices."""
        [*batches] = self._batches.values()
        if len(batches) != 1 or not batches[0].is_interruptible or batches[0].slice_s < self.settings.slice_s:
            return
        if self._stop_at is None and not is_suspended(self._client):
            self._start(engine, self.leases.claim(self.settings.engine.max_batch, beside=True)[1])

    def _interrupt(self, interruption: Interruption) -> None:
        """Note which batch the engine computes from now on."""
        for batch in self._batches.values():
            if batch.number == interruption.number:
                batch.resume()
            else:
                batch.pause()

    def _claims(self) -> list[Claim]:
        """Return the claims of all jobs in the engine; those of a long job, which are older, come last."""
        return [entry.claim for batch in reversed(self._batches.values()) for entry in batch.jobs.values()]

    def _count_running(self) -> None:
        self.metrics.running.set(sum(len(batch.jobs) for batch in self._batches.values()))

    def _store_progress(self, step: Step) -> None:
        """Store the previews of a step, and prepare the progress event of each job of its batch."""
        jobs = {job_id: entry for batch in self._batches.values() for job_id, entry in batch.jobs.items()}
        jobs = {job_id: entry for job_id, entry in jobs.items() if job_id in step.done}
        previews = {job_id: preview for job_id, entry in jobs.items() if (preview := entry.preview(step))}
        with self._outages.tolerated(pause_s=0):  # a preview is expendable
            self.leases.store_previews(previews)
            for job_id in previews:
                jobs[job_id].has_preview = True
        for entry in jobs.values():
            entry.update(step)

    def _tick(self, engine: EngineProcess) -> None:
        """Renew the leases; drop jobs that were canceled, ran out of time or were taken away."""
        entries = [entry for batch in self._batches.values() for entry in batch.jobs.values()]
        progress = {entry.claim.id: entry.progress for entry in entries}
        lease_states = dict(zip(progress, self.leases.renew([entry.claim for entry in entries], progress), strict=True))
        for entry in entries:
            entry.progress = ""
        for batch in self._batches.values():
            self._drop(engine, batch, lease_states)
        self._count_running()
        self._beat()  # last: the leases may have lapsed during an outage, and other workers take such jobs

    def _drop(self, engine: EngineProcess, batch: RunningBatch, lease_states: Mapping[str, LeaseState]) -> None:
        """Have the engine drop those jobs of a batch that need no result any more, and end them."""
        endings: list[tuple[Claim, JobEnding]] = []
        dropped: set[str] = set()
        for job_id, entry in batch.jobs.items():
            timing = Timing(queue_s=entry.claim.waited_s, compute_s=batch.computed_s)
            if lease_states[job_id] == "lost":
                log.warning("job was taken away", extra=entry.log_fields)
                self.metrics.fenced.inc()
                dropped.add(job_id)
            elif lease_states[job_id] == "canceled":
                endings.append((entry.claim, JobEnding(JobStatus.CANCELED, CANCELED, timing=timing)))
            elif batch.computed_s > entry.job.timeout_s:
                endings.append((entry.claim, JobEnding(JobStatus.FAILED, entry.timeout_error, timing=timing)))
        dropped |= {claim.id for claim, _ in endings}
        if dropped:
            engine.send(Drop(batch.number, frozenset(dropped)))
            self._finisher.end(endings, batch.jobs)
            for job_id in dropped:
                del batch.jobs[job_id]

    def _conclude(self, done: BatchResult) -> None:
        """End the jobs that the engine has computed; it continues with the other batch, if it has one."""
        batch = self._batches.pop(done.number)
        self._paces.setdefault(batch.lane, Pace()).add(batch.size, batch.computed_s)
        self._finisher.conclude(batch.jobs, done, self._supervisor.catalogue)
        for other in self._batches.values():
            other.resume()
        self._count_running()

    def _engine_lost(self, reason: str, cause: str = "") -> None:
        """Replace the engine, and have each of its jobs computed alone, so that a bad one fails alone.

        A job fails if the engine ended while computing it alone, and this was not its first attempt.
        """
        claims = self._claims()
        if len(claims) == 1 and claims[0].attempts >= 2:
            detail = f"the engine {reason} while computing the job alone{f' ({cause})' if cause else ''}"
            error = JobError(reason="engine", detail=detail)
            [batch] = [batch for batch in self._batches.values() if batch.jobs]
            self._finisher.end([(claims[0], JobEnding(JobStatus.FAILED, error))], batch.jobs)
        elif claims:
            self.metrics.retries.labels("engine").inc(self._finisher.requeue(claims, alone=True))
        self._supervisor.replace(reason, cause)
