"""What the routes share: submit a job, wait for it, and respond with its result."""

import asyncio
import contextlib
import functools
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import Depends, Request, Response
from redis.exceptions import RedisError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.answers import KEY_PREFIX, job_problem, job_response
from service.http.client_limits import SMALL_RESULT_BYTES, RenderingTurns, ResultLimit, StreamLimit, client_name
from service.http.deferred import DeferredResponse, disconnected
from service.http.negotiation import JSON, WaitPreference, idempotency_key, wait_preference
from service.http.problems import RETRY_AFTER_S, Problem, as_sentence, invalid_field
from service.http.requests import ParsedRequest
from service.http.stopping import Stop
from service.http.validation import FieldError
from service.image_decoding import ImageDecoding
from service.model_selection import ModelList, ModelSelection
from service.params import JobParams
from service.preparation import Preparations
from service.rendering import PartedResult, calibration_response, images_response, scan_response, score_response
from service.service_metrics import Metrics
from service.settings import Settings
from service.webhooks.targets import Receivers, Target
from worker.contract import Job, JobStatus, Lane, Priority, ScoreJob, Task, is_alone
from worker.deliveries import receiver_of
from worker.descriptors import ModelDescriptor
from worker.job_results import CANCELED, CalibrateResult, ImagesResult, JobView, ScanResult, ScoreResult
from worker.outages import Outages
from worker.queue import DuplicateJob, JobNotFound, JobQueue, QueueFull, QueueOutOfMemory

T = TypeVar("T")

log = logging.getLogger(__name__)

PARTED_RESULT_BYTES = 2**21
"""Maximum memory of a result that is rendered while it is sent."""

MAX_UNDELIVERED = 10_000
"""Messages that may wait for one receiver of webhooks; they take some 2 kB of the queue's memory each."""

EXPIRE_S = 10.0
"""Interval at which late jobs are ended if no worker does."""

MEMORY_RETRY_AFTER_S = 60
"""Seconds after which a client may retry when the queue is short of memory: results expire after up to an hour."""


