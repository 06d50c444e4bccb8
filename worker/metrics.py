"""The Prometheus metrics of a worker. Each worker serves them on its own port."""

import functools
from collections.abc import Container, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ncml.limits import DETECTOR
from ncml.ood.alarm import FlaggedRateAlarm, alarm_of
from worker.contract import ScoreJob
from worker.descriptors import Calibration, DetectorCalibration, ModelDescriptor
from worker.job_results import JobEnding, Ood, Score

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class WorkerMetrics:
    """The worker's metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry, buckets=_SECONDS)
        self.finished = counter("ncml_jobs_finished_total", "Jobs that ended.", ["task", "model", "outcome"])
        self.retries = counter("ncml_jobs_retries_total", "Jobs put back in their queues.", ["reason"])
        fenced = "Jobs computed here that another worker took, or that had ended already."
        self.fenced = counter("ncml_jobs_fenced_total", fenced)
        self.queue_seconds = histogram("ncml_job_queue_seconds", "From submission to start.", ["task"])
        self.duration_seconds = histogram("ncml_job_duration_seconds", "From start to end.", ["task"])
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch_size = histogram("ncml_batch_size", "Images in a batch.", ["task"], buckets=sizes)
        waiting = "Time spent waiting for more jobs after the first claim."
        self.batch_wait_seconds = histogram("ncml_batch_wait_seconds", waiting, buckets=_SECONDS[:7])
        self.stage_seconds = histogram("ncml_stage_seconds", "Engine time of a batch, by stage.", ["stage"])
        self.images = counter("ncml_images_total", "Images scored or generated.", ["task", "model"])
        self.running = gauge("ncml_jobs_running", "Jobs in the engine.")
        self.state = gauge("ncml_worker_state", "1 for the state of this worker.", ["state"])
        accepted = "Time of the last heartbeat that the queue accepted, in seconds since 1970; 0 before the first."
        self.heartbeat = gauge("ncml_worker_heartbeat_timestamp_seconds", accepted)
        self.model_info = gauge("ncml_model_info", "1 for each model served.", ["model", "version"])
        self.model_unusable = gauge("ncml_model_unusable", "1 for each model folder that cannot be served.", ["model"])
        batching = "1 for how the batches of each model are sampled on this CPU."
        self.model_batching = gauge("ncml_model_batching", batching, ["model", "version", "groups", "check"])
        self.engine_restarts = counter("ncml_engine_restarts_total", "Engines replaced.", ["reason"])
        for reason in ("died", "hung"):  # from 0 on, because `increase` misses the step from no sample to 1
            self.engine_restarts.labels(reason)
        self.gpu_memory = gauge("ncml_gpu_memory_bytes", "Memory held by the engine on its device.")
        bits = (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 10, 12)
        scored = "Bits per dimension of the images scored, without noise."
        self.score_bpd = histogram("ncml_score_bpd", scored, ["model"], buckets=bits)
        verdicts = "Verdicts: in or out of distribution."
        self.ood_verdicts = counter("ncml_ood_verdicts_total", verdicts, ["model", "verdict"])
        ranks = (0.001, 0.005, 0.01, 0.02, 0.05, *(n / 10 for n in range(1, 11)))
        uniform = "p-values of the verdicts: uniform for images like the training ones."
        self.ood_p_value = histogram("ncml_ood_p_value", uniform, ["model"], buckets=ranks)
        self.ood_evidence = gauge(
            "ncml_ood_evidence",
            "Evidence that more images are flagged than the calibration expects; false above 200 with probability 1%.",
            ["model", "calibration"],
        )
        self._alarms: dict[tuple[str, str], tuple[str, FlaggedRateAlarm]] = {}
        """By model and calibration: the calibration's version and its alarm."""

    def count_batch(self, stages: Mapping[str, float], memory_bytes: int) -> None:
        """Count a batch that the engine has computed: the seconds spent in each stage, and the engine's memory."""
        self.gpu_memory.set(memory_bytes)
        for stage, seconds in stages.items():
            self.stage_seconds.labels(stage).observe(seconds)

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

    def count_end(self, task: str, model: str, ending: JobEnding, waited_s: float) -> None:
        """Count the end of a job, and the time that it waited and ran."""
        self.finished.labels(task, model, ending.status).inc()
        self.queue_seconds.labels(task).observe(waited_s)
        if ending.timing and ending.timing.compute_s is not None:
            self.duration_seconds.labels(task).observe(ending.timing.compute_s)

    def _add_evidence(self, model: ModelDescriptor, verdict: Ood) -> None:
        calibration = _reference(model, verdict)
        if calibration is None:
            return
        key = model.name, verdict.calibration
        version, alarm = self._alarms.get(key, ("", None))
        if version != calibration.version:
            is_detector = isinstance(calibration, DetectorCalibration)
            cutoff = calibration.cutoff if is_detector else calibration.false_positive_rate
            alarm = alarm_of(calibration.n_rank, calibration.smallest_p, cutoff)
        if alarm is None:
            return
        self._alarms[key] = calibration.version, alarm
        self.ood_evidence.labels(*key).set(float(alarm.update(verdict.is_ood)))

    def forget_evidence_except(self, calibrations: Container[tuple[str, str]]) -> None:
        """Remove the evidence of calibrations that are no longer served: without verdicts, an alarm would never end."""
        for key in [key for key in self._alarms if key not in calibrations]:
            del self._alarms[key]
            self.ood_evidence.remove(*key)

    def serve(self, host: str, port: int) -> None:
        """Serve the metrics on an address, from a thread."""
        start_http_server(port, host, registry=self.registry)


def _reference(model: ModelDescriptor, verdict: Ood) -> Calibration | DetectorCalibration | None:
    """Return the calibration whose rate a verdict is evidence of; None for another statistic."""
    if verdict.calibration == DETECTOR and model.detector is not None:
        return model.detector
    calibration = model.calibrations.get(verdict.calibration)
    # Verdicts by other statistics, perhaps of the same images, would be dependent: evidence counts each image once.
    return calibration if calibration and verdict.statistic == calibration.statistic else None
