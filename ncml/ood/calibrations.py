"""The calibrations of a model folder, by name, and what a request selects from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from ncml import checkpoint
from ncml.config import Config
from ncml.errors import InputError, ModelError
from ncml.ood import storage
from ncml.ood.calibration import Calibration
from ncml.ood.statistics import Statistic, select_names
from ncml.ood.storage import DEFAULT_NAME

AnyCalibration = TypeVar("AnyCalibration")


class Selection(NamedTuple):
    """What a request selects."""

    calibration: Calibration | None
    statistic: str | None
    """That of the verdict; None for no verdict."""
    names: tuple[str, ...]
    """The statistics to return."""

    @property
    def computed(self) -> tuple[str, ...]:
        """The statistics to compute."""
        return self.names if self.statistic is None else (*self.names, self.statistic)


@dataclass(frozen=True)
class Calibrations(Generic[AnyCalibration]):
    """The calibrations in a model folder, or those that a service describes."""

    by_name: dict[str, AnyCalibration]
    problems: dict[str, str]
    """Why each of the others cannot be used, by name."""

    @property
    def missing_reason(self) -> str:
        """Why there is no default calibration, if there is none."""
        if problem := self.problems.get(DEFAULT_NAME):
            return problem
        if self.by_name:
            return f"this model has no default calibration: choose from {', '.join(self.by_name)}."
        return "this model is not calibrated: run ncml calibrate."

    def select(self, name: str | None) -> AnyCalibration | None:
        """Return a calibration; for None the default one, if there is one. Raises `InputError` for an unknown name."""
        if name is None:
            return self.by_name.get(DEFAULT_NAME)
        if name in self.by_name:
            return self.by_name[name]
        if problem := self.problems.get(name):
            raise InputError("calibration", problem)
        remedy = f"choose from {', '.join(self.by_name)}." if self.by_name else self.missing_reason
        raise InputError("calibration", f"there is no calibration {name!r}: {remedy}")

    def select_statistics(
        self,
        calibration: Calibration | None,
        statistics: Mapping[str, Statistic],
        statistic: str | None,
        names: str | Sequence[str],
        *,
        with_verdict: bool,
    ) -> Selection:
        """Return what a request selects: the given calibration, and statistics that it has.

        statistic, names: those requested, as in `Model.score`.
        """
        if statistic is not None:
            select_names([statistic], statistics, "statistic")
        selected = available(calibration, statistics) if names == "all" else select_names(names, statistics)
        for name in selected if statistic is None else (*selected, statistic):
            if not statistics[name].needs_estimates and name != statistic:
                continue
            field = "statistic" if name == statistic else "statistics"
            if calibration is None:
                raise InputError(field, f"{name} cannot be judged: {self.missing_reason}")
            if name not in calibration.ranked:
                raise InputError(
                    field, f"the calibration {calibration.name} does not have {name}: calibrate the model again."
                )
        if calibration is None or not with_verdict:
            return Selection(calibration, None, selected)
        return Selection(calibration, statistic or calibration.statistic, selected)


def available(calibration: Calibration | None, statistics: Mapping[str, Statistic]) -> tuple[str, ...]:
    """Return the names of a calibration's statistics; without a calibration, of those that need none."""
    return tuple(
        name
        for name, statistic in statistics.items()
        if (not statistic.needs_estimates if calibration is None else name in calibration.ranked)
    )


def read(folder: Path, model_version: str, config: Config) -> Calibrations[Calibration]:
    """Read the calibrations of a model; those that are damaged or belong to another model are explained."""
    path = folder / checkpoint.CALIBRATION
    stored = Calibrations[Calibration]({}, {})
    if not path.is_file():
        return stored
    try:
        entries = storage.read_entries(path)
    except ModelError as error:
        return Calibrations({}, {DEFAULT_NAME: str(error)})
    for name, entry in entries.items():
        try:
            stored.by_name[name] = Calibration.from_json(name, path, entry, model_version, config)
        except ModelError as error:
            stored.problems[name] = str(error)
    return stored
