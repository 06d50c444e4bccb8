"""The models that an engine serves: discovered in folders, loaded on demand, replaced when their folder changes.

A folder that cannot be served is listed with its fault, and does not affect the others. Uses `ncml.Model`; must not
import RQ or Redis.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ncml.checkpoint import DETECTOR_PICTURES
from ncml.data.kept_images import are_kept
from ncml.errors import ModelError, NcmlError
from ncml.images import PREPROCESSING
from ncml.options import name_defaults
from ncml.paths import MODEL_NAME_RULE, default_name, is_servable
from worker.descriptors import (
    Batching,
    Calibration,
    DetectorCalibration,
    DetectorPower,
    ModelDescriptor,
    PowerPicture,
    PowerPictures,
    Preprocessing,
    TileCalibration,
)

if TYPE_CHECKING:
    from ncml.model import Model
    from ncml.ood import detector_power
    from ncml.sampling.batching import Batching as BatchingChoice

log = logging.getLogger("ncml.engine")


Load: TypeAlias = "Callable[..., Model]"
"""`load(folder, device=...)`; raises `ModelError` for a folder that cannot be used."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, size, and times of change of the content and of the status (such as permissions) of each file of a folder."""

RETRY_S, MAX_RETRY_S = 5.0, 300.0
"""Pause before a folder is loaded again after a fault that may pass; it doubles each time, up to the second value."""

PUBLISH_S = 2.0
"""How often the models that a scan has described so far are published: hundreds take minutes to describe."""


class Quarantine(NamedTuple):
    """Why a folder is not loaded until it changes."""

    stamp: Stamp
    cause: str
    """What ended the second of two engines that loaded it."""


class ModelNotServed(ModelError):
    """A model, or a version of it, is not served by this registry; another worker may serve it."""


class ModelUnknown(ModelNotServed):
    """There is no such model, or it has another version."""


@dataclass
class _Entry:
    """A model folder and the outcome of its latest load."""

    folder: Path
    stamp: Stamp
    descriptor: ModelDescriptor | None = None
    fault: str | None = None
    pause_s: float = RETRY_S
    retry_at: float = math.inf  # never, by `time.monotonic`

    def matches(self, folder: Path, stamp: Stamp) -> bool:
        """Return whether the entry is about this folder with these files.

        The status of files matters only after a fault, which it may remedy: a backup that makes hard links, or a volume
        whose owner is set again, must not reload every model.
        """
        if self.fault is not None:
            return (self.folder, self.stamp) == (folder, stamp)
        return (self.folder, _contents(self.stamp)) == (folder, _contents(stamp))


