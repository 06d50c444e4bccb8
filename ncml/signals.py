"""The signals on which a process stops."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator


def stop_signals() -> list[signal.Signals]:
    """Return the signals that request a stop: SIGINT, SIGTERM and, except under nohup, SIGHUP of a closed terminal."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


@contextlib.contextmanager
def interrupting() -> Generator[None]:
    """Raise `KeyboardInterrupt` also on SIGTERM and SIGHUP, so that unfinished work is stored."""

    def interrupt(signum: int, _: object) -> None:
        raise KeyboardInterrupt

    earlier = {signum: signal.getsignal(signum) for signum in stop_signals() if signum != signal.SIGINT}
    for signum in earlier:
        signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
