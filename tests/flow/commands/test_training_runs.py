"""A training run from images to a model folder: its messages, its files, and the cost of a crash."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncml
from ncml import checkpoint, config, recipes
from ncml.cli import main as cli
from ncml.config import Config
from ncml.data import dataset, image_store
from ncml.errors import InputError, TrainingError
from ncml.training import finish, loop, run, tracking
from ncml.training.assembly import Changes, continue_from
from ncml.training.finish import TrainedModel
from ncml.training.folder import IMAGE_CACHE, STATE, exclusive
from ncml.training.reporter import describe_plan
from ncml.training.state import TrainingState
from ncml.training.trainer import Trainer
from tests.ncml import nets

ROOT = Path(__file__).parents[3]


def write_images(folder: Path, count: int, size: int = 8, *, classes: tuple[str, ...] = ("dark", "light")) -> str:
    """Write `count` images into class folders, by brightness; without classes, into the folder itself."""
    for i, image in enumerate(nets.images(count, size, size).numpy()):
        where = folder / classes[int(image.mean() > 127)] if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{i:04d}.png")
    return str(folder)


def train(
    source: str, out: Path, messages: list[str] | None = None, *, total_images: int | None = 128, **options: Any
) -> TrainedModel | None:
    on_message: Callable[[str], None] = (lambda line: None) if messages is None else messages.append
    options |= {"command": "ncml train", "total_images": total_images, "on_message": on_message}
    return run.train(recipes.smoke(), source, out, **options)


def test_a_run_that_is_stopped_while_its_model_is_measured_can_be_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_images(tmp_path / "images", 300), tmp_path / "model"

    def stop(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "measure_held_out", stop)
        with pytest.raises(KeyboardInterrupt, match="all 128 images are saved; add --resume"):
            train(source, out)
    assert not (out / "config.json").exists()
    trained = train(source, out, resume=True)
    assert trained
    assert trained.metrics["images_seen"] == 128
    assert ncml.load(out).calibration is not None


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / STATE)


class Recorder:
    """A tracker that a user might write."""

    made: list["Recorder"] = []  # noqa: RUF012

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.figures: dict[int, dict[str, float]] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.closed = False
        Recorder.made.append(self)

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        self.figures.setdefault(images_seen, {}).update(values)

    def image(self, images_seen: int, name: str, image: NDArray[np.uint8]) -> None:
        self.shapes.append(image.shape)

    def close(self) -> None:
        self.closed = True


def test_a_folder_of_images_becomes_a_calibrated_model(tmp_path: Path) -> None:
    """1,000 images leave 50 to estimate the statistics and 125 to rank."""
    source = write_images(tmp_path / "photos", 1000, classes=("dark", "light"))
    messages: list[str] = []
    recorders = len(Recorder.made)
    done = train(source, tmp_path / "mine", messages, total_images=1600, interval=800, trackers=[Recorder])
    assert done is not None
    assert done.calibrated
    model = ncml.load(tmp_path / "mine")
    assert (model.version, model.classes) == (done.version, ("dark", "light"))
    assert model.calibration is not None
    assert (model.calibration.n_fit, model.calibration.n_rank) == (50, 125)
    assert messages[0] == "1,000 images, of 8x8 (1,000)"
    assert messages[1].startswith("2 classes: ")
    calibrated = messages.index("calibrated on 50 and 125 held-out images")
    assert messages[calibrated - 2] == "825 for training, 175 held out for measurement and calibration"
    assert "38,006 parameters, fp32 on cpu: 1,600 images at" in messages[calibrated - 1]
    assert "take about" in messages[calibrated - 1]
    assert messages[calibrated + 1].endswith("the smallest p is 0.0079")
    assert "## Calibration default" in model.card

    run = tmp_path / "mine/training"
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["0000000800.png", "0000001600.png"]
    with Image.open(run / "samples" / grids[0]) as grid:
        assert grid.size == (32, 32)  # 4 x 4 images of 8 x 8
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("held_out/bits_per_dim")] == [800, 1600]
    assert [event.step for event in events.Scalars("train/bits_per_dim")] == [1600]
    assert len(events.Images("samples")) == 2
    recorder = Recorder.made[recorders]
    assert recorder.closed
    assert recorder.folder == run
    assert recorder.figures.keys() == {800, 1600}
    assert recorder.figures[1600].keys() == {"held_out/bits_per_dim", "train/bits_per_dim"} | {
        f"train/{name}" for name in ("gradient_norm", "learning_rate", "images_per_second", "skipped_steps")
    }
    assert recorder.shapes == [(32, 32, 3)] * 2


def test_a_detector_is_trained_on_crops_and_calibrated_on_whole_held_out_images(
    tmp_path: Path, model: ncml.Model
) -> None:
    source, messages = write_images(tmp_path / "photos", 140, 16), list[str]()  # in folders, which make no classes here
    recipe = recipes.smoke()
    shape = {name: getattr(model.config.model, name) for name in config.SHAPE}
    recipe = replace(recipe, model=replace(recipe.model, classes=(), **shape))
    recipe = replace(recipe, training=replace(recipe.training, crop=12))
    options = {"command": "ncml train", "total_images": 32, "init_from": model, "on_message": messages.append}
    done = run.train(recipe, source, tmp_path / "mine", **options)
    assert done is not None
    assert done.calibrated
    detector = ncml.load(done.folder)
    assert detector.config.training.split == 14
    assert detector.tiles is not None
    assert (detector.tiles.n_fit, detector.tiles.n_rank, detector.tiles.height) == (20, 50, 12)
    assert detector.tiles.views == ("worst_tile", "mean")
    assert messages[:3] == [
        "140 images, of 16x16 (140)",
        "64 random crops of each are resized to 8x8",
        "70 for training, 70 held out for measurement and calibration",
    ]
    assert any(line.startswith("50 ranking images support 2 of 3 views; 59 support all") for line in messages)
    assert detector.scan(nets.images(1, 16, 16, seed=9).numpy()[0]).p_value is not None
    card = (done.folder / "card.md").read_text()
    assert "Trained on: 70 of 140 images (the training part),\n  32 random crops seen" in card
    assert "at t = 0 on 500 held-out random crops, averaged" in card
    assert "standard error" not in card  # crops of one image resemble each other
    assert "- Data: 140 images, of 16x16 (140); 64 random crops of each are resized to 8x8\n" in card
    few = write_images(tmp_path / "few", 7, 16, classes=())
    with pytest.raises(InputError, match="holds 7 images; at least 8 are needed"):
        run.train(recipe, few, tmp_path / "other", **options)


def test_a_detector_continues_with_the_network_of_its_run(
    tmp_path: Path, model: ncml.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_images(tmp_path / "photos", 8, 16, classes=()), tmp_path / "mine"
    arguments = ["train", "detector", "--data", source, "--out", str(out), "--size", "8", "--crop", "12"]
    arguments += ["--batch-size", "8", "--threads", "1", "--init-from", str(model.folder)]
    assert cli.main([*arguments, "--max-images", "8"]) == 0, capsys.readouterr().err
    assert cli.main([*arguments, "--max-images", "16", "--resume"]) == 0, capsys.readouterr().err
    assert ncml.load(out).metrics["images_seen"] == 16
    arguments[arguments.index(str(out))] = str(tmp_path / "branch")
    arguments[-2:] = ["--max-images", "24", "--cooldown-from", str(out)]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert ncml.load(tmp_path / "branch").metrics["images_seen"] == 24


def test_a_run_of_an_earlier_version_continues_without_weight_decay() -> None:
    base = recipes.cifar10_base()
    earlier = replace(base, training=replace(base.training, muon_weight_decay=0.0))
    assert base.training.muon_weight_decay > 0
    assert continue_from(base, Changes(), earlier, None).training.muon_weight_decay == 0
    assert continue_from(base, Changes(), None, earlier).training == base.training


def test_a_resumed_run_keeps_the_records_of_its_saved_state(tmp_path: Path) -> None:
    source, out = write_images(tmp_path / "photos", 50), tmp_path / "mine"
    for total_images, resume in ((64, False), (96, True)):
        train(source, out, total_images=total_images, interval=32, resume=resume)
    events = EventAccumulator(str(out / "training/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out/bits_per_dim")] == [32, 64, 96]


def test_a_resumed_run_keeps_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of an earlier version held out 7 of 50 of its 140 images, and was trained on the others."""
    source, messages = write_images(tmp_path / "photos", 140), list[str]()
    monkeypatch.setattr(dataset, "split_for", lambda count: 50)
    assert train(source, tmp_path / "mine", total_images=32) is not None
    monkeypatch.undo()
    assert train(source, tmp_path / "mine", messages, total_images=64, resume=True) is not None
    assert ncml.load(tmp_path / "mine").config.training.split == 50
    assert any(line.startswith("119 for training, 21 held out") for line in messages)