class ModelRegistry:
    """The models in some directories. If two hold the same name, the earlier directory takes precedence.

    At most `keep` models stay loaded, the most recently used ones. A running batch keeps the model it started with,
    even after the registry has replaced it.

    generates: whether the models are sampled from, so that their batching is described.
    quarantined: folders that are not loaded until their stamp changes.
    on_open: called with a new or changed folder and its stamp before the folder is loaded.
    on_change: called after a scan that found a change, after the first one, and every `PUBLISH_S` while a scan opens
        many folders.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        load: Load,
        *,
        device: str,
        keep: int,
        generates: bool = False,
        quarantined: Mapping[Path, Quarantine] | None = None,
        on_open: Callable[[Path, Stamp], None] = lambda folder, stamp: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._directories = directories
        self._load = load
        self._device = device
        self._keep = keep
        self._generates = generates
        self._quarantined = quarantined or {}
        self._on_open = on_open
        self._on_change = on_change
        self._entries: dict[str, _Entry] = {}
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._unreadable: set[Path] = set()
        self.is_behind = True
        """Whether some folders are not described yet: until the first scan ends, and after one that was interrupted."""

    @property
    def descriptors(self) -> tuple[ModelDescriptor, ...]:
        """The usable models, sorted by name."""
        return tuple(entry.descriptor for _, entry in sorted(self._entries.items()) if entry.descriptor)

    @property
    def pictures(self) -> dict[str, Path]:
        """The files with pictures of what the detectors among them find and miss, by digest."""
        files: dict[str, Path] = {}
        for entry in self._entries.values():
            detector = entry.descriptor.detector if entry.descriptor else None
            if detector and detector.power and detector.power.pictures:
                files[detector.power.pictures.sha256] = entry.folder / DETECTOR_PICTURES
        return files

    @property
    def faults(self) -> dict[str, str]:
        """Why each of the other folders cannot be used, by name; escaped where a name is not UTF-8."""
        faults = {name: entry.fault for name, entry in sorted(self._entries.items()) if entry.fault}
        return {_encodable(name): _encodable(fault) for name, fault in faults.items()}

    def scan(self, names: Collection[str] | None = None, is_interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Load new and changed folders, and those whose fault may have passed; return whether it loaded or lost any.

        The default model is first. names: restricts this to some folders. After each folder that it loads, the scan
        ends if it `is_interrupted`; the next one continues.
        """
        folders = self._folders()
        changed = is_published = is_behind = False
        published_at = -math.inf
        for name in self._entries.keys() - folders.keys():
            del self._entries[name]
            self._loaded.pop(name, None)
            changed = True
        default = default_name(folders)
        due = [name for name in folders if (names is None or name in names) and self._is_due(name, *folders[name])]
        for index, name in enumerate(sorted(due, key=lambda name: (name != default, name)), start=1):
            entry, (folder, stamp) = self._entries.get(name), folders[name]
            if changed and is_interrupted():
                is_behind = True
                break
            if entry is None or not entry.matches(folder, stamp):
                self._entries[name] = _Entry(folder, stamp, entry.descriptor if entry else None)
            self._on_open(folder, stamp)
            self._open(name)
            changed, is_published = True, False
            if index < len(due) and time.monotonic() - published_at > PUBLISH_S:
                self._on_change()
                is_published, published_at = True, time.monotonic()
        catches_up = names is None and self.is_behind and not is_behind
        if names is None:
            self.is_behind = is_behind
        if catches_up or (changed and not is_published):
            self._on_change()
        return changed

    def _is_due(self, name: str, folder: Path, stamp: Stamp) -> bool:
        """Return whether a folder is new or has changed, or its fault may have passed."""
        entry = self._entries.get(name)
        return entry is None or not entry.matches(folder, stamp) or time.monotonic() >= entry.retry_at

    def check_batching(self) -> None:
        """Find out how one of the loaded models is sampled, which may take a second; for an engine without jobs."""
        for name, model in self._loaded.items() if self._generates else ():
            descriptor = self._entries[name].descriptor
            if not descriptor or not descriptor.generates or descriptor.batching:
                continue
            if model.batching:
                batching = Batching.of(model.batching)
                self._entries[name].descriptor = descriptor.model_copy(update={"batching": batching})
                self._on_change()
                return

    def get(self, name: str, version: str | None = None) -> Model:
        """Return a loaded model; raise `ModelNotServed` if it is missing, damaged, or of another version.

        Scan first for a model that this registry does not have: another worker may have found and published it earlier.
        Before the error, `on_change` is called if the descriptors have changed.
        """
        entry = self._entries.get(name)
        served_version = entry.descriptor.version if entry and entry.descriptor else None
        if entry is None or version not in (None, served_version):
            self.scan({name})
            entry = self._entries.get(name)
        if entry is None:
            names = ", ".join(sorted(self._entries)) or "none"
            raise ModelUnknown(f"there is no model {name!r} here; the models here are {names}")
        descriptor = entry.descriptor
        model = self._loaded.get(name) or self._open(name)
        if entry.descriptor != descriptor:
            self._on_change()
        if model is None:
            raise ModelNotServed(f"the model {name!r} cannot be used: {entry.fault}")
        if version is not None and model.version != version:
            raise ModelUnknown(
                f"version {version[:12]} of {name!r} is no longer served; request {model.version[:12]}, the current one"
            )
        self._loaded[name] = model
        self._loaded.move_to_end(name)
        while len(self._loaded) > self._keep:
            self._loaded.popitem(last=False)
        return model

    def _folders(self) -> dict[str, tuple[Path, Stamp]]:
        """Return the model folders by name, each with a stamp that changes when its files do."""
        folders: dict[str, tuple[Path, Stamp]] = {}
        for directory in self._directories:
            try:
                candidates = sorted(directory.iterdir()) if directory.is_dir() else []
            except OSError as error:
                self._warn_unreadable(directory, error)
                continue
            for folder in candidates:
                try:
                    if folder.name.startswith("."):
                        continue  # it is being written
                    if folder.name not in folders and (folder / "config.json").is_file():
                        folders[folder.name] = folder, _stamp(folder)
                except FileNotFoundError:
                    continue  # removed while it is read
                except OSError as error:
                    self._warn_unreadable(folder, error)
        return folders

    def _warn_unreadable(self, folder: Path, error: OSError) -> None:
        if folder not in self._unreadable:
            self._unreadable.add(folder)
            log.warning("%s is not searched for models: %s", folder, error.strerror)

    def _open(self, name: str) -> Model | None:
        """Load a folder. If that fails, the version loaded before stays in service while it is in memory."""
        entry = self._entries[name]
        try:
            self._check(name, entry)
            model = self._load(entry.folder, device=self._device)
            generates = self._generates and model.sampling_limits.generates
            descriptor = describe(name, model, model.known_batching if generates else None)
        except Exception as error:  # what a folder contains must never end the engine, which serves the others
            if isinstance(error, (NcmlError, OSError)):
                entry.fault = str(error)
            else:
                log.exception("a model folder cannot be loaded", extra={"model": name})
                entry.fault = f"{entry.folder} cannot be loaded: {type(error).__name__}: {error}".splitlines()[0][:300]
            entry.retry_at = math.inf
            if _is_transient(error):
                entry.retry_at = time.monotonic() + entry.pause_s
                entry.pause_s = min(2 * entry.pause_s, MAX_RETRY_S)
            if name not in self._loaded:
                entry.descriptor = None
            return self._loaded.get(name)
        if model.calibration is None and descriptor.detector is None:
            log.warning("no verdicts: %s", model.missing_reason, extra={"model": name})
        entry.fault, entry.descriptor = None, descriptor
        entry.pause_s, entry.retry_at = RETRY_S, math.inf
        if name in self._loaded or len(self._loaded) < self._keep:  # a scan does not evict models that are in use
            self._loaded[name] = model
        return model

    def _check(self, name: str, entry: _Entry) -> None:
        """Raise `ModelError` for a folder that no request could name, and for one in quarantine."""
        if not is_servable(name):
            raise ModelError(f"{entry.folder} cannot be served: {MODEL_NAME_RULE}; rename it")
        quarantine = self._quarantined.get(entry.folder)
        if quarantine and quarantine.stamp == entry.stamp:
            raise ModelError(
                f"loading this folder ended the engine twice ({quarantine.cause}); change the folder, or restart the "
                "worker to try again"
            )


