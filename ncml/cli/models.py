"""`ncml models`."""

import os
import sys
from typing import Any

from ncml import checkpoint
from ncml.cli.terminal import JsonOption, identity, print_json
from ncml.errors import ModelError
from ncml.paths import default_name, model_folders, search_path


def models(*, as_json: JsonOption = False) -> None:
    """List the models that --model accepts by name: those in NCML_MODELS, or else in ./models and the bundled ones.

    Incomplete model folders are reported on stderr.

    Args:
        as_json: Print JSON.
    """
    listed: list[dict[str, Any]] = []
    folders = model_folders()
    default = default_name(folders)
    for folder in folders.values():
        try:
            description = checkpoint.describe(folder)
            checkpoint.check_version(description)
        except ModelError as error:
            print(f"ncml: skipped: {error}", file=sys.stderr)
            continue
        listed.append(
            identity(description)
            | {
                "default": description.name == default,
                "folder": str(folder),
                "height": description.height,
                "width": description.width,
                "classes": list(description.classes),
                "noise": description.noise,
                "generates": description.config.generates,
                "keeps": list(description.keeps),
                "detector": (folder / checkpoint.DETECTOR).is_file(),
                "metrics": description.metrics,
            }
        )
    if as_json:
        print_json({"models": listed})
    elif not listed:
        print("no model found in", os.pathsep.join(map(str, search_path())))
    else:
        for model in listed:
            size = f"{model['height']}x{model['width']}"
            metrics = "  ".join(f"{name} {_format(value)}" for name, value in model["metrics"].items())
            mark = "" if model["generates"] else "  (only scores)"
            mark += "  (default)" if model["default"] else ""
            mark += "  (detector)" if model["detector"] else ""
            print(f"{model['name']}  {model['version'][:12]}  {size}  {metrics}  {model['folder']}{mark}")
            if model["classes"]:
                print("  classes:", ", ".join(model["classes"]))


def _format(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
