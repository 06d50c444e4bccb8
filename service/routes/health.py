"""/version, /healthz, /readyz and /metrics, for operators."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict

from service.http import examples
from service.http.openapi import problem_responses
from service.http.problems import Problem
from service.jobs import Jobs
from worker.descriptors import WorkerState

T = TypeVar("T")

router = APIRouter(tags=["operations"])

_THREADS = ThreadPoolExecutor(2, "probe")
"""Separate threads: those for requests may all be waiting for a queue that does not answer, which probes report."""


async def _probe(query: Callable[[], T]) -> T:
    """Return `query()`, which asks the queue."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, query)


class Health(BaseModel):
    """The process is running."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ok"}})

    status: str = "ok"


class Readiness(BaseModel):
    """The service can serve requests."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ready", "lanes": {"score": 1, "generate": 1}}})

    status: str = "ready"
    lanes: dict[str, int]
    """Workers with a loaded model, by lane."""


class Version(BaseModel):
    """The release of the service."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "ncml", "version": "0.1.0"}})

    name: str = "ncml"
    version: str


@router.get("/version", operation_id="version", summary="Version")
async def release(request: Request) -> Version:
    """Return the release of the service, the same as in the OpenAPI document.

    ```
    curl localhost:8000/version
    ```
    """
    return Version(version=request.app.version)


@router.get("/healthz", operation_id="health", summary="Liveness")
async def healthz() -> Health:
    """Return 200 while the process is running; checks nothing else.

    ```
    curl localhost:8000/healthz
    ```
    """
    return Health()


@router.get("/readyz", operation_id="readiness", summary="Readiness",
            responses=problem_responses(503, kinds=("not-ready", "queue-down")))  # fmt: skip
async def readyz(jobs: Jobs) -> Readiness:
    """Return 200 if the queue accepts jobs and every lane of NCML_READY_LANES has a worker with a loaded model.

    ```
    curl localhost:8000/readyz
    ```
    """
    refusal = await _probe(jobs.queue.monitor.refusal)
    if refusal:
        raise Problem(503, f"The queue refuses new jobs: {refusal}.", kind="not-ready")
    workers = await _probe(jobs.queue.monitor.workers)
    ready = [info for info in workers if info.state is not WorkerState.LOADING and info.models]
    lanes = {str(lane): sum(lane in info.lanes for info in ready) for lane in jobs.settings.ready_lanes}
    missing = [lane for lane, count in lanes.items() if not count]
    if missing:
        detail = f"No worker with a loaded model serves the {' or '.join(missing)} lane yet."
        raise Problem(503, detail, kind="not-ready")
    return Readiness(lanes=lanes)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": examples.METRICS}}}},
)
async def metrics(jobs: Jobs) -> Response:
    """Return the counters of this instance and the current state of the queue, in the Prometheus text format.

    ```
    curl localhost:8000/metrics
    ```
    """
    body = await _probe(jobs.metrics.exposition)
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