def describe(name: str, model: Model, batching: BatchingChoice | None) -> ModelDescriptor:
    """Return what a worker publishes about a model; raise `ModelError` for a detector that cannot be used."""
    limits = model.sampling_limits
    defaults = asdict(limits.defaults) | {"steps": limits.recommended.get("steps")}
    return ModelDescriptor(
        name=name,
        version=model.version,
        height=model.height,
        width=model.width,
        classes=model.classes,
        noise=limits.max_noise,
        generates=limits.generates,
        keeps=model.keeps,
        **name_defaults(defaults),
        stepped_solver=limits.stepped_solver,
        solvers=dict(limits.solvers),
        preprocessing=Preprocessing.model_validate(PREPROCESSING),
        calibrations={name: Calibration.of(calibration) for name, calibration in model.calibrations.by_name.items()},
        tiles=_tile_calibration(model),
        detector=_detector_calibration(model),
        batching=Batching.of(batching) if batching else None,
        metrics=model.metrics,
        card=model.card,
    )


def _tile_calibration(model: Model) -> TileCalibration | None:
    try:
        calibration = model.tiles
    except ModelError as error:  # the model stays in service; a scan fails with the same reason
        log.warning("tiles are not calibrated: %s", error, extra={"model": model.name})
        return None
    return TileCalibration.of(calibration) if calibration else None


def _detector_calibration(model: Model) -> DetectorCalibration | None:
    calibration = model.load_detector()
    if calibration is None:
        return None
    power = calibration.power
    return DetectorCalibration.of(
        calibration,
        ranking_scenes=calibration.ranks.scenes,
        keeps_images=are_kept(model.folder),
        power=power and _power(power),
    )


def _power(power: detector_power.DetectorPower) -> DetectorPower:
    examples = tuple(
        PowerPicture(kind=kind, size=size, is_found=is_found, **box._asdict())
        for kind, size, is_found, box in power.pictures
    )
    return DetectorPower.of(
        power,
        smallest_found={kind: power.smallest_found(kind) for kind in power.shares},
        pictures=PowerPictures(sha256=power.sheet, examples=examples) if power.sheet else None,
    )


def _stamp(folder: Path) -> Stamp:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    states = [(path.name, path.stat()) for path in files]
    return tuple((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states)


def _contents(stamp: Stamp) -> tuple[tuple[str, int, int], ...]:
    """Return the stamp without the times at which the status of the files changed."""
    return tuple((name, size, mtime_ns) for name, size, mtime_ns, _ in stamp)


def _is_transient(error: Exception) -> bool:
    """Return whether a folder may be usable later without a change, such as when memory becomes free.

    A `ModelError` is about the folder itself, unless the system or PyTorch caused it.
    """
    if not isinstance(error, ModelError):
        return True
    cause = error.__cause__
    return isinstance(cause, OSError | RuntimeError) and not isinstance(cause, RecursionError)


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, as in names of files that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()
