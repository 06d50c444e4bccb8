"""Which evaluations, of which models, in which order; and the folder that they fill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from ncml import checkpoint
from ncml.errors import InputError
from ncml.evaluation import pictures
from ncml.evaluation.likelihood import likelihood, sanity
from ncml.evaluation.ood import ood
from ncml.evaluation.pictures import Pictures
from ncml.evaluation.quality import fid
from ncml.evaluation.report import Section
from ncml.evaluation.robustness import robustness
from ncml.evaluation.samples import samples
from ncml.evaluation.store import Store
from ncml.model import Model
from ncml.training.provenance import duration, machine

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
            report = lambda done, total: self.store.bar(f"read {name}", done, total)  # noqa: E731
            self.read[key] = pictures.load(source, model.height, model.width, split=split, name=name, report=report)
        found = self.read[key]
        if len(found) < LEAST:
            raise InputError(
                "data", f"{source} has {len(found)} pictures; {LEAST} are the least that can be measured on."
            )
        return found.first(self.limits[kind])


Kind = Callable[[Context], Section]

KINDS: dict[str, Kind] = {
    "likelihood": likelihood,
    "sanity": sanity,
    "robustness": robustness,
    "ood": ood,
    "samples": samples,
    "fid": fid,
}


def limits(given: Sequence[str]) -> dict[str, int]:
    """`LIMITS` under options such as `500`, which no kind exceeds, and `fid=2000`, which is that kind's."""
    found = dict(LIMITS)
    for option in sorted(given, key=lambda option: "=" in option):
        kind, equals, count = option.rpartition("=")
        if not count.isdecimal() or int(count) < LEAST or (equals and kind not in LIMITS):
            wanted = f"{LEAST} or more, for all kinds or as KIND=COUNT for one of {', '.join(LIMITS)}"
            raise InputError("limit", f"--limit {option} is not understood: give {wanted}.")
        found |= {kind: int(count)} if equals else {name: min(value, int(count)) for name, value in found.items()}
    return found


def labelled(models: Sequence[Model]) -> dict[str, Model]:
    """Models by name, with part of the version where a name occurs twice; the same model counts once."""
    distinct = list({model.version: model for model in models}.values())
    names = [model.name for model in distinct]
    return {
        model.name if names.count(model.name) == 1 else f"{model.name}-{model.version[:8]}": model for model in distinct
    }


def evaluate(
    kinds: Sequence[str], context: Context, out: Path, shown: Callable[[Section], None], *, command: str
) -> dict[str, Any]:
    """Run kinds of evaluation in their order, write each to the folder as it ends, and return their JSON by kind.

    Where several are asked for, one that cannot be done is told in its section, and the others go on.

    command: what a reader types to measure the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for kind in kinds:
        begun, spared = time.monotonic(), context.store.spared
        try:
            section = KINDS[kind](context)
        except InputError as error:
            if len(kinds) == 1:
                raise
            section = Section(kind, kind.capitalize(), [f"Not measured: {error}"])
        device = next(iter(context.models.values())).device
        made = {"command": command, "machine": machine(device), "date": date.today().isoformat()}
        made["took"] = duration(time.monotonic() - begun + context.store.spared - spared)
        section.write(out, made)
        found[kind] = as_json(section, context) | {"made": made}
        checkpoint.write_json(out / f"{kind}.json", found[kind])
        parts = [path.read_text() for path in (out / f"{name}.md" for name in KINDS) if path.is_file()]
        (out / "report.md").write_text("# Evaluation\n\n" + "\n".join(parts))
        shown(section)
    return found


def as_json(section: Section, context: Context) -> dict[str, Any]:
    """Of one model its results; of several, a list under `models`."""
    each = [
        {"model": {"name": model.name, "version": model.version}, **section.results.get(label, {})}
        for label, model in context.models.items()
    ]
    common: dict[str, Any] = {"kind": section.kind, "data": context.data_name, "notes": list(section.notes)}
    if not section.results:
        common["not_measured"] = " ".join(section.text)
    return json.loads(json.dumps(common | (each[0] if len(each) == 1 else {"models": each})))
