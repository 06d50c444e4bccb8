"""A pool of processes that decode images, killed when a file costs too much or its client disconnects.

Every image starts in one of a few quick slots. One that turns out to be expensive leaves its slot to the next image and
continues at a lower priority, few at a time, so that ordinary images never wait behind expensive ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import psutil

from ncml.errors import InputError, NcmlError, NotAnImage, TooCostly, TooLarge
from ncml.paths import printable
from service.decoder import Answer, Limits, OriginalImage, TiledImage, serve
from service.http.problems import Problem

T = TypeVar("T")

QUICK_S = 0.025
"""CPU time after which an image is expensive: that of a photograph of about two megapixels."""
MAX_WALL_S = 60.0
"""Time after which a process that uses no CPU time is killed."""
MAX_EXPENSIVE = 16
"""Maximum number of expensive images that wait; further ones are refused."""
NICENESS = 5

log = logging.getLogger(__name__)

_processes = multiprocessing.get_context("forkserver")  # a new process is a fork of one that has imported the decoders
_processes.set_forkserver_preload(["service.decoder"])


MAX_TEMPORARY_PATH_BYTES = 70
"""The path of a socket may have 107 bytes; multiprocessing adds up to 32 to that of the folder of temporary files."""


def check_temporary_folder() -> None:
    """Raise `NcmlError` if decoding processes cannot start because the path of their sockets would be too long."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_TEMPORARY_PATH_BYTES:
        raise NcmlError(f"TMPDIR: {printable(folder)} is too long for a socket's path; name another folder")


class DecoderDied(Exception):
    """The process ended without an answer, or sent something that is not an answer (`exit_code` is None)."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class _AnswerReader(pickle.Unpickler):
    """Unpickles answers only, so that a decoder compromised by a file cannot make the service run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PARTS_OF_ANSWERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an answer")


_PARTS_OF_ANSWERS = {
    *((part.__module__, part.__name__) for part in (Answer, OriginalImage, TiledImage)),
    *((error.__module__, error.__name__) for error in (InputError, NotAnImage, TooLarge, TooCostly)),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("numpy._core.multiarray", "_reconstruct"),
}


class Decoder:
    """One process. `send` and `receive` block: call them in a thread."""

    def __init__(self, limits: Limits) -> None:
        self._pipe, end = _processes.Pipe()
        self._process = _processes.Process(target=serve, args=(end, limits), name="ncml-decoder", daemon=True)
        self._process.start()
        end.close()
        self._lock = threading.Lock()  # of the two fields below
        self._is_used = self._is_closed = False
        self._started_cpu_s = 0.0
        assert self._process.pid is not None
        self._statistics = psutil.Process(self._process.pid)

    def send(self, call: Callable[[], Any]) -> bool:
        """Start a call; return False if the process has ended, which `receive` reports."""
        self._started_cpu_s = self._total_cpu_s()
        try:
            with self._keep_open():
                self._pipe.send(call)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def wait(self, seconds: float) -> bool:
        """Return whether the call was answered, or the process ended, within a time."""
        try:
            with anyio.move_on_after(seconds):
                await anyio.wait_readable(self._pipe.fileno())
                return True
            return False
        finally:
            if not self._pipe.closed:
                os.set_blocking(self._pipe.fileno(), True)  # uvloop has changed it, and `send` and `receive` block

    def receive(self) -> Answer:
        """Return the answer of the call. Raises `DecoderDied` if there is none."""
        try:
            with self._keep_open():
                data = self._pipe.recv_bytes()
        except (EOFError, OSError):  # the latter if it was killed while it answered
            self._process.join(5)
            raise DecoderDied(self._process.exitcode) from None
        try:
            answer = _AnswerReader(io.BytesIO(data)).load()
        except Exception as error:  # invalid pickles raise errors of any kind
            raise DecoderDied(None) from error
        if not isinstance(answer, Answer):
            raise DecoderDied(None)
        return answer

    def cpu_s(self) -> float:
        """Return the CPU time of the call so far."""
        return self._total_cpu_s() - self._started_cpu_s

    def _total_cpu_s(self) -> float:
        try:
            times = self._statistics.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def lower_priority(self) -> None:
        """Lower the priority of the process below that of ordinary images and of the service."""
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, self._statistics.pid, NICENESS)

    def close(self) -> None:
        """Kill the process, and close the pipe as soon as no thread uses it."""
        self._process.kill()
        with self._lock:
            self._is_closed = True
            if not self._is_used:
                self._pipe.close()

    @contextlib.contextmanager
    def _keep_open(self) -> Generator[None]:
        """Return the context in which a thread uses the pipe.

        A thread runs on when the task that waits for it is canceled. If the pipe were closed under it, it would read
        from the client's socket that gets the number of the pipe next.
        """
        with self._lock:
            self._is_used = True
        try:
            yield
        finally:
            with self._lock:
                self._is_used = False
                if self._is_closed:
                    self._pipe.close()


