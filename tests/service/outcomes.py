"""What the worker of these tests serves, and the outcomes of its jobs, which follow from their input.

The bpd of an image and each of its statistics are the mean of its pixels; with flipped bits bpd is 1 more. The score of
a tile is the mean of its pixels, too. A generated image has the grey level seed modulo 256; a completion is its canvas
with 7 in the lower half.
"""

import numpy as np

from ncml.images import open_image, reduced_jpeg
from ncml.images.tiling import Tiling
from worker.contract import CalibrateJob, CompleteJob, Job, Lane, Original, ScanJob, ScoreJob, UpdateJob
from worker.descriptors import (
    Calibration,
    DetectorCalibration,
    DetectorPower,
    Histogram,
    ModelDescriptor,
    PowerPicture,
    PowerPictures,
    Preprocessing,
    TileCalibration,
    WorkerInfo,
    WorkerState,
)
from worker.job_results import (
    Box,
    Calibrated,
    Detection,
    ModelRef,
    Ood,
    ReviewCounts,
    Scan,
    Score,
    Timing,
    ViewDetection,
    ViewVerdict,
)
from worker.messages import Outcome

CALIBRATION = Calibration(
    version="c0" * 32,
    statistic="multiscale",
    false_positive_rate=0.05,
    threshold=100,
    thresholds={"multiscale": 100, "bpd": 50},
    n_fit=20,
    n_rank=99,
    smallest_p=0.01,
    preprocessing="centre-crop-bicubic v1",
    histograms={"bpd": Histogram(edges=(0, 50, 100), counts=(60, 39))},
)
WEAK = CALIBRATION.model_copy(
    update={"thresholds": {"multiscale": 200}, "threshold": 200, "weakness": "it ranks among 19 images"}
)
MODEL = ModelDescriptor(
    name="tiny",
    version="a1" * 32,
    height=8,
    width=8,
    classes=("cat", "dog"),
    noise=10.0,
    keeps=("top",),
    solver="tweedie",
    stepped_solver="heun",
    solvers={"heun": 10, "tweedie": 1},
    preprocessing=Preprocessing(name="centre-crop-bicubic", version=1),
    calibrations={"default": CALIBRATION, "weak": WEAK},
    tiles=TileCalibration(
        version="71" * 32,
        height=8,
        width=8,
        false_positive_rate=0.05,
        threshold=100,
        n_fit=8,
        n_rank=20,
        smallest_p=0.048,
    ),
    metrics={"test_bpd": 3.5},
    card="# tiny",
)
DETECTOR = DetectorCalibration(
    version="de" * 32,
    false_positive_rate=0.05,
    confidence=None,
    cutoff=0.05,
    rate_bound=0.09,
    threshold=100,
    smallest_p=0.05,
    n_fit=12,
    n_rank=28,
    estimation_scenes=12,
    ranking_scenes=19,
    descriptions={"features": "patches are compared at 448x448"},
    power=DetectorPower(
        images=4,
        shares={"scratch": {"1 pixel wide": 0.25, "3 pixels wide": 1.0}},
        smallest_found={"scratch": "3 pixels wide"},
        foreign={"one colour": 1.0},
        pictures=PowerPictures(
            sha256="c0" * 32,
            examples=(
                PowerPicture(
                    kind="scratch", size="1 pixel wide", is_found=False, left=8, top=32, width=144, height=144
                ),
            ),
        ),
    ),
)
INFO = WorkerInfo(
    name="w1",
    lanes=(Lane.SCORE, Lane.GENERATE),
    state=WorkerState.IDLE,
    models=(ModelRef(name=MODEL.name, version=MODEL.version),),
    started_at=0,
)
TIMING = Timing(queue_s=0.001, compute_s=0.002, batch_size=1)


def outcome(job: Job, model: ModelDescriptor) -> Outcome:
    """Return what the engine of a worker would return."""
    if isinstance(job, ScoreJob):
        return Outcome(scores=[_score(job, index, model) for index in range(job.n)])
    if isinstance(job, ScanJob):
        return Outcome(scan=_scan(job, model))
    if isinstance(job, CalibrateJob):
        n_rank = job.images - 20
        return Outcome(calibration=Calibrated(n_fit=20, n_rank=n_rank, smallest_p=0.05, summary="It is."))
    if isinstance(job, UpdateJob):
        good, defective = len(job.reviewed), len(job.defective)
        counts = dict.fromkeys(("defective", "found", "added", "found_added"), defective)
        reviews = ReviewCounts(good=good, still_flagged=0, found_before=0, **counts)
        return Outcome(
            calibration=Calibrated(n_fit=12 + good, n_rank=28, smallest_p=0.05, summary="It is.", reviews=reviews)
        )
    if isinstance(job, CompleteJob):
        canvas = np.frombuffer(job.image.data, np.uint8).reshape(8, 8, 3).copy()
        canvas[4:] = 7
        return Outcome(images=[canvas.tobytes()] * job.n, size=(8, 8))
    return Outcome(images=[bytes([seed % 256]) * (8 * 8 * 3) for seed in job.seeds], size=(8, 8))


