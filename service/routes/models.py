"""/models: what is served, as the workers say."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path
from pydantic import BaseModel

from service import problems
from service.asking import Here
from service.problems import Problem
from worker.contract import ModelDescriptor

router = APIRouter(prefix="/models", tags=["models"])


class Models(BaseModel):
    """The models that live workers serve."""

    models: list[ModelDescriptor]


@router.get(
    "", operation_id="list_models", summary="The models that are served", responses=problems.documented(401, 503)
)
async def models(desk: Here) -> Models:
    """Name, version, size, classes, default settings and metrics of every model, and its card."""
    served = await anyio.to_thread.run_sync(desk.queue.models)
    return Models(models=sorted(served, key=lambda model: model.name))


@router.get(
    "/{name}",
    operation_id="get_model",
    summary="One model",
    responses=problems.documented(401, 404, 422, 503),
)
async def model(
    name: Annotated[str, Path(description="`name`, or `name@version`.", max_length=200)], desk: Here
) -> ModelDescriptor:
    """A model by name, or by name and version (six or more of its first digits)."""
    served = await anyio.to_thread.run_sync(desk.queue.models)
    try:
        return desk.choose(served, name)[0]
    except Problem as error:
        raise Problem(404, error.detail, kind="no-such-model") from error
