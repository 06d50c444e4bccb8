"""Figures 1 and 5 to 10: samples drawn directly and with refinement, class rows, completions, and a trajectory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml.evaluation.report import Figure, Section, sheet
from ncml.network.sde import process, reaches
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.evaluation.context import Context
    from ncml.model import Model

ACROSS = 10
"""Pictures in a row."""
OF_CLASS = 3
"""Rows of every class."""
COMPLETED = 8
GREY = 128
"""What stands for the unknown half."""

Pixels = NDArray[np.uint8]


def noisy(model: Model) -> bool:
    """Whether the model was trained on noised images, and so can be drawn at t > 0 and refined."""
    return model.config.training.clean_probability < 1


def shares(model: Model, fractions: Iterable[float]) -> list[float]:
    """Fractions of the largest noise that the model knows, in grey levels, as far as its process reaches them."""
    levels = (round(fraction * model.noise, 6) for fraction in fractions)
    return [level for level in levels if reaches(process(model.config.sde), level)]


def direct_and_refined(context: Context, model: Model, label: str) -> Figure:
    """Figures 1 and 5: the same seeds drawn directly, and at T with and without refinement."""
    rows = [("direct, t = 0", model.generate(ACROSS, noise=0.0))]
    if noisy(model):
        at_T: list[Pixels] = []

        def keep(progress: Progress) -> None:
            if progress.stage == "noisy_sampling" and progress.done == progress.total:
                at_T.append(progress.preview())

        refined = model.generate(ACROSS, callback=keep)
        rows += [(f"noisy, {model.noise:g} grey levels", at_T[-1]), ("Tweedie, 1 step", refined)]
        for solver, steps in (("euler-maruyama", 20), ("heun", 10), ("predictor-corrector", 10)):
            context.store.on_progress(Progress(f"samples of {label}", len(rows), 6))
            rows.append((f"{solver}, {steps}", model.generate(ACROSS, solver=solver, steps=steps)))
    caption = (
        f"Figures 1 and 5, {label}: the seeds 0 to {ACROSS - 1}, not chosen, drawn directly from p at t = 0 (strategy "
        "1) and from the largest noise, then refined by the model's own score (strategy 2)."
    )
    return Figure(f"samples_{label}", caption, sheet(rows))


def class_rows(context: Context, model: Model, label: str) -> Figure:
    """Figures 6 to 8: a row for each class."""
    rows: list[tuple[str, Pixels]] = []
    across = ACROSS * OF_CLASS // 2
    for i, name in enumerate(model.classes):
        context.store.on_progress(Progress(f"classes of {label}", i + 1, len(model.classes)))
        way: dict[str, Any] = {} if noisy(model) else {"noise": 0.0}
        rows.append((name, model.generate(across, classes=name, seeds=1000 * i, **way)))
    caption = f"Figures 6 to 8, {label}: consecutive seeds of each class, not chosen, noisy and refined."
    return Figure(f"classes_{label}", caption, sheet(rows))


def completions(context: Context) -> Figure:
    """Figures 9 and 10: test images, what the models are given of them, and what each makes of it, side by side.

    Columns are images; a model has a row for each of its ways to complete them. Models of the first one's size only.
    """
    first = next(iter(context.models.values()))
    pictures = context.test(first, "samples").first(COMPLETED)
    original = pictures.pixels_NHWC
    masked = original.copy()
    masked[:, first.height // 2 :] = GREY
    rows = [("test image", original), ("given", masked)]
    alike = {
        label: model
        for label, model in context.models.items()
        if (model.height, model.width) == (first.height, first.width)
    }
    for label, model in alike.items():
        context.store.on_progress(Progress("completions", len(rows), len(alike) + 2))
        rows.append((f"{label}, direct", model.complete(masked, noise=0.0)))
        if noisy(model):
            rows += [(f"{label}, refined {i}", model.complete(masked, seeds=100 * i)) for i in (1, 2)]
    caption = (
        "Figures 9 and 10: completions of the lower half of test images. A model trained by maximum likelihood has one "
        "row, drawn directly; a noise conditional one also has two rows with noise and refinement, of different seeds."
    )
    return Figure("completions", caption, sheet(rows))


def trajectory(model: Model, label: str) -> Figure:
    """Figure 3: a few samples on their way, rows of noisy sampling first, then steps of the reverse SDE."""
    kept: list[tuple[str, Pixels]] = []
    steps = 20
    wanted = {("noisy_sampling", model.height * k // 4) for k in (1, 2, 3, 4)} | {
        ("refine", step) for step in (5, 10, 15, steps)
    }

    def keep(progress: Progress) -> None:
        if (progress.stage, progress.done) in wanted:
            what = "row" if progress.stage == "noisy_sampling" else "refined, step"
            kept.append((f"{what} {progress.done}", progress.preview()))

    model.generate(ACROSS, solver="euler-maruyama", steps=steps, callback=keep)
    caption = (
        f"Figure 3, {label}: noisy sampling row by row at {model.noise:g} grey levels, then {steps} steps of the "
        "reverse SDE back to t = 0, the last of them Tweedie's."
    )
    return Figure(f"trajectory_{label}", caption, sheet(kept))


def samples(context: Context) -> Section:
    """Every figure of samples."""
    figures: list[Figure] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in context.models.items():
        figures.append(direct_and_refined(context, model, label))
        if model.classes:
            figures.append(class_rows(context, model, label))
        if noisy(model):
            figures.append(trajectory(model, label))
    figures.append(completions(context))
    for label in context.models:
        results[label] = {
            "figures": [f.name for f in figures if f.name.endswith(f"_{label}") or f.name == "completions"]
        }
    text = ["Every picture is the first that its seed gave; none was chosen."]
    return Section(
        kind="samples",
        title="Figures 1, 3 and 5 to 10: samples, completions and the trajectory",
        text=text,
        figures=figures,
        results=results,
        notes=context.notes,
    )
