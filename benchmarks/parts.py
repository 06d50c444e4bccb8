"""Measure the whole route from a folder of good images to verdicts, on rendered images of parts or on your own ones.

    python benchmarks/parts.py [--kinds washer gear | --half choice|report] [--training 200] [--good 40] [--defective 4]
                               [--power] [--json FILE] [--images FOLDER] [--only-write]
    python benchmarks/parts.py --folders FOLDER... [--group auto|image|folder|PATTERN] [--tolerate-brightness PERCENT]
                               [--power] [--json FILE]

For each kind of part: render the images, make a detector from the good ones with the library, as `ncml adapt` does, and
judge further good images, defective ones of each kind of defect, and foreign ones. Twelve kinds: seven to choose
scales, neighbourhoods and views on, five only to report (`part_images.kinds`). Images are a function of the seed;
rendering one takes .1 to 2 s of CPU time. Seconds are CPU time of one thread, so other programs on the machine do not
change them much.

`--folders` measures with images that exist, in the layout of MVTec AD: `train/good`, `test/good` and `test/DEFECT`
(`photographs.py` brings two sets to it). `--images` keeps rendered images in that layout, and reuses those of the same
options. `--power` also measures the power on altered images, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from part_images import KINDS, reuse_or_write_folders
from sklearn.metrics import roc_auc_score

import ncml
from ncml import images
from ncml.calibration.altered_originals import POWER_IMAGES
from ncml.calibration.detector import make_detector
from ncml.data.good_images import open_folder
from ncml.data.scenes import AUTO, are_compared
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.judging import Detector
from ncml.paths import sorted_files
from ncml.results import Detection
from ncml.runtime import use_full_precision

ROOT = Path(__file__).resolve().parents[1]
GOOD, FOREIGN = "good", "foreign"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="kinds of part (default: all)")
    parser.add_argument("--half", choices=["choice", "report"], help="the kinds to choose on, or only to report")
    parser.add_argument("--folders", nargs="+", type=Path, metavar="FOLDER", help="images to measure with instead")
    parser.add_argument("--group", default=AUTO, help="how the good images of --folders are grouped into scenes")
    parser.add_argument("--tolerate-brightness", type=float, default=0, metavar="PERCENT", help="as of ncml adapt")
    parser.add_argument("--training", type=int, default=200, metavar="N", help="good images to adapt to")
    parser.add_argument("--good", type=int, default=40, metavar="N", help="further good images of each kind of part")
    parser.add_argument("--defective", type=int, default=4, metavar="N", help="images of each kind of defect")
    parser.add_argument("--foreign", type=int, default=5, metavar="N", help="foreign images for each kind of part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--power", action="store_true", help="also measure the power on altered images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file, as they come")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images, which is kept")
    parser.add_argument("--only-write", action="store_true", help="only render the images, into --images")
    options = parser.parse_args()
    if options.only_write and options.images is None:
        parser.error("--only-write needs --images")
    torch.set_num_threads(1)
    use_full_precision()
    names = options.kinds or [
        name for name, kind in KINDS.items() if options.half is None or kind.for_choice == (options.half == "choice")
    ]
    kinds = {folder.resolve().name: folder for folder in options.folders or ()} or dict.fromkeys(names)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, existing in kinds.items():
            folder = existing or rendered(options.images or Path(temporary), kind, options)
            if options.only_write:
                print(folder, flush=True)
                continue
            results[kind] = measure(
                folder,
                Path(temporary) / "detectors" / kind,
                group=options.group,
                brightness=options.tolerate_brightness / 100,
                power_images=POWER_IMAGES if options.power else 0,
            )
            print_row(kind, results[kind])
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
    if len(results) > 1:
        print_row("all", total(list(results.values())))


def rendered(root: Path, kind: str, options: argparse.Namespace) -> Path:
    """Return the folder of a kind's images, rendered unless it has those of the same options."""
    return reuse_or_write_folders(
        root,
        kind,
        training=options.training,
        good=options.good,
        defective=options.defective,
        foreign_images=options.foreign,
        seed=options.seed,
    )


