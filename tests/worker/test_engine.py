"""The engine through its pipe: jobs that are dropped while they are computed, and calibrations."""

import errno
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ncml.calibration import held_out_power
from ncml.calibration.calibrated_copy import calibrate_copy
from ncml.calibration.estimation import calibrate
from ncml.errors import InputError
from ncml.model import Model
from ncml.progress import Progress
from tests.conftest import eventually
from tests.worker.fleet import score
from tests.worker.synthetic import SyntheticModel, load, write_model
from worker import calibrating
from worker import engine as engine_module
from worker.contract import CalibrateJob
from worker.descriptors import ModelDescriptor
from worker.engine import CAPACITY_S, BatchRunner
from worker.job_results import WorkerFault
from worker.main import load as load_model
from worker.messages import Batch, BatchResult, Catalogue, Drop, EngineSettings, Opening, Outcome, Step
from worker.metrics import WorkerMetrics
from worker.process import EngineDied, EngineProcess
from worker.registry import ModelRegistry, describe
from worker.supervisor import EngineSupervisor


def test_a_job_dropped_while_it_is_computed_alone_does_not_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Jobs are computed alone after their batch failed, because any of them could be the cause."""
    write_model(tmp_path, batch_s=0.1, rows=40)
    engine = EngineProcess(EngineSettings(directories=(tmp_path,), load=load))
    try:
        assert isinstance(engine.receive(60), Opening)
        assert isinstance(engine.receive(60), Catalogue)
        engine.send(Batch(1, {"slow": score(class_name="slow"), "bad": score(class_name="bad")}))
        assert isinstance(engine.receive(10), Step)  # so the slow job is being computed, alone
        engine.send(Drop(1, frozenset({"slow"})))
        while isinstance(done := engine.receive(10), Step):
            pass
    finally:
        engine.stop()
    assert isinstance(done, BatchResult)
    assert done.outcomes["slow"].error is None
    assert done.outcomes["bad"].error
    assert done.outcomes["bad"].error.reason == "input"
    assert "the computation failed" not in capfd.readouterr().err


def test_an_engine_that_loads_many_models_is_not_considered_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It announces each folder, and is silent for 40 s while it loads one; the last one takes forever."""
    now_s, ended = 0.0, False
    folders = [Opening(tmp_path / str(i), ()) for i in range(3)]
    messages = iter([message for folder in folders for message in (folder, None, None)])

    class LoadingEngine:
        pid = 1

        def __init__(self, settings: EngineSettings) -> None:
            pass

        def receive(self, timeout_s: float) -> Opening | None:
            nonlocal now_s
            message = next(messages, None)
            now_s += 0 if message else 20
            return message

        def stop(self) -> None:
            nonlocal ended
            ended = True

    monkeypatch.setattr("worker.supervisor.EngineProcess", LoadingEngine)
    monkeypatch.setattr("worker.supervisor.time", SimpleNamespace(monotonic=lambda: now_s))
    settings = EngineSettings(directories=(tmp_path,), load=load)
    supervisor = EngineSupervisor(settings, WorkerMetrics(), hang_s=50, on_catalogue=lambda: None)
    while not ended:
        assert supervisor.ready_engine() is None
    assert now_s == 140


class ScriptedEngine:
    """An engine that sends prepared messages, then dies."""

    pid = 1
    messages: Iterator[Opening | Catalogue]

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    def receive(self, timeout_s: float) -> Opening | Catalogue:
        if (message := next(self.messages, None)) is None:
            raise EngineDied("exit status 1")
        return message

    def stop(self) -> None:
        pass


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSupervisor:
    monkeypatch.setattr("worker.supervisor.EngineProcess", ScriptedEngine)
    settings = EngineSettings(directories=(tmp_path,), load=load)
    return EngineSupervisor(settings, WorkerMetrics(), hang_s=50, on_catalogue=lambda: None)


def described(directory: Path, *names: str) -> tuple[ModelDescriptor, ...]:
    return tuple(describe(name, load(write_model(directory, name), device="cpu"), None) for name in names)


