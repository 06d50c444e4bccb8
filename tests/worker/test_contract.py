"""The JSON that crosses the queue: every change is visible in `contract.json`, and therefore in review."""

import json
from pathlib import Path
from typing import Any, get_args

import pydantic_core
import pytest
from pydantic import BaseModel, ValidationError

from ncml.limits import MAX_SEED
from worker.contract import (
    INDIVIDUAL_FIELDS,
    JOB,
    CalibrateJob,
    CompleteJob,
    GenerateJob,
    Job,
    JobStatus,
    Lane,
    Original,
    Pixels,
    Priority,
    ReviewedImage,
    ScanJob,
    ScoreJob,
    Task,
    UpdateJob,
    batch_key,
    is_alone,
    queue_name,
)
from worker.descriptors import (
    Batching,
    Calibration,
    DetectorCalibration,
    DetectorPower,
    Histogram,
    ModelDescriptor,
    Power,
    PowerPicture,
    PowerPictures,
    Preprocessing,
    TileCalibration,
)
from worker.job_results import (
    RESULT,
    Box,
    Calibrated,
    CalibrateResult,
    Detection,
    Event,
    ImagesResult,
    JobError,
    JobView,
    ModelRef,
    Ood,
    Preview,
    Progress,
    ReviewCounts,
    Scan,
    ScanResult,
    Score,
    ScoreResult,
    StoredImages,
    Timing,
    ViewDetection,
    ViewVerdict,
    Webhook,
)

PIXELS = Pixels(height=1, width=2, data=bytes([0, 1, 2, 253, 254, 255]))
MODEL = ModelRef(name="m", version="ab" * 32)
TIMING = Timing(queue_s=0.25, compute_s=1.5, batch_size=3)

CALIBRATION = Calibration(
    version="cd" * 32, statistic="bpd", false_positive_rate=0.05, threshold=4.5, thresholds={"bpd": 4.5}, n_fit=2,
    n_rank=3, smallest_p=0.25, tolerate=("jpeg",), weakness="it ranks among 3 images", preprocessing="p v1",
    power=Power(images=3, good=0.0, processed={"JPEG": 0.5}, altered={"blur": 1.0}, foreign={"one colour": 0.25}),
    histograms={"bpd": Histogram(edges=(3.0, 4.0, 5.0), counts=(1, 2))},
)  # fmt: skip

