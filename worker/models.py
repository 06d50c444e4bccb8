"""The models that an engine serves: found in folders, loaded on demand, replaced when their folder changes.

Knows the library's front door, and neither RQ nor Redis.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ncml.config import DEFAULT_SOLVER, SOLVERS, STEPPED_SOLVER
from ncml.errors import ModelError, NcmlError
from ncml.images import PREPROCESSING
from ncml.tiling import Box, Cut
from worker.contract import Batching, Calibration, Histogram, ModelDescriptor, Preprocessing, TileCalibration

log = logging.getLogger("ncml.engine")


class OodLike(Protocol):
    """The verdict on an image."""

    statistic: str
    score: float
    p_value: float
    threshold: float
    is_ood: bool


class ScoreLike(Protocol):
    """What `Model.score` answers for each image."""

    bpd: float
    log_likelihood: float
    map: NDArray[Any] | None
    ood: OodLike | None
    statistics: Mapping[str, float]
    flipped_bpd: float | None


class HistogramLike(Protocol):
    """Counts between edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class CalibrationLike(Protocol):
    """What the verdicts of a model rest on, as in `ncml.calibration.Calibration`."""

    version: str
    statistic: str
    false_positive_rate: float
    thresholds: Mapping[str, float]
    n_fit: int
    n_rank: int
    smallest_p: float
    preprocessing: str
    histograms: Mapping[str, HistogramLike]


class ScanLike(Protocol):
    """What `Model.scan` answers, as in `ncml.tiles.Scan`."""

    score: float
    p_value: float | None
    threshold: float | None
    is_ood: bool | None
    box: Box
    grid: NDArray[Any]
    height: int
    width: int


class TileCalibrationLike(Protocol):
    """What the verdicts on whole pictures rest on, as in `ncml.tiles.TileCalibration`."""

    version: str
    cut: Cut
    false_positive_rate: float
    threshold: float
    n_fit: int
    n_rank: int
    smallest_p: float


class BatchingLike(Protocol):
    """How batches are sampled, as in `ncml.batching.Batching`."""

    @property
    def groups(self) -> Literal["fast", "fixed"]:
        """Fast or fixed groups."""
        ...

    @property
    def check(self) -> Literal["passed", "failed", "error", "skipped"]:
        """The outcome of the check of the fast groups."""
        ...

    @property
    def detail(self) -> str:
        """The reason."""
        ...


class ModelLike(Protocol):
    """The front door of a loaded model, as in `ncml.model.Model`."""

    name: str
    version: str
    height: int
    width: int
    classes: tuple[str, ...]
    noise: float
    keeps: tuple[Any, ...]
    metrics: dict[str, float]
    card: str
    calibration: CalibrationLike | None

    @property
    def tiles(self) -> TileCalibrationLike | None:
        """The calibration of tiles; raises `ModelError` where there is one that cannot be used."""
        ...

    @property
    def batching(self) -> BatchingLike | None:
        """How batches are sampled; the first time, this runs a check."""
        ...

    def score(self, images: NDArray[Any], **options: Any) -> Sequence[ScoreLike]:
        """Score uint8 (B, H, W, 3) images."""
        ...

    def scan(self, picture: NDArray[Any], **options: Any) -> ScanLike:
        """Score a uint8 (H, W, 3) picture in tiles."""
        ...

    def generate(self, n: int, **options: Any) -> NDArray[Any]:
        """Draw uint8 (n, H, W, 3) images."""
        ...

    def complete(self, images: NDArray[Any], **options: Any) -> NDArray[Any]:
        """Complete uint8 (B, H, W, 3) canvases."""
        ...


Load = Callable[..., ModelLike]
"""`load(folder, device=...)`; raises `ModelError` on a bad folder."""

Stamp = tuple[tuple[str, int, int], ...]


@dataclass
class _Entry:
    """A model folder, and what was last found in it."""

    folder: Path
    stamp: Stamp
    descriptor: ModelDescriptor | None = None
    fault: str | None = None


