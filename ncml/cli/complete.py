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
    """Complete half an image and write the result as PNG, as a grid if there are several variants.

    Args:
        file: Half an image, or a whole image of which one half is kept.
        output: The PNG file to write.
        keep: The known half; by default derived from the image, or else the top.
        number: Number of variants.
        class_: Complete images as this class.
        seed: Seed of the first variant; variant i uses seed + i.
        noise: Start noise in grey levels; 0 samples directly, without refinement.
        steps: Refinement steps.
        solver: tweedie, euler-maruyama, heun or predictor-corrector.
        model: Name or folder of the model.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    check_writable(output)
    use_threads(threads)
    loaded = load(model, device)
    canvas, known_half = images.place_known_half(
        file, loaded.height, loaded.width, keeps=loaded.keeps, keep=keep, field=str(file)
    )
    seed = first_seed(seed, number)
    with progress_bar() as on_progress:
        completed = loaded.complete(
            canvas,
            keep=known_half,
            n=number,
            classes=class_,
            seeds=seed,
            noise=noise,
            steps=steps,
            solver=solver,
            sampler=sampler,
            callback=on_progress,
        )
    write(completed, output, loaded, seed, as_json, keep=known_half)
