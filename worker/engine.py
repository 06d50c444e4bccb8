"""The engine: a child process that owns the models and does nothing but batches.

Knows the library and a pipe; no RQ, no Redis, no clock of any job. A batch comes in, progress and outcomes go out.
It ends when the pipe does, so it never outlives its worker by more than a row.
"""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError, ModelError
from ncml.images import open_image
from ncml.memory import reuse_freed_memory
from worker import logs
from worker.contract import (
    Box,
    CompleteJob,
    GenerateJob,
    Job,
    JobError,
    ModelDescriptor,
    ModelRef,
    Ood,
    Pixels,
    Scan,
    ScanJob,
    Score,
    ScoreJob,
)
from worker.models import Load, ModelLike, ScanLike, ScoreLike, Shelf

RESCAN_S = 2.0
"""How often an idle engine looks whether a model folder has changed."""

PROGRESS_S = 0.1
PREVIEW_S = 0.2
"""The least time between two reports, and between two that carry a preview."""

log = logging.getLogger("ncml.engine")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to set up an engine. `load` must be importable by name in a new process."""

    directories: tuple[Path, ...]
    load: Load
    device: str = "cpu"
    threads: int = 0
    max_batch: int = 32
    keep_models: int = 2
    generates: bool = False
    """Whether it samples images, and so checks each model's batching when it loads it."""


# -- what goes through the pipe


@dataclass(frozen=True)
class Batch:
    """Jobs that share a batch key, by id."""

    number: int
    jobs: dict[str, Job]


@dataclass(frozen=True)
class Drop:
    """Jobs of a batch that nobody waits for any more."""

    number: int
    ids: frozenset[str]


@dataclass(frozen=True)
class Catalogue:
    """The models that are served, and why others are not. The first one says that the engine is ready."""

    models: tuple[ModelDescriptor, ...]
    faults: dict[str, str]
    memory_bytes: int = 0


Previews = dict[str, tuple[int, int, int, bytes]]
"""The pictures of some jobs as they look now: how many, height, width, and uint8 NHWC bytes."""


@dataclass(frozen=True)
class Step:
    """How far a batch is; `previews` shows some of its jobs, `done` counts finished images of each."""

    stage: str
    step: int
    total: int
    done: dict[str, int]
    previews: Previews = field(default_factory=dict[str, tuple[int, int, int, bytes]])


@dataclass
class Outcome:
    """What became of one job: scores, a scan, pictures (uint8 NHWC bytes), or an error; nothing when it was dropped."""

    model: ModelRef | None = None
    scores: list[Score] = field(default_factory=list[Score])
    scan: Scan | None = None
    pictures: list[bytes] = field(default_factory=list[bytes])
    size: tuple[int, int] = (0, 0)
    error: JobError | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Done:
    """The end of a batch. `stages` holds seconds spent in each stage."""

    number: int
    outcomes: dict[str, Outcome]
    compute_s: float
    stages: dict[str, float]
    memory_bytes: int = 0


Message = Catalogue | Step | Done


# -- the worker's side


class EngineDied(Exception):
    """The engine process is gone."""


class Engine:
    """The worker's handle on its engine. No method blocks on the child: threads of its own feed and drain the pipe."""

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, settings), name="ncml-engine", daemon=True)
        self._process.start()
        theirs.close()
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Batch | Drop | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._drain, self._feed)]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid or 0

    def send(self, message: Batch | Drop) -> None:
        """Hand the child a batch, or tell it what to leave out of the running one."""
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after `timeout_s`. Raises `EngineDied`."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)
            raise EngineDied
        return message

    def stop(self) -> None:
        """End the child, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._pipe.close()
        self._process.close()

    def _drain(self) -> None:
        try:
            while True:
                self._inbox.put(self._pipe.recv())
        except (EOFError, OSError):
            self._inbox.put(None)

    def _feed(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)
        except OSError:
            pass  # the other thread sees the same end of the pipe, and says so


# -- the child's side


class Progress(Protocol):
    """What the library's samplers report."""

    stage: str
    step: int
    total: int

    def preview(self) -> NDArray[Any]:
        """The pictures as they look now, uint8 (B, H, W, 3)."""
        ...


@dataclass(frozen=True)
class _Row:
    """One image of a batch: image `index` of job `id`."""

    id: str
    index: int


class _Abandoned(Exception):
    """The worker is gone."""


class _Unwanted(Exception):
    """Nobody waits for any job of the batch."""


