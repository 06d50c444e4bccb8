"""The queue as its users see it: submit, look up, cancel, follow. Knows RQ and Redis; no torch and no worker process.

A job is an RQ job record (`rq:job:{id}`) in an RQ queue, so RQ's tools list it, but it changes state only by the
scripts beside this file, each of which is one atomic step. Every key:

    rq:job:{id}              hash: RQ's fields and ours; expires `result_ttl_s` after the job has ended
    rq:queue:ncml:{lane}:{priority}   list: ids that wait, oldest first
    ncml:wake:{lane}         list of at most one entry: wakes an idle worker
    ncml:leases              sorted set: {id}:{attempt's token} by the time its lease lapses (the server's clock)
    ncml:events:{id}         stream, capped: every change of state, and progress
    ncml:blob:{id}           pictures: uint8, NHWC
    ncml:blob:{id}:preview   a Preview
    ncml:workers             sorted set: names of workers; ncml:worker:{name}: the word of one, which lapses
    rq:wip:*, rq:finished:*, rq:failed:*, rq:canceled:*   RQ's registries, kept for RQ's tools; nothing reads them here

Scripts reach keys by name, so this needs one Redis (or Valkey) server rather than a cluster.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from pydantic import BaseModel, ValidationError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from ncml.errors import NcmlError
from worker.contract import (
    JOB,
    RESULT,
    Event,
    Job,
    JobError,
    JobStatus,
    JobView,
    Lane,
    ModelDescriptor,
    ModelRef,
    Preview,
    Priority,
    QueueDepth,
    Result,
    Task,
    Timing,
    WorkerInfo,
    batch_key,
    queue_name,
)

RESULT_TTL_S = 3600
"""How long an ended job, its result and its pictures can be looked up."""

EVENTS_CAP = 256
"""Entries of a job's progress stream; older ones are dropped."""

_RQ_STATUS = {
    JobStatus.SUCCEEDED: ("finished", "finished"),
    JobStatus.FAILED: ("failed", "failed"),
    JobStatus.EXPIRED: ("failed", "failed"),
    JobStatus.CANCELED: ("canceled", "canceled"),
}
"""RQ's word for each terminal state, and the registry that lists it."""

CANCELED = JobError(reason="canceled", detail="the job was canceled on request")
EXPIRED = JobError(reason="expired", detail="no worker started the job in time; ask again later")

_REDIS: Any = redis.Redis  # redis-py types each method for both its synchronous and asynchronous clients
_RQ_JOB: Any = RqJob  # RQ is not typed

log = logging.getLogger("ncml.queue")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELDS = (
    "status", "outcome", "task", "model", "version", "priority", "request_id", "n", "submitted", "started", "ended",
    "timing", "error", "progress", "start_by", "origin", "fingerprint", "owner",
)  # fmt: skip


class QueueError(NcmlError):
    """The queue cannot do what was asked."""


class JobNotFound(QueueError):
    """No such job, or its time to live is over."""


class DuplicateJob(QueueError):
    """A job with this id exists already."""


class QueueFull(QueueError):
    """As many jobs wait in this lane as are allowed to, or the server's memory is three quarters full."""


class Worker(BaseModel):
    """What a worker publishes: itself and the models it serves."""

    info: WorkerInfo
    models: tuple[ModelDescriptor, ...]


def job_key(job_id: str) -> str:
    """The hash of a job."""
    return f"rq:job:{job_id}"


def queue_key(name: str) -> str:
    """The list of a queue."""
    return f"rq:queue:{name}"


def wake_key(lane: Lane) -> str:
    """The list on which the idle workers of a lane block."""
    return f"ncml:wake:{lane}"


def events_key(job_id: str) -> str:
    """The progress stream of a job."""
    return f"ncml:events:{job_id}"


def blob_key(job_id: str) -> str:
    """The pictures of a job."""
    return f"ncml:blob:{job_id}"


def preview_key(job_id: str) -> str:
    """The pictures of a running job as they were last seen."""
    return f"{blob_key(job_id)}:preview"


LEASES = "ncml:leases"
WORKERS = "ncml:workers"


def worker_key(name: str) -> str:
    """What a worker says about itself."""
    return f"ncml:worker:{name}"


def lane_queues(lane: Lane) -> list[str]:
    """The queue names of a lane, highest priority first."""
    return [queue_name(lane, priority) for priority in Priority]


def script(client: Any, name: str) -> Any:
    """One of the atomic steps beside this file, callable as `step(keys=..., args=..., client=...)`."""
    return client.register_script(Path(__file__).with_name(f"{name}.lua").read_text())