EXAMPLES: dict[str, BaseModel] = {
    "score": ScoreJob(
        model="m", images=(PIXELS, PIXELS), class_name="cat", noise=2.5, map=True, priority=Priority.HIGH,
        request_id="r", calibration="tolerant", statistic="multiscale", statistics=("bpd", "multiscale"),
    ),
    "bare score": ScoreJob(model="m", images=(PIXELS,), ood=False, sanity=True),
    "score by a detector": ScoreJob(
        model="m", images=(PIXELS, PIXELS), calibration="detector",
        originals=(Original(pixels=bytes(6), height=1, width=2), Original(file=b"\x89PNG", height=600, width=800)),
    ),
    "scan": ScanJob(model="m", file=b"\x89PNG", height=3000, width=4000, tile_size=64, map=True),
    "scan of pixels": ScanJob(model="m", pixels=bytes(6), height=1, width=2),
    "calibrate": CalibrateJob(
        model="m", name="mine", images=2, height=1, width=1, pixels=bytes(6), skipped=("a.txt is not an image.",)
    ),
    "update": UpdateJob(
        model="m", name="m-2", reviewed=(ReviewedImage(name="0a-part.png", scene_name="part.png", file=b"\x89PNG"),),
        defective=(ReviewedImage(name="0b-part.png", file=b"\x89PNG"),),
    ),
    "generate": GenerateJob(model="m", version="ab" * 32, n=4, seed=7, steps=20, solver="heun", priority=Priority.LOW),
    "complete": CompleteJob(
        model="m", image=PIXELS, keep="left", n=2, noise=0.0, guidance=2.0, temperature=0.9, timeout_s=30.0
    ),
    "score result": ScoreResult(
        model=MODEL, timing=TIMING, height=1, width=2,
        results=(
            Score(
                bpd=3.5, log_likelihood=-14.5, map=b"\x00\x00`@\x00\x00`@", statistics={"bpd": 3.5}, flipped_bpd=3.75,
                ood=Ood(
                    statistic="multiscale", score=2.5, p_value=0.0625, threshold=3.0, is_ood=False,
                    calibration_version="cd" * 32,
                ),
            ),
        ),
    ),
    "score result of a detector": ScoreResult(
        model=MODEL, timing=TIMING, height=1, width=2,
        results=(
            Score(
                bpd=3.5, log_likelihood=-14.5,
                detection=Detection(
                    height=600, width=800, view="places", score=6.5, p_value=0.0625, threshold=3.0, is_ood=True,
                    is_weak=False, box=Box(left=16, top=32, width=5, height=5),
                    views={
                        "places": ViewDetection(
                            score=12.5, standardised=6.5, part=6.5, box=Box(left=16, top=32, width=5, height=5)
                        )
                    },
                    at_least_as_unusual=0, ranking_images=15, calibration_version="da" * 32,
                    covered=Box(left=0, top=0, width=800, height=600), rows=1, columns=2, grid=bytes(8),
                    differences=("it is grey, and no good image is",),
                    backdrop=b"\xff\xd8",
                ),
            ),
        ),
    ),
    "scan result": ScanResult(
        model=MODEL, timing=TIMING,
        scan=Scan(
            height=64, width=48, tile_height=32, tile_width=32, rows=3, columns=2, view="peak", score=9.5,
            p_value=0.0625, threshold=8.0, is_ood=True, box=Box(left=16, top=32, width=5, height=5), tiles=bytes(24),
            views={"peak": ViewVerdict(score=9.5, p_value=0.03125, threshold=8.0)}, is_weak=False,
            calibration_version="ce" * 32,
        ),
    ),
    "images result": ImagesResult(
        task=Task.GENERATE,
        model=MODEL,
        timing=TIMING,
        seeds=(7, 8),
        images=StoredImages(blob="ncml:blob:j", n=2, height=1, width=2),
    ),
    "calibration result": CalibrateResult(
        model=MODEL,
        timing=TIMING,
        calibration=Calibrated(n_fit=20, n_rank=40, smallest_p=0.025, weakness="it ranks", summary="It detects blur."),
        skipped=("a.txt is not an image.",),
    ),
    "update result": CalibrateResult(
        task=Task.UPDATE,
        model=MODEL,
        timing=TIMING,
        calibration=Calibrated(
            n_fit=20, n_rank=40, smallest_p=0.025, summary="It finds spots.",
            reviews=ReviewCounts(good=3, still_flagged=1, defective=2, found=2, added=2, found_added=2, found_before=1),
        ),
        skipped=(),
    ),
    "view": JobView(
        id="j", status=JobStatus.FAILED, task=Task.SCORE, model=MODEL, model_name="m", priority=Priority.NORMAL,
        request_id="r", n=1, created_at=1.0, started_at=2.0, ended_at=3.0, timing=TIMING,
        progress=Progress(stage="refine", step=3, total=20, done=0, n=1),
        error=JobError(reason="input", field="class", detail="there is no class 'x'."),
        webhook=Webhook(id="msg_1", state="waiting", attempts=2),
    ),
    "event": Event(id="1-0", kind="status", status=JobStatus.RUNNING),
    "preview": Preview(stage="refine", step=3, total=20, n=1, height=1, width=2, data=bytes(6)),
    "descriptor": ModelDescriptor(
        name="m", version="ab" * 32, height=32, width=32, classes=("cat",), noise=10.0, keeps=("top",), solver="heun",
        stepped_solver="heun", solvers={"heun": 10}, preprocessing=Preprocessing(name="p", version=1),
        metrics={"test_bpd": 3.5}, card="# m",
        calibrations={"default": CALIBRATION},
        tiles=TileCalibration(
            version="ef" * 32, height=64, width=64, false_positive_rate=0.05, threshold=8.0,
            thresholds={"worst_tile": 8.0}, n_fit=8, n_rank=20, smallest_p=0.047, weakness="it is an example",
        ),
        batching=Batching(groups="fixed", check="failed", detail="it differs."),
        detector=DetectorCalibration(
            version="da" * 32, false_positive_rate=0.05, confidence=0.95, cutoff=0.02, rate_bound=0.05, threshold=3.0,
            smallest_p=0.0625, n_fit=11, n_rank=20, estimation_scenes=11, ranking_scenes=15, weakness="15 scenes rank",
            descriptions={"features": "at 448x336"}, notes=("5 near-duplicates are 2 scenes",),
            power=DetectorPower(
                images=4, shares={"scratch": {"1 pixel wide": 0.25, "3 pixels wide": 1.0}},
                smallest_found={"scratch": "3 pixels wide"}, foreign={"one colour": 1.0},
                pictures=PowerPictures(
                    sha256="c0" * 32,
                    examples=(PowerPicture(
                        kind="scratch", size="1 pixel wide", is_found=False, left=8, top=32, width=144, height=108,
                    ),),
                ),
            ),
        ),
    ),
}  # fmt: skip


