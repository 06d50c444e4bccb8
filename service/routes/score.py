"""POST /score: exact likelihoods and verdicts of images; with tile=1 the out-of-distribution verdict on a large one."""

import functools
from typing import Literal

from fastapi import APIRouter, Request, Response

from ncml.images.tiling import Tiling, smallest_tile_side
from ncml.limits import DETECTOR, MAX_IMAGES_PER_REQUEST, MAX_JUDGED_IMAGES, MAX_JUDGED_PIXELS
from ncml.options import ScoreOptions, leaves_verdict_to_detector
from service import answers
from service.decoder import OriginalImage, TiledImage, open_for_tiles
from service.http import examples
from service.http.negotiation import JSON, NPZ, PNG, negotiate
from service.http.openapi import BINARY, JOB_PROBLEMS, JOB_STATUSES, problem_responses, request_schema
from service.http.problems import Problem, invalid_field
from service.http.requests import Upload, parse_request
from service.http.validation import FieldError
from service.jobs import Jobs, JobService
from service.params import ScoreParams
from service.rendering import SCORE_OFFERS
from worker.contract import Original, Pixels, ScanJob, ScoreJob, Task
from worker.descriptors import Calibration, ModelDescriptor

router = APIRouter(tags=["images"])

OPTIONS_WITHOUT_TILES = ("class_name", "statistics", *(name for name in ScoreOptions.model_fields if name != "map"))
"""The options of a score that apply to images at the model's size only."""

MAX_RAW_BYTES = 4 * 2**20
"""Size up to which a scan's pixels are sent to the worker even if the image file is smaller. Beyond it, the smaller of
the two is sent; a file has been decoded within the limits before."""


@router.post(
    "/score",
    operation_id="score",
    summary="Score images",
    responses={
        200: {
            "model": answers.ScoreAnswer | answers.ScanAnswer,
            "description": "The scores, in the order of the images; with tile=1 the verdict on the whole image. "
            "A PNG shows the map, that of a detector over the image, reduced to at most 1024 pixels; several form a "
            "grid.",
            "content": {NPZ: BINARY, PNG: BINARY, JSON: {"examples": examples.SCORES}},
            "headers": answers.RESULT_HEADERS,
        },
        202: answers.ACCEPTED,
        **problem_responses(*JOB_STATUSES, kinds=(*JOB_PROBLEMS, "too-many-images")),
    },
    openapi_extra=request_schema(ScoreParams, max_images=MAX_IMAGES_PER_REQUEST),
)
async def score(request: Request, jobs: Jobs) -> Response:
    """Return bits per dimension and log-likelihood of one or several images, each resized to the model's size.

    A calibrated model adds an out-of-distribution verdict, `ood`, whose p-value is small for an image unlike those that
    the model was calibrated on. The verdict always uses the conditions of the calibration, independently of `class` and
    `noise`.

    If the model is a detector (`detector` in /models), it judges each image at its own size, unless `ood=0`, another
    `calibration` or a `statistic` is named: `detection` has the view with the largest part in the score, the part of
    the image that it points at, and how many good images are at least as unusual. A request may then hold four images,
    of 33 megapixels in all, which take some tenths of a second each. Bits per dimension are still those at the model's
    size.

    With `tile=1` one large image is split into overlapping tiles instead, and judged by three views of their scores:
    the worst tile, the sharpest peak and the mean. If the model's tiles are calibrated, the response has the image's
    rank among whole good images over all views, and score and box of the view in which it differs most from them.
    This takes as long as scoring every tile; `Prefer: respond-async` does not wait for it.

    ```
    curl -F image=@cat.png localhost:8000/score
    curl -F image=@cat.png -F image=@dog.png -F class=cat localhost:8000/score
    curl --data-binary @cat.png -H 'Content-Type: image/png' 'localhost:8000/score?map=1'
    curl -F image=@cat.png -H 'Accept: image/png' localhost:8000/score -o map.png
    curl -F image=@cat.png -F statistics=all -F sanity=1 localhost:8000/score
    curl -F image=@cat.png -F calibration=tolerant localhost:8000/score
    curl -F image=@cat.png 'localhost:8000/score?ood=0'
    curl -F image=@docs/brick.png -F tile=1 localhost:8000/score
    curl -F image=@docs/brick.png -F tile=1 -F tile_size=64 -H 'Accept: image/png' localhost:8000/score -o map.png
    ```
    """
    parsed = await parse_request(request, ScoreParams, max_images=jobs.settings.max_images)
    params, uploads = parsed.params, parsed.uploads
    media = negotiate(request.headers, SCORE_OFFERS, params.format)
    if media == PNG and not params.map and "map" in params.model_fields_set:
        raise invalid_field(
            "map", "map=0 cannot be combined with a PNG, which shows the map; omit map, or request JSON."
        )
    _check_tile_options(params, len(uploads))
    model, version = await jobs.models.find(params, Task.SCAN if params.tile else Task.SCORE)
    common, webhook = jobs.job_fields(request, params, model, version)
    if params.tile:
        image = await _open_for_tiles(request, jobs, params, model, uploads[0])
        scan = ScanJob(
            **common,
            pixels=image.pixels,
            file=uploads[0].data if image.pixels is None else None,
            height=image.height,
            width=image.width,
            tile_size=params.tile_size,
            map=params.map or media != JSON,
        )
        return await jobs.run(request, parsed, scan, webhook, media)
    statistics = _check_statistics(params, model)
    options = params.scoring
    options["map"] |= media == PNG
    originals: tuple[Original, ...] = ()
    async with jobs.decoding.time_limit():
        if _uses_detector(params, model):
            _check_count(len(uploads))
            options |= {"calibration": DETECTOR, "map": params.map or media != JSON}
            decoded = [await jobs.decoding.original(request, upload, model) for upload in uploads]
            _check_count(len(decoded), sum(image.height * image.width for image in decoded))
            images = [image.resized for image in decoded]
            originals = tuple(map(_as_original, decoded, uploads))
        else:
            images = [await jobs.decoding.resized(request, upload, model) for upload in uploads]
    job = ScoreJob(
        **common,
        images=tuple(Pixels(height=model.height, width=model.width, data=image.tobytes()) for image in images),
        originals=originals,
        class_name=params.class_name,
        statistics=statistics,
        **options,
    )
    return await jobs.run(request, parsed, job, webhook, media)


