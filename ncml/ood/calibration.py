"""A calibration: estimates and ranks from held-out images that turn OOD scores into p-values.

A small p-value is more out-of-distribution. A calibration is bound to a version of the model and of the preprocessing;
`ncml.calibration` creates it.
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
from ncml.ood.power import MIN_DETECTED, Power, explain_few
from ncml.ood.statistics import Estimates, Gaussian, Statistic, build_statistics
from ncml.results import Verdict

DEFAULT_STATISTIC = "multiscale_corr"
"""The statistic that gives the verdict unless another is requested."""

FORMAT = 2

TOLERATED: dict[str, Tolerance] = {name: name for name in TOLERANCES}


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
    statistic: str = DEFAULT_STATISTIC
    tolerate: tuple[Tolerance, ...] = ()
    preprocessing: str = storage.PREPROCESSING
    name: str = storage.DEFAULT_NAME
    """Its name in the model folder; verdicts depend neither on it nor on `power`."""
    power: Power | None = None
    """The shares of images that it flags; None if they were not measured."""

    @property
    def n_rank(self) -> int:
        """Number of ranking images."""
        return len(self.ranked[self.statistic])

    @property
    def smallest_p(self) -> float:
        """The smallest possible p-value: 1 / (n_rank + 1)."""
        return 1 / (self.n_rank + 1)

    @property
    def weakness(self) -> str:
        """Why the calibration is weak, in a clause; "" if it is not."""
        few = explain_few(self.n_rank, self.false_positive_rate)
        if not few and self.power is not None and self.power.detected < MIN_DETECTED:
            return f"it detects {self.power.detected:.0%} of the standard alterations"
        return few

    @property
    def is_weak(self) -> bool:
        """Whether there is a `weakness`."""
        return bool(self.weakness)

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
        """Histograms by statistic: 40 bins over the central 99.8%, the other scores in the outer two."""

        def histogram(scores: Floats) -> Histogram:
            low, high = np.interp([0.001, 0.999], np.linspace(0, 1, len(scores)), scores)  # np.quantile imports more
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
        source = self.name, self.is_weak, self.version
        return [
            Verdict(statistic, float(score), float(p), threshold, bool(score > threshold), *source)
            for score, p in zip(scores, self.p_values(statistic, scores), strict=True)
        ]

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_version": self.model_version,
            "preprocessing": self.preprocessing,
            "statistic": self.statistic,
            "false_positive_rate": self.false_positive_rate,
            "tolerate": list(self.tolerate),
            "n_fit": self.n_fit,
            "fit": {
                "typical_bpd": self.estimates.typical_bpd,
                "gaussians": {name: asdict(gaussian) for name, gaussian in self.estimates.gaussians.items()},
            },
            "ranked": {name: values.tolist() for name, values in self.ranked.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as it is stored."""
        stored = {"version": self.version} | self._content()
        return stored if self.power is None else stored | {"power": self.power.to_json()}

    def save(self, folder: Path) -> None:
        """Write the calibration into the model folder, beside those of other names."""
        storage.write_entry(folder / checkpoint.CALIBRATION, self.name, self.to_json())

    @classmethod
    def from_json(cls, name: str, path: Path, stored: object, model_version: str, config: Config) -> Calibration:
        """Rebuild a calibration from the file at `path`; raises `ModelError` if it is damaged or of another model."""
        stored_power = stored.get("power") if isinstance(stored, dict) else None
        content = storage.check(path, stored, model_version, expected_format=FORMAT)
        statistics = build_statistics(config)
        with storage.refusing_damage(path):
            estimates = _read_estimates(content, statistics)
            calibration = cls(
                model_version,
                estimates,
                _read_ranks(content, statistics, estimates),
                storage.count(content["n_fit"]),
                float(storage.floats(content["false_positive_rate"])),
                content["statistic"],
                tuple(TOLERATED[name] for name in content["tolerate"]),
                name=name,
                power=None if stored_power is None else Power.from_json(stored_power),
            )
            _ = calibration.threshold, calibration.histograms, calibration.weakness  # fail for impossible values
            return calibration


def _read_estimates(content: dict[str, Any], statistics: Mapping[str, Statistic]) -> Estimates:
    stored = content["fit"]
    return Estimates(
        float(storage.floats(stored["typical_bpd"])),
        {
            name: Gaussian.from_json(gaussian, statistics[name].needs)
            for name, gaussian in stored["gaussians"].items()
            if name in statistics
        },
    )


def _read_ranks(
    content: dict[str, Any], statistics: Mapping[str, Statistic], estimates: Estimates
) -> dict[str, Floats]:
    ranked = {name: storage.ranks(scores) for name, scores in content["ranked"].items() if name in statistics}
    if content["statistic"] not in ranked:
        raise ValueError(f"there are no ranks of {content['statistic']}")
    for name in ranked:
        if statistics[name].is_gaussian and name not in estimates.gaussians:
            raise ValueError(f"it has ranks of {name}, but not its Gaussian")
    return ranked
