"""Detectors over HTTP: what reaches the queue, and what comes back in each format; and that all ways judge alike."""

import csv
import io
import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import ncml
from ncml.cli import main as cli
from ncml.cli import watch
from ncml.client import Client
from ncml.errors import ServiceError
from ncml.images import heat, open_image, resize_to, to_png
from ncml.images.tiling import Box
from ncml.ood.views.appearance import AppearanceView
from ncml.ood.views.view import Measurement
from service.app import create_app
from service.settings import Settings
from tests.conftest import eventually
from tests.receiver import write_secret
from tests.service.live import served
from worker.contract import ScoreJob
from worker.engine import BatchRunner
from worker.job_results import JobError
from worker.messages import Batch, EngineSettings
from worker.queue import JobQueue
from worker.redis_keys import pictures_key
from worker.registry import ModelRegistry


@pytest.fixture
def client(new_client: Callable[..., TestClient], detector: Any) -> TestClient:
    return new_client()


def flat(level: int, height: int = 48, width: int = 64) -> bytes:
    return to_png(np.full((height, width, 3), level, np.uint8))


def post(client: TestClient, *files: bytes, headers: dict[str, str] | None = None, **params: object) -> Any:
    images = [("image", (f"{i}.png", file, "image/png")) for i, file in enumerate(files)]
    return client.post("/score", files=images, params=params, headers=headers)


def last(jobs: Any) -> ScoreJob:
    *_, job = jobs.values()
    assert isinstance(job, ScoreJob)
    return job


# -- pictures of what it finds and misses


def test_pictures_are_served_as_long_as_a_worker_publishes_them(
    client: TestClient, worker: Any, model: Any, queue: JobQueue
) -> None:
    listed = client.get("/models/tiny").json()["detector"]["power"]["pictures"]
    assert listed["examples"] == [
        {
            "kind": "scratch",
            "size": "1 pixel wide",
            "is_found": False,
            "left": 8,
            "top": 32,
            "width": 144,
            "height": 144,
        }
    ]
    assert client.get("/models/tiny/pictures").status_code == 404
    queue.redis.set(pictures_key(listed["sha256"]), b"a sheet")
    answer = client.get("/models/tiny/pictures")
    assert (answer.status_code, answer.content) == (200, b"a sheet")
    assert answer.headers["content-type"] == "image/jpeg"
    assert client.get(f"/models/tiny@{model.version[:12]}/pictures").content == b"a sheet"
    worker.serve(model)
    answer = client.get("/models/tiny/pictures")
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:ncml:problem:no-pictures"
    assert "only detectors whose power was measured" in answer.json()["detail"]
    assert client.get("/models/other/pictures").json()["type"] == "urn:ncml:problem:no-such-model"


# -- the job


