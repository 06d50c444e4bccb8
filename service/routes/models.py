"""/models: the models that live workers serve."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, Field

from ncml.limits import MAX_JUDGED_IMAGES
from service.http.openapi import BINARY, problem_responses
from service.http.problems import Problem
from service.jobs import Jobs, JobService
from service.model_selection import ModelList, etag_of
from worker.descriptors import Calibration, ModelDescriptor

router = APIRouter(prefix="/models", tags=["models"])

JPEG = "image/jpeg"
ETAG = {"description": "Identifies the content, for `If-None-Match`.", "schema": {"type": "string"}}
Name = Annotated[str, Path(description="`name`, or `name@version`.", max_length=200)]


class ServedModel(ModelDescriptor):
    """A model that live workers serve."""

    calibration: Calibration | None = Field(default=None, description="the one named default; null if there is none")
    default: bool = Field(description="whether it serves requests that name no model")


class Models(BaseModel):
    """The models that live workers serve."""

    models: list[ServedModel]
    unusable: dict[str, str] = Field(description="why workers cannot use the models in further folders, by name")
    next: str | None = Field(default=None, description="`after` of the next page; null on the last one")
    calibration_allowed: bool = Field(description="whether clients may make models with /calibrate and /update")
    webhooks_allowed: bool = Field(description="whether requests may name a `webhook` (NCML_WEBHOOK_HOSTS)")
    max_images: int = Field(description="maximum images sent or requested in one request")
    max_judged_images: int = Field(description="maximum images that a detector judges in one request")
    max_tiles: int = Field(description="maximum tiles of an image")
    max_body_bytes: int = Field(description="maximum bytes of a request body")


@router.get(
    "",
    operation_id="list_models",
    summary="List the models",
    response_model=Models,
    responses={
        200: {"headers": {"ETag": ETAG}},
        304: {
            "description": "Nothing has changed since the response with the `ETag` in `If-None-Match`.",
            "headers": {"ETag": ETAG},
        },
    }
    | problem_responses(401, 422, 503, kinds=("invalid-input", "queue-down")),
)
async def models(
    jobs: Jobs,
    limit: Annotated[
        int | None, Query(ge=1, le=1000, description="Names of models on a page. Default: all models on one page.")
    ] = None,
    after: Annotated[str, Query(max_length=200, description="`next` of the previous page.")] = "",
    if_none_match: Annotated[str, Header(alias="If-None-Match", description="The `ETag` of the last response.")] = "",
) -> Response:
    """Return name, version, size, classes, default settings, calibration, batching, metrics and card of every model.

    `detector` describes how a model judges images at their own size: its rate, and the shares of altered good images
    that it finds.

    `default` marks the model of requests that name none: that of NCML_DEFAULT_MODEL, else the bundled one, else the
    first by name.

    ```
    curl localhost:8000/models
    ```

    A document has some 30 kB for each model. If there are hundreds, get them in pages, which have all versions of each
    name:

    ```
    curl 'localhost:8000/models?limit=50'
    ```

    A client that repeats the request sends the `ETag` of the last response in `If-None-Match`, as browsers do: while
    nothing has changed, the response is an empty 304.
    """
    descriptors = await _served_models(jobs)
    faults = await anyio.to_thread.run_sync(jobs.queue.monitor.faults)
    if limit is None and not after:
        latest = jobs.model_list
        if latest is None or not latest.is_of(descriptors, faults):
            latest = jobs.model_list = ModelList(descriptors, faults, _page(jobs, descriptors, faults, None, ""))
        body, etag = latest.body, latest.etag
    else:
        body = _page(jobs, descriptors, faults, limit, after)
        etag = etag_of(body)
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag in if_none_match:
        return Response(None, 304, headers)
    return Response(body, 200, headers, "application/json")


def _page(
    jobs: JobService, descriptors: list[ModelDescriptor], faults: dict[str, str], limit: int | None, after: str
) -> bytes:
    """Return a page of the models as JSON."""
    served = {model.name for model in descriptors}
    names = sorted(name for name in served if name > after)
    page = set(names[:limit])
    selected = sorted((model for model in descriptors if model.name in page), key=lambda model: model.name)
    document = Models(
        models=_mark_default(jobs, selected, descriptors),
        unusable={name: fault for name, fault in sorted(faults.items()) if name not in served},
        next=max(page) if len(page) < len(names) else None,
        calibration_allowed=jobs.settings.allow_calibration,
        webhooks_allowed=bool(jobs.settings.webhook_hosts),
        max_images=jobs.settings.max_images,
        max_judged_images=MAX_JUDGED_IMAGES,
        max_tiles=jobs.settings.max_tiles,
        max_body_bytes=jobs.settings.max_body_bytes,
    )
    return document.model_dump_json().encode()


@router.get(
    "/{name}",
    operation_id="get_model",
    summary="Get one model",
    responses=problem_responses(401, 404, 422, 503, kinds=("no-such-model", "invalid-input", "no-model", "queue-down")),
)
async def model(name: Name, jobs: Jobs) -> ServedModel:
    """Return a model by name, or by name and version (at least its first six digits).

    ```
    curl localhost:8000/models/cifar10
    curl localhost:8000/models/cifar10@9f2c61
    ```
    """
    descriptors = await _served_models(jobs)
    return _mark_default(jobs, [await _find(jobs, descriptors, name)], descriptors)[0]


@router.get(
    "/{name}/pictures",
    operation_id="get_pictures",
    summary="Get pictures of what a detector finds and misses",
    response_class=Response,
    responses={200: {"description": "A JPEG.", "content": {JPEG: BINARY}}}
    | problem_responses(
        401, 404, 422, 503, kinds=("no-such-model", "no-pictures", "invalid-input", "no-model", "queue-down")
    ),
)
async def pictures(name: Name, jobs: Jobs) -> Response:
    """Return a sheet of altered good images: of each alteration, the first that is missed and the first that is found.

    `detector.power.pictures` of the model lists what each picture shows, and where it lies on the sheet. Marks surround
    what has changed; where that is the whole image, the left half is unaltered.

    ```
    curl localhost:8000/models/bottles/pictures -o pictures.jpg
    ```
    """
    descriptors = await _served_models(jobs)
    detector = (await _find(jobs, descriptors, name)).detector
    shown = detector and detector.power and detector.power.pictures
    sheet = await anyio.to_thread.run_sync(jobs.queue.monitor.pictures, shown.sha256) if shown else None
    if sheet is None:
        raise Problem(
            404,
            f"{name} has no pictures of what it finds and misses; only detectors whose power was measured have some.",
            kind="no-pictures",
        )
    return Response(sheet, media_type=JPEG)


async def _served_models(jobs: JobService) -> list[ModelDescriptor]:
    """Return the models of live workers; raise the 503 `Problem` if there are none because the queue refuses them."""
    descriptors = await anyio.to_thread.run_sync(jobs.queue.monitor.models)
    if not descriptors and (refusal := await anyio.to_thread.run_sync(jobs.queue.monitor.refusal)):
        raise Problem(503, f"The queue refuses new jobs: {refusal}.", kind="queue-down")
    return descriptors


async def _find(jobs: JobService, served: list[ModelDescriptor], name: str) -> ModelDescriptor:
    """Return a served model; raise the 404 `Problem` if there is none, or 503 while workers load theirs."""
    try:
        return (await jobs.models.find_in(served, name))[0]
    except Problem as error:
        if error.status != 422:
            raise
        raise Problem(404, error.detail, kind="no-such-model") from error


def _mark_default(jobs: JobService, models: list[ModelDescriptor], served: list[ModelDescriptor]) -> list[ServedModel]:
    """Return the models with their mark; none is the default if the setting names a model that is not served."""
    try:
        default = jobs.models.select(served, None)[0]
    except Problem:
        default = None
    return [
        ServedModel(**dict(model), calibration=model.default_calibration, default=model == default) for model in models
    ]
