"""`ncml train`."""

import math
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ncml import runtime
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    check_device,
    check_threads,
    describe,
    load,
    parse_duration,
    print_json,
    print_status,
    progress_bar,
    use_threads,
)
from ncml.config import Config
from ncml.data.sources import check_source
from ncml.errors import InputError
from ncml.paths import BUNDLED_MODEL
from ncml.progress import ignore_progress
from ncml.training.assembly import DETECTOR, Changes, assemble, continue_from
from ncml.training.folder import STATE, check_folder
from ncml.training.tracking import tracker_factory

MAX_COUNT = 10**15
"""The largest count that `ncml.config` accepts."""


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
        int | None, arg(metavar="COUNT", help_behavior_hint="(default: what fits the time, or the recipe's)")
    ] = None,
    max_time: Annotated[str | None, arg(metavar="TIME", help_behavior_hint="(default: no limit)")] = None,
    batch_size: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: the recipe's)")] = None,
    learning_rate: Annotated[
        float | None, arg(metavar="RATE", help_behavior_hint="(default: the run's or the recipe's)")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        arg(metavar="fp32|bf16", help_behavior_hint="(default: the run's, or the recipe's if the hardware has bf16)"),
    ] = None,
    schedule: Annotated[
        Literal["cooldown", "constant"] | None,
        arg(metavar="cooldown|constant", help_behavior_hint="(default: cooldown)"),
    ] = None,
    cooldown_from: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    init_from: Annotated[
        str | None,
        arg(metavar="NAME|PATH", help_behavior_hint="(default: random weights; of detector: the bundled model's)"),
    ] = None,
    crop: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the recipe's)")] = None,
    resume: bool = False,
    interval: Annotated[int, arg(metavar="COUNT")] = 20_000,
    tracker: Annotated[str | None, arg(metavar="MODULE:FUNCTION", help_behavior_hint="(default: none)")] = None,
    threads: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all cores)")] = None,
    device: DeviceOption = "cpu",
    grad_accum_steps: Annotated[int, arg(metavar="COUNT")] = 1,
    activation_checkpointing: bool = False,
    compile: bool = False,
    as_json: JsonOption = False,
) -> None:
    """Train, measure and calibrate a model on your images, and write a model folder that is ready to serve.

    After runs of ten minutes or more, the default sampling options are tuned, too (see ncml tune).

    Under torchrun, the processes share the work; the result equals that of one process.

    Args:
        recipe: smoke, cifar10_tiny, cifar10_small, cifar10_base, detector, detector_base, paper_cifar10,
            paper_imagenet64 or paper_celeba64.
        data: Folder of images (with a subfolder for each class, or without; here or at s3://, gs://, hf:// or https://),
            folder of parquet files, or Hub name.
        out: Model folder to write; its name becomes the model's name.
        size: Height and width that images are resized to.
        process: SDE that adds the noise.
        noise: Largest noise in grey levels; paper: the end time that the paper states for the SDE.
        objective: Noise conditional maximum likelihood, or plain maximum likelihood.
        max_images: Length of the run in images; the learning rate reaches 0 at its end.
        max_time: Time after which the run stops, is saved and measured, such as 90s, 45m or 12h.
        batch_size: Images per step, over all processes.
        learning_rate: Learning rate of Adam. In recipes that use Muon, its rate changes in proportion.
        precision: Arithmetic of convolutions, attention and matrix products.
        schedule: Learning rate after the warm-up: cooldown falls to 0 at the end, constant does not change.
        cooldown_from: Folder of a run to branch from. The learning rate of the branch falls to 0 by --max-images; the
            original run does not change.
        init_from: Model whose weights a new run starts with, not a resumed one; in the recipe detector, it also
            determines the network.
        crop: Train on random squares of this side, cut from large images and resized to the model's size, and calibrate
            tiles of that side on whole images; choose it so that a defect has several pixels at the model's size.
        resume: Continue the run in the folder.
        interval: Images between measurements, each with a sample grid and a saved state.
        tracker: Tracker in addition to TensorBoard: a function of (folder, config), see ncml.training.tracking.
        threads: CPU threads of each process.
        device: Device to compute on: cpu, cuda or cuda:N.
        grad_accum_steps: Number of parts in which each batch is computed, one after the other, to save memory.
        activation_checkpointing: Recompute activations instead of storing them, to save more memory.
        compile: Compile the network with torch.compile before training.
        as_json: Print JSON.
    """
    counts = {"noise": noise, "max-images": max_images, "batch-size": batch_size, "learning-rate": learning_rate}
    counts |= {"interval": interval, "grad-accum-steps": grad_accum_steps, "crop": crop}
    for name, value in counts.items():
        if isinstance(value, int | float) and not value > 0:  # NaN included
            raise InputError(name, f"--{name} must be more than 0, not {value}.")
        if isinstance(value, int) and value > MAX_COUNT:
            raise InputError(name, f"--{name} must be at most {MAX_COUNT}.")
    max_seconds = math.inf if max_time is None else parse_duration(max_time)
    if schedule is not None and cooldown_from is not None:
        raise InputError("schedule", "--schedule cannot be combined with --cooldown-from: omit one of the two.")
    changes = Changes(
        size=None if size is None else parse_size(size),
        process=process,
        noise=noise,
        objective=objective,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        constant_rate=schedule == "constant",
        crop=crop,
    )
    config = assemble(recipe, changes)
    if resume:
        init_from = None  # the same command resumes a run, which has its own weights
    elif recipe == DETECTOR and init_from is None and cooldown_from is None:
        init_from = BUNDLED_MODEL
    if threads is not None:
        check_threads(threads)
    runtime.check_device_name(device)
    starting_model = None if init_from is None else describe(init_from)
    trackers = [] if tracker is None else [tracker_factory(tracker)]
    check_folder(
        out,
        data,
        resume=resume,
        cooldown_from=cooldown_from,
        total_images=max_images,
        has_initial_model=init_from is not None,
    )
    check_source(data, is_training=not resume)
    from ncml.evaluation.recommendation import recommend_after
    from ncml.training import run
    from ncml.training.distributed import local_device, process_group
    from ncml.training.precision import without_emulation
    from ncml.training.provenance import command
    from ncml.training.state import read_config
    from ncml.training.trainer import Execution

    check_device(local_device(device))
    if threads is not None:
        use_threads(threads)
    initial = None if starting_model is None else load(starting_model, "cpu")
    earlier_run = out if resume else cooldown_from
    saved = None if earlier_run is None else read_config(earlier_run / STATE)
    if saved is not None and schedule is not None and schedule != (kept := _schedule_of(saved)):
        raise InputError("schedule", f"--schedule is {schedule}, but that of the run is {kept}: omit --schedule.")
    config = continue_from(config, changes, saved, None if initial is None else initial.config)
    with process_group(device) as group, progress_bar() as on_progress:
        if precision is None and saved is None:
            config = without_emulation(config, group)
        trained = run.train(
            config,
            data,
            out,
            command=command(sys.argv[1:]),
            total_images=max_images,
            resume=resume,
            cooldown_from=cooldown_from,
            init_from=initial,
            group=group,
            execution=Execution(
                grad_accum_steps=grad_accum_steps, activation_checkpointing=activation_checkpointing, compile=compile
            ),
            max_seconds=max_seconds,
            interval=interval,
            trackers=trackers,
            on_message=print_status if group.is_main else lambda line: None,
            on_progress=on_progress if group.is_main else ignore_progress,
        )
    if trained is None:
        return
    with progress_bar() as on_progress:
        line = recommend_after(trained, device=device, on_progress=on_progress)
    if line:
        print_status(line)
    if as_json:
        model = {"name": trained.folder.name, "version": trained.version}
        result = {"metrics": trained.metrics, "calibrated": trained.calibrated}
        print_json({"model": model, "folder": str(trained.folder)} | result)
    else:
        print(trained.folder, *(f"{name} {value:g}" for name, value in trained.metrics.items()), sep="  ")
        tile = " --tile" if config.training.crop else ""
        print_status(f"try: ncml score IMAGE --model {shlex.quote(str(trained.folder.resolve()))}{tile}")


def _schedule_of(config: Config) -> str:
    """Return the value of --schedule that gives a run's schedule."""
    return "cooldown" if config.training.cooldown_fraction else "constant"


def parse_size(text: str) -> tuple[int, int]:
    """Return the height and width of a size such as 32 or 48x64."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise InputError("size", f"--size must be a height and a width such as 32 or 48x64, not {text!r}.")
    return int(match[1]), int(match[2] or match[1])
