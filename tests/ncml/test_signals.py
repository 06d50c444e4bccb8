"""A stop that a signal requests is noticed, at whichever instruction the signal arrives."""

import itertools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from ncml.signals import StopEvent


def interrupted(function: Callable[[], Any], instruction: int, handler: Callable[[], None]) -> bool:
    """Call a function, and the handler just before its n-th instruction; return whether it has so many."""
    count = 0

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += kind == "opcode"
        if kind == "opcode" and count == instruction:
            handler()
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count >= instruction


def test_a_handler_may_interrupt_a_wait_anywhere() -> None:
    """A `threading.Event` waits for its own lock here."""

    def wait_at_each_instruction() -> None:
        for instruction in itertools.count(1):
            event = StopEvent()
            if not interrupted(lambda: event.wait(0.01), instruction, event.set):  # noqa: B023 (called at once)
                return
            assert event.wait(0)

    waiting = threading.Thread(target=wait_at_each_instruction, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_request_wakes_all_threads_that_wait() -> None:
    event = StopEvent()
    assert not event.wait(0.01)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(event.wait, 600) for _ in range(3)]
        event.set()
        assert [future.result(60) for future in waiting] == [True] * 3
    assert event.is_set()
    assert event.wait(600)
