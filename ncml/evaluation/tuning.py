"""The sampling options that a model folder recommends, chosen by measurement.

Options are chosen one after another by the kernel distance (KD) of generated from held-out images in named features;
for a model with classes it is that from images of the same class, averaged over classes, so that images which show
their class but vary less than real ones lose. The start noise and the temperature are those with the smallest KD. The
guidance is that under which a probe recognises most generated images, among those whose KD is not measurably larger
than the smallest. The best of several measurements is partly luck, so the chosen options are measured once more, with
other seeds.

Shapes: N images, F features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.config import DEFAULT_SOLVER
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from ncml.evaluation import bootstrap
from ncml.evaluation.bootstrap import Estimate
from ncml.evaluation.distances import Features, load_extractor, mean_kernel_distance
from ncml.evaluation.probe import Probe
from ncml.evaluation.variety import Pair, class_pairs, precision_recall
from ncml.limits import MIN_TUNING_IMAGES
from ncml.model import Model
from ncml.ood.columns import noise_levels
from ncml.options import SamplingOptions, name_defaults
from ncml.progress import OnProgress, Progress, ignore_progress

IMAGES = 256
"""Images generated with each candidate, by default."""

REFERENCE, PROBE_TRAINING = 1_000, 4_000
"""Held-out images that generated ones are compared with, and training images of the probe, at most."""

GUIDANCES, TEMPERATURES = (2.0, 3.0, 5.0, 8.0), (0.95, 0.9)
"""Candidates in addition to 1."""

BATCH = 64

FIRST_SEED = 1_000_000
"""Far from the seeds of `ncml evaluate`, whose figures are to be independent of the choice."""


@dataclass(frozen=True)
class Candidate:
    """Sampling options, and what was measured of images generated with them."""

    options: SamplingOptions
    distance: Estimate
    """KD from held-out images; within classes, if they have the model's classes."""
    recall: Estimate
    """Share of held-out images that lie among the generated ones (`ncml.evaluation.variety`)."""
    fidelity: Estimate | None
    """Share of images whose class the probe recognises; None without a probe."""

    def to_json(self) -> dict[str, Any]:
        """Return the options and what was measured; fidelity is None without a probe."""
        return {
            "sampling": name_defaults(self.options),
            "kd": self.distance.to_json(),
            "recall": self.recall.to_json(),
            "fidelity": self.fidelity and self.fidelity.to_json(),
        }

    def cells(self) -> list[str]:
        """Return the cells of a table row."""
        values = (f"{self.options.get(name):g}" for name in ("noise", "temperature", "guidance"))
        return [*values, _text(self.distance), _text(self.recall), _text(self.fidelity)]


@dataclass(frozen=True)
class Tuning:
    """Every candidate, in the order of measurement, and the one that was chosen."""

    candidates: Sequence[Candidate]
    best: Candidate
    confirmation: Candidate
    """The options of `best`, measured with other seeds."""
    real: Estimate | None
    """Share of real held-out images whose class the probe recognises."""
    images: int
    """Generated with each candidate."""
    features: str
    """Name of the network whose features are compared."""
    is_within_classes: bool
    """Whether images are compared with those of the same class."""

    @property
    def header(self) -> tuple[str, ...]:
        """Return the header of the table of candidates."""
        return "start noise", "temperature", "guidance", self.distance_name, "recall", "fidelity"

    @property
    def distance_name(self) -> str:
        """What the candidates are chosen by."""
        return "KD within classes" if self.is_within_classes else "KD"

    def summary(self) -> str:
        """Return the chosen options in one line."""
        options = self.best.options
        tilt = f"temperature {options.get('temperature'):g}, guidance {options.get('guidance'):g}"
        return f"start noise {options.get('noise'):g}, {tilt}"

    def metrics(self) -> dict[str, float]:
        """Return the confirmed fidelity of the chosen options, and that of real images; none without a probe."""
        shares = {"class_fidelity": self.confirmation.fidelity, "class_fidelity_real": self.real}
        return {name: round(share.value, 4) for name, share in shares.items() if share is not None}

    def confirmation_text(self) -> str:
        """Return the second measurement of the chosen options in one sentence."""
        measured = self.confirmation
        values = [f"{self.distance_name} {_text(measured.distance)}", f"recall {_text(measured.recall)}"]
        values += [] if measured.fidelity is None else [f"fidelity {_text(measured.fidelity)}"]
        return f"The chosen options, measured again with other seeds: {', '.join(values)}."

    def card_section(self) -> str:
        """Return the measurements in Markdown."""
        text = (
            f"Chosen among these by {self.images} images each, compared with held-out images in features of "
            f"{self.features}. {self.distance_name} is smaller for more similar images"
            f"{', and compares images of the same class' if self.is_within_classes else ''}. Recall is the share of "
            "held-out images that lie among generated ones: larger for more varied images. "
        )
        if self.real is not None:
            text += (
                "Fidelity is the share of images whose class is recognised by a probe, logistic regression on the same "
                f"features; it recognises {_text(self.real)} of real held-out images. "
            )
        text += "Brackets are 95% intervals, bootstrap for KD and otherwise Wilson's; the chosen options are bold."
        rows = [self.header, ["---"] * len(self.header)]
        rows += [[f"**{cell}**" if row is self.best else cell for cell in row.cells()] for row in self.candidates]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{text}\n\n{table}\n\n{self.confirmation_text()}\n"