def test_every_message_keeps_its_json_and_can_be_parsed() -> None:
    golden: dict[str, Any] = json.loads(Path(__file__).with_name("contract.json").read_text())
    assert {name: json.loads(message.model_dump_json()) for name, message in EXAMPLES.items()} == golden
    for name, message in EXAMPLES.items():
        assert type(message).model_validate_json(json.dumps(golden[name])) == message


@pytest.mark.parametrize(
    "name",
    [
        "score",
        "bare score",
        "score by a detector",
        "scan",
        "scan of pixels",
        "generate",
        "complete",
        "calibrate",
        "update",
    ],
)
def test_a_job_is_read_by_its_task(name: str) -> None:
    assert JOB.validate_json(EXAMPLES[name].model_dump_json()) == EXAMPLES[name]


@pytest.mark.parametrize(
    "name",
    ["score result", "score result of a detector", "scan result", "images result", "calibration result"],
)
def test_a_result_is_read_by_its_task(name: str) -> None:
    assert RESULT.validate_json(EXAMPLES[name].model_dump_json()) == EXAMPLES[name]


def extended(value: Any) -> Any:
    """Return a message with an unknown field in each of its models."""
    if isinstance(value, BaseModel):
        return extended({name: getattr(value, name) for name in type(value).model_fields}) | {"surprise": 1}
    if isinstance(value, dict):
        return {key: extended(item) for key, item in value.items()}
    return [extended(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", [name for name, message in EXAMPLES.items() if not isinstance(message, get_args(Job))])
def test_fields_that_newer_workers_add_are_ignored(name: str) -> None:
    payload = pydantic_core.to_json(extended(EXAMPLES[name]), bytes_mode="base64")
    assert b"surprise" in payload
    assert type(EXAMPLES[name]).model_validate_json(payload) == EXAMPLES[name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("score", {"images": []}),
        ("score", {"images": [{"height": 1, "width": 2, "data": "AAAA"}]}),
        ("score", {"images": [{"height": 1, "width": 1, "data": "AAAA"}] * 65}),
        ("score", {"noise": -1}),
        ("score", {"noise": float("inf")}),
        ("score", {"surprise": 1}),
        ("score", {"images": [{"height": 1, "width": 1, "data": "AAAA", "surprise": 1}]}),
        ("score", {"priority": "urgent"}),
        ("score", {"originals": [{"height": 1, "width": 2, "pixels": "AAAAAAAA"}]}),
        ("score by a detector", {"originals": [{"height": 1, "width": 2, "pixels": "AAAA"}] * 2}),
        ("score by a detector", {"originals": [{"height": 1, "width": 2}] * 2}),
        ("score by a detector", {"images": [{"height": 1, "width": 1, "data": "AAAA"}] * 5}),
        ("scan", {"file": ""}),
        ("scan", {"file": None}),
        ("scan", {"pixels": "AAAA"}),
        ("scan of pixels", {"width": 3}),
        ("scan", {"tile_size": 0}),
        ("scan", {"height": 0}),
        ("generate", {"n": 0}),
        ("generate", {"n": 65}),
        ("generate", {"seed": -1}),
        ("generate", {"seed": MAX_SEED, "n": 2}),
        ("generate", {"steps": 0}),
        ("generate", {"steps": 1001}),
        ("generate", {"timeout_s": 0}),
        ("generate", {"guidance": float("nan")}),
        ("generate", {"temperature": float("inf")}),
        ("complete", {"keep": "middle"}),
    ],
)
def test_an_invalid_job_is_refused(name: str, change: dict[str, Any]) -> None:
    payload = EXAMPLES[name].model_dump(mode="json")
    JOB.validate_json(json.dumps(payload))
    with pytest.raises(ValidationError):
        JOB.validate_json(json.dumps(payload | change))


def test_images_of_one_job_have_one_size() -> None:
    with pytest.raises(ValidationError, match="differ in size"):
        ScoreJob(model="m", images=(PIXELS, Pixels(height=2, width=1, data=bytes(6))))


def test_the_largest_seed_is_usable() -> None:
    assert GenerateJob(model="m", seed=MAX_SEED - 1, n=2).seeds == (MAX_SEED - 1, MAX_SEED)


SCORE, CANVAS = ScoreJob(model="m", images=(PIXELS,)), CompleteJob(model="m", image=PIXELS)
TALL = Pixels(height=2, width=1, data=PIXELS.data)

JOBS: tuple[Job, ...] = (
    SCORE,
    CANVAS,
    GenerateJob(model="m", class_name="cat"),
    ScanJob(model="m", pixels=bytes(6), height=1, width=2),
    CalibrateJob(model="m", name="mine", images=2, height=1, width=1, pixels=bytes(6)),
    UpdateJob(model="m", name="mine", reviewed=(ReviewedImage(name="a", file=b"PNG"),)),
)

INDIVIDUAL: dict[str, Any] = {
    "priority": Priority.HIGH, "request_id": "r", "timeout_s": 1.0, "start_within_s": 1.0, "class_name": "dog",
    "images": (PIXELS, PIXELS), "image": Pixels(height=1, width=2, data=bytes(6)), "pixels": bytes([1] * 6),
    "file": b"PNG", "originals": (Original(file=b"PNG", height=1, width=2),), "n": 5, "seed": 9, "skipped": ("a.txt",),
    "reviewed": (ReviewedImage(name="b", file=b"PNG"),), "defective": (ReviewedImage(name="b", file=b"PNG"),),
}  # fmt: skip
"""Another value of each field in which jobs of one batch may differ."""

SHARED: dict[str, Any] = {
    "task": "other", "model": "k", "version": "ab", "noise": 0.5, "map": True, "ood": False, "calibration": "tolerant",
    "statistic": "bpd", "statistics": ("bpd",), "sanity": True, "steps": 3, "solver": "heun", "guidance": 2.0,
    "temperature": 0.9, "keep": "left", "height": 7, "width": 7, "tile_size": 8, "name": "yours",
    "false_positive_rate": 0.1,
}  # fmt: skip
"""Another value of each field that all jobs of a batch share, because the first job's is used for all."""


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.task)
def test_every_field_that_is_not_individual_splits_batches(job: Job) -> None:
    assert set(INDIVIDUAL) == INDIVIDUAL_FIELDS
    for name in type(job).model_fields:
        is_individual = name in INDIVIDUAL
        changed = job.model_copy(update={name: INDIVIDUAL[name] if is_individual else SHARED[name]})
        assert (batch_key(changed) == batch_key(job)) is is_individual, name


