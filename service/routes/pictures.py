"""POST /generate and POST /complete: new pictures, and the other half of one."""

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from ncml.images import place_known_half
from service import answers, problems, reading
from service.asking import Desk, Here
from service.negotiation import BINARY, JSON, NPZ, PNG, ZIP, negotiate
from service.params import CompleteParams, GenerateParams, PictureParams
from service.problems import invalid
from worker.contract import MAX_SEED, CompleteJob, GenerateJob, ModelDescriptor, Pixels, Task

router = APIRouter(tags=["pictures"])

_SEED = {"description": "The seed of the first picture; the next has the next.", "schema": {"type": "integer"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.PictureAnswer,
        "description": "The pictures: a PNG (a grid of several), or as Accept asks.",
        "content": {PNG: BINARY, ZIP: BINARY, NPZ: BINARY, JSON: {}},
        "headers": {"X-Seed": _SEED},
    },
    202: answers.ACCEPTED,
    **problems.documented(*problems.OF_WORK, kinds=problems.KINDS_OF_WORK),
}


@router.post(
    "/generate",
    operation_id="generate",
    summary="New pictures",
    responses=_RESPONSES,
    openapi_extra=reading.documented(GenerateParams, images=0),
)
async def generate(request: Request, desk: Here) -> Response:
    """Draw new pictures, of a class or of none. The same seed gives the same picture.

    ```
    curl -X POST 'localhost:8000/generate?class=cat' -o cat.png
    curl -X POST 'localhost:8000/generate?n=16&seed=7' -H 'Accept: application/zip' -o pictures.zip
    curl --json '{"class": "ship", "n": 4}' -H 'Accept: image/png' localhost:8000/generate -o ships.png
    ```
    """
    media = negotiate(request.headers, answers.PICTURE_OFFERS)
    asked = await reading.read(request, GenerateParams, images=0)
    model, version = await desk.model(asked.params, Task.GENERATE)
    common = desk.common(request, asked.params, model, version)
    job = GenerateJob(**common, **_drawn(desk, asked.params, model))
    return await desk.ask(request, asked, job, media)


@router.post(
    "/complete",
    operation_id="complete",
    summary="The other half of a picture",
    responses=_RESPONSES,
    openapi_extra=reading.documented(CompleteParams, images=1),
)
async def complete(request: Request, desk: Here) -> Response:
    """Fill in the unknown half of a picture; the known half comes back as it was, at the model's size.

    The known half is said in one of three ways: the picture is half as high (or as wide) as the model's; or its
    unknown half is transparent; or it is whole, and `keep` says which half to hold.

    ```
    curl -F image=@half.png localhost:8000/complete -o full.png
    curl -F image=@whole.png -F keep=top -F n=4 localhost:8000/complete -o variants.png
    ```
    """
    media = negotiate(request.headers, answers.PICTURE_OFFERS)
    asked = await reading.read(request, CompleteParams, images=1)
    params, upload = asked.params, asked.uploads[0]
    model, version = await desk.model(params, Task.COMPLETE)
    canvas, keep = await desk.decode(
        Task.COMPLETE,
        lambda: place_known_half(
            upload.data,
            model.height,
            model.width,
            keep=params.keep,
            keeps=model.keeps,
            **desk.settings.image_limits,
        ),
    )
    job = CompleteJob(
        **desk.common(request, params, model, version),
        **_drawn(desk, params, model),
        image=Pixels(height=model.height, width=model.width, data=canvas.tobytes()),
        keep=keep,
    )
    return await desk.ask(request, asked, job, media)


def _drawn(desk: Desk, params: PictureParams, model: ModelDescriptor) -> dict[str, Any]:
    """The fields of drawings, checked against the model; a seed is chosen where none was given."""
    if params.n > desk.settings.max_images:
        raise invalid("n", f"n is {params.n}; this service draws at most {desk.settings.max_images} at once.")
    if params.noise is not None and params.noise > model.noise:
        raise invalid("noise", f"noise is {params.noise:g}; {model.name} takes 0 to {model.noise:g} grey levels.")
    if params.solver is not None and params.solver not in model.solvers:
        known = ", ".join(model.solvers)
        raise invalid("solver", f"solver: {model.name} has no {params.solver!r}; it has {known}.")
    solver = params.solver or (model.solver if params.steps in (None, 1) else model.stepped_solver)
    if model.solvers[solver] == 1 and params.steps not in (None, 1):
        others = " or ".join(name for name, steps in model.solvers.items() if steps > 1)
        raise invalid("steps", f"steps is {params.steps}; {solver} takes exactly 1: leave steps out, or name {others}.")
    last = MAX_SEED - params.n + 1
    seed = secrets.randbelow(last + 1) if params.seed is None else params.seed
    if seed > last:
        raise invalid("seed", f"seed is {seed}; with n = {params.n} it must be at most {last}.")
    return {
        "n": params.n,
        "class_name": params.class_name,
        "seed": seed,
        "noise": params.noise,
        "steps": params.steps,
        "solver": params.solver,
    }
