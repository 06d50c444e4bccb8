"""What follows the last step of a run: measure the averaged weights, write the model folder and card, and calibrate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ncml import checkpoint
from ncml.calibration import descriptions, tile_estimation
from ncml.calibration.estimation import calibrate
from ncml.data import dataset
from ncml.data.cropping import image_readers
from ncml.data.dataset import Dataset
from ncml.data.inventory import ImageOrder
from ncml.data.sources import is_hub_dataset, is_image_folder, open_source, readable_rows
from ncml.errors import InputError, ModelError
from ncml.images.tiling import Tiling
from ncml.model import Model
from ncml.model import load as load_model
from ncml.progress import OnProgress
from ncml.training.card import Measurement, model_card
from ncml.training.folder import STATE
from ncml.training.objective import measure_held_out
from ncml.training.trainer import Trainer

MONITORED = 500
"""Number of held-out images on which a run is measured while it trains, and one of crops at its end."""

CALIBRATION_FIT, CALIBRATION_RANK = 2_000, 5_000
"""Maximum number of images to estimate the statistics, and to rank: those that CIFAR-10 has."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    folder: Path
    version: str
    metrics: dict[str, float]
    calibrated: bool
    seconds: float
    """Training time, over all sessions."""
    data: Dataset = field(compare=False, repr=False)
    """The images of the run, held-out ones included."""


@dataclass(frozen=True)
class TrainedRun:
    """A run whose last step is done."""

    trainer: Trainer
    source: str
    data: Dataset
    out: Path
    command: str
    """The command line that the card quotes."""
    on_message: Callable[[str], None]
    on_progress: OnProgress

    def finish(self) -> TrainedModel | None:
        """Write and calibrate the model, unless its folder has it already; only rank 0 returns it."""
        group = self.trainer.group
        earlier = self._read_earlier() if group.is_main else None
        if group.any(earlier is not None):
            self.on_message(
                f"{self.out} contains this model already; its card, calibrations and sampling options are kept"
            )
            if earlier is None:
                return None
            version, metrics, calibrated = earlier.version, earlier.metrics, bool(earlier.calibration or earlier.tiles)
        else:
            measured = self._measure()
            if not group.is_main:
                return None
            metrics = {
                "test_bpd" if measured.split == "test" else "held_out_bpd": round(measured.bpd, 4),
                "images_seen": self.trainer.images_seen,
            }
            metadata = checkpoint.card_metadata(datasets=[self.source] if is_hub_dataset(self.source) else [])
            card = model_card(self.trainer, self.out.resolve().name, self.command, self.data, measured)
            version = checkpoint.save(self.out, self.trainer.ema, metrics=metrics, card=metadata + card)
            calibrated = False
        is_calibrated = calibrated or self._calibrate()
        return TrainedModel(self.out, version, metrics, is_calibrated, self.trainer.seconds, self.data)

    def _read_earlier(self) -> Model | None:
        """Return the model in the folder if it has exactly these weights, as after a run that was finished before."""
        network = self.trainer.ema
        try:
            model = load_model(self.out)
        except ModelError:  # there is none yet, or it is damaged and will be replaced
            return None
        weights, expected = model.network.state_dict(), network.state_dict()
        is_same = model.config == network.config and weights.keys() == expected.keys()
        return model if is_same and all(torch.equal(weights[name], w.cpu()) for name, w in expected.items()) else None

    def _measure(self) -> Measurement:
        images, split = self._load_measured_part()
        if self.trainer.config.training.crop is not None:
            images = images.spread(MONITORED)
        bpd, standard_error = measure_held_out(
            self.trainer.ema, images, group=self.trainer.group, on_progress=self.on_progress
        )
        return Measurement(bpd, standard_error, split, len(images))

    def _load_measured_part(self) -> tuple[Dataset, str]:
        """Return the images on which the run is measured, and "test" for those of a test split or "held-out"."""
        if not is_image_folder(self.source) and self.data.crops == 1:
            height, width = self.data.store_NHWC.shape[1:3]
            try:
                with self.trainer.group.main_first():
                    cache = (self.out / STATE).parent / "test"
                    return dataset.load(self.source, height, width, split="test", cache_folder=cache), "test"
            except InputError as error:
                self.on_message(f"measured on images held out from training, not on a test split: {error}")
        return self.data.part("calibration-fit", self.trainer.config.training.split), "held-out"

    def _calibrate(self) -> bool:
        """Calibrate the model on held-out images; return whether there are enough.

        A model of crops has its tiles calibrated instead, on whole held-out images.
        """
        data, training = self.data, self.trainer.config.training
        model = load_model(self.out, self.trainer.group.device)
        try:
            if training.crop is None:
                fit = data.part("calibration-fit", training.split).spread(CALIBRATION_FIT)
                rank = data.part("calibration-rank", training.split).spread(CALIBRATION_RANK)
                calibration = calibrate(model, fit.images_NHWC, rank.images_NHWC, on_progress=self.on_progress)
                descriptions.save(calibration, self.out)
                lines = descriptions.describe(calibration)
            else:
                rows = list(readable_rows(open_source(self.source, "train"), data.inventory.unreadable_rows))
                data.inventory.order.check(ImageOrder.of([row.name for row in rows]))
                readers = image_readers(rows)
                fit, rank = (
                    list(itertools.compress(readers, dataset.is_member(name, len(readers), training.split)))
                    for name in ("calibration-fit", "calibration-rank")
                )
                tiling = Tiling.for_model(model.height, model.width, training.crop)
                calibration = tile_estimation.calibrate(model, fit, rank, tiling=tiling, on_progress=self.on_progress)
                calibration.save(self.out)
                lines = descriptions.describe_tiles(calibration)
        except InputError as error:
            option = "" if training.crop is None else " --tile"
            self.on_message(
                f"not calibrated, so `ncml score{option}` gives no p-values ({str(error).rstrip('.')}); "
                f"`ncml calibrate{option}` calibrates the model on other images"
            )
            return False
        subject = "" if training.crop is None else "tiles are "
        for line in [f"{subject}calibrated on {calibration.n_fit} and {calibration.n_rank} held-out images", *lines]:
            self.on_message(line)
        return True
