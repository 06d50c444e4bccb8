"""`ncml train`."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ncml import config
from ncml.cli.terminal import JsonOption, check_device, load, print_json, progress_bar, use_threads
from ncml.errors import InputError
from ncml.progress import ignore_progress

MOST = 2**53 - 1
"""Pictures or pieces: beyond it fractions of a count are no longer exact."""


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    out: Annotated[Path, arg(metavar="FOLDER")],
    size: Annotated[str | None, arg(metavar="N|HxW", help_behavior_hint="(default: the recipe's)")] = None,
    process: Literal["vp", "ve", "sub-vp"] = "vp",
    noise: float | Literal["paper"] = 10.0,
    objective: Literal["ncml", "mle"] = "ncml",
    max_images: Annotated[
        int | None,
        arg(
            aliases=("--images",),
            metavar="COUNT",
            help_behavior_hint="(default: what fits the time, or the recipe's)",
        ),
    ] = None,
    max_time: Annotated[str | None, arg(metavar="TIME", help_behavior_hint="(default: no limit)")] = None,
    batch_size: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: the recipe's)")] = None,
    learning_rate: Annotated[float | None, arg(metavar="RATE", help_behavior_hint="(default: the recipe's)")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, arg(metavar="fp32|bf16", help_behavior_hint="(default: the recipe's)")
    ] = None,
    schedule: Annotated[
        Literal["cooldown", "constant"] | None,
        arg(metavar="cooldown|constant", help_behavior_hint="(default: cooldown)"),
    ] = None,
    cooldown_from: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    init_from: Annotated[str | None, arg(metavar="NAME|PATH", help_behavior_hint="(default: random weights)")] = None,
    resume: bool = False,
    interval: Annotated[int, arg(metavar="COUNT")] = 20_000,
    tracker: Annotated[str | None, arg(metavar="MODULE:FUNCTION", help_behavior_hint="(default: none)")] = None,
    threads: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all cores)")] = None,
    device: str = "cpu",
    accumulate: Annotated[int, arg(metavar="PIECES")] = 1,
    recompute: bool = False,
    compile: bool = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on your pictures and write its folder, measured, calibrated and ready to be served.

    Under torchrun the processes share the work, and compute what one would.

    Args:
        recipe: smoke, cifar10_tiny, cifar10_small, paper_cifar10, paper_imagenet64 or paper_celeba64.
        data: Folder of pictures (a subfolder for each class, or none), folder of parquet files, or Hub name.
        out: Folder of the model; its name is the model's name.
        size: Height and width that pictures are brought to.
        process: Noising process.
        noise: Largest noise, in grey levels, or paper: the end time that the paper prints for the process.
        objective: Noise conditional maximum likelihood, or plain maximum likelihood.
        max_images: Pictures to see in all, by which the learning rate has fallen to 0.
        max_time: Stop after this time, such as 90s, 45m or 12h, save and measure.
        batch_size: Pictures of a step, over all processes.
        learning_rate: Learning rate of Adam; that of Muon, in recipes that use it, changes in proportion.
        precision: What convolutions, attention and matrix products are computed in.
        schedule: Learning rate after the warm-up: falls to 0 at the end, or stays constant until the run is stopped.
        cooldown_from: Folder of a run to branch off: its learning rate falls to 0 by --max-images; that run stays.
        init_from: Model whose weights to begin with.
        resume: Go on with the run that the folder holds.
        interval: Pictures seen from one measurement, sample grid and saved state to the next.
        tracker: What follows the run beside TensorBoard: a function of (folder, config) as
            ncml.training.tracking describes.
        threads: Processor cores to use, in each process.
        device: Where to compute: cpu, cuda or cuda:N.
        accumulate: Pieces of a batch that are computed one after the other, which saves memory.
        recompute: Compute activations twice rather than keep them, which saves more.
        compile: Compile the network first, with torch.compile.
        as_json: Print JSON.
    """
    chosen = config.recipe(recipe)
    given = {"noise": noise, "max-images": max_images, "batch-size": batch_size}
    given |= {"learning-rate": learning_rate, "interval": interval, "accumulate": accumulate}
    for name, value in given.items():
        if isinstance(value, int | float) and not value > 0:  # NaN included
            raise InputError(name, f"--{name} must be more than 0, not {value}.")
        if isinstance(value, int) and value > MOST:
            raise InputError(name, f"--{name} must be {MOST} at most.")
    seconds = math.inf if max_time is None else duration(max_time)
    if size is not None:
        height, width = height_and_width(size)
        chosen = replace(chosen, model=replace(chosen.model, height=height, width=width))
    if schedule is not None and (resume or cooldown_from is not None):
        option = "resume" if resume else "cooldown-from"
        raise InputError("schedule", f"--schedule cannot be combined with --{option}, which keeps the run's schedule.")
    if cooldown_from is not None and max_images is None and not resume:
        raise InputError("max-images", "--cooldown-from needs --max-images: the images by which the rate reaches 0.")
    if cooldown_from is not None and init_from is not None:
        raise InputError("init-from", "--init-from cannot be combined with --cooldown-from, which brings its weights.")
    training = chosen.training
    rate = learning_rate or training.learning_rate
    muon_rate = training.muon_learning_rate and training.muon_learning_rate * rate / training.learning_rate
    training = replace(
        training,
        batch_size=batch_size or training.batch_size,
        learning_rate=rate,
        muon_learning_rate=muon_rate,
        cooldown_fraction=0.0 if schedule == "constant" else training.cooldown_fraction,
        precision=precision or training.precision,
    )
    chosen = replace(chosen, training=training)
    if noise == "paper":
        chosen = config.paper_literal(chosen, process)
    else:
        chosen = replace(chosen, sde=replace(chosen.sde, kind=process, grey_levels=noise))
    if objective == "mle":
        chosen = config.maximum_likelihood(chosen)

    from ncml.training import tracking
    from ncml.training.distributed import team
    from ncml.training.provenance import command
    from ncml.training.run import fit
    from ncml.training.trainer import Execution

    check_device(device)
    if threads is not None:
        use_threads(threads)
    trackers = [] if tracker is None else [tracking.named(tracker)]
    with team(device) as members, progress_bar() as on_progress:
        fitted = fit(
            chosen,
            data,
            out,
            command=command(sys.argv[1:], [data] if init_from is None else [data, init_from]),
            images=max_images,
            resume=resume,
            cooldown_from=cooldown_from,
            init_from=None if init_from is None else load(init_from, "cpu"),
            team=members,
            execution=Execution(pieces=accumulate, recompute=recompute, compile=compile),
            max_seconds=seconds,
            interval=interval,
            trackers=trackers,
            say=(lambda line: print(line, file=sys.stderr, flush=True)) if members.first else lambda line: None,
            on_progress=on_progress if members.first else ignore_progress,
        )
    if fitted is None:
        return
    if as_json:
        model = {"name": fitted.folder.name, "version": fitted.version}
        found = {"metrics": fitted.metrics, "calibrated": fitted.calibrated}
        print_json({"model": model, "folder": str(fitted.folder)} | found)
    else:
        print(fitted.folder, *(f"{name} {value:g}" for name, value in fitted.metrics.items()), sep="  ")
        print(f"try: ncml score PICTURE --model {fitted.folder}", file=sys.stderr)


def duration(text: str) -> float:
    """Seconds of a time such as 90s, 45m, 12h or 2d."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = float(matched[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[matched[2]] if matched else 0.0
    if not seconds:
        raise InputError("max-time", f"--max-time must be a time such as 90s, 45m, 12h or 2d, not {text!r}.")
    return seconds


def height_and_width(text: str) -> tuple[int, int]:
    """Of a size such as 32 or 48x64."""
    matched = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not matched:
        raise InputError("size", f"--size must be a height and a width such as 32 or 48x64, not {text!r}.")
    return int(matched[1]), int(matched[2] or matched[1])
