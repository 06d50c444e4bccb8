"""The command line: one function for each command, parsed by tyro from its signature and docstring.

Other rooms lend commands through the entry point group `ncml.commands`, so this module imports none of them.
torch is imported inside commands only: `ncml --help` answers at once. Results go to standard output, progress
and errors to standard error. A mistake of the user's is one line and exit status 2, never a traceback.
"""

import contextlib
import difflib
import functools
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro
from tyro.conf import Positional, arg

from ncml import config, images
from ncml.errors import InputError, ModelError, NcmlError
from ncml.folders import model_folders, search_path

if TYPE_CHECKING:
    from ncml.model import Model

BATCH = 64
"""Pictures scored in one call of the model."""
PATIENCE_S = 2.0
"""What takes longer shows a progress bar."""
QUIET_S = 30.0
"""How often a line tells of progress where there is no terminal."""
MAX_SEED = 2**53 - 1
MAX_THREADS = 256
"""Far beyond this OpenMP ends the process without a word of ours."""


class Bar(Protocol):
    """What draws progress."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Stage `stage` is `done` of `total`."""
        ...


ModelOption = Annotated[str, arg(aliases=("-m",), metavar="NAME|PATH")]
ClassOption = Annotated[str | None, arg(name="class", metavar="NAME", help_behavior_hint="(default: none)")]
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
JsonOption = Annotated[bool, arg(name="json")]


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    out: Annotated[Path, arg(metavar="FOLDER")],
    process: Literal["vp", "ve", "sub-vp"] = "vp",
    noise: float = 10.0,
    objective: Literal["ncml", "mle"] = "ncml",
    images: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: the recipe's)")] = None,
    max_minutes: Annotated[float, arg(metavar="MINUTES", help_behavior_hint="(default: no limit)")] = math.inf,
    resume: bool = False,
    threads: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all cores)")] = None,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train a model on your pictures and write its folder, ready to be served.

    Args:
        recipe: smoke, cifar10_small, paper_cifar10, paper_imagenet64 or paper_celeba64.
        data: Folder of pictures (a subfolder for each class, or none), folder of parquet files, or Hub name.
        out: Folder of the model; its name is the model's name.
        process: Noising process.
        noise: Largest noise, in grey levels.
        objective: Noise conditional maximum likelihood, or plain maximum likelihood.
        images: Pictures to see in all.
        max_minutes: Stop after this time, save and measure.
        resume: Go on with the run that the folder holds.
        threads: Processor cores to use.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    chosen = config.recipe(recipe)
    for name, value in (("noise", noise), ("images", images), ("max-minutes", max_minutes)):
        if value is not None and not value > 0:  # NaN included
            raise InputError(name, f"--{name} must be more than 0, not {value}.")
    training = replace(chosen.training, images=images or chosen.training.images)
    chosen = replace(chosen, noise=replace(chosen.noise, process=process, grey_levels=noise), training=training)
    if objective == "mle":
        chosen = config.maximum_likelihood(chosen)

    from ncml.fit import fit

    check_device(device)
    if threads is not None:
        use_threads(threads)
    with progress_bar() as bar:
        fitted = fit(
            chosen,
            data,
            out,
            command=described(sys.argv[1:], data),
            resume=resume,
            device=device,
            max_seconds=60 * max_minutes,
            bar=bar,
        )
    if as_json:
        model = {"name": fitted.folder.name, "version": fitted.version}
        print_json({"model": model, "folder": str(fitted.folder), "metrics": fitted.metrics})
    else:
        print(fitted.folder, *(f"{name} {value:g}" for name, value in fitted.metrics.items()), sep="  ")


def score(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...", help_behavior_hint="")],
    /,
    *,
    model: ModelOption = "cifar10",
    class_: ClassOption = None,
    noise: float = 0.0,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tell how likely pictures are under a model: exact bits per dimension and nats.

    Args:
        files: Pictures to score: PNG, JPEG, WebP, BMP, TIFF or GIF.
        model: Name or folder of the model.
        class_: Condition on this class.
        noise: Noise level at which to score, in grey levels.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "no picture is named: ncml score FILE...")
    m = load(model, device)
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            stack = [images.fit(images.open_image(path, field=str(path)), m.height, m.width) for path in some]
            scores = m.score(stack, classes=class_, noise=noise)
            rows += [
                {"file": str(path), "bpd": s.bpd, "log_likelihood": s.log_likelihood}
                for path, s in zip(some, scores, strict=True)
            ]
            bar("score", len(rows), len(files))
    if as_json:
        print_json({"model": identity(m), "results": rows})
    else:
        for row in rows:
            print(f"{row['bpd']:8.4f} bits/dim  {row['log_likelihood']:12.2f} nats  {row['file']}")


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


