"""The JSON documents that describe jobs and their results."""

from datetime import datetime
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from service.http import examples
from service.http.negotiation import JSON
from service.http.problems import Problem, as_sentence
from service.http.validation import FieldError
from worker.contract import JobStatus, Priority, Task
from worker.job_results import (
    Calibrated,
    DetectionValues,
    JobError,
    JobView,
    ModelRef,
    Ood,
    Progress,
    ScanValues,
    Timing,
    Webhook,
)

KEY_PREFIX = "key-"
"""Beginning of the ids of jobs that have an idempotency key."""


class Answer(BaseModel):
    """The first fields of every document about a job."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="The id of the job, for /jobs/{id}.")
    status: JobStatus


class Sanity(BaseModel):
    """A comparison of the image with itself after flipping every least significant bit."""

    flipped_bpd: float = Field(description="Bits per dimension of the image with flipped bits.")
    delta_bpd: float = Field(
        description="`flipped_bpd` minus `bpd`: positive if the likelihood of a natural image is sound."
    )


class Detection(DetectionValues):
    """An image, judged by a detector at its own size by several views."""

    map: list[list[float]] | None = Field(
        default=None,
        description="With map=1: rows of local scores, evenly spaced over `covered`; empty for a view without a map.",
    )


class Score(BaseModel):
    """The likelihood of one image. Members that were not requested are omitted."""

    file: str | None = Field(
        default=None, description="The name of the image's file, in the response to a form with several images."
    )
    bpd: float = Field(description="Bits per dimension: lower means more likely.")
    log_likelihood: float = Field(description="Log-likelihood of the whole image at the model's size, in nats.")
    ood: Ood | None = Field(
        description="The out-of-distribution verdict; null with ood=0, and for a model that is not calibrated."
    )
    statistics: dict[str, float] | None = Field(
        default=None, description="OOD scores by statistic; higher means more out-of-distribution."
    )
    sanity: Sanity | None = None
    map: list[list[float]] | None = Field(default=None, description="Rows of bits per dimension, one number per pixel.")
    detection: Detection | None = Field(
        default=None, description="The verdict of a detector in full; omitted unless a detector gives the verdict."
    )


class ScoreAnswer(Answer):
    """The likelihoods of the images, in the order in which they were sent."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.SCORE})

    model: ModelRef
    results: list[Score]
    timing: Timing


class ScanAnswer(ScanValues, Answer):
    """The verdict on an image by its tiles. If tiles are not calibrated, the verdict's members are null."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.SCAN})

    model: ModelRef
    tiles: list[list[float]] | None = Field(default=None, description="With map=1: rows of OOD scores, one per tile.")
    timing: Timing


class CalibrateAnswer(Answer):
    """A new model, calibrated on the images of the request, or a new version of a detector."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.CALIBRATION})

    model: ModelRef = Field(description="The new model; workers serve it within seconds.")
    calibration: Calibrated
    skipped: list[str] = Field(description="Why other images were not used, at most 20 reasons.")
    timing: Timing


class GeneratedImage(BaseModel):
    """One generated image."""

    seed: int
    png: str = Field(description="The PNG file in base64.")