def test_the_shape_of_images_splits_batches_and_the_order_of_statistics_does_not() -> None:
    assert batch_key(SCORE) != batch_key(SCORE.model_copy(update={"images": (TALL,)}))
    assert batch_key(CANVAS) != batch_key(CANVAS.model_copy(update={"image": TALL}))
    orders: tuple[Any, ...] = ("a", "b"), ("b", "a", "a")
    assert len({batch_key(SCORE.model_copy(update={"statistics": names})) for names in orders}) == 1
    assert batch_key(SCORE.model_copy(update={"statistics": "all"})) != batch_key(SCORE)
    pairs: tuple[Any, ...] = ({"calibration": "x", "statistic": "-|a"}, {"calibration": "x|-", "statistic": "a"})
    assert len({batch_key(SCORE.model_copy(update=pair)) for pair in pairs}) == 2


def test_jobs_with_large_images_share_no_batch_and_a_detector_judges_in_the_lane_of_scores() -> None:
    job = JOB.validate_json(EXAMPLES["score by a detector"].model_dump_json())
    assert is_alone(job)
    assert job.task.lane is Lane.SCORE
    assert b"PNG" not in batch_key(job).encode()
    assert [job.task for job in JOBS if is_alone(job)] == [Task.SCAN, Task.CALIBRATE, Task.UPDATE]


def test_tasks_have_their_lanes() -> None:
    assert {status for status in JobStatus if not status.is_terminal} == {"queued", "running"}
    lanes = {
        "score": "score",
        "scan": "generate",
        "generate": "generate",
        "complete": "generate",
        "calibrate": "generate",
        "update": "generate",
    }
    assert {task: task.lane for task in Task} == lanes
    assert queue_name(Lane.SCORE, Priority.HIGH) == "ncml:score:high"
