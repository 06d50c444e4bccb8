"""Render images of parts as folders, in the layout of MVTec AD.

    python benchmarks/parts.py --write FOLDER [--kinds washer gear] [--training 200] [--good 40] [--defective 4]

Ten kinds of part: five to choose scales and neighbourhoods on, five only to report (`part_images.kinds`). A folder has
good images to adapt to, further good ones, defective ones of each kind of defect with the true regions, and foreign
ones. The images are a function of the seed; rendering takes .1 to 2 s of CPU time an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from part_images import KINDS, write_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FOLDER", required=True, help="folder of the rendered images")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--training", type=int, default=200, metavar="N", help="good images to adapt to")
    parser.add_argument("--good", type=int, default=40, metavar="N", help="further good images of each kind of part")
    parser.add_argument("--defective", type=int, default=4, metavar="N", help="images of each kind of defect")
    parser.add_argument("--foreign", type=int, default=5, metavar="N", help="foreign images for each kind of part")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in options.kinds:
        folder = write_folders(
            options.write,
            kind,
            training=options.training,
            good=options.good,
            defective=options.defective,
            foreign_images=options.foreign,
            seed=options.seed,
        )
        print(folder, flush=True)


if __name__ == "__main__":
    main()