def test_models_stay_published_until_a_new_engine_has_described_them(
    tmp_path: Path, supervisor: EngineSupervisor
) -> None:
    """Otherwise requests for them would be refused, and jobs for them given to workers that do not serve them."""
    a, b, c, d = described(tmp_path, *"abcd")
    steps = [
        (Catalogue((a, b, c, d), {}), "abcd"),
        (Catalogue((b,), {}, is_partial=True), "abcd"),  # the next engine
        (Catalogue((b,), {"c": "damaged"}, is_partial=True), "abd"),
        (Catalogue((a, b), {"c": "damaged"}), "ab"),  # the folder of d was removed
    ]
    for catalogue, served in steps:
        supervisor.note(catalogue)
        assert "".join(model.name for model in supervisor.catalogue.models) == served
        assert supervisor.catalogue.is_partial == catalogue.is_partial
    supervisor.note(Catalogue((a, b), {"c": "damaged"}, is_partial=True))
    supervisor.note(Catalogue((a, b), {"c": "damaged"}))
    assert not supervisor.catalogue.is_partial  # although the models are the same


def test_folders_that_cannot_be_served_are_measured(tmp_path: Path, supervisor: EngineSupervisor) -> None:
    """An alert names them, since the worker is ready as long as it serves another model."""
    models, unusable = described(tmp_path, "a"), supervisor._metrics.model_unusable

    def measured() -> dict[str, float]:
        return {sample.labels["model"]: sample.value for family in unusable.collect() for sample in family.samples}

    supervisor.note(Catalogue(models, {"b": "it has format 2", "c": "damaged"}))
    assert measured() == {"b": 1, "c": 1}
    supervisor.note(Catalogue(models, {"c": "damaged"}))
    assert measured() == {"c": 1}


def test_a_folder_that_ends_engines_after_others_are_served_is_not_loaded_again(
    tmp_path: Path, supervisor: EngineSupervisor
) -> None:
    healthy, lethal = Opening(tmp_path / "a", ()), Opening(tmp_path / "b", ())
    for _ in range(2):
        partial = Catalogue(described(tmp_path, "a"), {}, is_partial=True)
        ScriptedEngine.messages = iter((healthy, partial, lethal))
        assert supervisor.ready_engine() is None
    ScriptedEngine.messages = iter(())
    supervisor.ready_engine()
    assert supervisor._settings.quarantined == {lethal.folder: ((), "exit status 1")}


