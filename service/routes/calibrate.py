"""POST /calibrate: a new model, calibrated on the client's own images."""

import functools
from dataclasses import replace

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Request, Response

from ncml.errors import InputError
from service import answers
from service.archives import is_archive, read_archive
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

router = APIRouter(tags=["models"])

MAX_REASONS = 20
"""Reasons for skipped images that the response lists."""


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
    minutes: `Prefer: respond-async` does not wait for it.

    The operator must allow calibration with NCML_ALLOW_CALIBRATION=1.

    ```
    curl -F image=@good.zip 'localhost:8000/calibrate?name=bottles'
    curl -F image=@1.png -F image=@2.png ... -H 'Prefer: respond-async' 'localhost:8000/calibrate?name=bottles'
    ```
    """
    if not jobs.settings.allow_calibration:
        detail = (
            "Calibration is off in this service; start it with NCML_ALLOW_CALIBRATION=1, or run ncml adapt FOLDER "
            "--out models/NAME."
        )
        raise Problem(403, detail, kind="calibration-off")
    media = negotiate(request.headers, CALIBRATE_OFFERS)
    parsed = await parse_request(request, CalibrateParams, max_images=jobs.settings.max_calibration_images)
    params = parsed.params
    model, version = await jobs.find_model(params, Task.CALIBRATE)
    common = jobs.job_fields(request, params, model, version)
    if not idempotency_key(request.headers):  # the model may be the result of an earlier request with this key
        await _check_name(jobs, params.name)
    async with jobs.unpacking:
        files = await _unpack(request, jobs, parsed.uploads)
        room = MAX_PIXEL_BYTES // (model.height * model.width * 3)
        if len(files) > room:
            size = f"{model.height}x{model.width}"
            raise invalid_field(
                "image", f"image: {len(files)} images of {size} do not fit into a job; send at most {room}."
            )
        images, skipped = await _decode(request, jobs, model, files)
        job = CalibrateJob(
            **common,
            name=params.name,
            images=len(images),
            height=model.height,
            width=model.width,
            pixels=np.stack(images).tobytes(),
            false_positive_rate=params.false_positive_rate,
            skipped=tuple(skipped[:MAX_REASONS]),
        )
        return await jobs.run(request, parsed, job, media)


async def _check_name(jobs: JobService, name: str) -> None:
    descriptors = await anyio.to_thread.run_sync(jobs.queue.monitor.models)
    if name in {model.name for model in descriptors}:
        raise invalid_field("name", f"name: a model {name!r} already exists; choose another name.")


async def _unpack(request: Request, jobs: JobService, uploads: list[Upload]) -> list[Upload]:
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
        unpacked = [Upload(name, data) for name, data in await jobs.decode(request, upload.field, call)]
        files += unpacked
        max_files -= len(unpacked)
        max_bytes -= sum(len(file.data) for file in unpacked)
    return files


async def _decode(
    request: Request, jobs: JobService, model: ModelDescriptor, files: list[Upload]
) -> tuple[list[np.ndarray], list[str]]:
    """Return the images at the model's size, and why the other files cannot be used.

    Files are decoded one after another, so that the images of other requests find a free decoder.
    """
    if not files:
        raise invalid_field("image", "image: the zip contains no files; send images.")
    images: list[np.ndarray] = []
    skipped: list[str] = []
    for file in files:
        try:
            named = replace(file, field=file.file or file.field)
            images.append(await jobs.decode_resized(request, named, model))
        except InputError as error:
            skipped.append(error.detail)
    if not images:
        raise invalid_field("image", f"image: none of {len(files)} files is a usable image: {skipped[0]}")
    return images, skipped
