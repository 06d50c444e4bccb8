"""At which scales a part is found: good images are enlarged and reduced, and searched with a template of others.

    python benchmarks/scales.py FOLDER [--template 60] [--images 20]

FOLDER: good images of a part, of one size. Prints in how many of `--images` images the part is found for each scale, at
its own scale alone and with the search at others, how often a verdict would report another size, and the CPU time of a
search. What lies outside a reduced image repeats its edge.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ncml import images
from ncml.data.blocks import evenly_spaced
from ncml.ood.detection import part_difference
from ncml.ood.views import alignment
from ncml.ood.views.view import Pixels
from ncml.paths import sorted_files
from ncml.progress import ignore_progress

SCALES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--template", type=int, default=60, metavar="N", help="images that the template is made of")
    parser.add_argument("--images", type=int, default=20, metavar="N", help="other images that are searched")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted_files(args.folder)
    template_files = [files[i] for i in evenly_spaced(len(files), args.template)]
    others = sorted(set(files) - set(template_files))
    good = [images.open_image(file) for file in template_files]
    searched = [images.open_image(others[i]) for i in evenly_spaced(len(others), args.images)]
    size = alignment.template_size(*good[0].shape[:2])
    template, poses, _ = alignment.estimate([alignment.shrink(image, size) for image in good], ignore_progress)
    if template is None:
        raise SystemExit("the good images are not aligned: they do not show a part at different places")
    print(f"found in {sum(pose is not None for pose in poses)} of {len(good)} images of the template")
    at_own = dataclasses.replace(template, log_scales=())
    print("scale  at its own  at others, too  other size  seconds")
    for scale in SCALES:
        scaled = [scaled_image(image, scale) for image in searched]
        own_count = sum(at_own.pose(image) is not None for image in scaled)
        start = time.process_time()
        scaled_poses = [pose for image in scaled if (pose := template.pose(image))]
        seconds = (time.process_time() - start) / len(scaled)
        reported = sum(bool(part_difference(float(template.relative_size(pose.values_4)))) for pose in scaled_poses)
        print(f"{scale:5.2f}  {own_count:10d}  {len(scaled_poses):14d}  {reported:10d}  {seconds:7.2f}", flush=True)


def scaled_image(image_HWC: Pixels, scale: float) -> Pixels:
    """Return an image of the same size, enlarged or reduced about its middle."""
    height, width = image_HWC.shape[:2]
    margin = max(height, width)
    padded = Image.fromarray(np.pad(image_HWC, ((margin, margin), (margin, margin), (0, 0)), "edge"))
    left, top = (margin + side / 2 - side / 2 / scale for side in (width, height))
    matrix = (1 / scale, 0, left, 0, 1 / scale, top)
    return np.asarray(padded.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main()
