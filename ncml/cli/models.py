"""`ncml models`."""

import os
import sys
from typing import Any

from ncml import checkpoint
from ncml.cli.terminal import JsonOption, describe, identity, print_json
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
            m = describe(str(folder))
            checkpoint.check_version(m)
        except ModelError as error:
            print(f"ncml: left out: {error}", file=sys.stderr)
            continue
        listed.append(
            identity(m)
            | {
                "default": m.name == default,
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
        print_json({"models": listed})
    elif not listed:
        print("no model found in", os.pathsep.join(map(str, search_path())))
    else:
        for m in listed:
            mark = "  (default)" if m["default"] else ""
            metrics = "  ".join(f"{name} {value:g}" for name, value in m["metrics"].items())
            print(f"{m['name']}  {m['version'][:12]}  {m['height']}x{m['width']}  {metrics}  {m['folder']}{mark}")
            if m["classes"]:
                print("  classes:", ", ".join(m["classes"]))
