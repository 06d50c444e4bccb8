"""Files that arrive in a folder, each once it is completely written. Does not import torch.

The folder is listed again and again, so that no event is needed: network folders send none, and a queue of events can
overflow. Events only wake the loop up earlier (`ncml.cli.watch`).
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ncml.cli.earlier_rows import stamp
from ncml.errors import InputError
from ncml.images import SUFFIXES
from ncml.paths import list_files

QUIET_S = 0.2
"""A file is complete once its size and its modification time have not changed for this long."""

PATIENCE_S = 10.0
"""A file that cannot be read is invalid if it has not changed for this long: until then, its writer may have paused."""

Stamp = tuple[str, ...]
"""Size and modification time of a file, as in the columns `bytes` and `modified` of a table."""


@dataclass
class Arrival:
    """A file that has not been judged in its present state."""

    path: Path
    stamp: Stamp
    since: float
    """Monotonic time at which it was first found in this state."""
    not_before: float
    """Monotonic time from which it can be read."""


class Arrivals:
    """The files of a folder that are to be judged."""

    def __init__(self, folder: Path, is_judged: Callable[[Path, Stamp], bool]) -> None:
        """is_judged: returns whether a file has been judged in this state."""
        self.folder = folder
        self._is_judged = is_judged
        self._pending: dict[Path, Arrival] = {}

    def __len__(self) -> int:
        """Return how many files wait, complete or not."""
        return len(self._pending)

    def complete(self) -> list[Arrival]:
        """List the folder and return the files that are complete and not judged, oldest first.

        Raises `OSError` if the folder cannot be read.
        """
        now = time.monotonic()
        present = {path: state for path, state in self._files() if not self._is_judged(path, state)}
        for path in self._pending.keys() - present.keys():
            del self._pending[path]
        for path, state in present.items():
            arrival = self._pending.get(path)
            if arrival is None or arrival.stamp != state:
                self._pending[path] = Arrival(path, state, now, now + QUIET_S)
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
        return state_of(arrival.path) != arrival.stamp

    def may_be_incomplete(self, arrival: Arrival) -> bool:
        """Return whether a file that cannot be read may still be written; if so, it is complete later."""
        end = arrival.since + PATIENCE_S
        arrival.not_before = min(end, time.monotonic() + 1)
        return time.monotonic() < end

    def _files(self) -> Iterator[tuple[Path, Stamp]]:
        try:
            os.scandir(self.folder).close()  # a network folder that has vanished, or an unmounted one
            for path in list_files([self.folder]):
                state = state_of(path) if path.suffix.lower() in SUFFIXES else ()
                if any(state):  # it has not been deleted or moved since it was listed
                    yield path, state
        except InputError as error:
            raise OSError(str(error)) from error


def state_of(path: Path) -> Stamp:
    """Return the state of a file; empty texts if it cannot be read."""
    return tuple(stamp(path).values())
