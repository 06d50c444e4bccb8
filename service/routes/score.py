"""POST /score: how likely a picture is."""

from typing import Literal

from fastapi import APIRouter, Request, Response

from ncml.images import fit, open_image
from service import answers, problems, reading
from service.asking import Here
from service.negotiation import BINARY, JSON, NPZ, negotiate
from service.params import ScoreParams
from service.problems import invalid
from service.reading import Upload
from worker.contract import MAX_IMAGES, ModelDescriptor, Pixels, ScoreJob, Task

router = APIRouter(tags=["pictures"])


@router.post(
    "/score",
    operation_id="score",
    summary="Exact likelihoods of pictures",
    responses={
        200: {
            "model": answers.ScoreAnswer,
            "description": "The scores, in the order of the pictures.",
            "content": {NPZ: BINARY, JSON: {}},
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

    ```
    curl -F image=@cat.png localhost:8000/score
    curl -F image=@cat.png -F image=@dog.png -F class=cat localhost:8000/score
    curl --data-binary @cat.png -H 'Content-Type: image/png' 'localhost:8000/score?map=1'
    curl -F image=@cat.png -F statistics=all -F sanity=1 localhost:8000/score
    curl -F image=@cat.png 'localhost:8000/score?ood=0'
    ```
    """
    media = negotiate(request.headers.get("accept"), answers.SCORE_OFFERS)
    asked = await reading.read(request, ScoreParams, images=desk.settings.max_images)
    params = asked.params
    model, version = await desk.model(params, Task.SCORE)
    statistics = _wanted(params, model)

    def pixels(upload: Upload) -> Pixels:
        image = open_image(
            upload.data,
            field=upload.field,
            max_bytes=desk.settings.max_image_bytes,
            max_pixels=desk.settings.max_image_pixels,
        )
        return Pixels(height=model.height, width=model.width, data=fit(image, model.height, model.width).tobytes())

    images = tuple([await desk.decode(lambda upload=upload: pixels(upload)) for upload in asked.uploads])
    job = ScoreJob(
        model=model.name,
        version=version,
        priority=params.priority,
        request_id=request.state.request_id,
        timeout_s=desk.settings.job_timeout_s,
        start_within_s=desk.settings.start_within_s,
        images=images,
        class_name=params.class_name,
        noise=params.noise,
        map=params.map,
        ood=params.ood,
        statistic=params.statistic,
        statistics=statistics,
        sanity=params.sanity,
    )
    return await desk.ask(request, asked, job, media)


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
