"""Preparation of jobs whose input takes long to decode: in the background, few at once, within a time limit.

The job exists before its images are decoded, held where no worker claims it, so that its client need not wait for its
address. One client prepares one job at a time, so that it cannot occupy all places.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

import anyio.to_thread
from redis.exceptions import RedisError

from ncml.errors import InputError
from service.decoders import request_too_slow
from service.http.problems import Problem
from worker.contract import Job, JobStatus
from worker.job_results import JobEnding, JobError
from worker.queue import JobNotFound, JobQueue, QueueFull

log = logging.getLogger(__name__)

MAX_PREPARATIONS = 2
"""Jobs that are prepared at once: the files of a zip take memory that no other limit counts."""
WAIT_S = 3.0
"""How long a request waits for its place before it is refused."""
RETRY_AFTER_S = 10
HELD_S = 60.0
"""How long a job is held beyond the time limit before it expires, because the service that prepared it was killed."""
PAUSE_S = 1.0
"""How long to wait before the next attempt after the queue has failed."""

_STOPPED = JobError(
    reason="expired", detail="the service stopped while it decoded the images of this job; try again later"
)
_NO_ROOM = JobError(reason="expired", detail="the queue has no room for the images of this job; try again later")
_FAULT = JobError(reason="worker", detail="the images could not be decoded; the service's log has the details")


class Preparations:
    """The jobs that this process prepares."""

    def __init__(self, queue: JobQueue, *, limit_s: float, byte_limit: int) -> None:
        """limit_s: time limit of a preparation; byte_limit: that of the lane, for the prepared jobs."""
        self.held_s = limit_s + HELD_S
        self._queue = queue
        self._limit_s = limit_s
        self._byte_limit = byte_limit
        self._places = asyncio.Semaphore(MAX_PREPARATIONS)
        self._client_places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop all preparations and end their jobs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reserve(self, client: str) -> contextlib.AsyncExitStack:
        """Return a place, which the caller must release with `aclose`, or pass to `start`; raises the 503 `Problem`."""
        place = contextlib.AsyncExitStack()
        try:
            async with asyncio.timeout(WAIT_S):
                await place.enter_async_context(self._client_places.setdefault(client, asyncio.Semaphore(1)))
                await place.enter_async_context(self._places)
        except TimeoutError:
            await place.aclose()
            detail = "The images of other calibrations are being decoded; retry in a few seconds."
            raise Problem(503, detail, kind="no-room", headers={"Retry-After": str(RETRY_AFTER_S)}) from None
        return place

    def start(
        self, place: contextlib.AsyncExitStack, job_id: str, held: Job, prepare: Callable[[], Awaitable[Job]]
    ) -> None:
        """Complete a held job in the background with what `prepare` returns, or end it with the `InputError`."""

        async def run() -> None:
            async with place:
                await self._run(job_id, held, prepare)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job_id: str, held: Job, prepare: Callable[[], Awaitable[Job]]) -> None:
        try:
            job = await self._prepare_while_held(job_id, prepare)
            if job is not None:
                await anyio.to_thread.run_sync(self._release, job_id, job)
            return
        except asyncio.CancelledError:
            ending = JobEnding(JobStatus.EXPIRED, _STOPPED)
        except InputError as error:
            ending = JobEnding(JobStatus.FAILED, JobError(reason="input", field=error.field, detail=error.detail))
        except QueueFull:
            ending = JobEnding(JobStatus.EXPIRED, _NO_ROOM)
        except RedisError as error:  # the job expires when the time for which it is held has passed
            log.error("the queue fails: %s", error)
            return
        except Exception:
            log.exception("the images of a job cannot be decoded", extra={"job": job_id})
            ending = JobEnding(JobStatus.FAILED, _FAULT)
        try:
            await anyio.to_thread.run_sync(self._queue.end_held, job_id, held, ending)
        except RedisError as error:
            log.error("the queue fails: %s", error)

    def _release(self, job_id: str, job: Job) -> bool:
        return self._queue.release(job_id, job, byte_limit=self._byte_limit)

    async def _prepare_while_held(self, job_id: str, prepare: Callable[[], Awaitable[Job]]) -> Job | None:
        """Return the prepared job; None if it has ended meanwhile. Raises `TooCostly` beyond the time limit."""
        preparing, ended = asyncio.ensure_future(prepare()), asyncio.ensure_future(self._ended(job_id))
        try:
            await asyncio.wait({preparing, ended}, timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED)
            if preparing.done():
                return preparing.result()
            if ended.done():
                return None
            raise request_too_slow(self._limit_s)
        finally:
            for future in (preparing, ended):
                future.cancel()
            await asyncio.wait({preparing, ended})

    async def _ended(self, job_id: str) -> None:
        """Return once a job is canceled."""
        while True:
            try:
                if (await self._queue.wait(job_id, self._limit_s)).status.is_terminal:
                    return
            except JobNotFound:
                return
            except RedisError:
                await asyncio.sleep(PAUSE_S)
