"""Where the figures and pictures of a run go while it lasts: TensorBoard always, and what the user names beside it."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ncml.config import Config
from ncml.errors import InputError


@runtime_checkable
class Tracker(Protocol):
    """What follows a run; another one is a function of (folder, config) that returns one of these."""

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Figures by name after so many images seen."""
        ...

    def picture(self, images: int, name: str, picture: NDArray[np.uint8]) -> None:
        """A picture, uint8 (H, W, 3), after so many images seen."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`; the horizontal axis counts images."""

    def __init__(self, folder: Path, begun: int) -> None:
        """begun: images seen so far; what an earlier process wrote beyond them is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=begun)

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Figures by name after so many images seen."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)
        self.writer.flush()

    def picture(self, images: int, name: str, picture: NDArray[np.uint8]) -> None:
        """A picture, uint8 (H, W, 3), after so many images seen."""
        self.writer.add_image(name, picture, images, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def named(name: str) -> Callable[[Path, Config], Tracker]:
    """The tracker's factory that `module:function` names."""
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError("tracker", f"there is no tracker {name!r}: {error}") from error
    if not callable(found) or not _takes_two(found):
        raise InputError("tracker", f"{name} is no function of (folder, config).")

    def make(folder: Path, config: Config) -> Tracker:
        tracker = found(folder, config)
        if not isinstance(tracker, Tracker):
            raise InputError("tracker", f"{name} makes no tracker: let it return one with scalars, picture and close.")
        return tracker

    return make


def _takes_two(function: Callable[..., object]) -> bool:
    """Whether it can be called with two arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some that are written in C do not tell
        return True
    return True
