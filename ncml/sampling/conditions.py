"""The conditions under which the pixels of a batch are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tilt:
    """A change of the distributions that pixels are sampled from (`ncml.sampling.guidance`); none by default.

    guidance: weight of the class against no class. temperature: above 1 flattens the distributions.
    """

    guidance: float = 1.0
    temperature: float = 1.0

    @property
    def rows_per_image(self) -> int:
        """Rows of a batch that an image takes: with guidance two, one with its class and one without."""
        return 1 if self.guidance == 1 else 2

    def for_class(self, *, has_class: bool) -> Tilt:
        """Return the tilt of an image; guidance acts on images of a class only."""
        return self if has_class else replace(self, guidance=1.0)


NO_TILT = Tilt()

OnRow = Callable[[int], bool]
"""Called with the number of rows that are done; True stops the sampling."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch."""

    t: float
    class_B: Tensor
    orientation_B: Tensor
    tilt: Tilt = NO_TILT
    first_row: int = 0
    """The rows before this one are known."""

    @property
    def t_B(self) -> Tensor:
        """The time of each image."""
        return torch.full(self.class_B.shape, self.t, device=self.class_B.device)

    def select(self, index_B: Sequence[int] | slice | Tensor) -> Conditions:
        """Return the conditions of some images."""
        return replace(self, class_B=self.class_B[index_B], orientation_B=self.orientation_B[index_B])

    def without_class(self, null_class: int) -> Conditions:
        """Return the same conditions with the null class."""
        return replace(self, class_B=torch.full_like(self.class_B, null_class))

    def expand(self, null_class: int) -> Conditions:
        """Return the conditions of a batch's rows: with guidance row b has image b's class, and row b + B no class."""
        if self.tilt.rows_per_image == 1:
            return self
        class_N = torch.cat([self.class_B, torch.full_like(self.class_B, null_class)])
        return replace(self, class_B=class_N, orientation_B=self.orientation_B.repeat(2))
