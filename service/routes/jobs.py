"""/jobs: state, result, preview, events, cancellation and deletion of a job."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ncml.images import grid, to_png
from service import answers
from service.http import examples
from service.http.client_limits import client_name
from service.http.deferred import DeferredResponse
from service.http.negotiation import JSON, NPZ, PNG, ZIP, Format, negotiate, wait_preference
from service.http.openapi import BINARY, header_parameters, problem_responses
from service.http.problems import Problem
from service.http.stopping import Stop
from service.jobs import Jobs
from service.rendering import CALIBRATE_OFFERS, IMAGE_OFFERS, SCORE_OFFERS
from worker.contract import EVENT_ID, JOB_ID, Task
from worker.job_results import Event

router = APIRouter(prefix="/jobs", tags=["jobs"])

OFFERS = {
    Task.SCORE: SCORE_OFFERS,
    Task.SCAN: SCORE_OFFERS,
    Task.CALIBRATE: CALIBRATE_OFFERS,
    Task.UPDATE: CALIBRATE_OFFERS,
}
"""The media types of results by task; of the others, those of images."""

JobId = Annotated[str, Path(description="The id of a job, as in X-Job-Id.", pattern=JOB_ID)]
ResultFormat = Annotated[
    Format | None, Query(description="The format of the result; it takes precedence over `Accept`.")
]
LastEventId = Annotated[
    str, Header(alias="Last-Event-ID", description="The id of the last event received.", pattern=EVENT_ID)
]

_PROGRESS_HEADER = {
    "description": "The progress at the time of the preview, as in the events: a dictionary (RFC 9651).",
    "schema": {"type": "string"},
    "example": "stage=noisy_sampling, step=12, total=32, done=0",
}
_PROBLEMS = ("no-such-job", "invalid-input", "queue-down")


@router.get(
    "/{job_id}",
    operation_id="get_job",
    summary="Get the state of a job",
    response_model=answers.JobAnswer,
    responses={200: {"headers": answers.JOB_HEADERS}} | problem_responses(401, 404, 422, 503, kinds=_PROBLEMS),
)
async def job(job_id: JobId, request: Request, jobs: Jobs) -> Response:
    """Return status, queue position, progress and links of a job.

    404 if it never existed, has expired, or belongs to another key.

    ```
    curl localhost:8000/jobs/$ID
    ```
    """
    return await jobs.describe(await jobs.view(request, job_id), 200)


@router.get(
    "/{job_id}/result",
    operation_id="get_job_result",
    summary="Get the result of a job",
    responses={
        200: {
            "description": "The result, as the endpoint that created the job returns it.",
            "content": {
                JSON: {
                    "schema": {"anyOf": [
                        {"$ref": "#/components/schemas/ScoreAnswer"}, {"$ref": "#/components/schemas/ScanAnswer"},
                        {"$ref": "#/components/schemas/ImagesAnswer"},
                        {"$ref": "#/components/schemas/CalibrateAnswer"},
                    ]},
                    "examples": examples.SCORES
                    | {"images": {"value": examples.IMAGES}, "calibration": {"value": examples.CALIBRATION}},
                },
                PNG: BINARY, ZIP: BINARY, NPZ: BINARY,
            },
            "headers": answers.RESULT_HEADERS | {
                "X-Seed": answers.IMAGES_HEADERS["X-Seed"] | {"description": "Of images: the seed of the first one."}
            },
        },
        202: answers.ACCEPTED,
        **problem_responses(401, 404, 406, 410, 422, 500, 503, 504, kinds=(*_PROBLEMS, "result-expired", "job-input")),
    },
    openapi_extra={"parameters": header_parameters("Prefer")},
)  # fmt: skip
async def result(job_id: JobId, request: Request, jobs: Jobs, format: ResultFormat = None) -> Response:
    """Return the result of a job in the format of `format`, or else of `Accept`.

    `Prefer: wait=N` waits for it; the default is not to wait.

    ```
    curl -H 'Prefer: wait=20' localhost:8000/jobs/$ID/result -o image.png
    curl -H 'Accept: application/zip' localhost:8000/jobs/$ID/result -o images.zip
    ```
    """
    view = await jobs.view(request, job_id)
    media = negotiate(request.headers, OFFERS.get(view.task, IMAGE_OFFERS), format)
    preference = wait_preference(request.headers, jobs.settings.wait_s)
    client = client_name(request)
    waits = preference.applied and not view.status.is_terminal and not view.is_canceling

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        current = await jobs.wait(receive, job_id, preference) if waits else view
        await jobs.respond(current, media, preference, client, scope, receive, send)

    return DeferredResponse(respond)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    summary="Cancel a job",
    response_model=answers.JobAnswer,
    responses={200: {"headers": answers.JOB_HEADERS}} | problem_responses(401, 404, 422, 503, kinds=_PROBLEMS),
)
async def cancel(job_id: JobId, request: Request, jobs: Jobs) -> Response:
    """Cancel a waiting or running job. A job that has ended does not change, so the request can be repeated.

    From then on its status is `canceled`; a worker that computes it stops shortly afterwards.

    ```
    curl -X POST localhost:8000/jobs/$ID/cancel
    ```
    """
    created_at = (await jobs.view(request, job_id)).created_at
    view = await anyio.to_thread.run_sync(jobs.queue.cancel, job_id, created_at)
    return await jobs.describe(view, 200)


@router.delete(
    "/{job_id}",
    operation_id="delete_job",
    summary="Delete a job",
    status_code=204,
    responses=problem_responses(401, 404, 409, 422, 503, kinds=_PROBLEMS),
)
async def delete(job_id: JobId, request: Request, jobs: Jobs) -> Response:
    """Cancel a job if necessary, and delete it at once with its input, result and images.

    ```
    curl -X DELETE localhost:8000/jobs/$ID
    ```
    """
    # another request may delete the job meanwhile, and a third one create a new job under the same Idempotency-Key
    created_at = (await jobs.view(request, job_id)).created_at
    await anyio.to_thread.run_sync(jobs.queue.cancel, job_id, created_at)

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if not (await jobs.queue.wait(job_id, 5)).status.is_terminal:
            detail = f"The job {job_id} is being canceled but has not ended yet; retry the deletion."
            raise Problem(409, detail, kind="running")
        await anyio.to_thread.run_sync(jobs.queue.forget, job_id, created_at)
        await Response(status_code=204)(scope, receive, send)

    return DeferredResponse(respond)


@router.get(
    "/{job_id}/preview",
    operation_id="get_job_preview",
    summary="Get a preview of a running job",
    response_class=Response,
    responses={200: {"description": "A PNG; several images form a grid.", "content": {PNG: BINARY},
                     "headers": {"X-Progress": _PROGRESS_HEADER}},
               **problem_responses(401, 404, 422, 503, kinds=(*_PROBLEMS, "no-preview"))},
)  # fmt: skip
async def preview(job_id: JobId, request: Request, jobs: Jobs) -> Response:
    """Return the current images of a running job, with its progress in `X-Progress`; 404 until there is a preview.

    ```
    curl localhost:8000/jobs/$ID/preview -o preview.png
    ```
    """
    await jobs.view(request, job_id)

    def render() -> Response | None:
        latest = jobs.queue.preview(job_id)
        if latest is None:
            return None
        images_NHWC = np.frombuffer(latest.data, np.uint8).reshape(latest.n, latest.height, latest.width, 3)
        progress = f"stage={latest.stage}, step={latest.step}, total={latest.total}, done={latest.done}"
        return Response(to_png(grid(images_NHWC)), 200, {"X-Progress": progress}, PNG)

    response = await anyio.to_thread.run_sync(render)
    if response is None:
        raise Problem(404, f"The job {job_id} has no preview at the moment.", kind="no-preview")
    return response


@router.get(
    "/{job_id}/events",
    operation_id="follow_job",
    summary="Follow the events of a job",
    response_class=StreamingResponse,
    responses={
        204: {"description": "The event of Last-Event-ID was the last one."},
        200: {
            "description": "Server-sent events, whose data are JSON: `progress` with a ProgressAnswer; the others are "
            "named after the job's states, with `status` and `error`, a JobError or null. The terminal state is last.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": examples.EVENTS}},
        },
        **problem_responses(401, 404, 422, 429, 503, kinds=(*_PROBLEMS, "too-many-streams")),
    },
)
async def events(job_id: JobId, request: Request, jobs: Jobs, last_event_id: LastEventId = "0") -> Response:
    """Stream the events of a job as server-sent events. `Last-Event-ID` resumes an interrupted stream.

    If the service stops, the last event is `stopping`: follow the job again.

    ```
    curl -N localhost:8000/jobs/$ID/events
    curl -N -H 'Last-Event-ID: 1767268800115-0' localhost:8000/jobs/$ID/events
    ```
    """
    view = await jobs.view(request, job_id)
    headers = {"X-Accel-Buffering": "no"}
    is_stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    events = jobs.queue.events(job_id, last_event_id, until=is_stopping)
    first = await _next_event(events) if view.status.is_terminal else None
    if view.status.is_terminal and first is None:
        return Response(status_code=204)  # no more events: a browser's EventSource stops reconnecting
    if request.state.is_head:  # its connection would otherwise be occupied until the job ends
        await events.aclose()
        return StreamingResponse(iter(()), 200, headers, "text/event-stream")
    client = client_name(request)

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        with jobs.streams.hold(client):
            stream = _stream(job_id, first, events, jobs.stop, is_stopping)
            await StreamingResponse(stream, 200, headers, "text/event-stream")(scope, receive, send)

    return DeferredResponse(respond)


async def _next_event(events: AsyncGenerator[Event | None]) -> Event | None:
    """Return the next event, None at the end of the stream."""
    async for event in events:
        if event:
            return event
    return None


async def _stream(
    job_id: str,
    first: Event | None,
    events: AsyncGenerator[Event | None],
    stop: Stop,
    is_stopping: "asyncio.Future[None]",
) -> AsyncGenerator[bytes]:
    """Yield the events as server-sent events, those in `events` after `first`; a stop sets `is_stopping`."""
    yield format_sse_event(comment="hello")  # sends the headers before the first event
    with stop.begun.calls(lambda: is_stopping.set_result(None)):
        async with contextlib.aclosing(events):
            event = first
            if first:
                yield _sse(job_id, first)
            async for event in events:
                yield _sse(job_id, event)
    if is_stopping.done() and not (event and event.status and event.status.is_terminal):
        data = '{"detail": "The service is stopping; follow the job again with Last-Event-ID."}'
        yield format_sse_event(event="stopping", data_str=data)


def _sse(job_id: str, event: Event | None) -> bytes:
    """Return one server-sent event; for None a comment, by which proxies keep the connection open."""
    if event is None:
        return format_sse_event(comment="keep-alive")
    if event.progress:
        data = answers.progress_answer(job_id, event.progress).model_dump_json()
        return format_sse_event(event="progress", id=event.id, data_str=data)
    return format_sse_event(
        event=str(event.status), id=event.id, data_str=event.model_dump_json(include={"status", "error"})
    )