def status_event(status: JobStatus, error: JobError | None = None) -> str:
    """The stream entry for a change of state, without its id."""
    return Event(id="", kind="status", status=status, error=error).model_dump_json(exclude={"id"}, exclude_none=True)


def pace_of(workers: Iterable[WorkerInfo], lane: Lane) -> float:
    """Jobs a second that these workers do together in a lane, by what each has measured; 0 while none has."""
    return sum(worker.pace.get(lane, 0.0) for worker in workers)


class JobQueue:
    """The queue. Methods are synchronous (call them in a thread pool), except `events` and `wait`.

    All of them raise `redis.exceptions.RedisError` (`ConnectionError`, `TimeoutError`) when the server is away.
    Thread-safe. Close it with `close()`, and with `await aclose()` as well if `events` or `wait` was used.
    """

    def __init__(self, client: "redis.Redis", *, result_ttl_s: int = RESULT_TTL_S) -> None:
        self.redis: Any = client  # redis-py's types are those of both its synchronous and asynchronous clients
        self.result_ttl_s = result_ttl_s
        self._submit = script(client, "submit")
        self._finish = script(client, "finish")
        self._async: Any = None
        self._heard: dict[bytes, Worker | None] = {}  # what workers say, which is seldom new, as it was last read

    @classmethod
    def from_url(cls, url: str, *, result_ttl_s: int = RESULT_TTL_S) -> "JobQueue":
        """Connect to `redis://host:port/db`, `rediss://` or `unix:///path`. Nothing is sent yet.

        Raises `QueueError` for another kind of address.
        """
        try:
            client = _REDIS.from_url(url, socket_timeout=30, socket_connect_timeout=5, health_check_interval=30)
        except ValueError:  # its words may quote a part of the password
            raise QueueError(
                "this is not the address of a queue; give redis://[user:password@]host:port/number (special characters "
                "in the password as %-escapes), rediss://... or unix:///path"
            ) from None
        return cls(client, result_ttl_s=result_ttl_s)

    # -- writing

    def submit(
        self,
        job: Job,
        *,
        job_id: str | None = None,
        limit: int | None = None,
        fingerprint: str = "",
        owner: str = "",
    ) -> str:
        """Put a job in the queue of its lane and priority; returns its id.

        `job_id` (letters, digits, `_`, `-`; at most 64) is the base for idempotency: `DuplicateJob` when it is taken.
        `fingerprint` goes into the job's view, to tell whether the job under a taken id is the same, and so does
        `owner`, to tell whose it is.
        `limit` is the most jobs that may wait in the lane: `QueueFull` beyond, and when the server's `maxmemory` is
        nearly reached. All are judged in the same atomic step.
        """
        own, job_id = job_id is None, job_id or uuid.uuid4().hex
        if not _ID.fullmatch(job_id):
            raise ValueError(f"not a job id: {job_id!r}")
        lane = job.task.lane
        origin = queue_name(lane, job.priority)
        record = _RQ_JOB.create(
            f"ncml.{job.task}",
            args=(JOB.dump_json(job).decode(),),
            id=job_id,
            origin=origin,
            timeout=max(1, round(job.timeout_s)),
            result_ttl=self.result_ttl_s,
            failure_ttl=self.result_ttl_s,
            description=f"{job.task} {job.n} with {job.model}",
            status="queued",
            serializer=JSONSerializer,
            connection=self.redis,
        )
        fields: dict[str, Any] = record.to_dict() | {
            "status": "queued",
            "task": job.task,
            "model": job.model,
            "priority": job.priority,
            "request_id": job.request_id,
            "n": job.n,
            "batch_key": batch_key(job),
            "fingerprint": fingerprint,
            "owner": owner,
        }
        if job.version:
            fields["version"] = job.version
        if job.task is Task.SCAN:
            fields["alone"] = "1"  # a batch of whole files could take gigabytes, and its tiles fill one anyway
        answer = self._submit(
            keys=[job_key(job_id), events_key(job_id), wake_key(lane), queue_key(origin)]
            + [queue_key(name) for name in lane_queues(lane)],
            args=[
                job_id,
                -1 if limit is None else limit,
                int(job.start_within_s) + self.result_ttl_s,
                job.start_within_s,
                status_event(JobStatus.QUEUED),
                *(part for item in fields.items() for part in item),
            ],
        )
        if answer == b"duplicate" and not own:  # else the answer to a first try was lost on its way
            raise DuplicateJob(f"a job with the id {job_id} exists already")
        if answer == b"full":
            raise QueueFull(f"{limit} jobs are waiting in the {lane} lane already")
        if answer == b"memory":
            raise QueueFull("the queue is short of memory until earlier results expire")
        return job_id

    def cancel(self, job_id: str) -> JobView:
        """Ask for a job to end; cancelling a job that has ended changes nothing.

        A queued job is canceled at once. A running one is canceled by its worker, within a row or a solver step: the
        returned view still says `running` then. Raises `JobNotFound`.
        """
        view = self.view(job_id)
        if view.status.is_terminal:
            return view
        # flagged first: whoever claims it between these two steps will see that
        pipe = self.redis.pipeline()
        pipe.hset(job_key(job_id), "cancel", "1")
        pipe.hexists(job_key(job_id), "status")
        if not pipe.execute()[1]:  # it expired this moment
            self.redis.delete(job_key(job_id))
            raise JobNotFound(f"there is no job {job_id}, or its result has expired")
        self._end_queued(job_id, view, JobStatus.CANCELED, CANCELED)
        return self.view(job_id)

    def forget(self, job_id: str) -> None:
        """Delete a job that has ended, its result, events and pictures. Raises `JobNotFound`; a live job is kept."""
        if not self.view(job_id).status.is_terminal:
            raise QueueError(f"the job {job_id} has not ended; cancel it first")
        self.redis.delete(job_key(job_id), events_key(job_id), blob_key(job_id), preview_key(job_id))

    def _end_queued(self, job_id: str, view: JobView, status: JobStatus, error: JobError) -> bool:
        origin = queue_name(view.task.lane, view.priority)
        return self.finish(job_id, origin, status, place=queue_key(origin), error=error)

    def finish(
        self,
        job_id: str,
        origin: str,
        status: JobStatus,
        *,
        place: str = LEASES,
        token: str = "",
        lapsed: bool = False,
        error: JobError | None = None,
        result: Result | None = None,
        blob: bytes = b"",
        timing: Timing | None = None,
        client: Any = None,
    ) -> bool:
        """End a job, once: True when this call was the one. For the worker, and for jobs that still wait.

        `place` and `token` say where the caller believes it stands: in a queue, or leased under that token. `lapsed`
        acts on a lease only when its time is over. `client` may be a pipeline, whose results hold the answer.
        """
        rq_status, registry = _RQ_STATUS[status]
        fields: dict[str, str | bytes] = {"outcome": status}
        if error:
            fields["error"] = error.model_dump_json()
        if result:
            fields |= {"result": RESULT.dump_json(result), "version": result.model.version}
        if timing:
            fields["timing"] = timing.model_dump_json()
        return bool(
            self._finish(
                keys=[place, job_key(job_id), events_key(job_id), blob_key(job_id), f"rq:{registry}:{origin}",
                      f"rq:wip:{origin}"],
                args=[job_id, token, int(lapsed), self.result_ttl_s, rq_status, status_event(status, error), blob,
                      *(part for item in fields.items() for part in item)],
                client=client,
            )
        )  # fmt: skip

    # -- reading

    def view(self, job_id: str) -> JobView:
        """What there is to know of a job. Raises `JobNotFound`."""
        if not _ID.fullmatch(job_id):
            raise JobNotFound(f"there is no job {job_id[:64]!r}")
        values: list[bytes | None] = self.redis.hmget(job_key(job_id), list(_FIELDS))
        h = {name: value.decode() for name, value in zip(_FIELDS, values, strict=True) if value is not None}
        if "task" not in h or "submitted" not in h:
            raise JobNotFound(f"there is no job {job_id}, or its result has expired")
        status = _status(h)
        view = JobView(
            id=job_id,
            status=status,
            task=Task(h["task"]),
            model=ModelRef(name=h["model"], version=h["version"]) if "version" in h else None,
            model_name=h["model"],
            priority=Priority(h["priority"]),
            request_id=h["request_id"],
            fingerprint=h.get("fingerprint", ""),
            owner=h.get("owner", ""),
            n=int(h.get("n", 1)),
            created_at=float(h["submitted"]),
            started_at=float(h["started"]) if "started" in h and status is not JobStatus.QUEUED else None,
            ended_at=float(h["ended"]) if "ended" in h else None,
            timing=_timing(h),
            progress=Event.model_validate_json(_with_id(h["progress"])).progress if "progress" in h else None,
            error=JobError.model_validate_json(h["error"]) if "error" in h else None,
        )
        start_by = float(h.get("start_by", "inf"))
        late = status is JobStatus.QUEUED and start_by < time.time() and start_by < self.redis.time()[0]
        if late and self._end_queued(job_id, view, JobStatus.EXPIRED, EXPIRED):
            return self.view(job_id)
        return view

    def position(self, view: JobView) -> int | None:
        """How many jobs of its lane come before a queued one; None for one that does not wait (any more).

        Several of them may share a batch with it.
        """
        if view.status is not JobStatus.QUEUED:
            return None
        pipe = self.redis.pipeline(transaction=False)
        for priority in Priority:
            if priority is view.priority:
                break
            pipe.llen(queue_key(queue_name(view.task.lane, priority)))
        pipe.lpos(queue_key(queue_name(view.task.lane, view.priority)), view.id)
        *before, own = pipe.execute()
        return None if own is None else sum(before) + own

    def result(self, job_id: str) -> Result | None:
        """The result of a job that succeeded, None for any other state. Raises `JobNotFound`."""
        values: list[bytes | None] = self.redis.hmget(job_key(job_id), ["task", "result"])
        task, result = values
        if task is None:
            raise JobNotFound(f"there is no job {job_id[:64]!r}, or its result has expired")
        return None if result is None else RESULT.validate_json(result)

    def blob(self, key: str) -> bytes | None:
        """The bytes behind `Pictures.blob`; None when they have expired."""
        if not key.startswith("ncml:blob:"):
            raise ValueError(f"not a blob: {key!r}")
        data: bytes | None = self.redis.get(key)
        return data

    def preview(self, job_id: str) -> Preview | None:
        """What a running job's pictures looked like when they were last seen; None when that is not known."""
        stored: bytes | None = self.redis.get(preview_key(job_id))
        return None if stored is None else Preview.model_validate_json(stored)

    async def events(self, job_id: str, after: str = "0", *, tick_s: float = 15.0) -> AsyncGenerator[Event | None]:
        """Every change of state and progress after the event id `after`, ending with the terminal one; none after that.

        Yields None whenever nothing happened for `tick_s` (a keep-alive, and a chance to look at the clock). Raises
        `JobNotFound` when there is no such job. Leave it early by `await generator.aclose()`.
        """
        if not re.fullmatch(r"[0-9]{1,19}(-[0-9]{1,19})?", after):
            raise JobNotFound(f"job {job_id[:64]!r} has no event {after[:64]!r}")
        alive, tick = False, max(1, int(tick_s * 1000))  # a job of which there is an entry needs no other look
        while True:
            reply = await self._async_client().xread({events_key(job_id): after}, block=tick if alive else 1)
            for entry_id, entry in _entries(reply):
                after = entry_id.decode()
                event = Event.model_validate_json(_with_id(entry[b"event"].decode(), after))
                yield event
                if event.status and event.status.is_terminal:
                    return
            if not reply:
                if alive:
                    yield None
                view = await asyncio.to_thread(self.view, job_id)
                if view.status.is_terminal and not await self._async_client().xread({events_key(job_id): after}):
                    if not await self._async_client().exists(events_key(job_id)):  # the stream has expired
                        yield Event(id=after, kind="status", status=view.status, error=view.error)
                    return
            alive = True

    async def wait(self, job_id: str, timeout_s: float) -> JobView:
        """The job once its state is terminal, or as it stands after `timeout_s`. Raises `JobNotFound`."""
        deadline = time.monotonic() + timeout_s
        if timeout_s > 0:
            async with contextlib.aclosing(self.events(job_id, tick_s=min(timeout_s, 1.0))) as events:
                async for _ in events:
                    if time.monotonic() > deadline:
                        break
        return await asyncio.to_thread(self.view, job_id)

    def _async_client(self) -> Any:
        if self._async is None:
            pool = self.redis.connection_pool
            kwargs = {k: v for k, v in pool.connection_kwargs.items() if k in _ASYNC_KWARGS}
            unix, tls = "path" in pool.connection_kwargs, issubclass(pool.connection_class, redis.SSLConnection)
            if unix:
                kwargs["unix_socket_path"] = pool.connection_kwargs["path"]
            self._async = redis.asyncio.Redis(**kwargs, ssl=tls)
        return self._async

    # -- the state of the whole

    def ping(self) -> bool:
        """True when the server answers."""
        return bool(self.redis.ping())

    def workers(self) -> list[WorkerInfo]:
        """Live workers, longest-lived first."""
        return [worker.info for worker in self._workers()]

    def models(self) -> list[ModelDescriptor]:
        """The models that live workers serve: one entry for each name and version, latest workers first."""
        return _models(self._workers())

    def service(self, lane: Lane) -> tuple[int, list[ModelDescriptor]]:
        """Both at once: how many live workers serve a lane, and the models that live workers serve."""
        workers = self._workers()
        return sum(lane in worker.info.lanes for worker in workers), _models(workers)

    def _workers(self) -> list[Worker]:
        names: list[bytes] = self.redis.zrange(WORKERS, 0, -1)
        if not names:
            return []
        # a word lapses by the server's clock, so that of a worker's machine does not matter
        words: list[bytes | None] = self.redis.mget([worker_key(name.decode()) for name in names])
        heard = self._heard
        self._heard = {word: heard[word] if word in heard else _heard(word) for word in words if word}
        workers = [worker for worker in self._heard.values() if worker]
        return sorted(workers, key=lambda worker: (worker.info.started_at, worker.info.name))

    def depths(self) -> list[QueueDepth]:
        """How much waits in each queue, and since when: lanes in order, high priority first."""
        names = [(lane, priority) for lane in Lane for priority in Priority]
        pipe = self.redis.pipeline(transaction=False)
        for lane, priority in names:
            pipe.llen(queue_key(queue_name(lane, priority)))
            pipe.lindex(queue_key(queue_name(lane, priority)), 0)
        answers: list[Any] = pipe.execute()
        pipe = self.redis.pipeline(transaction=False)
        for oldest in answers[1::2]:
            pipe.hget(job_key(oldest.decode() if oldest else "-"), "submitted")
        ages = [max(0.0, time.time() - float(at)) if at else 0.0 for at in pipe.execute()]
        return [
            QueueDepth(lane=lane, priority=priority, depth=depth, oldest_age_s=age)
            for (lane, priority), depth, age in zip(names, answers[0::2], ages, strict=True)
        ]

    def depth(self, lane: Lane) -> int:
        """How many jobs wait in a lane."""
        return sum(entry.depth for entry in self.depths() if entry.lane is lane)

    def pace(self, lane: Lane) -> float:
        """Jobs a second that the lane's live workers do together, by what each has measured; 0 while none has."""
        return pace_of(self.workers(), lane)

    def close(self) -> None:
        """Release the connections."""
        self.redis.close()

    async def aclose(self) -> None:
        """Release the connections of `events` and `wait`."""
        if self._async is not None:
            await self._async.aclose()


