"""The options of `ncml generate` and `ncml complete`, and the file that they write."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
    write_file,
)
from ncml.errors import InputError
from ncml.limits import MAX_IMAGES_PER_CALL, check_count, random_seed
from ncml.options import OPTIONS, TYPES, select_options
from ncml.sampling.defaults import check_refinement

if TYPE_CHECKING:
    from ncml.model import Model

Options = TypeVar("Options")


def _with_flags(options: type[Options]) -> type[Options]:
    """Add a flag for each sampling option, after those of `options`."""
    flags: list[tuple[str, Any, Any]] = []
    for name, option in OPTIONS.items():
        flag = arg(metavar=option.metavar, help=option.help, help_behavior_hint="(default: the model's)")
        flags.append((name, Annotated[TYPES[name], flag], None))
    return make_dataclass(options.__name__, flags, bases=(options,), frozen=True, kw_only=True)


@_with_flags
@dataclass(frozen=True, kw_only=True)
class _ImageOptions:
    """What to generate."""

    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE.png")]
    """The PNG file to write."""
    number: Annotated[int, arg(aliases=("-n",), metavar="COUNT")] = 1
    """Number of images, or of completions of the half."""
    class_: ClassOption = None
    """Generate images of this class, or complete them as this class."""
    seed: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: random)")] = None
    """Seed of the first image; image i uses seed + i."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(_ImageOptions):
    """The options that `ncml generate` and `ncml complete` share."""

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
        options = select_options(self)
        check_refinement(options)
        resolve_sampling(model, n, self.class_, seed, options, self.sampler)
        return {"n": n, "classes": self.class_, "seeds": seed, "sampler": self.sampler, **options}

    def write(self, images_NHWC: Any, model: "Model", seed: int, **facts: str) -> None:
        """Write images, uint8 [n, H, W, 3], as one PNG; print the file and the seeds."""
        write_file(self.output, images.to_png(images.grid(images_NHWC)))
        if self.as_json:
            seeds = list(range(seed, seed + len(images_NHWC)))
            print_json({"model": identity(model), "file": str(self.output), "seeds": seeds} | facts)
        else:
            print(f"{self.output}  (seed {seed})")


SharedOptions = Annotated[GenerateOptions, arg(name="")]
