"""POST /calibrate: a new model, calibrated on the client's own images."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

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
from service.params import CalibrateParams
from service.rendering import CALIBRATE_OFFERS
from service.settings import MAX_CALIBRATION_IMAGES
from worker.contract import CalibrateJob, Task
from worker.descriptors import ModelDescriptor
from worker.records import MAX_PIXEL_BYTES

T = TypeVar("T")

router = APIRouter(tags=["models"])

MAX_REASONS = 20
"""Reasons for skipped images that the response lists."""
PAUSE_S = 1.0
"""How long to wait before the next attempt while too many expensive images of others wait for a decoder."""


@router.post(
    "/calibrate",
    operation_id="calibrate",
    summary="Calibrate a model on your own images",
    responses={
        200: {"model": answers.CalibrateAnswer, "description": "The new model, and what its verdicts can detect."},
        202: answers.ACCEPTED,
        **problem_responses(*JOB_STATUSES, kinds=("calibration-off", *JOB_PROBLEMS)),
    },
    openapi_extra=request_schema(CalibrateParams, max_images=MAX_CALIBRATION_IMAGES),
)
async def calibrate(request: Request, jobs: Jobs) -> Response:
    """Calibrate a copy of a model on good images, to which its verdicts then compare other images.

    Send at least 39 images (more for a false-positive rate below 5%), as files or zips; all are resized to the model's
    size. Some are used to estimate the statistics, the others to rank images. The response reports what share of
    altered and foreign images the new model detects. Files that are not images are skipped and listed. This takes
    minutes: `Prefer: respond-async` does not wait for it, nor for the images to be decoded.

    The operator must allow calibration with NCML_ALLOW_CALIBRATION=1.

    ```
    curl -F image=@good.zip 'localhost:8000/calibrate?name=bottles'
    curl -F image=@1.png -F image=@2.png ... -H 'Prefer: respond-async' 'localhost:8000/calibrate?name=bottles'
    ```
    """
    if not jobs.settings.allow_calibration:
        detail = (
            "Calibration is off in this service; start it with NCML_ALLOW_CALIBRATION=1, or run ncml calibrate "
            "--unseen --data FOLDER --out models/NAME."
        )
        raise Problem(403, detail, kind="calibration-off")
    media = negotiate(request.headers, CALIBRATE_OFFERS)
    parsed = await parse_request(request, CalibrateParams, max_images=jobs.settings.max_calibration_images)
    params = parsed.params
    model, version = await jobs.find_model(params, Task.CALIBRATE)
    common = jobs.job_fields(request, params, model, version)
    if not idempotency_key(request.headers):  # the model may be the result of an earlier request with this key
        await _check_name(jobs, params.name)
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
    return await jobs.run(request, parsed, job, media, prepare)


async def _check_name(jobs: JobService, name: str) -> None:
    descriptors = await anyio.to_thread.run_sync(jobs.queue.monitor.models)
    if name in {model.name for model in descriptors}:
        raise invalid_field("name", f"name: a model {name!r} already exists; choose another name.")


def _check_count(count: int, params: CalibrateParams, skipped: Sequence[str] = ()) -> None:
    """Raise `InputError` for too few images; `skipped` explains why others are not usable."""
    try:
        check_total(count, params.false_positive_rate)
    except InputError as error:
        reasons = f"; {len(skipped)} other files are not usable: {skipped[0]}" if skipped else "."
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
            images.append(await _run(jobs, named.field, jobs.resizing(named, model)))
        except InputError as error:
            skipped.append(error.detail)
    return images, skipped


async def _run(jobs: JobService, field: str, call: Callable[[], T]) -> T:
    """Run a call in a decoder, as soon as there is room for it: the client has its answer already."""
    while True:
        try:
            return await jobs.decoders.run(field, call)
        except Problem as problem:
            if problem.kind != "no-room":
                raise
            await asyncio.sleep(PAUSE_S)
