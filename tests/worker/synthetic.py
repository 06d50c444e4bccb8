"""A model with the library's front door whose cost and faults are set: 50 ms a batch and 2 ms an image by default.

Its folder holds a config.json with the costs; its class names decide a job's fate. A real engine process runs it.

    python tests/worker/synthetic.py URL MODELS LANE[,LANE] [FIELD=SECONDS ...]    a worker with such models
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncml.errors import InputError, ModelError

HEIGHT = WIDTH = 8


@dataclass
class Score:
    bpd: float
    log_likelihood: float
    map: np.ndarray | None


@dataclass
class Progress:
    stage: str
    step: int
    total: int
    pictures: np.ndarray

    def preview(self) -> np.ndarray:
        return self.pictures


class SyntheticModel:
    """Pictures are a function of the seed and the version alone, scores of the pixels and the noise."""

    height, width = HEIGHT, WIDTH
    noise = 10.0
    keeps = ("top",)
    classes = ("good", "lethal", "bad", "hungry", "stuck", "slow")

    def __init__(self, folder: Path) -> None:
        text = (folder / "config.json").read_text()
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise ModelError(f"{folder.name}/config.json is not JSON") from error
        self.name, self.version = folder.name, hashlib.sha256(text.encode()).hexdigest()
        self.batch_s, self.image_s = config.get("batch_s", 0.05), config.get("image_s", 0.002)
        self.rows, self.fits = config.get("rows", 10), config.get("fits", 10**6)
        self.metrics = {"test_bpd": 3.5}
        self.card = f"# {self.name}"
        self.seen: list[int] = []

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

    def _work(self, n: int, classes: Sequence[str | None] | None, callback: Callable[[Any], Any] | None) -> set[int]:
        self._meet(n, classes)
        slow = 20 if classes and "slow" in classes else 1
        dropped: set[int] = set()
        for row in range(self.rows):
            time.sleep(slow * (self.batch_s + self.image_s * (n - len(dropped))) / self.rows)
            if callback:
                pictures = np.full((n, HEIGHT, WIDTH, 3), row, np.uint8)
                dropped |= set(callback(Progress("noisy_sampling", row + 1, self.rows, pictures)) or ())
                if len(dropped) == n:
                    break
        return dropped

    def score(
        self, images: np.ndarray, *, classes: Sequence[str | None] | None = None, noise: float = 0.0, map: bool = False
    ) -> list[Score]:
        self._work(len(images), classes, None)
        means = images.reshape(len(images), -1).mean(1)
        return [Score(m / 32 + noise, -m, np.full((HEIGHT, WIDTH), m, np.float32) if map else None) for m in means]

    def generate(self, n: int, **options: Any) -> np.ndarray:
        dropped = self._work(n, options["classes"], options["callback"])
        return np.stack([self._picture(seed, i in dropped) for i, seed in enumerate(options["seeds"])])

    def complete(self, images: np.ndarray, *, keep: str, **options: Any) -> np.ndarray:
        if keep not in self.keeps:
            raise InputError("keep", f"this model completes {', '.join(self.keeps)} only")
        pictures = self.generate(len(images), **options)
        pictures[:, : HEIGHT // 2] = images[:, : HEIGHT // 2]
        return pictures

    def _picture(self, seed: int, black: bool) -> np.ndarray:
        if black:
            return np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        generator = np.random.default_rng([seed, int(self.version[:8], 16)])
        return generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def load(folder: Path, *, device: str) -> SyntheticModel:
    return SyntheticModel(folder)


def write_model(directory: Path, name: str = "synthetic", **config: Any) -> Path:
    """Make a model folder: batch_s, image_s (seconds), rows (callbacks a batch), fits (images that memory holds)."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.tmp"
    partial.write_text(json.dumps(config))
    partial.replace(folder / "config.json")
    return folder


def serve(url: str, models: str, lanes: str, *options: str) -> None:
    from worker import logs
    from worker.contract import Lane
    from worker.engine import EngineSettings
    from worker.queue import JobQueue
    from worker.worker import GpuWorker, WorkerSettings

    logs.configure()
    given = {name: float(value) for name, _, value in (option.partition("=") for option in options)}
    engine = EngineSettings(directories=(Path(models),), load=load, max_batch=int(given.pop("max_batch", 16)))
    settings = WorkerSettings(lanes=tuple(map(Lane, lanes.split(","))), engine=engine)
    queue = JobQueue.from_url(url)
    GpuWorker(queue, replace(settings, **given)).work()
    queue.close()


if __name__ == "__main__":
    # the engine imports `load` by its module's name, so it must not live in __main__
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.worker import synthetic

    synthetic.serve(*sys.argv[1:])
