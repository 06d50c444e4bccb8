"""/models/{name}/reviews: what a client knows better than the verdict of a detector."""

import functools
from datetime import datetime
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.http import examples
from service.http.negotiation import JSON
from service.http.openapi import BINARY, problem_responses, request_schema
from service.http.problems import Problem, invalid_field
from service.http.requests import parse_request
from service.jobs import MEMORY_RETRY_AFTER_S, Jobs, JobService
from service.params import ReviewParams
from service.routes.models import JPEG, Name
from worker.contract import REVIEW_ID
from worker.job_results import ScoreResult
from worker.queue import JobNotFound
from worker.review_store import NoRoomForReview, Verdict

router = APIRouter(prefix="/models", tags=["reviews"])

DAY_S = 86_400
RETRY_AFTER_S = 3600
"""Seconds after which a client may retry when the reviews of all keys use all their space: they expire after days."""

ReviewId = Annotated[str, Path(description="The id of a review.", pattern=REVIEW_ID)]


class ReviewAnswer(BaseModel):
    """A review, without its image."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.REVIEW})

    id: str = Field(description="The same for every review of an image with one key: a later one replaces it.")
    model: str
    verdict: Verdict
    file: str = Field(description="The name that the client gave the file.")
    is_ood: bool = Field(description="Whether the detector flagged the image.")
    p_value: float = Field(description="Its p-value.")
    size: int = Field(description="Bytes of the file.")
    created_at: datetime
    expires_at: datetime = Field(description="When the service deletes it.")


class ReviewsAnswer(BaseModel):
    """The reviews of a model with the key of the request, the oldest first."""

    model_config = ConfigDict(json_schema_extra={"example": {"reviews": [examples.REVIEW]}})

    reviews: list[ReviewAnswer]


@router.post(
    "/{name}/reviews",
    operation_id="review",
    summary="Review an image",
    status_code=201,
    response_model=ReviewAnswer,
    responses=problem_responses(
        400, 401, 403, 404, 413, 415, 422, 429, 503,
        kinds=("no-such-job", "result-expired", "invalid-input", "cross-site", "too-many-reviews", "queue-full",
               "too-many-uploads", "queue-down", "no-room", "stopping"),
    ),
    openapi_extra=request_schema(ReviewParams, max_images=1, has_job=False),
)  # fmt: skip
async def review(name: Name, request: Request, jobs: Jobs) -> Response:
    """Keep an image that a detector has judged for this key, and whether it is good or defective.

    `job` is the job that judged it, of at most an hour ago, and the file must be the same, byte for byte. An image that
    was not flagged can be reviewed as defective only. A new version of the detector (/update) learns from the images.

    Only the key that sent a review can list, use and delete it. It is deleted after the time of NCML_REVIEW_DAYS.

    ```
    curl -F image=@1.png 'localhost:8000/score?model=bottles'
    curl -F image=@1.png -F job=$ID -F verdict=good localhost:8000/models/bottles/reviews
    ```
    """
    parsed = await parse_request(request, ReviewParams, max_images=1)
    [upload], [digest] = parsed.uploads, parsed.digests
    model = name.partition("@")[0]
    is_ood, p_value = await _find_verdict(request, jobs, model, parsed.params.job, digest)
    if parsed.params.verdict == "good" and not is_ood:
        detail = f"verdict: {model} did not flag this image; only flagged images can be reviewed as good."
        raise invalid_field("verdict", detail)
    async with jobs.decoding.time_limit():
        thumbnail = await jobs.decoding.thumbnail(request, upload)
    owner_bytes = jobs.settings.owner_review_bytes
    add = functools.partial(
        jobs.queue.reviews.add,
        str(request.state.owner),
        model,
        parsed.params.verdict,
        upload.data,
        thumbnail=thumbnail,
        file=upload.file,
        is_ood=is_ood,
        p_value=p_value,
        keep_s=jobs.settings.review_days * DAY_S,
        owner_bytes=owner_bytes,
        all_bytes=jobs.settings.max_review_bytes,
    )
    try:
        kept = await anyio.to_thread.run_sync(add)
    except NoRoomForReview as error:
        kind, pause_s = "too-many-reviews", RETRY_AFTER_S
        if error.limit == "own":
            detail = f"Your reviews and thumbnails would take more than {owner_bytes} bytes; delete some reviews."
        elif error.limit == "all":
            detail = "The reviews of all clients use all the space for reviews; retry later."
        else:
            kind, pause_s = "queue-full", MEMORY_RETRY_AFTER_S
            detail = f"The queue is short of memory until earlier results expire; retry in {pause_s} s."
        raise Problem(429, detail, kind=kind, headers={"Retry-After": str(pause_s)}) from error
    return Response(ReviewAnswer.model_validate(kept).model_dump_json(), 201, media_type=JSON)


@router.get(
    "/{name}/reviews",
    operation_id="list_reviews",
    summary="List the reviews of a model",
    responses=problem_responses(401, 422, 503, kinds=("invalid-input", "queue-down")),
)
async def reviews(name: Name, request: Request, jobs: Jobs) -> ReviewsAnswer:
    """Return the reviews of a model that were sent with the key of this request.

    ```
    curl localhost:8000/models/bottles/reviews
    ```
    """
    model = name.partition("@")[0]
    kept = await anyio.to_thread.run_sync(jobs.queue.reviews.find, str(request.state.owner), model)
    return ReviewsAnswer(reviews=[ReviewAnswer.model_validate(review) for review in kept])


@router.get(
    "/{name}/reviews/{review_id}/thumbnail",
    operation_id="get_review_thumbnail",
    summary="Get a thumbnail of a reviewed image",
    response_class=Response,
    responses={200: {"description": "A JPEG.", "content": {JPEG: BINARY}}}
    | problem_responses(401, 404, 422, 503, kinds=("no-such-review", "invalid-input", "queue-down")),
)
async def review_thumbnail(name: Name, review_id: ReviewId, request: Request, jobs: Jobs) -> Response:
    """Return a reviewed image, reduced to at most 128 pixels on a side. 404 for that of another key.

    ```
    curl localhost:8000/models/bottles/reviews/$REVIEW/thumbnail -o thumbnail.jpg
    ```
    """
    owner, model = str(request.state.owner), name.partition("@")[0]
    thumbnail = await anyio.to_thread.run_sync(jobs.queue.reviews.thumbnail, owner, model, review_id)
    if thumbnail is None:
        raise _no_such_review(model, review_id)
    return Response(thumbnail, media_type=JPEG)


@router.delete(
    "/{name}/reviews/{review_id}",
    operation_id="delete_review",
    summary="Delete a review",
    status_code=204,
    responses=problem_responses(401, 404, 422, 503, kinds=("no-such-review", "invalid-input", "queue-down")),
)
async def delete_review(name: Name, review_id: ReviewId, request: Request, jobs: Jobs) -> Response:
    """Delete a review with its image at once. 404 for that of another key.

    ```
    curl -X DELETE localhost:8000/models/bottles/reviews/$REVIEW
    ```
    """
    owner, model = str(request.state.owner), name.partition("@")[0]
    if not await anyio.to_thread.run_sync(jobs.queue.reviews.remove, owner, model, review_id):
        raise _no_such_review(model, review_id)
    return Response(status_code=204)


def _no_such_review(model: str, review_id: str) -> Problem:
    detail = f"There is no review {review_id} of this client for {model}; list them to find its id."
    return Problem(404, detail, kind="no-such-review")


async def _find_verdict(request: Request, jobs: JobService, model: str, job_id: str, digest: str) -> tuple[bool, float]:
    """Return whether a detector flagged the image of a file in a job, by its SHA-256, and the image's p-value.

    Raises the 404 `Problem` if this client has no such job, and the 422 one for an image that the job did not judge.
    """
    try:
        view = await jobs.view(request, job_id)
    except JobNotFound as error:
        detail = "job: the job does not exist or has expired; score the image again, and review it then."
        raise Problem(404, detail, kind="no-such-job") from error
    if view.model_name != model or digest not in view.digests:
        detail = f"image: {model} did not judge this file as a detector in the job; score it first, and send it again."
        raise invalid_field("image", detail)
    result = await anyio.to_thread.run_sync(jobs.queue.result, job_id)
    detection = result.results[view.digests.index(digest)].detection if isinstance(result, ScoreResult) else None
    if detection is None:
        raise invalid_field("job", f"job: {job_id} has not succeeded, so there is no verdict to review; score again.")
    return detection.is_ood, detection.p_value
