"""`ncml train`."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ncml import config
from ncml.errors import InputError
from ncml.terminal import JsonOption, check_device, load, print_json, progress_bar, use_threads


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    out: Annotated[Path, arg(metavar="FOLDER")],
    process: Literal["vp", "ve", "sub-vp"] = "vp",
    noise: float | Literal["paper"] = 10.0,
    objective: Literal["ncml", "mle"] = "ncml",
    images: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: the recipe's)")] = None,
    max_minutes: Annotated[float, arg(metavar="MINUTES", help_behavior_hint="(default: no limit)")] = math.inf,
    init_from: Annotated[str | None, arg(metavar="NAME|PATH", help_behavior_hint="(default: random weights)")] = None,
    resume: bool = False,
    threads: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all cores)")] = None,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train a model on your pictures and write its folder, ready to be served.

    Args:
        recipe: smoke, cifar10_tiny, cifar10_small, paper_cifar10, paper_imagenet64 or paper_celeba64.
        data: Folder of pictures (a subfolder for each class, or none), folder of parquet files, or Hub name.
        out: Folder of the model; its name is the model's name.
        process: Noising process.
        noise: Largest noise, in grey levels, or paper: the end time that the paper prints for the process.
        objective: Noise conditional maximum likelihood, or plain maximum likelihood.
        images: Pictures to see in all.
        max_minutes: Stop after this time, save and measure.
        init_from: Model whose weights to begin with.
        resume: Go on with the run that the folder holds.
        threads: Processor cores to use.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    chosen = config.recipe(recipe)
    for name, value in (("noise", noise), ("images", images), ("max-minutes", max_minutes)):
        if isinstance(value, int | float) and not value > 0:  # NaN included
            raise InputError(name, f"--{name} must be more than 0, not {value}.")
    training = replace(chosen.training, images=images or chosen.training.images)
    chosen = replace(chosen, training=training)
    if noise == "paper":
        chosen = config.paper_literal(chosen, process)
    else:
        chosen = replace(chosen, noise=replace(chosen.noise, process=process, grey_levels=noise))
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
            command=described(sys.argv[1:], data, init_from),
            resume=resume,
            init_from=None if init_from is None else load(init_from, device),
            device=device,
            max_seconds=60 * max_minutes,
            bar=bar,
        )
    if as_json:
        model = {"name": fitted.folder.name, "version": fitted.version}
        print_json({"model": model, "folder": str(fitted.folder), "metrics": fitted.metrics})
    else:
        print(fitted.folder, *(f"{name} {value:g}" for name, value in fitted.metrics.items()), sep="  ")


def described(arguments: Sequence[str], data: str, init_from: str | None) -> str:
    """The command as a model card quotes it: whole, but for where on this machine data and models lie."""
    hidden = {path for path in (data, init_from) if path is not None and Path(path).is_dir()}
    quoted = (f"…/{Path(a).name}" if a in hidden else shlex.quote(a) for a in arguments)
    return " ".join(["ncml", *quoted])
