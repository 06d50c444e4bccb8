"""One thread, small models, and calibrations that are made quickly."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import ncml
from ncml import checkpoint
from ncml.calibration import held_out_power
from ncml.calibration.estimation import calibrate
from ncml.ood.calibration import Calibration
from tests.ncml import nets

if TYPE_CHECKING:
    from tests.s3 import S3


@pytest.fixture(scope="session", autouse=True)
def threads(one_thread: None) -> None:
    """Compute with one thread: images have the same bytes only for the same number of threads."""


@pytest.fixture(scope="module", autouse=True)
def few_power_images() -> Iterator[None]:
    """Measure the power of calibrations on few images: on the usual number it takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(calibrate.__kwdefaults__, "power_images", 10)
        patch.setattr(held_out_power, "GENERATED", 5)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    """A model of 8x8, classes a and b, four orientations; random weights."""
    folder = tmp_path_factory.mktemp("models") / "loud"
    checkpoint.save(
        folder, nets.network(nets.config(), dtype=torch.float32), metrics={"test_bpd": 5.0}, card="# loud\n"
    )
    return ncml.load(folder)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    """A model of 8x12, no classes, identity orientation only."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    config = nets.config(((4, 1),), width=12, classes=(), orientations=False)
    checkpoint.save(folder, nets.network(config, dtype=torch.float32))
    return ncml.load(folder)


@pytest.fixture(scope="session")
def calibration(model: ncml.Model) -> Calibration:
    """The calibration of `model` with 30 images for estimation and 60 for ranking."""
    return calibrate(model, nets.FIT, nets.RANK, power_images=10)


@pytest.fixture
def calibrated(model: ncml.Model, calibration: Calibration, tmp_path: Path) -> ncml.Model:
    """A copy of `model` in its own folder, with its calibration."""
    folder = tmp_path / "loud"
    shutil.copytree(model.folder, folder)
    calibration.save(folder)
    return ncml.load(folder)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[S3]":
    """An S3 server, which this process uses; its module takes long to import."""
    from tests.s3 import serving

    with serving(monkeypatch) as server:
        yield server
