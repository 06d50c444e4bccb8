"""Bring two public sets of photographs to the layout that `parts.py --folders` measures with.

    git clone https://github.com/abin24/Magnetic-tile-defect-datasets. magnetic-tiles
    python benchmarks/photographs.py tiles magnetic-tiles tiles
    python benchmarks/photographs.py castings casting_data castings
    python benchmarks/parts.py --folders tiles --group folder

tiles: magnetic tiles (Huang, Qiu and Yuan, "Surface defect saliency of magnetic tile", The Visual Computer 36, 2020),
of each up to six exposures. Frames are numbered, so exposures of one tile have neighbouring numbers; where the numbers
leave `GAP` out, the next tile begins. Four of five tiles make the detector, all exposures of the others and all
defective images test it. No tile is in both parts, unlike in a division by image.
castings: impellers of pumps, 300x300 (the set "casting product image data for quality inspection" of Kaggle, in which
augmented copies of one casting cannot be told from others). 300 good images of its training part make the detector, its
test part tests it.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

GAP = 250
"""Frames between two exposures from which on they show different tiles; the six of one lie within about 100."""
TRAINING_TILES = 0.8
TRAINING_CASTINGS = 300
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS), help="the set of photographs")
    parser.add_argument("source", type=Path, help="its folder, as it is published")
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    SETS[options.set](options.source, options.out)


def tiles(source: Path, out: Path) -> None:
    """Write the magnetic tiles, those of one tile in a folder of their own."""
    free = sorted((source / "MT_Free" / "Imgs").glob("*.jpg"), key=_frame)
    groups = [[free[0]]]
    for before, path in pairwise(free):
        if _frame(path) - _frame(before) > GAP:
            groups.append([])
        groups[-1].append(path)
    order = np.random.default_rng(SEED).permutation(len(groups)).tolist()
    training = round(TRAINING_TILES * len(groups))
    for part, indices in (("train", order[:training]), ("test", order[training:])):
        for index in indices:
            _copy(groups[index], out / part / "good" / f"{index:03d}")
    for folder in sorted(source.glob("MT_*")):
        if folder.name != "MT_Free":
            _copy(sorted((folder / "Imgs").glob("*.jpg")), out / "test" / folder.name.removeprefix("MT_").lower())


def _frame(path: Path) -> int:
    match = re.search(r"num_(\d+)", path.stem)
    if match is None:
        raise SystemExit(f"{path} is not named as the magnetic tiles are: exp1_num_108719.jpg")
    return int(match[1])


def castings(source: Path, out: Path) -> None:
    """Write the castings: good ones spread evenly over the sorted training part, and the whole test part."""
    good = sorted((source / "train" / "ok_front").glob("*.jpeg"))
    _copy([good[i] for i in np.linspace(0, len(good) - 1, TRAINING_CASTINGS).astype(int)], out / "train" / "good")
    _copy(sorted((source / "test" / "ok_front").glob("*.jpeg")), out / "test" / "good")
    _copy(sorted((source / "test" / "def_front").glob("*.jpeg")), out / "test" / "defective")


def _copy(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder)


SETS = {"tiles": tiles, "castings": castings}


if __name__ == "__main__":
    main()
