"""The Prometheus metrics of a worker. Each worker serves them on its own port."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ncml.ood.alarm import FlaggedRateAlarm
from worker.contract import ScoreJob
from worker.descriptors import ModelDescriptor
from worker.results import Ending, Ood, Score

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class WorkerMetrics:
    """The worker's metrics, in their own registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.finished = Counter(
            "ncml_jobs_finished_total", "Jobs that ended.", ["task", "model", "outcome"], registry=registry
        )
        self.retries = Counter(
            "ncml_jobs_retries_total", "Jobs put back in their queues.", ["reason"], registry=registry
        )
        self.fenced = Counter(
            "ncml_jobs_fenced_total", "Jobs computed here after another worker took them.", registry=registry
        )
        self.queue_seconds = Histogram(
            "ncml_job_queue_seconds", "From submission to start.", ["task"], buckets=_SECONDS, registry=registry
        )
        self.duration_seconds = Histogram(
            "ncml_job_duration_seconds", "From start to end.", ["task"], buckets=_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "ncml_batch_size", "Images in a batch.", ["task"], buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.batch_wait_seconds = Histogram(
            "ncml_batch_wait_seconds", "Time spent waiting for more jobs after the first claim.", buckets=_SECONDS[:7],
            registry=registry,
        )  # fmt: skip
        self.stage_seconds = Histogram(
            "ncml_stage_seconds", "Engine time of a batch, by stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("ncml_images_total", "Images scored or generated.", ["task", "model"], registry=registry)
        self.running = Gauge("ncml_jobs_running", "Jobs in the engine.", registry=registry)
        self.state = Gauge("ncml_worker_state", "1 for the state of this worker.", ["state"], registry=registry)
        self.model_info = Gauge("ncml_model_info", "1 for each model served.", ["name", "version"], registry=registry)
        self.model_batching = Gauge(
            "ncml_model_batching", "1 for how the batches of each model are sampled on this CPU.",
            ["name", "version", "groups", "check"], registry=registry,
        )  # fmt: skip
        self.engine_restarts = Counter("ncml_engine_restarts_total", "Engines replaced.", ["reason"], registry=registry)
        self.gpu_memory = Gauge("ncml_gpu_memory_bytes", "Memory held by the engine on its device.", registry=registry)
        self.score_bpd = Histogram(
            "ncml_score_bpd", "Bits per dimension of the images scored, without noise.", ["model"],
            buckets=(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 10, 12), registry=registry,
        )  # fmt: skip

        self.ood_verdicts = Counter(
            "ncml_ood_verdicts_total", "Verdicts: in or out of distribution.", ["model", "verdict"],
            registry=registry,
        )  # fmt: skip
        self.ood_p_value = Histogram(
            "ncml_ood_p_value", "p-values of the verdicts: uniform for images like the training ones.", ["model"],
            buckets=(0.001, 0.005, 0.01, 0.02, 0.05, *(n / 10 for n in range(1, 11))), registry=registry,
        )  # fmt: skip

        self.ood_evidence = Gauge(
            "ncml_ood_evidence",
            "Evidence that more images are flagged than the calibration expects; false above 200 with probability 1 %.",
            ["model", "calibration"], registry=registry,
        )  # fmt: skip
        self._alarms: dict[tuple[str, str], tuple[str, FlaggedRateAlarm]] = {}
        """By model and calibration: the calibration's version and its alarm."""

    def count_scores(self, job: ScoreJob, scores: Sequence[Score], model: ModelDescriptor | None) -> None:
        """Count the scores and verdicts of a job; `model` is the one that computed them, if it is still served."""
        for score in scores:
            if job.noise == 0:
                self.score_bpd.labels(job.model).observe(score.bpd)
            if score.ood:
                self.ood_verdicts.labels(job.model, "out" if score.ood.is_ood else "in").inc()
                self.ood_p_value.labels(job.model).observe(score.ood.p_value)
                if model is not None:
                    self._add_evidence(model, score.ood)

    def count_end(self, task: str, model: str, ending: Ending, waited_s: float) -> None:
        """Count the end of a job, and the time that it waited and ran."""
        self.finished.labels(task, model, ending.status).inc()
        self.queue_seconds.labels(task).observe(waited_s)
        if ending.timing and ending.timing.compute_s is not None:
            self.duration_seconds.labels(task).observe(ending.timing.compute_s)

    def _add_evidence(self, model: ModelDescriptor, verdict: Ood) -> None:
        calibration = model.calibrations.get(verdict.calibration)
        if calibration is None:
            return
        key = model.name, verdict.calibration
        version, alarm = self._alarms.get(key, ("", None))
        if alarm is None or version != calibration.version:
            alarm = FlaggedRateAlarm(calibration.n_rank, calibration.false_positive_rate)
            self._alarms[key] = calibration.version, alarm
        self.ood_evidence.labels(*key).set(float(alarm.update(verdict.is_ood)))

    def serve(self, port: int) -> None:
        """Serve the metrics on every interface, from a thread."""
        start_http_server(port, registry=self.registry)
