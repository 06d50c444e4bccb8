"""Measure what a detector learns from false alarms, on rendered images of parts.

    python benchmarks/reviews.py [--kinds washer cap] [--variations label lamp] [--reviewed 10] [--varied 40]
                                 [--training 100] [--good 50] [--defective 2] [--json FILE] [--images FOLDER]

For each kind of part: make a detector from good images. For each variation that these lack (`part_images.variations`:
a label, a moved lamp, a batch of another colour, a stain that is allowed), judge good images that have it until
`--reviewed` are flagged, and update the detector with these, as `ncml adapt --update` does. Both versions judge fresh
images with the variation, fresh good images without it, and defective ones; a row has how many of each are flagged.
Reviewed images that an update refuses, because they show scenes of images that rank, are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from part_images import KINDS, VARIATIONS, render
from parts import GOOD, ROOT, rendered
from PIL import Image

import ncml
from ncml import images
from ncml.calibration.detector import MadeDetector, make_detector
from ncml.calibration.division import RankedScenesError
from ncml.calibration.updating import update_detector
from ncml.data.good_images import open_folder
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.judging import Detector
from ncml.runtime import use_full_precision

REVIEWED, FRESH = 400_000, 500_000
"""Numbers of the first images with a variation: of those that are reviewed, and of those that are judged again."""
ATTEMPTS = 3
"""Images that are judged at most until one is flagged, on average."""
FLAGGED = ("varied", GOOD, "defective")

Flagged = dict[str, list[int]]
"""Numbers of flagged images and of all, by what they show."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for_choice = [name for name, kind in KINDS.items() if kind.for_choice]
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=for_choice, help="kinds of part")
    parser.add_argument("--variations", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS))
    parser.add_argument("--reviewed", type=int, default=10, metavar="N", help="flagged images that are reviewed")
    parser.add_argument("--varied", type=int, default=40, metavar="N", help="fresh images with the variation")
    parser.add_argument("--training", type=int, default=100, metavar="N", help="good images to adapt to")
    parser.add_argument("--good", type=int, default=50, metavar="N", help="fresh good images of each kind of part")
    parser.add_argument("--defective", type=int, default=2, metavar="N", help="images of each kind of defect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file, as they come")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images, which is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_full_precision()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options.foreign = 0
        for kind in options.kinds:
            folder = rendered(options.images or Path(temporary), kind, options)
            first = make_first(folder, Path(temporary) / "detectors" / kind)
            usual = judge_usual(first, folder)
            for variation in options.variations:
                result = measure(first, usual, kind, folder, variation, options)
                results[f"{kind}, {variation}"] = result
                print_row(f"{kind}, {variation}", result)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=2) + "\n")
    for variation in options.variations:
        rows = [result for name, result in results.items() if name.endswith(variation)]
        print_row(f"all, {variation}", total(rows))
    print_row("all", total(list(results.values())))


def make_first(folder: Path, out: Path) -> Path:
    """Make a detector from `train/good`, which keeps its images; return its folder."""
    training = folder / "train" / GOOD
    good = open_folder(training, sorted(training.iterdir()))
    return make_detector(ncml.load(ROOT / "models" / "cifar10"), good, out, keep_images=True, power_images=0).folder


def load(folder: Path) -> Detector:
    """Open a detector."""
    return Detector.load(folder, DetectorCalibration.read(folder, ncml.load(folder).version))


def judge_usual(detector_folder: Path, folder: Path) -> Flagged:
    """Judge the good and the defective images in `test`."""
    detector, flagged = load(detector_folder), {GOOD: [0, 0], "defective": [0, 0]}
    for kind in (folder / "test").iterdir():
        own = flagged[GOOD if kind.name == GOOD else "defective"]
        for path in kind.iterdir():
            own[0] += detector.flags(images.open_image(path))
            own[1] += 1
    return flagged


def measure(
    first: Path, usual: Flagged, kind: str, folder: Path, variation: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Update a detector with flagged images that have a variation, and compare both versions."""

    def varied(part: str, number: int) -> Path:
        path = folder / "varied" / variation / part / f"{number}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(kind, number, variation=variation, seed=options.seed).image_HWC).save(path)
        return path

    detector, reviewed, judged = load(first), [], 0
    while len(reviewed) < options.reviewed and judged < ATTEMPTS * options.reviewed:
        path = varied("reviewed", REVIEWED + judged)
        judged += 1
        if detector.flags(images.open_image(path)):
            reviewed.append(path)
    fresh = [varied("fresh", FRESH + number) for number in range(options.varied)]
    before = {"varied": [sum(detector.flags(images.open_image(path)) for path in fresh), len(fresh)], **usual}
    result: dict[str, Any] = {"reviewed": [len(reviewed), judged], "before": before}
    if not reviewed:
        return result | {"after": before}
    out = first.parent / f"{kind}-{variation}"
    made, refused = update(first, reviewed, out)
    if made is None:
        return result | {"after": before, "refused": refused}
    detector = load(out)
    after = {"varied": [sum(detector.flags(images.open_image(path)) for path in fresh), len(fresh)]}
    after |= judge_usual(out, folder)
    return result | {"after": after, "still flagged": made.reviews.still_flagged, "refused": refused}


def update(first: Path, reviewed: list[Path], out: Path) -> tuple[MadeDetector | None, int]:
    """Update a detector with the reviewed images that it does not refuse; return it, and how many it refuses."""
    accepted = list(reviewed)
    while accepted:
        images = open_folder(accepted[0].parent, accepted)
        try:
            made = update_detector(ncml.load(first), images, out, power_images=0).made
        except RankedScenesError as error:
            accepted = [path for path in accepted if path.name not in error.names]
        else:
            return made, len(reviewed) - len(accepted)
    return None, len(reviewed)


def total(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return sums."""
    reviewed = np.sum([result["reviewed"] for result in results], 0).tolist()
    sums = {
        version: {name: np.sum([result[version][name] for result in results], 0).tolist() for name in FLAGGED}
        for version in ("before", "after")
    }
    return {"reviewed": reviewed, **sums}


def print_row(name: str, result: dict[str, Any]) -> None:
    """Print how many images were reviewed, and what both versions flag."""
    before, after = result["before"], result["after"]
    shares = "  ".join(f"{own} {before[own][0]} -> {after[own][0]} of {after[own][1]}" for own in FLAGGED)
    refused = f" ({result['refused']} refused)" if result.get("refused") else ""
    print(f"{name:18} reviewed {result['reviewed'][0]} of {result['reviewed'][1]}{refused}  {shares}", flush=True)


if __name__ == "__main__":
    main()
