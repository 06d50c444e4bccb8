"""The signals on which a process stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn


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
