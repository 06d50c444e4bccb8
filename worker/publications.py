"""What a worker publishes in the queue: its state, and the models that it serves."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import OutOfMemoryError

from ncml.limits import MAX_SHEET_BYTES
from worker.descriptors import ModelDescriptor, PublishedWorker, WorkerInfo
from worker.redis_keys import WORKERS, descriptor_key, pictures_key, script, serving_key, worker_key

ALIVE_S, SERVING_S = 10.0, 30.0
"""Time to live of the published state, and of the models that a worker serves: jobs for them wait while it restarts."""

log = logging.getLogger("ncml.worker")

CHUNK = 32
"""Descriptors that are stored at once; one has some 30 kB."""


class Publications:
    """Publishes the state of one worker. A model's descriptor is sent only if it is not stored yet.

    The state is published every other second, and every request reads it, but hundreds of descriptors take megabytes.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._name = name
        self._client = client
        self._publish = script(client, "publish")
        self._describe = script(client, "describe")
        self._models: Sequence[ModelDescriptor] = ()
        self._descriptors: dict[str, str] = {}
        """The descriptors of these models as JSON, by digest."""
        self._unusable: set[tuple[str, Path]] = set()
        """Pictures that cannot be published, by digest and file."""

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

    def publish_pictures(self, files: Mapping[str, Path]) -> None:
        """Keep the pictures of these digests stored, and store those that are not, one at a time.

        A file that is missing, damaged or too large is reported once; the model is served without it. Does nothing
        about the others while the server is out of memory: no verdict needs them.
        """
        usable = [(digest, path) for digest, path in files.items() if (digest, path) not in self._unusable]
        pipe = self._client.pipeline(transaction=False)
        for digest, _ in usable:
            pipe.pexpire(pictures_key(digest), int(ALIVE_S * 1000))
        for (digest, path), is_stored in zip(usable, pipe.execute(), strict=True):
            if is_stored:
                continue
            content = _read(path)
            if hashlib.sha256(content).hexdigest() != digest:
                log.warning("%s does not match the detector beside it; its pictures are not shown", path)
                self._unusable.add((digest, path))
                continue
            try:
                self._client.set(pictures_key(digest), content, px=int(ALIVE_S * 1000))
            except OutOfMemoryError:
                return


def _read(path: Path) -> bytes:
    """Return the content of a file, of which a larger one is cut; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_SHEET_BYTES)
    except OSError:
        return b""
