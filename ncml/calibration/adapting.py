"""`ncml.adapt`: makes or updates a detector from folders of images, as `ncml adapt` does.

Arguments are checked, and images are opened, before PyTorch is imported.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ncml import checkpoint, runtime
from ncml.data.good_images import check_brightness, open_folder
from ncml.data.kept_images import are_kept
from ncml.data.scenes import AUTO, are_compared, check_group
from ncml.errors import InputError
from ncml.hub import find_model
from ncml.images.region import read_region
from ncml.limits import check_number
from ncml.object_storage import StoragePath
from ncml.ood.conformal import check_rate
from ncml.paths import Location, check_model_name, parse_location, sorted_files
from ncml.progress import OnProgress, ignore_progress

if TYPE_CHECKING:
    from ncml.calibration.detector import MadeDetector

Folder: TypeAlias = str | os.PathLike[str] | StoragePath

DEFAULT_RATE = 0.05
MAX_SKIPPED = 5
"""Unreadable files that are reported individually."""
SUSPECTS = "suspects.png"
"""The contact sheet of images that are unlike the others, in the folder of the detector."""
CONTENTS = {
    "data": "good images",
    "reviewed": "good images that were flagged",
    "defective": "defective images",
    "check": "good images that have no part in the detector",
}
"""What the folders contain, by argument."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class AdaptedDetector:
    """A detector in its folder, and its report, which `print` and notebooks show."""

    made: MadeDetector
    comparison: Sequence[str] = ()
    """What has changed in an update, a sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values that `ncml adapt --json` prints."""
        calibration, reviews = self.made.calibration, self.made.reviews
        return {
            "folder": str(self.made.folder),
            "calibration": calibration.version,
            "views": list(calibration.scales),
            "weights": {name: scale.weight for name, scale in calibration.scales.items()},
            "threshold": calibration.threshold,
            "false_positive_rate": calibration.false_positive_rate,
            "rate_bound": calibration.rate_bound,
            "confidence": calibration.confidence,
            "n_fit": calibration.n_fit,
            "n_rank": calibration.n_rank,
            "scenes": calibration.estimation_scenes + calibration.ranks.scenes,
            "ranking_scenes": calibration.ranks.scenes,
            "smallest_p": calibration.smallest_p,
            "power": None if calibration.power is None else calibration.power.to_json(),
            "pictures": self.made.pictures and str(self.made.pictures),
            "weakness": calibration.weakness,
            "notes": list(calibration.notes),
            "images_to_check": list(self.made.images_to_check),
            "near_duplicates": [list(names) for names in self.made.near_duplicates],
            "suspicious": [suspect.name for suspect in self.made.suspects],
            "left_out": list(self.made.left_out),
            "reviewed": {
                name: getattr(reviews, name) for name in ("images", "still_flagged", "defective", "learned", "found")
            }
            if reviews.images or reviews.defective
            else None,
            "check": {"images": reviews.checked, "flagged": reviews.flagged} if reviews.checked else None,
            "comparison": list(self.comparison),
        }

    @property
    def report(self) -> list[str]:
        """Its images, its rate, and what it finds and misses, line by line."""
        from ncml.calibration import descriptions

        lines = [*descriptions.describe_detector(self.made), *self.comparison]
        if self.made.suspects:
            lines.append(f"the images that are unlike the others are shown in {self.made.folder / SUSPECTS}")
        if self.made.pictures:
            lines.append(f"examples of what it finds and misses are shown in {self.made.pictures}")
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.report)


