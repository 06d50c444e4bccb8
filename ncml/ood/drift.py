"""Has what comes in moved away from what a model was calibrated on? Scored images against the ranking images.

Two samples are compared, n scored images and the calibration's m ranking images: their bits per dimension, and the
scores that give p-values (whose ranks the p-values are). Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncml.errors import InputError
from ncml.ood.conformal import Floats

LEAST = 20
"""Scored images below which nothing is said."""

BINS = 10
MOVED = 0.1
"""The population stability index from which a shift counts: below .1 is commonly called stable, above .25 major."""


@dataclass(frozen=True)
class Shift:
    """One quantity, scored against calibrated."""

    ks: float
    """Kolmogorov-Smirnov statistic: the largest gap between the two cumulative distributions."""
    ks_p: float
    """Its two-sided p-value."""
    psi: float
    """Population stability index, sum (q - p) log(q / p) over ten bins of equal calibrated share p."""
    mean: float
    calibrated_mean: float


@dataclass(frozen=True)
class Drift:
    """The whole comparison."""

    images: int
    flagged: float
    """Share of the images whose p-value is at most the false-positive rate."""
    flagged_low: float
    flagged_high: float
    """Its 95 % interval (Wilson)."""
    expected: float
    """The calibrated false-positive rate."""
    bpd: Shift
    score: Shift
    drifted: bool
    """Either quantity differs by the KS test at alpha / 2 (two tests), and by a PSI of at least .1."""


def compare(
    bpd: Floats, score: Floats, p_value: Floats, ranked_bpd: Floats, ranked_score: Floats, rate: float, alpha: float
) -> Drift:
    """Compare scored images with ranking images. Raises `InputError` for fewer than 20 scored images."""
    from scipy import stats

    if not 0 < alpha < 1:
        raise InputError("alpha", f"alpha is more than 0 and less than 1, not {alpha:g}.")
    n = len(bpd)
    if n < LEAST:
        raise InputError("files", f"{n} scored pictures say nothing about drift: give at least {LEAST}.")
    of_bpd, of_score = _shift(bpd, ranked_bpd), _shift(score, ranked_score)
    drifted = any(shift.ks_p < alpha / 2 and shift.psi >= MOVED for shift in (of_bpd, of_score))
    flagged = int((p_value <= rate).sum())
    interval: Any = stats.binomtest(flagged, n).proportion_ci(method="wilson")
    return Drift(n, flagged / n, float(interval.low), float(interval.high), rate, of_bpd, of_score, drifted)


def _shift(scored: Floats, ranked: Floats) -> Shift:
    from scipy import stats

    test: Any = stats.ks_2samp(scored, ranked, method="asymp")
    return Shift(
        float(test.statistic), float(test.pvalue), stability(scored, ranked), float(scored.mean()), float(ranked.mean())
    )


def stability(scored: Floats, ranked: Floats) -> float:
    """The population stability index over deciles of `ranked`; half a count is added to each bin, so it is finite."""
    edges = np.quantile(ranked, np.linspace(0, 1, BINS + 1)[1:-1])

    def shares(sample: Floats) -> Floats:
        counts = np.bincount(np.searchsorted(edges, sample, side="left"), minlength=BINS) + 0.5
        return counts / counts.sum()

    p, q = shares(ranked), shares(scored)
    return float(((q - p) * np.log(q / p)).sum())


def plot(path: Path, bpd: Floats, p_value: Floats, ranked_bpd: Floats, drift: Drift, name: str) -> None:
    """Two panels: bits per dimension, scored over calibrated; and p-values, which are level where nothing moved."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.histogram_bin_edges(np.concatenate([bpd, ranked_bpd]), 50).tolist()
    left.hist(ranked_bpd, edges, density=True, color="#b0b7c3", label=f"calibration ({len(ranked_bpd):,})")
    left.hist(bpd, edges, density=True, histtype="step", color="#c0392b", linewidth=1.8, label=f"scored ({len(bpd):,})")
    left.set(xlabel="bits per dimension", ylabel="density", title=f"PSI {drift.bpd.psi:.2f}, KS {drift.bpd.ks:.2f}")
    left.legend(frameon=False)
    right.hist(p_value, np.linspace(0, 1, 21).tolist(), density=True, color="#c0392b", alpha=0.75)
    right.axhline(1, color="#5b6472", linestyle="--", linewidth=1.2)
    said = f"{drift.flagged:.1%} at or below {drift.expected:g}"
    right.set(xlabel="p-value (dashed: no drift)", ylabel="density", title=said)
    figure.suptitle(f"{name}: {'drifted' if drift.drifted else 'no drift found'}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError("plot", f"{path} cannot be written: {error}.") from error
