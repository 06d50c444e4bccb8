"""Trackers of a training run: TensorBoard always, and any others that the user names."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ncml.config import Config
from ncml.errors import InputError


@runtime_checkable
class Tracker(Protocol):
    """Records the figures and images of a run. Users provide a function of (folder, config) that returns one."""

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Record figures by name after `images_seen` images."""
        ...

    def image(self, images_seen: int, name: str, image: NDArray[np.uint8]) -> None:
        """Record an image, uint8 [H, W, 3], after `images_seen` images."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`; the horizontal axis counts images."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        """images_seen: images seen so far; later records of an earlier process are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=images_seen + 1)

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Record figures by name after `images_seen` images."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, images_seen)
        self.writer.flush()

    def image(self, images_seen: int, name: str, image: NDArray[np.uint8]) -> None:
        """Record an image, uint8 [H, W, 3], after `images_seen` images."""
        self.writer.add_image(name, image, images_seen, dataformats="HWC")

    def close(self) -> None:
        """Write pending events."""
        self.writer.close()


def tracker_factory(name: str) -> Callable[[Path, Config], Tracker]:
    """Return the function of (folder, config) that `module:function` names; raise InputError if there is none."""
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "name it as module:function, and add the module's folder to PYTHONPATH if it is not installed"
        raise InputError("tracker", f"there is no tracker {name!r} ({error}): {remedy}.") from error
    if not callable(function) or not _accepts_two_arguments(function):
        raise InputError("tracker", f"{name} is not a function of (folder, config).")

    def create(folder: Path, config: Config) -> Tracker:
        tracker: Any = function(folder, config)
        if not isinstance(tracker, Tracker):
            raise InputError("tracker", f"{name} returns no tracker: return an object with scalars, image and close.")
        return tracker

    return create


def _accepts_two_arguments(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True
