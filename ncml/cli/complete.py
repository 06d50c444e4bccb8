"""`ncml complete`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ncml import images
from ncml.cli.draw import (
    CountOption,
    NoiseOption,
    OutOption,
    SamplerOption,
    SeedOption,
    SolverOption,
    StepsOption,
    ThreadsOption,
    check_writable,
    first_seed,
    write,
)
from ncml.cli.terminal import ClassOption, JsonOption, ModelOption, load, progress_bar, use_threads


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
    canvas, known = images.place_known_half(file, m.height, m.width, keeps=m.keeps, keep=keep, field=str(file))
    seed = first_seed(seed, number)
    with progress_bar() as on_progress:
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
            callback=on_progress,
        )
    write(pictures, output, m, seed, as_json, keep=known)