class DecoderPool:
    """Runs calls that decode images in limited processes; see the module."""

    def __init__(self, slots: int, limits: Limits) -> None:
        self._limits = limits
        self._max_idle = slots + 1  # a spare one replaces a process that was killed
        self._quick_slots = asyncio.Semaphore(slots)
        self._expensive_slots = asyncio.Semaphore(max(1, slots // 2))
        self._waiting = 0
        self._idle: list[Decoder] = []
        self._replacing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the processes now rather than with the first images."""
        while not self._closed and len(self._idle) < self._max_idle:
            self._release(await self._start_decoder())

    async def close(self) -> None:
        """Kill the processes."""
        self._closed = True
        await asyncio.gather(*self._replacing)
        for decoder in self._idle:
            decoder.close()
        self._idle.clear()

    async def run(self, field: str, call: Callable[[], T]) -> T:
        """Return `call()`, a picklable call, computed in a process; kill the process when canceled.

        Raises the call's `InputError`, `TooCostly` with this field beyond a limit, and the 503 `Problem` while too
        many expensive images wait.
        """
        decoder: Decoder | None = None
        try:
            async with self._quick_slots:
                decoder = self._idle.pop() if self._idle else await self._start_decoder()
                if not await anyio.to_thread.run_sync(decoder.send, call):  # the system killed it while it waited
                    decoder.close()
                    decoder = await self._start_decoder()
                    await anyio.to_thread.run_sync(decoder.send, call)
                deadline = time.monotonic() + MAX_WALL_S
                while not await decoder.wait(QUICK_S):
                    if decoder.cpu_s() >= QUICK_S:
                        break
                    if time.monotonic() > deadline:
                        raise _too_much_time(field, self._limits)
                else:
                    answer = await self._receive(decoder, field)
                    self._release(decoder)
                    decoder = None
                    return _unwrap(answer, field, self._limits)
                if self._expensive_slots.locked():
                    decoder.close()
                    decoder = None
                    self._replace()
            if self._waiting >= MAX_EXPENSIVE:
                detail = "Too many large images are being decoded; retry in a few seconds."
                raise Problem(503, detail, kind="no-room")
            self._waiting += 1
            try:
                await self._expensive_slots.acquire()
            finally:
                self._waiting -= 1
            try:
                if decoder is None:
                    decoder = await self._start_decoder()
                    await anyio.to_thread.run_sync(decoder.send, call)
                decoder.lower_priority()
                if not await decoder.wait(MAX_WALL_S):
                    raise _too_much_time(field, self._limits)
                return _unwrap(await self._receive(decoder, field), field, self._limits)
            finally:
                self._expensive_slots.release()
        finally:
            if decoder is not None:
                decoder.close()
                self._replace()

    async def _receive(self, decoder: Decoder, field: str) -> Answer:
        try:
            return await anyio.to_thread.run_sync(decoder.receive)
        except DecoderDied as death:
            if death.exit_code == -signal.SIGPROF:
                raise _too_much_time(field, self._limits) from death
            log.error("a decoder ended with %s", death)
            raise TooCostly(
                field, f"{field} cannot be decoded: it crashed the decoder; save it again as an ordinary PNG or JPEG."
            ) from death

    async def _start_decoder(self) -> Decoder:
        return await anyio.to_thread.run_sync(Decoder, self._limits)

    def _release(self, decoder: Decoder) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            decoder.close()
        else:
            self._idle.append(decoder)

    def _replace(self) -> None:
        """Start a process in place of one that was killed, in the background."""

        async def start() -> None:
            if not self._closed and len(self._idle) < self._max_idle:
                self._release(await self._start_decoder())

        task = asyncio.get_running_loop().create_task(start())
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)


def _unwrap(answer: Answer, field: str, limits: Limits) -> Any:
    if answer.error is not None:
        kind, name, detail = answer.error
        raise kind(name, detail)
    if answer.out_of_memory:
        raise TooCostly(
            field,
            f"{field} needs more than {limits.memory_bytes / 1e6:.0f} MB of memory to decode, the limit; make it "
            "smaller, or save it again as an ordinary PNG or JPEG.",
        )
    return answer.value


def request_too_slow(limit_s: float) -> TooCostly:
    """Return the error of a request whose images take longer than its time limit."""
    return TooCostly(
        "image",
        f"image: decoding takes more than {limit_s:g} s, the limit of a request; send fewer or smaller images, or "
        "retry when the service is less busy.",
    )


def _too_much_time(field: str, limits: Limits) -> TooCostly:
    return TooCostly(
        field,
        f"{field} takes more than {limits.cpu_s:g} s to decode, the limit; make it smaller, or save it again as an "
        "ordinary PNG or JPEG.",
    )
