"""Reports on a calibration: lines on the terminal, and a section of the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ncml import checkpoint
from ncml.limits import VIEWS
from ncml.ood.calibration import Calibration
from ncml.ood.conformal import min_ranks
from ncml.ood.power import summary
from ncml.ood.tile_calibration import TileCalibration

MAX_NAMES = 10
"""Images that are listed by name."""


def save(calibration: Calibration, folder: Path) -> None:
    """Write a calibration into a model folder, and describe it in the card."""
    calibration.save(folder)
    title = f"{checkpoint.CALIBRATION_SECTION} {calibration.name}"
    checkpoint.write_card_section(folder, title, "\n".join(_card_lines(calibration)))


def describe(calibration: Calibration, *, remedy: str = "calibrate with") -> list[str]:
    """Return lines that report how a calibration was made and what it detects.

    remedy: how to tolerate processing, a clause to which the option is appended.
    """
    rate, power = calibration.false_positive_rate, calibration.power
    lines = [
        f"{calibration.statistic} above {calibration.threshold:.4g} is flagged; the smallest p is "
        f"{calibration.smallest_p:.2g}"
    ]
    if power is not None:
        lines += [
            f"flagged of {power.images} ranking images after barely visible processing: {_shares(power.processed)} "
            f"(unchanged, {100 * rate:g}% are expected)",
            summary(power, calibration.smallest_p),
        ]
        if tolerances := [name for name in power.tolerances(rate) if name not in calibration.tolerate]:
            lines.append(
                f"if images to be scored may be processed like this, {remedy} --tolerate {','.join(tolerances)}"
            )
    if calibration.is_weak:
        lines.append(f"this calibration is weak: {calibration.weakness}")
    return lines


def describe_suspects(names: Sequence[str], count: int) -> str:
    """Return a line that lists suspicious images by name; `count` is the number of all images."""
    listed = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
    return f"{len(names)} of {count} images are unlike the others: {listed}; remove any that is not good"


def describe_tiles(calibration: TileCalibration) -> list[str]:
    """Return lines that report what a calibration of tiles flags."""
    limits = [f"{view.replace('_', ' ')} above {limit:.4g}" for view, limit in calibration.thresholds.items()]
    lines = [f"{' or '.join(limits)} is flagged; the smallest p is {calibration.smallest_p:.2g}"]
    if len(calibration.views) < len(VIEWS):
        lines.append(
            f"{calibration.n_rank} ranking images support {len(calibration.views)} of {len(VIEWS)} views; "
            f"{min_ranks(len(VIEWS), calibration.false_positive_rate)} support all"
        )
    if calibration.weakness:
        lines.append(f"this calibration is weak: {calibration.weakness}")
    return lines


def _card_lines(calibration: Calibration) -> list[str]:
    tolerated = f", tolerating {', '.join(calibration.tolerate)}" if calibration.tolerate else ""
    lines = [
        f"Statistic {calibration.statistic}, estimated on {calibration.n_fit:,} images and ranked by "
        f"{calibration.n_rank:,}{tolerated}; {100 * calibration.false_positive_rate:g}% of good images are expected "
        f"to be flagged, and the smallest p-value is {calibration.smallest_p:.2g}.",
    ]
    if calibration.is_weak:
        lines += ["", f"**This calibration is weak**: {calibration.weakness}."]
    if calibration.power is None:
        return lines
    power = calibration.power
    rows = [(f"unchanged ({power.images} held-out images)", power.good), *power.processed.items()]
    rows += [*power.altered.items(), *power.foreign.items()]
    table = [f"| {name} | {share:.0%} |" for name, share in rows]
    return [*lines, "", summary(power, calibration.smallest_p), "", "| images | flagged |", "|---|---:|", *table]


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
