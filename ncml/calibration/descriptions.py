"""Reports on a calibration: lines on the terminal, and a section of the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ncml import checkpoint, images
from ncml.calibration.detector import MadeDetector, Suspect
from ncml.calibration.division import reliable_scenes
from ncml.data.inventory import counted
from ncml.errors import enumerated
from ncml.limits import VIEWS
from ncml.ood.calibration import Calibration
from ncml.ood.conformal import min_ranks
from ncml.ood.detector_calibration import BOUND_CONFIDENCE, DetectorCalibration
from ncml.ood.power import list_shares, reliable_ranks, summary
from ncml.ood.scene_ranks import share_interval
from ncml.ood.tile_calibration import TileCalibration

MAX_NAMES = 10
"""Images that are listed by name."""
MAX_CELLS, CELL_SIDE, CELL_CAPTION = 48, 160, 32
"""Images on a contact sheet, pixels of a side of each, and height of the two lines below it."""


def save(calibration: Calibration, folder: Path) -> None:
    """Write a calibration into a model folder, and describe it in the card."""
    calibration.save(folder)
    title = f"{checkpoint.CALIBRATION_SECTION} {calibration.name}"
    checkpoint.write_card_section(folder, title, "\n".join(_card_lines(calibration)))


def describe(calibration: Calibration) -> list[str]:
    """Return lines that report how a calibration was made and what it detects."""
    rate, power = calibration.false_positive_rate, calibration.power
    lines = [
        f"{calibration.statistic} above {calibration.threshold:.4g} is flagged; the smallest p is "
        f"{calibration.smallest_p:.2g}"
    ]
    if power is not None:
        lines += [
            f"flagged of {power.images} ranking images after barely visible processing: {list_shares(power.processed)} "
            f"(unchanged, at most {100 * rate:g}% are expected)",
            summary(power, calibration.smallest_p),
        ]
        if tolerances := [name for name in power.tolerances(rate) if name not in calibration.tolerate]:
            lines.append(
                f"if images to be scored may be processed like this, calibrate with --tolerate {','.join(tolerances)}"
            )
    if calibration.is_weak:
        lines.append(f"this calibration is weak: {calibration.weakness}")
    return lines


def describe_suspects(names: Sequence[str], count: int) -> str:
    """Return a line that lists suspicious images by name; `count` is the number of all images."""
    return f"{_count_suspects(len(names), count)}: {enumerated(names, MAX_NAMES)}; remove any that is not good"


def _count_suspects(suspects: int, count: int) -> str:
    return f"{suspects} of {counted(count, 'image')} {'is' if suspects == 1 else 'are'} unlike the others"


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


def describe_detector(made: MadeDetector, *, names_images: bool = True) -> list[str]:
    """Return lines that report how a detector was made, its rate, and what it finds and misses.

    names_images: whether they name images that should be checked.
    """
    calibration = made.calibration
    rate, bound = 100 * calibration.false_positive_rate, 100 * calibration.rate_bound
    parts = (calibration.n_fit, calibration.estimation_scenes), (calibration.n_rank, calibration.ranks.scenes)
    estimating, ranking = (
        counted(images, "image") + (f" of {counted(scenes, 'scene')}" if scenes < images else "")
        for images, scenes in parts
    )
    lines = [
        f"{made.folder}: {estimating} for estimation, {ranking} for ranking",
        f"sizes of the good images: {_sizes(calibration)}",
        f"an image is flagged if its score is above {calibration.threshold:.2f}",
        f"weights in the score: {_weights(calibration)}",
        *calibration.descriptions.values(),
        *calibration.notes,
        *(made.images_to_check if names_images else ()),
    ]
    subject = "good images" if calibration.n_rank == calibration.ranks.scenes else "good scenes, by an image of each,"
    if calibration.confidence is None:
        lines.append(
            f"flags {rate:g}% of {subject} on average; with 95% confidence at most {bound:.1f}% with this calibration"
        )
    else:
        lines.append(f"flags at most {rate:g}% of {subject} with a confidence of {calibration.confidence:.0%}")
    if made.left_out:
        lines.append("that holds if the images left out are not good: others like them are flagged besides")
    if names_images:
        shown = made.near_duplicates[:MAX_NAMES]
        lines += [f"one scene: {', '.join(names[:MAX_NAMES])}" for names in shown]
    if made.suspects:
        count = calibration.n_fit + calibration.n_rank + len(made.left_out)
        names = [f"{suspect.name} ({suspect.view.replace('_', ' ')})" for suspect in made.suspects]
        lines.append(describe_suspects(names, count) if names_images else _count_suspects(len(names), count))
    if made.left_out and made.threshold_with_suspects is not None:
        lines.append(
            f"{counted(len(made.left_out), 'image')} left out: the threshold is {calibration.threshold:.2f} instead of "
            f"{made.threshold_with_suspects:.2f}"
        )
    elif made.threshold_without_suspects is not None:
        with_them, without = f"{calibration.threshold:.1f}", f"{made.threshold_without_suspects:.1f}"
        lines.append(
            "without them, the threshold would be the same"
            if without == with_them
            else f"without them, the threshold would be about {without}: add --leave-out suspects if they are not good"
        )
    reviews = made.reviews
    if reviews.defective:
        lines.append(
            f"{reviews.found} of {counted(reviews.defective, 'defective image')} are flagged, each by what was learned "
            "without it"
        )
        if others := reviews.defective - reviews.learned:
            shows, it = ("shows a scene", "it") if others == 1 else ("show scenes", "them")
            lines.append(
                f"{counted(others, 'defective image')} {shows} of ranking images, so nothing was learned from {it}"
            )
    if reviews.images:
        still = f"{reviews.still_flagged} would be flagged again if only images of other scenes had been added"
        lines.append(f"{counted(reviews.images, 'reviewed image')} for estimation, not for ranking; {still}")
    if reviews.checked:
        flagged, checked = reviews.flagged, reviews.checked
        low, high = share_interval(flagged, checked, BOUND_CONFIDENCE)
        lines.append(
            f"{flagged} of {checked} good images that took no part are flagged ({flagged / checked:.1%}; with 95% "
            f"confidence {low:.1%} to {high:.1%} of further ones like them)"
        )
    if calibration.power is not None:
        lines += calibration.power.lines()
    if calibration.weakness:
        lines.append(f"this detector is weak: {calibration.weakness}{_remedy(calibration)}")
    return lines


def _remedy(calibration: DetectorCalibration) -> str:
    """Return the end of a sentence about a weak detector: how many good images would make its rate reliable."""
    if calibration.ranks.scenes >= reliable_ranks(calibration.false_positive_rate):
        return ""
    scenes = reliable_scenes(calibration.false_positive_rate, calibration.confidence)
    return f"; use good images of at least {scenes} scenes"


def write_detector_card(made: MadeDetector) -> None:
    """Describe a detector in the card of its folder, with a table of its power.

    It names no images: the service shows it to all clients, and `ncml push` publishes it.
    """
    calibration = made.calibration
    lines = [f"- {line}" for line in describe_detector(made, names_images=False)[1:]]
    if made.pictures:
        lines.append(f"- `{made.pictures.name}` shows examples of what it finds and misses")
    if calibration.power is not None:
        lines += ["", "| alteration | size | flagged |", "|---|---|---:|"]
        lines += [
            f"| {kind} | {size} | {share:.0%} |"
            for kind, sizes in calibration.power.shares.items()
            for size, share in sizes.items()
        ]
    checkpoint.write_card_section(made.folder, checkpoint.DETECTOR_SECTION, "\n".join(lines))


def save_contact_sheet(suspects: Sequence[Suspect], path: Path) -> None:
    """Write small copies of the images that are unlike the others, the most unlike first.

    The name and the view with the largest part are below each. A sheet of an earlier detector is removed.
    """
    path.unlink(missing_ok=True)
    cells = [_sheet_cell(suspect) for suspect in suspects[:MAX_CELLS]]
    if cells:
        sheet = images.to_png(images.grid(np.stack(cells)))
        checkpoint.replace_file(path, lambda new: new.write_bytes(sheet))


def _sheet_cell(suspect: Suspect) -> NDArray[np.uint8]:
    image = Image.fromarray(images.open_image(suspect.path, field=suspect.name))
    image.thumbnail((CELL_SIDE, CELL_SIDE))
    cell = Image.new("RGB", (CELL_SIDE, CELL_SIDE + CELL_CAPTION), "white")
    cell.paste(image, ((CELL_SIDE - image.width) // 2, (CELL_SIDE - image.height) // 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    name = " ".join(suspect.name[-CELL_SIDE:].split())  # without line breaks
    while draw.textlength(name, font) > CELL_SIDE - 4:  # the end of a path distinguishes it
        name = "…" + name.removeprefix("…")[1:]
    draw.text((2, CELL_SIDE + 2), name, "black", font)
    draw.text((2, CELL_SIDE + 16), suspect.view.replace("_", " "), "black", font)
    return np.asarray(cell)


def _sizes(calibration: DetectorCalibration) -> str:
    by_count = sorted((calibration.sizes or {}).items(), key=lambda item: -item[1])
    return enumerated([f"{size} ({count})" for size, count in by_count], 3)


def _weights(calibration: DetectorCalibration) -> str:
    by_weight = sorted(calibration.scales.items(), key=lambda item: -item[1].weight)
    return ", ".join(f"{name} {scale.weight:.2f}" for name, scale in by_weight)


def _card_lines(calibration: Calibration) -> list[str]:
    tolerated = f", tolerating {', '.join(calibration.tolerate)}" if calibration.tolerate else ""
    lines = [
        f"Statistic {calibration.statistic}, estimated on {calibration.n_fit:,} images and ranked by "
        f"{calibration.n_rank:,}{tolerated}; at most {100 * calibration.false_positive_rate:g}% of good images are "
        f"expected to be flagged, and the smallest p-value is {calibration.smallest_p:.2g}.",
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