def _uses_detector(params: ScoreParams, model: ModelDescriptor) -> bool:
    """Return whether a detector gives the verdict, at images' own sizes."""
    is_left = leaves_verdict_to_detector(params.calibration, params.statistic)
    return model.detector is not None and params.ood and is_left


def _check_count(image_count: int, pixels: int = 0) -> None:
    """Refuse images that would keep the lane of quick scores busy for long."""
    if image_count > MAX_JUDGED_IMAGES:
        subject, limit = f"{image_count} images", f"{MAX_JUDGED_IMAGES}"
    elif image_count > 1 and pixels > MAX_JUDGED_PIXELS:
        subject, limit = f"{image_count} images of {pixels} pixels", f"{MAX_JUDGED_PIXELS} pixels of several images"
    else:
        return
    detail = f"image: {subject} were sent; a detector judges at most {limit} in one request, so send fewer at once."
    raise Problem(422, detail, kind="too-many-images", errors=[FieldError(field="image", detail=detail)])


def _as_original(image: OriginalImage, upload: Upload) -> Original:
    file = upload.data if image.pixels is None else None
    return Original(pixels=image.pixels, file=file, height=image.height, width=image.width)


def _check_tile_options(params: ScoreParams, image_count: int) -> None:
    """Refuse parameters that cannot be combined with `tile`, or that need it."""
    if not params.tile:
        if params.tile_size is not None:
            raise invalid_field("tile_size", "tile_size requires tile=1; add it, or omit tile_size.")
        return
    for attribute in OPTIONS_WITHOUT_TILES:
        field = ScoreParams.model_fields[attribute]
        if getattr(params, attribute) != field.default:
            name = field.alias or attribute
            raise invalid_field(name, f"{name} cannot be combined with tile=1; omit {name} or tile.")
    if image_count > 1:
        raise invalid_field("image", f"image: {image_count} images were sent; with tile=1 send one at a time.")