class JobService:
    """Runs jobs for the routes; one per application."""

    def __init__(self, settings: Settings, queue: JobQueue, metrics: Metrics, stop: Stop) -> None:
        self.settings = settings
        self.queue = queue
        self.metrics = metrics
        self.stop = stop
        self.streams = StreamLimit(settings.max_streams)
        self._results, self._turns = ResultLimit(), RenderingTurns()
        self.models = ModelSelection(queue.monitor, settings.default_model)
        self.model_list: ModelList | None = None
        """The latest one that a request for all models was answered with."""
        self.decoding = ImageDecoding(settings)
        self._receivers = Receivers(settings.webhook_hosts)
        self._starting: asyncio.Task[None] | None = None
        self._expiring: asyncio.Task[None] | None = None
        # jobs that carry whole files: few are submitted at a time, in addition to other work
        self._carrying = {Task.SCAN: anyio.CapacityLimiter(1), Task.SCORE: anyio.CapacityLimiter(2)}
        self.updating = asyncio.Lock()
        """Held while the reviews of a client are read and submitted: this takes six times their bytes of memory."""
        self._preparations = Preparations(
            queue, limit_s=settings.decode_request_s, byte_limit=settings.max_waiting_bytes
        )

    def start(self) -> None:
        """Start the decoders, and end late jobs, in the background."""
        self._starting = asyncio.get_running_loop().create_task(self.decoding.pool.start())
        self._expiring = asyncio.get_running_loop().create_task(self._expire_late())

    async def close(self) -> None:
        """End the preparations and the decoders."""
        if self._expiring:
            self._expiring.cancel()
        await self._preparations.close()
        if self._starting:
            await self._starting
        await self.decoding.pool.close()

    async def _expire_late(self) -> None:
        """End late jobs again and again, also those that nobody follows: until then they take places in the queue.

        What was deleted is erased as well.
        """
        outages = Outages()
        while True:
            await asyncio.sleep(EXPIRE_S)
            try:
                await anyio.to_thread.run_sync(self.queue.expire_late)
                await anyio.to_thread.run_sync(self.queue.erase_deleted)
            except RedisError as error:
                outages.report(log, "late jobs are not ended: the queue does not answer", error)

    # -- before the job

    def job_fields(
        self, request: Request, params: JobParams, model: ModelDescriptor, version: str | None
    ) -> tuple[dict[str, Any], Target | None]:
        """Return the fields that all kinds of jobs share, and the receiver of the webhook, if the request names one.

        Raises the 403 `Problem` for a reserved priority, and `InputError` for a webhook that is not allowed: before
        images are decoded.
        """
        names = self.settings.high_priority_keys
        if params.priority is Priority.HIGH and names and request.state.owner not in names:
            detail = "priority: high is reserved for certain API keys; send normal or low."
            raise Problem(403, detail, kind="priority", errors=[FieldError(field="priority", detail=detail)])
        fields = {
            "model": model.name,
            "version": version,
            "priority": params.priority,
            "request_id": request.state.request_id,
            "timeout_s": self.settings.job_timeout_s,
            "start_within_s": self.settings.start_within_s,
        }
        return fields, self._receivers.check(params.webhook) if params.webhook else None

    # -- the job

    async def run(
        self,
        request: Request,
        parsed: ParsedRequest[Any],
        job: Job,
        webhook: Target | None,
        media: str,
        prepare: Callable[[], Awaitable[Job]] | None = None,
    ) -> Response:
        """Submit the job; respond with its result as `media`, or with 202 if it takes longer than the client waits.

        `webhook` is the receiver of its end, as `job_fields` returns it.

        `prepare` returns the job with its input: it runs in the background, few for all clients at once, and an
        `InputError` of it ends the job.

        A repeated request under the same Idempotency-Key is answered from its first job. A client that disconnects
        cancels its job, unless it sent such a key, with which it may retry, or named a webhook. If the queue fails
        after it accepted the job, the response is 202, too.
        """
        preference = wait_preference(request.headers, self.settings.wait_s)
        key = idempotency_key(request.headers)
        owner, client = str(request.state.owner), client_name(request)
        request.state.interruption.lift()  # from here on, the response reports the job
        submit = functools.partial(self._submit, request, parsed, job, webhook, key)
        if prepare is None:
            limiter = self._carrying.get(job.task) if is_alone(job) else None
            job_id, _ = await anyio.to_thread.run_sync(submit, limiter=limiter)
        else:
            job_id = await self._submit_held(job, submit, key, owner, client, prepare)
        submitted = functools.partial(
            JobView, id=job_id, status=JobStatus.QUEUED, task=job.task, model=None, model_name=job.model,
            priority=job.priority, request_id=job.request_id, owner=owner, n=job.n, created_at=time.time(),
        )  # fmt: skip

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                view = await self.wait(receive, job_id, preference, cancels=not key and not webhook)
                await self.respond(view, media, preference, client, scope, receive, send)
            except (RedisError, asyncio.CancelledError) as error:  # the client needs the address
                if scope["state"]["has_begun"]:
                    raise
                log.error("waiting for the job %s failed: %r", job_id, error)
                await job_response(submitted(), None, RETRY_AFTER_S, 202)(scope, receive, send)

        return DeferredResponse(respond)

    def _submit(
        self,
        request: Request,
        parsed: ParsedRequest[Any],
        job: Job,
        webhook: Target | None,
        key: str | None,
        held_s: float | None = None,
    ) -> tuple[str, bool]:
        """Submit a job; return its id, and whether it is new rather than that of an earlier request with the key."""
        owner = str(request.state.owner)
        fingerprint = parsed.fingerprint(request.url.path) if key else ""
        job_id = _keyed_id(owner, key) if key else None
        if webhook:
            self._check_undelivered(webhook.url)
        try:
            job_id = self.queue.submit(
                job,
                job_id=job_id,
                limit=self.settings.max_waiting,
                byte_limit=self.settings.max_waiting_bytes,
                fingerprint=fingerprint,
                owner=owner,
                files=parsed.files if job.task is Task.SCORE else (),  # the other results do not name them
                digests=parsed.digests if isinstance(job, ScoreJob) and job.originals else (),
                format=parsed.format,
                traceparent=str(request.state.traceparent),
                webhook=webhook.url if webhook else "",
                held_s=held_s,
            )
        except QueueFull as error:
            is_memory = isinstance(error, QueueOutOfMemory)
            lane = job.task.lane
            if is_memory:
                pause_s = MEMORY_RETRY_AFTER_S
            else:  # until half of them are done
                pause_s = self._estimate_seconds(lane, self.queue.monitor.depth(lane) / 2)
            detail = as_sentence(f"{error}; retry in {pause_s} s")
            reason = "queue-memory" if is_memory else None
            headers = {"Retry-After": str(pause_s)}
            raise Problem(429, detail, kind="queue-full", reason=reason, headers=headers) from error
        except DuplicateJob as error:
            assert job_id is not None
            if self.queue.view(job_id).fingerprint != fingerprint:
                detail = "Idempotency-Key was used for a different request; send a new key."
                raise invalid_field("Idempotency-Key", detail) from error
            return job_id, False
        self.metrics.enqueued.labels(task=job.task, model=job.model, priority=job.priority).inc()
        return job_id, True

    def _check_undelivered(self, webhook: str) -> None:
        """Raise the 429 `Problem` if a receiver accepts no messages while more and more wait for it."""
        receiver = receiver_of(webhook)
        if self.queue.deliveries.count(receiver) >= MAX_UNDELIVERED:
            detail = f"webhook: {MAX_UNDELIVERED} messages wait for {receiver}, which accepts none; retry later."
            errors = [FieldError(field="webhook", detail=detail)]
            raise Problem(429, detail, kind="queue-full", reason="webhooks-full", errors=errors)

    async def _submit_held(
        self,
        job: Job,
        submit: Callable[..., tuple[str, bool]],
        key: str | None,
        owner: str,
        client: str,
        prepare: Callable[[], Awaitable[Job]],
    ) -> str:
        """Submit a job that is prepared in the background, and return its id; raises the 503 `Problem`."""
        place = contextlib.AsyncExitStack()
        if not key or not await anyio.to_thread.run_sync(self._exists, _keyed_id(owner, key)):
            place = await self._preparations.reserve(client)
        # A request whose job exists needs no place; if that has just been deleted, it is prepared without one.
        is_new = False
        try:
            held = functools.partial(submit, held_s=self._preparations.held_s)
            job_id, is_new = await anyio.to_thread.run_sync(held)
        finally:
            if not is_new:
                await place.aclose()
        if is_new:
            self._preparations.start(place, job_id, job, prepare)
        return job_id

    def _exists(self, job_id: str) -> bool:
        try:
            self.queue.view(job_id)
        except JobNotFound:
            return False
        return True

    async def wait(
        self, receive: Receive, job_id: str, preference: WaitPreference, *, cancels: bool = False
    ) -> JobView:
        """Return the job once it has ended, the client waits no longer, or the service must answer before it stops.

        With `cancels`, a client that disconnects while it waits cancels the job.
        """
        disconnect = asyncio.ensure_future(disconnected(receive))
        try:
            with self.stop.due.calls(disconnect.cancel):
                view = await self.queue.wait(job_id, preference.wait_s, disconnect)
            if disconnect.done() and not disconnect.cancelled():
                disconnect.result()  # raises the `Problem` of a body that is too large
                if cancels:
                    view = await anyio.to_thread.run_sync(self.queue.cancel, job_id)
        finally:
            disconnect.cancel()
        return view

    async def view(self, request: Request, job_id: str) -> JobView:
        """Return a job of this client. Raises `JobNotFound` for the jobs of others, too."""
        view = await anyio.to_thread.run_sync(self.queue.view, job_id)
        if view.owner != request.state.owner:
            raise JobNotFound(f"there is no job {job_id} of this client")
        return view

    # -- the response

    async def respond(
        self,
        view: JobView,
        media: str,
        preference: WaitPreference,
        client: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Respond to a client, by its name, with the result of a job that has ended, else with 202.

        Raises the `Problem` of a failed job.
        """
        view = _as_canceled(view)
        if view.status.is_terminal and view.status is not JobStatus.SUCCEEDED:
            raise job_problem(view)
        headers = {"Vary": "Accept, Prefer"}
        if preference.applied:
            headers["Preference-Applied"] = preference.applied
        if not view.status.is_terminal:
            response = await self.describe(view, 202)
            response.headers.update(headers)
            await response(scope, receive, send)
            return
        is_map = view.task is Task.SCAN and media != JSON
        size = PARTED_RESULT_BYTES if is_map else await anyio.to_thread.run_sync(self.queue.result_size, view.id)
        async with self._results.hold(client, size) as reading:
            if size > SMALL_RESULT_BYTES:
                response = await self._turns.run(client, self._render, view, media)
            else:
                response = await anyio.to_thread.run_sync(self._render, view, media)
            if isinstance(response, PartedResult):
                parts = self._turns.render_parts(client, response.parts)
                response = StreamingResponse(parts, 200, response.headers, response.media)
            response.headers.update(headers)
            await response(scope, receive, reading.send(send))

    async def describe(self, view: JobView, status: Literal[200, 202]) -> Response:
        """Respond with the state of a job; 202 adds its address and, from its queue position, when to retry."""
        view = _as_canceled(view)

        def estimate() -> tuple[int | None, int]:
            position = self.queue.position(view)
            return position, 1 if position is None else self._estimate_seconds(view.task.lane, position + 1)

        position, pause_s = await anyio.to_thread.run_sync(estimate)
        return job_response(view, position, pause_s, status)

    def _render(self, view: JobView, media: str) -> Response | PartedResult:
        match result := self.queue.result(view.id):
            case ScoreResult():
                return score_response(view, result, media)
            case CalibrateResult():
                return calibration_response(view, result)
            case ScanResult():
                return scan_response(view, result, media)
            case ImagesResult():
                blob = self.queue.blob(result.images.blob)
                if blob is not None:
                    return images_response(view, result, blob, media)
            case None:
                pass
        detail = f"The result of the job {view.id} has expired; send the request again."
        raise Problem(404, detail, kind="result-expired")

    def _estimate_seconds(self, lane: Lane, job_count: float) -> int:
        """Estimate how long a lane takes for a number of jobs by its workers' measured pace, from 1 to 3600 s."""
        pace = self.queue.monitor.pace(lane)
        return min(max(math.ceil(job_count / pace), 1), 3600) if pace else RETRY_AFTER_S


def _keyed_id(owner: str, key: str) -> str:
    """Return the id of the job that a client creates with an idempotency key."""
    return KEY_PREFIX + hashlib.sha256(f"{owner} {key}".encode()).hexdigest()[:40]


def _as_canceled(view: JobView) -> JobView:
    """Return a job as clients see it: canceled once the cancellation is accepted, even if its worker still runs."""
    return view.model_copy(update={"status": JobStatus.CANCELED, "error": CANCELED}) if view.is_canceling else view


async def _job_service(request: Request) -> JobService:  # FastAPI would call a plain function in a thread
    return request.app.state.jobs


Jobs = Annotated[JobService, Depends(_job_service)]
"""The parameter of a route that receives the application's `JobService`."""


async def check_queue(jobs: Jobs) -> None:
    """Raise `RedisError` within seconds if the queue's server hangs: calls for jobs and reviews wait ten times as long.

    A dependency of the routes that do not ask the monitor themselves.
    """
    await anyio.to_thread.run_sync(jobs.queue.monitor.ping)
