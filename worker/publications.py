"""What a worker publishes in the queue: its state, and the models that it serves."""

import hashlib
from collections.abc import Sequence
from typing import Any

from worker.descriptors import ModelDescriptor, PublishedWorker, WorkerInfo
from worker.keys import WORKERS, descriptor_key, script, serving_key, worker_key

ALIVE_S, SERVING_S = 10.0, 30.0
"""Time to live of the published state, and of the models that a worker serves: jobs for them wait while it restarts."""

CHUNK = 32
"""Descriptors that are stored at once; one has some 30 kB."""


class Publications:
    """Publishes the state of one worker. A model's descriptor is sent only if it is not stored yet.

    The state is published every other second, and every request reads it, but hundreds of descriptors take megabytes.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._name = name
        self._publish = script(client, "publish")
        self._describe = script(client, "describe")
        self._models: Sequence[ModelDescriptor] = ()
        self._descriptors: dict[str, str] = {}
        """The descriptors of these models as JSON, by digest."""

    def publish(self, info: WorkerInfo, models: Sequence[ModelDescriptor]) -> None:
        """Publish the state of the worker with the models that it serves."""
        if models is not self._models:
            texts = [model.model_dump_json() for model in models]
            self._descriptors = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
            self._models = models
        published = PublishedWorker(info=info, descriptors=tuple(self._descriptors)).model_dump_json()
        names = [name for model in models for name in (model.name, f"{model.name}@{model.version}")]
        keys = [worker_key(self._name), WORKERS, *(serving_key(lane, self._name) for lane in info.lanes)]
        args = [self._name, published, int(ALIVE_S * 1000), int(SERVING_S * 1000), len(names), *names]
        args += self._descriptors
        missing = [digest.decode() for digest in self._publish(keys=keys, args=args)]
        for start in range(0, len(missing), CHUNK):
            digests = missing[start : start + CHUNK]
            self._describe(
                keys=[descriptor_key(digest) for digest in digests],
                args=[int(ALIVE_S * 1000), *(self._descriptors[digest] for digest in digests)],
            )
        if missing:
            self._publish(keys=keys, args=args)
