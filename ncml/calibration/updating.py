"""Update a detector: make it again from the images in its folder and from images that were reviewed since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ncml.calibration.altered_originals import POWER_IMAGES
from ncml.calibration.detector import MadeDetector, count_flagged, make_detector
from ncml.data import kept_images
from ncml.data.good_images import GoodImages
from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.model import Model
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.judging import Detector
from ncml.progress import OnProgress, ignore_progress


@dataclass(frozen=True)
class UpdatedDetector:
    """A new version of a detector, and what it replaces."""

    made: MadeDetector
    before: DetectorCalibration
    added: int = 0
    """Number of defective images that the former version had not."""
    found_added: int = 0
    """How many of them are flagged, each by what is learned without it."""
    found_before: int = 0
    """How many of them the former version flags."""
    flagged_before: int = 0
    """How many of the good images that have no part in either version the former one flags."""

    @property
    def comparison(self) -> list[str]:
        """What has changed, a sentence each."""
        lines: list[str] = []
        reviews, power, former = self.made.reviews, self.made.calibration.power, self.before.power
        if self.added:
            lines.append(
                f"of {counted(self.added, 'added defective image')}, the former version finds {self.found_before} and "
                f"this one {self.found_added}"
            )
        if reviews.checked:
            lines.append(
                f"the former version flags {self.flagged_before} of the {reviews.checked} good images that took no part"
            )
        if power is not None and former is not None:
            others = f" (measured on {former.images} images instead of {power.images})"
            lines.append(
                f"{power.mean_share:.0%} of all altered images are flagged, formerly {former.mean_share:.0%}"
                f"{others if former.images != power.images else ''}"
            )
        return lines


def update_detector(
    model: Model,
    reviewed: GoodImages | None,
    folder: Path,
    *,
    defective: GoodImages | None = None,
    check: GoodImages | None = None,
    power_images: int = POWER_IMAGES,
    device: str = "cpu",
    on_estimate: Callable[[float], object] = lambda seconds: None,
    on_calibrated: Callable[[MadeDetector], object] = lambda made: None,
    on_message: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> UpdatedDetector:
    """Make a new version of a detector, as `make_detector` does, with its own options and the images that it keeps.

    reviewed: images that it flagged although they are good, if any; they join those of earlier updates, as do
        `defective` ones. Of an image that is among both, the later verdict counts.
    folder: where to write it; may be the folder of the model.

    Raises `InputError` as `make_detector` does, for a model that is not a detector, and for one that keeps no images.
    """
    before = model.detector
    if before is None:
        raise InputError("update", f"{model.folder.name} is not a detector: make one with ncml adapt.")
    kept = kept_images.read(model.folder, on_progress)
    joined = _join(kept.reviewed, reviewed, defective)
    kept_digests = {*kept.defective.digests} if kept.defective else set[str]()
    defective = _join(kept.defective, defective, reviewed)
    added = [i for i, digest in enumerate(defective.digests) if digest not in kept_digests] if defective else []
    # Loaded first: the folder may be that of the new version.
    former = Detector.load(model.folder, before, device) if defective or check else None
    made = make_detector(
        model,
        kept.good,
        folder,
        false_positive_rate=before.false_positive_rate,
        confidence=before.confidence,
        group=kept.group,
        reviewed=joined,
        defective=defective,
        check=check,
        keep_images=True,
        power_images=power_images,
        region=before.region and before.region.named,
        align=before.aligns,
        brightness=before.brightness,
        device=device,
        on_estimate=on_estimate,
        on_calibrated=on_calibrated,
        on_message=on_message,
        on_progress=on_progress,
    )
    if former is None:
        return UpdatedDetector(made, before)
    (_, found_before), (_, flagged_before) = (
        count_flagged(former, images, on_progress) for images in (defective and defective.take(added), check)
    )
    found_added = sum(made.reviews.are_found[i] for i in added)
    return UpdatedDetector(made, before, len(added), found_added, found_before, flagged_before)


def _join(kept: GoodImages | None, new: GoodImages | None, opposite: GoodImages | None) -> GoodImages | None:
    """Join earlier images and new ones, each once, without the earlier ones whose verdict has changed."""
    changed = {*opposite.digests} if opposite else set()
    if kept is not None:
        kept = kept.take([i for i, digest in enumerate(kept.digests) if digest not in changed])
    joined = kept.join(new) if kept and new else kept or new
    return joined.distinct() if joined else None
