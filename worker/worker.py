"""The control process: claims batches, has the engine compute them, keeps their leases, ends each job once.

An RQ worker by its registration, heartbeat and suspension, so that RQ's tools see it; the work itself differs from
RQ's in that it is done in batches by a process that lives on. Knows no torch: the engine alone does.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import redis.exceptions
from rq import Queue
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.worker import SimpleWorker
from rq.worker_registration import clean_worker_registry

from worker.contract import (
    Event,
    Job,
    JobError,
    JobStatus,
    Lane,
    ModelRef,
    PictureResult,
    Pictures,
    Preview,
    Progress,
    Result,
    ScanJob,
    ScanResult,
    ScoreJob,
    ScoreResult,
    Timing,
    WorkerInfo,
    WorkerState,
)
from worker.leases import LEASE_S, Claim, Ending, Leases
from worker.messages import Batch, Catalogue, Done, Drop, EngineSettings, Outcome, Step
from worker.metrics import WorkerMetrics
from worker.process import EngineDied, EngineProcess
from worker.queue import CANCELED, EXPIRED, WORKERS, JobQueue, Worker, blob_key, in_order, parse, worker_key

BEAT_S = 2.0
"""How often a worker says that it lives, and looks for jobs of others that do not."""

ALIVE_S = 10.0
"""How long its word is good for."""

TICK_S = 0.1
"""How often leases are renewed, progress is published and cancellations are looked for while a batch runs."""

COMPLAIN_S = 10.0
"""How often the log says that the queue is away, while it is."""

log = logging.getLogger("ncml.worker")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a worker behaves. Times in seconds."""

    lanes: tuple[Lane, ...]
    engine: EngineSettings
    window_s: float = 0.01
    """How long a batch less than half full waits for company (a third of it once none comes), if the engine was busy.

    A fuller one is worth starting: whoever comes meanwhile is the next one.
    """
    drain_s: float = 25.0
    """How long a running batch may go on after SIGTERM; then its jobs go back to their queues."""
    hang_s: float = 300.0
    """How long the engine may be silent during a batch, or while loading, before it is killed."""
    lease_s: float = LEASE_S


