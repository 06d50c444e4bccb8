"""A model with the interface of `ncml.Model` whose costs and faults can be configured.

Its folder holds a config.json with the costs (default: 50 ms a batch, 2 ms an image); class names decide a job's fate.
An actual engine process runs it.

    python tests/worker/synthetic.py URL MODELS LANE[,LANE] [FIELD=SECONDS ...]    a worker with such models
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncml.errors import InputError, ModelError
from ncml.images.tiling import Box, Tiling
from ncml.options import ScoreOptions
from ncml.progress import OnProgress, Progress
from ncml.sampling.defaults import SamplingLimits

HEIGHT = WIDTH = 8


@dataclass
class Ood:
    statistic: str
    score: float
    p_value: float
    threshold: float
    is_ood: bool
    calibration: str = "default"
    is_weak: bool = False
    calibration_version: str = ""


@dataclass
class Score:
    bpd: float
    log_likelihood: float
    map: np.ndarray | None
    ood: Ood | None
    statistics: dict[str, float]
    flipped_bpd: float | None
    detection: None = None


@dataclass
class Histogram:
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass
class Calibration:
    """Calls an image out-of-distribution if its mean is above 128; the p-value falls from 1 to 0.01 with the mean."""

    version: str = "c0" * 32
    name: str = "default"
    statistic: str = "mean"
    false_positive_rate: float = 0.5
    thresholds: dict[str, float] = field(default_factory=lambda: {"mean": 128.0, "bpd": 4.0})
    n_fit: int = 20
    n_rank: int = 99
    smallest_p: float = 0.01
    tolerate: tuple[str, ...] = ()
    weakness: str = ""
    power: None = None
    preprocessing: str = "centre-crop-bicubic v1"
    histograms: dict[str, Histogram] = field(default_factory=lambda: {"bpd": Histogram((0.0, 4.0, 8.0), (50, 49))})

    @property
    def threshold(self) -> float:
        return self.thresholds[self.statistic]

    def judge(self, statistic: str, value: float) -> Ood:
        p_value = max(self.smallest_p, 1 - value / 255)
        threshold = self.thresholds[statistic]
        return Ood(
            statistic, value, p_value, threshold, bool(value > threshold), self.name, bool(self.weakness), self.version
        )


@dataclass
class Calibrations:
    by_name: dict[str, Calibration]


@dataclass
class TileCalibration:
    """Calls an image out-of-distribution if the mean of a tile is above 128."""

    version: str = "71" * 32
    height: int = HEIGHT
    width: int = WIDTH
    overlap: float = 0.5
    false_positive_rate: float = 0.05
    threshold: float = 128.0
    thresholds: dict[str, float] = field(default_factory=lambda: {"worst_tile": 128.0})
    n_fit: int = 8
    n_rank: int = 20
    smallest_p: float = 1 / 21
    weakness: str = ""


@dataclass
class Batching:
    groups: str = "fixed"
    check: str = "failed"
    detail: str = "it is synthetic."


@dataclass
class Scan:
    score: float
    p_value: float | None
    threshold: float | None
    is_ood: bool | None
    box: Box
    grid: np.ndarray
    tile: Tiling
    height: int
    width: int
    view: str = "worst_tile"
    views: dict[str, object] = field(default_factory=dict)
    is_weak: bool | None = None
    calibration_version: str | None = None


class SyntheticModel:
    """Images depend on the seed and the version only, scores on the pixels and the noise."""

    height, width = HEIGHT, WIDTH
    noise = 10.0
    keeps = ("top",)
    batching = Batching()
    known_batching = None
    missing_reason = "this model is not calibrated."
    detector = None
    classes = ("good", "lethal", "bad", "hungry", "stuck", "slow", "gated")

    def __init__(self, folder: Path) -> None:
        text = (folder / "config.json").read_text()
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ModelError(f"{folder.name}/config.json is not JSON") from error
        self.name, self.version = folder.name, hashlib.sha256(text.encode()).hexdigest()
        self.batch_s, self.image_s = config.get("batch_s", 0.05), config.get("image_s", 0.002)
        self.rows, self.fits = config.get("rows", 10), config.get("fits", 10**6)
        self.sampling_limits = SamplingLimits(max_noise=self.noise, generates=config.get("generates", True))
        self.metrics = {"test_bpd": 3.5}
        self.card = f"# {self.name}"
        self.calibration = Calibration() if config.get("calibrated", True) else None
        weak = Calibration(
            version="c1" * 32, name="weak", n_rank=19, smallest_p=0.05, weakness="it ranks among 19 images"
        )
        self.calibrations = Calibrations({"default": self.calibration, "weak": weak} if self.calibration else {})
        self.tiled = config.get("tiled", False)
        self.gates = Path(config["gates"]) if "gates" in config else None

    def _pass_gate(self, name: str, report: Callable[[], bool]) -> None:
        """Report progress until the gate is open, or all images are dropped: `report` returns whether."""
        while self.gates and not (self.gates / name).exists() and not report():
            time.sleep(0.005)

    def _meet(self, n: int, classes: Sequence[str | None] | None) -> None:
        for name in classes or ():
            if name == "lethal":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "bad":
                raise InputError("class", "this class cannot be computed")
            if name == "hungry":
                raise MemoryError
            if name == "stuck":
                time.sleep(3600)
        if n > self.fits:
            raise MemoryError

    def _work(
        self, n: int, classes: Sequence[str | None] | None, callback: OnProgress, dropped: Collection[int]
    ) -> None:
        self._meet(n, classes)
        slow = 20 if classes and "slow" in classes else 1
        for row in range(self.rows):
            time.sleep(slow * (self.batch_s + self.image_s * (n - len(dropped))) / self.rows)
            images = np.full((n, HEIGHT, WIDTH, 3), row, np.uint8)
            progress = Progress("noisy_sampling", row + 1, self.rows, preview=lambda images=images: images)

            def report(progress: Progress = progress) -> bool:
                callback(progress)
                return len(dropped) == n

            if report():
                break
            if "gated" in (classes or ()):
                self._pass_gate("images", report)

    def score(
        self,
        images: np.ndarray,
        *,
        classes: Sequence[str | None] | None,
        statistics: Sequence[str] | str,
        batch_size: int,
        callback: OnProgress,
        **options: Any,
    ) -> list[Score]:
        """Score images by their mean with `ncml.options.ScoreOptions`; one that is not used below changes nothing."""
        given = ScoreOptions(**options)
        statistic = given.statistic
        n = len(images)
        assert n <= batch_size
        self._meet(n, classes)
        slow = 20 if classes and "slow" in classes else 1
        for row in range(self.rows):
            time.sleep(slow * (self.batch_s + self.image_s * n) / self.rows)
            callback(Progress("score", n * (row + 1) // self.rows, n))
        scores: list[Score] = []
        for mean, name in zip(images.reshape(n, -1).mean(1).tolist(), classes or [None] * n, strict=True):
            values = {"mean": mean, "bpd": mean / 32}
            selected = self.calibrations.by_name.get(given.calibration or "default") if given.ood else None
            scores.append(
                Score(
                    bpd=mean / 32 + given.noise + len(name or "") / 64,
                    log_likelihood=-mean,
                    map=np.full((HEIGHT, WIDTH), mean, np.float32) if given.map else None,
                    ood=selected.judge(statistic or selected.statistic, values[statistic or selected.statistic])
                    if selected
                    else None,
                    statistics=values if statistics == "all" else {name: values[name] for name in statistics},
                    flipped_bpd=mean / 32 + 0.5 if given.sanity else None,
                )
            )
        return scores

    def load_detector(self) -> None:
        return None

    @property
    def tiles(self) -> TileCalibration | None:
        if self.tiled == "damaged":
            raise ModelError(f"{self.name}/calibration-tiles.json is damaged")
        return TileCalibration() if self.tiled else None

    def scan(self, image: np.ndarray, *, tile_size: int | None, batch_size: int, callback: OnProgress) -> Scan:
        """Score each tile by its mean; each batch of tiles takes `batch_s`."""
        calibration = self.tiles
        tile = Tiling.resolve(
            HEIGHT, WIDTH, tile_size, Tiling(calibration.height, calibration.width) if calibration else None
        )
        H, W = image.shape[:2]
        corners = tile.corners(H, W)
        for done in range(0, len(corners), batch_size):
            self._meet(min(batch_size, len(corners) - done), None)
            time.sleep(self.batch_s)
            progress = Progress("tiles", min(done + batch_size, len(corners)), len(corners))
            callback(progress)
            self._pass_gate("scan", lambda progress=progress: callback(progress) is not None)
        means = [image[top : top + tile.height, left : left + tile.width].mean() for top, left in corners]
        at = int(np.argmax(means))
        (top, left), worst = corners[at], float(means[at])
        judged = (0.5, calibration.threshold, worst > calibration.threshold) if calibration else (None, None, None)
        grid = np.array(means, np.float32).reshape(tile.grid_shape(H, W))
        return Scan(worst, *judged, Box(left, top, tile.width, tile.height), grid, tile, H, W)

    def generate(self, n: int, **options: Any) -> np.ndarray:
        dropped = options["dropped"]
        self._work(n, options["classes"], options["callback"], dropped)
        return np.stack([self._image(seed, i in dropped) for i, seed in enumerate(options["seeds"])])

    def complete(self, images: np.ndarray, *, keep: str, **options: Any) -> np.ndarray:
        if keep not in self.keeps:
            raise InputError("keep", f"this model completes {', '.join(self.keeps)} only")
        completed = self.generate(len(images), **options)
        completed[:, : HEIGHT // 2] = images[:, : HEIGHT // 2]
        return completed

    def _image(self, seed: int, black: bool) -> np.ndarray:
        if black:
            return np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        generator = np.random.default_rng([seed, int(self.version[:8], 16)])
        return generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def load(folder: Path, *, device: str) -> SyntheticModel:
    if folder.name == "lethal":
        os.kill(os.getpid(), signal.SIGKILL)
    while folder.name == "withheld" and not (folder / "released").exists():
        time.sleep(0.01)
    return SyntheticModel(folder)


def write_model(directory: Path, name: str = "synthetic", **config: Any) -> Path:
    """Write a model folder: batch_s, image_s (seconds), rows (callbacks a batch), fits (images that memory holds),
    calibrated, tiled (whether tiles are calibrated, or "damaged"), gates (a folder of files: a scan waits after each
    batch of tiles until there is `scan`, images of the class `gated` after each row until there is `images`).
    """
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.tmp"
    partial.write_text(json.dumps(config))
    partial.replace(folder / "config.json")
    return folder


def serve(url: str, models: str, lanes: str, *options: str) -> None:
    from worker import logs
    from worker.contract import Lane
    from worker.messages import EngineSettings
    from worker.metrics import WorkerMetrics
    from worker.queue import JobQueue
    from worker.worker import BatchWorker, WorkerSettings

    logs.configure()
    values = {name: float(value) for name, _, value in (option.partition("=") for option in options)}
    engine = EngineSettings(directories=(Path(models),), load=load, max_batch=int(values.pop("max_batch", 16)))
    settings = WorkerSettings(lanes=tuple(map(Lane, lanes.split(","))), engine=engine)
    metrics = WorkerMetrics()
    if port := int(values.pop("metrics_port", 0)):
        metrics.serve("127.0.0.1", port)
    queue = JobQueue.from_url(url)
    BatchWorker(queue, replace(settings, **values), metrics).work()
    queue.close()


if __name__ == "__main__":
    # the engine imports `load` by its module name, which must not be __main__
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.worker import synthetic

    synthetic.serve(*sys.argv[1:])
