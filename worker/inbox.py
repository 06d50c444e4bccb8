"""What an engine has received: batches to compute, and the jobs of them that are no longer needed."""

from __future__ import annotations

from collections import deque
from multiprocessing.connection import Connection

from worker.messages import Batch, Drop


class PipeClosed(Exception):
    """The worker has exited."""


class Inbox:
    """Reads the pipe, also in the middle of a batch. All methods raise `PipeClosed` at its end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._batches: deque[Batch] = deque()
        self._dropped: dict[int, set[str]] = {}

    def has_batch(self, timeout_s: float = 0.0) -> bool:
        """Return whether a batch waits; wait this long for a message if none does."""
        self.read(0.0 if self._batches else timeout_s)
        return bool(self._batches)

    def take_batch(self) -> Batch | None:
        """Remove the first batch that waits and return it, None if none does."""
        return self._batches.popleft() if self._batches else None

    def dropped_from(self, batch: Batch) -> set[str]:
        """Return the ids of its jobs that are not needed, to which `read` adds until the batch is closed."""
        return self._dropped.setdefault(batch.number, set())

    def close(self, batch: Batch) -> None:
        """Forget a batch that has ended."""
        self._dropped.pop(batch.number, None)

    def read(self, timeout_s: float = 0.0) -> None:
        """Read the messages that have arrived; wait this long for the first one."""
        try:
            while self._pipe.poll(timeout_s):
                message: Batch | Drop = self._pipe.recv()
                timeout_s = 0.0
                if isinstance(message, Batch):
                    self._batches.append(message)
                    self.dropped_from(message)
                elif message.number in self._dropped:  # else the batch has ended meanwhile
                    self._dropped[message.number] |= message.ids
        except (EOFError, OSError) as error:
            raise PipeClosed from error
