"""The power of a detector: which shares of altered good images it flags. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple, Self

import numpy as np

from ncml.data.inventory import counted
from ncml.images.tiling import Box
from ncml.ood import storage

FOUND = 0.9
"""The share of altered images from which a size counts as found."""
MISSED = 0.5
"""The share of the largest size below which an alteration counts as missed."""
LOCAL = ("scratch", "spot", "pit", "stain", "erased patch", "pasted patch", "missing part", "moved part")
"""Alterations like defects, whose largest sizes a detector should find."""


class Picture(NamedTuple):
    """An example of an alteration, on the sheet of pictures."""

    kind: str
    size: str
    is_found: bool
    box: Box
    """Where it lies on the sheet, in pixels."""


def worst_first(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the kinds of alterations: those of which the fewest are found at the largest size first."""
    values = {kind: list(sizes.values()) for kind, sizes in shares.items()}
    return sorted(values, key=lambda kind: (values[kind][-1], np.mean(values[kind])))


@dataclass(frozen=True)
class DetectorPower:
    """Shares of altered ranking images that are flagged."""

    images: int
    """Number of good images that were altered in all ways."""
    shares: Mapping[str, Mapping[str, float]]
    """By kind of alteration, by size in words, from the least to the greatest."""
    foreign: Mapping[str, float]
    """Share of foreign images, by their kind."""
    pictures: tuple[Picture, ...] = ()
    """Examples of what is found and missed; none in detectors of earlier versions."""
    sheet: str = ""
    """SHA-256 of the sheet that shows them; "" without one."""

    def with_pictures(self, sheet: bytes, pictures: tuple[Picture, ...]) -> Self:
        """Return the power with the pictures on a sheet; itself without any."""
        if not pictures:
            return self
        return replace(self, pictures=pictures, sheet=sha256(sheet).hexdigest())

    def smallest_found(self, kind: str) -> str | None:
        """Return the smallest size found in nine of ten; None if there is none."""
        return next((size for size, share in self.shares[kind].items() if share >= FOUND), None)

    @property
    def mean_share(self) -> float:
        """The share of altered images that are flagged, of all kinds and sizes alike."""
        return float(np.mean([share for sizes in self.shares.values() for share in sizes.values()]))

    @property
    def weakness(self) -> str:
        """Why the detector is weak, in a clause; "" if it is not."""
        largest = [list(sizes.values())[-1] for kind, sizes in self.shares.items() if kind in LOCAL]
        if largest and float(np.mean(largest)) < MISSED:
            return f"it finds {np.mean(largest):.0%} of the largest marks and missing parts"
        return ""

    def lines(self) -> list[str]:
        """Return what is found, what is missed and what lies between, in words."""
        reliable = [f"{kind} {size}" for kind in self.shares if (size := self.smallest_found(kind))]
        between = {kind: list(self.shares[kind].items())[-1] for kind in self.shares if not self.smallest_found(kind)}
        partly = [f"{kind} {size} ({share:.0%})" for kind, (size, share) in between.items() if share >= MISSED]
        missed = [f"{kind} {size} ({share:.0%})" for kind, (size, share) in between.items() if share < MISSED]
        lines = []
        if reliable:
            lines.append(f"smallest sizes found in nine of ten: {'; '.join(reliable)}")
        if partly:
            lines.append(f"found less often, at the largest size measured: {'; '.join(partly)}")
        if missed:
            lines.append(f"mostly missed, even at the largest size measured: {'; '.join(missed)}")
        if self.foreign:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in self.foreign.items())
            lines.append(f"foreign images flagged: {shares}")
        measured = counted(self.images, "good image")
        lines.append(f"measured on {measured}, altered in their own pixels; no other alterations were measured")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the shares as plain data."""
        shares = {kind: dict(sizes) for kind, sizes in self.shares.items()}
        stored = {"images": self.images, "shares": shares, "foreign": dict(self.foreign)}
        if not self.sheet:
            return stored
        pictures = [[kind, size, is_found, *box] for kind, size, is_found, box in self.pictures]
        return stored | {"pictures": pictures, "sheet": self.sheet}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Rebuild the result of `to_json`; raises LookupError, TypeError or ValueError if it is damaged."""
        shares = {
            str(kind): {str(size): storage.share(share) for size, share in dict(sizes).items()}
            for kind, sizes in dict(stored["shares"]).items()
        }
        if not all(shares.values()):
            raise ValueError("its power lacks a size")
        foreign = {str(kind): storage.share(share) for kind, share in dict(stored["foreign"]).items()}
        pictures = tuple(
            Picture(str(kind), str(size), bool(is_found), Box(*map(storage.count, edges)))
            for kind, size, is_found, *edges in stored.get("pictures", [])
        )
        if not all(picture.size in shares[picture.kind] for picture in pictures):
            raise ValueError("a picture shows nothing that was measured")
        return cls(storage.count(stored["images"]), shares, foreign, pictures, str(stored.get("sheet", "")))
