"""Detectors in the engine: images are judged at their own size, and a folder that cannot judge is a fault."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ncml
from ncml.calibration.division import divide
from ncml.data import kept_images
from ncml.data.good_images import open_folder
from ncml.errors import ModelError
from ncml.images import resize_to, to_png
from ncml.network import efficientnet
from ncml.ood.alarm import FlaggedRateAlarm
from ncml.ood.judging import Detector
from ncml.ood.views.appearance import AppearanceView
from ncml.progress import Progress, ignore_progress
from ncml.results import Detection
from tests.detectors import good_image, use_small_scale, without_disc
from tests.ncml import nets
from worker import calibrating, unfinished
from worker.contract import Original, Pixels, ReviewedImage, ScoreJob, UpdateJob
from worker.engine import BatchRunner
from worker.messages import Batch, Drop, EngineSettings, Outcome
from worker.metrics import WorkerMetrics
from worker.monitor import _merge
from worker.registry import ModelRegistry, describe


class Pipe:
    """The engine's end of a pipe: what the worker sends, and what it has received."""

    def __init__(self, *messages: object) -> None:
        self.messages = list(messages)
        self.sent: list[Any] = []

    def poll(self, timeout_s: float = 0.0) -> bool:
        return bool(self.messages)

    def recv(self) -> object:
        return self.messages.pop(0)

    def send(self, message: object) -> None:
        self.sent.append(message)


@pytest.fixture
def folder(detector_folder: Path, tmp_path: Path) -> Path:
    """A copy of the detector, alone in its directory."""
    shutil.copytree(detector_folder, tmp_path / "models" / "part")
    return tmp_path / "models" / "part"


@pytest.fixture
def registry(folder: Path, one_thread: None) -> ModelRegistry:
    registry = ModelRegistry([folder.parent], ncml.load, device="cpu", keep=2)
    registry.scan()
    return registry


@pytest.fixture
def run(registry: ModelRegistry, folder: Path) -> Callable[..., Outcome]:
    """Compute a job as the engine does, with messages that arrive meanwhile."""

    def compute(job: ScoreJob, *messages: object, max_batch: int = 32) -> Outcome:
        settings = EngineSettings(directories=(folder.parent,), load=ncml.load, max_batch=max_batch)
        runner = BatchRunner(Pipe(*messages), registry, settings)  # pyright: ignore[reportArgumentType]
        return runner.run(Batch(1, {"job": job})).outcomes["job"]

    return compute


def job(*images: np.ndarray, originals: bool = True, files: bool = False, **fields: Any) -> ScoreJob:
    small = [resize_to(image, 8, 8) for image in images]
    own: list[dict[str, Any]] = [
        {"height": image.shape[0], "width": image.shape[1]}
        | ({"file": to_png(image)} if files else {"pixels": image.tobytes()})
        for image in images
    ]
    return ScoreJob(
        model="part",
        images=tuple(Pixels(height=8, width=8, data=image.tobytes()) for image in small),
        originals=tuple(Original(**values) for values in own) if originals else (),
        **({"calibration": "detector"} if originals else {}) | fields,
    )


@pytest.mark.parametrize("files", [False, True])
def test_images_are_judged_at_their_own_size_as_by_the_library(
    run: Callable[..., Outcome], folder: Path, files: bool
) -> None:
    images = [good_image(1000), without_disc(1001), good_image(1002, 100, 80)]
    outcome = run(job(*images, files=files, map=True))
    assert outcome.error is None
    for score, expected in zip(outcome.scores, ncml.load(folder).score(images), strict=True):
        detection = expected.detection
        assert isinstance(detection, Detection)
        assert score.bpd == expected.bpd
        assert score.detection is not None
        assert score.ood is not None
        assert (score.ood.statistic, score.ood.calibration) == (detection.view, "detector")
        assert score.detection.p_value == detection.p_value == score.ood.p_value
        assert score.detection.box.model_dump() == detection.box._asdict()
        assert score.detection.views.keys() == detection.views.keys()
        assert (score.detection.rows, score.detection.columns) == detection.grid.shape
        assert score.detection.grid == detection.grid.astype("<f4").tobytes()
        assert score.detection.backdrop is not None
        assert score.detection.backdrop.startswith(b"\xff\xd8")
    assert [score.detection is not None and score.detection.is_ood for score in outcome.scores][:2] == [False, True]


