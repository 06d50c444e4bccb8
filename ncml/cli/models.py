"""`ncml models`."""

import os
import sys
from typing import Any

from ncml.cli.terminal import JsonOption, identity, load, print_json
from ncml.errors import ModelError
from ncml.paths import model_folders, search_path


def models(*, as_json: JsonOption = False) -> None:
    """List the models that can be named: those in the directories of NCML_MODELS, or in ./models and shipped.

    A folder that is no whole model is told on standard error.

    Args:
        as_json: Print JSON.
    """
    found: list[dict[str, Any]] = []
    for folder in model_folders().values():
        try:
            m = load(str(folder), "cpu")
        except ModelError as error:
            print(f"ncml: left out: {error}", file=sys.stderr)
            continue
        found.append(
            identity(m)
            | {
                "folder": str(folder),
                "height": m.height,
                "width": m.width,
                "classes": list(m.classes),
                "noise": m.noise,
                "keeps": list(m.keeps),
                "metrics": m.metrics,
            }
        )
    if as_json:
        print_json({"models": found})
    elif not found:
        print("no model found in", os.pathsep.join(map(str, search_path())))
    else:
        for m in found:
            measured = "  ".join(f"{name} {value:g}" for name, value in m["metrics"].items())
            print(f"{m['name']}  {m['version'][:12]}  {m['height']}x{m['width']}  {measured}  {m['folder']}")
            if m["classes"]:
                print("  classes:", ", ".join(m["classes"]))
