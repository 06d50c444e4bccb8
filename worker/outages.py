"""Outages of the queue's server, which a process survives: it logs them at a limited rate, pauses and tries again."""

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

import redis.exceptions

LOG_S = 10.0
"""How often the log reports that the queue does not answer."""

PAUSE_S = 0.2

log = logging.getLogger("ncml.worker")


class Outages:
    """The outages that one worker, or one connection, notices."""

    def __init__(self) -> None:
        self._log_at = 0.0

    @contextmanager
    def tolerated(self, *, pause_s: float = PAUSE_S) -> Generator[None]:
        """Continue after an error of the server: report it and pause."""
        try:
            yield
        except redis.exceptions.RedisError as error:
            is_refusal = isinstance(error, redis.exceptions.ResponseError)
            self.report(log, "the queue refuses a command" if is_refusal else "the queue does not answer", error)
            time.sleep(pause_s)

    def report(self, logger: logging.Logger, event: str, error: Exception) -> None:
        """Log an error, unless one was logged recently."""
        if time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + LOG_S
            logger.warning("%s: %s", event, error)
