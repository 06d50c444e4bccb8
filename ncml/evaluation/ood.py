"""Tables 2 and 4: how well each statistic of a model separates other data from its own.

The statistics are those of `ncml.ood`, computed by `Model.score`; constant and uniform images are generated. Verdicts
use the calibrated threshold, so the share that it flags is measured too, also of in-distribution test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import bootstrap, image_sets, published
from ncml.evaluation.bootstrap import Estimate, Floats
from ncml.evaluation.image_sets import ImageSet
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Figure, Section, Table, make_axes
from ncml.model import Model
from ncml.ood.calibration import Calibration
from ncml.progress import Progress

PAPER_STATISTIC = "ncml_grad"
"""The norm of the gradient of p(x), in logarithms."""

Scores = dict[str, Floats]
"""By statistic, [N] each."""


def score_set(inputs: Inputs, model: Model, calibration: Calibration, images: ImageSet) -> Scores:
    """Compute every statistic of every image of a set."""

    def measure(start: int, stop: int) -> dict[str, NDArray[Any]]:
        scores = model.score(images.pixels_NHWC[start:stop], statistics="all")
        return {name: np.array([score.statistics[name] for score in scores]) for name in scores[0].statistics}

    key = {"model": model.version, "calibration": calibration.version, "data": images.digest}
    return inputs.cache.rows("ood", key, len(images), measure, subject=images.name)


def load_outside_sets(inputs: Inputs, model: Model, inside: ImageSet) -> tuple[list[ImageSet], list[str]]:
    """Load the out-of-distribution sets, and explain each that is unreadable or equal to the in-distribution set."""
    outside: list[ImageSet] = []
    problems: list[str] = []
    for source in dict.fromkeys((*inputs.ood, *image_sets.GENERATED)):
        try:
            images = inputs.images(source, model, "ood")
        except InputError as error:
            problems.append(f"{source} was left out: {error}")
            continue
        if images.digest == inside.digest:
            problems.append(f"{source} was left out: its images are those of the in-distribution set {inside.name}.")
        else:
            outside.append(images)
    return outside, problems


@dataclass(frozen=True)
class Detection:
    """One model's detection of every set."""

    calibration: Calibration
    inside: str
    """Name of the in-distribution set."""
    scores: dict[str, Scores]
    """By set, including the in-distribution one."""
    rates: dict[str, dict[str, dict[str, Estimate]]]
    """By out-of-distribution set, statistic and rate."""

    @property
    def average(self) -> dict[str, float]:
        """AUROC of each statistic, averaged over the out-of-distribution sets."""
        return {
            statistic: float(np.mean([by_statistic[statistic]["auroc"].value for by_statistic in self.rates.values()]))
            for statistic in self.scores[self.inside]
        }

    @property
    def flagged(self) -> dict[str, dict[str, Estimate]]:
        """The share of each set above the calibrated threshold of each statistic."""
        thresholds = self.calibration.thresholds
        return {
            name: {statistic: bootstrap.share(values > thresholds[statistic]) for statistic, values in scores.items()}
            for name, scores in self.scores.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return every rate as rate[set][statistic], with its interval under `intervals`, and the calibration."""

        def nested(read: Callable[[Estimate], Any]) -> dict[str, Any]:
            return {
                rate: {
                    name: {statistic: read(rates[rate]) for statistic, rates in by_statistic.items()}
                    for name, by_statistic in self.rates.items()
                }
                for rate in bootstrap.RATES
            }

        return {
            "statistic": self.calibration.statistic,
            "calibration": self.calibration.version,
            "false_positive_rate": self.calibration.false_positive_rate,
            "n": {name: len(next(iter(scores.values()))) for name, scores in self.scores.items()},
            **nested(lambda rate: rate.value),
            "intervals": nested(lambda rate: [rate.low, rate.high]),
            "average_auroc": self.average,
            "flagged": {
                name: {statistic: share.to_json() for statistic, share in shares.items()}
                for name, shares in self.flagged.items()
            },
        }


def detect(
    inputs: Inputs, model: Model, calibration: Calibration, inside: ImageSet, outside: list[ImageSet]
) -> Detection:
    """Score every set and compare it with the in-distribution one."""
    scores = {images.name: score_set(inputs, model, calibration, images) for images in (inside, *outside)}
    inside_scores, rates = scores[inside.name], {}
    for images in outside:
        inputs.cache.on_progress(Progress("intervals", len(rates), len(outside)))
        rates[images.name] = {
            statistic: bootstrap.estimate_detection(inside_scores[statistic], scores[images.name][statistic])
            for statistic in inside_scores
        }
    return Detection(calibration, inside.name, scores, rates)


def ood(inputs: Inputs) -> Section:
    """Measure detection rates of every statistic on every set, for each calibrated model."""
    detections: dict[str, Detection] = {}
    notes: list[str] = []
    for label, model in inputs.models.items():
        if model.calibration is None:
            notes.append(f"{label} was left out: {model.missing_reason}")
            continue
        inside = inputs.test_images(model, "ood")
        outside, problems = load_outside_sets(inputs, model, inside)
        set_notes = (note for images in outside for note in images.notes)
        notes += [note for note in (*problems, *set_notes) if note not in notes]
        detections[label] = detect(inputs, model, model.calibration, inside, outside)
    if not detections:
        raise InputError(
            "model", " ".join(f"{label}: {model.missing_reason}" for label, model in inputs.models.items())
        )
    text = [
        "AUROC (area under the ROC curve), AUPR (average precision, out-of-distribution being positive) and FPR95 (the "
        "share of in-distribution images that are flagged at the threshold that flags 95% of the others). For every "
        "statistic, higher means more out-of-distribution. Brackets are 95% bootstrap intervals over the images of "
        "both sets, Wilson's for flagged shares and for an AUROC or FPR95 of 0 or 1. An average is over the sets that "
        "have a number in its row, so ours and a published one are over different sets.",
        f"Each set has at most {inputs.limits['ood']:,} images, drawn at random. *constant* is one random colour for "
        "each image, *uniform* independent random values. The other sets can differ from the in-distribution one in "
        "their processing (compression, resizing) as well as in what they show; these figures do not separate the two.",
    ]
    results = {label: detection.to_json() for label, detection in detections.items()}
    return Section(
        kind="ood",
        title="Tables 2 and 4: out-of-distribution detection",
        text=text,
        findings=[
            sentence for label, result in results.items() for sentence in _findings(label, result, inputs.data_name)
        ],
        tables=[_table_2(inputs.data_name, detections), _table_4(detections), _flagged_table(detections)],
        figures=[_figure(label, detection) for label, detection in detections.items()],
        results=results,
        notes=[*inputs.notes, *notes],
    )


def _findings(label: str, result: Mapping[str, Any], data: str) -> list[str]:
    """Compare the paper's statistic with its figure, and report the hardest set of bits/dim and of the default."""
    auroc, default, flagged = result["auroc"], result["statistic"], result["flagged"]
    findings: list[str] = []
    name = max(published.AUROC, key=lambda name: published.AUROC[name]["constant"])
    reported, measured = published.AUROC[name]["constant"], auroc["constant"][PAPER_STATISTIC]
    if published.is_cifar10(data) and result["intervals"]["auroc"]["constant"][PAPER_STATISTIC][1] < reported:
        findings.append(
            f"The AUROC against constant images that the paper reports for {name}, {reported:.2f}, is not reproduced: "
            f"the paper's statistic, {PAPER_STATISTIC}, has {measured:.3f} with the model {label}."
        )
    lowest = min(auroc, key=lambda images: auroc[images]["bpd"])
    if auroc[lowest]["bpd"] < 0.5:
        findings.append(
            f"By bits/dim alone, images of {lowest} seem more typical than those of {data}: the AUROC of the model "
            f"{label} is {auroc[lowest]['bpd']:.3f}."
        )
    hardest = min(auroc, key=lambda images: auroc[images][default])
    findings.append(
        f"The default statistic of the model {label}, {default}, has its smallest AUROC, "
        f"{auroc[hardest][default]:.3f}, against {hardest}, of which it flags "
        f"{bootstrap.format_json(flagged[hardest][default])} at its threshold. Of the test images of {data}, it flags "
        f"{bootstrap.format_json(flagged[data][default])}; at most {result['false_positive_rate']:g} is expected."
    )
    return findings


def _table_2(data: str, detections: dict[str, Detection]) -> Table:
    with_published = published.is_cifar10(data)
    columns = dict.fromkeys(name for detection in detections.values() for name in detection.rates)
    columns = list({"svhn": None, **columns} if with_published else columns)
    rows: list[list[Cell]] = []
    for label, detection in detections.items():
        for statistic, average in detection.average.items():
            values = {name: rates[statistic]["auroc"].value for name, rates in detection.rates.items()}
            rows.append([f"{label}, {statistic}", OURS, *map(values.get, columns), average])
    if with_published:
        for name, aurocs in published.AUROC.items():
            cells = {column: f"{value:.2f}" for column, value in aurocs.items()}
            rows.append([name, PUBLISHED, *map(cells.get, columns), cells["average"]])
    caption = f"Table 2. AUROC of {data} test images against other sets (higher is better)"
    return Table("ood_auroc", caption, ("model, statistic", "source", *columns, "average"), rows)


def _table_4(detections: dict[str, Detection]) -> Table:
    rows = [
        (label, name, statistic, *rates.values())
        for label, detection in detections.items()
        for name, by_statistic in detection.rates.items()
        for statistic, rates in by_statistic.items()
    ]
    header = ("model", "set", "statistic", "AUROC", "AUPR", "FPR95")
    return Table("ood_detection", "Table 4. Detection by set and statistic", header, rows)


def _flagged_table(detections: dict[str, Detection]) -> Table:
    rows = [
        (label, name, detection.calibration.statistic, shares[detection.calibration.statistic], shares["bpd"])
        for label, detection in detections.items()
        for name, shares in detection.flagged.items()
    ]
    header = ("model", "set", "default statistic", "flagged by it", "flagged by bpd")
    caption = "Share flagged at the calibrated threshold; of the in-distribution set that is the false-positive rate"
    return Table("ood_flagged", caption, header, rows)


def _figure(label: str, detection: Detection) -> Figure:
    """Plot the distribution of each set under bits/dim and under the default statistic."""
    plot, axes = make_axes(9, 3.4, 1, 2)
    default = detection.calibration.statistic
    for axis, statistic in zip(axes, ("bpd", default), strict=True):
        values = {name: scores[statistic] for name, scores in detection.scores.items()}
        threshold = detection.calibration.thresholds[statistic]
        if statistic != "bpd" and all((v > 0).all() for v in values.values()):
            values, threshold = {name: np.log10(scores) for name, scores in values.items()}, np.log10(threshold)
            axis.set_xlabel(f"log10 {statistic}")
        else:
            axis.set_xlabel(statistic)
        low, high = np.quantile(np.concatenate(list(values.values())), [0.002, 0.998])
        bins = np.linspace(low, high, 60).tolist()
        for name, scores in values.items():
            style: dict[str, Any] = (
                {"histtype": "step"} if name != detection.inside else {"alpha": 0.4, "color": "black"}
            )
            axis.hist(scores.clip(low, high), bins, density=True, label=name, **style)
        axis.axvline(threshold, color="black", lw=0.8, ls=":")
        axis.set(yticks=[], ylim=(0, 2.5 * np.histogram(values[detection.inside], bins, density=True)[0].max()))
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False)
    caption = (
        f"{label}: distributions of bits/dim and of the default statistic, {default}, with their calibrated thresholds "
        "dotted. The outer bins contain all values beyond them, and peaks above the frame are cut off."
    )
    return Figure(f"ood_{label}", caption, plot)
