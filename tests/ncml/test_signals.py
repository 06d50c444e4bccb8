"""An event that a signal handler sets is noticed, whatever the handler interrupts."""

import gc
import itertools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from ncml.signals import SignalEvent


def interrupted(function: Callable[[], Any], instruction: int, handler: Callable[[], None]) -> bool:
    """Call a function, with a handler that interrupts it before its n-th bytecode; return whether it ran that many."""
    count = 0

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += kind == "opcode"
        if kind == "opcode" and count == instruction:
            handler()
        return trace

    gc.disable()  # the finalizers that it calls would be traced and counted
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
        gc.enable()
    return count >= instruction


def test_a_handler_may_interrupt_a_wait_anywhere() -> None:
    """A `threading.Event` waits for its own lock here."""
    noticed: list[bool] = []

    def wait_at_each_instruction() -> None:
        for instruction in itertools.count(1):
            event = SignalEvent()
            if not interrupted(lambda: event.wait(0.01), instruction, event.set):  # noqa: B023 (called at once)
                return
            noticed.append(event.wait(0))

    waiting = threading.Thread(target=wait_at_each_instruction, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(noticed) > 10
    assert all(noticed)


def test_an_event_stays_set_if_a_handler_sets_it_while_it_is_cleared() -> None:
    stayed: list[bool] = []
    for instruction in itertools.count(1):
        event = SignalEvent()
        event.set()
        if not interrupted(event.clear, instruction, event.set):
            assert not event.wait(0.01)
            break
        stayed.append(event.wait(0.01))
    reset = stayed.index(True)
    assert reset < 10 < len(stayed)  # the event is reset first
    assert all(stayed[reset:])


def test_an_event_wakes_all_threads_that_wait() -> None:
    event = SignalEvent()
    assert not event.wait(0.01)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(event.wait, 600) for _ in range(3)]
        event.set()
        assert [future.result(60) for future in waiting] == [True] * 3
    assert event.is_set()
    assert event.wait(600)
