"""Outages of the queue's server, which a worker survives: it logs them at a limited rate, pauses and tries again."""

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
    """The outages that one worker notices."""

    def __init__(self) -> None:
        self._log_at = 0.0

    @contextmanager
    def survived(self) -> Generator[None]:
        """Continue after an error of the server: log it, unless one was logged recently, and pause."""
        try:
            yield
        except redis.exceptions.RedisError as error:
            if time.monotonic() >= self._log_at:
                self._log_at = time.monotonic() + LOG_S
                log.warning("the queue does not answer: %s", error)
            time.sleep(PAUSE_S)
