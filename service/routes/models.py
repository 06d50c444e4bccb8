"""/models: what is served, as the workers say."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict

from service import problems
from service.asking import Here
from service.negotiation import JSON
from service.problems import Problem
from worker.contract import ModelDescriptor

router = APIRouter(prefix="/models", tags=["models"])


_EXAMPLE: dict[str, Any] = {
    "name": "cifar10",
    "version": "9f2c61d07be3a4585e1c0f6db2a87943c5d1e08f7a6b3924d8e5f01c7b9a3d62",
    "height": 32,
    "width": 32,
    "classes": ["airplane", "automobile", "bird"],
    "noise": 10.0,
    "keeps": ["top", "bottom", "left", "right"],
    "solver": "tweedie",
    "stepped_solver": "euler-maruyama",
    "solvers": {"tweedie": 1, "euler-maruyama": 20},
    "preprocessing": {"name": "centre-crop-bicubic", "version": 1},
    "calibration": {
        "version": "5b0e9d2c7a4f18366e2d1c90b8a7f6e5d4c3b2a1908f7e6d5c4b3a2918070605",
        "statistic": "multiscale",
        "false_positive_rate": 0.05,
        "threshold": 9.5,
        "thresholds": {"bpd": 4.6, "multiscale": 9.5},
        "n_fit": 2000,
        "n_rank": 5000,
        "smallest_p": 0.0002,
        "preprocessing": "centre-crop-bicubic v1",
        "histograms": {"bpd": {"edges": [2.0, 3.0, 4.0, 5.0], "counts": [700, 3600, 700]}},
    },
    "tiles": {
        "version": "1f7a6b5c4d3e2f100918273645546372819a0bacbdcedfe0f1e2d3c4b5a69788",
        "height": 64,
        "width": 64,
        "false_positive_rate": 0.05,
        "threshold": 10.6,
        "n_fit": 40,
        "n_rank": 100,
        "smallest_p": 0.0099,
    },
    "batching": {
        "groups": "fast",
        "check": "passed",
        "detail": "an image is the same bytes in every fast group, at every position.",
    },
    "metrics": {"test_bpd": 3.5},
    "card": "# cifar10",
}


class Models(BaseModel):
    """The models that live workers serve."""

    model_config = ConfigDict(json_schema_extra={"example": {"models": [_EXAMPLE]}})

    models: list[ModelDescriptor]


@router.get(
    "",
    operation_id="list_models",
    summary="The models that are served",
    responses=problems.documented(401, 503, kinds=("queue-down",)),
)
async def models(desk: Here) -> Models:
    """Name, version, size, classes, default settings, calibration, batching and metrics of every model, and its card.

    ```
    curl localhost:8000/models
    ```
    """
    served = await anyio.to_thread.run_sync(desk.queue.models)
    return Models(models=sorted(served, key=lambda model: model.name))


@router.get(
    "/{name}",
    operation_id="get_model",
    summary="One model",
    responses={200: {"content": {JSON: {"example": _EXAMPLE}}}}
    | problems.documented(401, 404, 422, 503, kinds=("no-such-model", "invalid-input", "queue-down")),
)
async def model(
    name: Annotated[str, Path(description="`name`, or `name@version`.", max_length=200)], desk: Here
) -> ModelDescriptor:
    """A model by name, or by name and version (six or more of its first digits).

    ```
    curl localhost:8000/models/cifar10
    curl localhost:8000/models/cifar10@9f2c61
    ```
    """
    served = await anyio.to_thread.run_sync(desk.queue.models)
    try:
        return desk.choose(served, name)[0]
    except Problem as error:
        raise Problem(404, error.detail, kind="no-such-model") from error
