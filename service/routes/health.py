"""/healthz, /readyz and /metrics, for whoever runs this."""

import anyio.to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict

from service import problems
from service.asking import Here
from service.problems import Problem
from worker.contract import WorkerState

router = APIRouter(tags=["operations"])


_METRICS = """# HELP ncml_queue_depth Jobs that wait.
# TYPE ncml_queue_depth gauge
ncml_queue_depth{queue="ncml:score:normal"} 3.0
"""


class Health(BaseModel):
    """The process answers."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ok"}})

    status: str = "ok"


class Readiness(BaseModel):
    """Requests would be served."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ready", "lanes": {"score": 1, "generate": 1}}})

    status: str = "ready"
    lanes: dict[str, int]
    """Workers with a loaded model, for each lane."""


@router.get("/healthz", operation_id="health", summary="Does the process live?")
async def healthz() -> Health:
    """Answers whenever the process does; it asks nobody else.

    ```
    curl localhost:8000/healthz
    ```
    """
    return Health()


@router.get("/readyz", operation_id="readiness", summary="Would a request be served?",
            responses=problems.documented(503, kinds=("not-ready", "queue-down")))  # fmt: skip
async def readyz(desk: Here) -> Readiness:
    """200 when the queue is reachable and every lane of NCML_READY_LANES has a worker that has loaded a model.

    ```
    curl localhost:8000/readyz
    ```
    """
    workers = await anyio.to_thread.run_sync(desk.queue.workers)
    ready = [info for info in workers if info.state is not WorkerState.LOADING and info.models]
    lanes = {str(lane): sum(lane in info.lanes for info in ready) for lane in desk.settings.ready_lanes}
    missing = [lane for lane, count in lanes.items() if not count]
    if missing:
        detail = f"No worker with a loaded model serves the lane {' or '.join(missing)} yet."
        raise Problem(503, detail, kind="not-ready")
    return Readiness(lanes=lanes)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": _METRICS}}}},
)
async def metrics(desk: Here) -> Response:
    """Everything counted here and found in the queue now, in the Prometheus text format.

    ```
    curl localhost:8000/metrics
    ```
    """
    body = await anyio.to_thread.run_sync(desk.metrics.exposition)
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