async def _open_for_tiles(
    request: Request, jobs: JobService, params: ScoreParams, model: ModelDescriptor, upload: Upload
) -> TiledImage:
    """Decode an image and check that it can be tiled."""
    if model.default_calibration is None and model.tiles is None:
        if model.detector is not None:
            raise invalid_field("tile", f"tile: {model.name} judges whole images at their own size; omit tile.")
        raise invalid_field("tile", f"tile: {model.name} is not calibrated; omit tile, or calibrate the model.")
    calibrated = model.tiles and Tiling(model.tiles.height, model.tiles.width, model.tiles.overlap)
    tile = Tiling.resolve(model.height, model.width, params.tile_size, calibrated)
    max_raw_bytes = max(len(upload.data), MAX_RAW_BYTES)
    call = functools.partial(open_for_tiles, upload.data, max_raw_bytes=max_raw_bytes, **jobs.settings.image_limits)
    image = await jobs.decoding.run(request, upload.field, call)
    height, width = image.height, image.width
    rows, columns = tile.grid_shape(height, width)
    limit = jobs.settings.max_tiles
    if rows * columns > limit:
        smallest = None if calibrated else smallest_tile_side((model.height, model.width), (height, width), limit)
        remedy = f"set tile_size to at least {smallest}" if smallest else "send it in parts"
        raise invalid_field(
            "image",
            f"image is {width} x {height} pixels, which makes {rows * columns} tiles of {tile.width} x {tile.height}; "
            f"at most {limit} are scored, so {remedy}.",
        )
    return image


def _check_statistics(params: ScoreParams, model: ModelDescriptor) -> tuple[str, ...] | Literal["all"]:
    """Return the statistics to compute after checking the parameters against the model."""
    if params.noise > model.noise:
        detail = f"noise is {params.noise:g}; {model.name} accepts 0 to {model.noise:g} grey levels."
        raise invalid_field("noise", detail)
    if params.sanity and (params.noise or params.class_name):
        detail = "sanity: flipped bits are scored without noise and class; omit those, or sanity."
        raise invalid_field("sanity", detail)
    calibration = _check_calibration(params, model)
    uses_detector = _uses_detector(params, model)
    names = tuple(dict.fromkeys(name.strip() for name in (params.statistics or "").split(",") if name.strip()))
    for field, statistic in (("statistic", params.statistic), *(("statistics", name) for name in names)):
        if statistic is None:
            continue
        if not params.ood:
            raise invalid_field(field, f"{field} cannot be combined with ood=0; omit one of the two.")
        if uses_detector:
            detail = f"{field}: a detector has views instead of statistics; omit {field}, or name another calibration."
            raise invalid_field(field, detail)
        if calibration is None:
            detail = f"{field}: {model.name} is not calibrated; omit {field}, or calibrate the model."
            raise invalid_field(field, detail)
        available = calibration.thresholds
        if statistic not in available and not (field == "statistics" and names == ("all",)):
            detail = f"{field}: {model.name} has no statistic {statistic!r}; it has {', '.join(available)}."
            raise invalid_field(field, detail)
    return "all" if names == ("all",) else names


def _check_calibration(params: ScoreParams, model: ModelDescriptor) -> Calibration | None:
    """Return the calibration of a verdict at the model's size, if there is one, after checking its name."""
    name = params.calibration
    if name is None:
        return model.default_calibration
    if not params.ood:
        raise invalid_field("calibration", "calibration cannot be combined with ood=0; omit one of the two.")
    if name == DETECTOR and model.detector is not None:
        return None
    if name not in model.calibrations:
        names = [*([] if model.detector is None else [DETECTOR]), *model.calibrations]
        remedy = f"it has {', '.join(names)}" if names else "it is not calibrated"
        raise invalid_field("calibration", f"calibration: {model.name} has no calibration {name!r}; {remedy}.")
    return model.calibrations[name]
