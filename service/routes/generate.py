"""POST /generate and POST /complete: new images, and the unknown half of an image."""

import functools
from typing import Any

from fastapi import APIRouter, Request, Response

from ncml.images import place_known_half
from ncml.limits import MAX_SEED, random_seed
from ncml.sampling.defaults import check_refinement, resolve
from service import answers
from service.http.negotiation import JSON, NPZ, PNG, ZIP, negotiate
from service.http.openapi import BINARY, JOB_PROBLEMS, JOB_STATUSES, problem_responses, request_schema
from service.http.problems import invalid_field
from service.http.requests import parse_request
from service.jobs import Jobs, JobService
from service.params import CompleteParams, GenerateParams, SamplingParams
from service.rendering import IMAGE_OFFERS
from worker.contract import CompleteJob, GenerateJob, Pixels, Task
from worker.descriptors import ModelDescriptor

router = APIRouter(tags=["images"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.ImagesAnswer,
        "description": "The images in the format of Accept. Default: a PNG, in which several images form a grid.",
        "content": {PNG: BINARY, ZIP: BINARY, NPZ: BINARY, JSON: {}},
        "headers": answers.IMAGES_HEADERS,
    },
    202: answers.ACCEPTED,
    **problem_responses(*JOB_STATUSES, kinds=JOB_PROBLEMS),
}


@router.post(
    "/generate",
    operation_id="generate",
    summary="Generate images",
    responses=_RESPONSES,
    openapi_extra=request_schema(GenerateParams, max_images=0),
)
async def generate(request: Request, jobs: Jobs) -> Response:
    """Generate new images, unconditionally or of a class. The same seed gives the same image.

    A model that was calibrated on other images than its weights were trained on, or is a detector of them, generates
    those of its weights.

    ```
    curl -X POST 'localhost:8000/generate?class=cat' -o cat.png
    curl -X POST 'localhost:8000/generate?n=16&seed=7' -H 'Accept: application/zip' -o images.zip
    curl --json '{"class": "ship", "n": 4}' -H 'Accept: image/png' localhost:8000/generate -o ships.png
    ```
    """
    parsed = await parse_request(request, GenerateParams, max_images=0)
    media = negotiate(request.headers, IMAGE_OFFERS, parsed.params.format)
    model, version = await jobs.models.find(parsed.params, Task.GENERATE)
    common, webhook = jobs.job_fields(request, parsed.params, model, version)
    job = GenerateJob(**common, **_sampling_fields(jobs, parsed.params, model))
    return await jobs.run(request, parsed, job, webhook, media)


@router.post(
    "/complete",
    operation_id="complete",
    summary="Complete half an image",
    responses=_RESPONSES,
    openapi_extra=request_schema(CompleteParams, max_images=1),
)
async def complete(request: Request, jobs: Jobs) -> Response:
    """Fill in the unknown half of an image; the known half is unchanged, at the model's size.

    There are three ways to give the known half: an image half as high (or as wide) as the model's; an image whose
    unknown half is transparent; or a whole image and `keep`, the half to keep.

    ```
    curl -F image=@half.png localhost:8000/complete -o full.png
    curl -F image=@whole.png -F keep=top -F n=4 localhost:8000/complete -o variants.png
    ```
    """
    parsed = await parse_request(request, CompleteParams, max_images=1)
    params, upload = parsed.params, parsed.uploads[0]
    media = negotiate(request.headers, IMAGE_OFFERS, params.format)
    model, version = await jobs.models.find(params, Task.COMPLETE)
    common, webhook = jobs.job_fields(request, params, model, version)
    call = functools.partial(
        place_known_half,
        upload.data,
        model.height,
        model.width,
        keep=params.keep,
        keeps=model.keeps,
        **jobs.settings.image_limits,
    )
    canvas, keep = await jobs.decoding.run(request, upload.field, call)
    job = CompleteJob(
        **common,
        **_sampling_fields(jobs, params, model),
        image=Pixels(height=model.height, width=model.width, data=canvas.tobytes()),
        keep=keep,
    )
    return await jobs.run(request, parsed, job, webhook, media)


def _sampling_fields(jobs: JobService, params: SamplingParams, model: ModelDescriptor) -> dict[str, Any]:
    """Return the fields of sampling jobs, validated against the model; choose a random seed if none is given."""
    if params.n > jobs.settings.max_images:
        raise invalid_field("n", f"n is {params.n}; this service generates at most {jobs.settings.max_images} at once.")
    options, has_class = params.sampling, params.class_name is not None
    check_refinement(options)
    resolve(options, model.sampling_limits, has_class=has_class)  # refuse now what the worker would refuse later
    max_seed = MAX_SEED - params.n + 1
    seed = random_seed(params.n) if params.seed is None else params.seed
    if seed > max_seed:
        raise invalid_field("seed", f"seed is {seed}; with n = {params.n} it must be at most {max_seed}.")
    return params.model_dump(exclude={"model", "priority", "webhook", "format", "keep"}) | {"seed": seed}
