"""Between the routes and the queue: which model is meant, whether anyone would do the job, and waiting for it."""

import asyncio
import functools
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import Depends, Request, Response

from service.answers import failure, job_response, picture_response, scan_response, score_response
from service.metrics import Metrics
from service.negotiation import patience
from service.params import Params
from service.problems import RETRY_AFTER_S, Problem, invalid, no_worker, sentence
from service.reading import Asked
from service.settings import Settings
from worker.contract import (
    Job,
    JobStatus,
    JobView,
    Lane,
    ModelDescriptor,
    PictureResult,
    ScanResult,
    ScoreResult,
    Task,
)
from worker.queue import DuplicateJob, JobNotFound, JobQueue, QueueFull

T = TypeVar("T")


@dataclass
class Desk:
    """What every route needs; one for each application."""

    settings: Settings
    queue: JobQueue
    metrics: Metrics
    decoding: anyio.CapacityLimiter = field(init=False)
    scanning: anyio.CapacityLimiter = field(init=False)
    """For scans, which bring whole files and answer with maps of the picture's size: one at a time, beside the rest."""

    def __post_init__(self) -> None:
        self.decoding = anyio.CapacityLimiter(self.settings.decode_threads)
        self.scanning = anyio.CapacityLimiter(1)

    async def model(self, params: Params, task: Task) -> tuple[ModelDescriptor, str | None]:
        """The model that is meant, and the version if one was insisted on.

        Raises the 503 `Problem` when nobody would do the task, 422 for an unknown model or class.
        """
        workers, models = await anyio.to_thread.run_sync(self.queue.service, task.lane)
        if not workers:
            self.metrics.rejected.labels(reason="no-worker").inc()
            raise no_worker(task.lane)
        if not models:
            self.metrics.rejected.labels(reason="no-model").inc()
            detail = "The workers are still loading their model; try again in a few seconds."
            raise Problem(503, detail, kind="no-model")
        model, version = self.choose(models, params.model)
        if params.class_name is not None and params.class_name not in model.classes:
            known = f"its classes are {', '.join(model.classes)}" if model.classes else "it has no classes"
            raise invalid("class", f"class: {model.name} knows no {params.class_name!r}; {known}.")
        return model, version

    def choose(self, models: list[ModelDescriptor], wanted: str | None) -> tuple[ModelDescriptor, str | None]:
        """The model called `name`, `name@version` or `name@` and the beginning of one, and the full version if given.

        None means the default. Of several versions of a name, the first in `models` is meant. Raises the 422 `Problem`.
        """
        named = wanted or self.settings.default_model or min(model.name for model in models)
        name, at, version = named.partition("@")
        for model in models:
            if model.name == name and model.version.startswith(version) and (not at or len(version) >= 6):
                return model, model.version if at else None
        served = sorted({model.name for model in models} | {f"{model.name}@{model.version[:12]}" for model in models})
        raise invalid("model", f"model: {named!r} is not served here; there are {', '.join(served) or 'none'}.")

    def common(self, request: Request, params: Params, model: ModelDescriptor, version: str | None) -> dict[str, Any]:
        """The fields that jobs of every kind have."""
        return {
            "model": model.name,
            "version": version,
            "priority": params.priority,
            "request_id": request.state.request_id,
            "timeout_s": self.settings.job_timeout_s,
            "start_within_s": self.settings.start_within_s,
        }

    async def decode(self, task: Task, build: Callable[[], T]) -> T:
        """Run something that decodes pictures, off the event loop and with few beside it."""
        return await anyio.to_thread.run_sync(build, limiter=self._room(task) or self.decoding)

    async def ask(self, request: Request, asked: Asked[Any], job: Job, media: str) -> Response:
        """Submit the job and answer with its result as `media`, or with 202 when that takes longer than is waited.

        Under an Idempotency-Key that is taken, the same request is answered from the job that took it. A client that
        hangs up cancels its job, unless it sent such a key, for then it may come back.
        """
        wanted = patience(request.headers, self.settings.wait_s)
        key = request.headers.get("idempotency-key")
        owner = str(request.state.owner)
        submit = functools.partial(self._submit, job, asked, key, request.url.path, owner)
        job_id = await anyio.to_thread.run_sync(submit, limiter=self._room(job.task))
        view = await (self.queue.wait(job_id, wanted.wait_s) if key else self._wait(request, job_id, wanted.wait_s))
        response = await self.answer(view, media) if view.status.is_terminal else await self.describe(view, 202)
        if wanted.applied:
            response.headers["Preference-Applied"] = wanted.applied
        response.headers["Vary"] = "Accept, Prefer"
        return response

    def _submit(self, job: Job, asked: Asked[Any], key: str | None, path: str, owner: str) -> str:
        if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
            raise invalid("Idempotency-Key", "Idempotency-Key must be 1 to 255 visible ASCII characters.")
        fingerprint = asked.fingerprint(path) if key else ""
        job_id = None if key is None else "key-" + hashlib.sha256(f"{owner} {key}".encode()).hexdigest()[:40]
        try:
            job_id = self.queue.submit(
                job, job_id=job_id, limit=self.settings.max_waiting, fingerprint=fingerprint, owner=owner
            )
        except QueueFull as error:
            self.metrics.rejected.labels(reason="queue-full").inc()
            lane = job.task.lane
            pause = self._seconds_for(lane, self.queue.depth(lane) / 2)  # half of what waits will have been done
            detail = sentence(f"{error}; ask again in {pause} s")
            raise Problem(429, detail, kind="queue-full", headers={"Retry-After": str(pause)}) from error
        except DuplicateJob as error:
            assert job_id is not None
            if self.queue.view(job_id).fingerprint != fingerprint:
                detail = "Idempotency-Key was used for another request; send a new key with a new request."
                raise invalid("Idempotency-Key", detail) from error
            return job_id
        self.metrics.enqueued.labels(task=job.task, model=job.model, priority=job.priority).inc()
        return job_id

    def _seconds_for(self, lane: Lane, jobs: float) -> int:
        """How long the lane's workers take for so many jobs, at the pace that they measured; 1 to 3600."""
        pace = self.queue.pace(lane)
        return min(max(math.ceil(jobs / pace), 1), 3600) if pace else RETRY_AFTER_S

    async def view(self, request: Request, job_id: str) -> JobView:
        """A job of this client. Raises `JobNotFound` for another's as for none."""
        view = await anyio.to_thread.run_sync(self.queue.view, job_id)
        if view.owner != request.state.owner:
            raise JobNotFound(f"there is no job {job_id} of this client")
        return view

    async def describe(self, view: JobView, status: Literal[200, 202]) -> Response:
        """The document of a job; 202 says where to look and, by its place in the queue, how soon."""

        def look() -> tuple[int | None, int]:
            position = self.queue.position(view)
            return position, 1 if position is None else self._seconds_for(view.task.lane, position + 1)

        position, pause = await anyio.to_thread.run_sync(look)
        return job_response(view, position, pause, status)

    async def _wait(self, request: Request, job_id: str, wait_s: float) -> JobView:
        """The job once it has ended or `wait_s` are over; a client that hangs up before that cancels it."""
        waiting = asyncio.ensure_future(self.queue.wait(job_id, wait_s))
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            return await anyio.to_thread.run_sync(self.queue.cancel, job_id)
        finally:
            waiting.cancel()
            gone.cancel()

    async def answer(self, view: JobView, media: str) -> Response:
        """The result of a job that has ended, as `media`. Raises the `Problem` that it ended with."""
        if view.status is not JobStatus.SUCCEEDED:
            raise failure(view)
        return await anyio.to_thread.run_sync(self._render, view, media, limiter=self._room(view.task))

    def _room(self, task: Task) -> anyio.CapacityLimiter | None:
        """How many threads may do something for a task at once; None: as many as there are."""
        return self.scanning if task is Task.SCAN else None

    def _render(self, view: JobView, media: str) -> Response:
        result = self.queue.result(view.id)
        match result:
            case ScoreResult():
                return score_response(view, result, media)
            case ScanResult():
                return scan_response(view, result, media)
            case PictureResult():
                blob = self.queue.blob(result.pictures.blob)
                if blob is not None:
                    return picture_response(view, result, blob, media)
            case None:
                pass
        raise Problem(404, f"The result of the job {view.id} has expired; ask again.", kind="result-expired")


async def _hung_up(request: Request) -> None:
    """Return when the client has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def desk(request: Request) -> Desk:
    """The application's desk."""
    return request.app.state.desk


Here = Annotated[Desk, Depends(desk)]
