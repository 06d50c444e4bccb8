"""Tables 2 and 4: how well each statistic of a model tells other data from its own.

The statistics are those of `ncml.ood`, by `Model.score`; constant and uniform images are generated. A user's decision
is the calibrated threshold, so the share that it flags is measured too, of in-distribution test images first of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import numbers, pictures, published
from ncml.evaluation.numbers import Floats, Measured
from ncml.evaluation.pictures import Pictures
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Figure, Section, Table, plots
from ncml.ood.calibration import Calibration
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.evaluation.context import Context
    from ncml.model import Model

Scores = dict[str, Floats]
"""By statistic, [N] each."""


def statistics(context: Context, model: Model, calibration: Calibration, found: Pictures) -> Scores:
    """Every statistic of every image of a set."""

    def measure(start: int, stop: int) -> dict[str, NDArray[Any]]:
        scores = model.score(found.pixels_NHWC[start:stop], statistics="all")
        return {name: np.array([score.statistics[name] for score in scores]) for name in scores[0].statistics}

    what = {"model": model.version, "calibration": calibration.version, "data": found.digest}
    return context.store.rows("ood", what, len(found), measure, of=found.name)


def sets(context: Context, model: Model, inside: Pictures) -> tuple[list[Pictures], list[str]]:
    """The out-of-distribution sets at a model's size, and a sentence for each that cannot be read or is no other."""
    found: list[Pictures] = []
    problems: list[str] = []
    for source in dict.fromkeys((*context.ood, *pictures.GENERATED)):
        try:
            other = context.pictures(source, model, "ood")
        except InputError as error:
            problems.append(f"{source} was left out: {error}")
            continue
        if other.digest == inside.digest:
            problems.append(
                f"{source} was left out: its pictures are those of {inside.name}, from which others are told."
            )
        else:
            found.append(other)
    return found, problems