@pytest.fixture(autouse=True)
def few_power_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the power of calibrations on few images, in this process."""
    monkeypatch.setattr(held_out_power, "GENERATED", 5)
    monkeypatch.setitem(calibrate.__kwdefaults__, "power_images", 10)


def load_quickly(folder: Path, *, device: str) -> Model:
    """Load a model in an engine whose calibrations measure their power on few images, too."""
    held_out_power.GENERATED = 5
    calibrate.__kwdefaults__["power_images"] = 10
    return load_model(folder, device=device)


def refuse_memory(*_: object, **__: object) -> None:
    print("attempt", file=sys.stderr, flush=True)
    raise MemoryError


def load_short_of_memory(folder: Path, *, device: str) -> Model:
    """Load a model in an engine without enough memory to calibrate."""
    calibrating.make_folder = refuse_memory
    return load_model(folder, device=device)


def test_a_calibration_measures_fewer_images_at_once_until_they_fit(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "tiny")
    engine = EngineProcess(
        EngineSettings(directories=(tmp_path,), load=load_short_of_memory, calibrates=True, threads=1, max_batch=8)
    )
    try:
        while not isinstance(engine.receive(100), Catalogue):
            pass
        outcome, _ = run(engine, calibration(60))
    finally:
        engine.stop()
    assert outcome.error
    assert "memory" in outcome.error.detail
    output = capfd.readouterr().err
    assert output.count("attempt\n") == 4
    assert "2 images do not fit in memory; continuing with 1 at a time" in output


def calibration(count: int, **fields: object) -> CalibrateJob:
    pixels = np.random.default_rng(0).integers(96, 160, (count, 8, 8, 3), np.uint8).tobytes()
    values = {"model": "tiny", "name": "mine", "images": count, "height": 8, "width": 8, "pixels": pixels}
    return CalibrateJob.model_validate(values | fields)


@pytest.fixture
def engine(model_folder: Path, tmp_path: Path) -> Iterator[EngineProcess]:
    """A real engine with the model `tiny`, which may write calibrated copies."""
    directory = tmp_path / "models"
    shutil.copytree(model_folder, directory / "tiny")
    engine = EngineProcess(EngineSettings(directories=(directory,), load=load_quickly, calibrates=True, threads=1))
    while not isinstance(engine.receive(100), Catalogue):
        pass
    yield engine
    engine.stop()


def run(engine: EngineProcess, job: CalibrateJob, number: int = 1) -> tuple[Outcome, list[object]]:
    """Run a calibration; return its outcome, and the messages before it."""
    engine.send(Batch(number, {"job": job}))
    messages: list[object] = []
    while not isinstance(message := engine.receive(100), BatchResult):
        messages.append(message)
    return message.outcomes["job"], messages


def test_a_calibrated_model_is_served_at_once(engine: EngineProcess, tmp_path: Path) -> None:
    outcome, messages = run(engine, calibration(60))
    assert outcome.error is None
    assert outcome.model
    assert outcome.model.name == "mine"
    assert outcome.calibration
    assert (outcome.calibration.n_fit, outcome.calibration.n_rank) == (20, 40)
    assert "detects most of" in outcome.calibration.summary
    assert {step.stage for step in messages if isinstance(step, Step)} & {"fit", "rank", "power"}
    catalogue = [message for message in messages if isinstance(message, Catalogue)][-1]
    assert [model.name for model in catalogue.models] == ["mine", "tiny"]
    assert catalogue.models[0].default_calibration
    assert catalogue.models[0].default_calibration.n_rank == 40
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["mine", "tiny"]
    repeated, messages = run(engine, calibration(60), 2)  # its worker was lost before it could report the result
    assert (repeated.error, repeated.calibration) == (None, outcome.calibration)
    assert not any(isinstance(message, Step) for message in messages)
    outcome, _ = run(engine, calibration(60, false_positive_rate=0.1), 3)
    assert outcome.error
    assert (outcome.error.field, outcome.error.reason) == ("name", "input")
    assert "a model 'mine' already exists" in outcome.error.detail


def test_a_refused_or_dropped_calibration_leaves_no_folder(engine: EngineProcess, tmp_path: Path) -> None:
    outcome, _ = run(engine, calibration(30))
    assert outcome.error
    assert (outcome.error.field, outcome.error.reason) == ("image", "input")
    assert "30 images are too few: use at least 39" in outcome.error.detail
    engine.send(Batch(2, {"job": calibration(400)}))
    while not isinstance(engine.receive(100), Step):
        pass
    engine.send(Drop(2, frozenset({"job"})))
    while not isinstance(message := engine.receive(100), BatchResult):
        pass
    assert message.outcomes["job"].error is None
    assert message.outcomes["job"].calibration is None
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


def test_a_calibration_canceled_at_the_last_moment_leaves_no_folder(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete: list[bool] = []
    monkeypatch.setattr(
        calibrating,
        "calibrate_copy",
        lambda *args, **kwargs: (calibrate_copy(*args, **kwargs), complete.append(True))[0],
    )
    own, other, keyed = "a" * 32, "b" * 32, "key-" + "c" * 40
    running = f".mine.{keyed}.1"
    left = [(f".mine.{own}.1", 0), (f".mine.{other}.1", 7200), (f".v1.2.{keyed}.1", 7200), (running, 0)]
    for name, age_s in (*left, (f".v1.2.{keyed}.1.incoming", 7200), (".cache.v1.0", 7200)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(time.time() - age_s,) * 2)

    def cancel_when_complete(progress: Progress) -> None:
        if complete:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrating.make_folder(
            load_model(model_folder, device="cpu"), calibration(60), own, [tmp_path], cancel_when_complete
        )
    assert {path.name for path in tmp_path.iterdir()} == {running, ".cache.v1.0"}  # those of killed workers are removed


def test_calibration_is_off_by_default_and_needs_a_writable_directory(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """These are the operator's faults: the client gets no field to correct, and no path of the worker."""
    runner = EngineProcess(EngineSettings(directories=(model_folder.parent,), load=load_model, threads=1))
    try:
        while not isinstance(runner.receive(100), Catalogue):
            pass
        outcome, _ = run(runner, calibration(60, model=model_folder.name))
        assert outcome.error
        assert (outcome.error.reason, outcome.error.field) == ("worker", None)
        assert "NCML_ALLOW_CALIBRATION=1" in outcome.error.detail
    finally:
        runner.stop()
    model, directory = load_model(model_folder, device="cpu"), tmp_path / "no" / "models"
    with pytest.raises(WorkerFault, match="no model directory of the worker is writable") as fault:
        calibrating.make_folder(model, calibration(60), "job", [directory], lambda _: None)
    assert str(tmp_path) not in str(fault.value)
    assert str(directory) in caplog.text


