"""What held-out images say about a model's statistics: ranks that give p-values, and the file that keeps them.

Two sets of images that the model was not trained on: one fits the statistics of `ncml.ood` that need it, the other
ranks. A small p-value is more out-of-distribution. `calibration.json` in the model's folder is bound to the version of
the model and of the preprocessing.

Shapes: N images, H rows, W columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncml import checkpoint
from ncml.errors import ModelError
from ncml.images.perturbations import Tolerance, tolerated
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Columns, Fit, Gaussian, catalogue, check_enough_to_fit, columns_for, measure

if TYPE_CHECKING:
    from ncml.config import Config
    from ncml.model import Model

DEFAULT = "multiscale"
"""The statistic that gives the verdict unless another is asked for."""


@dataclass(frozen=True)
class Ood:
    """The verdict on one image."""

    statistic: str
    score: float
    p_value: float
    """The share of images from the calibrated distribution that would score as high, by their ranks."""
    threshold: float
    is_ood: bool
    """score > threshold: the p-value is at most the calibrated false-positive rate."""


@dataclass(frozen=True)
class Histogram:
    """How ranking images spread."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """What held-out images say about a model's statistics; bound to one version of the model and of preprocessing."""

    model_version: str
    fit: Fit
    ranked: Mapping[str, Floats]
    """Scores of the ranking images by statistic, ascending: p-values are ranks among these."""
    n_fit: int
    false_positive_rate: float = 0.05
    statistic: str = DEFAULT
    tolerate: tuple[Tolerance, ...] = ()
    preprocessing: str = storage.PREPROCESSING

    @property
    def n_rank(self) -> int:
        """Ranking images."""
        return len(self.ranked[self.statistic])

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that there can be: 1 / (n_rank + 1)."""
        return 1 / (self.n_rank + 1)

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """Of each statistic: a score above it is out-of-distribution at the false-positive rate."""
        return {name: conformal.threshold(scores, self.false_positive_rate) for name, scores in self.ranked.items()}

    @functools.cached_property
    def histograms(self) -> dict[str, Histogram]:
        """How the ranking images spread, by statistic: 40 bins over the central 99.8 %, the rest in the outer two."""

        def histogram(scores: Floats) -> Histogram:
            low, high = np.quantile(scores, [0.001, 0.999])
            edges = np.linspace(low, max(high, low + 1e-9), 41)
            counts, _ = np.histogram(scores.clip(edges[0], edges[-1]), edges)
            return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))

        return {name: histogram(scores) for name, scores in self.ranked.items()}

    @functools.cached_property
    def version(self) -> str:
        """SHA-256 of all that a verdict depends on, 64 hexadecimal digits."""
        return storage.digest(self._content())

    def p_values(self, statistic: str, scores: Floats) -> Floats:
        """Conformal p-values of scores, [N]."""
        return conformal.p_values(scores, self.ranked[statistic])

    def verdicts(self, statistic: str, scores: Floats) -> list[Ood]:
        """The verdict on each score of a statistic."""
        limit = self.thresholds[statistic]
        return [
            Ood(statistic, float(score), float(p), limit, bool(score > limit))
            for score, p in zip(scores, self.p_values(statistic, scores), strict=True)
        ]

    def _content(self) -> dict[str, Any]:
        return {
            "format": storage.FORMAT,
            "model_version": self.model_version,
            "preprocessing": self.preprocessing,
            "statistic": self.statistic,
            "false_positive_rate": self.false_positive_rate,
            "tolerate": list(self.tolerate),
            "n_fit": self.n_fit,
            "fit": asdict(self.fit),
            "ranked": {name: values.tolist() for name, values in self.ranked.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `calibration.json` into the model folder."""
        storage.write(folder / checkpoint.CALIBRATION, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str, config: Config) -> Calibration:
        """Read `calibration.json`; raises `ModelError`, in one sentence, if it is damaged or for something else."""
        path = folder / checkpoint.CALIBRATION
        stored = storage.read(path, model_version)
        try:
            return cls(
                model_version,
                Fit(stored["fit"]["typical_bpd"], Gaussian.from_json(stored["fit"]["gaussian"])),
                {name: np.array(stored["ranked"][name], np.float64) for name in catalogue(config)},
                stored["n_fit"],
                stored["false_positive_rate"],
                stored["statistic"],
                tuple(stored["tolerate"]),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({str(error).rstrip('.')}): {storage.REMEDY}.") from error


Bar = Callable[[str, int, int, str], None]
"""(stage, done, total, note): what a progress bar shows."""


def calibrate(
    model: Model,
    fit_images: NDArray[np.uint8] | Tensor,
    rank_images: NDArray[np.uint8] | Tensor,
    *,
    false_positive_rate: float = 0.05,
    tolerate: Sequence[Tolerance] = (),
    batch_size: int = 32,
    bar: Bar = lambda stage, done, total, note: None,
) -> Calibration:
    """Calibrate a model on held-out images, uint8 [N, H, W, 3]: one set fits the statistics, the other ranks.

    The two sets must be disjoint from each other and from what the model was trained on; else p-values are too small.
    tolerate: changes of processing (`ncml.images.perturbations`) that half of the images go through, so that they are
        not flagged.
    Raises `InputError` where there are too few images: 20 to fit, and 1 / false_positive_rate - 1 to rank.
    """
    fit_pixels, rank_pixels = (np.asarray(some, np.uint8) for some in (fit_images, rank_images))
    check_enough_to_fit(len(fit_pixels))
    conformal.threshold(np.zeros(len(rank_pixels)), false_positive_rate)
    statistics = catalogue(model.config)

    def measured(stage: str, pixels: NDArray[np.uint8], names: Sequence[str], seed: int) -> Columns:
        parts: list[dict[str, Floats]] = []
        for start in range(0, len(pixels), batch_size):
            some = tolerated(pixels[start : start + batch_size], tolerate, seed=seed + start)
            parts.append(measure(model.network, some, names)[0])
            bar(stage, min(start + batch_size, len(pixels)), len(pixels), "")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
        for name, values in joined.items():
            if not np.isfinite(values).all():
                raise ModelError(f"{model.folder} measures {name} of a {stage} image as not finite; train it anew.")
        return joined

    taught = [name for name, statistic in statistics.items() if statistic.fitted]
    fit_columns = measured("fit", fit_pixels, columns_for(taught, statistics), seed=1)
    gaussian = Gaussian.fitted({name: fit_columns[name] for name in statistics["multiscale"].needs})
    fit = Fit(float(fit_columns["bits_0"].mean()), gaussian)
    ranking = measured("rank", rank_pixels, columns_for(statistics, statistics), seed=2**20)
    ranked = {name: conformal.ranked(statistic.of(ranking, fit)) for name, statistic in statistics.items()}
    return Calibration(model.version, fit, ranked, len(fit_pixels), false_positive_rate, tolerate=tuple(tolerate))
