"""Prometheus metrics: counters of the service, and the state of the queue at each scrape."""

import functools
import logging
from collections.abc import Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from worker.contract import Lane, queue_name
from worker.descriptors import WorkerState
from worker.job_results import JobView
from worker.queue import JobQueue

log = logging.getLogger(__name__)

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60)


class Metrics:
    """The metrics of one application, in its own registry.

    The only label values that clients can create are the names of models that they calibrate.
    `lanes` are those that should have workers.
    """

    def __init__(self, queue: JobQueue, lanes: Collection[Lane] = tuple(Lane)) -> None:
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        self.requests = counter("ncml_http_requests_total", "HTTP requests.", ["route", "method", "code"])
        self.request_seconds = Histogram(
            "ncml_http_request_duration_seconds",
            "Seconds from the head of a request to the last byte of its response.",
            ["route", "code"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        submitted = "Jobs submitted to a queue."
        self.enqueued = counter("ncml_jobs_enqueued_total", submitted, ["task", "model", "priority"])
        refused = "Requests refused with status 401, 429 or 503, by the reason."
        self.rejected = counter("ncml_jobs_rejected_total", refused, ["reason"])
        ended = "Jobs that ended while they waited."
        self.finished = counter("ncml_jobs_finished_total", ended, ["task", "model", "outcome"])
        attempts = "Attempts to send the end of a job to its webhook."
        self.webhook_attempts = counter("ncml_webhook_attempts_total", attempts, ["outcome"])
        for outcome in ("delivered", "retried", "failed"):
            self.webhook_attempts.labels(outcome=outcome)
        queue.on_end = self._record_end
        self.registry.register(_QueueState(queue, lanes))

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format. Queries the queue: call it off the event loop."""
        return generate_latest(self.registry)

    def _record_end(self, view: JobView) -> None:
        self.finished.labels(task=view.task, model=view.model_name, outcome=view.status).inc()
        extra = {"job": view.id, "request": view.request_id, "status": view.status}
        if view.error:
            extra |= view.error.for_operators
        log.info("job ended", extra=extra)


class _QueueState(Collector):
    """Collects the state of the queue at each scrape."""

    def __init__(self, queue: JobQueue, lanes: Collection[Lane]) -> None:
        self.queue = queue
        self.lanes = lanes

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registration must not query a server that may be unreachable."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the gauges; only `ncml_redis_up` if the server is unreachable."""
        up = GaugeMetricFamily("ncml_redis_up", "1 if the queue's server is reachable.")
        try:
            gauges = list(self._gauges()) if self.queue.monitor.ping() else []
            up.add_metric([], 1)
        except RedisError as error:
            log.warning("the queue is unreachable: %s", error)
            gauges = []
            up.add_metric([], 0)
        return [up, *gauges]

    def _gauges(self) -> Iterable[Metric]:
        depth = GaugeMetricFamily("ncml_queue_depth", "Waiting jobs.", labels=["queue"])
        age = GaugeMetricFamily(
            "ncml_queue_oldest_age_seconds",
            "Seconds that the oldest waiting job has waited; 0 without one.",
            labels=["queue"],
        )
        for entry in self.queue.monitor.depths():
            name = queue_name(entry.lane, entry.priority)
            depth.add_metric([name], entry.depth)
            age.add_metric([name], entry.oldest_age_s)
        waits = GaugeMetricFamily(
            "ncml_longest_wait_seconds", "Seconds that the oldest waiting job of a kind has waited; 0 without one.",
            labels=["task"],
        )  # fmt: skip
        for task, wait_s in self.queue.monitor.longest_waits().items():
            waits.add_metric([task], wait_s)
        used, limit = self.queue.monitor.memory()
        memory = [
            GaugeMetricFamily("ncml_queue_memory_bytes", "Memory that the queue's server uses.", used),
            GaugeMetricFamily("ncml_queue_memory_limit_bytes", "Limit on this memory; 0 for none.", limit),
        ]
        workers = GaugeMetricFamily("ncml_workers", "Live workers.", labels=["lane", "state"])
        pace = GaugeMetricFamily(
            "ncml_lane_jobs_per_second", "Recent jobs per second of a lane's busy workers.",
            labels=["lane"],
        )  # fmt: skip
        infos = self.queue.monitor.workers()
        for lane in Lane:
            if rate := sum(info.pace.get(lane, 0.0) for info in infos):
                pace.add_metric([lane], rate)
            states = [info.state for info in infos if lane in info.lanes]
            if states or lane in self.lanes:  # zeros would alert operators of a lane that they do not run
                for state in WorkerState:
                    workers.add_metric([lane, state], states.count(state))
        models = GaugeMetricFamily("ncml_model_info", "Served models.", labels=["model", "version"])
        for model in self.queue.monitor.models():
            models.add_metric([model.name, model.version], 1)
        count = self.queue.deliveries.count_all()
        webhooks = GaugeMetricFamily(
            "ncml_webhooks_waiting", "Ends of jobs that their webhooks have not accepted.", count
        )
        return [depth, age, waits, *memory, workers, pace, models, webhooks]
