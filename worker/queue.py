"""The queue as its users see it: submit, look up, cancel, follow. Imports RQ and Redis, no torch and no worker process.

A job is an RQ job record in an RQ queue, so RQ's tools list it, but only the scripts in `lua/` change its state, each
in one atomic step. `worker.redis_keys` lists every key.
"""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Unpack

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ncml.errors import NcmlError
from worker.changes import Changes
from worker.contract import EVENT_ID, JOB_ID, Job, JobStatus, Lane, Priority, held_name, queue_name
from worker.deliveries import Deliveries
from worker.job_results import CANCELED, EXPIRED, RESULT, Event, JobEnding, JobView, Preview, Result
from worker.monitor import QueueMonitor
from worker.records import RQ_STATUS, VIEW_FIELDS, JobFacts, make_record, read_event, read_view, status_event
from worker.redis_keys import (
    ERASED,
    LEASES,
    blob_key,
    events_key,
    job_key,
    preview_key,
    queue_key,
    queue_names,
    script,
    wake_key,
)
from worker.review_store import Reviews

RESULT_TTL_S = 3600
"""How long an ended job, its result and its images are kept."""

ERASE_S = 3600
"""How often the server's append-only file is rewritten: deleted and expired images remain in it until then."""

EVENTS_CAP = 256
"""Entries of a job's event stream; older ones are dropped."""

_POOL: Any = redis.BlockingConnectionPool  # redis-py's types are incomplete

TICK_S = 15.0
"""How often a job without changes is read again: changes are published, but a message can be lost."""

CONNECTIONS, MONITOR_CONNECTIONS = 16, 8
"""Maximum connections of a process for jobs and for the monitor, in addition to the one that receives changes; further
calls wait."""

TIMEOUT_S, MONITOR_TIMEOUT_S = 30.0, 3.0
"""How long the server may take to answer; less for the monitor, whose callers report that the server hangs."""

log = logging.getLogger("ncml.queue")


class QueueError(NcmlError):
    """The queue cannot carry out a request."""


class JobNotFound(QueueError):
    """There is no such job, or its time to live is over."""


class DuplicateJob(QueueError):
    """A job with this id exists already."""


class QueueFull(QueueError):
    """The lane is at its limit of jobs or bytes."""


class QueueOutOfMemory(QueueFull):
    """The server's memory is three quarters full; finished jobs of the lane do not change this at once."""


