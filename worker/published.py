"""What live workers publish in Redis, read and summarised: their states, their models and their pace."""

import logging
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from worker.contract import Lane
from worker.descriptors import ModelDescriptor, PublishedWorker, WorkerInfo
from worker.keys import WORKERS, worker_key

log = logging.getLogger("ncml.queue")


class PublishedWorkers:
    """Reads what live workers publish, and parses each payload once: payloads seldom change."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._workers: dict[bytes, PublishedWorker | None] = {}  # by payload; None for one of another version

    def read(self) -> list[PublishedWorker]:
        """Return the live workers, longest-lived first."""
        names: list[bytes] = self._client.zrange(WORKERS, 0, -1)
        if not names:
            return []
        # What workers publish lapses by the server's clock, so the clocks of their machines do not matter.
        payloads: list[bytes | None] = self._client.mget([worker_key(name.decode(errors="replace")) for name in names])
        previous = self._workers
        self._workers = workers = {
            payload: previous[payload] if payload in previous else _parse_worker(payload)
            for payload in payloads
            if payload
        }
        parsed = [worker for worker in workers.values() if worker]
        return sorted(parsed, key=lambda worker: (worker.info.started_at, worker.info.name))


def _parse_worker(payload: bytes) -> PublishedWorker | None:
    """Return a published worker; None for one of another version, as there may be during an upgrade."""
    try:
        return PublishedWorker.model_validate_json(payload)
    except ValidationError:
        log.warning("ignoring a worker of another version")
        return None


def served_models(workers: Iterable[PublishedWorker]) -> list[ModelDescriptor]:
    """Return the models of workers: one for each name and version, those of the last workers first."""
    models: dict[tuple[str, str], ModelDescriptor] = {}
    for worker in workers:
        for model in worker.models:
            key = (model.name, model.version)
            # Only workers that generate have a batching to report.
            if model.batching is None and key in models:
                model = model.model_copy(update={"batching": models[key].batching})
            models[key] = model
    return list(reversed(models.values()))


def pace_of(workers: Iterable[WorkerInfo], lane: Lane) -> float:
    """Return the jobs per second of workers together in a lane, as they measured; 0 before any has."""
    return sum(worker.pace.get(lane, 0.0) for worker in workers)