def main(pipe: Connection, settings: EngineSettings) -> None:
    """The child process: load, then serve batches until the pipe ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # those are for the worker, which lets the batch finish
        signal.signal(signum, signal.SIG_IGN)
    logs.configure()
    reuse_freed_memory()
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # read when torch is imported, by the first load
    shelf = Shelf(
        settings.directories,
        settings.load,
        device=settings.device,
        keep=settings.keep_models,
        generates=settings.generates,
    )
    runner = _Runner(pipe, shelf, settings)
    try:
        shelf.scan()
        pipe.send(Catalogue(shelf.descriptors, shelf.faults, _memory(settings.device)))
        scanned = time.monotonic()
        while True:
            message = cast(Batch | Drop, pipe.recv()) if pipe.poll(RESCAN_S) else None
            if time.monotonic() - scanned > RESCAN_S:
                scanned = time.monotonic()
                if shelf.scan():
                    pipe.send(Catalogue(shelf.descriptors, shelf.faults, _memory(settings.device)))
            if isinstance(message, Batch):
                pipe.send(runner.run(message))
    except (EOFError, BrokenPipeError, ConnectionResetError, _Abandoned):
        return


class _Runner:
    """Computes batches."""

    def __init__(self, pipe: Connection, shelf: Shelf, settings: EngineSettings) -> None:
        self._pipe = pipe
        self._shelf = shelf
        self._device = settings.device
        self._max_batch = settings.max_batch
        self._fits: dict[str, int] = {}  # images or tiles at a time that a model was seen to have memory for

    def run(self, batch: Batch) -> Done:
        """Compute a batch. A failure that could be any one member's is pinned down by computing each alone."""
        self._dropped = set[str]()
        self._begin(batch)
        try:
            self._compute(batch.jobs)
        except _Abandoned:
            raise
        except _Unwanted:
            pass
        except Exception as error:
            if len(batch.jobs) == 1 or isinstance(error, ModelError):
                self._fail(batch.jobs, error)
            else:
                log.warning("a batch of %d jobs failed (%s); computing each alone", len(batch.jobs), error)
                self._begin(batch)
                for job_id, job in batch.jobs.items():
                    try:
                        self._compute({job_id: job})
                    except _Abandoned:
                        raise
                    except _Unwanted:
                        pass
                    except Exception as own:
                        self._fail({job_id: job}, own)
        for job_id in self._dropped & batch.jobs.keys():
            self._outcomes[job_id] = Outcome()
        seconds = time.monotonic() - self._began
        return Done(batch.number, self._outcomes, seconds, dict(self._stages), _memory(self._device))

    def _begin(self, batch: Batch) -> None:
        self._number = batch.number
        self._outcomes = {job_id: Outcome() for job_id in batch.jobs}
        self._done = dict.fromkeys(batch.jobs, 0)
        self._stages: dict[str, float] = {}
        self._began = self._marked = time.monotonic()
        self._reported = self._previewed = time.monotonic()

    def _fail(self, jobs: dict[str, Job], error: Exception) -> None:
        match error:
            case InputError():
                reason = JobError(reason="input", field=error.field, detail=error.detail)
            case ModelError():
                reason = JobError(reason="model", field="model", detail=str(error))
            case _ if _is_out_of_memory(error):
                reason = JobError(reason="engine", detail="one image does not fit in the memory of this device")
            case _:
                ids = {"job": ", ".join(jobs), "request": ", ".join(job.request_id for job in jobs.values())}
                log.error("the computation failed", exc_info=error, extra=ids)
                detail = f"the computation failed: {type(error).__name__}: {error}".splitlines()[0][:300]
                reason = JobError(reason="engine", detail=detail)
        for job_id in jobs:
            self._outcomes[job_id] = Outcome(error=reason)

    def _compute(self, jobs: dict[str, Job]) -> None:
        first = next(iter(jobs.values()))
        model = self._shelf.get(first.model, first.version)
        for job_id in jobs:
            self._outcomes[job_id].model = ModelRef(name=first.model, version=model.version)
        rows = [_Row(job_id, index) for job_id, job in jobs.items() for index in range(job.n)]
        while rows:
            fits = self._fits.get(model.version, self._max_batch)
            chunk = [row for row in rows if row.id not in self._dropped][:fits]
            if not chunk:
                return
            size = fits if isinstance(first, ScanJob) else len(chunk)
            try:
                self._compute_chunk(model, jobs, chunk, size)
            except Exception as error:
                if not _is_out_of_memory(error) or size == 1:
                    raise
                self._fits[model.version] = size // 2
                log.warning("%d images do not fit in memory; going on with %d at a time", size, size // 2)
                _free(self._device)
                continue
            for row in chunk:
                self._done[row.id] += 1
            rows = rows[rows.index(chunk[-1]) + 1 :]

    def _compute_chunk(self, model: ModelLike, jobs: dict[str, Job], rows: list[_Row], size: int) -> None:
        """Rows in, their results appended to the outcomes; `size` images or tiles are in memory at once.

        All jobs share what `batch_key` names.
        """
        members = [jobs[row.id] for row in rows]
        self._marked = time.monotonic()
        match members[0]:
            case ScoreJob() as job:
                images = np.stack(
                    [_array(cast(ScoreJob, m).images[r.index]) for m, r in zip(members, rows, strict=True)]
                )
                scores = model.score(
                    images,
                    classes=_classes(members),
                    noise=job.noise,
                    map=job.map,
                    ood=job.ood,
                    statistic=job.statistic,
                    statistics=job.statistics,
                    sanity=job.sanity,
                    batch_size=size,
                    callback=self._counted("score", jobs),
                )
                self._spend("score")
                for row, score in zip(rows, scores, strict=True):
                    self._outcomes[row.id].scores.append(_score(score))
            case ScanJob() as job:
                picture = open_image(job.file, max_bytes=len(job.file), max_pixels=job.height * job.width)
                found = model.scan(picture, side=job.tile_size, batch_size=size, callback=self._counted("tiles", jobs))
                self._spend("tiles")
                for member, row in zip(members, rows, strict=True):
                    self._outcomes[row.id].scan = _scan(found, cast(ScanJob, member).map)
            case GenerateJob() | CompleteJob() as job:
                options: dict[str, Any] = {
                    "classes": _classes(members),
                    "seeds": [cast(GenerateJob, m).seeds[r.index] for m, r in zip(members, rows, strict=True)],
                    "noise": job.noise,
                    "steps": job.steps,
                    "solver": job.solver,
                    "callback": self._callback(rows),
                }
                if isinstance(job, CompleteJob):
                    canvases = np.stack([_array(cast(CompleteJob, m).image) for m in members])
                    pictures = model.complete(canvases, keep=job.keep, **options)
                else:
                    pictures = model.generate(len(rows), **options)
                for row, picture in zip(rows, pictures, strict=True):
                    self._outcomes[row.id].size = (picture.shape[0], picture.shape[1])
                    self._outcomes[row.id].pictures.append(np.ascontiguousarray(picture).tobytes())
        for row in rows:
            outcome = self._outcomes[row.id]
            outcome.batch_size = max(outcome.batch_size, len(rows))

    def _counted(self, stage: str, jobs: Mapping[str, Job]) -> Callable[[int, int], None]:
        def callback(done: int, total: int) -> None:
            self._report(stage, done, total)
            if self._dropped >= jobs.keys():
                raise _Unwanted

        return callback

    def _callback(self, rows: list[_Row]) -> Callable[[Progress], Collection[int]]:
        def callback(progress: Progress) -> Collection[int]:
            self._report(progress.stage, progress.step, progress.total, lambda: _by_job(rows, progress.preview()))
            return [i for i, row in enumerate(rows) if row.id in self._dropped]

        return callback

    def _report(self, stage: str, step: int, total: int, look: Callable[[], Previews] | None = None) -> None:
        """Note the time, hear what is no longer wanted, and say now and then how far the batch is."""
        self._spend(stage)
        self._listen()
        now = time.monotonic()
        over = look is not None and step == total  # a noisy sample can be seen only now, so the clock does not count
        if over or now - self._reported >= PROGRESS_S:
            self._reported = now
            previews: Previews = {}
            if look and (over or now - self._previewed >= PREVIEW_S):
                self._previewed = now
                previews = look()
            self._pipe.send(Step(stage, step, total, dict(self._done), previews))

    def _listen(self) -> None:
        """Take note of what is no longer wanted."""
        try:
            while self._pipe.poll():
                message = cast(Batch | Drop, self._pipe.recv())
                if isinstance(message, Drop) and message.number == self._number:
                    self._dropped |= message.ids
        except (EOFError, OSError) as error:
            raise _Abandoned from error

    def _spend(self, stage: str) -> None:
        now = time.monotonic()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._marked
        self._marked = now


def _by_job(rows: Sequence[_Row], pictures: NDArray[Any]) -> Previews:
    previews: Previews = {}
    for job_id in dict.fromkeys(row.id for row in rows):
        own = pictures[[i for i, row in enumerate(rows) if row.id == job_id]]
        previews[job_id] = (own.shape[0], own.shape[1], own.shape[2], np.ascontiguousarray(own).tobytes())
    return previews


def _score(score: ScoreLike) -> Score:
    verdict = score.ood
    return Score(
        bpd=float(score.bpd),
        log_likelihood=float(score.log_likelihood),
        ood=None
        if verdict is None
        else Ood(
            statistic=verdict.statistic,
            score=float(verdict.score),
            p_value=float(verdict.p_value),
            threshold=float(verdict.threshold),
            is_ood=bool(verdict.is_ood),
        ),
        statistics={name: float(value) for name, value in score.statistics.items()},
        flipped_bpd=None if score.flipped_bpd is None else float(score.flipped_bpd),
        map=None if score.map is None else np.asarray(score.map, "<f4").tobytes(),
    )


def _scan(scan: ScanLike, with_tiles: bool) -> Scan:
    left, top, width, height = scan.box
    rows, columns = scan.grid.shape
    return Scan(
        height=scan.height,
        width=scan.width,
        rows=rows,
        columns=columns,
        score=float(scan.score),
        p_value=scan.p_value,
        threshold=scan.threshold,
        is_ood=scan.is_ood,
        box=Box(left=left, top=top, width=width, height=height),
        tiles=np.asarray(scan.grid, "<f4").tobytes() if with_tiles else None,
    )


def _array(pixels: Pixels) -> NDArray[np.uint8]:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)


def _classes(jobs: Sequence[Job]) -> list[str | None] | None:
    classes = [cast(ScoreJob | GenerateJob | CompleteJob, job).class_name for job in jobs]
    return classes if any(name is not None for name in classes) else None


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own class is named by its name, so that an engine without torch (as in tests) needs none
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _memory(device: str) -> int:
    """Bytes that this process holds on a CUDA device; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.memory_reserved(device))


def _free(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
