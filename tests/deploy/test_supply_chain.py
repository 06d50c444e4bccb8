"""The contents of the images: pinned bases, and a list of what is installed."""

import json
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker import pin, sbom
from tests.deploy.files import DOCKERFILE, ROOT

DIGEST = f"sha256:{'ab' * 32}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in pin.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_third_party_image_is_pinned_and_pins_are_renewed(clone: Path) -> None:
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


def test_nothing_is_changed_if_a_digest_is_not_available(clone: Path) -> None:
    def look_up(image: str) -> str:
        if image.startswith("grafana"):
            raise OSError("no network")
        return DIGEST

    with pytest.raises(OSError, match="no network"):
        pin.pin(clone, look_up)
    assert all((clone / name).read_text() == (ROOT / name).read_text() for name in pin.FILES)


def locked(path: Path) -> dict[str, str]:
    """Return the releases in a lock by name."""
    pairs = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): release for name, release in pairs}


def needed(name: str, extras: Iterable[str] = (), *, without: str) -> set[str]:
    """Return the direct and indirect dependencies of a package on this machine, except one and its dependencies."""
    names: set[str] = set()
    for line in requires(name) or ():
        requirement = Requirement(line)
        marker, child = requirement.marker, canonicalize_name(requirement.name)
        if child != without and (not marker or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))):
            names |= {child} | needed(child, requirement.extras, without=without)
    return names - {"ncml"}


@pytest.mark.parametrize(("image", "extras"), [("service", ()), ("worker", ("worker", "train"))])
def test_the_locks_of_the_images_hash_every_package_but_torch_at_the_tested_release(
    image: str, extras: tuple[str, ...]
) -> None:
    path = ROOT / "docker" / f"{image}.lock"
    lock, tested = locked(path), locked(ROOT / "requirements.lock")
    torchs = {name for name in needed("torch", without="ncml") if not re.match("cuda|nvidia|triton", name)}
    expected = needed("ncml", extras, without="torch") | (torchs if extras else set()) | {"setuptools"}
    assert expected <= lock.keys(), "run make lock"
    assert "torch" not in lock
    assert {name: lock[name] for name in lock.keys() & tested} == {name: tested[name] for name in lock.keys() & tested}
    packages = re.findall(r"^\S+==.*(?:\n .*)*", path.read_text(), re.MULTILINE)
    assert len(packages) == len(lock)
    assert all("--hash=sha256:" in package for package in packages)


def test_the_images_install_nothing_else() -> None:
    commands = re.findall(r"pip install (.*?)(?= &&|$)", DOCKERFILE.read_text(), re.MULTILINE)
    allowed = (
        r"--no-deps --require-hashes -r docker/\w+\.lock",
        r"--no-deps --no-build-isolation \.",
        r'.*"torch>=\S+"',
    )
    assert len(commands) == 5
    assert [command for command in commands if not any(re.fullmatch(kind, command) for kind in allowed)] == []


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
