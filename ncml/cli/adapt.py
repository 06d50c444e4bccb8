"""`ncml adapt`."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ncml import runtime
from ncml.calibration import adapting
from ncml.calibration.adapting import DEFAULT_RATE, AdaptedDetector
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    LocationArgument,
    ModelOption,
    print_json,
    print_status,
    progress_bar,
)
from ncml.data.scenes import AUTO

NO_ALIGN = "Compare parts where they lie, even if good images agree better once they are brought to one position."
NO_POWER = "Skip the measurement of which alterations the detector finds, which takes most of the time."


def adapt(
    data: Annotated[
        Positional[LocationArgument | None], arg(metavar="FOLDER", help_behavior_hint="(required without --update)")
    ] = None,
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
            that the detector flagged although they are good, unless there are only defective ones.
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
        defective: Folder of images that should be flagged. The detector learns from them what such defects look like
            and which views show them, and the report says how many are flagged, each by what was learned without it.
            With --update, they join those that it keeps.
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
    runtime.wait_without_spinning()
    printed: set[str] = set()

    def report(adapted: AdaptedDetector) -> None:
        """Print the lines of the report that are new."""
        for line in [] if as_json else [line for line in adapted.report if line not in printed]:
            print(line, flush=True)
            printed.add(line)

    with progress_bar() as on_progress:
        adapted = adapting.adapt(
            data,
            out=out,
            model=model,
            false_positive_rate=false_positive_rate,
            confidence=confidence,
            group=group,
            leave_out=leave_out,
            reviewed=reviewed,
            defective=defective,
            check=check,
            keep_images=keep_images,
            update=update,
            region=region,
            tolerate_brightness=tolerate_brightness,
            align=align,
            power=power,
            device=device,
            on_calibrated=report,
            on_message=_print_message,
            callback=on_progress,
        )
    report(adapted)
    if as_json:
        print_json(adapted.to_dict() | {"seconds": round(time.monotonic() - started, 1)})
    else:
        print_status(f"made in {time.monotonic() - started:.0f} s")
        print_status(f"try: ncml score IMAGE --model {shlex.quote(str(out.resolve()))}")


def _print_message(line: str) -> None:
    print_status(f"ncml: {line}")