def test_another_size_is_refused_before_the_images_are_read(tmp_path: Path) -> None:
    """The decoded images of the run stay as they are."""
    source, out, recipe = write_images(tmp_path / "photos", 50), tmp_path / "mine", recipes.smoke()
    train(source, out, total_images=32)
    cache = {path: path.read_bytes() for path in (out / IMAGE_CACHE).iterdir()}
    larger = replace(recipe, model=replace(recipe.model, height=16, width=16))
    with pytest.raises(TrainingError, match=r"a run with another --size \(height 8, not 16\): resume with"):
        run.train(larger, source, out, command="", resume=True)
    assert {path: path.read_bytes() for path in (out / IMAGE_CACHE).iterdir()} == cache


def without_images(path: Path) -> None:
    """Rewrite a training state as an earlier version wrote it, without the names of its images."""
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress.pop("images")["count"] == 50
    save_file(load_file(path), path, metadata={"progress": json.dumps(progress)})


def test_a_run_continues_only_with_the_images_that_it_began_with(tmp_path: Path) -> None:
    """One more image would move others from the held-out parts to the training part. The folder may move."""
    source, out = write_images(tmp_path / "photos", 50, classes=()), tmp_path / "mine"
    train(source, out, total_images=32)
    first = tmp_path / "photos/0000.png"
    added = shutil.copyfile(first, tmp_path / "photos/000.png")
    changed = r"images changed since the run began \(50 then, 51 now\).*: restore the images, or start a new run"
    for folder, options in ((out, {"resume": True}), (tmp_path / "branch", {"cooldown_from": out})):
        with pytest.raises(InputError, match=changed) as refused:
            train(source, folder, total_images=64, **options)
        assert refused.value.field == "data"
    added.unlink()
    first.rename(tmp_path / "photos/last.png")
    with pytest.raises(InputError, match=r"images changed since the run began \(their names differ\)"):
        train(source, out, total_images=64, resume=True)
    (tmp_path / "photos/last.png").rename(first)
    moved = str(shutil.move(source, tmp_path / "moved"))
    assert train(moved, out, total_images=64, resume=True) is not None
    without_images(out / STATE)
    shutil.copyfile(tmp_path / "moved/0000.png", tmp_path / "moved/000.png")
    assert train(moved, out, total_images=96, resume=True) is not None


