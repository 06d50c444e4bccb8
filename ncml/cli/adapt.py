"""`ncml adapt`."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ncml.checkpoint import DETECTOR, check_copy
from ncml.cli.rows import MAX_MESSAGES
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    LocationArgument,
    ModelOption,
    describe,
    load,
    print_json,
    progress_bar,
)
from ncml.data.good_images import check_brightness, open_folder
from ncml.data.kept_images import are_kept
from ncml.data.scenes import AUTO, are_compared, check_group
from ncml.errors import InputError
from ncml.images.region import read_region
from ncml.ood.conformal import check_rate
from ncml.paths import check_model_name, sorted_files

if TYPE_CHECKING:
    from ncml.calibration.detector import MadeDetector

DEFAULT_RATE = 0.05
NO_ALIGN = "Compare parts where they lie, even if good images agree better once they are brought to one position."
NO_POWER = "Skip the measurement of which alterations the detector finds, which takes most of the time."
SUSPECTS = "suspects.png"
"""The contact sheet of images that are unlike the others, in the folder of the detector."""


def adapt(
    data: Annotated[Positional[LocationArgument], arg(metavar="FOLDER")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FOLDER")],
    model: ModelOption = "",
    false_positive_rate: Annotated[float, arg(metavar="RATE")] = DEFAULT_RATE,
    confidence: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: on average)")] = None,
    group: Annotated[str, arg(metavar="auto|image|folder|PATTERN")] = AUTO,
    leave_out: Annotated[Literal["suspects"] | None, arg(help_behavior_hint="(default: none)")] = None,
    reviewed: Annotated[LocationArgument | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    defective: Annotated[LocationArgument | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    check: Annotated[LocationArgument | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    keep_images: bool = False,
    update: Annotated[str, arg(metavar="NAME|PATH", help_behavior_hint="(default: a new detector)")] = "",
    region: Annotated[
        str | None, arg(metavar="X,Y,WIDTH,HEIGHT|MASK", help_behavior_hint="(default: the whole image)")
    ] = None,
    tolerate_brightness: Annotated[float, arg(metavar="PERCENT", help_behavior_hint="(default: none)")] = 0.0,
    align: Annotated[bool, arg(help=NO_ALIGN, help_behavior_hint="")] = True,
    power: Annotated[bool, arg(help=NO_POWER, help_behavior_hint="")] = True,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Make a detector from a folder of good images: it judges further images at their own size.

    The images are divided by scene. One part shows how good images differ (in patches, colours, appearance and
    likelihood); each judged image is ranked among the other part, so the share of good images that are flagged is at
    most --false-positive-rate on average. The power is measured on altered images.

    Args:
        data: Folder of at least 30 good images, here or at s3://, gs://, hf:// or https://; with --update, of images
            that the detector flagged although they are good.
        out: Model folder to write; its name becomes the model's name. If it holds the same weights already, its
            detector is replaced, and its other calibrations are kept.
        model: Name or folder of the model to start from, which computes bits/dim.
        false_positive_rate: Share of good images that may be flagged, on average.
        confidence: Choose the threshold so that this very detector flags at most that share, with this confidence.
        group: How images are grouped into scenes: by near-duplicates and overlaps (auto), each alone (image), by
            subfolder (folder), or by the group in parentheses of a regular expression on the path.
        leave_out: Leave out the images that are unlike the others.
        reviewed: Folder of images that the detector flagged although they are good. They become estimation
            images, never ranking images, so that the rate holds.
        defective: Folder of images that should be flagged. They only test the detector: the report says how many it
            flags. With --update, they join those that it keeps.
        check: Folder of good images that have no part in the detector: the report says how many of them are flagged.
        keep_images: Keep copies of the good, reviewed and defective images in the folder of the detector, so that
            --update can use them.
        update: Detector of which to make a new version, with its own options and the images that it keeps; the images
            in FOLDER become estimation images.
        region: Judge only this part of the images, in pixels from the left and the top, or where an image of their
            size, a mask, is light; all must have one size.
        tolerate_brightness: Do not flag images for being up to this much brighter or darker than the good ones.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    started = time.monotonic()
    check_rate(false_positive_rate)
    check_group(group)
    brightness = tolerate_brightness / 100
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
    check_model_name(out)
    description = describe(update or model, device)
    check_copy(description.folder, out)
    folders = {
        "data": (data, "good images"), "reviewed": (reviewed, "good images that were flagged"),
        "defective": (defective, "defective images"), "check": (check, "good images that have no part in the detector"),
    }  # fmt: skip
    for field, (folder, contents) in folders.items():
        if folder is not None and not folder.is_dir():
            raise InputError(field, f"{folder} is not a folder: name a folder of {contents}.")
    is_in_place = bool(update) and out.resolve() == description.folder.resolve()
    if (out / DETECTOR).is_file() and not is_in_place:
        is_losing = are_kept(out) and (bool(update) or not keep_images)
        lost = ", and the images that it keeps are deleted" if is_losing else ""
        _print_message(f"ncml: {out} holds a detector already: the new one replaces it{lost}")
    comparison: list[str] = []
    printed: set[str] = set()

    def report(made: "MadeDetector") -> None:
        """Write the card, and print the lines of the report that are new."""
        from ncml.calibration import descriptions

        descriptions.write_detector_card(made)
        lines = [*descriptions.describe_detector(made), *comparison]
        if made.suspects:
            lines.append(f"the images that are unlike the others are shown in {out / SUSPECTS}")
        if made.pictures:
            lines.append(f"examples of what it finds and misses are shown in {made.pictures}")
        for line in [] if as_json else [line for line in lines if line not in printed]:
            print(line, flush=True)
        printed.update(lines)

    def report_calibrated(made: "MadeDetector") -> None:
        from ncml.calibration import descriptions

        descriptions.save_contact_sheet(made.suspects, out / SUSPECTS)
        report(made)

    with progress_bar() as on_progress:
        compared = are_compared(group, has_others=reviewed is not None or check is not None)
        opened = {
            field: open_folder(
                folder, sorted_files(folder), on_progress, seeks_points=compared and field != "defective"
            )
            for field, (folder, _) in folders.items()
            if folder is not None
        }
        reasons = [reason for images in opened.values() for reason in images.unreadable]
        more = f"and {len(reasons) - MAX_MESSAGES} more"
        for reason in reasons[:MAX_MESSAGES] + [more] * (len(reasons) > MAX_MESSAGES):
            _print_message(f"ncml: skipped: {reason}")
        loaded = load(description, device)
        common: dict[str, Any] = {
            "defective": opened.get("defective"),
            "check": opened.get("check"),
            "device": device,
            "on_calibrated": report_calibrated,
            "on_message": _print_message,
            "on_progress": on_progress,
            **({} if power else {"power_images": 0}),
        }
        if update:
            from ncml.calibration.updating import update_detector

            updated = update_detector(loaded, opened["data"], out, **common)
            made, comparison = updated.made, updated.comparison
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
    report(made)
    if as_json:
        print_json(_result(made) | {"comparison": comparison, "seconds": round(time.monotonic() - started, 1)})
    else:
        print(f"made in {time.monotonic() - started:.0f} s", file=sys.stderr)
        print(f"try: ncml score IMAGE --model {shlex.quote(str(out.resolve()))}", file=sys.stderr)


def _print_message(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _result(made: "MadeDetector") -> dict[str, Any]:
    calibration, reviews = made.calibration, made.reviews
    return {
        "folder": str(made.folder),
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
        "pictures": made.pictures and str(made.pictures),
        "weakness": calibration.weakness,
        "notes": list(calibration.notes),
        "near_duplicates": [list(names) for names in made.near_duplicates],
        "suspicious": [suspect.name for suspect in made.suspects],
        "left_out": list(made.left_out),
        "reviewed": {name: getattr(reviews, name) for name in ("images", "still_flagged", "defective", "found")}
        if reviews.images or reviews.defective
        else None,
        "check": {"images": reviews.checked, "flagged": reviews.flagged} if reviews.checked else None,
    }