class ImagesAnswer(Answer):
    """The images, in the order of their seeds."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.IMAGES})

    model: ModelRef = Field(
        description="The images are like those that its weights were trained on, also if it was calibrated on others "
        "or is a detector of them."
    )
    images: list[GeneratedImage]
    timing: Timing


class ProgressAnswer(BaseModel):
    """The progress of a running job."""

    stage: str = Field(
        description='"score", "judge" (by a detector), "tiles", "noisy_sampling" or "refine"; of a calibration also '
        '"fit", "rank" or "power"; of an update others as well, such as "read".'
    )
    step: int
    total: int
    done: int = Field(description="Finished images of this job, if it is split into several batches.")
    n: int
    preview: str | None = Field(description="The path of the current images; null if there are none.")


class Links(BaseModel):
    """Related resources."""

    self: str
    result: str = Field(description="The result, in the `format` that the request named, if it named one.")
    events: str
    cancel: str


class JobAnswer(Answer):
    """The state of a job."""

    task: Task
    model: ModelRef | None = Field(
        description="The model of the request, which a calibration copies. Null until the version is known: with the "
        "result, unless the request named it."
    )
    n: int = Field(description="Number of images; 1 for a calibration and an update.")
    priority: Priority
    position: int | None = Field(description="Number of waiting jobs ahead in its lane; null unless it is waiting.")
    request_id: str = Field(description="The id of the request that created it, as in the logs.")
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: ProgressAnswer | None
    error: JobError | None
    timing: Timing | None
    webhook: Webhook | None = Field(default=None, description="Null if the request named no `webhook`.")
    links: Links


class JobEnded(BaseModel):
    """The message to the webhook that a request named."""

    type: str = Field(description="`job.succeeded`, `job.failed`, `job.canceled` or `job.expired`.")
    timestamp: datetime = Field(description="When the job ended.")
    data: JobAnswer = Field(description="The job as GET /jobs/{id} returns it, without `webhook`.")


JOB_HEADERS: dict[str, Any] = {
    "X-Job-Id": {"description": "The id of the job, for /jobs/{id}, in every format.", "schema": {"type": "string"}}
}
"""The headers of every response about a job in the OpenAPI document."""
RESULT_HEADERS: dict[str, Any] = {
    **JOB_HEADERS,
    "Preference-Applied": {
        "description": "The preferences of `Prefer` that were applied, such as `wait=5`.",
        "schema": {"type": "string"},
    },
}
"""The headers of every result in the OpenAPI document."""
IMAGES_HEADERS: dict[str, Any] = {
    **RESULT_HEADERS,
    "X-Seed": {
        "description": "The seed of the first image; image i has this seed + i.",
        "schema": {"type": "integer"},
    },
}

ACCEPTED: dict[str, Any] = {
    "model": JobAnswer,
    "description": "The job did not finish within the wait; see Location.",
    "headers": {
        **RESULT_HEADERS,
        "Location": {"description": "The address of the job.", "schema": {"type": "string"}},
        "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}},
    },
}
"""The 202 in the OpenAPI document."""


def progress_answer(job_id: str, progress: Progress) -> ProgressAnswer:
    """Return the document of a job's progress."""
    return ProgressAnswer(
        **progress.model_dump(exclude={"preview"}),
        preview=f"/jobs/{job_id}/preview" if progress.preview else None,
    )


def job_answer(view: JobView, position: int | None) -> JobAnswer:
    """Return the document of a job and its position in the queue."""
    base, progress = f"/jobs/{view.id}", view.progress
    result = f"{base}/result" + (f"?format={view.format}" if view.format else "")
    if progress and view.status is JobStatus.SUCCEEDED:  # the last report precedes the end
        progress = progress.model_copy(update={"step": progress.total, "done": progress.n})
    return JobAnswer.model_validate(
        dict(view)  # its times in seconds become datetimes
        | {
            "position": position,
            "progress": progress_answer(view.id, progress) if progress else None,
            "links": Links(self=base, result=result, events=f"{base}/events", cancel=f"{base}/cancel"),
        }
    )


def job_response(view: JobView, position: int | None, retry_after_s: int, status: Literal[200, 202]) -> Response:
    """Return the document of a job; 202 adds its address and when to retry."""
    headers = {"X-Job-Id": view.id}
    if status == 202:
        headers |= {"Location": f"/jobs/{view.id}", "Retry-After": str(retry_after_s)}
    return Response(job_answer(view, position).model_dump_json(), status, headers, JSON)


def job_problem(view: JobView) -> Problem:
    """Return the problem of a job that ended without a result."""
    error = view.error or JobError(field=None, detail=f"the job {view.status}", reason="worker")
    status = {
        "input": 422, "model": 500, "timeout": 504, "canceled": 410, "expired": 504, "engine": 500, "worker": 500,
    }[error.reason]  # fmt: skip
    detail = error.detail.rstrip(".") + ("; send the request again" if error.reason == "canceled" else "")
    if view.id.startswith(KEY_PREFIX) and detail.endswith(("send the request again", "try again later")):
        detail += " with a new Idempotency-Key"
    detail = as_sentence(detail, error.field)
    errors = [FieldError(field=error.field, detail=detail)] if error.field else []
    return Problem(status, detail, kind=f"job-{error.reason}", errors=errors, headers={"X-Job-Id": view.id})
