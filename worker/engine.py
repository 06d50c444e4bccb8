"""The engine: a process that owns the models and computes batches.

Uses the library and a pipe; must not import RQ or Redis. It exits when its pipe closes, so it outlives its worker by at
most one row of pixels.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError, ModelError
from ncml.progress import OnProgress, Progress
from ncml.runtime import device_error, is_out_of_memory, reuse_freed_memory
from ncml.signals import stop_signals
from worker import logs, unfinished
from worker.contract import CalibrateJob, CompleteJob, Job, Pixels, SamplingJob, ScanJob, ScoreJob, UpdateJob
from worker.inbox import Inbox, PipeClosed
from worker.job_results import JobError, ModelRef, WorkerFault
from worker.messages import (
    Batch,
    BatchResult,
    Catalogue,
    EngineSettings,
    Interruption,
    Opening,
    Outcome,
    Previews,
    Step,
)
from worker.registry import ModelNotServed, ModelRegistry, ModelUnknown
from worker.scoring import name_in_job, read_original, scoring_options, wire_scan, wire_score

if TYPE_CHECKING:
    from ncml.model import Model

RESCAN_S = 2.0
"""How often an engine checks whether a model folder has changed."""

PROGRESS_S = 0.1
PREVIEW_S = 0.2
"""Minimum seconds between two reports, and between two reports with previews."""

LONG_BATCH = 16
"""Maximum images or tiles at a time of a long job on a CPU: short jobs interrupt it only between these batches."""

CAPACITY_S = 600.0
"""How long a batch that did not fit in memory limits the next ones."""

JobType = TypeVar("JobType")

log = logging.getLogger("ncml.engine")


@dataclass(frozen=True)
class _BatchImage:
    """One image of a batch: image `index` of a job."""

    id: str
    index: int
    job: Job


class _BatchDropped(Exception):
    """No job of the batch is needed any more."""


def serve(pipe: Connection, settings: EngineSettings) -> None:
    """Run the engine process: load the models, then compute batches until the pipe ends."""
    for signum in stop_signals():  # these are for the worker, which lets the batch finish
        signal.signal(signum, signal.SIG_IGN)
    logs.configure()
    reuse_freed_memory()
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # torch reads it when the first load imports it
    registry = ModelRegistry(
        settings.directories,
        settings.load,
        device=settings.device,
        keep=settings.keep_models,
        generates=settings.generates,
        quarantined=settings.quarantined,
        on_open=lambda folder, stamp: pipe.send(Opening(folder, stamp)),
        on_change=lambda: pipe.send(_catalogue(registry, settings.device)),
    )
    runner = BatchRunner(pipe, registry, settings)
    inbox = runner.inbox
    try:
        registry.scan(is_interrupted=inbox.has_batch)
        scanned, checked = time.monotonic(), -math.inf
        while True:
            if settings.calibrates and time.monotonic() - checked > unfinished.CHECK_S:
                checked = time.monotonic()
                for directory in settings.directories:
                    with contextlib.suppress(OSError):  # the scan reports one that cannot be read
                        unfinished.remove_left(directory)
            has_batch = inbox.has_batch(0 if registry.is_behind else RESCAN_S)
            if (registry.is_behind and not has_batch) or time.monotonic() - scanned > RESCAN_S:
                scanned = time.monotonic()
                registry.scan(is_interrupted=inbox.has_batch)
            if batch := inbox.take_batch():
                pipe.send(runner.run(batch))
            else:
                registry.check_batching()
    except (BrokenPipeError, ConnectionResetError, PipeClosed):
        return


class BatchRunner:
    """Computes batches and reports their progress through the pipe; short ones in the middle of a long job."""

    def __init__(self, pipe: Connection, registry: ModelRegistry, settings: EngineSettings) -> None:
        self.inbox = Inbox(pipe)
        self._pipe = pipe
        self._registry = registry
        self._settings = settings
        self._long_batch = LONG_BATCH if settings.device == "cpu" else settings.max_batch
        self._capacities: dict[str, tuple[int, float]] = {}
        """By model version: the images or tiles at a time that memory suffices for, and until when that is assumed."""

    def run(self, batch: Batch) -> BatchResult:
        """Compute a batch. If several jobs fail together, compute each alone, so that only the faulty one fails."""
        self._dropped = self.inbox.dropped_from(batch)
        self._reset(batch)
        error = self._attempt(batch.jobs)
        if error and (len(batch.jobs) == 1 or isinstance(error, ModelError)):
            self._fail(batch.jobs, error)
        elif error:
            log.warning("a batch of %d jobs failed (%s); computing each alone", len(batch.jobs), error)
            del error  # its traceback holds the activations of the batch
            self._reset(batch)
            for job_id, job in batch.jobs.items():
                if error := self._attempt({job_id: job}):
                    self._fail({job_id: job}, error)
        for job_id in self._dropped & batch.jobs.keys():
            self._outcomes[job_id] = Outcome()
        self.inbox.close(batch)
        seconds, memory_bytes = time.monotonic() - self._started_at, _device_memory(self._settings.device)
        return BatchResult(batch.number, self._outcomes, seconds, dict(self._stages), memory_bytes)

    def _reset(self, batch: Batch) -> None:
        self._outcomes = {job_id: Outcome() for job_id in batch.jobs}
        self._done = dict.fromkeys(batch.jobs, 0)
        self._stages: dict[str, float] = {}
        self._started_at = self._stage_started_at = time.monotonic()
        self._reported_at = self._previewed_at = time.monotonic()

    def _attempt(self, jobs: Mapping[str, Job]) -> Exception | None:
        """Compute jobs together; return the error that ended the computation, if any."""
        try:
            self._compute(jobs)
        except PipeClosed:
            raise
        except _BatchDropped:
            return None
        except Exception as error:
            self._check_device(error)
            return error
        return None

    def _check_device(self, error: Exception) -> None:
        """After an unexpected error on a GPU, end this process if it can no longer use it, as after most CUDA errors.

        The worker starts another engine, and the jobs are computed again.
        """
        is_expected = isinstance(error, InputError | ModelError | WorkerFault) or is_out_of_memory(error)
        if is_expected or not self._settings.device.startswith("cuda"):
            return
        fault = device_error(self._settings.device)
        if fault and not is_out_of_memory(fault):
            log.error("the engine ends: %s cannot be used any more", self._settings.device, exc_info=error)
            raise SystemExit(1)

    def _fail(self, jobs: Mapping[str, Job], error: Exception) -> None:
        match error:
            case InputError():
                reason = JobError(reason="input", field=error.field, detail=error.detail)
            case ModelUnknown():
                reason = JobError(reason="input", field="model", detail=str(error))
            case ModelError():
                reason = JobError(reason="model", field="model", detail=str(error))
            case WorkerFault():
                reason = JobError(reason="worker", detail=str(error))
            case _ if is_out_of_memory(error):
                reason = JobError(reason="engine", detail="one image does not fit in the memory of this device")
            case _:
                ids = {"job": ", ".join(jobs), "request": ", ".join(job.request_id for job in jobs.values())}
                log.error("the computation failed", exc_info=error, extra=ids)
                detail = f"the computation failed ({type(error).__name__}); the worker's log has the details"
                reason = JobError(reason="engine", detail=detail)
        for job_id in jobs:
            self._outcomes[job_id] = Outcome(error=reason, is_unserved=isinstance(error, ModelNotServed))

    def _compute(self, jobs: Mapping[str, Job]) -> None:
        """Compute jobs in chunks, halved whenever memory does not suffice."""
        first = next(iter(jobs.values()))
        model = self._registry.get(first.model, first.version)
        for job_id in jobs:
            self._outcomes[job_id].model = ModelRef(name=first.model, version=model.version)
        rows = [_BatchImage(job_id, index, job) for job_id, job in jobs.items() for index in range(job.n)]
        while rows:
            capacity, end = self._capacities.get(model.version, (self._settings.max_batch, math.inf))
            if time.monotonic() > end:  # others may have used the memory
                del self._capacities[model.version]
                continue
            chunk = [row for row in rows if row.id not in self._dropped][:capacity]
            if not chunk:
                return
            size = min(capacity, self._long_batch) if isinstance(first, ScanJob | CalibrateJob) else len(chunk)
            try:
                self._compute_chunk(model, chunk, size, jobs.keys())
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                self._capacities[model.version] = size // 2, time.monotonic() + CAPACITY_S
                log.warning("%d images do not fit in memory; continuing with %d at a time", size, size // 2)
                _free_device_memory(self._settings.device)
                continue
            for row in chunk:
                self._done[row.id] += 1
            rows = rows[rows.index(chunk[-1]) + 1 :]

    def _compute_chunk(self, model: Model, rows: list[_BatchImage], size: int, job_ids: Collection[str]) -> None:
        """Append the results of rows, whose jobs share a batch key, to the outcomes; `size` images or tiles at once."""
        self._stage_started_at = time.monotonic()
        match rows[0].job:
            case ScoreJob() as job:
                self._score(model, job, rows, size, job_ids)
            case ScanJob() as job:
                self._scan(model, job, rows[0].id, size)
            case CalibrateJob() | UpdateJob() as job:
                self._calibrate(model, job, rows[0].id, size)
            case job:
                self._sample(model, job, rows)
        for row in rows:
            outcome = self._outcomes[row.id]
            outcome.batch_size = max(outcome.batch_size, len(rows))

    def _score(self, model: Model, job: ScoreJob, rows: list[_BatchImage], size: int, job_ids: Collection[str]) -> None:
        jobs = _jobs(rows, ScoreJob)
        originals = [read_original(job.originals[row.index]) for row in rows] if job.originals else []
        try:
            scores = model.score(
                originals or np.stack([_array(job.images[row.index]) for job, row in zip(jobs, rows, strict=True)]),
                classes=_class_names(jobs),
                statistics=job.statistics,
                **scoring_options(model, job),
                batch_size=size,
                callback=self._stop_when_dropped(job_ids),
            )
        except InputError as error:
            raise name_in_job(error, rows[0].index, job.n) from error
        self._add_time("score")
        for position, (row, score) in enumerate(zip(rows, scores, strict=True)):
            if not math.isfinite(score.bpd):
                self._fail({row.id: row.job}, ModelError("the model's bits/dim are not finite; train it again"))
                continue
            original_HWC = originals[position] if originals and job.map else None
            self._outcomes[row.id].scores.append(wire_score(score, original_HWC))

    def _scan(self, model: Model, job: ScanJob, job_id: str, size: int) -> None:
        on_progress = self._yield_to_short_jobs(job_id)
        scan = model.scan(read_original(job), tile_size=job.tile_size, batch_size=size, callback=on_progress)
        self._add_time("tiles")
        self._outcomes[job_id].scan = wire_scan(scan, with_tiles=job.map)

    def _calibrate(self, model: Model, job: CalibrateJob | UpdateJob, job_id: str, size: int) -> None:
        """Write a new model folder and publish it."""
        from worker.calibrating import make_folder

        if not self._settings.calibrates:
            raise WorkerFault("calibration is off: the operator must start the workers with NCML_ALLOW_CALIBRATION=1")
        on_progress = self._yield_to_short_jobs(job_id)
        calibrated = make_folder(
            model,
            job,
            job_id,
            self._settings.directories,
            on_progress,
            batch_size=size,
            max_models=self._settings.max_calibrated,
            seconds_left=lambda: self._started_at + job.timeout_s - time.monotonic(),
        )
        self._add_time(job.task)
        self._registry.scan({job.name})
        outcome = self._outcomes[job_id]
        outcome.model, outcome.calibration = ModelRef(name=job.name, version=model.version), calibrated

    def _sample(self, model: Model, job: SamplingJob, rows: list[_BatchImage]) -> None:
        jobs = _jobs(rows, SamplingJob)
        dropped: set[int] = set()
        options: dict[str, Any] = {
            "classes": _class_names(jobs),
            "seeds": [job.seeds[row.index] for job, row in zip(jobs, rows, strict=True)],
            "callback": self._drop_rows(rows, dropped),
            "dropped": dropped,
            **job.sampling,
        }
        if isinstance(job, CompleteJob):
            canvases = np.stack([_array(job.image) for job in _jobs(rows, CompleteJob)])
            images = model.complete(canvases, keep=job.keep, **options)
        else:
            images = model.generate(len(rows), **options)
        for row, image in zip(rows, images, strict=True):
            self._outcomes[row.id].size = (image.shape[0], image.shape[1])
            self._outcomes[row.id].images.append(np.ascontiguousarray(image).tobytes())

    def _stop_when_dropped(self, job_ids: Collection[str]) -> OnProgress:
        """Return a callback that reports progress and raises `_BatchDropped` once all jobs are dropped."""

        def on_progress(progress: Progress) -> None:
            self._report(progress)
            if self._dropped.issuperset(job_ids):
                raise _BatchDropped

        return on_progress

    def _yield_to_short_jobs(self, job_id: str) -> OnProgress:
        """Return the callback of a long job, as `_stop_when_dropped`; it also computes batches that have arrived."""
        stop_when_dropped = self._stop_when_dropped([job_id])

        def on_progress(progress: Progress) -> None:
            stop_when_dropped(progress)
            while batch := self.inbox.take_batch():
                self._interrupt(batch)

        return on_progress

    def _interrupt(self, batch: Batch) -> None:
        """Compute a batch in the middle of another one, whose times exclude it."""
        started = time.monotonic()
        self._pipe.send(Interruption(batch.number))
        self._pipe.send(copy.copy(self).run(batch))  # a copy, since what is known about the batch belongs to the runner
        paused_s = time.monotonic() - started
        self._started_at += paused_s
        self._stage_started_at += paused_s

    def _drop_rows(self, rows: list[_BatchImage], dropped: set[int]) -> OnProgress:
        """Return a callback that reports progress and adds the rows whose jobs are dropped to a set."""

        def on_progress(progress: Progress) -> None:
            self._report(progress, lambda: _by_job(rows, progress.preview()))
            dropped.update(i for i, row in enumerate(rows) if row.id in self._dropped)

        return on_progress

    def _report(self, progress: Progress, previews_of: Callable[[], Previews] | None = None) -> None:
        """Account for the time, read what was dropped, and send progress at limited rates."""
        self._add_time(progress.stage)
        self.inbox.read()
        now = time.monotonic()
        # The finished noisy sample can be shown only now, so it is sent however recent the last report is.
        finished = previews_of is not None and progress.done == progress.total
        if finished or now - self._reported_at >= PROGRESS_S:
            self._reported_at = now
            previews: Previews = {}
            if previews_of and (finished or now - self._previewed_at >= PREVIEW_S):
                self._previewed_at = now
                previews = previews_of()
            self._pipe.send(Step(progress.stage, progress.done, progress.total, dict(self._done), previews))

    def _add_time(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.monotonic()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._stage_started_at
        self._stage_started_at = now


def _jobs(rows: Sequence[_BatchImage], job_type: type[JobType]) -> list[JobType]:
    """Return the job of each row; all are of one type."""
    return [row.job for row in rows if isinstance(row.job, job_type)]


def _class_names(jobs: Sequence[ScoreJob | SamplingJob]) -> list[str | None] | None:
    names = [job.class_name for job in jobs]
    return names if any(name is not None for name in names) else None


def _array(pixels: Pixels) -> NDArray[np.uint8]:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)


def _by_job(rows: Sequence[_BatchImage], images: NDArray[np.uint8]) -> Previews:
    previews: Previews = {}
    for job_id in dict.fromkeys(row.id for row in rows):
        preview = images[[i for i, row in enumerate(rows) if row.id == job_id]]
        n, height, width, _ = preview.shape
        previews[job_id] = (n, height, width, np.ascontiguousarray(preview).tobytes())
    return previews


def _catalogue(registry: ModelRegistry, device: str) -> Catalogue:
    memory_bytes = _device_memory(device)
    return Catalogue(registry.descriptors, registry.faults, memory_bytes, registry.pictures, registry.is_behind)


def _device_memory(device: str) -> int:
    """Return the bytes that this process holds on a CUDA device; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.memory_reserved(device))


def _free_device_memory(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