@dataclass
class _Pace:
    """Jobs a second of a lane while it is worked on: of the latest batches, each counting 0.8 of the one after it."""

    jobs: float = 0.0
    seconds: float = 0.0

    def note(self, jobs: int, seconds: float) -> None:
        """Count a batch."""
        self.jobs, self.seconds = 0.8 * self.jobs + jobs, 0.8 * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Jobs a second."""
        return self.jobs / self.seconds


@dataclass
class _Running:
    """A job in the engine, and what its followers have yet to be told."""

    claim: Claim
    job: Job
    progress: str = ""
    preview: bool = False  # whether there was one: not every report brings another


class GpuWorker(SimpleWorker):
    """Claims compatible jobs of its lanes in batches and sees each to its one end."""

    def __init__(self, queue: JobQueue, settings: WorkerSettings, metrics: WorkerMetrics | None = None) -> None:
        queues = [Queue(name, connection=queue.redis, serializer=JSONSerializer) for name in in_order(settings.lanes)]
        rq: Any = super()
        rq.__init__(queues, connection=queue.redis, serializer=JSONSerializer, worker_ttl=30, prepare_for_work=False)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self.settings = settings
        self.metrics = metrics or WorkerMetrics()
        self.leases = Leases(queue, settings.lanes, self.name, lease_s=settings.lease_s)
        self._queue = queue
        self._client: Any = queue.redis
        self._catalogue = Catalogue((), {})
        self._engine: EngineProcess | None = None
        self._engine_started = self._engine_due = 0.0
        self._engine_pause_s = 0.5
        self._stop_at: float | None = None
        self._since = time.time()
        self._phase = WorkerState.LOADING
        self._beat_at = self._complain_at = 0.0
        self._number = 0
        self._idle = True
        self._paces: dict[Lane, _Pace] = {}

    # -- the life of the worker

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Serve until SIGTERM or SIGINT; True when it ended in good order."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        try:
            while not self._registered():
                if self._stop_at is not None:
                    return True
            while self._stop_at is None:
                with self._outages():
                    self._beat()
                    engine = self._ready_engine()
                    if engine is None or is_suspended(self._client):
                        time.sleep(0.2)
                        continue
                    claims = self._gather()
                    if claims:
                        self._run(engine, claims)
            return True
        finally:
            if self._engine is not None:
                self._engine.stop()
            with self._outages():
                self._client.delete(worker_key(self.name))
                self._client.zrem(WORKERS, self.name)
                self.register_death()
            log.info("worker ended", extra={"worker": self.name})

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.settings.drain_s

    def _registered(self) -> bool:
        with self._outages():
            self.register_birth()
            for queue in self.queues:  # those of workers that were killed
                clean_worker_registry(queue)
            log.info("worker started", extra={"worker": self.name, "lanes": list(self.settings.lanes)})
            return True
        return False

    @contextmanager
    def _outages(self) -> Generator[None]:
        """Outlive a server that is away: say so now and then, and go on after a while."""
        try:
            yield
        except redis.exceptions.RedisError as error:
            if time.monotonic() >= self._complain_at:
                self._complain_at = time.monotonic() + COMPLAIN_S
                log.warning("the queue does not answer: %s", error)
            time.sleep(0.2)

    def _beat(self, *, force: bool = False) -> None:
        """Say that this worker lives and what it serves; take over jobs of workers that do not."""
        now = time.monotonic()
        if not force and now < self._beat_at:
            return
        self._beat_at = now + BEAT_S
        models = self._catalogue.models
        info = WorkerInfo(
            name=self.name,
            lanes=self.settings.lanes,
            state=WorkerState.DRAINING if self._stop_at is not None else self._phase,
            device=self.settings.engine.device,
            max_batch=self.settings.engine.max_batch,
            models=tuple(ModelRef(name=m.name, version=m.version) for m in models),
            started_at=self._since,
            seen_at=time.time(),
            pace={lane: pace.rate for lane, pace in self._paces.items()},
        )
        pipe = self._client.pipeline()
        pipe.set(worker_key(self.name), Worker(info=info, models=models).model_dump_json(), px=int(ALIVE_S * 1000))
        pipe.zadd(WORKERS, {self.name: time.time()})
        pipe.zremrangebyscore(WORKERS, "-inf", time.time() - 3600)
        self.heartbeat(pipeline=pipe)
        self.set_state("busy" if self._phase is WorkerState.BUSY else "idle", pipeline=pipe)
        pipe.execute()
        for state in WorkerState:
            self.metrics.state.labels(state).set(state is info.state)
        moved = self.leases.recover()
        if moved:
            self.metrics.retries.labels("worker").inc(moved)

    # -- the engine

    def _ready_engine(self) -> EngineProcess | None:
        """The engine once it has loaded, started anew when it died; None while it is not ready."""
        if self._engine is None:
            if time.monotonic() < self._engine_due:
                return None
            self._engine = EngineProcess(self.settings.engine)
            self._engine_started = time.monotonic()
        try:
            while message := self._engine.receive(0.2 if self._phase is WorkerState.LOADING else 0.0):
                if isinstance(message, Catalogue):
                    self._publish(message)
        except EngineDied:
            self._replace_engine("died")
            return None
        if self._phase is WorkerState.LOADING:
            if time.monotonic() - self._engine_started > self.settings.hang_s:
                self._replace_engine("hung")
            return None
        return self._engine

    def _publish(self, catalogue: Catalogue) -> None:
        for name, fault in catalogue.faults.items():
            log.error("model cannot be used: %s", fault, extra={"model": name})
        for model in catalogue.models:
            batching = model.batching.model_dump() if model.batching else None
            log.info("model served", extra={"model": model.name, "version": model.version, "batching": batching})
        self.metrics.model_info.clear()
        self.metrics.model_batching.clear()
        for model in catalogue.models:
            self.metrics.model_info.labels(model.name, model.version).set(1)
            if (how := model.batching) is not None:
                self.metrics.model_batching.labels(model.name, model.version, how.groups, how.check).set(1)
        self.metrics.gpu_memory.set(catalogue.memory_bytes)
        self._catalogue = catalogue
        self._phase = WorkerState.IDLE
        self._engine_pause_s = 0.5
        self._beat(force=True)

    def _replace_engine(self, reason: str) -> None:
        assert self._engine is not None
        log.error("the engine %s; starting another", reason, extra={"engine_pid": self._engine.pid})
        self.metrics.engine_restarts.labels(reason).inc()
        self._engine.stop()
        self._engine = None
        if self._phase is WorkerState.LOADING:  # it never was ready: do not spin
            self._engine_due = time.monotonic() + self._engine_pause_s
            self._engine_pause_s = min(2 * self._engine_pause_s, 30.0)
        self._phase = WorkerState.LOADING

    # -- one batch

    def _gather(self) -> list[Claim]:
        """The next batch: at once when the engine was idle, else after a short wait for company."""
        max_batch = self.settings.engine.max_batch
        key, claims = self.leases.claim(max_batch)
        if not claims:
            self._idle = True
            self.leases.wait(1.0)
            key, claims = self.leases.claim(max_batch)
        if not self._idle and key:
            self._top_up(key, claims)
        if claims:
            self._idle = False
        return claims

    def _top_up(self, key: str, claims: list[Claim]) -> None:
        began = time.monotonic()
        room = self.settings.engine.max_batch - sum(claim.images for claim in claims)
        came = began
        while key and room > self.settings.engine.max_batch // 2 and self._stop_at is None:
            now = time.monotonic()
            if now - began > self.settings.window_s or now - came > self.settings.window_s / 3:
                break  # nobody comes any more, while the engine stands idle
            key, more = self.leases.claim(room, key)
            claims += more
            room -= sum(claim.images for claim in more)
            if more:
                came = time.monotonic()
            else:
                time.sleep(min(0.001, self.settings.window_s / 10))
        self.metrics.batch_wait_seconds.observe(time.monotonic() - began)

    def _run(self, engine: EngineProcess, claims: list[Claim]) -> None:
        """See a batch through: whatever happens, each of its jobs is ended or goes back to its queue."""
        running: dict[str, _Running] = {}
        endings: list[tuple[Claim, Ending]] = []
        for claim in claims:
            if claim.late:
                endings.append((claim, Ending(JobStatus.EXPIRED, EXPIRED)))
                continue
            try:
                running[claim.id] = _Running(claim, parse(claim.data))
            except ValueError as error:
                detail = "the payload is not a job that this worker understands"
                log.error("%s: %s", detail, error, extra={"job": claim.id})
                endings.append((claim, Ending(JobStatus.FAILED, JobError(reason="input", detail=detail))))
        self._end(endings, {})
        if not running:
            return
        self._phase = WorkerState.BUSY
        self.metrics.running.set(len(running))
        try:
            self._compute(engine, running)
        finally:
            self.metrics.running.set(0)
            if self._phase is WorkerState.BUSY:
                self._phase = WorkerState.IDLE

    def _compute(self, engine: EngineProcess, running: dict[str, _Running]) -> None:
        self._number += 1
        lane, jobs = next(iter(running.values())).job.task.lane, len(running)
        for entry in running.values():
            log.info("job started", extra=_names(entry) | {"batch": self._number, "attempt": entry.claim.attempts})
        engine.send(Batch(self._number, {job_id: entry.job for job_id, entry in running.items()}))
        began = heard = tick = time.monotonic()
        while True:
            try:
                message = engine.receive(TICK_S / 2)
            except EngineDied:
                self._casualties(running, "died")
                return
            now = time.monotonic()
            match message:
                case Done() if message.number == self._number:
                    self._conclude(running, message)
                    self._paces.setdefault(lane, _Pace()).note(jobs, time.monotonic() - began)
                    return
                case Step():
                    heard = now
                    self._note(running, message)
                case Catalogue():
                    with self._outages():
                        self._publish(message)
                    self._phase = WorkerState.BUSY
                case _:
                    pass
            if now - heard > self.settings.hang_s:
                self._casualties(running, "hung")
                return
            if self._stop_at is not None and now > self._stop_at:
                log.warning("out of time to finish %d jobs; giving them back", len(running))
                self._insist(lambda: self.leases.give_back([entry.claim for entry in running.values()], refund=True))
                return
            if now - tick >= TICK_S:
                tick = now
                with self._outages():
                    self._tick(engine, running, now - began)

    def _note(self, running: dict[str, _Running], step: Step) -> None:
        """Make an event of a report, for each job that it is about."""
        for job_id, entry in running.items():
            moment: dict[str, Any] = {
                "stage": step.stage,
                "step": step.step,
                "total": step.total,
                "done": step.done[job_id],
            }
            if job_id in step.previews:
                n, height, width, data = step.previews[job_id]
                with self._outages():
                    self.leases.preview(job_id, Preview(**moment, n=n, height=height, width=width, data=data))
                    entry.preview = True
            progress = Progress(**moment, n=entry.job.n, preview=entry.preview)
            event = Event(id="", kind="progress", progress=progress)
            entry.progress = event.model_dump_json(exclude={"id"}, exclude_none=True)

    def _tick(self, engine: EngineProcess, running: dict[str, _Running], elapsed_s: float) -> None:
        """Keep the leases; part with jobs that were canceled, ran out of time or were taken away."""
        self._beat()
        entries = list(running.values())
        standings = self.leases.renew(
            [entry.claim for entry in entries], {entry.claim.id: entry.progress for entry in entries}
        )
        endings: list[tuple[Claim, Ending]] = []
        gone: set[str] = set()
        for entry, standing in zip(entries, standings, strict=True):
            entry.progress = ""
            timing = Timing(queue_s=entry.claim.waited_s, compute_s=elapsed_s)
            if standing == "lost":
                log.warning("job was taken away", extra=_names(entry))
                self.metrics.fenced.inc()
                gone.add(entry.claim.id)
            elif standing == "canceled":
                endings.append((entry.claim, Ending(JobStatus.CANCELED, CANCELED, timing=timing)))
            elif elapsed_s > entry.job.timeout_s:
                detail = f"the job ran for more than {entry.job.timeout_s:g} s; ask for less in one request"
                error = JobError(reason="timeout", detail=detail)
                endings.append((entry.claim, Ending(JobStatus.FAILED, error, timing=timing)))
        gone |= {claim.id for claim, _ in endings}
        if gone:
            engine.send(Drop(self._number, frozenset(gone)))
            self._end(endings, running)
            for job_id in gone:
                del running[job_id]

    def _conclude(self, running: dict[str, _Running], done: Done) -> None:
        """End what the engine has computed."""
        self.metrics.gpu_memory.set(done.memory_bytes)
        for stage, seconds in done.stages.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
        endings: list[tuple[Claim, Ending]] = []
        for job_id, entry in running.items():
            outcome = done.outcomes[job_id]
            timing = Timing(
                queue_s=entry.claim.waited_s, compute_s=done.compute_s, batch_size=outcome.batch_size or None
            )
            if outcome.error or outcome.model is None:
                endings.append((entry.claim, Ending(JobStatus.FAILED, outcome.error, timing=timing)))
                continue
            result, blob = _result(entry, outcome, outcome.model, timing)
            endings.append((entry.claim, Ending(JobStatus.SUCCEEDED, None, result, blob, timing)))
            self.metrics.images.labels(entry.job.task, entry.job.model).inc(entry.job.n)
            if isinstance(entry.job, ScoreJob):
                self.metrics.count_scores(entry.job, outcome.scores)
        if endings:
            first = next(iter(running.values())).job
            largest = max((outcome.batch_size for outcome in done.outcomes.values()), default=0)
            self.metrics.batch_size.labels(first.task).observe(largest)
            self._end(endings, running)

    def _casualties(self, running: dict[str, _Running], reason: str) -> None:
        """The engine is gone: start another, and have each of its jobs computed alone, so that a bad one fails alone.

        A job that took its engine along when it was alone, and had not been started for the first time, fails.
        """
        alone = len(running) == 1
        over = [entry.claim for entry in running.values() if alone and entry.claim.attempts >= 2]
        again = [entry.claim for entry in running.values() if entry.claim not in over]
        detail = f"the engine {reason} twice while computing the job" if over else ""
        error = JobError(reason="engine", detail=detail)
        self._end([(claim, Ending(JobStatus.FAILED, error)) for claim in over], running)
        if again:
            moved = self._insist(lambda: self.leases.give_back(again, alone=True))
            self.metrics.retries.labels("engine").inc(sum(moved))
        self._replace_engine(reason)

    def _end(self, endings: Sequence[tuple[Claim, Ending]], running: dict[str, _Running]) -> None:
        """End jobs for good, count and log them. What was taken from us meanwhile is left alone."""
        if not endings:
            return
        ended = self._insist(lambda: self.leases.finish(endings))
        for (claim, end), done in zip(endings, ended, strict=False):
            entry = running.get(claim.id)
            task, model = (entry.job.task, entry.job.model) if entry else ("unknown", "unknown")
            extra: dict[str, Any] = (_names(entry) if entry else {"job": claim.id}) | {"status": end.status}
            if not done:
                self.metrics.fenced.inc()
                log.warning("job had been taken away; its result is dropped", extra=extra)
                continue
            if end.error:
                extra |= {"reason": end.error.reason, "detail": end.error.detail}
            self.metrics.finished.labels(task, model, end.status).inc()
            self.metrics.queue_seconds.labels(task).observe(claim.waited_s)
            if end.timing and end.timing.compute_s is not None:
                self.metrics.duration_seconds.labels(task).observe(end.timing.compute_s)
                extra |= {"compute_s": round(end.timing.compute_s, 4), "batch_size": end.timing.batch_size}
            log.info("job ended", extra=extra)

    def _insist(self, step: Callable[[], list[bool]]) -> list[bool]:
        """Do a step once the server answers. Past the lease there is no point: the jobs are anyone's by then."""
        deadline = time.monotonic() + 2 * self.settings.lease_s
        while True:
            with self._outages():
                return step()
            if time.monotonic() > min(deadline, (self._stop_at or deadline) + 1.0):
                return []


def _result(entry: _Running, outcome: Outcome, model: ModelRef, timing: Timing) -> tuple[Result, bytes]:
    job = entry.job
    if isinstance(job, ScoreJob):
        size = job.images[0]
        scores = tuple(outcome.scores)
        return ScoreResult(model=model, height=size.height, width=size.width, results=scores, timing=timing), b""
    if isinstance(job, ScanJob):
        assert outcome.scan is not None
        return ScanResult(model=model, scan=outcome.scan, timing=timing), b""
    height, width = outcome.size
    pictures = Pictures(blob=blob_key(entry.claim.id), n=job.n, height=height, width=width)
    result = PictureResult(task=job.task, model=model, pictures=pictures, seeds=job.seeds, timing=timing)
    return result, b"".join(outcome.images)


def _names(entry: _Running) -> dict[str, str]:
    return {"job": entry.claim.id, "request": entry.job.request_id, "model": entry.job.model}
