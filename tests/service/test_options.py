"""Every option that `ncml.options` declares arrives at the sampler from wherever it can be given."""

import base64
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import ncml
from ncml import checkpoint
from ncml import model as library
from ncml.cli import generate_options
from ncml.cli import main as cli
from ncml.client import Client, exchange
from ncml.errors import InputError
from ncml.images import to_png
from ncml.options import DEFAULT_NAMES, OPTIONS, ScoreOptions
from ncml.sampling.sample import Plan
from service import answers
from service.app import create_app
from service.settings import Settings
from tests.ncml import nets
from tests.service.live import served
from worker import job_results
from worker.contract import CompleteJob, GenerateJob, Pixels, ScoreJob
from worker.engine import BatchRunner
from worker.messages import Batch, EngineSettings
from worker.registry import describe

VALUES: dict[str, Any] = {"noise": 2.5, "steps": 3, "solver": "heun", "guidance": 2.0, "temperature": 0.9}
"""A value of each option that is not the default."""

SCORE_VALUES: dict[str, Any] = {
    "noise": 2.5, "map": True, "ood": False, "calibration": "weak", "statistic": "multiscale", "sanity": True,
}  # fmt: skip
"""A value of each option of a score that is not the default."""

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "local"
    checkpoint.save(folder, nets.network(nets.config(), dtype=torch.float32))
    return folder


def test_these_tests_know_every_option() -> None:
    assert VALUES.keys() == OPTIONS.keys()
    assert SCORE_VALUES.keys() == ScoreOptions.model_fields.keys()


@pytest.mark.parametrize(
    "names",
    [exchange.ScoreOptions.__annotations__, inspect.signature(library.Model.score).parameters],
    ids=["client", "library"],
)
def test_the_client_and_the_library_have_every_option_of_a_score(names: Mapping[str, Any]) -> None:
    assert names.keys() >= ScoreOptions.model_fields.keys()


@pytest.mark.parametrize("path", ["/generate", "/complete"])
@pytest.mark.parametrize("place", ["query", "form", "json"])
def test_a_job_has_the_options_of_the_query_the_form_or_the_json(
    client: TestClient, jobs, path: str, place: str
) -> None:
    values, png = VALUES | {"class": "cat"}, to_png(IMAGE)
    files = {"image": ("image.png", png, "image/png")} if path == "/complete" else None
    if place == "json":
        image = {"image": base64.b64encode(png).decode()} if files else {}
        response = client.post(path, json=values | image)
    else:
        response = client.post(path, files=files, **{"params" if place == "query" else "data": values})
    assert response.status_code == 200, response.text
    assert [job.sampling for job in jobs.values()] == [VALUES]


def test_a_job_has_the_options_of_the_client(queue, jobs) -> None:
    with served(create_app(Settings(), queue)) as url, Client(url) as client:
        client.generate(class_="cat", **VALUES)
        client.complete(IMAGE, class_="cat", **VALUES)
    assert [job.sampling for job in jobs.values()] == [VALUES, VALUES]


class RecordingModel:
    """A model that records the options of its calls."""

    version = "ab" * 32

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate(self, n: int, **options: Any) -> np.ndarray:
        self.calls.append({name: options[name] for name in OPTIONS})
        return np.stack([IMAGE] * n)

    def complete(self, images: np.ndarray, *, n: int = 1, **options: Any) -> np.ndarray:
        return self.generate(n, **options)


def test_the_engine_samples_with_the_options_of_a_job(tmp_path: Path) -> None:
    model = RecordingModel()
    registry: Any = SimpleNamespace(get=lambda name, version: model)
    pipe: Any = None
    runner = BatchRunner(pipe, registry, EngineSettings(directories=(tmp_path,), load=ncml.load))
    pixels = Pixels(height=8, width=8, data=IMAGE.tobytes())
    for job in (GenerateJob(model="m", **VALUES), CompleteJob(model="m", image=pixels, **VALUES)):
        assert runner.run(Batch(1, {"j": job})).outcomes["j"].error is None
    assert model.calls == [VALUES, VALUES]


