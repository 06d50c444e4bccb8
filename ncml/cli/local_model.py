"""A model of this machine, with the methods of `ncml.Model` that `ncml score` calls. Imports torch only to compute."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ncml.arguments import check_conditions
from ncml.checkpoint import Description
from ncml.cli.terminal import load
from ncml.images import open_image
from ncml.images.reading import Image
from ncml.images.tiling import Tiling
from ncml.ood import calibrations, detector_calibration, tile_calibration
from ncml.ood.statistics import build_statistics, select_names
from ncml.options import leaves_verdict_to_detector
from ncml.paths import Location, printable

if TYPE_CHECKING:
    from ncml.model import Model
    from ncml.ood.calibration import Calibration
    from ncml.results import Scan, Score


class LocalModel:
    """A model that is loaded when it first computes, so that refusals do not wait for torch."""

    def __init__(self, description: Description, device: str) -> None:
        self._description, self._device = description, device
        self.name, self.version = description.name, description.version
        self.height, self.width = description.height, description.width
        self.statistics = build_statistics(description.config)

    @functools.cached_property
    def calibrations(self) -> "calibrations.Calibrations[Calibration]":
        """The calibrations of the model folder."""
        return calibrations.read(self._description.folder, self.version, self._description.config)

    @property
    def missing_reason(self) -> str:
        """Why there is no default calibration, if there is none."""
        return self.calibrations.missing_reason

    @functools.cached_property
    def tiles(self) -> tile_calibration.TileCalibration | None:
        """The calibration of tiles, if there is one."""
        return tile_calibration.read_if_present(self._description)

    @functools.cached_property
    def detector(self) -> "detector_calibration.DetectorCalibration | None":
        """The calibration of a detector, if the folder is one."""
        return detector_calibration.read_if_present(self._description.folder, self.version)

    @functools.cached_property
    def _model(self) -> "Model":
        return load(self._description, self._device)

    def statistic_names(self, calibration: "Calibration | None", statistics: str) -> tuple[str, ...]:
        """Return the names in a comma-separated list; "all": every available one."""
        if statistics == "all":
            return calibrations.available(calibration, self.statistics)
        return select_names(tuple(dict.fromkeys(statistics.split(","))), self.statistics)

    def judges(self, calibration: str | None, statistic: str | None) -> bool:
        """Return whether a detector gives the verdict of a call with these arguments, at images' own sizes."""
        return leaves_verdict_to_detector(calibration, statistic) and self.detector is not None

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` for arguments of `Model.score` that this model refuses."""
        check_conditions(self._description, arguments["classes"], arguments["noise"])
        if arguments["ood"] and self.judges(arguments["calibration"], arguments["statistic"]):
            arguments = arguments | {"calibration": None, "ood": False}
        self.calibrations.select_statistics(
            self.calibrations.select(arguments["calibration"]),
            self.statistics,
            arguments["statistic"],
            arguments["statistics"],
            with_verdict=arguments["ood"],
        )

    def score(self, images: Sequence[Image], **arguments: Any) -> "list[Score]":
        """Score images as `Model.score` does."""
        return self._model.score(images, **arguments)

    def scan(self, path: Location, *, tile_size: int | None, **arguments: Any) -> "Scan":
        """Judge a large image as `Model.scan` does."""
        image = open_image(path, field=printable(path))
        tile = Tiling.resolve(self.height, self.width, tile_size, self.tiles and self.tiles.tile)
        tile.grid_shape(*image.shape[:2])  # refuses a smaller image
        return self._model.scan(image, tile_size=tile_size, **arguments)
