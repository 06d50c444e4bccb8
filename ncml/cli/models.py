"""`ncml models`."""

import os
import sys
from typing import Any

from ncml import checkpoint
from ncml.cli.terminal import JsonOption, identity, print_json
from ncml.data.inventory import counted
from ncml.errors import ModelError
from ncml.ood import detector_calibration
from ncml.paths import default_name, model_folders, search_path


def models(*, as_json: JsonOption = False) -> None:
    """List the models that --model accepts by name: those in NCML_MODELS, or else in ./models and the bundled ones.

    Detectors are listed with their own version and the number of their good images. Incomplete model folders are
    reported on stderr.

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
                **_describe_detector(description),
                "metrics": description.metrics,
            }
        )
    if as_json:
        print_json({"models": listed})
    elif not listed:
        print("no model found in", os.pathsep.join(map(str, search_path())))
    else:
        for model in listed:
            print(_line(model))
            if model["classes"] and (model["generates"] or not model["detector"]):
                owner = " of its base" if model["detector"] else ""
                print(f"  classes{owner}:", ", ".join(model["classes"]))


def _describe_detector(description: checkpoint.Description) -> dict[str, Any]:
    """Return the version of a detector and the number of its good images; None for a model without one.

    The version of the model is that of its base, which other detectors and their updates share.
    """
    calibration = None
    try:
        calibration = detector_calibration.read_if_present(description.folder, description.version)
    except ModelError as error:
        print(f"ncml: {error}", file=sys.stderr)
    return {
        "detector_version": calibration and calibration.version,
        "good_images": calibration and calibration.n_fit + calibration.n_rank,
    }


def _line(model: dict[str, Any]) -> str:
    size = f"{model['height']}x{model['width']}"
    metrics = "  ".join(f"{name} {_format(value)}" for name, value in model["metrics"].items())
    described = f"{model['version'][:12]}  {size}  {metrics}"
    if model["detector_version"]:
        made = f"detector of {counted(model['good_images'], 'good image')}"
        described = f"{model['detector_version'][:12]}  {made}, with base {model['version'][:12]}"
    mark = "" if model["generates"] else "  (only scores)"
    mark += "  (default)" if model["default"] else ""
    mark += "  (detector)" if model["detector"] and not model["detector_version"] else ""
    return f"{model['name']}  {described}  {model['folder']}{mark}"


def _format(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