def models(*, as_json: JsonOption = False) -> None:
    """List the models that can be named: those in the directories of NCML_MODELS, or in ./models and shipped.

    Args:
        as_json: Print JSON.
    """
    found = [
        identity(m)
        | {
            "folder": str(folder),
            "height": m.height,
            "width": m.width,
            "classes": list(m.classes),
            "noise": m.noise,
            "keeps": list(m.keeps),
            "metrics": m.metrics,
        }
        for folder in model_folders().values()
        for m in [load(str(folder), "cpu")]
    ]
    if as_json:
        print_json({"models": found})
    elif not found:
        print("no model found in", os.pathsep.join(map(str, search_path())))
    else:
        for m in found:
            measured = "  ".join(f"{name} {value:g}" for name, value in m["metrics"].items())
            print(f"{m['name']}  {m['version'][:12]}  {m['height']}x{m['width']}  {measured}  {m['folder']}")
            if m["classes"]:
                print("  classes:", ", ".join(m["classes"]))


COMMANDS: tuple[Callable[..., Any], ...] = (train, score, generate, complete, models)


def use_threads(count: int) -> None:
    """Compute on so many cores."""
    import torch

    if not 1 <= count <= MAX_THREADS:
        raise InputError("threads", f"--threads must be 1 to {MAX_THREADS}, not {count}.")
    torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Refuse a device that is not here, before pictures are read."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA asserts
        raise InputError("device", f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def described(arguments: Sequence[str], data: str) -> str:
    """The command as a model card quotes it: whole, but for where on this machine the data lies."""
    quoted = (f"…/{Path(a).name}" if a == data and Path(a).is_dir() else shlex.quote(a) for a in arguments)
    return " ".join(["ncml", *quoted])


def load(model: str, device: str) -> "Model":
    """Load a model by name or folder; raises `ModelError` with the nearest name on a typo."""
    import ncml

    known = model_folders()
    folder = known.get(model) or Path(model)
    if not folder.is_dir():
        raise ModelError(f"there is no model {model!r}{suggestion(model, list(known))}")
    return ncml.load(folder, device=device)


def identity(model: "Model") -> dict[str, Any]:
    """Name and version of a model, as results quote them."""
    return {"name": model.name, "version": model.version}


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


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def progress_bar() -> Generator[Callable[..., None]]:
    """A function of (stage, done, total, note = "") that draws a bar once `PATIENCE_S` have passed.

    Where standard error is no terminal, it writes a line every `QUIET_S` instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    begun = last = time.monotonic()
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            nonlocal bar, last
            now = time.monotonic()
            if now - begun < PATIENCE_S:
                return
            if not console.is_terminal:
                if now - last >= QUIET_S:
                    last = now
                    print(f"{stage.replace('_', ' ')} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)
                return
            if bar is None:
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
                described = TextColumn("{task.description}")
                bar = stack.enter_context(Progress(described, *columns, console=console, transient=True))
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage.replace("_", " "), total=total, note=note)
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield show


def step_of(bar: Bar) -> Callable[[Any], None]:
    """The sampler's callback that feeds a progress bar."""
    return lambda progress: bar(progress.stage, progress.step, progress.total)


def suggestion(word: str, known: Sequence[str]) -> str:
    """The end of a sentence that says that `word` is none of `known`."""
    nearest = difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f": did you mean {nearest[0]}?"
    return f": choose from {', '.join(known)}" if known else ": none is installed"


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The command that the arguments ask for, ready to run; raises `InputError` on a mistake, SystemExit for help."""
    commands = {command.__name__: command for command in COMMANDS}
    lent = {point.name: point for point in entry_points(group="ncml.commands")}
    named = next((a for a in arguments if not a.startswith("-")), None)
    if named is not None and named not in commands.keys() | lent.keys():
        raise InputError("command", f"there is no command {named!r}{suggestion(named, [*commands, *lent])}")
    if named not in commands:  # lent commands are imported only where they are shown or run
        commands |= {name: point.load() for name, point in lent.items() if named in (None, name)}
    app = tyro.extras.SubcommandApp()
    for name, command in commands.items():
        app.command(name=name)(_deferred(command))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(
                prog="ncml",
                description="Exact likelihoods and pictures from a noise conditional pixel network.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError("arguments", one_line(said.getvalue())) from None


def _deferred(command: Callable[..., Any]) -> Callable[..., functools.partial[Any]]:
    """The command with its arguments bound rather than run, so that parsing ends before work begins."""

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> functools.partial[Any]:
        return functools.partial(command, *args, **kwargs)

    return bound


def one_line(box: str) -> str:
    """The box that tyro draws for an error as one line: what is wrong, and the nearest spelling where it knows one."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # without its title; no │ where output is ASCII
    sections = [list(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("─-╰╯")) if not rule]
    said = [" ".join(part) for part in sections if "helptext" not in part[0]]
    # Leaving an option out is not one of the values to choose from.
    return re.sub(r" in ncml .*|'None', |, 'None'", "", ". ".join(said)).replace("..", ".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        status = parse(sys.argv[1:] if arguments is None else arguments)() or 0
        sys.stdout.flush()
        return status
    except NcmlError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        extra = {"torch": "worker", "safetensors": "worker", "datasets": "train"}.get(error.name or "")
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed: pip install 'ncml[{extra}]'")
    except KeyboardInterrupt as stop:
        print(f"ncml: {stop or 'stopped'}", file=sys.stderr)
        return 130


def _fail(sentence: str) -> int:
    print(f"ncml: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
