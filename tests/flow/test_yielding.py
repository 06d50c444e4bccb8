"""Images that are made in the middle of a long job of a real model."""

import itertools
import shutil
from pathlib import Path

import numpy as np

from tests.worker.fleet import generate, scan
from worker.contract import CalibrateJob, Job
from worker.main import load
from worker.messages import Batch, BatchResult, EngineSettings, Interruption, Outcome, Step
from worker.process import EngineProcess


def test_images_made_in_the_middle_of_a_long_job_and_its_own_result_are_those_of_jobs_alone(
    model_folder: Path, tmp_path: Path
) -> None:
    """A calibration itself samples images, in the middle of which others are sampled and refined."""
    directory = tmp_path / "models"
    shutil.copytree(model_folder, directory / "tiny")
    engine = EngineProcess(EngineSettings(directories=(directory,), load=load, calibrates=True, threads=1))
    numbers, stages = itertools.count(1), list[str]()

    def compute(*jobs: Job) -> list[Outcome]:
        """Have jobs computed as batches that arrive together; return their outcomes in the order in which they end."""
        batches = [Batch(next(numbers), {"job": job}) for job in jobs]
        for batch in batches:
            engine.send(batch)
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            message = engine.receive(100)
            if isinstance(message, Step):
                stages.append(message.stage)
            elif isinstance(message, Interruption):
                assert message.number == batches[1].number
                stages.append("interruption")
            elif isinstance(message, BatchResult):
                outcomes.append(message.outcomes["job"])
                assert outcomes[-1].error is None
        return outcomes

    try:
        images = generate(model="tiny", n=3, seed=5, noise=5.0, steps=2)
        [alone] = compute(images)
        inner, calibrated = compute(calibration("interrupted"), images)
        assert stages.count("interruption") == 1
        assert inner.images == alone.images
        [undisturbed] = compute(calibration("undisturbed"))
        assert calibrated.calibration == undisturbed.calibration
        files = [directory / name / "calibration.json" for name in ("interrupted", "undisturbed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        large = scan(np.random.default_rng(0).integers(0, 256, (8, 40, 3), np.uint8), model="undisturbed", map=True)
        inner, scanned = compute(large, images)
        assert stages.count("interruption") == 2
        assert inner.images == alone.images
        assert scanned.scan
        assert scanned.scan == compute(large)[0].scan
    finally:
        engine.stop()


def calibration(name: str) -> CalibrateJob:
    pixels = np.random.default_rng(0).integers(96, 160, (60, 8, 8, 3), np.uint8).tobytes()
    return CalibrateJob(model="tiny", name=name, images=60, height=8, width=8, pixels=pixels)
