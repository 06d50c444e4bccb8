"""Run kinds of evaluation in order and write the folder of their results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ncml import checkpoint
from ncml.errors import InputError
from ncml.evaluation.classes import classes
from ncml.evaluation.flipped_bits import likelihood
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.ood import ood
from ncml.evaluation.quality import fid
from ncml.evaluation.report import Section
from ncml.evaluation.robustness import robustness
from ncml.evaluation.samples import samples
from ncml.evaluation.sanity import sanity
from ncml.training.provenance import duration, machine

Kind = Callable[[Inputs], Section]

KINDS: dict[str, Kind] = {
    "likelihood": likelihood,
    "sanity": sanity,
    "robustness": robustness,
    "ood": ood,
    "samples": samples,
    "fid": fid,
    "classes": classes,
}


def evaluate(
    kinds: Sequence[str], inputs: Inputs, out: Path, show: Callable[[Section], None], *, command: str
) -> dict[str, Any]:
    """Run kinds of evaluation in order, write each to the folder when it ends, and return their JSON by kind.

    If several are requested, one that is not possible explains why in its section, and the others still run.

    command: the command line that repeats the measurement.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for kind in kinds:
        start, saved_seconds = time.monotonic(), inputs.cache.saved_seconds
        try:
            section = KINDS[kind](inputs)
        except InputError as error:
            if len(kinds) == 1:
                raise
            section = Section(kind, kind.capitalize(), [f"Not measured: {error}"])
        device = next(iter(inputs.models.values())).device
        provenance = {"command": command, "machine": machine(device), "date": date.today().isoformat()}
        provenance["models"] = ", ".join(f"{model.name} {model.version[:12]}" for model in inputs.models.values())
        provenance["took"] = duration(time.monotonic() - start + inputs.cache.saved_seconds - saved_seconds)
        section.write(out, provenance)
        results[kind] = to_json(section, inputs) | {"made": provenance}
        checkpoint.write_json(out / f"{kind}.json", results[kind])
        write_index(out)
        show(section)
    return results


def write_index(out: Path) -> None:
    """Write `report.md`, which links the pages of the folder by their titles and repeats what each found."""
    entries: list[str] = []
    for page in (out / f"{kind}.md" for kind in KINDS):
        if page.is_file():
            title, _, text = page.read_text(encoding="utf-8").partition("\n\n")
            findings = text.partition("\n\n")[0] if text.startswith("- ") else ""
            entries.append(f"## [{title.removeprefix('## ')}]({page.name})\n\n{findings}".rstrip() + "\n")
    (out / "report.md").write_text("\n".join(["# Measurements\n", *entries]), encoding="utf-8")


def to_json(section: Section, inputs: Inputs) -> dict[str, Any]:
    """Return the results of one model directly, those of several as a list under `models`."""
    models = [
        {"model": {"name": model.name, "version": model.version}, **section.results.get(label, {})}
        for label, model in inputs.models.items()
    ]
    common: dict[str, Any] = {"kind": section.kind, "data": inputs.data_name}
    common |= {"findings": list(section.findings), "notes": list(section.notes)}
    if not section.results:
        common["not_measured"] = " ".join(section.text)
    return json.loads(json.dumps(common | (models[0] if len(models) == 1 else {"models": models})))
