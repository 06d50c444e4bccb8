"""The power of a calibration: the shares of images that it flags, measured when it is made. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ncml.ood import storage

MIN_DETECTED = 0.5
"""The share of the standard alterations below which a calibration is called weak."""

MAX_FACTOR = 3
"""Processing that is flagged more than this many times as often as the false-positive rate should be tolerated."""

TOLERANCE_BY_PREFIX = {"JPEG": "jpeg", "half size": "resize", "blur": "resize"}
"""The tolerance (`ncml calibrate --tolerate`) for processing whose name starts so."""


@dataclass(frozen=True)
class Power:
    """Shares of images that the default statistic flags at the false-positive rate."""

    images: int
    """Number of held-out images, measured unchanged and after each change."""
    good: float
    """Share of the unchanged images, each ranked among the others: near the rate by construction, so no test of it."""
    processed: Mapping[str, float]
    """Share after barely visible processing, by its name (`ncml.images.perturbations.PROCESSING`)."""
    altered: Mapping[str, float]
    """Share after a standard alteration, by its name (`ncml.images.perturbations.ALTERATIONS`)."""
    foreign: Mapping[str, float]
    """Share of foreign images, by their kind."""

    @property
    def detected(self) -> float:
        """The share of altered images that is flagged, averaged over the standard alterations."""
        return float(np.mean(list(self.altered.values())))

    def tolerances(self, rate: float) -> list[str]:
        """Return the tolerances for processing that is flagged too often at this false-positive rate."""
        flagged = [name for name, share in self.processed.items() if share > MAX_FACTOR * rate]
        prefixes = TOLERANCE_BY_PREFIX.items()
        return list(dict.fromkeys(value for name in flagged for prefix, value in prefixes if name.startswith(prefix)))

    def to_json(self) -> dict[str, Any]:
        """Return the shares as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Power:
        """Rebuild the result of `to_json`; raises LookupError, TypeError or ValueError if it is damaged."""
        shares = {
            kind: {str(name): storage.share(share) for name, share in dict(stored[kind]).items()}
            for kind in ("processed", "altered", "foreign")
        }
        if not shares["altered"]:
            raise ValueError("its power lacks an alteration")
        return cls(storage.count(stored["images"]), storage.share(stored["good"]), **shares)


def reliable_ranks(false_positive_rate: float) -> int:
    """Return the fewest ranking images with which the rate of a calibration is reliable.

    With fewer, the standard deviation of the actual rate of a threshold, sqrt(r (1 - r) / n), is more than r / 2.
    """
    return math.ceil(4 * (1 - false_positive_rate) / false_positive_rate - 1e-9)


def explain_few(count: int, false_positive_rate: float, noun: str = "images") -> str:
    """Explain in a clause that a calibration ranks among too few images for a reliable rate; "" if they suffice."""
    needed = reliable_ranks(false_positive_rate)
    return "" if count >= needed else f"it ranks among {count} {noun}, and {needed} are needed for a reliable rate"


def summary(power: Power, smallest_p: float) -> str:
    """Return what a calibration can and cannot detect, in one sentence."""
    shares = {**power.altered, **power.foreign}
    detects = {name: share for name, share in shares.items() if share >= MIN_DETECTED}
    misses = {name: share for name, share in shares.items() if share < MIN_DETECTED}
    clauses = [
        f"{verb} most of: {list_shares(part)}" for verb, part in (("detects", detects), ("misses", misses)) if part
    ]
    return f"This calibration {'; it '.join(clauses)}; no p-value is below {smallest_p:.2g}."


def list_shares(shares: Mapping[str, float]) -> str:
    """List shares with their names, which may contain commas: JPEG, quality 20 (6%), random values (100%)."""
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())
