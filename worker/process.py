"""The engine process as its worker sees it: start it, send batches, receive messages, stop it."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading

from worker import engine
from worker.messages import Batch, Drop, EngineSettings, Message


class EngineDied(Exception):
    """The engine process has ended; its text is the cause, "" if that is not known."""


class EngineProcess:
    """A running engine. No method but `stop` waits for it: two threads feed and drain the pipe."""

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, engine_end = context.Pipe()
        self._process = context.Process(
            target=engine.serve, args=(engine_end, settings), name="ncml-engine", daemon=True
        )
        self._process.start()
        engine_end.close()
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Batch | Drop | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._drain, self._feed)]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid or 0

    def send(self, message: Batch | Drop) -> None:
        """Send a batch, or the jobs to leave out of the running one."""
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message, or None after `timeout_s`. Raises `EngineDied`."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)
            raise EngineDied(self._describe_end())
        return message

    def _describe_end(self) -> str:
        """Return what ended the engine, in a clause."""
        self._process.join(1)  # its end of the pipe is closed a moment earlier
        status = self._process.exitcode
        if status == -signal.SIGKILL:
            return "killed by signal 9, probably for lack of memory"
        if status is None:
            return ""
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def stop(self) -> None:
        """Kill the engine."""
        self._process.kill()
        self._process.join()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._pipe.close()
        self._process.close()

    def _drain(self) -> None:
        try:
            while True:
                self._inbox.put(self._pipe.recv())
        except (EOFError, OSError):
            self._inbox.put(None)

    def _feed(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)
        except OSError:
            pass  # `_drain` sees the end of the pipe too, and reports it