class JobQueue:
    """The queue. Methods are synchronous (call them in a thread pool), except `events` and `wait`.

    All methods raise `redis.exceptions.RedisError` (`ConnectionError`, `TimeoutError`) if the server does not answer.
    Thread-safe. Close it with `close()`, and also with `await aclose()` if `events` or `wait` was used.
    """

    def __init__(self, client: "redis.Redis", *, monitor: QueueMonitor | None = None) -> None:
        self.redis: Any = client  # redis-py's types are those of both its synchronous and asynchronous clients
        self.result_ttl_s = RESULT_TTL_S
        self._submit = script(client, "submit")
        self._finish = script(client, "finish")
        self._cancel = script(client, "cancel")
        self._forget = script(client, "forget")
        self._changes = Changes(client)
        self.deliveries = Deliveries(client)
        self.reviews = Reviews(client)
        self.monitor = monitor or QueueMonitor(client)
        self.on_end: Callable[[JobView], None] = lambda view: None
        """Called with each waiting job that this process ends: a late one, or one that is canceled."""

    @classmethod
    def from_url(cls, url: str) -> "JobQueue":
        """Return a queue on `redis://host:port/db`, `rediss://` or `unix:///path`; it connects on first use.

        Raises `QueueError` for another kind of address.
        """
        try:
            client = _client(url, CONNECTIONS, TIMEOUT_S)
            monitor = QueueMonitor(_client(url, MONITOR_CONNECTIONS, MONITOR_TIMEOUT_S))
        except ValueError:  # its message may quote a part of the password
            raise QueueError(
                "this is not the address of a queue; give redis://[user:password@]host:port/number (special characters "
                "in the password as %-escapes), rediss://... or unix:///path"
            ) from None
        return cls(client, monitor=monitor)

    # -- writing

    def submit(
        self,
        job: Job,
        *,
        job_id: str | None = None,
        limit: int | None = None,
        byte_limit: int | None = None,
        held_s: float | None = None,
        **facts: Unpack[JobFacts],
    ) -> str:
        """Put a job in the queue of its lane and priority; return its id.

        `job_id` (letters, digits, `_`, `-`; at most 64) makes submission idempotent: `DuplicateJob` if it is taken.
        `limit` is the most jobs that may wait in the lane, and `byte_limit` the most bytes of several: `QueueFull`
        beyond them, and when the server's `maxmemory` is nearly reached. One atomic step checks all of this.
        `held_s`: the job waits where no worker claims it, until `release` adds its input or `end_held` ends it; after
        this time it expires.
        """
        job_id = job_id or uuid.uuid4().hex
        if not re.fullmatch(JOB_ID, job_id):
            raise ValueError(f"invalid job id {job_id!r}: use at most 64 letters, digits, _ and -")
        lane = job.task.lane
        if held_s is not None:
            self._expire(held_name(lane))  # those that services which were killed have left
        record = make_record(
            job,
            job_id,
            result_ttl_s=self.result_ttl_s,
            origin=queue_name(lane, job.priority) if held_s is None else held_name(lane),
            client=self.redis,
            **facts,
        )
        start_within_s = job.start_within_s if held_s is None else held_s
        event = status_event(JobStatus.QUEUED)
        if self._add(lane, job_id, record, limit, byte_limit, start_within_s, event) == b"duplicate":
            raise DuplicateJob(f"a job with the id {job_id} already exists")
        return job_id

    def release(self, job_id: str, job: Job, *, byte_limit: int | None = None) -> bool:
        """Complete a held job and put it in its queue; return False if it has ended meanwhile.

        Raises `QueueFull` as `submit` does; the job is then still held.
        """
        origin = queue_name(job.task.lane, job.priority)
        record = make_record(job, job_id, result_ttl_s=self.result_ttl_s, origin=origin, client=self.redis)
        fields = {name: record[name] for name in ("data", "origin", "description", "n", "batch_key")}
        return self._add(job.task.lane, job_id, fields, None, byte_limit, job.start_within_s, "") != b"ended"

    def end_held(self, job_id: str, job: Job, ending: JobEnding) -> None:
        """End a held job, unless it has ended meanwhile."""
        origin = held_name(job.task.lane)
        if self.finish(job_id, origin, ending, place=queue_key(origin)):
            self.on_end(self.view(job_id))

    def expire_late(self) -> None:
        """End the waiting and held jobs that are late, for want of a worker or a service that would."""
        for name in [*queue_names(list(Lane)), *map(held_name, Lane)]:
            self._expire(name)

    def erase_deleted(self) -> None:
        """Have the server rewrite its append-only file, which holds what was deleted, unless it did so recently.

        By itself it does so only once the file has doubled, and is larger than 64 MiB.
        """
        with contextlib.suppress(redis.ResponseError):  # it is rewriting the file, or a provider forbids the command
            # Without such a file, the command would create one.
            if self.redis.set(ERASED, 1, nx=True, ex=ERASE_S) and self.redis.info("persistence")["aof_enabled"]:
                self.redis.bgrewriteaof()

    def _expire(self, name: str) -> None:
        """End the late jobs of a queue, in which the oldest come first, after those that were returned to it."""
        ids = self.redis.lrange(queue_key(name), 0, -1)
        for first in range(0, len(ids), 16):
            have_ended = {self._has_ended(job_id) for job_id in ids[first : first + 16]}
            if False in have_ended and True not in have_ended:
                break

    def _has_ended(self, job_id: bytes) -> bool | None:
        """Return whether a job in a queue has ended, now if it is late; None for one that cannot be late.

        One that had started in time cannot. A restored queue may hold others that have ended.
        """
        try:
            view = self.view(job_id.decode(errors="replace"))
        except JobNotFound:
            return True
        return view.status.is_terminal or (None if view.start_by is None else False)

    def _add(
        self,
        lane: Lane,
        job_id: str,
        fields: Mapping[str, str | bytes | int | float],
        limit: int | None,
        byte_limit: int | None,
        start_within_s: float,
        event: str,
    ) -> bytes:
        """Write fields of a job and add it to the queue that they name; raise `QueueFull` beyond a limit."""
        answer: bytes = self._submit(
            keys=[job_key(job_id), wake_key(lane), queue_key(str(fields["origin"])), queue_key(held_name(lane))]
            + [queue_key(name) for name in queue_names([lane])],
            args=[
                job_id,
                -1 if limit is None else limit,
                -1 if byte_limit is None else byte_limit,
                lane,
                start_within_s,
                event,
                *(part for item in fields.items() for part in item),
            ],
        )
        if answer == b"full":
            raise QueueFull(f"{limit} jobs are waiting in the {lane} lane already")
        if answer == b"bytes":
            raise QueueFull(f"the jobs that wait in the {lane} lane hold {byte_limit} bytes already")
        if answer == b"memory":
            raise QueueOutOfMemory("the queue is short of memory until earlier results expire")
        return answer

    def cancel(self, job_id: str, submitted: float | None = None) -> JobView:
        """Cancel a job; return its view. An ended job does not change.

        A queued job is canceled at once. A running job is canceled by its worker, within a row or a solver step; until
        then its status is `running` and `is_canceling` is true. It ends canceled even if its worker finishes it first.
        `submitted` restricts this to the job that was submitted at that time: another one may have taken its id.
        Raises `JobNotFound`.
        """
        self.view(job_id)  # a job that is late expires
        answer = self._cancel(
            keys=[job_key(job_id)],
            args=[job_id, "" if submitted is None else submitted, self.result_ttl_s,
                  status_event(JobStatus.CANCELED, CANCELED), CANCELED.model_dump_json()],
        )  # fmt: skip
        if answer == b"missing":
            raise JobNotFound(f"there is no job {job_id}, or its result has expired")
        view = self.view(job_id)
        if answer == b"canceled":
            self.on_end(view)
        return view

    def forget(self, job_id: str, submitted: float | None = None) -> None:
        """Delete an ended job, its result, events and images.

        `submitted` restricts this to the job that was submitted at that time. Raises `JobNotFound`, and `QueueError`
        for a live job.
        """
        answer = self._forget(
            keys=[job_key(job_id), events_key(job_id), blob_key(job_id), preview_key(job_id)],
            args=["" if submitted is None else submitted],
        )
        if answer == b"missing":
            raise JobNotFound(f"there is no job {job_id}, or its result has expired")
        if answer == b"live":
            raise QueueError(f"the job {job_id} has not ended; cancel it first")

    def finish(
        self,
        job_id: str,
        origin: str,
        ending: JobEnding,
        *,
        place: str = LEASES,
        token: str = "",
        lapsed: bool = False,
        client: Any = None,
    ) -> bool:
        """End a job, once; return whether this call did. For the worker, and for jobs that still wait.

        A job whose cancellation was accepted ends canceled, regardless of `ending`.

        `place` and `token` name where the caller expects the job: in a queue, or leased under that token. `lapsed`
        restricts this to leases that have lapsed. `client` may be a pipeline, whose results hold the script's answers.
        """
        fields: dict[str, str | bytes] = {"outcome": ending.status}
        if ending.error:
            fields["error"] = ending.error.model_dump_json()
        if ending.result:
            fields |= {"result": ending.result.model_dump_json(), "version": ending.result.model.version}
        if ending.timing:
            fields["timing"] = ending.timing.model_dump_json()
        ended = self._finish(
            keys=[place, job_key(job_id), blob_key(job_id)],
            args=[job_id, token, int(lapsed), origin, self.result_ttl_s, RQ_STATUS[ending.status],
                  status_event(ending.status, ending.error), ending.blob, status_event(JobStatus.CANCELED, CANCELED),
                  CANCELED.model_dump_json(), *(part for item in fields.items() for part in item)],
            client=client,
        )  # fmt: skip
        return bool(ended)

    # -- reading

    def view(self, job_id: str) -> JobView:
        """Return the public state of a job. Raises `JobNotFound`."""
        if not re.fullmatch(JOB_ID, job_id):
            raise JobNotFound(f"there is no job {job_id[:64]!r}")
        values = self.fields(job_id, VIEW_FIELDS)
        by_name = {name: value for name, value in zip(VIEW_FIELDS, values, strict=True) if value is not None}
        if "task" not in by_name or "submitted" not in by_name:
            raise JobNotFound(f"there is no job {job_id}, or its result has expired")
        try:
            view = read_view(job_id, {name: value.decode() for name, value in by_name.items()})
        except (ValueError, KeyError) as error:
            raise JobNotFound(f"the record of the job {job_id} is damaged") from error
        start_by = view.start_by if view.status is JobStatus.QUEUED else None
        is_late = start_by is not None and start_by < self.redis.time()[0]
        if is_late:
            origin = queue_name(view.task.lane, view.priority)
            if by_name.get("origin") == held_name(view.task.lane).encode():
                origin = held_name(view.task.lane)
            if self.finish(job_id, origin, JobEnding(JobStatus.EXPIRED, EXPIRED), place=queue_key(origin)):
                view = self.view(job_id)
                self.on_end(view)
        return view

    def position(self, view: JobView) -> int | None:
        """Return the number of jobs in its lane ahead of a queued job; None if it does not wait (any more).

        Jobs ahead may share a batch with it.
        """
        if view.status is not JobStatus.QUEUED:
            return None
        pipe = self.redis.pipeline(transaction=False)
        for priority in Priority:
            if priority is view.priority:
                break
            pipe.llen(queue_key(queue_name(view.task.lane, priority)))
        pipe.lpos(queue_key(queue_name(view.task.lane, view.priority)), view.id)
        *higher_priority, position = pipe.execute()
        return None if position is None else sum(higher_priority) + position

    def result(self, job_id: str) -> Result | None:
        """Return the result of a job that succeeded, None in any other state. Raises `JobNotFound`."""
        task, result = self.fields(job_id, ("task", "result"))
        if task is None:
            raise JobNotFound(f"there is no job {job_id[:64]!r}, or its result has expired")
        try:
            return None if result is None else RESULT.validate_json(result)
        except ValueError as error:
            raise JobNotFound(f"the record of the job {job_id} is damaged") from error

    def result_size(self, job_id: str) -> int:
        """Return the bytes of a job's result and images, as they are stored; 0 if there are none."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.hstrlen(job_key(job_id), "result")
        pipe.strlen(blob_key(job_id))
        return sum(pipe.execute())

    def fields(self, job_id: str, names: Sequence[str]) -> list[bytes | None]:
        """Return fields of a record; all None if the key has another type."""
        try:
            values: list[bytes | None] = self.redis.hmget(job_key(job_id), list(names))
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return [None] * len(names)
        return values

    def blob(self, key: str) -> bytes | None:
        """Return the images stored under a blob key; None if they have expired."""
        if not key.startswith("ncml:blob:"):
            raise ValueError(f"{key!r} is not the key of a blob")
        data: bytes | None = self.redis.get(key)
        return data

    def preview(self, job_id: str) -> Preview | None:
        """Return the latest preview of a running job, if there is one."""
        stored: bytes | None = self.redis.get(preview_key(job_id))
        try:
            return None if stored is None else Preview.model_validate_json(stored)
        except ValueError:
            log.warning("the preview of the job %s is damaged", job_id)
            return None

    async def events(
        self, job_id: str, after: str = "0", *, tick_s: float = TICK_S, until: "asyncio.Future[None] | None" = None
    ) -> AsyncGenerator[Event | None]:
        """Yield every event after the event id `after`, up to the one with a terminal status or until `until` is done.

        Yields None whenever nothing happened for `tick_s`, so that the caller can send a keep-alive or check the time.
        Raises `JobNotFound` if there is no such job. To leave early, call `await generator.aclose()`.
        """
        if not re.fullmatch(EVENT_ID, after):
            raise JobNotFound(f"job {job_id[:64]!r} has no event {after[:64]!r}")
        async with self._changes.follow(job_id, progress=True) as follower:
            if until:
                until.add_done_callback(lambda _: follower.wake())
            while True:
                events, view = await asyncio.to_thread(self._events_after, job_id, after)
                for event in events:
                    after = event.id
                    yield event
                if view is None or view.status.is_terminal or (until and until.done()):
                    return
                pause_s = 0.0 if events else _pause_s(view, tick_s)
                del events, view  # thousands of streams wait here
                if not await follower.wait(pause_s) and pause_s:
                    yield None

    def _events_after(self, job_id: str, after: str) -> tuple[list[Event], JobView | None]:
        """Return the events of a job after one of them, and the job; None for it after the last event."""
        view = self.view(job_id)
        entries: list[tuple[bytes, dict[bytes, bytes]]] = self.redis.xrange(events_key(job_id), min=f"({after}")
        events: list[Event] = []
        for entry_id, entry in entries:
            try:
                events.append(read_event(entry[b"event"].decode(), entry_id.decode()))
            except (ValueError, KeyError):
                log.warning("an event of the job %s is damaged", job_id)
        if any(event.status and event.status.is_terminal for event in events):
            return events, None
        if view.status.is_terminal and not self.redis.exists(events_key(job_id)):  # the stream has expired
            events.append(Event(id=after, kind="status", status=view.status, error=view.error))
        return events, view

    async def wait(self, job_id: str, timeout_s: float, until: "asyncio.Future[None] | None" = None) -> JobView:
        """Return the job once it has ended, or as it is after `timeout_s` or once `until` is done.

        Raises `JobNotFound`.
        """
        deadline = time.monotonic() + timeout_s
        async with self._changes.follow(job_id) as follower:
            if until:
                until.add_done_callback(lambda _: follower.wake())
            while True:
                view = await asyncio.to_thread(self.view, job_id)
                remaining_s = deadline - time.monotonic()
                if view.status.is_terminal or remaining_s <= 0 or (until and until.done()):
                    return view
                pause_s = _pause_s(view, min(remaining_s, TICK_S))
                del view  # thousands of requests wait here
                await follower.wait(pause_s)

    def close(self) -> None:
        """Release the connections."""
        self.redis.close()
        self.monitor.close()

    async def aclose(self) -> None:
        """Release the connection of `events` and `wait`."""
        await self._changes.aclose()


def _client(url: str, connections: int, timeout_s: float) -> Any:
    """Return a client that waits this long for an answer; raises `ValueError` for an invalid address."""
    pool = _POOL.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(5.0, timeout_s),
        health_check_interval=30,
        # A server that has become a replica refuses writes: its connection is closed, so that the next call looks the
        # address up again. Nothing is sent twice.
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[redis.ReadOnlyError],
    )
    return redis.Redis.from_pool(pool)


def _pause_s(view: JobView, longest_s: float) -> float:
    """Return how long to wait for a change of a job before it is read again: a waiting job may expire meanwhile."""
    if view.status is not JobStatus.QUEUED or view.start_by is None:
        return longest_s
    return min(longest_s, max(view.start_by - time.time(), 1.0))
