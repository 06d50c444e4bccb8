"""`ncml worker`: one worker process and its engine."""

import contextlib
import math
import os
from pathlib import Path
from typing import Annotated, Literal

from redis.exceptions import RedisError
from tyro.conf import arg

import ncml
from ncml.errors import NcmlError
from ncml.paths import search_path
from ncml.runtime import check_device_name
from ncml.sampling.batching import batching_setting
from worker import logs, traces
from worker.address import AddressError, with_password
from worker.contract import Lane
from worker.messages import EngineSettings
from worker.metrics import WorkerMetrics
from worker.queue import JobQueue, QueueError
from worker.worker import BatchWorker, WorkerSettings

MIN_REDIS = 7
"""The first version whose scripts have flags."""

_MODELS = "(default: those of NCML_MODELS, else ./models and those of this installation)"
_QUEUE = "(default: NCML_REDIS_URL, else redis://localhost:6379/0)"


def load(folder: Path, *, device: str) -> "ncml.Model":
    """Load a model folder in the engine."""
    return ncml.load(folder, device=device)


def _is_set(name: str) -> bool:
    """Return whether an environment variable is 1 or true rather than 0, false or unset; refuse other values."""
    value = os.environ.get(name, "").lower()
    if value not in ("", "0", "false", "1", "true"):
        raise NcmlError(f"{name} must be 1 or 0, not {value!r}")
    return value in ("1", "true")


def _count(name: str, default: int) -> int:
    """Return the number in an environment variable; refuse anything but an integer of at least 1."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise NcmlError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)


def _check_server(queue: JobQueue) -> None:
    """Raise `NcmlError` if the queue's server is too old; a server that does not respond yet is not checked."""
    with contextlib.suppress(RedisError):
        version = str(queue.redis.info("server")["redis_version"])  # of Valkey, the Redis that it is compatible with
        if int(version.partition(".")[0]) < MIN_REDIS:
            raise NcmlError(f"the queue's server is Redis {version}: use Redis {MIN_REDIS} or newer, or Valkey")


def main(
    *,
    lane: tuple[Literal["score", "generate"], ...] = ("score", "generate"),
    models: Annotated[tuple[Path, ...], arg(metavar="FOLDER...", help_behavior_hint=_MODELS)] = (),
    device: Annotated[str, arg(metavar="DEVICE")] = "cpu",
    max_batch: Annotated[int, arg(metavar="COUNT")] = 32,
    window_ms: Annotated[float, arg(metavar="MS")] = 10.0,
    threads: Annotated[int, arg(metavar="COUNT", help_behavior_hint="(default: PyTorch's)")] = 0,
    keep_models: Annotated[int, arg(metavar="COUNT")] = 2,
    redis_url: Annotated[str, arg(metavar="URL", help_behavior_hint=_QUEUE)] = "",
    metrics_port: Annotated[int, arg(metavar="N", help_behavior_hint="(default: none)")] = 0,
    metrics_host: Annotated[str, arg(metavar="ADDRESS", help_behavior_hint="(default: every interface)")] = "0.0.0.0",
    drain_s: Annotated[float, arg(metavar="SECONDS")] = 25.0,
    hang_s: Annotated[float, arg(metavar="SECONDS")] = 300.0,
) -> None:
    """Compute the jobs of one or both lanes. On SIGTERM, finish the running batch and exit with status 0.

    Args:
        lane: Lanes to serve. An engine computes one batch at a time, so separate workers for the lanes
            keep scores quick while images are generated.
        models: Directories of model folders; if two hold the same name, the earlier one takes precedence.
        device: Device to compute on: cpu, cuda or cuda:N.
        max_batch: Maximum number of images computed at once; halved automatically if they do not fit in memory.
        window_ms: Time that a batch less than half full waits for more jobs. If the engine is idle, jobs start at once.
        threads: CPU threads.
        keep_models: Number of models, the most recently used ones, that stay loaded.
        redis_url: Address of the queue.
        metrics_port: Port of the Prometheus metrics.
        metrics_host: Address on which the metrics listen.
        drain_s: Time that the running batch may take after SIGTERM; then its jobs go back to the queue.
        hang_s: Time without a message after which an engine is considered hung and is replaced.
    """
    if not lane:
        raise NcmlError("--lane needs a lane: score, generate or both")
    for name, value in (("max-batch", max_batch), ("keep-models", keep_models)):
        if value < 1:
            raise NcmlError(f"--{name} must be at least 1, not {value}")
    for name, value in (("window-ms", window_ms), ("threads", threads), ("drain-s", drain_s)):
        if not 0 <= value < math.inf:
            raise NcmlError(f"--{name} must be a number of at least 0, not {value}")
    if not hang_s > 0:
        raise NcmlError(f"--hang-s must be more than 0, not {hang_s}")
    if not 0 <= metrics_port < 2**16:
        raise NcmlError(f"--metrics-port must be 0 to 65535, not {metrics_port}")
    check_device_name(device)
    batching_setting()  # refuses an invalid NCML_BATCHING before the engine reads it
    url = redis_url or os.environ.get("NCML_REDIS_URL", "redis://localhost:6379/0")
    try:
        queue = JobQueue.from_url(with_password(url, os.environ.get("NCML_REDIS_PASSWORD_FILE")))
    except AddressError as error:
        raise NcmlError(f"NCML_REDIS_PASSWORD_FILE: {error}") from error
    except QueueError as error:
        raise NcmlError(f"{'--redis-url' if redis_url else 'NCML_REDIS_URL'}: {error}") from error
    _check_server(queue)
    logs.configure()
    metrics = WorkerMetrics()
    if metrics_port:
        try:
            metrics.serve(metrics_host, metrics_port)
        except OSError as error:
            raise NcmlError(f"--metrics-port {metrics_port} cannot be opened: {error.strerror}") from error
    settings = WorkerSettings(
        lanes=tuple(Lane(name) for name in dict.fromkeys(lane)),
        engine=EngineSettings(
            directories=models or tuple(search_path()),
            load=load,
            device=device,
            threads=threads,
            max_batch=max_batch,
            keep_models=keep_models,
            generates="generate" in lane,
            calibrates=_is_set("NCML_ALLOW_CALIBRATION"),
            max_calibrated=_count("NCML_MAX_CALIBRATED_MODELS", EngineSettings.max_calibrated),
        ),
        window_s=window_ms / 1000,
        drain_s=drain_s,
        hang_s=hang_s,
    )
    tracer = traces.make_tracer("ncml-worker")
    try:
        BatchWorker(queue, settings, metrics, tracer).work()
    finally:
        queue.close()
