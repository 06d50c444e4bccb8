"""Count generated images that are white noise, over classes, noise levels, guidance, temperature and completion.

    python benchmarks/noise_images.py [--model models/cifar10] [--images 20000] [--threads 1] [--json FILE]

One extreme draw can lead a network outside the range of its training data, so that the rest of the image is noise. Such
images are recognised by their roughness, the mean absolute difference of neighbouring values. The known halves of
completed images are those of images generated directly, without a class. Exits with 1 if there is a noise image.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ncml
from ncml.evaluation.quality import NOISE_ROUGHNESS, roughness
from ncml.runtime import reuse_freed_memory

BATCH = 100
FIRST_SEED = 1_000_000

CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("classes, guidance 1, noise 5", 7, {"guidance": 1, "noise": 5}),
    ("defaults, classes in turn", 2, {}),
    ("classes, guidance 3, noise 5, temperature 0.9", 1, {"guidance": 3, "noise": 5, "temperature": 0.9}),
    ("classes, guidance 1, noise 5, temperature 1.1", 1, {"guidance": 1, "noise": 5, "temperature": 1.1}),
    ("classes, guidance 1, noise 2.5", 2, {"guidance": 1, "noise": 2.5}),
    ("classes, guidance 1, noise 10", 2, {"guidance": 1, "noise": 10}),
    ("classes, guidance 1, noise 0", 1, {"guidance": 1, "noise": 0}),
    ("no class, noise 5", 2, {"classes": None, "noise": 5}),
    ("no class, noise 2.5", 1, {"classes": None, "noise": 2.5}),
    ("completion of the bottom half, defaults", 1, {"keep": "top"}),
)
"""Name, twentieths of the images, and options of each case."""


def generate_batch(model: ncml.Model, first_seed: int, options: dict[str, Any]) -> NDArray[np.uint8]:
    """Generate or complete `BATCH` images."""
    seeds = list(range(first_seed, first_seed + BATCH))
    classes = [model.classes[i % len(model.classes)] for i in range(BATCH)] if model.classes else None
    arguments = {"classes": classes, "seeds": seeds} | options
    if "keep" not in options:
        return np.asarray(model.generate(BATCH, **arguments))
    halves = np.asarray(model.generate(BATCH, seeds=seeds, noise=0))
    return np.asarray(model.complete(halves, **arguments))


def main() -> int:
    """Generate, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10", help="folder of the model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="number of images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    model = ncml.load(options.model)
    rows: list[dict[str, Any]] = []
    seed = FIRST_SEED
    for name, twentieths, arguments in CASES:
        batches = max(1, round(options.images * twentieths / 20 / BATCH))
        values: list[float] = []
        rough_seeds: list[int] = []
        for _ in range(batches):
            batch = roughness(generate_batch(model, seed, arguments))
            values += batch.tolist()
            rough_seeds += [seed + int(i) for i in np.flatnonzero(batch >= NOISE_ROUGHNESS)]
            seed += BATCH
            print(f"\r{name}: {len(values)} of {batches * BATCH} images", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr)
        row = {"case": name, "images": len(values), "largest": max(values), "seeds of noise images": rough_seeds}
        row |= {"median": float(np.median(values)), "99.9 %": float(np.quantile(values, 0.999))}
        rows.append(row)
        print(
            f"{name:48} {len(values):6} images  roughness: median {row['median']:5.1f}, 99.9 % {row['99.9 %']:5.1f}, "
            f"largest {row['largest']:5.1f}  noise images: {len(rough_seeds)} {rough_seeds or ''}",
            flush=True,
        )
    noise = sum(len(row["seeds of noise images"]) for row in rows)
    print(f"{noise} of {sum(row['images'] for row in rows)} images are noise")
    if options.json:
        figures = {"model": model.version, "noise_roughness": NOISE_ROUGHNESS, "cases": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(noise > 0)


if __name__ == "__main__":
    sys.exit(main())
