"""`ncml evaluate`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ncml.cli.draw import ThreadsOption
from ncml.cli.terminal import JsonOption, load, print_json, progress_bar, use_threads


def evaluate(
    kind: Positional[Literal["likelihood", "sanity", "robustness", "ood", "fid", "samples", "all"]],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME[:SPLIT]")],
    model: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(aliases=("-m",), metavar="NAME|PATH", help_behavior_hint="(default: cifar10)"),
    ] = (),
    ood: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER|NAME[:SPLIT]", help_behavior_hint="")] = (),
    limit: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[KIND=]COUNT", help_behavior_hint="")] = (),
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("evaluation"),
    threads: ThreadsOption = 1,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Measure models as the paper does: its tables and figures, with the published numbers beside ours.

    Tables are printed and written as CSV, figures as PNG, all results as JSON and report.md. What was measured is kept
    in the folder, so the same command goes on where it stopped, and with a larger limit measures only what is new.

    Args:
        kind: likelihood (Tables 1, 3), sanity (Figure 2, compressed size), robustness (Figure 4), ood (Tables 2, 4),
            fid (sample quality), samples (Figures 1, 3, 5 to 10), or all of them.
        data: In-distribution pictures: of a data set the test split, of a folder of pictures all of them.
        model: Name or folder of a model; repeat it for several, a column or curve each.
        ood: Another data set; repeat it for several. Constant and uniform pictures are always measured, too.
        limit: Most pictures of each set, of all kinds or of one as in fid=2000; repeat it for several. Without it
            likelihood and fid take 10000, ood and sanity 1000, robustness 500; sweep and solvers, the samples for each
            number of steps, start noise and solver that fid compares, are 256.
        out: Folder for the report and all that was measured.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON instead of tables.
    """
    use_threads(threads)
    from ncml.evaluation import run
    from ncml.evaluation.context import Context
    from ncml.evaluation.report import Section
    from ncml.evaluation.store import Store
    from ncml.runtime import reuse_freed_memory
    from ncml.training.provenance import command

    wanted = command(sys.argv[1:], [data, *ood, *model])
    limits = run.limits(limit)
    models = run.labelled([load(name, device) for name in dict.fromkeys(model or ("cifar10",))])
    reuse_freed_memory()

    def shown(section: Section) -> None:
        if not as_json:
            for note in section.notes:
                print(note)
            for table in section.tables:
                if table.rows:
                    table.show()
            for figure in section.figures:
                print(out / f"{figure.name}.png")

    kinds = list(run.KINDS) if kind == "all" else [kind]
    with progress_bar() as on_progress:
        context = Context(models, data, ood, Store(out / "measured", on_progress), limits)
        found = run.evaluate(kinds, context, out, shown, command=wanted)
    if as_json:
        print_json(found if kind == "all" else found[kind])
    else:
        print(out / "report.md")
