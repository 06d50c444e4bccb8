"""A process that decodes images under limits of CPU time and memory. `service.decoders` starts and ends it.

It answers one call at a time through its pipe, until the pipe closes. The kernel kills it if a call exceeds its CPU
time.
"""

from __future__ import annotations

import pickle
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.data.good_images import check_side
from ncml.errors import InputError
from ncml.images import open_image, reduced_jpeg, resize_to

Image.init()  # imports every decoder, once: all processes are forked from one that has imported this module


@dataclass(frozen=True)
class Limits:
    """Maximum CPU time and memory of one call."""

    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Answer:
    """The value that a call returned, or class, field and detail of its `InputError`; neither if out of memory."""

    value: Any = None
    error: tuple[type[InputError], str, str] | None = None
    out_of_memory: bool = False


_PROTOCOL = 4
"""The pickle protocol of answers: the names that it refers to are those that `service.decoders` accepts."""


def serve(pipe: Connection, limits: Limits) -> None:
    """Answer calls until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which closes the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # a decoder may warn of each of 60,000 tags, which would fill the log
    _limit_memory(limits.memory_bytes)
    try:
        while True:
            call = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)  # SIGPROF ends the process
            answer = _answer(call)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(answer)
            del call, answer  # an idle process holds no image
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(call: Callable[[], Any]) -> bytes:
    """Return the pickled answer to a call."""
    try:
        return pickle.dumps(Answer(value=call()), _PROTOCOL)
    except InputError as error:
        answer = Answer(error=(type(error), error.field, error.detail))
    except MemoryError:
        answer = Answer(out_of_memory=True)
    return pickle.dumps(answer, _PROTOCOL)


def _limit_memory(memory_bytes: int) -> None:
    """Limit what this process may allocate in addition (on Linux only), and write no core dumps."""
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass(frozen=True)
class TiledImage:
    """The size of an image, and its pixels, uint8 HWC RGB, if they may cross the queue."""

    height: int
    width: int
    pixels: bytes | None


@dataclass(frozen=True)
class OriginalImage:
    """An image at the model's size, its own size, and its pixels at that, uint8 HWC RGB, if its file is not smaller."""

    resized: NDArray[np.uint8]
    height: int
    width: int
    pixels: bytes | None


def open_original(
    data: bytes, height: int, width: int, *, field: str, max_bytes: int, max_pixels: int
) -> OriginalImage:
    """Decode an image for a detector and a model of this size; raise `InputError` for one that is too small."""
    image = open_image(data, field=field, max_bytes=max_bytes, max_pixels=max_pixels)
    check_side(image, field)
    pixels = image.tobytes() if image.nbytes <= len(data) else None
    return OriginalImage(resize_to(image, height, width), image.shape[0], image.shape[1], pixels)


def open_thumbnail(data: bytes, longer_side: int, *, field: str, max_bytes: int, max_pixels: int) -> bytes:
    """Decode an image, and return a JPEG of it that has at most `longer_side` pixels on a side."""
    return reduced_jpeg(open_image(data, field=field, max_bytes=max_bytes, max_pixels=max_pixels), longer_side)


def open_for_tiles(data: bytes, *, max_bytes: int, max_pixels: int, max_raw_bytes: int) -> TiledImage:
    """Decode an image for tiles; return its size, and its pixels if they have at most `max_raw_bytes`."""
    image: NDArray[np.uint8] = open_image(data, max_bytes=max_bytes, max_pixels=max_pixels)
    height, width, _ = image.shape
    return TiledImage(height, width, image.tobytes() if image.nbytes <= max_raw_bytes else None)
