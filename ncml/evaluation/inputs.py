"""The inputs of an evaluation: the models, the sets of images, and the number of images taken of each.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import image_sets
from ncml.evaluation.cache import MeasurementCache
from ncml.evaluation.image_sets import ImageSet

if TYPE_CHECKING:
    from ncml.model import Model

LIMITS = {
    "likelihood": 10_000,
    "sanity": 1_000,
    "robustness": 500,
    "ood": 1_000,
    "samples": 10_000,
    "fid": 10_000,
    "sweep": 256,
    "solvers": 256,
    "classes": 300,
    "fidelity": 500,
    "probe": 4_000,
    "classifier": 50_000,
}
"""Maximum number of images of a set for each kind, unless `--limit` changes it.

For fid it is also the number of samples. sweep: samples for each point of quality against steps and start noise.
solvers: samples of each solver. fidelity: samples of each method. probe: images on which the probe is trained, and
images on which both classifiers are measured. classifier: images on which the classifier of pixels is trained.
"""

MIN_IMAGES = 8
"""Minimum number of images in a set: bootstrap samples of fewer are too often identical."""


@dataclass
class Inputs:
    """Models and image sets; each set is read once."""

    models: dict[str, Model]
    """By label: the name, with the version if two have the same."""
    data: str
    ood: Sequence[str]
    cache: MeasurementCache
    limits: dict[str, int] = field(default_factory=lambda: dict(LIMITS))
    notes: list[str] = field(default_factory=list)
    """Remarks on the in-distribution set for the reader of the report."""
    loaded: dict[tuple[str, int, int, str], ImageSet] = field(default_factory=dict)
    """By source, height, width and split."""
    splits: dict[str, bool] = field(default_factory=dict[str, bool])
    """Whether each source has a test split."""

    @cached_property
    def names(self) -> dict[str, str]:
        """The name of each set by its source."""
        return image_sets.name_sources((self.data, *self.ood, *image_sets.GENERATED))

    @property
    def data_name(self) -> str:
        """The name of the in-distribution set."""
        return self.names[self.data]

    @property
    def _split_notes(self) -> tuple[str, ...]:
        """A remark if the in-distribution set has no test split."""
        if self._has_test_split(self.data):
            return ()
        return (
            f"{self.data_name} has no test split: it may include images that a model was trained or calibrated on.",
        )

    def _has_test_split(self, source: str) -> bool:
        """Return whether a source has a test split; remembered, because a folder is listed to find out."""
        if source not in self.splits:
            self.splits[source] = image_sets.has_test_split(source)
        return self.splits[source]

    def test_images(self, model: Model, kind: str) -> ImageSet:
        """Return the in-distribution test images for a kind of evaluation, at the model's size."""
        images = self.images(self.data, model, kind)
        self.notes += [note for note in (*images.notes, *self._split_notes) if note not in self.notes]
        return images

    def images(self, source: str, model: Model, kind: str, *, split: str = "") -> ImageSet:
        """Return a set at the model's size, as many images as the kind's limit.

        split: overrides the split of the source, or test; a source without splits is the same set in each.
        """
        if not self._has_test_split(source):
            split = ""
        key = (source, model.height, model.width, split)
        if key not in self.loaded:
            name = self.names[source]
            self.loaded[key] = image_sets.load(
                source, model.height, model.width, split=split, name=name, on_progress=self.cache.on_progress
            )
        images = self.loaded[key]
        if len(images) < MIN_IMAGES:
            raise InputError("data", f"{source} has {len(images)} images; use a set of at least {MIN_IMAGES}.")
        return images.first(self.limits[kind])


def class_labels(model: Model, images: ImageSet) -> NDArray[np.int64]:
    """Return the index of each image's class among the model's, [N]; raise `InputError` if they do not correspond."""
    if not model.classes:
        raise InputError("model", f"{model.name} has no classes: choose a model of a data set with classes.")
    if not images.classes or not set(images.classes) <= set(model.classes):
        names = ", ".join(images.classes[:3]) or "none"
        raise InputError("data", f"the classes of {images.name} ({names}) are not those of {model.name}.")
    indices = np.array([model.classes.index(name) for name in images.classes])
    return indices[images.labels_N]


def parse_limits(options: Sequence[str]) -> dict[str, int]:
    """Apply options to `LIMITS`: `500` is a maximum for every kind, `fid=2000` replaces one kind's limit."""
    limits = dict(LIMITS)
    for option in sorted(options, key=lambda option: "=" in option):
        kind, equals, count = option.rpartition("=")
        if not count.isdecimal() or int(count) < MIN_IMAGES or (equals and kind not in LIMITS):
            remedy = f"{MIN_IMAGES} or more, for all kinds or as KIND=COUNT for one of {', '.join(LIMITS)}"
            raise InputError("limit", f"--limit {option} is not valid: use {remedy}.")
        limits |= {kind: int(count)} if equals else {name: min(value, int(count)) for name, value in limits.items()}
    return limits


def label_models(models: Sequence[Model]) -> dict[str, Model]:
    """Label models by name, with part of the version if a name occurs twice; the same model counts once."""
    distinct = list({model.version: model for model in models}.values())
    names = [model.name for model in distinct]
    return {
        model.name if names.count(model.name) == 1 else f"{model.name}-{model.version[:8]}": model for model in distinct
    }
