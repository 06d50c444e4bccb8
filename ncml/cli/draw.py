"""The options of `ncml generate` and `ncml complete`, and the file that they write."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ncml import images
from ncml.cli.terminal import identity, print_json
from ncml.config import DEFAULT_SOLVER, STEPPED_SOLVER
from ncml.errors import InputError
from ncml.limits import random_seed

if TYPE_CHECKING:
    from ncml.model import Model

NoiseOption = Annotated[float | None, arg(metavar="LEVELS", help_behavior_hint="(default: the model's)")]
StepsOption = Annotated[int | None, arg(help_behavior_hint="(default: the solver's)")]
SeedOption = Annotated[int | None, arg(help_behavior_hint="(default: random)")]
ThreadsOption = Annotated[
    int, arg(metavar="COUNT", help="CPU threads. Changing the number can change rounding, and therefore the images.")
]
SamplerOption = Annotated[
    str | None,
    arg(metavar="NAME", help="Sampler; naive is the slow reference.", help_behavior_hint="(default: the fast one)"),
]
SolverOption = Annotated[
    str | None,
    arg(
        metavar="NAME",
        help_behavior_hint=f"(default: {DEFAULT_SOLVER}; {STEPPED_SOLVER} for several steps)",
    ),
]
CountOption = Annotated[int, arg(name="number", aliases=("-n",))]
OutOption = Annotated[Path, arg(name="output", aliases=("-o",))]


def first_seed(seed: int | None, number: int) -> int:
    """Return the seed of the first image: the one given, or a random one from which all are in range."""
    return random_seed(number) if seed is None else seed


def check_writable(output: Path) -> None:
    """Refuse an invalid output file before minutes are spent on computing."""
    if output.suffix.lower() != ".png":
        raise InputError("output", f"{output} does not end in .png: images are written as PNG")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError("output", f"{output} cannot be written: its folder does not exist or is read-only")


def write(images_NHWC: Any, output: Path, model: "Model", seed: int, as_json: bool, **facts: str) -> None:
    """Write images, uint8 [n, H, W, 3], as one PNG; print the file and the seeds."""
    output.write_bytes(images.to_png(images.grid(images_NHWC)))
    if as_json:
        seeds = list(range(seed, seed + len(images_NHWC)))
        print_json({"model": identity(model), "file": str(output), "seeds": seeds} | facts)
    else:
        print(f"{output}  (seed {seed})")
