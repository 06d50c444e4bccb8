"""Drift: whether scored images differ in distribution from a calibration's ranking images.

One test decides: the two-sample Kolmogorov-Smirnov test of the OOD scores whose ranks are the p-values, of n scored
images and the calibration's m ranking images. Its false-positive rate is alpha. The other figures describe the
difference and decide nothing. Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncml.errors import InputError
from ncml.ood.conformal import Floats, round_scores

MIN_IMAGES = 20
"""Minimum number of scored images."""

BINS = 10


@dataclass(frozen=True)
class Shift:
    """One quantity of the scored images, compared with the ranking images."""

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
    """The result of a comparison."""

    images: int
    flagged: float
    """Share of images whose p-value is at most the false-positive rate."""
    flagged_low: float
    flagged_high: float
    """Its 95% interval (Wilson)."""
    expected: float
    """The calibrated false-positive rate."""
    bpd: Shift
    score: Shift
    alpha: float
    """False-positive rate of the test."""
    drifted: bool
    """The KS test's p-value of the OOD score is below alpha."""


def check_alpha(alpha: float) -> None:
    """Raise `InputError` for a false-positive rate that is out of range."""
    if not 0 < alpha < 1:
        raise InputError("alpha", f"alpha must be more than 0 and less than 1, not {alpha:g}.")


def compare(
    bpd: Floats, score: Floats, p_value: Floats, ranked_bpd: Floats, ranked_score: Floats, rate: float, alpha: float
) -> Drift:
    """Compare scored images with ranking images; raises `InputError` for fewer than 20 scored images.

    The values of the ranking images are rounded by `round_scores`, and here those of the scored ones, too: otherwise
    all the images that equal a ranking image would lie just below it, and the test would find that.
    """
    check_alpha(alpha)
    n = len(bpd)
    if n < MIN_IMAGES:
        raise InputError("files", f"drift needs at least {MIN_IMAGES} scored images, not {n}: add images.")
    from scipy import stats

    bpd_shift, score_shift = _shift(round_scores(bpd), ranked_bpd), _shift(round_scores(score), ranked_score)
    flagged = int((p_value <= rate).sum())
    interval: Any = stats.binomtest(flagged, n).proportion_ci(method="wilson")
    return Drift(
        images=n,
        flagged=flagged / n,
        flagged_low=float(interval.low),
        flagged_high=float(interval.high),
        expected=rate,
        bpd=bpd_shift,
        score=score_shift,
        alpha=alpha,
        drifted=score_shift.ks_p < alpha,
    )


def _shift(scored: Floats, ranked: Floats) -> Shift:
    from scipy import stats

    test: Any = stats.ks_2samp(scored, ranked, method="asymp")
    return Shift(
        float(test.statistic), float(test.pvalue), stability(scored, ranked), float(scored.mean()), float(ranked.mean())
    )


def stability(scored: Floats, ranked: Floats) -> float:
    """Compute the population stability index over deciles of `ranked`; half a count in each bin keeps it finite."""
    edges = np.quantile(ranked, np.linspace(0, 1, BINS + 1)[1:-1])

    def shares(sample: Floats) -> Floats:
        counts = np.bincount(np.searchsorted(edges, sample, side="left"), minlength=BINS) + 0.5
        return counts / counts.sum()

    p, q = shares(ranked), shares(scored)
    return float(((q - p) * np.log(q / p)).sum())


def plot(path: Path, bpd: Floats, p_value: Floats, ranked_bpd: Floats, drift: Drift, name: str) -> None:
    """Plot bits per dimension, scored over calibrated, and p-values, which are uniform without drift."""
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
    flagged = f"{drift.flagged:.1%} at or below {drift.expected:g}"
    right.set(xlabel="p-value (dashed: no drift)", ylabel="density", title=flagged)
    figure.suptitle(f"{name}: {'drifted' if drift.drifted else 'no drift found'}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError("plot", f"{path} cannot be written: {error}.") from error
