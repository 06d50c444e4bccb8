"""Figures 1 and 5 to 10: direct and refined samples, class rows, completions, and Figure 3, a trajectory."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.config import DEFAULT_SOLVER, SOLVERS, STEPPED_SOLVER
from ncml.evaluation.image_sets import SEED
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.report import Figure, Section, draw_sheet
from ncml.model import Model
from ncml.options import OPTIONS
from ncml.progress import Progress
from ncml.sampling.batching import FIXED_SIZE

COLUMNS = 10
"""Images in a row."""
CLASS_COLUMNS = 15
"""Images of each class."""
SHEET_IMAGES, SHEET_SEED = 100, 50_000
"""Images of the shuffled sheet, and the seed of the first."""
COMPLETION_COUNT = 8
GREY = 128
"""Value of the unknown half."""

Pixels = NDArray[np.uint8]

Arguments = dict[str, Any]
"""Arguments of `Model.generate`; `classes` can be `IN_TURN`."""

IN_TURN = "in turn"
"""Image i is of class i modulo the number of classes."""


def as_trained(noise: float) -> Arguments:
    """Return the arguments for the model's own distribution from a start noise, with one step of refinement."""
    return {"noise": noise, "solver": DEFAULT_SOLVER, "steps": 1, "guidance": 1.0, "temperature": 1.0}


def default_arguments(model: Model) -> Arguments:
    """Return the arguments that the model's defaults stand for, for images of a class."""
    defaults = asdict(model.sampling_limits.defaults)
    return {name: defaults[name] for name in OPTIONS}


def direct_and_refined(inputs: Inputs, model: Model, label: str) -> Figure:
    """Draw Figures 1 and 5: the same seeds sampled directly, and at T with and without refinement."""
    rows = [("direct, t = 0", model.generate(COLUMNS, **as_trained(0.0)))]
    if model.config.is_noise_conditional:
        noisy: list[Pixels] = []

        def keep_noisy(progress: Progress) -> None:
            if progress.stage == "noisy_sampling" and progress.done == progress.total:
                noisy.append(progress.preview())

        refined = model.generate(COLUMNS, **as_trained(model.noise), callback=keep_noisy)
        rows += [(f"noisy, {model.noise:g} grey levels", noisy[-1]), ("Tweedie, 1 step", refined)]
        for solver, steps in SOLVERS.items():
            if steps == 1:
                continue
            inputs.cache.on_progress(Progress(f"samples of {label}", len(rows), 6))
            arguments = as_trained(model.noise) | {"solver": solver, "steps": steps}
            rows.append((f"{solver}, {steps}", model.generate(COLUMNS, **arguments)))
    caption = (
        f"Figures 1 and 5, {label}: the seeds 0 to {COLUMNS - 1}, not selected, sampled directly from p at t = 0 "
        "(strategy 1) and from the largest noise, then refined by the model's own score function (strategy 2)."
    )
    return Figure(f"samples_{label}", caption, draw_sheet(rows))


def class_rows(inputs: Inputs, model: Model, label: str) -> Figure:
    """Draw Figures 6 to 8: a row for each class."""
    rows: list[tuple[str, Pixels]] = []
    for i, name in enumerate(model.classes):
        inputs.cache.on_progress(Progress(f"classes of {label}", i + 1, len(model.classes)))
        rows.append((name, model.generate(CLASS_COLUMNS, classes=name, seeds=1000 * i)))
    caption = f"Figures 6 to 8, {label}: consecutive seeds of each class, not selected, at the default options."
    return Figure(f"classes_{label}", caption, draw_sheet(rows))


def blind_sheet(inputs: Inputs, model: Model, label: str) -> tuple[Figure, list[str]]:
    """Draw images of all classes in a shuffled order, and return the classes in the order of reading.

    A reader who names the classes without this key shows how many are recognisable, which a classifier does not.
    """
    count = len(model.classes)
    class_N = np.random.default_rng(SEED).permutation(np.arange(SHEET_IMAGES) % count).tolist()
    rows: list[tuple[str, Pixels]] = []
    for start in range(0, SHEET_IMAGES, COLUMNS):
        inputs.cache.on_progress(Progress(f"sheet of {label}", start, SHEET_IMAGES))
        classes = class_N[start : start + COLUMNS]
        images = model.generate(len(classes), classes=classes, seeds=SHEET_SEED + start)
        rows.append((f"{start + 1} to {start + len(classes)}", images))
    caption = (
        f"{label}: {SHEET_IMAGES} images at the default options, as many of each class as of any other, shuffled. "
        "Their classes are in samples.json (`sheet`)."
    )
    return Figure(f"sheet_{label}", caption, draw_sheet(rows)), [model.classes[index] for index in class_N]


