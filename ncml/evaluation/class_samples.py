"""Samples of all classes in turn: what two classifiers recognise in them, and how they vary beside real images.

The probe (`ncml.evaluation.probe`) is the one with which `ncml tune` chooses options; nothing is chosen with the
classifier of pixels (`ncml.evaluation.pixel_classifier`). Both are measured on real images, too.

Shapes: N images, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import bootstrap
from ncml.evaluation.bootstrap import Estimate
from ncml.evaluation.image_sets import ImageSet
from ncml.evaluation.inputs import MIN_IMAGES, Inputs, class_labels
from ncml.evaluation.pixel_classifier import PixelClassifier
from ncml.evaluation.probe import Probe
from ncml.evaluation.quality import FeaturedImages, featured_samples, featured_set
from ncml.evaluation.samples import IN_TURN, Arguments, as_trained, default_arguments
from ncml.evaluation.variety import Variety, balanced, class_pairs, relative_variance
from ncml.model import Model
from ncml.ood.columns import noise_levels


@dataclass(frozen=True)
class ClassSamples:
    """What two classifiers recognise in images of all classes in turn, and how the images vary."""

    recognised: Estimate
    """By the probe."""
    recognised_pixels: Estimate
    """By the classifier of pixels, which nothing was chosen with."""
    variety: Variety | None
    """None if there are too few images of each class."""
    by_class: dict[str, dict[str, Estimate]]
    """`recognised`, `recognised_pixels` and `variance` of each class with enough images."""


class ClassMeter:
    """Two classifiers and a set of real images with the same number of each class, for one model.

    Raises `InputError` if no classifier can be trained.
    """

    def __init__(self, inputs: Inputs, model: Model) -> None:
        self.inputs, self.model = inputs, model
        test = inputs.images(inputs.data, model, "probe")
        train = _training_images(inputs, model, test, "probe")
        self.test, self.train = (featured_set(inputs, model, images) for images in (test, train))
        self.probe = Probe.train(self.train.features_NF, self._labels(self.train))
        self.classifier = self._train_classifier(_training_images(inputs, model, test, "classifier"))
        self.n = inputs.limits["fidelity"]
        per_class = max(1, self.n // len(model.classes))
        if per_class < MIN_IMAGES:
            inputs.notes.append(
                f"Variety is not measured on {self.n} images of {len(model.classes)} classes: use --limit fidelity="
                f"{MIN_IMAGES * len(model.classes)} or more."
            )
        self.reference = self.test.take(balanced(self._labels(self.test), per_class))
        self.floor = self.train.take(balanced(self._labels(self.train), per_class))

    def real(self) -> ClassSamples:
        """Measure what is recognised of the test images, and the variety of training images."""
        return self._measure(self.floor, self.test)

    def samples(self, arguments: Arguments) -> ClassSamples:
        """Measure samples of all classes in turn."""
        images = featured_samples(self.inputs, self.model, self.n, arguments | {"classes": IN_TURN})
        return self._measure(images, images)

    def _measure(self, images: FeaturedImages, recognisable: FeaturedImages) -> ClassSamples:
        """Measure the variety of images, and what is recognised of others."""
        reference, recognisable_N = self.reference, self._labels(recognisable)
        pairs = class_pairs(images.features_NF, self._labels(images), reference.features_NF, self._labels(reference))
        by_class: dict[str, dict[str, Estimate]] = {}
        for index, pair in pairs.items():
            recognised, recognised_pixels = self._recognised(recognisable.take(np.flatnonzero(recognisable_N == index)))
            by_class[self.model.classes[index]] = {
                "recognised": recognised,
                "recognised_pixels": recognised_pixels,
                "variance": relative_variance([pair]),
            }
        variety = Variety.compare(images.features_NF, reference.features_NF, list(pairs.values()))
        return ClassSamples(*self._recognised(recognisable), variety, by_class)

    def _recognised(self, images: FeaturedImages) -> tuple[Estimate, Estimate]:
        labels_N = self._labels(images)
        return (
            bootstrap.share(self.probe.recognised(images.features_NF, labels_N)),
            bootstrap.share(self.classifier.recognised(images.pixels_NHWC, labels_N)),
        )

    def _train_classifier(self, train: ImageSet) -> PixelClassifier:
        cache, classes = self.inputs.cache, len(self.model.classes)

        def measure(_start: int, _stop: int) -> dict[str, Any]:
            labels_N = class_labels(self.model, train)
            trained = PixelClassifier.train(train.pixels_NHWC, labels_N, classes, cache.on_progress)
            return {name: value[None] for name, value in trained.weights.items()}

        key = {"data": train.digest, "images": len(train), "classes": self.model.classes}
        weights = cache.rows("classifier", key, 1, measure)  # one row: the network
        return PixelClassifier.from_weights({name: value[0] for name, value in weights.items()}, classes)

    @staticmethod
    def _labels(images: FeaturedImages) -> NDArray[np.intp]:
        assert images.labels_N is not None  # checked by `_training_images`, and samples are of all classes in turn
        return images.labels_N


def _training_images(inputs: Inputs, model: Model, test: ImageSet, kind: str) -> ImageSet:
    """Return the training images; raise `InputError` without several classes, or images that are not `test`."""
    if len(model.classes) < 2:
        raise InputError("model", f"{model.name} has only one class.")
    train = inputs.images(inputs.data, model, kind, split="train")
    if train.digest == test.digest:
        raise InputError("data", f"{inputs.data_name} has no training split.")
    if len(set(class_labels(model, train))) < 2:
        raise InputError("data", f"{inputs.data_name} has training images of one class only.")
    return train


def measure_samples(inputs: Inputs, model: Model) -> dict[str, ClassSamples]:
    """Measure real images, then images generated in each way; empty, with a note, if no classifier can be trained."""
    try:
        meter = ClassMeter(inputs, model)
    except InputError as error:
        inputs.notes.append(f"Fidelity is not measured, because no probe can be trained: {error}")
        return {}
    methods = {method: meter.samples(arguments) for method, arguments in sampling_methods(model).items()}
    return {"real": meter.real()} | methods


def sampling_methods(model: Model) -> dict[str, Arguments]:
    """Return the methods to compare: as trained, directly and from noise, and the defaults, also without guidance."""
    settings = model.sampling_limits.defaults
    levels = noise_levels(model.config, (0.0, 0.25, 1.0))
    methods = {f"noise {noise:g}, as trained": as_trained(noise) for noise in levels}
    for guidance in (1.0, settings.guidance):
        arguments = default_arguments(model) | {"guidance": guidance}
        if arguments not in methods.values():
            name = f"start noise {settings.noise:g}, guidance {guidance:g}, temperature {settings.temperature:g}"
            methods[f"defaults: {name}" if guidance == settings.guidance else name] = arguments
    return methods
