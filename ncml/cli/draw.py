"""`ncml generate` and `ncml complete`."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ncml import config, images
from ncml.cli.terminal import (
    Bar,
    ClassOption,
    JsonOption,
    ModelOption,
    identity,
    load,
    print_json,
    progress_bar,
    use_threads,
)
from ncml.errors import InputError

if TYPE_CHECKING:
    from ncml.model import Model

MAX_SEED = 2**53 - 1

NoiseOption = Annotated[float | None, arg(metavar="LEVELS", help_behavior_hint="(default: the model's)")]
StepsOption = Annotated[int | None, arg(help_behavior_hint="(default: the solver's)")]
SeedOption = Annotated[int | None, arg(help_behavior_hint="(default: drawn)")]
ThreadsOption = Annotated[
    int, arg(metavar="COUNT", help="Processor cores to use. Another number may round otherwise, and so draw otherwise.")
]
SamplerOption = Annotated[
    str | None,
    arg(metavar="NAME", help="Sampler; naive is the slow reference.", help_behavior_hint="(default: the fast one)"),
]
SolverOption = Annotated[
    str | None,
    arg(
        metavar="NAME",
        help_behavior_hint=f"(default: {config.DEFAULT_SOLVER}; {config.STEPPED_SOLVER} for several steps)",
    ),
]
CountOption = Annotated[int, arg(name="number", aliases=("-n",))]
OutOption = Annotated[Path, arg(name="output", aliases=("-o",))]


def generate(
    *,
    output: OutOption,
    number: CountOption = 1,
    class_: ClassOption = None,
    seed: SeedOption = None,
    noise: NoiseOption = None,
    steps: StepsOption = None,
    solver: SolverOption = None,
    sampler: SamplerOption = None,
    threads: ThreadsOption = 1,
    model: ModelOption = "cifar10",
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Draw new pictures and write them as one PNG, a grid when there are several.

    Args:
        output: The PNG file to write.
        number: How many pictures.
        class_: Draw this class.
        seed: Seed of the first picture; the i-th after it uses seed + i.
        noise: Noise level to start from, in grey levels; 0 draws directly.
        steps: Refinement steps.
        solver: tweedie, euler-maruyama, heun or predictor-corrector.
        model: Name or folder of the model.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    check_writable(output)
    use_threads(threads)
    m = load(model, device)
    seed = first_seed(seed, number)
    with progress_bar() as bar:
        pictures = m.generate(
            number,
            classes=class_,
            seeds=seed,
            noise=noise,
            steps=steps,
            solver=solver,
            sampler=sampler,
            callback=step_of(bar),
        )
    write(pictures, output, m, seed, as_json)


def complete(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    *,
    output: OutOption,
    keep: Literal["top", "bottom", "left", "right"] | None = None,
    number: CountOption = 1,
    class_: ClassOption = None,
    seed: SeedOption = None,
    noise: NoiseOption = None,
    steps: StepsOption = None,
    solver: SolverOption = None,
    sampler: SamplerOption = None,
    threads: ThreadsOption = 1,
    model: ModelOption = "cifar10",
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Complete half a picture and write the whole as PNG, a grid when several variants are asked for.

    Args:
        file: Half a picture, or a whole one of which one half is kept.
        output: The PNG file to write.
        keep: The half that is known; by default what the picture says, else the top.
        number: How many variants.
        class_: Complete towards this class.
        seed: Seed of the first variant; the i-th after it uses seed + i.
        noise: Noise level to start from, in grey levels; 0 draws directly.
        steps: Refinement steps.
        solver: tweedie, euler-maruyama, heun or predictor-corrector.
        model: Name or folder of the model.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    check_writable(output)
    use_threads(threads)
    m = load(model, device)
    canvas, known = images.half_canvas(file, m.height, m.width, keeps=m.keeps, keep=keep, field=str(file))
    seed = first_seed(seed, number)
    with progress_bar() as bar:
        pictures = m.complete(
            canvas,
            keep=known,
            n=number,
            classes=class_,
            seeds=seed,
            noise=noise,
            steps=steps,
            solver=solver,
            sampler=sampler,
            callback=step_of(bar),
        )
    write(pictures, output, m, seed, as_json, keep=known)


def first_seed(seed: int | None, number: int) -> int:
    """The seed asked for, or one drawn so that the following `number` are seeds too."""
    return secrets.randbelow(MAX_SEED - number) if seed is None and 0 < number < MAX_SEED else seed or 0


def check_writable(output: Path) -> None:
    """Refuse an output before minutes are spent on it."""
    if output.suffix.lower() != ".png":
        raise InputError("output", f"{output} does not end in .png: pictures are written as PNG")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError("output", f"{output} cannot be written: its folder does not exist or is read-only")


def write(pictures: Any, output: Path, model: "Model", seed: int, as_json: bool, **facts: str) -> None:
    """Write uint8 (n, H, W, 3) as one PNG and say where, and with which seeds."""
    output.write_bytes(images.to_png(images.grid(pictures)))
    if as_json:
        seeds = list(range(seed, seed + len(pictures)))
        print_json({"model": identity(model), "file": str(output), "seeds": seeds} | facts)
    else:
        print(f"{output}  (seed {seed})")


def step_of(bar: Bar) -> Callable[[Any], None]:
    """The sampler's callback that feeds a progress bar."""
    return lambda progress: bar(progress.stage, progress.step, progress.total)
