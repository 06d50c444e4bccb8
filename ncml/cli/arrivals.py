"""Files that arrive in a folder, each once it is completely written. Does not import torch.

The folder is listed again and again, so that no event is needed: network folders send none, and a queue of events can
overflow. Events only wake the loop up earlier (`ncml.cli.watch_loop`).
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ncml.cli.earlier_rows import stamp
from ncml.images import SUFFIXES
from ncml.object_storage import StoragePath
from ncml.paths import Location, list_files

QUIET_S = 0.2
"""A file is complete once its size and its modification time have not changed for this long."""

PATIENCE_S = 10.0
"""A file that cannot be read is invalid if it has not changed for this long: until then, its writer may have paused."""

FIRST_RETRY_S, MAX_RETRY_S = 10.0, 600.0
"""Pause before an object that storage does not deliver is tried again, which doubles each time, and the longest one."""

MAX_WAITING = 100_000
"""Files of a bucket that wait at the same time; the following ones are found when these are judged."""

Stamp = tuple[str, ...]
"""Size and modification time of a file, as in the columns `bytes` and `modified` of a table."""


@dataclass
class Arrival:
    """A file that has not been judged in its present state."""

    path: Location
    stamp: Stamp
    since: float
    """Monotonic time at which it was first found in this state."""
    not_before: float
    """Monotonic time from which it can be read."""
    problem: str = ""
    """Why storage does not deliver it."""
    retry_s: float = 0.0
    """Its last pause for that reason."""


class Arrivals:
    """The files of a folder that are to be judged."""

    def __init__(self, folder: Location, is_judged: Callable[[Location, Stamp], bool]) -> None:
        """is_judged: returns whether a file has been judged in this state."""
        self.folder = folder
        self._is_judged = is_judged
        is_stored = isinstance(folder, StoragePath)
        self._quiet_s = 0.0 if is_stored else QUIET_S  # an object appears when it is complete
        self._max_waiting = MAX_WAITING if is_stored else None
        self._pending: dict[Location, Arrival] = {}

    def __len__(self) -> int:
        """Return how many files wait, complete or not."""
        return len(self._pending)

    def complete(self) -> list[Arrival]:
        """List the folder and return the files that are complete and not judged, oldest first.

        Raises `OSError`, `InputError` or `StorageError` if the folder cannot be read.
        """
        now = time.monotonic()
        present = dict(
            itertools.islice((file for file in self._files() if not self._is_judged(*file)), self._max_waiting)
        )
        for path in self._pending.keys() - present.keys():
            del self._pending[path]
        for path, state in present.items():
            arrival = self._pending.get(path)
            if arrival is None or arrival.stamp != state:
                self._pending[path] = Arrival(path, state, now, now + self._quiet_s)
        ready = [arrival for arrival in self._pending.values() if arrival.not_before <= now]
        return sorted(ready, key=lambda arrival: (arrival.stamp[1], arrival.path))

    def next_check_s(self) -> float:
        """Return the seconds until a file may be complete; infinite if none waits."""
        times = [arrival.not_before - time.monotonic() for arrival in self._pending.values()]
        return max(0.0, min(times, default=math.inf))

    def judged(self, arrival: Arrival) -> None:
        """Forget a file that has been judged."""
        self._pending.pop(arrival.path, None)

    def has_changed(self, arrival: Arrival) -> bool:
        """Return whether a file has another state than when it was listed, or is gone."""
        path = arrival.path
        return path.has_changed() if isinstance(path, StoragePath) else state_of(path) != arrival.stamp

    def may_be_incomplete(self, arrival: Arrival) -> bool:
        """Return whether a file that cannot be read may still be written; if so, it is complete later."""
        end = arrival.since + PATIENCE_S
        arrival.not_before = min(end, time.monotonic() + 1)
        return time.monotonic() < end

    def postpone(self, url: str, problem: str) -> bool:
        """Let other objects be judged before one that storage does not deliver; return whether the problem is new."""
        arrival = self._pending.get(StoragePath(url))
        if arrival is None:
            return True
        arrival.retry_s = min(2 * arrival.retry_s or FIRST_RETRY_S, MAX_RETRY_S)
        arrival.not_before = time.monotonic() + arrival.retry_s
        is_new, arrival.problem = problem != arrival.problem, problem
        return is_new

    def _files(self) -> Iterator[tuple[Location, Stamp]]:
        if isinstance(self.folder, StoragePath):
            paths: Iterable[Location] = self.folder.list_files()
        else:
            os.scandir(self.folder).close()  # a network folder that has vanished, or an unmounted one
            paths = list_files([self.folder])
        for path in paths:
            state = state_of(path) if path.suffix.lower() in SUFFIXES else ()
            if any(state):  # it has not been deleted or moved since it was listed
                yield path, state


def state_of(path: Location) -> Stamp:
    """Return the state of a file; empty texts if it cannot be read."""
    return tuple(stamp(path).values())
