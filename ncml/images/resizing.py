"""Resize an image by one of Pillow's filters, as plain data that says how. Does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Filter = Literal["BICUBIC", "BOX"]


@dataclass(frozen=True)
class Resize:
    """A resize to a size, by an antialiased filter."""

    height: int
    width: int
    filter: Filter
    reducing_gap: float | None = None
    """Pillow first reduces by whole numbers, to at least this many times the size; None: it does not."""
    grey: bool = False
    """Whether the image becomes one of grey levels first, [H, W]."""

    def __call__(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize uint8 [H, W, 3]; an image of the size is returned as it is."""
        if image_HWC.shape[:2] == (self.height, self.width) and not self.grey:
            return image_HWC
        image = Image.fromarray(np.ascontiguousarray(image_HWC))
        image = image.convert("L") if self.grey else image
        size = self.width, self.height
        return np.array(image.resize(size, Image.Resampling[self.filter], reducing_gap=self.reducing_gap))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Rebuild the result of `to_json`."""
        return cls(**stored)