class Shelf:
    """The models under some directories. Where a name occurs twice, the earlier directory counts.

    At most `keep` models stay loaded, the most recently used ones. A batch that holds a model goes on with it while
    the shelf already hands out its successor.

    generates: whether the models are sampled from, which includes a check of their batching when they are loaded.
    """

    def __init__(
        self, directories: Sequence[Path], load: Load, *, device: str, keep: int, generates: bool = False
    ) -> None:
        self._directories = directories
        self._load = load
        self._device = device
        self._keep = keep
        self._generates = generates
        self._entries: dict[str, _Entry] = {}
        self._loaded: OrderedDict[str, ModelLike] = OrderedDict()

    @property
    def descriptors(self) -> tuple[ModelDescriptor, ...]:
        """The models that can be used, by name."""
        return tuple(e.descriptor for _, e in sorted(self._entries.items()) if e.descriptor)

    @property
    def faults(self) -> dict[str, str]:
        """Why the other folders cannot be used."""
        return {name: e.fault for name, e in sorted(self._entries.items()) if e.fault}

    def scan(self) -> bool:
        """Look at the directories and load what is new or changed; True when anything did."""
        found: dict[str, tuple[Path, Stamp]] = {}
        for directory in self._directories:
            for folder in sorted(directory.iterdir()) if directory.is_dir() else []:
                with contextlib.suppress(FileNotFoundError):  # it vanishes while we look
                    if folder.name not in found and (folder / "config.json").is_file():
                        found[folder.name] = folder, _stamp(folder)
        changed = False
        for name in self._entries.keys() - found.keys():
            del self._entries[name]
            self._loaded.pop(name, None)
            changed = True
        for name, (folder, stamp) in found.items():
            entry = self._entries.get(name)
            if entry is None or (entry.folder, entry.stamp) != (folder, stamp):
                served = entry.descriptor if entry else None
                self._entries[name] = _Entry(folder, stamp, served)
                self._open(name)
                changed = True
        return changed

    def get(self, name: str, version: str | None = None) -> ModelLike:
        """A loaded model. Raises `ModelError` when it is not here, damaged, or of another version."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"there is no model {name!r} here; there are {', '.join(sorted(self._entries)) or 'none'}")
        model = self._loaded.get(name) or self._open(name)
        if model is None:
            raise ModelError(f"the model {name!r} cannot be used: {entry.fault}")
        if version is not None and model.version != version:
            raise ModelError(f"version {version[:12]} of {name!r} is gone; the current one is {model.version[:12]}")
        self._loaded.move_to_end(name)
        return model

    def _open(self, name: str) -> ModelLike | None:
        """Load a folder. One that became unusable leaves what was loaded from it before in service."""
        entry = self._entries[name]
        try:
            model = self._load(entry.folder, device=self._device)
        except (NcmlError, OSError) as error:
            entry.fault = str(error)
            if name not in self._loaded:
                entry.descriptor = None
            return self._loaded.get(name)
        entry.fault, entry.descriptor = None, describe(name, model, model.batching if self._generates else None)
        self._loaded[name] = model
        self._loaded.move_to_end(name)
        while len(self._loaded) > self._keep:
            self._loaded.popitem(last=False)
        return model


def describe(name: str, model: ModelLike, batching: BatchingLike | None) -> ModelDescriptor:
    """What a worker publishes about a model."""
    return ModelDescriptor(
        name=name,
        version=model.version,
        height=model.height,
        width=model.width,
        classes=model.classes,
        noise=model.noise,
        keeps=model.keeps,
        solver=DEFAULT_SOLVER,
        stepped_solver=STEPPED_SOLVER,
        solvers=SOLVERS,
        preprocessing=Preprocessing.model_validate(PREPROCESSING),
        calibration=_calibration(model.calibration) if model.calibration else None,
        tiles=_tiles(model),
        batching=Batching(groups=batching.groups, check=batching.check, detail=batching.detail) if batching else None,
        metrics=model.metrics,
        card=model.card,
    )


def _calibration(found: CalibrationLike) -> Calibration:
    return Calibration(
        version=found.version,
        statistic=found.statistic,
        false_positive_rate=found.false_positive_rate,
        threshold=found.thresholds[found.statistic],
        thresholds=dict(found.thresholds),
        n_fit=found.n_fit,
        n_rank=found.n_rank,
        smallest_p=found.smallest_p,
        preprocessing=found.preprocessing,
        histograms={
            name: Histogram(edges=histogram.edges, counts=histogram.counts)
            for name, histogram in found.histograms.items()
        },
    )


def _tiles(model: ModelLike) -> TileCalibration | None:
    try:
        found = model.tiles
    except ModelError as error:  # the model serves all the same; a scan is told the reason
        log.warning("tiles have no calibration: %s", error, extra={"model": model.name})
        return None
    if found is None:
        return None
    return TileCalibration(
        version=found.version,
        height=found.cut.height,
        width=found.cut.width,
        false_positive_rate=found.false_positive_rate,
        threshold=found.threshold,
        n_fit=found.n_fit,
        n_rank=found.n_rank,
        smallest_p=found.smallest_p,
    )


def _stamp(folder: Path) -> Stamp:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
