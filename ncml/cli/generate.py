"""`ncml generate`."""

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
    """Generate images and write them as one PNG, as a grid if there are several.

    Args:
        output: The PNG file to write.
        number: Number of images.
        class_: Generate images of this class.
        seed: Seed of the first image; image i uses seed + i.
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
    seed = first_seed(seed, number)
    with progress_bar() as on_progress:
        generated = loaded.generate(
            number,
            classes=class_,
            seeds=seed,
            noise=noise,
            steps=steps,
            solver=solver,
            sampler=sampler,
            callback=on_progress,
        )
    write(generated, output, loaded, seed, as_json)
