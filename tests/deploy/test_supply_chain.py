"""What the images are made of: pinned bases, and a list of what is installed."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from docker import pin, sbom
from tests.deploy.files import ROOT

DIGEST = f"sha256:{'ab' * 32}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in pin.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_image_of_others_is_pinned_and_pins_are_renewed(clone: Path) -> None:
    images = pin.pin(clone, lambda image: DIGEST)
    names = {image.partition(":")[0] for image in images}
    assert names == {"python", "valkey/valkey", "prom/prometheus", "grafana/grafana"}
    renewed = DIGEST.replace("ab", "cd")
    assert pin.pin(clone, lambda image: renewed).keys() == images.keys()
    for name in pin.FILES:
        text = (clone / name).read_text()
        assert DIGEST not in text
        assert text.replace(f"@{renewed}", "") == re.sub(r"@sha256:[0-9a-f]{64}", "", (ROOT / name).read_text())
    assert f"ARG PYTHON=3.11.16-slim-trixie@{renewed}" in (clone / "docker/Dockerfile").read_text()


def test_nothing_is_changed_where_a_digest_cannot_be_learned(clone: Path) -> None:
    def look_up(image: str) -> str:
        if image.startswith("grafana"):
            raise OSError("no network")
        return DIGEST

    with pytest.raises(OSError, match="no network"):
        pin.pin(clone, look_up)
    assert all((clone / name).read_text() == (ROOT / name).read_text() for name in pin.FILES)


def test_the_bill_of_materials_lists_what_is_installed(tmp_path: Path) -> None:
    sbom.write(tmp_path)
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "ncml")
    listed = {component["name"]: component for component in bill["components"]}
    assert listed["pydantic"]["purl"] == f"pkg:pypi/pydantic@{version('pydantic')}"
    assert listed["pydantic"]["licenses"] == [{"expression": "MIT"}]
    assert "ncml" not in listed
    text = (tmp_path / "THIRD-PARTY.txt").read_text()
    assert f"pydantic {version('pydantic')}\nLicence: MIT" in text
    assert "Permission is hereby granted" in text