def _score(job: ScoreJob, index: int, model: ModelDescriptor) -> Score:
    pixels = np.frombuffer(job.images[index].data, np.uint8)
    mean = float(pixels.mean())
    names = ("multiscale", "bpd") if job.statistics == "all" else job.statistics
    return Score(
        bpd=mean,
        log_likelihood=-1.0,
        map=pixels.reshape(8, 8, 3).mean(-1).astype("<f4").tobytes() if job.map else None,
        ood=_verdict(job, mean, model),
        statistics=dict.fromkeys(names, mean),
        flipped_bpd=mean + 1 if job.sanity else None,
        detection=_detection(job.originals[index], mean, job.map) if job.originals else None,
    )


def _verdict(job: ScoreJob, score: float, model: ModelDescriptor) -> Ood | None:
    if job.originals:
        return Ood(
            statistic="places",
            score=score,
            p_value=0.5,
            threshold=DETECTOR.threshold,
            is_ood=score > DETECTOR.threshold,
            calibration="detector",
            calibration_version=DETECTOR.version,
        )
    if not job.ood or not model.default_calibration:
        return None
    calibration = model.calibrations[job.calibration or "default"]
    name = job.statistic or calibration.statistic
    threshold = calibration.thresholds[name]
    return Ood(
        statistic=name,
        score=score,
        p_value=0.5,
        threshold=threshold,
        is_ood=score > threshold,
        calibration=job.calibration or "default",
        calibration_version=calibration.version,
        is_weak=bool(calibration.weakness),
    )


def _detection(original: Original, score: float, with_map: bool) -> Detection:
    """Return the verdict of the view `places`, whose map falls from the top left over the upper half."""
    height, width = original.height, original.width
    box = Box(left=0, top=0, width=width // 2, height=height // 4)
    return Detection(
        height=height,
        width=width,
        view="places",
        score=score,
        p_value=0.5,
        threshold=DETECTOR.threshold,
        is_ood=score > DETECTOR.threshold,
        is_weak=False,
        box=box,
        views={
            "places": ViewDetection(score=2 * score, standardised=score, part=score, box=box),
            "appearance": ViewDetection(score=1.5, standardised=-1.0, part=0.0, box=box),
        },
        at_least_as_unusual=3,
        ranking_images=DETECTOR.n_rank,
        calibration_version=DETECTOR.version,
        covered=Box(left=0, top=0, width=width, height=height // 2),
        differences=("it is grey, and no good image is",),
        rows=1,
        columns=2,
        grid=np.array([2.5, 0.5], "<f4").tobytes() if with_map else None,
        backdrop=reduced_jpeg(np.full((height, width, 3), 200, np.uint8), 64, "L") if with_map else None,
    )


def _scan(job: ScanJob, model: ModelDescriptor) -> Scan:
    image = open_image(job.file) if job.file else np.frombuffer(job.pixels or b"", np.uint8)
    image = image.reshape(job.height, job.width, 3)
    tile = Tiling.for_model(8, 8, job.tile_size)
    corners = tile.corners(job.height, job.width)
    means = [image[top : top + tile.height, left : left + tile.width].mean() for top, left in corners]
    top, left = corners[int(np.argmax(means))]
    rows, columns = tile.grid_shape(job.height, job.width)
    calibration = model.tiles
    return Scan(
        height=job.height,
        width=job.width,
        tile_height=tile.height,
        tile_width=tile.width,
        rows=rows,
        columns=columns,
        view="worst_tile",
        score=max(means),
        p_value=0.5 if calibration else None,
        threshold=calibration.threshold if calibration else None,
        is_ood=max(means) > calibration.threshold if calibration else None,
        box=Box(left=left, top=top, width=tile.width, height=tile.height),
        views={"worst_tile": ViewVerdict(score=max(means), p_value=0.5, threshold=100)} if calibration else {},
        is_weak=False if calibration else None,
        calibration_version=calibration.version if calibration else None,
        tiles=np.array(means, "<f4").tobytes() if job.map else None,
    )
