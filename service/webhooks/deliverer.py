"""Sends the ends of jobs to their webhooks: claims deliveries, makes attempts, and plans the next one."""

import asyncio
import contextlib
import logging
import random
import time
from datetime import UTC, datetime
from typing import Literal

import anyio.to_thread
from redis.exceptions import RedisError

from ncml.errors import InputError
from service.answers import JobEnded, job_answer
from service.service_metrics import Metrics
from service.webhooks.sending import Attempt, Sender
from service.webhooks.targets import Receivers
from worker.deliveries import LEASE_S, Delivery
from worker.outages import Outages
from worker.queue import JobQueue

POLL_S = 0.5
"""Interval at which due deliveries are looked for, in addition to whenever an attempt has ended."""

ATTEMPTS_AT_ONCE = 32
"""Attempts of one process at the same time."""

FIRST_PAUSE_S, PAUSE_GROWTH, LONGEST_PAUSE_S = 5.0, 3, 6 * 3600.0
"""Pauses between attempts: 5 s, 15 s, 45 s and so on, at most 6 h, each up to a fifth longer at random."""

GIVE_UP_S = 3 * 24 * 3600.0
"""Time after the end of the job at which a delivery fails."""

INTERRUPTED = Attempt(fault="the service stopped")

log = logging.getLogger(__name__)


class Deliverer:
    """Sends what the ends of jobs have left in the queue, beside other services; one per application."""

    def __init__(self, queue: JobQueue, receivers: Receivers, sender: Sender, metrics: Metrics) -> None:
        self._queue = queue
        self._receivers = receivers
        self._sender = sender
        self._metrics = metrics
        self._attempts: set[asyncio.Task[None]] = set()
        self._has_room = asyncio.Event()
        self._outages = Outages()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send in the background."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; attempts in progress are given back, and repeated by another service or after the next start."""
        tasks = [task for task in (self._loop, *self._attempts) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sender.close()

    async def _run(self) -> None:
        while True:
            self._has_room.clear()
            try:
                await self._begin_attempts()
            except RedisError as error:
                self._outages.report(log, "webhooks are not sent: the queue does not answer", error)
            except Exception:  # the next deliveries may be sound
                log.exception("webhooks are not sent")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._has_room.wait()

    async def _begin_attempts(self) -> None:
        room = ATTEMPTS_AT_ONCE - len(self._attempts)
        deliveries = await anyio.to_thread.run_sync(self._queue.deliveries.claim, room) if room else []
        for delivery in deliveries:
            attempt = asyncio.get_running_loop().create_task(self._deliver(delivery))
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
            attempt.add_done_callback(lambda _: self._has_room.set())

    async def _deliver(self, delivery: Delivery) -> None:
        claimed_at = time.monotonic()
        try:
            attempt = await self._send(delivery)
        except asyncio.CancelledError:
            attempt = INTERRUPTED
        state, pause_s = plan(delivery, attempt, time.time())
        self._metrics.webhook_attempts.labels(outcome="retried" if state == "waiting" else state).inc()
        if state != "delivered" and attempt is not INTERRUPTED:
            log.warning(
                "the webhook %s was not accepted: %s %s; %s",
                delivery.id, delivery.receiver, attempt.fault or f"answered {attempt.status}",
                "it is not tried again" if state == "failed" else f"trying again in {pause_s:.0f} s",
                extra={"job": delivery.view.id, "request": delivery.view.request_id},
            )  # fmt: skip
        while time.monotonic() < claimed_at + LEASE_S:  # then the attempt is repeated
            try:
                await anyio.to_thread.run_sync(self._queue.deliveries.settle, delivery, state, pause_s)
                return
            except RedisError as error:
                self._outages.report(log, "the end of an attempt is not recorded: the queue does not answer", error)
                if attempt is INTERRUPTED:
                    return
                await asyncio.sleep(POLL_S)

    async def _send(self, delivery: Delivery) -> Attempt:
        try:
            target = self._receivers.check(delivery.url)  # the operator may have removed it
        except InputError as error:
            return Attempt(fault=error.detail)
        return await self._sender.send(target, delivery.id, message(delivery))


def plan(delivery: Delivery, attempt: Attempt, now: float) -> tuple[Literal["waiting", "delivered", "failed"], float]:
    """Return the state of a delivery after an attempt, and the pause until the next one."""
    if attempt.is_accepted:
        return "delivered", 0.0
    if attempt is INTERRUPTED:
        return "waiting", 0.0
    pause_s = min(FIRST_PAUSE_S * PAUSE_GROWTH ** min(delivery.attempts - 1, 20), LONGEST_PAUSE_S)
    pause_s = max(pause_s, min(attempt.retry_after_s, LONGEST_PAUSE_S)) * random.uniform(1, 1.2)
    ended_at = delivery.view.ended_at or now
    if attempt.is_gone or now + pause_s > ended_at + GIVE_UP_S:
        return "failed", 0.0
    return "waiting", pause_s


def message(delivery: Delivery) -> str:
    """Return the message, the same in every attempt: the document of the job as of its end."""
    view = delivery.view
    ended_at = datetime.fromtimestamp(view.ended_at or 0, UTC)
    document = JobEnded(type=f"job.{view.status}", timestamp=ended_at, data=job_answer(view, None))
    return document.model_dump_json(exclude={"data": {"webhook"}})
