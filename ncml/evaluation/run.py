"""Which evaluations, of which models, in which order; and the folder that they fill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ncml import checkpoint
from ncml.errors import InputError
from ncml.evaluation.context import LEAST, LIMITS, Context
from ncml.evaluation.likelihood import likelihood, sanity
from ncml.evaluation.ood import ood
from ncml.evaluation.quality import fid
from ncml.evaluation.report import Section
from ncml.evaluation.robustness import robustness
from ncml.evaluation.samples import samples
from ncml.model import Model
from ncml.training.provenance import duration, machine

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
