"""What the views of a detector have in common. Does not import torch.

A view is estimated from the estimation images; then it is fixed, and its scores are a function of one image. It may
compute several scores in one pass (`mean`, `peak`), each of which can decide the verdict. Scores of a view have no
common unit: the detector standardises them (`ncml.ood.detector_calibration`).

Shapes: N estimation images, H rows and W columns of an image at its own size, h and w those of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ncml.ood.conformal import Floats
from ncml.progress import OnProgress

Pixels = NDArray[np.uint8]
Reader = Callable[[], Pixels]
"""Opens a good image: uint8 [H, W, 3] at its own size. Called once or more; images are not all held in memory."""


@dataclass(frozen=True)
class Measurement:
    """One score of an image."""

    score: float
    """Finite; higher means more out-of-distribution."""
    map_hw: NDArray[np.float32] | None = None
    """Local scores on an even grid that covers the judged region, higher where the image differs; None without one."""
    relative_size: float | None = 1.0
    """Size of the part relative to the nearest one in good images: 1 within their range, or if parts are not brought
    to one position; None: the part was not found, so that the image was compared where it lies."""


@dataclass(frozen=True)
class Stored:
    """A view as it is stored in a detector's folder."""

    tensors: Mapping[str, NDArray[Any]]
    """Arrays by name; floating-point ones in fp16 or fp32."""
    values: Mapping[str, Any]
    """Everything else, as plain JSON values: scales, precision, the digest of a network that is not stored here."""


@dataclass(frozen=True)
class Estimated:
    """A view, and the scores of the images that it was estimated from."""

    view: View
    scores: Mapping[str, Floats]
    """By score, [N]: each image's score under a view that was estimated without the images of its scene."""
    only_scaled: tuple[str, ...] = ()
    """Scores that good images change by nothing but how they are standardised."""
    least_deviations: Mapping[str, float] = field(default_factory=dict)
    """By score, the deviation by which it is standardised at least; none for most."""
    lost: tuple[int, ...] = ()
    """Positions of the images in which the part was not found, so that they were compared where they lie."""
    defective: Mapping[str, Floats] = field(default_factory=dict)
    """By score, [D]: of the defective images that the view has learned from, each learned without it."""


class View(Protocol):
    """One view of images. Its constructor is its own affair."""

    kind: ClassVar[str]
    """The name under which it is stored, such as `features`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its scores, unique among all views: lower case, words joined by underscores."""
        ...

    @property
    def description(self) -> str:
        """At which size it judges images and what vanishes there, in one sentence."""
        ...

    @classmethod
    def estimate(
        cls, readers: Sequence[Reader], scenes_N: NDArray[np.int64], *, device: str, on_progress: OnProgress
    ) -> Estimated:
        """Estimate the view from good images.

        scenes_N: the scene of each image. Images of one scene are near-duplicates, so the scores of an image are
            computed without the others of its scene; at least two scenes.
        Raises `InputError` for images that the view cannot judge.
        """
        ...

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image, uint8 [H, W, 3] at its own size; a deterministic function of the image."""
        ...

    def store(self) -> Stored:
        """Return what `load` needs to make the same view again."""
        ...

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> Self:
        """Make the view from what was stored.

        Raises `ModelError` if it was made with a network or a precision that is not available, and LookupError,
        TypeError or ValueError for damaged values.
        """
        ...