class Tuner:
    """Measures candidates for one model."""

    def __init__(self, model: Model, data: Dataset, images: int, on_progress: OnProgress) -> None:
        self.model, self.images, self.on_progress = model, images, on_progress
        self.extractor = load_extractor()
        held_out = data.part("calibration-rank", model.config.training.split).spread(REFERENCE)
        if len(held_out) < MIN_TUNING_IMAGES:
            raise InputError(
                "data",
                f"{len(held_out)} images are held out; tuning compares with at least {MIN_TUNING_IMAGES}: add images.",
            )
        self.reference_NF = self._features(held_out.images_NHWC.numpy(), "held-out images")
        self.probe, self.real = self._train_probe(data, held_out)
        self.reference_N = held_out.labels_N.numpy()
        self.labels_N = np.arange(images) % max(1, len(model.classes))
        shares_classes = model.classes and data.classes == model.classes
        self.is_within_classes = bool(shares_classes) and bool(self._pairs(np.empty((images, 0), np.float32)))
        self.candidates: list[Candidate] = []

    def measure_candidate(self, options: SamplingOptions) -> Candidate:
        """Measure options with the seeds that all candidates share, and add them to the candidates."""
        self.candidates.append(self.measure(options, FIRST_SEED, f"candidate {len(self.candidates) + 1}"))
        return self.candidates[-1]

    def measure(self, options: SamplingOptions, first_seed: int, stage: str) -> Candidate:
        """Generate images of all classes in turn, and of none for a model without classes, and measure them."""
        has_classes = bool(self.model.classes)
        batches: list[NDArray[np.uint8]] = []
        for start in range(0, self.images, BATCH):
            self.on_progress(Progress(stage, start, self.images))
            stop = min(start + BATCH, self.images)
            batches.append(
                self.model.generate(
                    stop - start,
                    classes=self.labels_N[start:stop].tolist() if has_classes else None,
                    seeds=first_seed + start,
                    **options,
                )
            )
        features_NF = self._features(np.concatenate(batches), "generated images")
        pairs = self._pairs(features_NF) if self.is_within_classes else [(features_NF, self.reference_NF)]
        _, recall = precision_recall(features_NF, self.reference_NF)
        fidelity = None if self.probe is None else bootstrap.share(self.probe.recognised(features_NF, self.labels_N))
        return Candidate(options, mean_kernel_distance(pairs), recall, fidelity)

    def _pairs(self, features_NF: Features) -> list[Pair]:
        """Return the features of generated and of held-out images of each class that has enough of both."""
        return list(class_pairs(features_NF, self.labels_N, self.reference_NF, self.reference_N).values())

    def _train_probe(self, data: Dataset, held_out: Dataset) -> tuple[Probe | None, Estimate | None]:
        """Train a probe, and measure it on real images; none without images of two classes of the model."""
        if len(self.model.classes) < 2 or data.classes != self.model.classes:
            return None, None
        training = data.part("fit", self.model.config.training.split).spread(PROBE_TRAINING)
        if len(training.labels_N.unique()) < 2:
            return None, None
        features_NF = self._features(training.images_NHWC.numpy(), "training images")
        probe = Probe.train(features_NF, training.labels_N.numpy())
        return probe, bootstrap.share(probe.recognised(self.reference_NF, held_out.labels_N.numpy()))

    def _features(self, pixels_NHWC: NDArray[np.uint8], stage: str) -> Features:
        parts: list[Features] = []
        for start in range(0, len(pixels_NHWC), BATCH):
            self.on_progress(Progress(f"features of {stage}", start, len(pixels_NHWC)))
            parts.append(self.extractor.extract(pixels_NHWC[start : start + BATCH]))
        return np.concatenate(parts)


def tune(
    model: Model,
    data: Dataset,
    *,
    images: int = IMAGES,
    max_seconds: float = math.inf,
    on_progress: OnProgress = ignore_progress,
) -> Tuning:
    """Measure candidates and choose the sampling options of a model.

    data: its training data; the parts that training held out are compared with, the rest trains the probe.
    images: generated with each candidate. max_seconds: no candidate is started after this time, except the first; the
    chosen options are measured again in any case.
    """
    start = time.monotonic()
    tuner = Tuner(model, data, images, on_progress)

    def measure_best(candidates: Sequence[SamplingOptions], best: Candidate | None = None) -> Candidate:
        """Measure candidates and return the one with the smallest distance, `best` included."""
        for options in candidates:
            if best is None or time.monotonic() - start < max_seconds:
                candidate = tuner.measure_candidate(options)
                best = candidate if best is None or candidate.distance.value < best.distance.value else best
        assert best is not None
        return best

    as_trained = SamplingOptions(noise=0.0, solver=DEFAULT_SOLVER, guidance=1.0, temperature=1.0)
    noises = noise_levels(model.config, (0.25, 0.0, 0.5, 1.0))
    best = measure_best([{**as_trained, "noise": noise} for noise in noises])
    if best.fidelity is not None:
        guided = [best]
        for guidance in GUIDANCES:
            if time.monotonic() - start < max_seconds:
                guided.append(tuner.measure_candidate({**best.options, "guidance": guidance}))
        best = choose_guidance(guided)
    best = measure_best([{**best.options, "temperature": value} for value in TEMPERATURES], best)
    confirmation = tuner.measure(best.options, FIRST_SEED + images, "chosen options")
    return Tuning(
        tuner.candidates, best, confirmation, tuner.real, images, tuner.extractor.network, tuner.is_within_classes
    )


def choose_guidance(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate whose classes are recognised most, among those not measurably farther than the nearest."""
    nearest = min(candidates, key=lambda c: c.distance.value)
    near = [c for c in candidates if c.distance.value <= nearest.distance.high and c.fidelity is not None]
    return max(near, key=lambda c: (c.fidelity.value if c.fidelity else 0.0, -c.distance.value))


def _text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
