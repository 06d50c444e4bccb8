"""The options of `ncml generate` and `ncml complete`, and the file that they write."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ncml import images
from ncml.arguments import resolve_sampling
from ncml.checkpoint import Description
from ncml.cli.terminal import (
    ClassOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    check_output_file,
    check_threads,
    describe,
    identity,
    load,
    print_json,
    use_threads,
)
from ncml.errors import InputError
from ncml.limits import MAX_IMAGES_PER_CALL, check_count, random_seed
from ncml.sampling.options import SamplingOptions

if TYPE_CHECKING:
    from ncml.model import Model

_MODEL_DEFAULT = "(default: the model's)"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options that `ncml generate` and `ncml complete` share."""

    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE.png")]
    """The PNG file to write."""
    number: Annotated[int, arg(aliases=("-n",), metavar="COUNT")] = 1
    """Number of images, or of completions of the half."""
    class_: ClassOption = None
    """Generate images of this class, or complete them as this class."""
    seed: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: random)")] = None
    """Seed of the first image; image i uses seed + i."""
    noise: Annotated[float | None, arg(metavar="LEVELS", help_behavior_hint=_MODEL_DEFAULT)] = None
    """Start noise in grey levels; 0 samples directly, without refinement."""
    steps: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint=_MODEL_DEFAULT)] = None
    """Refinement steps."""
    solver: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=_MODEL_DEFAULT)] = None
    """tweedie, euler-maruyama, heun or predictor-corrector."""
    guidance: Annotated[float | None, arg(metavar="WEIGHT", help_behavior_hint=_MODEL_DEFAULT)] = None
    """Weight of the class against no class, 0.5 to 10; above 1, images show the class more clearly and vary less."""
    temperature: Annotated[float | None, arg(metavar="FACTOR", help_behavior_hint=_MODEL_DEFAULT)] = None
    """0.5 to 1.5; below 1, likely values become more likely."""
    sampler: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the fast one)")] = None
    """Sampler; naive is the slow reference."""
    threads: ThreadsOption = 1
    model: ModelOption = ""
    """Name or folder of the model."""
    device: DeviceOption = "cpu"
    """Device to compute on: cpu, cuda or cuda:N."""
    as_json: JsonOption = False
    """Print JSON."""

    def describe_model(self) -> Description:
        """Return the model without its weights, after refusing an invalid output file and number of threads."""
        if self.output.suffix.lower() != ".png":
            raise InputError("output", f"{self.output} must end in .png: images are written as PNG.")
        check_output_file(self.output)
        check_threads(self.threads)
        return describe(self.model, self.device)

    def load_model(self, description: Description) -> "Model":
        """Load the model."""
        use_threads(self.threads)
        return load(description, self.device)

    def arguments(self, model: Description) -> dict[str, Any]:
        """Return the arguments of `Model.generate` and `Model.complete`; a seed that is not given is random.

        Raises `InputError` for a value that the model refuses, before it is loaded.
        """
        n = check_count("n", self.number, MAX_IMAGES_PER_CALL)
        seed = random_seed(n) if self.seed is None else self.seed
        options = SamplingOptions.from_attributes(self)
        options.check_refinement()
        resolve_sampling(model, n, self.class_, seed, options)
        return {"n": n, "classes": self.class_, "seeds": seed} | asdict(options)

    def write(self, images_NHWC: Any, model: "Model", seed: int, **facts: str) -> None:
        """Write images, uint8 [n, H, W, 3], as one PNG; print the file and the seeds."""
        self.output.write_bytes(images.to_png(images.grid(images_NHWC)))
        if self.as_json:
            seeds = list(range(seed, seed + len(images_NHWC)))
            print_json({"model": identity(model), "file": str(self.output), "seeds": seeds} | facts)
        else:
            print(f"{self.output}  (seed {seed})")


SharedOptions = Annotated[GenerateOptions, arg(name="")]
