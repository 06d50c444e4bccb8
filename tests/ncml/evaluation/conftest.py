"""Two small models."""

from pathlib import Path

import pytest
import torch

import ncml
from ncml import checkpoint
from ncml.calibration.estimation import calibrate
from ncml.recipes import maximum_likelihood
from tests.ncml import nets


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine`, calibrated, and `mle`, for t = 0 only and not calibrated; random weights."""
    folder = tmp_path_factory.mktemp("models")
    config = nets.config()
    checkpoint.save(folder / "mine", nets.network(config, dtype=torch.float32))
    checkpoint.save(folder / "mle", nets.network(maximum_likelihood(config), dtype=torch.float32, seed=1))
    held_out = nets.images(80, seed=5)
    calibrate(ncml.load(folder / "mine"), held_out[:40], held_out[40:]).save(folder / "mine")
    return folder