def test_a_full_disk_is_noticed_before_a_calibration_computes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, stages = load_model(model_folder, device="cpu"), list[str]()

    def calibrate() -> None:
        calibrating.make_folder(model, calibration(60), "job", [tmp_path], lambda step: stages.append(step.stage))

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(WorkerFault, match="the disk of the new models is full") as fault:
            calibrate()
    assert not stages
    assert "bytes are needed, 1,000 free" in caplog.text
    assert str(tmp_path) in caplog.text
    assert str(tmp_path) not in str(fault.value)

    def fill(*_: object) -> None:  # the disk fills meanwhile
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ncml.calibration.calibrated_copy.descriptions.save", fill)
    with pytest.raises(WorkerFault, match="the disk of the new models is full"):
        calibrate()
    assert "power" in stages
    assert not list(tmp_path.iterdir())


def test_clients_make_a_limited_number_of_models(model_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two", ".unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / calibrating.REQUEST).touch()
    (tmp_path / "the operator's").mkdir()
    model = load_model(model_folder, device="cpu")
    with pytest.raises(InputError, match="clients have made 2 models, the most that the service holds; ask"):
        calibrating.make_folder(model, calibration(60), "job", [tmp_path], lambda _: None, max_models=2)
    with pytest.raises(InputError, match="images"):  # too few of them, which is found later
        calibrating.make_folder(model, calibration(2), "job", [tmp_path], lambda _: None, max_models=3)


def test_an_engine_removes_the_images_that_a_killed_one_has_left(tmp_path: Path) -> None:
    names = [f".part-2.{job}.7{end}" for job, end in (("a" * 32, ".incoming"), ("key-" + "b" * 40, ""), ("c" * 32, ""))]
    *left, recent = [tmp_path / name for name in names]
    for folder in (*left, recent):
        (folder / "defective").mkdir(parents=True)
        (folder / "defective" / "jane-doe.png").write_bytes(b"an image of a client")
    for folder in left:
        os.utime(folder, (0, 0))
    engine = EngineProcess(EngineSettings(directories=(tmp_path,), load=load_quickly, calibrates=True, threads=1))
    eventually(lambda: [*tmp_path.iterdir()] == [recent])
    engine.stop()


class FailingModel(SyntheticModel):
    """Fails to score more than some images at once, and always with an error other than a lack of memory."""

    error: Exception = MemoryError()
    largest = 0
    sizes: list[int]
    pipe: tuple[Connection, Connection]

    def score(self, images: Any, **options: Any) -> Any:
        self.sizes.append(len(images))
        if len(images) > self.largest:
            raise self.error
        return super().score(images, **options)


@pytest.fixture
def failing(tmp_path: Path) -> FailingModel:
    model = FailingModel(write_model(tmp_path, batch_s=0.0))
    model.sizes, model.pipe = [], multiprocessing.Pipe()
    return model


def runner_of(model: FailingModel, device: str = "cpu") -> BatchRunner:
    registry = SimpleNamespace(get=lambda name, version: model)
    settings = EngineSettings(directories=(), load=load, device=device, max_batch=8)
    return BatchRunner(model.pipe[0], cast(ModelRegistry, registry), settings)


CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nit may be reported later")


@pytest.mark.parametrize(
    ("error", "fault", "is_replaced"),
    [
        (CUDA_ERROR, CUDA_ERROR, True),
        (CUDA_ERROR, None, False),
        (CUDA_ERROR, RuntimeError("CUDA out of memory"), False),
        (InputError("class", "this class cannot be computed"), CUDA_ERROR, False),
    ],
    ids=["lost", "usable", "full", "expected"],
)
def test_an_engine_whose_gpu_is_lost_ends(
    failing: FailingModel, monkeypatch: pytest.MonkeyPatch, error: Exception, fault: Exception | None, is_replaced: bool
) -> None:
    """Another one starts, and the jobs are computed again; else this one would fail every job of its lane."""
    monkeypatch.setattr(engine_module, "device_error", lambda device: fault)
    failing.error = error
    runner, batch = runner_of(failing, "cuda"), Batch(1, {"job": score()})
    if is_replaced:
        with pytest.raises(SystemExit) as end:
            runner.run(batch)
        assert end.value.code == 1
    else:
        assert runner.run(batch).outcomes["job"].error


def test_a_lack_of_memory_limits_batches_for_ten_minutes(
    failing: FailingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.largest = 2
    runner, now_s = runner_of(failing), time.monotonic()
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    batch = Batch(1, {str(i): score() for i in range(8)})
    for sizes in ([8, 4, 2, 2, 2, 2], [2, 2, 2, 2]):
        failing.sizes.clear()
        assert not any(outcome.error for outcome in runner.run(batch).outcomes.values())
        assert failing.sizes == sizes
    failing.largest, now_s = 8, now_s + CAPACITY_S + 1
    failing.sizes.clear()
    runner.run(batch)
    assert failing.sizes == [8]
