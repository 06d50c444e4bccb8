"""A fleet of worker processes with synthetic models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.fleet import Fleet
from tests.worker.synthetic import write_model


@pytest.fixture
def fleet(valkey_url: str, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet without workers (`fleet.start()` adds one), and a model `synthetic`: 20 ms per batch, 1 ms per image."""
    models = tmp_path / "models"
    write_model(models, batch_s=0.02, image_s=0.001)
    fleet = Fleet(valkey_url, models, tmp_path / "log")
    yield fleet
    fleet.stop()
