"""The state of the queue for operators and routes: whether it accepts jobs, how many wait, and which workers live."""

import logging
import operator
from typing import Any

import redis
from pydantic import ValidationError

from worker.contract import Lane, Priority, Task, queue_name
from worker.descriptors import ModelDescriptor, PublishedWorker, QueueDepth, WorkerInfo
from worker.redis_keys import (
    PROBE,
    SETTLING,
    WORKERS,
    descriptor_key,
    job_key,
    pictures_key,
    queue_key,
    queue_names,
    script,
    worker_key,
)

INSPECTED = 512
"""Jobs of each queue whose tasks are read for the metrics."""

log = logging.getLogger("ncml.queue")


class QueueMonitor:
    """Reads the state of the queue's server, its queues and the workers that publish there. Thread-safe.

    All methods raise `redis.exceptions.RedisError` if the server does not answer.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._probe = script(client, "probe")
        self._workers: dict[bytes, PublishedWorker | None] = {}
        """Parsed payloads, kept because they seldom change; None for one that cannot be read."""
        self._descriptors: dict[str, ModelDescriptor | None] = {}
        """Parsed descriptors by digest."""
        self._served: tuple[list[tuple[ModelDescriptor, ...]], list[ModelDescriptor]] = [], []
        """The models of each worker, and what these workers serve together: merging hundreds takes milliseconds."""

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def ping(self) -> bool:
        """Return whether the server answers."""
        return bool(self._client.ping())

    def refusal(self) -> str | None:
        """Return why the server refuses new jobs; None if it accepts them."""
        try:
            return "it is short of memory" if self._probe(keys=[PROBE]) == b"memory" else None
        except redis.ResponseError as error:
            return refusal_reason(error)

    def memory(self) -> tuple[int, int]:
        """Return the bytes that the server uses, and its limit; 0 for no limit."""
        info: dict[str, Any] = self._client.info("memory")
        return info["used_memory"], info["maxmemory"]

    def workers(self) -> list[WorkerInfo]:
        """Return the live workers, longest-lived first."""
        return [worker.info for worker in self._live_workers()]

    def models(self) -> list[ModelDescriptor]:
        """Return the models of live workers: one for each name and version, latest workers first."""
        return self._served_models(self._live_workers())

    def has_all_models(self) -> bool:
        """Return whether there are workers, and they serve no further models.

        They may while one has not read all of its model folders, or has not published its models after an outage.
        """
        workers = self._live_workers()
        are_ready = bool(workers) and all(worker.info.has_all_models for worker in workers)
        return are_ready and not self._client.exists(SETTLING)

    def faults(self) -> dict[str, str]:
        """Return why model folders cannot be used, by name; live workers may serve a model of the same name."""
        return {name: fault for worker in self._live_workers() for name, fault in worker.info.faults.items()}

    def pictures(self, digest: str) -> bytes | None:
        """Return the pictures of what a detector finds and misses, a JPEG; None if no worker has published them."""
        return self._client.get(pictures_key(digest))

    def service(self, lane: Lane) -> tuple[int, list[ModelDescriptor]]:
        """Return how many live workers serve a lane, and the models of all live workers."""
        workers = self._live_workers()
        return sum(lane in worker.info.lanes for worker in workers), self._served_models(workers)

    def pace(self, lane: Lane) -> float:
        """Return the jobs per second of a lane, as measured by its live workers together; 0 before the first batch."""
        return sum(worker.pace.get(lane, 0.0) for worker in self.workers())

    def depths(self) -> list[QueueDepth]:
        """Return how many jobs wait in each queue, and since when: lanes in order, high priority first."""
        names = [(lane, priority) for lane in Lane for priority in Priority]
        pipe = self._client.pipeline(transaction=False)
        for lane, priority in names:
            pipe.llen(queue_key(queue_name(lane, priority)))
            pipe.lindex(queue_key(queue_name(lane, priority)), 0)
        pipe.time()
        *answers, (seconds, micros) = pipe.execute()
        pipe = self._client.pipeline(transaction=False)
        for oldest in answers[1::2]:
            pipe.hget(job_key(oldest.decode(errors="replace") if oldest else "-"), "submitted")
        now = seconds + micros / 1e6  # by the clock of the server, as `submitted` is
        ages = [_age_s(submitted, now) for submitted in pipe.execute(raise_on_error=False)]
        return [
            QueueDepth(lane=lane, priority=priority, depth=depth, oldest_age_s=age)
            for (lane, priority), depth, age in zip(names, answers[0::2], ages, strict=True)
        ]

    def longest_waits(self) -> dict[Task, float]:
        """Return how long the oldest of the waiting jobs of each task has waited, in seconds; 0 without one.

        At most the first `INSPECTED` jobs of each queue count.
        """
        pipe = self._client.pipeline(transaction=False)
        for name in queue_names(list(Lane)):
            pipe.lrange(queue_key(name), 0, INSPECTED - 1)
        pipe.time()
        *queues, (seconds, micros) = pipe.execute()
        pipe = self._client.pipeline(transaction=False)
        for job_id in (job_id for queue in queues for job_id in queue):
            pipe.hmget(job_key(job_id.decode(errors="replace")), "task", "submitted")
        waits = dict.fromkeys(Task, 0.0)
        now = seconds + micros / 1e6
        answers: list[Any] = pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, redis.ResponseError):
                continue
            name, submitted = answer
            if (task := (name or b"").decode(errors="replace")) in waits:
                waits[Task(task)] = max(waits[Task(task)], _age_s(submitted, now))
        return waits

    def depth(self, lane: Lane) -> int:
        """Return the number of jobs that wait in a lane."""
        return sum(entry.depth for entry in self.depths() if entry.lane is lane)

    def _live_workers(self) -> list[PublishedWorker]:
        """Return the live workers with their models, longest-lived first."""
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

    def _served_models(self, workers: list[PublishedWorker]) -> list[ModelDescriptor]:
        digests = list(dict.fromkeys(digest for worker in workers for digest in worker.descriptors))
        previous = self._descriptors
        if unread := [digest for digest in digests if digest not in previous]:
            texts: list[bytes | None] = self._client.mget([descriptor_key(digest) for digest in unread])
            previous = previous | {
                digest: _parse_descriptor(text) for digest, text in zip(unread, texts, strict=True) if text
            }
        self._descriptors = descriptors = {digest: previous[digest] for digest in digests if digest in previous}
        models = [
            tuple(model for digest in worker.descriptors if (model := descriptors.get(digest))) for worker in workers
        ]
        known, served = self._served
        if len(known) != len(models) or not all(map(_are_same, known, models)):
            served = _merge(models)
            self._served = models, served
        return served


def refusal_reason(error: redis.ResponseError) -> str:
    """Return what the server gives as its reason for refusing a command, without the place in the script."""
    return str(error).partition(" script:")[0].rstrip(".")


def _parse_worker(payload: bytes) -> PublishedWorker | None:
    """Return a published worker; None for one that lacks a field of this version, as there may be during an upgrade."""
    try:
        return PublishedWorker.model_validate_json(payload)
    except ValidationError:
        log.warning("ignoring a worker of another version")
        return None


def _parse_descriptor(text: bytes) -> ModelDescriptor | None:
    """Return a descriptor; None for one that lacks a field of this version, as there may be during an upgrade."""
    try:
        return ModelDescriptor.model_validate_json(text)
    except ValidationError:
        log.warning("ignoring a model of a worker of another version")
        return None


def _are_same(some: tuple[ModelDescriptor, ...], others: tuple[ModelDescriptor, ...]) -> bool:
    """Return whether these are the same objects; comparing their contents would take as long as merging them."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _merge(models_of_workers: list[tuple[ModelDescriptor, ...]]) -> list[ModelDescriptor]:
    """Return one descriptor for each name and version: that of the last worker, and in reverse order."""
    models: dict[tuple[str, str], ModelDescriptor] = {}
    for models_of_worker in models_of_workers:
        for model in models_of_worker:
            key = (model.name, model.version)
            # Only workers that generate have a batching to report, and earlier ones describe no detector: to them,
            # jobs for one have an unknown field, which they refuse.
            if key in models:
                missing = [name for name in ("batching", "detector") if getattr(model, name) is None]
                model = model.model_copy(update={name: getattr(models[key], name) for name in missing})
            models.pop(key, None)  # so that the order is that of the last worker that serves it
            models[key] = model
    return list(reversed(models.values()))


def _age_s(submitted: object, now: float) -> float:
    """Return how long ago a job was submitted; 0 if there is none, or its record is damaged."""
    try:
        return max(0.0, now - float(submitted)) if isinstance(submitted, bytes) else 0.0
    except ValueError:
        return 0.0