def test_the_original_reaches_the_queue_as_its_file_or_as_pixels_whichever_is_smaller(
    client: TestClient, jobs: Any
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    file = to_png(noise)
    assert len(file) > noise.nbytes
    assert post(client, flat(10), file).status_code == 200
    job = last(jobs)
    small, raw = job.originals
    assert (small.file, small.pixels) == (flat(10), None)
    assert (raw.file, raw.pixels) == (None, noise.tobytes())
    assert [(image.height, image.width) for image in job.originals] == [(48, 64), (40, 56)]
    assert job.images[1].data == resize_to(noise, 8, 8).tobytes()
    assert job.calibration == "detector"


@pytest.mark.parametrize(
    "params", [{"ood": 0}, {"calibration": "default"}, {"calibration": "weak"}, {"statistic": "bpd"}]
)
def test_other_verdicts_need_no_original(client: TestClient, jobs: Any, params: dict[str, object]) -> None:
    [result] = post(client, flat(10), **params).json()["results"]
    assert "detection" not in result
    assert last(jobs).originals == ()
    assert last(jobs).calibration == params.get("calibration")


@pytest.mark.parametrize(
    ("params", "field", "words"),
    [
        ({"statistic": "bpd", "calibration": "detector"}, "statistic", "a detector has views instead of statistics"),
        ({"statistics": "all"}, "statistics", "omit statistics, or name another calibration"),
        ({"calibration": "unknown"}, "calibration", "it has detector, default, weak"),
        ({"ood": 0, "calibration": "detector"}, "calibration", "cannot be combined with ood=0"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    client: TestClient, params: dict[str, object], field: str, words: str
) -> None:
    answer = post(client, flat(10), **params)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    assert words in answer.json()["detail"]


def test_a_model_without_a_detector_has_no_such_calibration(client: TestClient, worker: Any, model: Any) -> None:
    worker.serve(model)
    answer = post(client, flat(10), calibration="detector")
    assert answer.status_code == 422
    assert "no calibration 'detector'; it has default, weak" in answer.json()["detail"]


def test_more_images_than_one_slice_of_the_lane_are_refused(client: TestClient, jobs: Any) -> None:
    answer = post(client, *[flat(10)] * 5)
    assert answer.status_code == 422
    assert answer.json()["type"] == "urn:ncml:problem:too-many-images"
    assert answer.json()["detail"] == (
        "image: 5 images were sent; a detector judges at most 4 in one request, so send fewer at once."
    )
    assert client.get("/models").json()["max_judged_images"] == 4
    assert post(client, *[flat(10)] * 5, ood=0).status_code == 200
    assert not jobs["job-0"].originals


def test_several_large_images_are_refused_and_a_client_sends_them_one_by_one(
    client: TestClient, url: str, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.score.MAX_JUDGED_PIXELS", 2 * 48 * 64 - 1)
    answer = post(client, flat(10), flat(11))
    assert answer.status_code == 422
    assert "2 images of 6144 pixels were sent; a detector judges at most 6143 pixels" in answer.json()["detail"]
    assert post(client, flat(10, 100, 100)).status_code == 200  # one image may have as many as any
    with Client(url) as ncml_client:
        assert [score.bpd for score in ncml_client.score([flat(level) for level in range(6)])] == list(range(6))
    assert [job.n for job in jobs.values()] == [1] * 7


def test_an_image_that_is_too_small_is_refused_and_named(client: TestClient) -> None:
    answer = post(client, flat(10), flat(10, 20, 20))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "image[1]"
    assert "20x20 pixels, and a detector needs 32 on each side" in answer.json()["detail"]
    answer = post(client, flat(10, 32, 64 * 32 + 1))
    assert answer.status_code == 422
    assert "a detector judges at most 64 times as many on one side as on the other" in answer.json()["detail"]


def test_large_images_are_not_judged_in_tiles_that_are_not_calibrated(
    client: TestClient, worker: Any, model: Any, detector: Any
) -> None:
    worker.serve(model.model_copy(update={"calibrations": {}, "tiles": None, "detector": detector}))
    answer = post(client, flat(10), tile=1)
    assert "judges whole images at their own size; omit tile" in answer.json()["detail"]


# -- the result


def test_a_verdict_has_its_view_box_and_rank(client: TestClient) -> None:
    answer = post(client, flat(200))
    [result] = answer.json()["results"]
    assert result["bpd"] == 200
    assert result["ood"]["calibration"] == "detector"
    assert result["detection"] == {
        "width": 64, "height": 48, "view": "places", "score": 200, "p_value": 0.5, "threshold": 100, "is_ood": True,
        "is_weak": False, "box": {"left": 0, "top": 0, "width": 32, "height": 12},
        "views": {
            "places": {
                "score": 400, "standardised": 200, "part": 200, "box": {"left": 0, "top": 0, "width": 32, "height": 12}
            },
            "appearance": {
                "score": 1.5, "standardised": -1, "part": 0, "box": {"left": 0, "top": 0, "width": 32, "height": 12}
            },
        },
        "at_least_as_unusual": 3, "ranking_images": 28, "calibration_version": "de" * 32,
        "covered": {"left": 0, "top": 0, "width": 64, "height": 24},
        "differences": ["it is grey, and no good image is"],
    }  # fmt: skip
    [mapped] = post(client, flat(200), map=1).json()["results"]
    assert mapped["detection"]["map"] == [[2.5, 0.5]]


def test_a_png_shows_the_map_and_the_box_over_the_image(client: TestClient) -> None:
    answer = post(client, flat(200), headers={"Accept": "image/png"})
    drawn = open_image(answer.content)
    assert drawn.shape == (48, 64, 3)
    assert (drawn[0, 0] == (255, 32, 32)).all()  # the box
    np.testing.assert_allclose(drawn[40, 40], 100, atol=6)  # half of the image, where there is no map
    assert drawn[20, 20].sum() > drawn[20, 60].sum()
    several = post(client, flat(200), flat(90, 96, 40), headers={"Accept": "image/png"})
    both = open_image(several.content)
    assert both.shape == (64, 128, 3)  # the taller image is reduced to 64 pixels
    assert (both[0, 0] == heat.FLAGGED).all()
    assert (both[0, 64] == heat.UNFLAGGED).all()


def test_arrays_hold_the_map_at_the_size_of_the_image(client: TestClient) -> None:
    answer = post(client, flat(200), flat(90, 96, 40), headers={"Accept": "application/x-npz"})
    arrays = np.load(io.BytesIO(answer.content))
    assert arrays["view"].tolist() == ["places", "places"]
    assert arrays["box"].tolist() == [[0, 0, 32, 12], [0, 0, 20, 24]]
    assert arrays["at_least_as_unusual"].tolist() == [3, 3]
    assert arrays["grid_0"].tolist() == [[2.5, 0.5]]
    assert arrays["detection_map_1"].shape == (96, 40)
    assert arrays["detection_map_0"].shape == (48, 64)
    assert (arrays["detection_map_0"][24:] == 0).all()
    assert arrays["detection_map_0"][0, 0] == 2.5
    assert arrays["p_value"].tolist() == [0.5, 0.5]


def test_models_describe_the_detector(client: TestClient, detector: Any) -> None:
    [model] = client.get("/models").json()["models"]
    assert model["detector"] == json.loads(detector.model_dump_json())
    assert model["calibration"] == model["calibrations"]["default"]  # it keeps its meaning


# -- clients


@pytest.fixture
def url(queue: Any, detector: Any) -> Iterator[str]:
    with served(create_app(Settings(), queue)) as url:
        yield url


def test_a_client_returns_the_same_objects_as_the_library(url: str) -> None:
    with Client(url) as client:
        [score] = client.score(flat(200), map=True)
    detection = score.detection
    assert detection is not None
    assert detection.box == Box(0, 0, 32, 12)
    assert detection.views["places"].standardised == 200
    assert detection.rarity == "3 of 28 good images are at least as unusual"
    assert detection.differences == ("it is grey, and no good image is",)
    assert detection.map.shape == (48, 64)
    assert score.to_dict() | {"width": 32, "height": 12, "is_ood": True} == score.to_dict()


def test_a_client_sends_many_images_in_requests_that_a_detector_accepts(url: str, jobs: Any) -> None:
    with Client(url) as client:
        scores = client.score([flat(level) for level in range(9)])
        assert [score.bpd for score in scores] == list(range(9))
        assert [job.n for job in jobs.values()] == [4, 4, 1]
        with pytest.raises(ServiceError, match="no calibration"):
            client.score([flat(1)] * 9, calibration="unknown")


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["score", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_last_line_states_the_threshold_and_json_keeps_its_form(
    url: str, detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [tmp_path / "101.png", tmp_path / "90.png"]
    for image in images:
        image.write_bytes(flat(int(image.stem)))
    code, out, err = run_cli(capsys, *images, "--server", url)
    assert (code, out.count("\n")) == (0, 2)
    assert "places             101.00 at " in out
    expected = "(at most 5% of good images are expected to be)"
    assert err == f"2 images, 1 flagged by scores above 100.00 {expected}\n"
    code, _, err = run_cli(capsys, images[0], "--model", detector_folder)
    local = ncml.load(detector_folder).detector
    assert code == 0
    assert local is not None
    assert f"1 flagged by scores above {local.threshold:.2f}" in err
    for options in ((), ("--calibration", "weak")):
        printed = json.loads(run_cli(capsys, images[0], "--server", url, "--json", *options)[1])
        assert printed.keys() - {"weakness"} == {
            "model", "calibration", "results", "images", "skipped", "errors", "flagged", "false_positive_rate"
        }  # fmt: skip
    assert "by scores above" not in run_cli(capsys, *images, "--server", url, "--calibration", "weak")[2]


def test_an_image_that_the_service_refuses_is_skipped(
    queue: Any, detector: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(6):
        (folder / f"{level}.png").write_bytes(flat(level))
    (folder / "2.png").write_bytes(to_png(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)))
    with served(create_app(Settings(max_image_bytes=10_000), queue)) as small:
        code, out, _ = run_cli(capsys, folder, "--server", small, "--json")
    assert code == 0
    results = json.loads(out)
    assert [Path(row["file"]).name for row in results["results"]] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert "at most 10000 are accepted" in results["errors"][0]["error"]


@pytest.fixture
def engine(worker: Any, detector: Any, detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worker refuses the jobs that an engine with a detector refuses, whose score of light images is not finite."""
    measure = AppearanceView.measure

    def overflow(self: AppearanceView, image_HWC: np.ndarray) -> dict[str, Measurement]:
        measured = measure(self, image_HWC)
        return measured | {"appearance": Measurement(np.nan)} if image_HWC.mean() > 200 else measured

    monkeypatch.setattr(AppearanceView, "measure", overflow)
    registry = ModelRegistry([detector_folder.parent], ncml.load, device="cpu", keep=1)
    registry.scan()
    settings = EngineSettings(directories=(detector_folder.parent,), load=ncml.load)
    inner, outer = multiprocessing.Pipe()

    def refuse(job: ScoreJob) -> JobError | None:
        batch = Batch(1, {"job": job.model_copy(update={"model": "part", "version": None})})
        return BatchRunner(inner, registry, settings).run(batch).outcomes["job"].error

    worker.error = refuse
    with inner, outer:
        yield


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of dark images, and a light one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, level in enumerate((60, 70, 250, 80, 90)):
        (folder / f"{i}.png").write_bytes(flat(level))
    return folder


def test_an_image_whose_score_is_not_finite_is_refused_by_name(client: TestClient, engine: None) -> None:
    for files, name in (([flat(250)], "image"), ([flat(60), flat(250)], "image[1]")):
        refused = post(client, *files)
        assert (refused.status_code, refused.json()["type"]) == (422, "urn:ncml:problem:job-input")
        detail = (
            f"{name} has a score appearance that is not finite: save it again as PNG, or compute on another device."
        )
        assert refused.json()["errors"] == [{"field": name, "detail": detail}]


def test_an_image_whose_score_is_not_finite_costs_its_own_row_only(
    url: str, engine: None, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli(capsys, mixed, "--server", url, "--output", tmp_path / "scores.csv")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [Path(row["file"]).name for row in rows if row["p_value"]] == ["0.png", "1.png", "3.png", "4.png"]
    [error] = [row["error"] for row in rows if not row["p_value"]]
    assert error.startswith(f"{mixed / '2.png'} has a score appearance that is not finite")


def test_an_image_whose_score_is_not_finite_does_not_end_a_watch(
    url: str, engine: None, mixed: Path, tmp_path: Path
) -> None:
    table = tmp_path / "verdicts.csv"
    command = [sys.executable, "-m", "ncml.cli", "watch", str(mixed), "--server", url, "-o", str(table)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        judged = lambda: list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []  # noqa: E731
        eventually(lambda: len(judged()) == 5 or process.poll() is not None)
        (mixed / "5.png").write_bytes(flat(100))
        eventually(lambda: len(judged()) == 6 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert [Path(row["file"]).name for row in judged() if row["error"]] == ["2.png"]
    assert len(judged()) == 6


def test_a_watch_reports_at_its_start_what_judges_and_where_results_go(
    url: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[dict[str, Any]] = []

    def stop_after_the_last(row: dict[str, Any]) -> None:
        printed.append(row)
        if len(printed) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "_print_object", stop_after_the_last)
    write_secret(tmp_path)
    webhook = ("--webhook", "http://127.0.0.1:9/a/secret", "--webhook-secret-file", "webhook-secret")
    assert cli.main(["watch", mixed.name, "--server", url, "--json", "--move-flagged", "rejects", *webhook]) == 0
    assert sum(bool(row["moved_to"]) for row in printed) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[:3] == [
        f"ncml: watching images with the detector tiny at {url}, which flags scores above 100.00 (5% of good "
        "images on average); 5 images are there already and judged first",
        "ncml: rows go to verdicts.csv, flagged images are moved to rejects, messages are sent to 127.0.0.1:9",
        "ncml: no alarm will be raised, because it assumes that each ranking image shows its own scene",
    ]