def test_tiles_are_not_calibrated_on_images_that_changed_during_the_run(tmp_path: Path) -> None:
    source, messages = write_images(tmp_path / "photos", 140, 16, classes=()), list[str]()

    def change(folder: Path, config: Config) -> Recorder:
        shutil.copyfile(tmp_path / "photos/0000.png", tmp_path / "photos/000.png")
        return Recorder(folder, config)

    recipe = recipes.smoke()
    recipe = replace(
        recipe, model=replace(recipe.model, classes=()), training=replace(recipe.training, crop=12, total_images=32)
    )
    options = {"command": "ncml train", "trackers": [change], "on_message": messages.append}
    done = run.train(recipe, source, tmp_path / "mine", **options)
    assert done is not None
    assert not done.calibrated
    assert "gives no p-values (the images changed since the run began (140 then, 141 now)" in messages[-1]


def test_a_model_that_only_scores_has_no_classes(tmp_path: Path) -> None:
    recipe = replace(recipes.smoke(), generates=False)
    recipe = replace(recipe, training=replace(recipe.training, total_images=32))
    done = run.train(recipe, write_images(tmp_path / "photos", 50), tmp_path / "mine", command="ncml train")
    assert done is not None
    config = ncml.load(done.folder).config
    assert config.model.classes == ()
    assert not config.generates


def test_too_few_images_to_calibrate_are_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    done = train(write_images(tmp_path / "photos", 50), tmp_path / "mine", messages, total_images=32)
    assert done is not None
    assert not done.calibrated
    plan = next(i for i, line in enumerate(messages) if "take about" in line)
    assert messages[plan - 1].startswith("too few images for verdicts, which need 140: ")  # before hours of training
    assert messages[-1].startswith("not calibrated, so `ncml score` gives no p-values (")
    assert messages[-1].endswith("; `ncml calibrate` calibrates the model on other images")
    assert ncml.load(tmp_path / "mine").calibration is None


