"""/jobs: where a job stands, its result, its events, and its end."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.sse import format_sse_event
from starlette.responses import StreamingResponse

from ncml.images import grid, to_png
from service import answers, problems
from service.asking import Here
from service.negotiation import BINARY, JSON, NPZ, PNG, ZIP, negotiate, patience
from service.problems import Problem
from worker.contract import Event, Task

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(description="The id of a job, as in X-Job-Id.", pattern=r"^[A-Za-z0-9_-]{1,64}$")]
LastEventId = Annotated[
    str, Header(description="The id of the last event that was seen.", pattern=r"^[0-9]{1,19}(-[0-9]{1,19})?$")
]

_MOMENT = {
    "description": "The moment that the pictures show, as in the events: a dictionary (RFC 9651).",
    "schema": {"type": "string"},
    "example": "stage=noisy_sampling, step=12, total=32, done=0",
}
_KINDS = ("no-such-job", "invalid-input", "queue-down")
_EVENTS = """: hello

event: queued
id: 1767268800000-0
data: {"status":"queued","error":null}

event: running
id: 1767268800012-0
data: {"status":"running","error":null}

event: progress
id: 1767268800115-0
data: {"stage":"noisy_sampling","step":12,"total":32,"done":0,"n":4,"preview":"/jobs/0b6a3c1e9d/preview"}

