"""The running mean of a run's loss, and how far it has risen since the run was saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEPS = 50
IMAGES = 1_600
"""The mean covers about this many of the last steps and images, whichever is longer: the losses of single images differ
by bits."""

MAX_RISE = 0.5
"""A mean that has risen further than this, in bits per dimension, is a divergence: ten standard deviations of the rise
between two saves, for images whose bits per dimension vary by 2."""

SMALL_RISE = 0.1
"""A rise beyond this may become a divergence."""


@dataclass
class RunningLoss:
    """An exponentially weighted mean of the losses of a run's steps, in bits per dimension."""

    batch_size: int
    mean: float = math.nan
    """NaN before the first step."""
    count: int = 0
    """Number of steps so far."""
    saved: float = math.nan
    """The mean when the run was last saved; NaN before that, or if it covered too few steps then."""

    def include(self, loss: float) -> None:
        """Include the loss of a step, unless it is not finite."""
        self.count += 1
        if math.isfinite(loss):
            earlier = loss if math.isnan(self.mean) else self.mean
            self.mean = earlier + (loss - earlier) / min(self.count, self._horizon)

    def note_saved(self) -> None:
        """Compare the mean with its present value from now on."""
        self.saved = self.mean if self.count >= self._horizon else math.nan

    @property
    def rise(self) -> float:
        """Bits per dimension by which the mean is higher than when the run was saved; NaN where that is unknown."""
        return self.mean - self.saved

    @property
    def _horizon(self) -> int:
        return max(STEPS, math.ceil(IMAGES / self.batch_size))