def test_problems_of_the_images_are_reported_first(tmp_path: Path) -> None:
    """Other sizes, copies, a class of one image, and files that are not images do not end the run."""
    folder = tmp_path / "photos"
    source = write_images(folder, 60)
    image = next((folder / "dark").glob("*.png"))
    Image.open(image).resize((4, 4)).save(folder / "dark" / "small.png")
    Image.open(image).resize((20, 10)).save(folder / "dark" / "wide.png")
    (folder / "dark" / "copy.png").write_bytes(image.read_bytes())
    (folder / "hawk").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "hawk" / "1.png")
    (folder / "dark" / "notes.txt").write_text("notes")
    (folder / "readme.md").write_text("not in a class, and not an image")
    messages: list[str] = []
    train(source, tmp_path / "mine", messages, total_images=32)
    report = "\n".join(messages)
    assert messages[0] == "64 images, of 8x8 (62), 4x4 (1), 20x10 (1)"
    lines = (
        "each is cropped to its centre and resized to 8x8",
        "1 smaller than that: enlarged",
        "hawk (1)",
        "1 image identical to an earlier one",
        "2 unreadable files left out",
    )
    for line in lines:
        assert line in report
    assert "left out: readme.md, dark/notes.txt" in report

    card = ncml.load(tmp_path / "mine").card
    for line in lines:
        assert line in card
    assert "notes.txt" not in card  # a card is published, and file names are private
    assert "# mine\n" in card
    assert "recipe `smoke`" in card
    assert " bits/dim** (standard error 0." in card


@pytest.mark.parametrize("count", [1, 7])
def test_images_that_cannot_be_split_are_refused(tmp_path: Path, count: int) -> None:
    counted = "1 image;" if count == 1 else "7 images;"
    with pytest.raises(InputError, match=f"holds {counted} at least 8 are needed") as refused:
        train(write_images(tmp_path / "photos", count, classes=()), tmp_path / "mine")
    assert refused.value.field == "data"


