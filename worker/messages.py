"""What a worker and its engine process exchange: settings at the start, then batches, progress and outcomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from worker.contract import Job
from worker.descriptors import ModelDescriptor
from worker.job_results import Calibrated, JobError, ModelRef, Scan, Score
from worker.registry import Load, Quarantine, Stamp


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to set up an engine. `load` must be importable by name in a new process."""

    directories: tuple[Path, ...]
    load: Load
    device: str = "cpu"
    threads: int = 0
    max_batch: int = 32
    keep_models: int = 2
    generates: bool = False
    """Whether it samples images; if so, it describes how."""
    calibrates: bool = False
    """Whether it may write new model folders, in the first of the directories that it can write."""
    max_calibrated: int = 100
    """Maximum number of models that clients have made, in that directory."""
    quarantined: dict[Path, Quarantine] = field(default_factory=dict[Path, Quarantine])
    """Folders that ended two engines in a row while they were loaded; they are not loaded again until they change."""


@dataclass(frozen=True)
class Batch:
    """Jobs that share a batch key, by id."""

    number: int
    jobs: dict[str, Job]


@dataclass(frozen=True)
class Drop:
    """Jobs of a batch whose results are no longer needed."""

    number: int
    ids: frozenset[str]


@dataclass(frozen=True)
class Opening:
    """The engine is about to load a model folder."""

    folder: Path
    stamp: Stamp


@dataclass(frozen=True)
class Catalogue:
    """The models that are served, and why others are not. The first catalogue means that the engine is ready."""

    models: tuple[ModelDescriptor, ...]
    faults: dict[str, str]
    memory_bytes: int = 0
    pictures: dict[str, Path] = field(default_factory=dict[str, Path])
    """Files with pictures of what detectors find and miss, by digest."""
    is_partial: bool = False
    """Whether folders remain that the engine has not described yet; it loads one of them when a job names it."""

    def find(self, model: ModelRef) -> ModelDescriptor | None:
        """Return the descriptor of a model, if it is still served."""
        return next((m for m in self.models if (m.name, m.version) == (model.name, model.version)), None)

    def serves(self, job: Job) -> bool:
        """Return whether the model that a job names is served, in the version that it names, if any."""
        return any(m.name == job.model and job.version in (None, m.version) for m in self.models)


@dataclass(frozen=True)
class Interruption:
    """The engine interrupts a long job, and computes this batch before it resumes."""

    number: int


Previews = dict[str, tuple[int, int, int, bytes]]
"""The current images of some jobs: number, height, width, and uint8 NHWC bytes."""


@dataclass(frozen=True)
class Step:
    """Progress of a batch: previews of some of its jobs; `done` counts the finished images of each job."""

    stage: str
    step: int
    total: int
    done: dict[str, int]
    previews: Previews = field(default_factory=Previews)


@dataclass
class Outcome:
    """The outcome of one job: its results (images as uint8 HWC bytes) or an error; empty if the job was dropped."""

    model: ModelRef | None = None
    scores: list[Score] = field(default_factory=list[Score])
    scan: Scan | None = None
    calibration: Calibrated | None = None
    images: list[bytes] = field(default_factory=list[bytes])
    size: tuple[int, int] = (0, 0)
    error: JobError | None = None
    is_unserved: bool = False
    """Whether the error is that the engine does not serve the model; another worker may."""
    batch_size: int = 0


@dataclass(frozen=True)
class BatchResult:
    """The end of a batch; `stages` holds the seconds spent in each stage."""

    number: int
    outcomes: dict[str, Outcome]
    compute_s: float
    stages: dict[str, float]
    memory_bytes: int = 0


Message = Opening | Catalogue | Interruption | Step | BatchResult
"""What an engine sends."""
