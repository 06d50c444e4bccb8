"""Measure how many more defects a detector finds if it learns from some of them.

    python benchmarks/known_defects.py SET... [--known 2 5 10 20] [--draws 20] [--redraw] [--group GROUP] [--json FILE]

A set is `cells` or `textiles` (`defects.py`), or a folder in the layout of MVTec AD (`photographs.py`, `parts.py
--images FOLDER --only-write`). Its views are estimated once, as `ncml adapt` does, and all images are measured. For
each draw, some of the defective images are known, at random. The view of known defects and the weights are learned from
them, the ranking images ranked again, and all other defective images judged. Where there are several kinds of defects,
those known are of one kind, and the defective images of the same and of other kinds are counted apart; the known kind
changes from draw to draw. With `--redraw`, each draw also divides the ranking images and the good test images between
both at random, for sets whose good images are of one source.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defects import SETS
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ncml.calibration.division import DefectiveImages, GoodScenes
from ncml.calibration.good_scores import GoodScores, combine
from ncml.calibration.view_estimation import measure_defective, measure_images
from ncml.data.good_images import GoodImages, open_folder
from ncml.data.scenes import AUTO, IMAGE, are_compared
from ncml.ood.conformal import Floats
from ncml.ood.scene_ranks import SceneRanks, cutoff
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.known_defects import KnownDefects
from ncml.paths import sorted_files
from ncml.progress import ignore_progress
from ncml.runtime import use_full_precision

RATE = 0.05
GOOD = "good"

Measured = Mapping[str, Floats]
"""Scores of images by view."""


@dataclass(frozen=True)
class Images:
    """Images as they are judged without known defects, and their most unusual patches."""

    scores: Measured
    unusual: list[Tensor]

    def __len__(self) -> int:
        return len(self.unusual)

    def take(self, positions: NDArray[np.int64]) -> Images:
        """Return some of the images."""
        scores = {name: values[positions] for name, values in self.scores.items()}
        return Images(scores, [self.unusual[i] for i in positions.tolist()])

    def join(self, other: Images) -> Images:
        """Return these images and others."""
        scores = {name: np.concatenate([values, other.scores[name]]) for name, values in self.scores.items()}
        return Images(scores, self.unusual + other.unusual)

    def judged(self, known: KnownDefects | None) -> Measured:
        """Return the scores of all views."""
        if known is None:
            return self.scores
        return {**self.scores, known.name: np.array([known.score(unusual_PF) for unusual_PF in self.unusual])}


@dataclass(frozen=True)
class Set:
    """The good images of a detector, and the images that it judges, by kind."""

    scores: GoodScores
    estimating: Sequence[Tensor]
    """The most unusual patches of the good images that estimate."""
    ranking: Images
    tests: dict[str, Images]

    @property
    def defects(self) -> list[str]:
        """The kinds of defects."""
        return [kind for kind in self.tests if kind not in (GOOD, "foreign")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET", help="cells, textiles, or a folder")
    parser.add_argument("--known", nargs="+", type=int, default=[2, 5, 10, 20], metavar="N", help="known defects")
    parser.add_argument("--draws", type=int, default=20, metavar="N", help="random draws of each number")
    parser.add_argument("--redraw", action="store_true", help="also draw the ranking images")
    parser.add_argument("--group", default=AUTO, help="how the good images of folders are grouped into scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file, as they come")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_full_precision()
    results: dict[str, Any] = {}
    for name in options.sets:
        own = measure(name, options.group)
        results[name] = {}
        for known_count in [0, *options.known]:
            rows = [draw(own, known_count, number, redraw=options.redraw) for number in range(options.draws)]
            results[name][known_count] = means = {
                key: [round(float(statistic([row[key] for row in rows])), 3) for statistic in (np.mean, np.std)]
                for key in rows[0]
            }
            shares = "  ".join(f"{key} {mean:.3f} ± {deviation:.3f}" for key, (mean, deviation) in means.items())
            print(f"{name:10} known {known_count:2}  {shares}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(name: str, group: str) -> Set:
    """Estimate the views from the good images of a set, and measure all its images."""
    if name in SETS:
        image_set = SETS[name](100)
        training, tests, group = image_set.calibration, image_set.tests, IMAGE
        root = training[0].parent
    else:
        root = Path(name) / "train" / GOOD
        training = sorted_files(root)
        tests = {path.name: sorted_files(path) for path in sorted((Path(name) / "test").iterdir())}
    good = open_folder(root, training, seeks_points=are_compared(group, has_others=False))
    divided = GoodScenes.find(good, None, group).divide(RATE, None)
    views, scores, _ = measure_images(
        divided,
        DefectiveImages.of(divided, None, group),
        region=None,
        align=True,
        brightness=0.0,
        device="cpu",
        on_message=print,
        on_progress=ignore_progress,
    )
    view = views["features"]
    assert isinstance(view, FeaturesView)
    readers, scenes = good.readers(divided.estimating), divided.scenes_N[divided.estimating]
    estimated = FeaturesView.estimate(readers, scenes, device="cpu", on_progress=ignore_progress)
    ranking = {name: values[divided.ranking] for name, values in scores.scores.items()}
    measured: dict[str, Images] = {}
    for kind, paths in tests.items():
        images = open_folder(Path(os.path.commonpath([path.parent for path in paths])), paths, seeks_points=False)
        own = measure_defective(views, list(scores.scores), images, None, ignore_progress)
        measured[kind] = Images(own, unusual(view, images))
    return Set(scores, estimated.unusual, Images(ranking, unusual(view, good.take(divided.ranking))), measured)


def unusual(view: FeaturesView, images: GoodImages) -> list[Tensor]:
    """Return the most unusual patches of images."""
    return [view.most_unusual(reader()) for reader in images.readers(images.all)]


def draw(own: Set, known_count: int, number: int, *, redraw: bool) -> dict[str, float]:
    """Learn from a number of defects, and return the shares of other images that are flagged, and the AUROC."""
    rng = np.random.default_rng(number)
    kinds = own.defects
    kind = kinds[number % len(kinds)]
    order = rng.permutation(len(own.tests[kind]))
    learned, rest = (own.tests[kind].take(part) for part in np.split(order, [known_count]))
    scores = replace(
        own.scores,
        defective=learned.scores,
        defective_scenes_D=np.arange(known_count),
        are_learned_D=np.ones(known_count, bool),
    )
    known: KnownDefects | None = None
    if known_count:
        numbers, estimating = scores.defective_scenes_D, scores.scenes_N[scores.estimating]
        known, known_N, _ = KnownDefects.estimate(own.estimating, estimating, learned.unusual, numbers)
        all_N = np.zeros(len(scores.scenes_N))
        all_N[scores.estimating] = known_N
        scores = replace(scores, scores={**scores.scores, known.name: all_N})
    ranking, judged = own.ranking, own.tests[GOOD]
    scenes = scores.scenes_N[scores.ranking]
    if redraw:
        pool = ranking.join(judged)
        ranking, judged = (pool.take(part) for part in np.split(rng.permutation(len(pool)), [len(scenes)]))
        scenes = np.arange(len(scenes))
    ranks = SceneRanks.rank(combine(scores.scales, ranking.judged(known)), scenes)
    threshold = ranks.threshold(cutoff(ranks.scenes, RATE, None))
    same, good = (combine(scores.scales, images.judged(known)) for images in (rest, judged))
    row = {"found": float((same > threshold).mean())}
    if others := [own.tests[other] for other in kinds if other != kind]:
        other_kinds = functools.reduce(Images.join, others)
        row["of other kinds"] = float((combine(scores.scales, other_kinds.judged(known)) > threshold).mean())
    row["good flagged"] = float((good > threshold).mean())
    row["AUROC"] = float(roc_auc_score(np.repeat([0, 1], [len(good), len(same)]), np.concatenate([good, same])))
    return row


if __name__ == "__main__":
    main()
