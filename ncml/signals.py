"""The signals on which a process stops."""

from __future__ import annotations

import signal


def stop_signals() -> list[signal.Signals]:
    """Return the signals that request a stop: SIGINT, SIGTERM and, except under nohup, SIGHUP of a closed terminal."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals
