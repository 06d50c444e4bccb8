"""What the service counts, and what it finds in the queue when it is scraped. A registry for each application."""

import logging
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from worker.contract import Lane, WorkerState, queue_name
from worker.queue import JobQueue, pace_of

log = logging.getLogger(__name__)

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60)


class Metrics:
    """Counters of one application. Label values come from closed sets, whatever clients send."""

    def __init__(self, queue: JobQueue) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ncml_http_requests_total", "HTTP requests.", ["route", "method", "code"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "ncml_http_request_duration_seconds",
            "Seconds from a request's head to its last byte; a 202 leaves its job still to be done.",
            ["route", "code"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.enqueued = Counter(
            "ncml_jobs_enqueued_total", "Jobs put into a queue.", ["task", "model", "priority"], registry=self.registry
        )
        self.rejected = Counter(
            "ncml_jobs_rejected_total", "Requests that became no job.", ["reason"], registry=self.registry
        )
        self.registry.register(_QueueState(queue))

    def exposition(self) -> bytes:
        """Everything in the Prometheus text format. Asks the queue, so call it off the event loop."""
        return generate_latest(self.registry)


class _QueueState(Collector):
    """The queue as it is at the moment of the scrape."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask a server that may be away."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The gauges; only `ncml_redis_up` when the server is away."""
        up = GaugeMetricFamily("ncml_redis_up", "1 when the queue's server answers.")
        try:
            gauges = list(self._gauges()) if self.queue.ping() else []
            up.add_metric([], 1)
        except RedisError as error:
            log.warning("the queue cannot be reached: %s", error)
            gauges = []
            up.add_metric([], 0)
        return [up, *gauges]

    def _gauges(self) -> Iterable[Metric]:
        depth = GaugeMetricFamily("ncml_queue_depth", "Jobs that wait.", labels=["queue"])
        age = GaugeMetricFamily(
            "ncml_queue_oldest_age_seconds", "Seconds that the oldest job has waited; 0 for none.", labels=["queue"]
        )
        for entry in self.queue.depths():
            name = queue_name(entry.lane, entry.priority)
            depth.add_metric([name], entry.depth)
            age.add_metric([name], entry.oldest_age_s)
        workers = GaugeMetricFamily("ncml_workers", "Live workers.", labels=["lane", "state"])
        pace = GaugeMetricFamily(
            "ncml_lane_jobs_per_second", "What a lane's workers did lately while they worked; none before the first.",
            labels=["lane"],
        )  # fmt: skip
        infos = self.queue.workers()
        for lane in Lane:
            if rate := pace_of(infos, lane):
                pace.add_metric([lane], rate)
            for state in WorkerState:
                count = sum(lane in info.lanes and info.state is state for info in infos)
                workers.add_metric([lane, state], count)
        models = GaugeMetricFamily("ncml_model_info", "Models that are served.", labels=["model", "version"])
        for model in self.queue.models():
            models.add_metric([model.name, model.version], 1)
        return [depth, age, workers, pace, models]