def test_a_folder_of_something_else_is_refused(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, reason in (
        (model_folder, "already contains a finished model"),
        (tmp_path / "file", "cannot be written: .*file is not a writable folder"),
        (tmp_path / "file" / "mine", "cannot be written: .*file is not a writable folder"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            train("nowhere", out)
        assert refused.value.field == "out"
    with pytest.raises(InputError, match="no training run to resume"):
        train("nowhere", tmp_path / "new", resume=True)


def test_a_folder_inside_the_data_is_refused(tmp_path: Path) -> None:
    """Its sample grid would become a training image."""
    source = write_images(tmp_path / "photos", 50)
    for out in (tmp_path / "photos", tmp_path / "photos" / "mine"):
        with pytest.raises(InputError, match=r"is inside the data, .*photos: choose another folder") as refused:
            train(source, out)
        assert refused.value.field == "out"
        assert not (out / "training").exists()


@pytest.mark.parametrize(
    ("section", "change", "option"),
    [
        ("training", {"crop": 1500}, "crop"),
        ("training", {"learning_rate": 1001.0}, "learning-rate"),
        ("model", {"height": 2048}, "size"),
        ("sde", {"grey_levels": math.inf}, "noise"),
    ],
)
def test_a_configuration_that_could_not_be_loaded_is_refused_before_images_are_read(
    tmp_path: Path, section: str, change: dict[str, Any], option: str
) -> None:
    recipe = recipes.smoke()
    recipe = replace(recipe, **{section: replace(getattr(recipe, section), **change)})
    with pytest.raises(
        InputError, match=f"^--{option} cannot be used .*should be less than or equal to .*: choose another"
    ) as refused:
        run.train(recipe, "nowhere", tmp_path / "mine", command="")
    assert refused.value.field == option


def test_names_of_classes_that_could_not_be_loaded_are_refused_before_training(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos", 50, classes=("dark", "x" * 201))
    with pytest.raises(
        InputError, match=r"model\.classes\.1: string should have at most 200 .*: rename the class folders"
    ):
        train(source, tmp_path / "mine")
    assert not (tmp_path / "mine" / STATE).exists()


def test_a_run_starts_with_another_model_s_weights(tmp_path: Path) -> None:
    """Before its first step it measures the same as the other model, although the classes differ."""
    first = train(write_images(tmp_path / "photos", 50), tmp_path / "first", total_images=640)
    other = write_images(tmp_path / "others", 50, classes=("dim", "white"))
    # A learning rate of next to nothing leaves the weights where they began.
    still = replace(recipes.smoke(), training=replace(recipes.smoke().training, learning_rate=1e-12))
    started = run.train(
        still, other, tmp_path / "second", command="", total_images=32, init_from=ncml.load(tmp_path / "first")
    )
    assert first is not None
    assert started is not None
    assert started.metrics["held_out_bpd"] == pytest.approx(first.metrics["held_out_bpd"], abs=2e-4)
    assert run.train(still, other, tmp_path / "second", command="", total_images=64, resume=True) is not None
    card = (tmp_path / "second" / "card.md").read_text()  # of a command that does not name the other model
    assert f"- Began with the weights of: first@{first.version[:12]}\n- Wall time:" in card
    assert "Began with" not in (tmp_path / "first" / "card.md").read_text()
    shape = replace(recipes.smoke(), model=replace(recipes.smoke().model, mixtures=2))
    with pytest.raises(InputError, match="the model first has mixtures 3 and the recipe smoke has 2: use the recipe"):
        run.train(shape, other, tmp_path / "third", command="", init_from=ncml.load(tmp_path / "first"))
    assert not (tmp_path / "third").exists()  # refused before the images are read


def test_a_run_beyond_a_year_is_planned_without_a_date() -> None:
    pixels = nets.images(8)
    trainer = Trainer(recipes.smoke(), dataset.Dataset(pixels, torch.zeros(8, dtype=torch.long), ("dark", "light")))
    for images, phrase in ((10_000, ", until "), (10**23, " days ")):
        trainer.set_length(images)
        plan = describe_plan(trainer, 0.5, math.inf)
        assert phrase in plan
        assert ("until" in plan) == (images == 10_000)


def test_a_tracker_is_created_by_a_function_of_folder_and_configuration(tmp_path: Path) -> None:
    for name in ("os:getcwd", "math:pi"):
        with pytest.raises(InputError, match=f"{name} is not a function of"):
            tracking.tracker_factory(name)
    with pytest.raises(InputError, match="builtins:slice returns no tracker") as refused:
        tracking.tracker_factory("builtins:slice")(tmp_path, recipes.smoke())
    assert refused.value.field == "tracker"
    assert isinstance(tracking.tracker_factory(f"{__name__}:Recorder")(tmp_path, recipes.smoke()), Recorder)


def test_resuming_a_finished_run_keeps_what_its_folder_has_gained(tmp_path: Path) -> None:
    source, out, messages = write_images(tmp_path / "images", 300), tmp_path / "model", list[str]()
    trained = train(source, out)
    checkpoint.write_sampling(out, {"noise": 2.5})
    checkpoint.add_metrics(out, {"class_fidelity": 0.5})
    checkpoint.write_card_section(out, "Notes", "Mine.")
    calibration = ncml.load(out).calibration
    assert calibration is not None
    replace(calibration, name="night").save(out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    resumed = train(source, out, messages, resume=True)
    assert trained is not None
    assert resumed is not None
    assert replace(resumed, metrics={}) == replace(trained, metrics={})
    assert resumed.metrics == trained.metrics | {"class_fidelity": 0.5}
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert "contains this model already" in messages[-1]
    (out / "calibration.json").unlink()
    assert train(source, out, resume=True) == resumed
    assert ncml.load(out).calibration is not None
    (out / "model.safetensors").write_bytes(b"damaged")
    assert train(source, out, resume=True) == trained


def test_a_run_is_as_long_as_the_time_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate falls to 0 within the time; a resumed run keeps its length."""
    source, messages = write_images(tmp_path / "photos", 50), list[str]()
    monkeypatch.setattr(Trainer, "measure_step_seconds", lambda self: 1000.0)
    done = train(source, tmp_path / "mine", messages, total_images=None, max_seconds=3000 / run.MARGIN)
    assert done is not None
    assert done.metrics["images_seen"] == 3 * recipes.smoke().training.batch_size
    assert ncml.load(tmp_path / "mine").config.training.total_images == done.metrics["images_seen"]
    messages.clear()
    train(source, tmp_path / "mine", messages, total_images=None, resume=True)
    assert "the run is finished after 96 images" in messages[-3]
    assert "--max-images makes it longer" in messages[-3]


def test_a_run_ends_when_its_time_is_up_and_resumes_at_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, messages, clock, train_step = write_images(tmp_path / "photos", 50), list[str](), [0.0], Trainer.train_step

    def train_step_of_ten_seconds(trainer: Trainer) -> float:
        clock[0] += 10
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step_of_ten_seconds)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    train(source, tmp_path / "mine", messages, max_seconds=15)
    assert TrainingState.read(tmp_path / "mine" / STATE).step == 2
    train(source, tmp_path / "mine", messages, total_images=None, resume=True)
    assert TrainingState.read(tmp_path / "mine" / STATE).step == 4
    assert ncml.load(tmp_path / "mine").config.training.total_images == 128


def test_images_are_decoded_once_and_again_when_they_change(tmp_path: Path) -> None:
    source, cache = write_images(tmp_path / "photos", 20), tmp_path / "cache"
    first = dataset.load(source, 8, 8, cache_folder=cache)
    decoded: list[int] = []

    def again() -> dataset.Dataset:
        decoded.clear()
        return dataset.load(
            source, 8, 8, cache_folder=cache, on_progress=lambda progress: decoded.append(progress.done)
        )

    written = (cache / "images.npy").stat().st_mtime_ns
    second = again()
    assert (cache / "images.npy").stat().st_mtime_ns == written
    assert torch.equal(second.images_NHWC, first.images_NHWC)
    assert torch.equal(second.labels_N, first.labels_N)
    assert (second.classes, second.inventory) == (first.classes, first.inventory)
    plain = dataset.load(source, 8, 8)
    assert torch.equal(plain.images_NHWC, first.images_NHWC)
    assert plain.inventory == first.inventory

    (cache / "labels.npy").write_bytes(b"")  # incomplete
    assert torch.equal(again().labels_N, first.labels_N)
    description = json.loads((cache / "description.json").read_text())
    del description["inventory"]["order"]  # written by an earlier version
    (cache / "description.json").write_text(json.dumps(description))
    assert again().inventory == first.inventory
    Image.new("RGB", (8, 8)).save(Path(source) / "dark" / "new.png")
    assert len(again()) == 21
    assert len(dataset.load(source, 4, 4, cache_folder=cache).images_NHWC[0]) == 4


def test_a_part_of_a_large_set_is_read_from_the_disk_as_it_is_drawn(tmp_path: Path) -> None:
    """A batch is drawn from 512 MiB of images without holding more than a few in memory."""
    code = """
import sys, numpy as np, torch
from ncml.data.dataset import Dataset
from tests.memory import peak
pixels = np.lib.format.open_memmap(sys.argv[1], "w+", np.uint8, (1 << 17, 32, 43, 3))
pixels[-1] = 7
whole = Dataset(torch.from_numpy(np.load(sys.argv[1], mmap_mode="c")), torch.zeros(len(pixels), dtype=torch.long), ())
before = peak()
part = whole.part("fit")
assert len(part) == sum(i % 50 >= 7 for i in range(len(whole)))
drawn = part.take(torch.tensor([0, len(part) - 1])).images_NHWC
assert drawn[0].max() == 0 and drawn[1].min() == 7
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "large.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 2**20


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ncml.cli", "train", "smoke", "--data", str(folder), "--threads", "1", *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_to_end(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    """After SIGKILL between two intervals, the weights are those of an uninterrupted run."""
    write_images(tmp_path / "photos", 50)
    code = """
import os, signal, sys
from ncml.cli.main import main
from ncml.training.trainer import Trainer
train_step, steps = Trainer.train_step, []
def step_or_die(self):
    if len(steps) == 5:  # the first interval ended after three
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(train_step(self))
    return steps[-1]
Trainer.train_step = step_or_die
main(sys.argv[1:])
"""
    options = ("--max-images", "320", "--interval", "96", "--out", "killed")
    arguments = command(tmp_path / "photos", *options)[3:]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/config.json").exists()
    train(str(tmp_path / "photos"), tmp_path / "killed", total_images=None, resume=True, interval=96)
    train(str(tmp_path / "photos"), tmp_path / "whole", total_images=320, interval=96)
    one, other = (state(tmp_path / name) for name in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_what_was_saved(tmp_path: Path) -> None:
    """The maximum size of a file that this process may write simulates a full disk."""
    source, out = write_images(tmp_path / "photos", 50), tmp_path / "mine"
    train(source, out, total_images=64)
    saved = (out / STATE).read_bytes()
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(saved) // 2},) * 2)
from ncml.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = command(tmp_path / "photos", "--max-images", "128", "--out", str(out), "--resume")[3:]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the run cannot be saved to" in done.stderr
    assert "after 128 images" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / STATE).read_bytes() == saved
    assert sorted(path.name for path in (out / "training").glob("*state*")) == ["state.safetensors"]


def test_only_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    """Half of a state, left by a killed process, is removed."""
    source, out = write_images(tmp_path / "photos", 50), tmp_path / "mine"
    with exclusive(out), pytest.raises(InputError, match=r"another process is training in .*mine: wait") as refused:
        train(source, out)
    assert refused.value.field == "out"
    assert not (out / "training/images").exists()
    unfinished = out / "training/.state.safetensors.1234.new"
    unfinished.write_bytes(b"half")
    assert train(source, out, total_images=32) is not None
    assert not unfinished.exists()


def test_disk_space_is_reserved_by_writing_where_it_cannot_be_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS lacks posix_fallocate."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(image_store, "BLOCK_BYTES", 1000)
    source, cache = write_images(tmp_path / "photos", 20), tmp_path / "cache"
    cached = dataset.load(source, 8, 8, cache_folder=cache)
    assert torch.equal(cached.images_NHWC, dataset.load(source, 8, 8).images_NHWC)
    assert (cache / "images.npy").stat().st_size == 128 + 20 * 8 * 8 * 3


def test_a_disk_that_is_full_after_the_last_step_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, messages = write_images(tmp_path / "photos", 50), tmp_path / "mine", list[str]()

    def save(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(TrainingError) as refused:
            train(source, out)
    assert str(refused.value).endswith(
        "mine (No space left on device); all 128 images are saved: free disk space, and add --resume to the command."
    )
    train(source, out, messages, resume=True)
    assert any("the run is finished after 128 images" in line for line in messages)
    assert (out / "card.md").exists()


@pytest.mark.parametrize("system", ["", "import os; del os.posix_fallocate"], ids=["Linux", "macOS"])
def test_decoded_images_that_do_not_fit_on_the_disk_are_refused_before_they_are_read(
    tmp_path: Path, system: str
) -> None:
    write_images(tmp_path / "photos", 50)
    code = f"""
import resource, sys
{system}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096,) * 2)
from ncml.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = command(tmp_path / "photos", "--out", str(tmp_path / "mine"))[3:]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "has no room for 0.0 GiB of decoded images" in done.stderr


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """With torchrun and gloo, each process computes its half of a batch in two parts: same losses, same weights."""
    source = write_images(tmp_path / "photos", 60)
    options = ("--max-images", "256", "--interval", "64", "--grad-accum-steps", "2", "--out", str(tmp_path / "two"))
    done = run_to_end(*TWO_PROCESSES, *command(tmp_path / "photos", *options)[1:])
    assert "fp32 on 2 processes" in done.stderr
    train(source, tmp_path / "one", total_images=256, interval=64)
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    assert "on 2 processes, each on " in (tmp_path / "two" / "card.md").read_text()
    cards = [(tmp_path / name / "card.md").read_text().partition("Learning curve")[2] for name in ("one", "two")]
    figures = [[float(cell) for cell in card.replace(",", "").split() if cell[0].isdigit()] for card in cards]
    assert len(figures[0]) == 3 * 4
    assert figures[0] == pytest.approx(figures[1], abs=2e-3)


def test_a_run_cools_down_in_a_separate_folder(tmp_path: Path) -> None:
    """The branch starts with the weights and moments of a run that does not change."""
    source, run = write_images(tmp_path / "photos", 60), tmp_path / "constant"
    train(source, run, total_images=128)
    before = (run / STATE).read_bytes()
    cooled = train(source, tmp_path / "cooled", total_images=256, cooldown_from=run)
    assert cooled is not None
    assert cooled.metrics["images_seen"] == 256
    assert (run / STATE).read_bytes() == before
    assert not torch.equal(state(run)["network.head.weight"], state(tmp_path / "cooled")["network.head.weight"])
    with pytest.raises(InputError, match="contains no training run; name a folder that contains one") as refused:
        train(source, tmp_path / "other", total_images=256, cooldown_from=tmp_path / "photos")
    assert refused.value.field == "cooldown-from"
    with pytest.raises(InputError, match="--cooldown-from needs --max-images"):
        train(source, tmp_path / "other", total_images=None, cooldown_from=run)


def test_two_processes_compute_what_one_does_with_muon(tmp_path: Path) -> None:
    """Both apply the same orthogonalised updates.

    The order of sums makes them differ slightly; without averaged gradients it is by three quarters of the update.
    """
    code = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from ncml import recipes
from ncml.config import Config
from ncml.data.dataset import Dataset
from ncml.training.distributed import process_group
from ncml.training.state import TrainingState
from ncml.training.trainer import Trainer
torch.set_num_threads(1)
base = recipes.smoke()
recipe = replace(base, training=replace(base.training, muon_learning_rate=4e-3, batch_size=16))
pixels = torch.randint(256, (64, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
data = Dataset(pixels, torch.arange(64) % 2, ("dark", "light"))
with process_group("cpu") as group:
    trainer = Trainer(recipe, data, group=group)
    start, end = map(Path, sys.argv[1:])
    if group.is_main:
        trainer.save(start)
    for _ in range(4):
        trainer.train_step()
    if group.is_main:
        trainer.save(end)
    del trainer
"""
    start, one, two = (tmp_path / f"{name}.safetensors" for name in ("start", "one", "two"))
    (tmp_path / "muon.py").write_text(code)
    for processes, path in (((sys.executable,), one), (TWO_PROCESSES, two)):
        run_to_end(*processes, str(tmp_path / "muon.py"), str(start), str(path))
    initial, first, second = load_file(start), load_file(one), load_file(two)
    assert any("momentum_buffer" in name for name in first)
    assert first.keys() == second.keys()
    for name in (name for name in first if name.startswith("network.")):
        update = first[name] - initial[name]
        assert torch.norm(second[name] - first[name]) <= 0.25 * torch.norm(update), name


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a batch of 32 images cannot be divided into 3 parts") as refused:
        train(write_images(tmp_path / "photos", 50), tmp_path / "mine", execution=run.Execution(grad_accum_steps=3))
    assert refused.value.field == "batch-size"
    assert not (tmp_path / "mine").exists()


def test_a_run_that_diverges_leaves_its_last_state(tmp_path: Path) -> None:
    source, out = write_images(tmp_path / "photos", 50), tmp_path / "mine"
    train(source, out, total_images=64)
    saved = (out / STATE).read_bytes()
    wild = replace(recipes.smoke(), training=replace(recipes.smoke().training, learning_rate=1e3))
    diverged = r"diverged at step \d+ .* of image \d+ of the training part at .* grey levels.*; "
    with pytest.raises(
        TrainingError, match=diverged + "nothing was saved yet: start again with a lower --learning-rate"
    ):
        run.train(wild, source, tmp_path / "new", command="", total_images=640, interval=10_000)
    with pytest.raises(TrainingError, match=diverged + "the last saved state is intact: --resume with a lower"):
        run.train(wild, source, out, command="", total_images=640, resume=True, interval=10_000)
    assert (out / STATE).read_bytes() == saved
    assert train(source, out, total_images=96, resume=True) is not None


def test_two_processes_return_to_the_saved_state_together(tmp_path: Path) -> None:
    """They save and go back at the same steps, though their clocks differ, and end with the same weights."""
    code = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from ncml import recipes
from ncml.data.dataset import Dataset
from ncml.training.distributed import process_group
from ncml.training import loop
from ncml.training.trainer import Trainer
torch.set_num_threads(1)
base = recipes.smoke()
recipe = replace(base, training=replace(base.training, batch_size=32, total_images=75 * 32, ema_images=320))
pixels = torch.randint(256, (64, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
data = Dataset(pixels, torch.arange(64) % 2, ("dark", "light"))
folder = Path(sys.argv[1])
with process_group("cpu") as group:
    trainer, messages = Trainer(recipe, data, group=group), []
    loop.time = SimpleNamespace(monotonic=lambda: trainer.step * (1 + 2 * group.rank))
    def on_step(trainer, mean_loss, rate):
        if trainer.step == 65:
            with torch.no_grad():
                trainer.network.head.weight.mul_(30)
    loop.train_loop(
        trainer,
        folder / "state.safetensors",
        held_out=data,
        save_seconds=10,
        on_step=on_step,
        on_message=messages.append,
    )
    weights = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    torch.save((weights, messages, trainer.skipped_steps), folder / f"{group.rank}.pt")
    del trainer
"""
    (tmp_path / "diverging.py").write_text(code)
    run_to_end(*TWO_PROCESSES, str(tmp_path / "diverging.py"), str(tmp_path))
    (first, messages, skipped), (second, others, skipped_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(messages) == 1
    assert "continues with the weights saved after 1,920 images" in messages[0]  # by rank 0's clock, at step 60
    assert messages == others
    assert skipped == skipped_too > 5
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