event: succeeded
id: 1767268801310-0
data: {"status":"succeeded","error":null}
"""


@router.get(
    "/{job_id}",
    operation_id="get_job",
    summary="Where a job stands",
    response_model=answers.JobAnswer,
    responses=problems.documented(401, 404, 422, 503, kinds=_KINDS),
)
async def job(job_id: JobId, request: Request, desk: Here) -> Response:
    """Status, place in the queue, progress and links of a job.

    404 when it never was, its time to live is over, or another key made it.

    ```
    curl localhost:8000/jobs/$ID
    ```
    """
    return await desk.describe(await desk.view(request, job_id), 200)


@router.get(
    "/{job_id}/result",
    operation_id="get_job_result",
    summary="The result of a job",
    responses={
        200: {
            "description": "The result, as the endpoint that made the job would have answered.",
            "content": {
                JSON: {
                    "schema": {"anyOf": [
                        {"$ref": "#/components/schemas/ScoreAnswer"}, {"$ref": "#/components/schemas/ScanAnswer"},
                        {"$ref": "#/components/schemas/PictureAnswer"},
                    ]},
                    "examples": answers.SCORE_EXAMPLES | {"pictures": {"value": answers.PICTURE_EXAMPLE}},
                },
                PNG: BINARY, ZIP: BINARY, NPZ: BINARY,
            },
        },
        202: answers.ACCEPTED,
        **problems.documented(401, 404, 406, 410, 422, 500, 503, 504, kinds=(*_KINDS, "result-expired", "job-input")),
    },
)  # fmt: skip
async def result(job_id: JobId, request: Request, desk: Here) -> Response:
    """The result of a job, negotiated by Accept. `Prefer: wait=N` waits for it; without it this answers at once.

    ```
    curl -H 'Prefer: wait=20' localhost:8000/jobs/$ID/result -o picture.png
    curl -H 'Accept: application/zip' localhost:8000/jobs/$ID/result -o pictures.zip
    ```
    """
    view = await desk.view(request, job_id)
    offers = answers.SCORE_OFFERS if view.task in (Task.SCORE, Task.SCAN) else answers.PICTURE_OFFERS
    media = negotiate(request.headers, offers)
    wanted = patience(request.headers, desk.settings.wait_s)
    if not view.status.is_terminal and wanted.applied:
        view = await desk.queue.wait(job_id, wanted.wait_s)
    response = await desk.answer(view, media) if view.status.is_terminal else await desk.describe(view, 202)
    if wanted.applied:
        response.headers["Preference-Applied"] = wanted.applied
    response.headers["Vary"] = "Accept, Prefer"
    return response


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    summary="End a job",
    response_model=answers.JobAnswer,
    responses=problems.documented(401, 404, 422, 503, kinds=_KINDS),
)
async def cancel(job_id: JobId, request: Request, desk: Here) -> Response:
    """Cancel a job that waits or runs; one that has ended stays as it is. Asking twice changes nothing.

    A running job ends within a moment: the answer may still say `running`.

    ```
    curl -X POST localhost:8000/jobs/$ID/cancel
    ```
    """
    await desk.view(request, job_id)
    return await desk.describe(await anyio.to_thread.run_sync(desk.queue.cancel, job_id), 200)


@router.delete(
    "/{job_id}",
    operation_id="delete_job",
    summary="Forget a job",
    status_code=204,
    responses=problems.documented(401, 404, 409, 422, 503, kinds=_KINDS),
)
async def delete(job_id: JobId, request: Request, desk: Here) -> None:
    """End a job if need be, and delete it with its input, result and pictures at once.

    ```
    curl -X DELETE localhost:8000/jobs/$ID
    ```
    """
    await desk.view(request, job_id)
    await anyio.to_thread.run_sync(desk.queue.cancel, job_id)
    if not (await desk.queue.wait(job_id, 5)).status.is_terminal:
        raise Problem(
            409, f"The job {job_id} is being canceled but has not ended yet; delete it again.", kind="running"
        )
    await anyio.to_thread.run_sync(desk.queue.forget, job_id)


@router.get(
    "/{job_id}/preview",
    operation_id="get_job_preview",
    summary="The pictures of a running job as they look now",
    response_class=Response,
    responses={200: {"description": "A PNG (a grid of several).", "content": {PNG: BINARY},
                     "headers": {"X-Progress": _MOMENT}},
               **problems.documented(401, 404, 422, 503, kinds=(*_KINDS, "no-preview"))},
)  # fmt: skip
async def preview(job_id: JobId, request: Request, desk: Here) -> Response:
    """The latest preview of a running job, and in X-Progress its moment; 404 while there is none.

    ```
    curl localhost:8000/jobs/$ID/preview -o now.png
    ```
    """
    await desk.view(request, job_id)

    def draw() -> Response | None:
        shown = desk.queue.preview(job_id)
        if shown is None:
            return None
        pictures_NHWC = np.frombuffer(shown.data, np.uint8).reshape(shown.n, shown.height, shown.width, 3)
        moment = f"stage={shown.stage}, step={shown.step}, total={shown.total}, done={shown.done}"
        return Response(to_png(grid(pictures_NHWC)), 200, {"Cache-Control": "no-store", "X-Progress": moment}, PNG)

    response = await anyio.to_thread.run_sync(draw)
    if response is None:
        raise Problem(404, f"The job {job_id} has no preview now.", kind="no-preview")
    return response


@router.get(
    "/{job_id}/events",
    operation_id="follow_job",
    summary="What happens to a job, as it happens",
    response_class=StreamingResponse,
    responses={
        204: {"description": "The event named by Last-Event-ID was the last one."},
        200: {
            "description": "Server-sent events named after the job's states, and `progress`; the terminal one is last.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS}},
        },
        **problems.documented(401, 404, 422, 503, kinds=_KINDS),
    },
)
async def events(job_id: JobId, request: Request, desk: Here, last_event_id: LastEventId = "0") -> Response:
    """A stream of server-sent events. Send `Last-Event-ID` to go on where a dropped stream ended.

    ```
    curl -N localhost:8000/jobs/$ID/events
    curl -N -H 'Last-Event-ID: 1767268800115-0' localhost:8000/jobs/$ID/events
    ```
    """
    view = await desk.view(request, job_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    events = desk.queue.events(job_id, last_event_id)
    first = await _next(events) if view.status.is_terminal else None
    if view.status.is_terminal and first is None:
        return Response(status_code=204)  # all has been told: a browser's EventSource comes back no more
    return StreamingResponse(_stream(job_id, first, events), 200, headers, "text/event-stream")


async def _next(events: AsyncGenerator[Event | None]) -> Event | None:
    """The next thing that happened; None once all is told."""
    async for event in events:
        if event:
            return event
    return None


async def _stream(job_id: str, first: Event | None, events: AsyncGenerator[Event | None]) -> AsyncGenerator[bytes]:
    yield format_sse_event(comment="hello")  # the headers go out before anything happens
    async with contextlib.aclosing(events):
        if first:
            yield _sse(job_id, first)
        async for event in events:
            yield _sse(job_id, event)


def _sse(job_id: str, event: Event | None) -> bytes:
    """One event on the wire; a comment where nothing happened, so that proxies keep the connection."""
    if event is None:
        return format_sse_event(comment="keep-alive")
    if event.progress:
        data = answers.progress_answer(job_id, event.progress).model_dump_json()
        return format_sse_event(event="progress", id=event.id, data_str=data)
    return format_sse_event(
        event=str(event.status), id=event.id, data_str=event.model_dump_json(include={"status", "error"})
    )