def test_a_command_samples_with_the_options_of_its_flags(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RecordingModel()
    monkeypatch.setattr(generate_options, "load", lambda description, device: model)
    flags = [text for name, value in VALUES.items() for text in (f"--{name}", str(value))]
    (tmp_path / "half.png").write_bytes(to_png(IMAGE[:4]))
    for command in (["generate"], ["complete", str(tmp_path / "half.png")]):
        out = ["--model", str(folder), "--class", "a", "-o", str(tmp_path / "out.png")]
        assert cli.main([*command, *out, *flags]) == 0
    assert model.calls == [VALUES, VALUES]


def test_the_library_samples_with_the_options_of_a_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def record(network: object, plan: Plan, *_: object) -> np.ndarray:
        plans.append(plan)
        return IMAGE[None]

    monkeypatch.setattr(library, "generate_images", record)
    model = ncml.load(folder)
    model.generate(classes="a", **VALUES)
    model.complete(IMAGE, classes="a", **VALUES)
    assert [asdict(plan.settings).items() >= VALUES.items() for plan in plans] == [True, True]


def test_the_library_names_its_options_and_refuses_others(folder: Path) -> None:
    model = ncml.load(folder)
    for method in (model.generate, model.complete):
        assert inspect.signature(method).parameters.keys() >= OPTIONS.keys()
    assert all(f"{name}: {option.help}" in (model.generate.__doc__ or "") for name, option in OPTIONS.items())
    for name, meant in (("nosie", "noise"), ("seed", "seeds"), ("class_", "classes")):
        with pytest.raises(InputError, match=rf"^{name} is not an option of sampling: did you mean {meant}\?$"):
            model.generate(**{name: 1})  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_the_defaults_of_a_model_folder_are_published(folder: Path, tmp_path: Path) -> None:
    network, _ = checkpoint.load(folder)
    checkpoint.save(tmp_path / "m", network, sampling=VALUES)  # pyright: ignore[reportArgumentType]
    stored = json.loads((tmp_path / "m" / "config.json").read_text())["sampling"]
    assert stored == {DEFAULT_NAMES[name]: value for name, value in VALUES.items()}
    model = ncml.load(tmp_path / "m")
    published = describe("m", model, None)
    assert published.model_dump().items() >= stored.items()
    for limits in (model.sampling_limits, published.sampling_limits):
        assert asdict(limits.defaults).items() >= VALUES.items()


def test_every_value_of_a_score_crosses_the_queue_and_is_answered() -> None:
    values = set(inspect.signature(ncml.Score).parameters)
    assert job_results.Score.model_fields.keys() == values - {"file"}
    assert answers.Score.model_fields.keys() == values - {"flipped_bpd"} | {"sanity"}


@pytest.mark.parametrize("place", ["query", "form", "json"])
@pytest.mark.parametrize("name", SCORE_VALUES)
def test_a_score_job_has_the_options_of_its_request(client: TestClient, jobs, name: str, place: str) -> None:
    value, png = SCORE_VALUES[name], to_png(IMAGE)
    if place == "json":
        response = client.post("/score", json={name: value, "image": base64.b64encode(png).decode()})
    else:
        text = {name: str(int(value) if isinstance(value, bool) else value)}
        files = {"image": ("image.png", png, "image/png")}
        response = client.post("/score", files=files, **{"params" if place == "query" else "data": text})
    assert response.status_code == 200, response.text
    [job] = jobs.values()
    assert job.scoring == ScoreOptions(**{name: value}).scoring


@pytest.mark.parametrize("name", sorted(SCORE_VALUES.keys() - {"map"}))
def test_no_option_of_a_score_is_ignored_with_tiles(client: TestClient, name: str) -> None:
    files = {"image": ("image.png", to_png(IMAGE), "image/png")}
    response = client.post("/score", files=files, params={name: SCORE_VALUES[name], "tile": 1})
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error == {"field": name, "detail": f"{name} cannot be combined with tile=1; omit {name} or tile."}


def test_the_engine_scores_with_the_options_of_a_job(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def record(images: np.ndarray, **options: Any) -> list[ncml.Score]:
        calls.append({name: options[name] for name in SCORE_VALUES})
        return [ncml.Score(1.0, -1.0) for _ in images]

    registry: Any = SimpleNamespace(get=lambda name, version: SimpleNamespace(version="ab" * 32, score=record))
    pipe: Any = None
    runner = BatchRunner(pipe, registry, EngineSettings(directories=(tmp_path,), load=ncml.load))
    job = ScoreJob(model="m", images=(Pixels(height=8, width=8, data=IMAGE.tobytes()),), **SCORE_VALUES)
    assert runner.run(Batch(1, {"j": job})).outcomes["j"].error is None
    assert calls == [SCORE_VALUES]
