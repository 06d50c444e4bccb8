"""What `ncml.Model` returns: scores that convert to dictionaries and tables, and images; notebooks show both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml.images import enlarge, format_values, grid, heat, to_html, to_html_table, to_png

if TYPE_CHECKING:
    from ncml import client
    from ncml.ood.calibration import Verdict


def score_columns(score: Score | client.Score) -> dict[str, Any]:
    """Return the values of a score, computed here or by a service, with the column names of `ncml score`."""
    columns: dict[str, Any] = {"bpd": score.bpd, "log_likelihood": score.log_likelihood}
    if score.ood is not None:
        columns |= {name: getattr(score.ood, name) for name in ("statistic", "score", "p_value", "is_ood")}
    columns |= score.statistics
    return columns if score.flipped_bpd is None else columns | {"flipped_bpd": score.flipped_bpd}


@dataclass(eq=False, repr=False)
class Score(Mapping[str, Any]):
    """The likelihood of one image, and its verdict.

    As a mapping it has the values of `to_dict`, so that `pandas.DataFrame(scores)` is a table.
    """

    bpd: float
    """Bits per dimension, exact at noise 0; lower means more likely."""
    log_likelihood: float
    """Nats of the whole image; at noise > 0 a log-density per grey level."""
    map: NDArray[np.float32] | None = None
    """Bits per dimension of each pixel given those before it, [H, W]; its mean is `bpd`. None if not requested."""
    ood: Verdict | None = None
    """The verdict; None if not requested or the model is not calibrated."""
    statistics: dict[str, float] = field(default_factory=dict[str, float])
    """The requested statistics, by name; higher means more out-of-distribution."""
    flipped_bpd: float | None = None
    """Bits per dimension with the lowest bit of every value flipped (`sanity`)."""
    file: str | None = None
    """The path of the image, if it was passed as one."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values in a flat dictionary with the column names of `ncml score`; the map is left out.

        `statistic`, `score`, `p_value` and `is_ood` are those of the verdict.
        """
        return ({} if self.file is None else {"file": self.file}) | score_columns(self)

    def __getitem__(self, column: str) -> Any:
        return self.to_dict()[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __repr__(self) -> str:
        return f"Score({', '.join(map('='.join, format_values(self.to_dict()).items()))})"

    def _repr_html_(self) -> str:
        """Return a table of the values, and the map if there is one."""
        image = "" if self.map is None else to_html(heat.render_pixel_map(self.map), "bits per dimension of each pixel")
        return to_html_table(self.to_dict()) + image


class ImageArray(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """Images, uint8 [n, H, W, 3] or [H, W, 3]: an array that a notebook renders."""

    def _repr_png_(self) -> bytes | None:
        """Return the images as a PNG, as a grid if there are several; None for an array that is not of images."""
        if self.dtype != np.uint8 or self.ndim not in (3, 4) or self.shape[-1] != 3 or not self.size:
            return None
        return to_png(enlarge(grid(np.asarray(self).reshape(-1, *self.shape[-3:]))))