def test_without_a_map_a_result_is_small(run: Callable[..., Outcome]) -> None:
    [score] = run(job(good_image(1000))).scores
    assert score.detection is not None
    assert score.detection.grid is None
    assert score.detection.backdrop is None
    assert len(score.model_dump_json()) < 4000


def test_the_progress_counts_images(registry: ModelRegistry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.PROGRESS_S", 0)
    pipe = Pipe()
    runner = BatchRunner(pipe, registry, EngineSettings(directories=(folder.parent,), load=ncml.load))  # pyright: ignore[reportArgumentType]
    runner.run(Batch(1, {"job": job(*[good_image(seed) for seed in range(3)])}))
    assert [(step.stage, step.step, step.total) for step in pipe.sent][:3] == [("judge", i, 3) for i in (1, 2, 3)]


def test_a_canceled_job_judges_no_further_image(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    judge = Detector.judge

    def counted(self: Detector, image_HWC: np.ndarray) -> Detection:
        judged.append(1)
        return judge(self, image_HWC)

    monkeypatch.setattr(Detector, "judge", counted)
    outcome = run(job(*[good_image(seed) for seed in range(4)]), Drop(1, frozenset({"job"})))
    assert (outcome.error, outcome.scores) == (None, [])
    assert len(judged) == 1


@pytest.mark.parametrize(
    ("images", "max_batch", "name"), [(1, 32, "image"), (3, 32, "image[2]"), (3, 1, "image[2]"), (4, 2, "image[2]")]
)
def test_an_image_that_cannot_be_judged_is_named_by_its_position_in_the_request(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, images: int, max_batch: int, name: str
) -> None:
    judge = Detector.judge
    faulty = good_image(2)

    def overflowing(self: Detector, image_HWC: np.ndarray) -> Detection:
        if np.array_equal(image_HWC, faulty):
            self.calibration.squares({"places": np.nan})
        return judge(self, image_HWC)

    monkeypatch.setattr(Detector, "judge", overflowing)
    outcome = run(job(*([faulty] if images == 1 else map(good_image, range(images)))), max_batch=max_batch)
    assert outcome.error is not None
    assert (outcome.error.reason, outcome.error.field) == ("input", name)
    assert outcome.error.detail.startswith(f"{name} has a score places that is not finite: save it again")


def test_a_file_with_another_size_than_stated_is_refused(run: Callable[..., Outcome]) -> None:
    file = to_png(good_image(1))
    for height, width, words in ((50, 60, "at most 3000 pixels"), (96, 72, "96 x 72 pixels, not 72 x 96")):
        changed = job(good_image(1), files=True)
        changed = changed.model_copy(update={"originals": (Original(file=file, height=height, width=width),)})
        outcome = run(changed)
        assert outcome.error is not None
        assert outcome.error.reason == "input"
        assert words in outcome.error.detail


def test_a_job_without_originals_is_not_judged_by_the_detector(run: Callable[..., Outcome], folder: Path) -> None:
    """A service that has not seen the detector yet expects the verdict of the default calibration, or none."""
    [score] = run(job(good_image(1), originals=False)).scores
    assert (score.ood, score.detection) == (None, None)


def test_a_job_without_originals_has_the_default_verdict(
    folder: Path, registry: ModelRegistry, run: Callable[..., Outcome]
) -> None:
    from ncml.calibration.estimation import calibrate

    calibrate(ncml.load(folder), nets.FIT, nets.RANK, power_images=0).save(folder)
    registry.scan()
    [score] = run(job(good_image(1), originals=False)).scores
    assert score.ood is not None
    assert (score.ood.calibration, score.detection) == ("default", None)
    [score] = run(job(good_image(1))).scores
    assert score.ood is not None
    assert score.ood.calibration == "detector"


def test_a_model_that_is_no_detector_any_more_refuses_to_judge(
    folder: Path, registry: ModelRegistry, run: Callable[..., Outcome]
) -> None:
    (folder / "detector.json").unlink()
    registry.scan()
    outcome = run(job(good_image(1)))
    assert outcome.error is not None
    assert "is no detector any more" in outcome.error.detail


def test_a_detector_is_described_with_its_rate_and_power(registry: ModelRegistry, folder: Path) -> None:
    [descriptor] = registry.descriptors
    calibration = ncml.load(folder).detector
    assert calibration is not None
    assert calibration.power is not None
    detector = descriptor.detector
    assert detector is not None
    assert detector.version == calibration.version
    assert (detector.n_fit, detector.n_rank) == (calibration.n_fit, calibration.n_rank)
    assert detector.rate_bound == calibration.rate_bound
    assert detector.weakness == calibration.weakness
    assert detector.power is not None
    assert detector.power.shares == calibration.power.shares
    assert detector.power.smallest_found.keys() == detector.power.shares.keys()
    assert len(detector.model_dump_json()) < 8000


def newer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "detector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "detector.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def without_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")


@pytest.mark.parametrize(
    ("change", "words"),
    [(newer, "upgrade ncml"), (damaged, "copy the folder again"), (without_package, "pip install no-such-package")],
)
def test_a_detector_that_cannot_judge_is_a_fault_and_the_others_are_served(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], words: str
) -> None:
    shutil.copytree(model_folder, folder.parent / "tiny")
    change(folder, monkeypatch)
    registry = ModelRegistry([folder.parent], ncml.load, device="cpu", keep=2)
    registry.scan()
    assert [model.name for model in registry.descriptors] == ["tiny"]
    assert words in registry.faults["part"]
    assert "\n" not in registry.faults["part"]
    with pytest.raises(ModelError, match="cannot be used"):
        registry.get("part")


def test_a_detector_stays_described_beside_an_earlier_worker_that_knows_none(folder: Path) -> None:
    """So its jobs carry originals, which that worker refuses, rather than being computed without the detector."""
    descriptor = describe("part", ncml.load(folder), None)
    earlier = descriptor.model_copy(update={"detector": None})
    for workers in ([(descriptor,), (earlier,)], [(earlier,), (descriptor,)]):
        assert [model.detector for model in _merge(workers)] == [descriptor.detector]


def test_flagged_images_are_evidence_if_the_rate_of_the_detector_is_known(
    registry: ModelRegistry, run: Callable[..., Outcome]
) -> None:
    [descriptor] = registry.descriptors
    detector = descriptor.detector
    assert detector is not None
    assert descriptor.verdicts == ("detector",)
    scored = job(without_disc(1001))
    scores = run(scored).scores
    labels = {"model": "part", "calibration": "detector"}
    evidence: list[float | None] = []
    cutoff = 1 / (detector.n_rank + 1)
    for update in ({}, {"smallest_p": 1 / detector.n_rank}, {"confidence": 0.95, "cutoff": cutoff}):
        metrics = WorkerMetrics()
        model = descriptor.model_copy(update={"detector": detector.model_copy(update=update)})
        metrics.count_scores(scored, scores, model)
        evidence.append(metrics.registry.get_sample_value("ncml_ood_evidence", labels))
    alarms = [FlaggedRateAlarm(detector.n_rank, rate) for rate in (detector.false_positive_rate, cutoff)]
    on_average, in_confidence = (float(alarm.update(is_flagged=True)) for alarm in alarms)
    assert evidence == [on_average, None, in_confidence]


def test_the_pictures_of_a_detector_are_those_beside_it(registry: ModelRegistry, folder: Path) -> None:
    [model] = registry.descriptors
    assert model.detector is not None
    assert model.detector.power is not None
    pictures = model.detector.power.pictures
    assert pictures is not None
    assert registry.pictures == {pictures.sha256: folder / "detector.jpg"}
    assert hashlib.sha256((folder / "detector.jpg").read_bytes()).hexdigest() == pictures.sha256
    assert {(example.kind, example.size) for example in pictures.examples} == {
        (kind, size) for kind, sizes in model.detector.power.shares.items() for size in sizes
    }


# -- updates


@pytest.fixture
def update(
    registry: ModelRegistry, folder: Path, detector_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Update the detector, which keeps its images, as the engine does; the new version judges by appearance alone."""
    images = detector_folder.parents[1] / "images"
    kept_images.keep(folder, open_folder(images, sorted(images.iterdir())), None, None, "auto")
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"appearance": AppearanceView})
    use_small_scale(monkeypatch)

    def compute(job: UpdateJob, *messages: object, calibrates: bool = True) -> Outcome:
        settings = EngineSettings(directories=(folder.parent,), load=ncml.load, calibrates=calibrates)
        runner = BatchRunner(Pipe(*messages), registry, settings)  # pyright: ignore[reportArgumentType]
        return runner.run(Batch(1, {"job": job})).outcomes["job"]

    return compute


def reviewed(name: str, image: np.ndarray) -> ReviewedImage:
    return ReviewedImage(name=name, file=to_png(image))


FLAGGED = tuple(reviewed(f"{seed}-a.png", without_disc(seed)) for seed in (300, 301))
UPDATE = UpdateJob(
    model="part", name="part-2", reviewed=FLAGGED, defective=(reviewed("302-b.png", good_image(302) * 0),)
)


def test_an_update_is_served_as_a_new_model_that_can_be_updated_again(
    update: Callable[..., Outcome], registry: ModelRegistry, folder: Path
) -> None:
    before = (folder / "detector.json").read_bytes()
    outcome = update(UPDATE)
    assert outcome.error is None
    assert outcome.model is not None
    assert outcome.model.name == "part-2"
    assert outcome.calibration is not None
    assert outcome.calibration.reviews is not None
    assert outcome.calibration.reviews.model_dump(exclude={"still_flagged"}) == {
        "good": 2, "defective": 1, "found": 1, "added": 1, "found_added": 1, "found_before": 1
    }  # fmt: skip
    assert "of 1 added defective image, the former version finds 1 and this one 1" in outcome.calibration.summary
    served = {model.name: model.detector for model in registry.descriptors}
    assert served["part-2"] is not None
    assert served["part"] is not None
    assert served["part-2"].keeps_images
    assert not served["part"].keeps_images  # its images were added after it was described
    assert served["part-2"].n_fit == served["part"].n_fit + 2
    assert served["part-2"].n_rank == served["part"].n_rank
    assert (folder / "detector.json").read_bytes() == before
    assert "Detector" in (folder.parent / "part-2" / "card.md").read_text()
    kept = kept_images.read(folder.parent / "part-2")
    assert kept.reviewed is not None
    assert len(kept.reviewed) == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == ["part", "part-2"]
    assert update(UPDATE).calibration == outcome.calibration  # its worker was lost before it could report the result
    other = update(UPDATE.model_copy(update={"reviewed": FLAGGED[:1]}))
    assert other.error is not None
    assert other.error.detail == "a model 'part-2' already exists; choose another name."


def test_the_name_that_a_client_gave_the_file_of_a_review_states_its_scene(
    update: Callable[..., Outcome], folder: Path, detector_folder: Path
) -> None:
    images = detector_folder.parents[1] / "images"
    kept_images.keep(folder, open_folder(images, sorted(images.iterdir())), None, None, "^([0-9]+)")
    _, ranking = divide(np.arange(40), 0.05)
    ranked = reviewed("5f-part.png", without_disc(300)).model_copy(update={"scene_name": f"{ranking[0]:03}-b.png"})
    other = reviewed(f"{ranking[0]:03}-part.png", without_disc(301)).model_copy(update={"scene_name": "part.png"})
    outcome = update(UPDATE.model_copy(update={"reviewed": (ranked, other)}))
    assert outcome.error is not None
    assert outcome.error.detail.endswith("leave out 5f-part.png (on a service, delete the reviews).")


def test_the_folders_of_a_running_update_are_not_taken_for_those_of_a_killed_worker(
    update: Callable[..., Outcome], folder: Path
) -> None:
    """They are older than that if it measures the power for hours, as NCML_JOB_TIMEOUT_S may allow."""

    def remove_others_and_age(progress: Progress) -> None:
        unfinished.remove_left(folder.parent, "a" * 32)
        for hidden in folder.parent.glob(".part-2.*"):
            os.utime(hidden, (0, 0))

    calibrating.make_folder(ncml.load(folder), UPDATE, "b" * 32, [folder.parent], remove_others_and_age)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["part", "part-2"]


def test_an_update_without_time_for_its_power_is_served_without_it(
    update: Callable[..., Outcome], registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.ood.views.patches.pass_seconds", lambda *_: 0.0)
    outcome = update(UPDATE.model_copy(update={"timeout_s": 1e-3}))
    assert outcome.error is None
    assert outcome.calibration is not None
    assert outcome.calibration.summary == (
        "of 1 added defective image, the former version finds 1 and this one 1; its power was not measured: the job "
        "had no time left."
    )
    served = {model.name: model.detector for model in registry.descriptors}
    assert served["part-2"] is not None
    assert served["part-2"].power is None


def test_an_update_measures_its_power_until_the_last_tenth_of_its_time(
    update: Callable[..., Outcome], folder: Path
) -> None:
    left = iter([60.0] * 7 + [59.0])  # five alterations of an image
    made = calibrating.make_folder(
        ncml.load(folder), UPDATE, "job", [folder.parent], ignore_progress, seconds_left=lambda: next(left)
    )
    assert "formerly 100% (measured on 2 images instead of 1)" in made.summary
    assert "measured on 1 good image, altered" in made.summary
    detector = ncml.load(folder.parent / "part-2").detector
    assert detector is not None
    assert detector.power is not None
    assert detector.power.images == 1
    assert detector.power.pictures


def test_an_update_that_takes_much_longer_than_a_job_may_is_refused_before_it_is_computed(
    update: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.ood.views.patches.pass_seconds", lambda *_: 1200 / (10 * 23 + 6 * (19 + 42 + 2)))
    monkeypatch.setattr("ncml.calibration.detector.measure_images", lambda *_, **__: pytest.fail("it computes"))
    outcome = update(UPDATE.model_copy(update={"timeout_s": 599.0}))
    assert outcome.error is not None
    assert (outcome.error.reason, outcome.error.field) == ("input", "model")
    assert outcome.error.detail.startswith("an update of part takes about 1,200 s, and a job ends after 599 s: ")
    assert outcome.error.detail.endswith("or ask the operator to raise NCML_JOB_TIMEOUT_S.")
    assert [path.name for path in folder.parent.iterdir()] == ["part"]


def test_a_refused_or_canceled_update_leaves_no_folder(update: Callable[..., Outcome], folder: Path) -> None:
    _, ranking = divide(np.arange(40), 0.05)
    ranked = reviewed("5f-part.png", good_image(int(ranking[0])))
    outcome = update(UPDATE.model_copy(update={"reviewed": (*FLAGGED, ranked)}))
    assert outcome.error is not None
    assert (outcome.error.reason, outcome.error.field) == ("input", "reviewed")
    assert "1 reviewed image shows scenes of ranking images" in outcome.error.detail
    assert outcome.error.detail.endswith("leave out 5f-part.png (on a service, delete the reviews).")
    assert update(UPDATE, Drop(1, frozenset({"job"}))).calibration is None
    outcome = update(UPDATE, calibrates=False)
    assert outcome.error is not None
    assert "must start the workers with NCML_ALLOW_CALIBRATION=1" in outcome.error.detail
    kept_images.discard(folder)
    outcome = update(UPDATE)
    assert outcome.error is not None
    assert "part keeps no good images, so it cannot be updated" in outcome.error.detail
    assert [path.name for path in folder.parent.iterdir()] == ["part"]