def measure(folder: Path, out: Path, *, group: str, brightness: float, power_images: int) -> dict[str, Any]:
    """Make a detector from `train/good`, and judge the images of each folder in `test`.

    Of images with a `truth.json`, the result says which defective ones are missed, and of how many the box is right.
    """
    model = ncml.load(ROOT / "models" / "cifar10")
    started = time.process_time()
    training = folder / "train" / GOOD
    good = open_folder(training, sorted_files(training), seeks_points=are_compared(group, has_others=False))
    made = make_detector(model, good, out, group=group, brightness=brightness, power_images=power_images)
    adapt_seconds = time.process_time() - started
    calibration = DetectorCalibration.read(out, model.version)
    detector = Detector.load(out, calibration)
    stored = folder / "truth.json"
    truth = json.loads(stored.read_text()) if stored.is_file() else {}
    started, count = time.process_time(), 0
    detections: dict[str, list[Detection]] = {}
    pointed: dict[str, list[bool]] = {}
    missed: list[str] = []
    for kind in sorted(path for path in (folder / "test").iterdir()):
        for path in sorted_files(kind):
            detection = detector.judge(images.open_image(path))
            detections.setdefault(kind.name, []).append(detection)
            count += 1
            name = path.relative_to(folder).as_posix()
            if name in truth:
                if not detection.is_ood:
                    missed.append(name)
                else:
                    pointed.setdefault(kind.name, []).append(touches(detection, truth[name]["box"]))
    seconds = (time.process_time() - started) / count
    defects = [kind for kind in detections if kind not in (GOOD, FOREIGN)]
    flagged = {kind: [sum(d.is_ood for d in own), len(own)] for kind, own in detections.items()}
    defective = [detection for kind in defects for detection in detections[kind]]
    return {
        "defective": [sum(flagged[kind][0] for kind in defects), len(defective)],
        "good": flagged[GOOD],
        "foreign": flagged.get(FOREIGN, [0, 0]),
        "by defect": {kind: flagged[kind] for kind in defects},
        "box touches the defect": [sum(map(sum, pointed.values())), sum(map(len, pointed.values()))],
        "missed": {name: truth[name] for name in missed},
        "AUROC": auroc(detections[GOOD], defective),
        "images": [calibration.n_fit, calibration.n_rank],
        "notes": list(made.calibration.notes),
        "power": None if made.calibration.power is None else made.calibration.power.to_json(),
        "adapt seconds": round(adapt_seconds, 1),
        "seconds an image": round(seconds, 3),
    }


def touches(detection: Detection, box: list[int]) -> bool:
    """Return whether the box of a detection and that of the defect overlap."""
    left, top, right, bottom = box
    own = detection.box
    return own.left < right and own.left + own.width > left and own.top < bottom and own.top + own.height > top


def auroc(good: list[Detection], defective: list[Detection]) -> dict[str, float]:
    """Return the AUROC of each view and of the score of images."""
    is_defective = [False] * len(good) + [True] * len(defective)
    scores = {"combined": [detection.score for detection in (*good, *defective)]}
    scores |= {name: [detection.views[name].score for detection in (*good, *defective)] for name in good[0].views}
    return {name: round(float(roc_auc_score(is_defective, values)), 3) for name, values in scores.items()}


def total(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return sums over kinds, and means of seconds and AUROCs."""
    sums = {name: np.sum([result[name] for result in results], 0).tolist() for name in ("defective", GOOD, FOREIGN)}
    means = {name: float(np.mean([r[name] for r in results])) for name in ("adapt seconds", "seconds an image")}
    combined = float(np.mean([result["AUROC"]["combined"] for result in results]))
    return sums | means | {"AUROC": {"combined": combined}}


def print_row(kind: str, result: dict[str, Any]) -> None:
    """Print the shares flagged, AUROCs and seconds of a kind."""
    shares = "  ".join(f"{name} {result[name][0]}/{result[name][1]}" for name in ("defective", GOOD, FOREIGN))
    areas = "  ".join(f"{name} {value:.3f}" for name, value in result["AUROC"].items())
    seconds = f"adapt {result['adapt seconds']:.0f} s  image {result['seconds an image']:.2f} s"
    print(f"{kind:10} {shares}  AUROC: {areas}  {seconds}", flush=True)


if __name__ == "__main__":
    main()
