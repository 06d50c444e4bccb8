"""How a computation reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def no_images() -> NDArray[np.uint8]:
    """Return an empty batch of images, [0, 0, 0, 3]."""
    return np.empty((0, 0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Progress:
    """The state of one stage of a computation."""

    stage: str
    done: int
    total: int
    """0 if it is unknown."""
    note: str = ""
    preview: Callable[[], NDArray[np.uint8]] = no_images
    """Return the current images, uint8 [B, H, W, 3]; empty except while images are sampled."""


OnProgress = Callable[[Progress], None]
"""Called as work proceeds; it may call a model, also the one at work."""


class StopMeasuring(Exception):
    """Raised by an `OnProgress` to end the measurement of a detector's power, of which the results so far are kept."""


def ignore_progress(progress: Progress) -> None:
    """Do nothing: the default `on_progress`."""