def completions(inputs: Inputs) -> Figure:
    """Draw Figures 9 and 10: test images, their known halves, and each model's completions, side by side.

    Columns are images; a model has a row for each of its ways to complete them. Models of the first one's size only.
    """
    first = next(iter(inputs.models.values()))
    original = inputs.test_images(first, "samples").first(COMPLETION_COUNT).pixels_NHWC
    masked = original.copy()
    masked[:, first.height // 2 :] = GREY
    rows = [("test image", original), ("known half", masked)]
    size = first.height, first.width
    models = {label: model for label, model in inputs.models.items() if (model.height, model.width) == size}
    for done, (label, model) in enumerate(models.items()):
        inputs.cache.on_progress(Progress("completions", done, len(models)))
        rows.append((f"{label}, direct", model.complete(masked, **as_trained(0.0))))
        if model.config.is_noise_conditional:
            rows += [(f"{label}, defaults {i}", model.complete(masked, seeds=100 * i)) for i in (1, 2)]
    caption = (
        "Figures 9 and 10: completions of the lower half of test images. A model trained by maximum likelihood has one "
        "row, sampled directly; a noise conditional one also has two rows with the model's default options and "
        "different seeds."
    )
    return Figure("completions", caption, draw_sheet(rows))


def trajectory(model: Model, label: str) -> Figure:
    """Draw Figure 3: samples in progress, rows of noisy sampling first, then steps of the reverse SDE."""
    rows: list[tuple[str, Pixels]] = []
    steps = SOLVERS[STEPPED_SOLVER]
    shown = {("noisy_sampling", model.height * k // 4) for k in (1, 2, 3, 4)} | {
        ("refine", steps * k // 4) for k in (1, 2, 3, 4)
    }

    def keep_shown(progress: Progress) -> None:
        if (progress.stage, progress.done) in shown:
            stage = "row" if progress.stage == "noisy_sampling" else "refined, step"
            rows.append((f"{stage} {progress.done}", progress.preview()))

    arguments = as_trained(model.noise) | {"solver": STEPPED_SOLVER, "steps": steps}
    model.generate(FIXED_SIZE, **arguments, callback=keep_shown)  # more could be in progress at different rows
    caption = (
        f"Figure 3, {label}: noisy sampling row by row at {model.noise:g} grey levels, then {steps} steps of the "
        "reverse SDE back to t = 0, the last of them Tweedie's."
    )
    return Figure(f"trajectory_{label}", caption, draw_sheet(rows))


def samples(inputs: Inputs) -> Section:
    """Draw every figure of samples."""
    by_label: dict[str, list[Figure]] = {}
    keys: dict[str, list[str]] = {}
    for label, model in inputs.models.items():
        by_label[label] = [direct_and_refined(inputs, model, label)]
        if model.classes:
            sheet, keys[label] = blind_sheet(inputs, model, label)
            by_label[label] += [class_rows(inputs, model, label), sheet]
        if model.config.is_noise_conditional:
            by_label[label].append(trajectory(model, label))
    shared = completions(inputs)
    results: dict[str, dict[str, Any]] = {
        label: {"figures": [figure.name for figure in [*own, shared]], "sheet": keys.get(label)}
        for label, own in by_label.items()
    }
    return Section(
        kind="samples",
        title="Figures 1, 3 and 5 to 10: samples, completions and the trajectory",
        text=[
            "Every image is the first result of its seed; none was selected. `ncml evaluate fid` and `classes` measure "
            "how near samples are to real images, and how many show their class."
        ],
        figures=[*itertools.chain(*by_label.values()), shared],
        results=results,
        notes=inputs.notes,
    )
