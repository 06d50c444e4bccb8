"""The signals on which a process stops."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn


class SignalEvent:
    """A `threading.Event` that a signal handler may set; only the thread that waits for it may clear it.

    A handler runs between two bytecodes of the main thread. If that has just taken the lock of a `threading.Event`, to
    wait for it, a handler that sets the event waits for this lock forever. `SimpleQueue.put` has no such lock.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._wakeup: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        """Return whether the event is set."""
        return self._is_set

    def set(self) -> None:
        """Set the event, and wake the threads that wait for it."""
        self._is_set = True
        if self._wakeup.empty():
            self._wakeup.put(None)

    def clear(self) -> None:
        """Reset the event."""
        self._is_set = False  # first, so that an event set meanwhile stays set
        with contextlib.suppress(queue.Empty):
            self._wakeup.get_nowait()

    def wait(self, timeout: float) -> bool:
        """Wait for the event, `timeout` seconds at most; return whether it is set."""
        if not self._is_set:
            with contextlib.suppress(queue.Empty):
                self._wakeup.get(timeout=timeout)
                self._wakeup.put(None)  # for another thread that waits
        return self._is_set


def stop_signals() -> list[signal.Signals]:
    """Return the signals that request a stop: SIGINT, SIGTERM and, except under nohup, SIGHUP of a closed terminal."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


@contextlib.contextmanager
def handling(handler: Callable[[int], None]) -> Generator[Mapping[int, Any]]:
    """Call `handler` with each signal that requests a stop, instead of its earlier handler; yield the earlier ones.

    Outside the main thread, where handlers cannot be set, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    earlier = {int(number): signal.getsignal(number) for number in stop_signals()}
    for number in earlier:
        signal.signal(number, lambda received, _: handler(received))
    try:
        yield earlier
    finally:
        for number, former in earlier.items():
            signal.signal(number, former)


def interrupt(number: int) -> NoReturn:
    """Handle a signal as Ctrl-C, so that unfinished work is stored."""
    raise KeyboardInterrupt
