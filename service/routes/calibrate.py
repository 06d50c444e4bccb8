"""POST /calibrate and /update: a new model, from the client's own images or from its reviews of a detector."""

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.ood.conformal import check_total
from service import answers
from service.archives import is_archive, max_count, read_archive
from service.http.negotiation import idempotency_key, negotiate
from service.http.openapi import JOB_PROBLEMS, JOB_STATUSES, problem_responses, request_schema
from service.http.problems import Problem, invalid_field
from service.http.requests import Upload, parse_request
from service.jobs import Jobs, JobService
from service.params import CalibrateParams, UpdateParams
from service.rendering import CALIBRATE_OFFERS
from service.settings import MAX_CALIBRATION_IMAGES
from worker.contract import CalibrateJob, ReviewedImage, Task, UpdateJob
from worker.descriptors import ModelDescriptor
from worker.records import MAX_PIXEL_BYTES
from worker.review_store import Verdict

T = TypeVar("T")

router = APIRouter(tags=["models"])

MAX_REASONS = 20
"""Reasons for skipped images that the response lists."""
PAUSE_S = 1.0
"""How long to wait before the next attempt while too many expensive images of others wait for a decoder."""

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.CalibrateAnswer,
        "description": "The new model, and what its verdicts can detect.",
        "headers": answers.RESULT_HEADERS,
    },
    202: answers.ACCEPTED,
    **problem_responses(*JOB_STATUSES, kinds=("calibration-off", *JOB_PROBLEMS)),
}


@router.post(
    "/calibrate",
    operation_id="calibrate",
    summary="Calibrate a model on your own images",
    responses=_RESPONSES,
    openapi_extra=request_schema(
        CalibrateParams, max_images=MAX_CALIBRATION_IMAGES, file_kind="image file, or a zip archive of image files"
    ),
)
async def calibrate(request: Request, jobs: Jobs) -> Response:
    """Calibrate a copy of a model on good images, to which its verdicts then compare other images.

    Send at least 39 images (more for a false-positive rate below 5%), as files or zips; a zip alone can be the body, of
    the type `application/octet-stream`. All images are resized to the model's size. Some are used to estimate the
    statistics, the others to rank images. The response reports what share of altered and foreign images the new model
    detects. Files that are not images are skipped and listed. This takes minutes: `Prefer: respond-async` does not wait
    for it, nor for the images to be decoded.

    The operator must allow calibration with NCML_ALLOW_CALIBRATION=1.

    ```
    curl -F image=@good.zip 'localhost:8000/calibrate?name=bottles'
    curl -F image=@1.png -F image=@2.png ... -H 'Prefer: respond-async' 'localhost:8000/calibrate?name=bottles'
    ```
    """
    _check_allowed(jobs, "ncml calibrate --unseen --data FOLDER --out models/NAME")
    media = negotiate(request.headers, CALIBRATE_OFFERS)
    parsed = await parse_request(request, CalibrateParams, max_images=jobs.settings.max_calibration_images)
    params = parsed.params
    model, version = await jobs.models.find(params, Task.CALIBRATE)
    common, webhook = jobs.job_fields(request, params, model, version)
    await _check_name(request, jobs, params.name)
    _check_count(sum(max_count(upload.data) for upload in parsed.uploads), params)
    job = CalibrateJob(
        **common,
        name=params.name,
        images=0,
        height=model.height,
        width=model.width,
        pixels=b"",
        false_positive_rate=params.false_positive_rate,
    )
    prepare = functools.partial(_prepare, jobs, params, model, parsed.uploads, job)
    return await jobs.run(request, parsed, job, webhook, media, prepare)


@router.post(
    "/update",
    operation_id="update",
    summary="Update a detector with your reviews",
    responses=_RESPONSES,
    openapi_extra=request_schema(UpdateParams, max_images=0),
)
async def update(request: Request, jobs: Jobs) -> Response:
    """Make a new version of a detector, under a new name, from the images that it keeps and from your reviews of it.

    Flagged images that are good join those from which the detector is estimated, never those that rank, so that its
    false-positive rate holds; an image of a scene that ranks is refused. From defective images, the detector learns
    what such defects look like and which views show them. `reviews` reports what has become of both, and `summary`
    compares the versions. The new version keeps copies of the images, those of the reviews included, for further
    updates.

    This takes minutes. What the new version finds is measured on ten altered images, or on fewer once nine tenths of
    NCML_JOB_TIMEOUT_S have passed.

    The detector must have been made with `ncml adapt --keep-images` (`detector.keeps_images` in /models), and the
    operator must allow calibration with NCML_ALLOW_CALIBRATION=1.

    ```
    curl -X POST 'localhost:8000/update?model=bottles&name=bottles-2' -H 'Prefer: respond-async'
    ```
    """
    _check_allowed(jobs, "ncml adapt FOLDER --update NAME --out models/NEW_NAME")
    media = negotiate(request.headers, CALIBRATE_OFFERS)
    parsed = await parse_request(request, UpdateParams, max_images=0)
    params = parsed.params
    model, version = await jobs.models.find(params, Task.UPDATE)
    if model.detector is None or not model.detector.keeps_images:
        fault = "is not a detector" if model.detector is None else "keeps no good images"
        detail = f"model: {model.name} {fault}; name one that was made with ncml adapt --keep-images."
        raise invalid_field("model", detail)
    common, webhook = jobs.job_fields(request, params, model, version)
    await _check_name(request, jobs, params.name)
    if jobs.updating.locked():  # a request that waited would keep its slot from others
        raise Problem(503, "Another update is being prepared; retry in a few seconds.", kind="no-room")
    async with jobs.updating:
        reviewed = await anyio.to_thread.run_sync(_read_reviews, jobs, str(request.state.owner), model.name)
        if not any(reviewed.values()):
            detail = f"model: this key has no reviews for {model.name}; score images with it and review them first."
            raise invalid_field("model", detail)
        job = UpdateJob(
            **common, name=params.name, reviewed=tuple(reviewed["good"]), defective=tuple(reviewed["defective"])
        )
        return await jobs.run(request, parsed, job, webhook, media)


