"""Supervision of the engine: start it, publish the models it serves, replace it when it dies or hangs."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from worker.messages import Catalogue, EngineSettings, Message, Opening
from worker.metrics import WorkerMetrics
from worker.process import EngineDied, EngineProcess
from worker.registry import Quarantine

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""Shortest and longest pause before an engine that never became ready is replaced; it doubles each time."""

log = logging.getLogger("ncml.worker")


class EngineSupervisor:
    """Keeps one engine running. A folder that ends two engines in a row while they load it is not loaded again."""

    def __init__(
        self, settings: EngineSettings, metrics: WorkerMetrics, *, hang_s: float, on_catalogue: Callable[[], None]
    ) -> None:
        self.catalogue: Catalogue = Catalogue((), {})
        self.is_ready = False
        self._settings = settings
        self._metrics = metrics
        self._hang_s = hang_s
        self._on_catalogue = on_catalogue
        self._engine: EngineProcess | None = None
        self._heard_at = self._due = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._opening: Opening | None = None
        self._suspect: Opening | None = None

    @property
    def has_models(self) -> bool:
        """Whether the engine is ready and serves a model."""
        return self.is_ready and bool(self.catalogue.models)

    def ready_engine(self) -> EngineProcess | None:
        """Return the engine once it has loaded its models; start it if there is none.

        None until it is ready, and while it has no model: it would fail every job.
        """
        if self._engine is None:
            if time.monotonic() < self._due:
                return None
            self._engine = EngineProcess(self._settings)
            self._heard_at = time.monotonic()
        try:
            while message := self._engine.receive(0.0 if self.is_ready else 0.2):
                self._heard_at = time.monotonic()
                self.note(message)
        except EngineDied as end:
            self.replace("died", str(end))
            return None
        if self.is_ready:
            return self._engine if self.catalogue.models else None
        if time.monotonic() - self._heard_at > self._hang_s:
            self.replace("hung")
        return None

    def note(self, message: Message) -> None:
        """Process a message that is not about a batch: record which folder is being loaded, or publish a catalogue."""
        self._opening = message if isinstance(message, Opening) else None
        if isinstance(message, Catalogue):
            self._publish(message)

    def _publish(self, catalogue: Catalogue) -> None:
        """Log, measure and publish the models that the engine serves; the first catalogue makes it ready.

        While it is partial, the models of the previous engine that this one has not reached stay published.
        """
        if catalogue.is_partial:
            reached = {model.name for model in catalogue.models} | catalogue.faults.keys()
            unreached = [model for model in self.catalogue.models if model.name not in reached]
            models = sorted([*catalogue.models, *unreached], key=lambda model: model.name)
            pictures = self.catalogue.pictures | catalogue.pictures
            catalogue = replace(catalogue, models=tuple(models), pictures=pictures)
        else:
            self._suspect = None
        served = {model.name: model for model in self.catalogue.models}
        content, published = ((c.models, c.faults, c.is_partial) for c in (catalogue, self.catalogue))
        if self.is_ready and content == published:
            return  # a folder was tried again, with the same outcome
        self._metrics.model_unusable.clear()
        for name, fault in catalogue.faults.items():
            log.error("model cannot be used: %s", fault, extra={"model": name})
            self._metrics.model_unusable.labels(name).set(1)
        if not catalogue.models:
            log.warning("there is no model to serve")
        self._metrics.model_info.clear()
        self._metrics.model_batching.clear()
        for model in catalogue.models:
            batching = model.batching
            fields = {"model": model.name, "version": model.version}
            if model != served.get(model.name):
                log.info("model served", extra=fields | {"batching": batching.model_dump() if batching else None})
            self._metrics.model_info.labels(model.name, model.version).set(1)
            if batching:
                self._metrics.model_batching.labels(model.name, model.version, batching.groups, batching.check).set(1)
        self._metrics.forget_evidence_except({(m.name, name) for m in catalogue.models for name in m.verdicts})
        self._metrics.gpu_memory.set(catalogue.memory_bytes)
        self.catalogue = catalogue
        self.is_ready = True
        self._pause_s = FIRST_PAUSE_S
        self._on_catalogue()

    def replace(self, reason: str, cause: str = "") -> None:
        """Stop the engine, which died of a cause or hung; `ready_engine` starts a new one."""
        assert self._engine is not None
        end = f"{reason} ({cause})" if cause else reason
        log.error("the engine %s; starting another", end, extra={"engine_pid": self._engine.pid})
        self._metrics.engine_restarts.labels(reason).inc()
        self.stop()
        if self._opening and self._opening == self._suspect:
            log.error("model folder is not loaded again: it ended the engine twice: %s", self._opening.folder)
            quarantine = Quarantine(self._opening.stamp, cause or f"it {reason}")
            quarantined = self._settings.quarantined | {self._opening.folder: quarantine}
            self._settings = replace(self._settings, quarantined=quarantined)
        self._suspect, self._opening = self._opening, None
        if not self.is_ready:  # wait longer before each new attempt
            self._due = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self.is_ready = False

    def stop(self) -> None:
        """Kill the engine, if there is one."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None