def adapt(
    data: Folder | None = None,
    /,
    *,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] = "",
    false_positive_rate: float = DEFAULT_RATE,
    confidence: float | None = None,
    group: str = AUTO,
    leave_out: Literal["suspects"] | None = None,
    reviewed: Folder | None = None,
    defective: Folder | None = None,
    check: Folder | None = None,
    keep_images: bool = False,
    update: str | os.PathLike[str] = "",
    region: str | os.PathLike[str] | None = None,
    tolerate_brightness: float = 0.0,
    align: bool = True,
    power: bool = True,
    device: str = "cpu",
    on_calibrated: Callable[[AdaptedDetector], object] = lambda adapted: None,
    on_message: Callable[[str], None] = log.warning,
    callback: OnProgress = ignore_progress,
) -> AdaptedDetector:
    """Make a detector from a folder of at least 30 good images; `ncml.load(out)` judges with it.

    The arguments are the options of `ncml adapt`, which docs/detectors.md describes. Messages name them as the command
    does: "--group image" is `group="image"` here.

    data, reviewed, defective, check: folders, here or at s3://, gs://, hf:// or https://.
    update: the folder or the name of a detector of which a new version is made. It needs no data if there are defective
        images.
    region: "x,y,width,height" in pixels, or the path of a mask.
    tolerate_brightness: in percent.

    on_calibrated: called once the detector is in its folder, before its power is measured.
    on_message: called with what is noticed before, such as files that cannot be read and the time it will take.
    callback: called with the images done, stage by stage.

    Raises `InputError`, with the name of the argument, for options and images of which no detector can be made, and
    `ModelError` for a model that cannot be loaded.
    """
    if not isinstance(out, str | os.PathLike):
        raise InputError("out", f"out must be the path of the detector's folder, not {reprlib.repr(out)}.")
    out = Path(out)
    check_rate(check_number("false_positive_rate", false_positive_rate))
    if confidence is not None:
        check_number("confidence", confidence)
    check_group(group)
    if leave_out not in (None, "suspects"):
        raise InputError("leave_out", f"leave_out must be 'suspects' or None, not {leave_out!r}.")
    brightness = check_number("tolerate_brightness", tolerate_brightness) / 100
    check_brightness(brightness)
    judged = None if region is None else read_region(region)
    if update:
        of_the_detector = {
            "model": model, "false-positive-rate": false_positive_rate != DEFAULT_RATE,
            "confidence": confidence, "group": group != AUTO, "leave-out": leave_out, "reviewed": reviewed,
            "region": region, "tolerate-brightness": tolerate_brightness, "keep-images": keep_images,
            "no-align": not align,
        }  # fmt: skip
        for name in (name for name, value in of_the_detector.items() if value):
            raise InputError("update", f"--update uses the options of the detector itself: omit --{name}.")
    if data is None and not update:
        raise InputError("data", "a folder of good images is missing: name one.")
    if data is None and defective is None:
        raise InputError(
            "data", "an update needs images: name a folder of flagged images that are good, or --defective ones."
        )
    check_model_name(out)
    runtime.check_device_name(device)
    base = checkpoint.describe(find_model(update or model)).folder
    checkpoint.check_copy(base, out)
    folders = _folders({"data": data, "reviewed": reviewed, "defective": defective, "check": check})
    is_in_place = bool(update) and out.resolve() == base.resolve()
    if (out / checkpoint.DETECTOR).is_file() and not is_in_place:
        is_losing = are_kept(out) and (bool(update) or not keep_images)
        lost = ", and the images that it keeps are deleted" if is_losing else ""
        on_message(f"{out} holds a detector already: the new one replaces it{lost}")
    compared = are_compared(group, has_others=len(folders) > 1)
    opened = {
        field: open_folder(folder, sorted_files(folder), callback, seeks_points=compared)
        for field, folder in folders.items()
    }
    reasons = [f"skipped: {reason}" for images in opened.values() for reason in images.unreadable]
    more = [f"skipped: and {len(reasons) - MAX_SKIPPED} more"] if len(reasons) > MAX_SKIPPED else []
    for reason in reasons[:MAX_SKIPPED] + more:
        on_message(reason)

    from ncml.calibration import descriptions
    from ncml.model import load

    def report_calibrated(made: MadeDetector) -> None:
        descriptions.save_contact_sheet(made.suspects, out / SUSPECTS)
        descriptions.write_detector_card(made)
        on_calibrated(AdaptedDetector(made))

    loaded = load(base, device)
    common: dict[str, Any] = {
        "defective": opened.get("defective"),
        "check": opened.get("check"),
        "device": device,
        "on_calibrated": report_calibrated,
        "on_message": on_message,
        "on_progress": callback,
        **({} if power else {"power_images": 0}),
    }
    if update:
        from ncml.calibration.updating import update_detector

        updated = update_detector(loaded, opened.get("data"), out, **common)
        adapted = AdaptedDetector(updated.made, updated.comparison)
    else:
        from ncml.calibration.detector import make_detector

        made = make_detector(
            loaded,
            opened["data"],
            out,
            false_positive_rate=false_positive_rate,
            confidence=confidence,
            group=group,
            leave_out=leave_out is not None,
            reviewed=opened.get("reviewed"),
            keep_images=keep_images,
            region=judged,
            align=align,
            brightness=brightness,
            **common,
        )
        adapted = AdaptedDetector(made)
    descriptions.write_detector_card(adapted.made)
    return adapted


def _folders(named: dict[str, Folder | None]) -> dict[str, Location]:
    """Return the given folders by argument; raise `InputError` for a path that is not a folder."""
    folders: dict[str, Location] = {}
    for field, name in named.items():
        if name is None:
            continue
        if not isinstance(name, str | os.PathLike | StoragePath):
            raise InputError(field, f"{field} must be a folder of {CONTENTS[field]}, not {reprlib.repr(name)}.")
        folder = name if isinstance(name, StoragePath) else parse_location(os.fspath(name), field)
        if not folder.is_dir():
            raise InputError(field, f"{folder} is not a folder: name a folder of {CONTENTS[field]}.")
        folders[field] = folder
    return folders