_ASYNC_KWARGS = frozenset({
    "host", "port", "db", "username", "password", "socket_timeout", "socket_connect_timeout", "ssl_ca_certs",
    "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname",
})  # fmt: skip
"""What both kinds of client are told alike. The timeout is longer than `events` blocks, which redis-py's own is not."""


def _heard(word: bytes) -> Worker | None:
    """What a worker says; None from one of another version, as there may be during an upgrade."""
    try:
        return Worker.model_validate_json(word)
    except ValidationError:
        log.warning("a worker of another version is passed over")
        return None


def _models(workers: Sequence[Worker]) -> list[ModelDescriptor]:
    found: dict[tuple[str, str], ModelDescriptor] = {}
    for worker in workers:
        for model in worker.models:
            key = (model.name, model.version)
            # Only workers that generate have a batching to report.
            if model.batching is None and key in found:
                model = model.model_copy(update={"batching": found[key].batching})
            found[key] = model
    return list(reversed(found.values()))


def parse(data: bytes) -> Job:
    """The job specification in an RQ job's body. Raises `ValueError` when it is not one of ours."""
    try:
        body = json.loads(zlib.decompress(data))
        return JOB.validate_json(body[2][0])
    except (zlib.error, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise ValueError("the payload is not a job of this version") from error


def _entries(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of one stream, from either form that XREAD answers in (RESP 2: a list, RESP 3: a mapping)."""
    if not reply:
        return []
    return reply[0][1] if isinstance(reply, list) else next(iter(reply.values()))[0]  # pyright: ignore[reportUnknownVariableType]


def _with_id(event: str, event_id: str = "") -> str:
    return json.dumps({"id": event_id} | json.loads(event))


def _status(h: dict[str, str]) -> JobStatus:
    if h.get("outcome"):
        return JobStatus(h["outcome"])
    rq = {"queued": JobStatus.QUEUED, "started": JobStatus.RUNNING, "canceled": JobStatus.CANCELED}
    return rq.get(h.get("status", ""), JobStatus.FAILED)


def _timing(h: dict[str, str]) -> Timing:
    if "timing" in h:
        return Timing.model_validate_json(h["timing"])
    until = float(h["started"]) if "started" in h and h["status"] != "queued" else float(h.get("ended", time.time()))
    return Timing(queue_s=max(0.0, until - float(h["submitted"])))


def in_order(lanes: Sequence[Lane]) -> list[str]:
    """The queues of several lanes: every high-priority queue first."""
    return [queue_name(lane, priority) for priority in Priority for lane in lanes]
