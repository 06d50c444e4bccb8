"""POST /score: how likely a picture is."""

from fastapi import APIRouter, Request, Response

from ncml.images import fit, open_image
from service import answers, problems, reading
from service.asking import Here
from service.negotiation import JSON, NPZ, negotiate
from service.params import ScoreParams
from service.problems import invalid
from service.reading import Upload
from worker.contract import MAX_IMAGES, Pixels, ScoreJob, Task

router = APIRouter(tags=["pictures"])


@router.post(
    "/score",
    operation_id="score",
    summary="Exact likelihoods of pictures",
    responses={
        200: {
            "model": answers.ScoreAnswer,
            "description": "The scores, in the order of the pictures.",
            "content": {NPZ: {"schema": {"type": "string", "format": "binary"}}, JSON: {}},
        },
        202: {"model": answers.JobAnswer, "description": "Not done within the wait: look at Location later."},
        **problems.documented(400, 406, 410, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra=reading.documented(ScoreParams, images=MAX_IMAGES),
)
async def score(request: Request, desk: Here) -> Response:
    """Bits per dimension and log-likelihood of one or several pictures, each brought to the model's size.

    ```
    curl -F image=@cat.png localhost:8000/score
    curl -F image=@cat.png -F image=@dog.png -F class=cat localhost:8000/score
    curl --data-binary @cat.png -H 'Content-Type: image/png' localhost:8000/score?map=1
    ```
    """
    media = negotiate(request.headers.get("accept"), answers.SCORE_OFFERS)
    asked = await reading.read(request, ScoreParams, images=desk.settings.max_images)
    params = asked.params
    model, version = await desk.model(params, Task.SCORE)
    if params.noise > model.noise:
        raise invalid("noise", f"noise is {params.noise:g}; {model.name} takes 0 to {model.noise:g} grey levels.")

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
    )
    return await desk.ask(request, asked, job, media)
