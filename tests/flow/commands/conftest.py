"""Small models, one thread, and calibrations that are made quickly."""

from tests.ncml.conftest import calibrated, calibration, few_power_images, model, plain_model, s3, threads
from tests.ncml.evaluation.conftest import models

__all__ = ["calibrated", "calibration", "few_power_images", "model", "models", "plain_model", "s3", "threads"]
