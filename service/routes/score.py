"""POST /score: how likely a picture is, and with tile=1 whether a large one has a part that does not belong."""

from typing import Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from ncml.images import open_image, resize_to
from ncml.images.tiling import TileSize, smallest_tile_side
from service import answers, problems, reading
from service.asking import Desk, Here
from service.negotiation import BINARY, JSON, NPZ, PNG, negotiate
from service.params import ScoreParams
from service.problems import invalid
from service.reading import Upload
from worker.contract import MAX_IMAGES, ModelDescriptor, Pixels, ScanJob, ScoreJob, Task

router = APIRouter(tags=["pictures"])


@router.post(
    "/score",
    operation_id="score",
    summary="Exact likelihoods of pictures",
    responses={
        200: {
            "model": answers.ScoreAnswer | answers.ScanAnswer,
            "description": "The scores, in the order of the pictures; with tile=1 what the tiles of the picture say. "
            "A PNG shows the map (a grid of several).",
            "content": {NPZ: BINARY, PNG: BINARY, JSON: {"examples": answers.SCORE_EXAMPLES}},
        },
        202: answers.ACCEPTED,
        **problems.documented(*problems.OF_WORK, kinds=problems.KINDS_OF_WORK),
    },
    openapi_extra=reading.documented(ScoreParams, images=MAX_IMAGES),
)
async def score(request: Request, desk: Here) -> Response:
    """Bits per dimension and log-likelihood of one or several pictures, each brought to the model's size.

    A calibrated model also says for each whether it belongs to what the model was trained on: `ood` holds a p-value,
    small for a picture that does not. The verdict is always reached under the conditions of the calibration, whatever
    `class` and `noise` say about the likelihood.

    With `tile=1` one large picture is cut into overlapping tiles instead, and judged by the worst of them: its score,
    its box, and the rank of the picture among whole good ones, where the model's tiles are calibrated. That takes as
    long as scoring all tiles; `Prefer: respond-async` does not wait for it.

    ```
    curl -F image=@cat.png localhost:8000/score
    curl -F image=@cat.png -F image=@dog.png -F class=cat localhost:8000/score
    curl --data-binary @cat.png -H 'Content-Type: image/png' 'localhost:8000/score?map=1'
    curl -F image=@cat.png -H 'Accept: image/png' localhost:8000/score -o map.png
    curl -F image=@cat.png -F statistics=all -F sanity=1 localhost:8000/score
    curl -F image=@cat.png 'localhost:8000/score?ood=0'
    curl -F image=@wall.jpg -F tile=1 localhost:8000/score
    curl -F image=@wall.jpg -F tile=1 -F tile_size=64 -H 'Accept: image/png' localhost:8000/score -o map.png
    ```
    """
    media = negotiate(request.headers, answers.SCORE_OFFERS)
    asked = await reading.read(request, ScoreParams, images=desk.settings.max_images)
    params, uploads = asked.params, asked.uploads
    _check_tiles(params, len(uploads))
    model, version = await desk.model(params, Task.SCAN if params.tile else Task.SCORE)
    common = desk.common(request, params, model, version)
    if params.tile:
        height, width = await _size(desk, params, model, uploads[0])
        scan = ScanJob(
            **common,
            file=uploads[0].data,
            height=height,
            width=width,
            tile_size=params.tile_size,
            map=params.map or media != JSON,
        )
        return await desk.ask(request, asked, scan, media)
    statistics = _wanted(params, model)

    def pixels(upload: Upload) -> Pixels:
        image = resize_to(_opened(desk, upload), model.height, model.width)
        return Pixels(height=model.height, width=model.width, data=image.tobytes())

    job = ScoreJob(
        **common,
        images=tuple([await desk.decode(Task.SCORE, lambda upload=upload: pixels(upload)) for upload in uploads]),
        class_name=params.class_name,
        noise=params.noise,
        map=params.map or media == PNG,
        ood=params.ood,
        statistic=params.statistic,
        statistics=statistics,
        sanity=params.sanity,
    )
    return await desk.ask(request, asked, job, media)


def _opened(desk: Desk, upload: Upload) -> NDArray[np.uint8]:
    """The picture in a file, within the service's limits."""
    return open_image(upload.data, field=upload.field, **desk.settings.image_limits)


def _check_tiles(params: ScoreParams, pictures: int) -> None:
    """Refuse what does not go together with `tile`, or only with it."""
    if not params.tile:
        if params.tile_size is not None:
            raise invalid("tile_size", "tile_size is for tile=1; leave it out, or add that.")
        return
    given = {
        "class": params.class_name,
        "noise": params.noise,
        "statistic": params.statistic,
        "statistics": params.statistics,
        "sanity": params.sanity,
        "ood": not params.ood,
    }
    for name in (name for name, value in given.items() if value):
        raise invalid(name, f"{name}: with tile=1 a picture is judged by its worst tile; leave {name} out, or tile.")
    if pictures > 1:
        raise invalid("image", f"image: {pictures} pictures were sent; with tile=1 send one at a time.")


async def _size(desk: Desk, params: ScoreParams, model: ModelDescriptor, upload: Upload) -> tuple[int, int]:
    """Height and width of a picture that can be cut and whose tiles are not too many; it is decoded to know."""
    if model.calibration is None and model.tiles is None:
        raise invalid("tile", f"tile: {model.name} is not calibrated; leave tile out, or calibrate it.")
    calibrated = model.tiles and TileSize(model.tiles.height, model.tiles.width)
    tile = TileSize.resolve(model.height, model.width, params.tile_size, calibrated)
    height, width = await desk.decode(Task.SCAN, lambda: _opened(desk, upload).shape[:2])
    rows, columns = tile.grid_shape(height, width)
    most = desk.settings.max_tiles
    if rows * columns > most:
        least = None if calibrated else smallest_tile_side((model.height, model.width), (height, width), most)
        remedy = f"give a tile_size of at least {least}" if least else "send it in parts"
        raise invalid(
            "tile_size" if least else "image",
            f"image is {width} x {height} pixels, which makes {rows * columns} tiles of {tile.width} x {tile.height}; "
            f"at most {most} are scored, so {remedy}.",
        )
    return height, width


def _wanted(params: ScoreParams, model: ModelDescriptor) -> tuple[str, ...] | Literal["all"]:
    """The statistics to return, once all that is asked for is known to be possible."""
    if params.noise > model.noise:
        raise invalid("noise", f"noise is {params.noise:g}; {model.name} takes 0 to {model.noise:g} grey levels.")
    if params.sanity and (params.noise or params.class_name):
        detail = "sanity: flipped bits are scored without noise and class; leave those out, or sanity."
        raise invalid("sanity", detail)
    names = tuple(dict.fromkeys(name.strip() for name in (params.statistics or "").split(",") if name.strip()))
    for field, wanted in (("statistic", params.statistic), *(("statistics", name) for name in names)):
        if wanted is None:
            continue
        if not params.ood:
            raise invalid(field, f"{field}: ood=0 asks for bits per dimension alone; leave one of the two out.")
        if model.calibration is None:
            raise invalid(field, f"{field}: {model.name} is not calibrated; leave {field} out, or calibrate it.")
        known = model.calibration.thresholds
        if wanted not in known and not (field == "statistics" and names == ("all",)):
            raise invalid(field, f"{field}: {model.name} has no {wanted!r}; it has {', '.join(known)}.")
    return "all" if names == ("all",) else names
