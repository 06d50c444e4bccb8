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
    with progress_bar() as on_progress:
        pictures = m.generate(
            number,
            classes=class_,
            seeds=seed,
            noise=noise,
            steps=steps,
            solver=solver,
            sampler=sampler,
            callback=on_progress,
        )
    write(pictures, output, m, seed, as_json)
