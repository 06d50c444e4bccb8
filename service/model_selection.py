"""The model of a request: the one that it names, else the default, among those that workers serve."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence

import anyio.to_thread

from ncml.errors import enumerated
from ncml.paths import default_model
from service.http.problems import Problem, invalid_field
from service.params import JobParams, Params
from worker.contract import Task
from worker.descriptors import ModelDescriptor
from worker.monitor import QueueMonitor

MAX_NAMES = 20
"""Names of models in an error message."""


class ModelSelection:
    """Selects models for the routes."""

    def __init__(self, monitor: QueueMonitor, default: str) -> None:
        """default: name of the default model, or "" for that of `ncml.paths.default_model`."""
        self._monitor = monitor
        self._default = default

    async def find(self, params: JobParams, task: Task) -> tuple[ModelDescriptor, str | None]:
        """Return the requested model, and its version if the request names one.

        Raises the 503 `Problem` if no worker serves the task, if the queue refuses what workers publish, or if they may
        serve the model in a moment; 422 for an unknown model or class, and for a model that workers cannot use.
        """
        worker_count, models = await anyio.to_thread.run_sync(self._monitor.service, task.lane)
        if not worker_count:
            if refusal := await anyio.to_thread.run_sync(self._monitor.refusal):  # workers cannot publish either
                raise Problem(503, f"The queue refuses new jobs: {refusal}.", kind="queue-down")
            detail = f"No worker is running for the {task.lane} lane; start one, or retry later."
            raise Problem(503, detail, kind="no-worker")
        if not models:
            detail = "The workers are still loading their models; retry in a few seconds."
            raise Problem(503, detail, kind="no-model")
        model, version = await self.find_in(models, params.model)
        class_name = params.class_name if isinstance(params, Params) else None
        if class_name is not None and class_name not in model.classes:
            remedy = f"its classes are {', '.join(model.classes)}" if model.classes else "it has no classes"
            raise invalid_field("class", f"class: {model.name} has no class {class_name!r}; {remedy}.")
        return model, version

    async def find_in(self, models: Sequence[ModelDescriptor], name: str | None) -> tuple[ModelDescriptor, str | None]:
        """Return what `select` does, but raise the 503 `Problem` for an unknown model while workers load theirs."""
        try:
            return self.select(models, name)
        except Problem as error:
            if error.status != 422:
                raise
            if not await anyio.to_thread.run_sync(self._monitor.has_all_models):
                detail = (
                    f"No worker serves {name!r} yet, but not all workers have published their models; retry in a few "
                    "seconds."
                )
                raise Problem(503, detail, kind="no-model") from error
        faults = await anyio.to_thread.run_sync(self._monitor.faults)
        if fault := faults.get((name or "").partition("@")[0]):
            raise invalid_field("model", f"model: {name!r} cannot be used: {fault}")
        return self.select(await anyio.to_thread.run_sync(self._monitor.models), name)  # they may have loaded it since

    def select(self, models: Sequence[ModelDescriptor], name: str | None) -> tuple[ModelDescriptor, str | None]:
        """Return the model for `name`, `name@version` or a prefix of a version, and the full version if one is given.

        None selects the default model. Of several versions of a name the first in `models` is selected. Raises the 422
        `Problem` for an unknown model, and 503 if the default model is not served.
        """
        reference = name or default_model((model.name for model in models), self._default) or ""
        model_name, at, version = reference.partition("@")
        for model in models:
            if model.name == model_name and model.version.startswith(version) and (not at or len(version) >= 6):
                return model, model.version if at else None
        served = {model.name for model in models}
        if name and model_name not in served and (nearest := difflib.get_close_matches(model_name, served, n=3)):
            question = f"did you mean {' or '.join(nearest)}?"
            raise invalid_field("model", f"model: {reference!r} is not available; {question}")
        names = sorted(served | {f"{model.name}@{model.version[:12]}" for model in models})
        remedy = f"the available models are {enumerated(names, MAX_NAMES)}" if names else "no models are served"
        if not name:
            detail = f"No worker serves {reference!r}, the default model (NCML_DEFAULT_MODEL); {remedy}."
            raise Problem(503, detail, kind="no-model")
        raise invalid_field("model", f"model: {reference!r} is not available; {remedy}.")


class ModelList:
    """The list of all models as JSON, kept until it changes.

    Hundreds of models take megabytes and tenths of a second, and each page of the studio requests them every 5 s.
    """

    def __init__(self, descriptors: Sequence[ModelDescriptor], faults: Mapping[str, str], body: bytes) -> None:
        self._descriptors, self._faults = descriptors, faults
        self.body = body
        self.etag = etag_of(body)

    def is_of(self, descriptors: Sequence[ModelDescriptor], faults: Mapping[str, str]) -> bool:
        """Return whether it was made of these; the monitor returns the same object until a model changes."""
        return self._descriptors is descriptors and self._faults == faults


def etag_of(body: bytes) -> str:
    """Return the `ETag` of a response."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'
