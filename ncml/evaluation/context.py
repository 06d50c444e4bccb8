"""What an evaluation works with: the models, the sets of pictures, and how much of each is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ncml.errors import InputError
from ncml.evaluation import pictures
from ncml.evaluation.pictures import Pictures
from ncml.evaluation.store import Store
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
}
"""Most images of a set that each kind takes unless `--limit` says otherwise. For fid these are also the samples drawn;
sweep are the samples for each point of quality against steps and start noise, solvers those of each solver."""

LEAST = 8
"""Images of which a bootstrap still draws different ones."""


@dataclass
class Context:
    """What an evaluation works with."""

    models: dict[str, Model]
    """By label: the name, with the version where two have the same."""
    data: str
    ood: Sequence[str]
    store: Store
    limits: dict[str, int] = field(default_factory=lambda: dict(LIMITS))
    notes: list[str] = field(default_factory=list)
    """What is to be known of the in-distribution set."""
    read: dict[tuple[Any, ...], Pictures] = field(default_factory=dict)

    @cached_property
    def names(self) -> dict[str, str]:
        """What each set is called, by its source."""
        return pictures.names((self.data, *self.ood, *pictures.GENERATED))

    @property
    def data_name(self) -> str:
        """What the in-distribution set is called."""
        return self.names[self.data]

    def test(self, model: Model, kind: str) -> Pictures:
        """The in-distribution test images for a kind of evaluation, at the model's size."""
        found = self.pictures(self.data, model, kind)
        self.notes += [note for note in found.notes if note not in self.notes]
        return found

    def pictures(self, source: str, model: Model, kind: str, *, split: str = "") -> Pictures:
        """A set at the model's size, as many as the kind's limit. It is read once.

        split: another one than the source names, or than test.
        """
        key = (source, model.height, model.width, split)
        if key not in self.read:
            name = self.names[source]
            self.read[key] = pictures.load(
                source, model.height, model.width, split=split, name=name, on_progress=self.store.on_progress
            )
        found = self.read[key]
        if len(found) < LEAST:
            raise InputError(
                "data", f"{source} has {len(found)} pictures; {LEAST} are the least that can be measured on."
            )
        return found.first(self.limits[kind])
