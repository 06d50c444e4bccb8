"""`ncml evaluate`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ncml.cli.terminal import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    ThreadsOption,
    check_threads,
    describe,
    load,
    print_json,
    progress_bar,
    use_threads,
)
from ncml.data.sources import check_source
from ncml.errors import InputError
from ncml.evaluation.image_sets import GENERATED, split_source
from ncml.evaluation.inputs import Inputs, label_models, parse_limits


def evaluate(
    kind: Positional[Literal["likelihood", "sanity", "robustness", "ood", "fid", "classes", "samples", "all"]],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME[:SPLIT]")],
    model: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(aliases=("-m",), metavar="NAME|PATH", help_behavior_hint=DEFAULT_MODEL),
    ] = (),
    ood: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER|NAME[:SPLIT]", help_behavior_hint="")] = (),
    limit: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[KIND=]COUNT", help_behavior_hint="")] = (),
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("evaluation"),
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Reproduce the paper's tables and figures for models, with the published numbers next to the measured ones.

    Tables are printed and written as CSV, figures as PNG, all results as JSON and as pages that report.md lists.
    Measurements are kept in the folder: re-running the same command resumes where it stopped, and a larger limit
    measures only what is new.

    Args:
        kind: likelihood (Tables 1, 3), sanity (Figure 2, compressed size), robustness (Figure 4), ood (Tables 2, 4),
            fid (sample quality and variety), classes (class knowledge, fidelity and variety), samples (Figures 1, 3, 5
            to 10), or all.
        data: In-distribution images: the test split of a data set, or all images of a folder (here or at s3://, gs://,
            hf:// or https://).
        model: Name or folder of a model; can be repeated to compare several.
        ood: Out-of-distribution data set; can be repeated. Constant and uniform images are always measured.
        limit: Maximum number of images of each set: for all kinds, which only lowers the defaults, or for one kind as
            in fid=2000; can be repeated. Defaults: 10000 for likelihood and fid, 1000 for ood and sanity, 500 for
            robustness, 300 for classes; 256 for sweep and solvers, the samples for each start noise, number of steps
            and solver that fid compares; in classes, 500 for fidelity, the samples of each method, and 4000 and 50000
            for probe and classifier, the training images of the two classifiers.
        out: Folder for the report and all measurements.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON instead of tables.
    """
    check_threads(threads)
    if out.exists() and not out.is_dir():
        raise InputError("out", f"{out} is a file: choose a folder.")
    limits = parse_limits(limit)
    descriptions = [describe(name, device) for name in dict.fromkeys(model or ("",))]
    if data not in GENERATED:
        check_source(split_source(data)[0])
    use_threads(threads)
    from ncml.evaluation import report_folder
    from ncml.evaluation.cache import MeasurementCache
    from ncml.evaluation.report import Section
    from ncml.runtime import reuse_freed_memory
    from ncml.training.provenance import command

    command_line = command(sys.argv[1:])
    models = label_models([load(description, device) for description in descriptions])
    reuse_freed_memory()

    def show(section: Section) -> None:
        if not as_json:
            for sentence in (*section.findings, *section.notes):
                print(sentence)
            for table in section.tables:
                if table.rows:
                    table.show()
            for figure in section.figures:
                print(out / f"{figure.name}.png")

    kinds = list(report_folder.KINDS) if kind == "all" else [kind]
    with progress_bar() as on_progress:
        inputs = Inputs(models, data, ood, MeasurementCache(out / "measured", on_progress), limits)
        results = report_folder.evaluate(kinds, inputs, out, show, command=command_line)
    if as_json:
        print_json(results if kind == "all" else results[kind])
    else:
        print(out / "report.md")