@dataclass(frozen=True)
class Detection:
    """What one model makes of every set."""

    calibration: Calibration
    inside: str
    """Name of the in-distribution set."""
    scores: dict[str, Scores]
    """By set, the in-distribution one among them."""
    rates: dict[str, dict[str, dict[str, Measured]]]
    """By other set, statistic and rate."""

    @property
    def average(self) -> dict[str, float]:
        """AUROC of each statistic, averaged over the other sets."""
        statistics = self.scores[self.inside]
        return {s: float(np.mean([by[s]["auroc"].value for by in self.rates.values()])) for s in statistics}

    @property
    def flagged(self) -> dict[str, dict[str, Measured]]:
        """The share of each set above the calibrated threshold of each statistic."""
        threshold = self.calibration.thresholds
        return {
            name: {s: numbers.mean((values > threshold[s]).astype(float)) for s, values in scores.items()}
            for name, scores in self.scores.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Every rate as rate[set][statistic], with its interval under `intervals`, and how all was calibrated."""

        def every(read: Callable[[Measured], Any]) -> dict[str, Any]:
            return {
                rate: {name: {s: read(r[rate]) for s, r in by.items()} for name, by in self.rates.items()}
                for rate in numbers.RATES
            }

        return {
            "statistic": self.calibration.statistic,
            "calibration": self.calibration.version,
            "false_positive_rate": self.calibration.false_positive_rate,
            "n": {name: len(next(iter(scores.values()))) for name, scores in self.scores.items()},
            **every(lambda rate: rate.value),
            "intervals": every(lambda rate: [rate.low, rate.high]),
            "average_auroc": self.average,
            "flagged": {name: {s: share.to_json() for s, share in by.items()} for name, by in self.flagged.items()},
        }


def detection(
    context: Context, model: Model, calibration: Calibration, inside: Pictures, outside: list[Pictures]
) -> Detection:
    """Score every set and compare it with the in-distribution one."""
    scores = {found.name: statistics(context, model, calibration, found) for found in (inside, *outside)}
    own, rates = scores[inside.name], {}
    for found in outside:
        context.store.on_progress(Progress("intervals", len(rates), len(outside)))
        rates[found.name] = {s: numbers.detection(own[s], scores[found.name][s]) for s in own}
    return Detection(calibration, inside.name, scores, rates)


def ood(context: Context) -> Section:
    """Detection rates of every statistic on every set, for each model that is calibrated."""
    found: dict[str, Detection] = {}
    notes: list[str] = []
    for label, model in context.models.items():
        if model.calibration is None:
            notes.append(f"{label} was left out: {model.uncalibrated}")
            continue
        inside = context.test(model, "ood")
        outside, problems = sets(context, model, inside)
        notes += [note for note in (*problems, *(note for each in outside for note in each.notes)) if note not in notes]
        found[label] = detection(context, model, model.calibration, inside, outside)
    if not found:
        raise InputError("model", " ".join(f"{label}: {model.uncalibrated}" for label, model in context.models.items()))
    text = [
        "AUROC (area under the ROC curve), AUPR (average precision, out-of-distribution being positive) and FPR95 (the "
        "share of in-distribution images that are flagged where 95 % of the others are). Every statistic is higher for "
        "what is more out-of-distribution. Brackets are 95 % bootstrap intervals over the images of both sets. "
        "*constant* is one random colour for each image, *uniform* independent random values. An average is over the "
        "sets that have a number in its row, so ours and a published one are over different sets.",
    ]
    return Section(
        kind="ood",
        title="Tables 2 and 4: out-of-distribution detection",
        text=text,
        tables=[_table_2(context.data_name, found), _table_4(found), _decisions(found)],
        figures=[_figure(label, each) for label, each in found.items()],
        results={label: each.to_json() for label, each in found.items()},
        notes=[*context.notes, *notes],
    )


def _table_2(data: str, found: dict[str, Detection]) -> Table:
    with_published = published.is_cifar10(data)
    columns = dict.fromkeys(name for each in found.values() for name in each.rates)
    columns = list({"svhn": None, **columns} if with_published else columns)
    rows: list[list[Cell]] = []
    for label, each in found.items():
        for statistic, average in each.average.items():
            values = {name: by[statistic]["auroc"].value for name, by in each.rates.items()}
            rows.append([f"{label}, {statistic}", OURS, *map(values.get, columns), average])
    if with_published:
        for name, values in published.AUROC.items():
            shown = {column: f"{value:.2f}" for column, value in values.items()}
            rows.append([name, PUBLISHED, *map(shown.get, columns), shown["average"]])
    caption = f"Table 2. AUROC of {data} test images against other sets (higher is better)"
    return Table("ood_auroc", caption, ("model, statistic", "source", *columns, "average"), rows)


def _table_4(found: dict[str, Detection]) -> Table:
    rows = [
        (label, name, statistic, *rates.values())
        for label, each in found.items()
        for name, by in each.rates.items()
        for statistic, rates in by.items()
    ]
    header = ("model", "set", "statistic", "AUROC", "AUPR", "FPR95")
    return Table("ood_detection", "Table 4. Detection by set and statistic", header, rows)


def _decisions(found: dict[str, Detection]) -> Table:
    rows = [
        (label, name, each.calibration.statistic, shares[each.calibration.statistic], shares["bpd"])
        for label, each in found.items()
        for name, shares in each.flagged.items()
    ]
    header = ("model", "set", "default statistic", "flagged by it", "flagged by bpd")
    caption = "Share flagged at the calibrated threshold; of the in-distribution set that is the false-positive rate"
    return Table("ood_flagged", caption, header, rows)


def _figure(label: str, found: Detection) -> Figure:
    """Where the images of each set lie under bits/dim and under the default statistic."""
    plot, axes = plots(9, 3.4, 1, 2)
    default = found.calibration.statistic
    for axis, statistic in zip(axes, ("bpd", default), strict=True):
        values = {name: scores[statistic] for name, scores in found.scores.items()}
        limit, logged = found.calibration.thresholds[statistic], all((v > 0).all() for v in values.values())
        if logged and statistic != "bpd":
            values, limit = {name: np.log10(scores) for name, scores in values.items()}, np.log10(limit)
            axis.set_xlabel(f"log10 {statistic}")
        else:
            axis.set_xlabel(statistic)
        low, high = np.quantile(np.concatenate(list(values.values())), [0.002, 0.998])
        bins = np.linspace(low, high, 60).tolist()
        for name, scores in values.items():
            style: dict[str, Any] = {"histtype": "step"} if name != found.inside else {"alpha": 0.4, "color": "black"}
            axis.hist(scores.clip(low, high), bins, density=True, label=name, **style)
        axis.axvline(limit, color="black", lw=0.8, ls=":")
        axis.set(yticks=[], ylim=(0, 2.5 * np.histogram(values[found.inside], bins, density=True)[0].max()))
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False)
    caption = (
        f"{label}: distributions of bits/dim and of the default statistic, {default}, with their calibrated thresholds "
        "dotted. Peaks higher than the frame are cut."
    )
    return Figure(f"ood_{label}", caption, plot)