def _read_reviews(jobs: JobService, owner: str, model: str) -> dict[Verdict, list[ReviewedImage]]:
    """Return the images that a client has reviewed, by its verdict."""
    images: dict[Verdict, list[ReviewedImage]] = {"good": [], "defective": []}
    for review in jobs.queue.reviews.find(owner, model):
        file = jobs.queue.reviews.image(owner, review.id)
        if file is not None:  # it may have expired meanwhile
            name = f"{review.id}-{re.sub('[^A-Za-z0-9._-]', '_', review.file)[-80:]}"
            images[review.verdict].append(ReviewedImage(name=name, scene_name=review.file, file=file))
    return images


def _check_allowed(jobs: JobService, command: str) -> None:
    """Raise the 403 `Problem` unless the operator allows clients to make models; it names a command that does so."""
    if not jobs.settings.allow_calibration:
        detail = f"Calibration is off in this service; start it with NCML_ALLOW_CALIBRATION=1, or run {command}."
        raise Problem(403, detail, kind="calibration-off")


async def _check_name(request: Request, jobs: JobService, name: str) -> None:
    if idempotency_key(request.headers):  # the model may be the result of an earlier request with this key
        return
    descriptors = await anyio.to_thread.run_sync(jobs.queue.monitor.models)
    if name in {model.name for model in descriptors}:
        raise invalid_field("name", f"name: a model {name!r} already exists; choose another name.")


def _check_count(count: int, params: CalibrateParams, skipped: Sequence[str] = ()) -> None:
    """Raise `InputError` for too few images; `skipped` explains why others are not usable."""
    try:
        check_total(count, params.false_positive_rate)
    except InputError as error:
        files = "1 other file is" if len(skipped) == 1 else f"{len(skipped)} other files are"
        reasons = f"; {files} not usable: {skipped[0]}" if skipped else "."
        raise InputError("image", f"image: {error.detail.rstrip('.')}{reasons}") from error


async def _prepare(
    jobs: JobService, params: CalibrateParams, model: ModelDescriptor, uploads: list[Upload], job: CalibrateJob
) -> CalibrateJob:
    """Return the job with its images. Raises `InputError` for too few and too many images, and for unusable zips."""
    files = await _unpack(jobs, uploads)
    _check_count(len(files), params)
    room = MAX_PIXEL_BYTES // (model.height * model.width * 3)
    if len(files) > room:
        size = f"{model.height}x{model.width}"
        raise InputError("image", f"image: {len(files)} images of {size} do not fit into a job; send at most {room}.")
    images, skipped = await _decode(jobs, model, files)
    _check_count(len(images), params, skipped)
    pixels = np.stack(images).tobytes()
    return job.model_copy(update={"images": len(images), "pixels": pixels, "skipped": tuple(skipped[:MAX_REASONS])})


async def _unpack(jobs: JobService, uploads: list[Upload]) -> list[Upload]:
    """Return the uploaded files, with zips unpacked. Raises `InputError` beyond the limits of files and bytes."""
    max_files = jobs.settings.max_calibration_images - sum(not is_archive(upload.data) for upload in uploads)
    max_bytes = jobs.settings.max_body_bytes
    files: list[Upload] = []
    for upload in uploads:
        if not is_archive(upload.data):
            files.append(upload)
            continue
        call = functools.partial(
            read_archive, upload.data, field=upload.field, max_files=max_files, max_bytes=max_bytes
        )
        unpacked = [Upload(name, data) for name, data in await _run(jobs, upload.field, call)]
        files += unpacked
        max_files -= len(unpacked)
        max_bytes -= sum(len(file.data) for file in unpacked)
    return files


async def _decode(
    jobs: JobService, model: ModelDescriptor, files: list[Upload]
) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Return the images at the model's size, and why the other files cannot be used.

    Files are decoded one after another, so that the images of other requests find a free decoder.
    """
    images: list[NDArray[np.uint8]] = []
    skipped: list[str] = []
    for file in files:
        named = replace(file, field=file.file or file.field)
        try:
            images.append(await _run(jobs, named.field, jobs.decoding.resizing(named, model)))
        except InputError as error:
            skipped.append(error.detail)
    return images, skipped


async def _run(jobs: JobService, field: str, call: Callable[[], T]) -> T:
    """Run a call in a decoder, as soon as there is room for it: the client has its answer already."""
    while True:
        try:
            return await jobs.decoding.pool.run(field, call)
        except Problem as problem:
            if problem.kind != "no-room":
                raise
            await asyncio.sleep(PAUSE_S)
