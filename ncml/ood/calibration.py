"""A calibration: estimates and ranks from held-out images that turn OOD scores into p-values, and its file.

A small p-value is more out-of-distribution. `calibration.json` in the model's folder is bound to the version of the
model and of the preprocessing; `ncml.calibration` creates it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncml import checkpoint
from ncml.config import Config
from ncml.images.perturbations import TOLERANCES, Tolerance
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Estimates, Gaussian, build_statistics

DEFAULT = "multiscale"
"""The statistic that gives the verdict unless another is requested."""


TOLERATED: dict[str, Tolerance] = {name: name for name in TOLERANCES}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image."""

    statistic: str
    score: float
    p_value: float
    """The share of images of the calibrated distribution that score at least as high, estimated from ranks."""
    threshold: float
    is_ood: bool
    """score > threshold: the p-value is at most the calibrated false-positive rate."""


@dataclass(frozen=True)
class Histogram:
    """The distribution of the ranking images' scores."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """Estimates and ranks of a model's statistics; bound to one version of the model and of preprocessing."""

    model_version: str
    estimates: Estimates
    ranked: Mapping[str, Floats]
    """Scores of the ranking images by statistic, ascending: p-values are ranks among these."""
    n_fit: int
    false_positive_rate: float = 0.05
    statistic: str = DEFAULT
    tolerate: tuple[Tolerance, ...] = ()
    preprocessing: str = storage.PREPROCESSING

    @property
    def n_rank(self) -> int:
        """Number of ranking images."""
        return len(self.ranked[self.statistic])

    @property
    def smallest_p(self) -> float:
        """The smallest possible p-value: 1 / (n_rank + 1)."""
        return 1 / (self.n_rank + 1)

    @property
    def threshold(self) -> float:
        """The threshold of `statistic`."""
        return self.thresholds[self.statistic]

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """Thresholds by statistic: a score above is out-of-distribution at the false-positive rate."""
        return {name: conformal.threshold(scores, self.false_positive_rate) for name, scores in self.ranked.items()}

    @functools.cached_property
    def histograms(self) -> dict[str, Histogram]:
        """Histograms by statistic: 40 bins over the central 99.8 %, the other scores in the outer two."""

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
        """Compute conformal p-values of scores, [N]."""
        return conformal.p_values(scores, self.ranked[statistic])

    def verdicts(self, statistic: str, scores: Floats) -> list[Verdict]:
        """Judge each score of a statistic."""
        threshold = self.thresholds[statistic]
        return [
            Verdict(statistic, float(score), float(p), threshold, bool(score > threshold))
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
            "fit": asdict(self.estimates),
            "ranked": {name: values.tolist() for name, values in self.ranked.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `calibration.json` into the model folder."""
        storage.write(folder / checkpoint.CALIBRATION, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str, config: Config) -> Calibration:
        """Read `calibration.json`; raises `ModelError` if it is damaged or belongs to another model."""
        path = folder / checkpoint.CALIBRATION
        stored = storage.read(path, model_version)
        statistics = build_statistics(config)
        with storage.refusing_damage(path):
            calibration = cls(
                model_version,
                Estimates(
                    float(storage.floats(stored["fit"]["typical_bpd"])),
                    Gaussian.from_json(stored["fit"]["gaussian"], statistics["multiscale"].needs),
                ),
                {name: storage.ranks(stored["ranked"][name]) for name in statistics},
                storage.count(stored["n_fit"]),
                float(storage.floats(stored["false_positive_rate"])),
                stored["statistic"],
                tuple(TOLERATED[name] for name in stored["tolerate"]),
            )
            _ = calibration.threshold, calibration.histograms  # which may fail, too
            return calibration
