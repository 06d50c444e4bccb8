"""/models: the models that live workers serve."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict

from service.http import examples
from service.http.negotiation import JSON
from service.http.openapi import problem_responses
from service.http.problems import Problem
from service.jobs import Jobs
from worker.descriptors import ModelDescriptor

router = APIRouter(prefix="/models", tags=["models"])


class Models(BaseModel):
    """The models that live workers serve."""

    model_config = ConfigDict(json_schema_extra={"example": {"models": [examples.MODEL]}})

    models: list[ModelDescriptor]


@router.get(
    "",
    operation_id="list_models",
    summary="List the models",
    responses=problem_responses(401, 503, kinds=("queue-down",)),
)
async def models(jobs: Jobs) -> Models:
    """Return name, version, size, classes, default settings, calibration, batching, metrics and card of every model.

    ```
    curl localhost:8000/models
    ```
    """
    descriptors = await anyio.to_thread.run_sync(jobs.queue.models)
    return Models(models=sorted(descriptors, key=lambda model: model.name))


@router.get(
    "/{name}",
    operation_id="get_model",
    summary="Get one model",
    responses={200: {"content": {JSON: {"example": examples.MODEL}}}}
    | problem_responses(401, 404, 422, 503, kinds=("no-such-model", "invalid-input", "queue-down")),
)
async def model(
    name: Annotated[str, Path(description="`name`, or `name@version`.", max_length=200)], jobs: Jobs
) -> ModelDescriptor:
    """Return a model by name, or by name and version (at least its first six digits).

    ```
    curl localhost:8000/models/cifar10
    curl localhost:8000/models/cifar10@9f2c61
    ```
    """
    descriptors = await anyio.to_thread.run_sync(jobs.queue.models)
    try:
        return jobs.select_model(descriptors, name)[0]
    except Problem as error:
        raise Problem(404, error.detail, kind="no-such-model") from error
