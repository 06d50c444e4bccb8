"""The three endpoints and the job resource."""

import base64
import io
import json
import re
import time
import tracemalloc
import zipfile
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any

import httpx2
import numpy as np
import pytest
import redis
from PIL import Image
from starlette.testclient import TestClient

from ncml.images import grid, heat, open_image, to_png
from ncml.images.tiling import Tiling, blend
from service.app import create_app
from service.http.requests import _decode_base64
from service.routes import models as models_route
from service.settings import Settings
from tests.conftest import Valkey, eventually
from tests.service.live import served
from worker.contract import CompleteJob, GenerateJob, JobStatus, Lane, Priority, ScanJob, ScoreJob
from worker.descriptors import WorkerState
from worker.job_results import Event, JobError
from worker.queue import JobQueue
from worker.redis_keys import blob_key, job_key


def flat(level: int, h: int = 8, w: int = 8) -> bytes:
    return to_png(np.full((h, w, 3), level, np.uint8))


def part(data: bytes, name: str = "image") -> tuple[str, tuple[str, bytes, str]]:
    return name, ("image.png", data, "image/png")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# /score


@pytest.mark.parametrize(
    "request_kwargs",
    [
        {"files": [part(flat(40))]},
        {"content": flat(40), "headers": {"content-type": "image/png"}},
        {"json": {"image": base64.b64encode(flat(40)).decode()}},
        {"json": {"image": "data:image/png;base64," + base64.b64encode(flat(40)).decode()}},
        {"json": {"image": [base64.b64encode(flat(40)).decode()]}},
        {"json": {"image": base64.encodebytes(flat(40)).decode()}},
        {"json": {"image": base64.urlsafe_b64encode(flat(40)).decode().rstrip("=")}},
    ],
    ids=["multipart", "raw", "json", "data-url", "json-list", "lines", "url-safe"],
)
def test_an_image_is_scored_however_it_is_sent(client: TestClient, request_kwargs: dict) -> None:
    response = client.post("/score", **request_kwargs)
    assert response.status_code == 200, response.text
    body = response.json()
    verdict = {"statistic": "multiscale", "score": 40.0, "p_value": 0.5, "threshold": 100.0, "is_ood": False}
    verdict |= {"calibration": "default", "calibration_version": "c0" * 32, "is_weak": False}
    assert body == {
        "id": "job-0",
        "status": "succeeded",
        "model": {"name": "tiny", "version": "a1" * 32},
        "results": [{"bpd": 40.0, "log_likelihood": -1.0, "ood": verdict}],
        "timing": {"queue_s": 0.001, "compute_s": 0.002, "batch_size": 1},
    }
    assert response.headers["x-job-id"] == "job-0"
    assert "Accept" in response.headers["vary"]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def common_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return common kinds of files, each with the 8 x 8 pixels it represents."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    grey, rgb = Image.fromarray(ramp), np.stack([ramp, ramp + 50, ramp + 100], -1)
    threes = np.stack([ramp] * 3, -1)
    colour = Image.fromarray(rgb)
    clear = Image.fromarray(np.concatenate([rgb, np.where(ramp < 32, 255, 0)[..., None].astype(np.uint8)], -1))
    on_white = np.where((ramp < 32)[..., None], rgb, 255).astype(np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # rotate by 90 degrees clockwise to display
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 3] = 255 - ramp
    other = Image.fromarray(255 - rgb)
    return {
        "grey": (encoded(grey, "PNG"), threes),
        "alpha": (encoded(clear, "PNG"), on_white),
        "palette": (encoded(grey.convert("P"), "PNG"), threes),
        "palette with transparency": (encoded(grey.convert("P"), "PNG", transparency=5),
                                      np.where((ramp == 5)[..., None], 255, threes).astype(np.uint8)),
        "one bit": (encoded(Image.fromarray(ramp % 2 * 255).convert("1"), "PNG"),
                    np.stack([ramp % 2 * 255] * 3, -1).astype(np.uint8)),
        "16 bits": (encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG"), threes),
        "cmyk": (encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"), threes),
        "turned by EXIF": (encoded(colour, "PNG", exif=rotated), np.rot90(rgb, -1)),
        "animated gif": (encoded(grey, "GIF", save_all=True, append_images=[other.convert("L")]), threes),
        "animated png": (encoded(colour, "PNG", save_all=True, append_images=[other]), rgb),
        "animated webp": (encoded(colour, "WEBP", save_all=True, append_images=[other], lossless=True), rgb),
        "webp": (encoded(colour, "WEBP", lossless=True), rgb),
        "bmp": (encoded(colour, "BMP"), rgb),
        "tiff": (encoded(colour, "TIFF"), rgb),
        "tiff of several pages": (encoded(colour, "TIFF", save_all=True, append_images=[other]), rgb),
        "gif": (encoded(grey, "GIF"), threes),
        "jpeg": (encoded(Image.fromarray(np.full((8, 8, 3), 77, np.uint8)), "JPEG"), np.full((8, 8, 3), 77)),
    }  # fmt: skip


@pytest.mark.parametrize("name", common_files())
def test_common_files_become_the_documented_pixels(client: TestClient, jobs, name: str) -> None:
    file, expected = common_files()[name]
    assert client.post("/score", files=[part(file)]).status_code == 200
    decoded = np.frombuffer(jobs["job-0"].images[0].data, np.uint8).reshape(8, 8, 3)
    assert np.array_equal(decoded, expected)


def test_several_images_are_scored_in_order(client: TestClient) -> None:
    response = client.post("/score", files=[part(flat(level)) for level in (9, 3, 200)])
    assert [score["bpd"] for score in response.json()["results"]] == [9, 3, 200]


def test_parameters_reach_the_job_from_query_form_and_json(client: TestClient, jobs) -> None:
    image = base64.b64encode(flat(1)).decode()
    client.post("/score?class=cat&noise=2.5&map=1&priority=high", files=[part(flat(1))])
    client.post("/score", files=[part(flat(1))], data={"class": "cat", "noise": "2.5", "map": "1", "priority": "high"})
    client.post("/score", json={"image": image, "class": "cat", "noise": 2.5, "map": True, "priority": "high"})
    client.post("/score", json={"image": image, "statistics": ["bpd", "multiscale"]})
    *submitted, listed = jobs.values()
    assert listed.statistics == ("bpd", "multiscale")
    assert len(submitted) == 3
    for job in submitted:
        assert isinstance(job, ScoreJob)
        assert (job.class_name, job.noise, job.map, job.priority) == ("cat", 2.5, True, Priority.HIGH)
        assert (job.images[0].height, job.images[0].width) == (8, 8)


def test_a_map_has_a_number_for_each_pixel(client: TestClient, worker, model) -> None:
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    response = client.post("/score?map=1", files=[part(to_png(image))])
    assert np.allclose(response.json()["results"][0]["map"], image.mean(-1), atol=1e-3)
    worker.serve()  # a result outlives the model that made it
    assert client.get(f"/jobs/{response.json()['id']}/result").json() == response.json()
    worker.serve(model)
    response = client.post("/score?map=1", files=[part(to_png(image))], headers={"accept": "application/x-npz"})
    arrays = np.load(io.BytesIO(response.content))
    assert np.allclose(arrays["map"][0], image.mean(-1))
    assert arrays["bpd"].tolist() == [image.mean()]


@pytest.mark.parametrize("n", [1, 3])
def test_maps_look_as_on_the_command_line(client: TestClient, n: int) -> None:
    maps = [np.full((8, 8), level) for level in (2, 5, 7)[:n]]
    response = client.post(
        "/score", files=[part(flat(level)) for level in (2, 5, 7)[:n]], headers={"accept": "image/png"}
    )
    assert response.headers["content-type"] == "image/png"
    rendered = heat.render(maps[0], 0, heat.BRIGHTEST).repeat(32, 0).repeat(32, 1)
    assert np.array_equal(pixels(response.content)[:256, :256], rendered)
    assert np.array_equal(pixels(response.content), grid([heat.render_pixel_map(map_HW) for map_HW in maps]))
    repeated = client.get("/jobs/job-0/result", headers={"accept": "image/png"})
    assert repeated.content == response.content
    assert "map" in client.get("/jobs/job-0/result").json()["results"][0]


@pytest.mark.parametrize("tile", [0, 1])
def test_a_job_without_a_map_cannot_be_shown_as_png(client: TestClient, tile: int) -> None:
    client.post(f"/score?tile={tile}", files=[part(flat(5))])
    response = client.get("/jobs/job-0/result", headers={"accept": "image/png"})
    assert response.status_code == 406
    assert "send the image again with map=1" in response.json()["detail"]
    arrays = np.load(io.BytesIO(client.get("/jobs/job-0/result", headers={"accept": "application/x-npz"}).content))
    assert "map" not in arrays


def test_several_scores_name_their_files(client: TestClient) -> None:
    names = ["a.png", "画像.png", ""]
    files = [("image", (name, flat(level), "image/png")) for name, level in zip(names, (1, 2, 3), strict=True)]
    body = client.post("/score", files=files[:2]).json()
    assert [(result["file"], result["bpd"]) for result in body["results"]] == [("a.png", 1), ("画像.png", 2)]
    result = f"/jobs/{body['id']}/result"
    assert client.get(result).json() == body
    arrays = np.load(io.BytesIO(client.get(f"{result}?format=npz").content))
    assert arrays["files"].tolist() == names[:2]
    assert "file" not in client.post("/score", files=files[:1]).json()["results"][0]
    images = [base64.b64encode(flat(level)).decode() for level in (1, 2)]
    assert "file" not in client.post("/score", json={"image": images}).json()["results"][0]


@pytest.mark.parametrize("path", ["/score", "/generate", "/complete"])
def test_the_format_can_be_a_parameter(client: TestClient, path: str) -> None:
    """It is for clients that cannot set the header Accept, and takes precedence over it."""
    files = None if path == "/generate" else [part(flat(5))]
    formats = {"json": "application/json", "png": "image/png", "npz": "application/x-npz", "zip": "application/zip"}
    for name, media in formats.items():
        if (path, name) == ("/score", "zip"):
            continue
        response = client.post(f"{path}?format={name}", files=files, headers={"accept": "text/html"})
        assert response.headers["content-type"] == media, response.text
        result = client.get(f"/jobs/{response.headers['x-job-id']}/result?format={name}")
        assert result.content == response.content
    body = {"format": "json"} | ({} if files is None else {"image": base64.b64encode(flat(5)).decode()})
    assert client.post(path, json=body).json()["status"] == "succeeded"


# /score with tile=1


def large() -> np.ndarray:
    """Return 20 x 24 pixels, which make 4 x 5 tiles of 8 x 8, the brightest at row 2, column 1."""
    image = np.random.default_rng(0).integers(0, 90, (20, 24, 3), dtype=np.uint8)
    image[8:16, 4:12] += 120
    return image


def test_a_large_image_is_judged_by_its_tiles(client: TestClient, jobs) -> None:
    file = to_png(large())
    response = client.post("/score?tile=1", files=[part(file)])
    assert response.status_code == 200, response.text
    means = [large()[top : top + 8, left : left + 8].mean() for top, left in Tiling(8, 8).corners(20, 24)]
    body = response.json()
    assert body == {
        "id": "job-0", "status": "succeeded", "model": {"name": "tiny", "version": "a1" * 32},
        "width": 24, "height": 20, "tile_width": 8, "tile_height": 8, "tile_overlap": 0.5, "rows": 4, "columns": 5,
        "view": "worst_tile", "score": pytest.approx(max(means)), "p_value": 0.5, "threshold": 100, "is_ood": True,
        "views": {"worst_tile": {"score": pytest.approx(max(means)), "p_value": 0.5, "threshold": 100}},
        "is_weak": False, "calibration_version": "71" * 32, "box": {"left": 4, "top": 8, "width": 8, "height": 8},
        "timing": {"queue_s": 0.001, "compute_s": 0.002, "batch_size": 1},
    }  # fmt: skip
    with_map = client.post("/score?map=1", files=[part(file)], data={"tile": "1", "tile_size": "8"}).json()
    assert np.array(with_map.pop("tiles")) == pytest.approx(np.reshape(means, (4, 5)), abs=1e-3)
    assert with_map == body | {"id": "job-1"}
    job = jobs["job-1"]
    assert isinstance(job, ScanJob)
    assert (job.file, job.height, job.width, job.tile_size, job.map) == (None, 20, 24, 8, True)
    assert job.pixels == open_image(file).tobytes()  # so that the engine decodes no file
    assert (jobs["job-0"].map, jobs["job-0"].tile_size) == (False, None)
    assert client.get("/jobs/job-0/result").json() == body
    assert client.get("/jobs/job-0").json()["task"] == "scan"


def test_the_map_of_a_large_image_has_its_size(client: TestClient) -> None:
    request = {"files": [part(to_png(large()))], "data": {"tile": "1"}}
    arrays = np.load(io.BytesIO(client.post("/score", **request, headers={"accept": "application/x-npz"}).content))
    means = [large()[top : top + 8, left : left + 8].mean() for top, left in Tiling(8, 8).corners(20, 24)]
    tiles = np.reshape(means, (4, 5)).astype(np.float32)
    assert np.array_equal(arrays["tiles"], tiles)
    assert np.array_equal(arrays["map"], blend(tiles, Tiling(8, 8), 20, 24))
    assert arrays["map"].dtype == np.float32
    assert arrays["box"].tolist() == [4, 8, 8, 8]
    assert (arrays["p_value"], arrays["threshold"], arrays["is_ood"]) == (0.5, 100, True)
    assert arrays["score"] == max(means)
    png = client.post("/score", **request, headers={"accept": "image/png"})
    assert np.array_equal(pixels(png.content), heat.render(arrays["map"], float(arrays["map"].min()), 100))


def test_tiles_that_are_not_calibrated_give_no_verdict(client: TestClient, worker, model) -> None:
    worker.serve(model.model_copy(update={"tiles": None}))
    body = client.post("/score?tile=1&tile_size=16", files=[part(to_png(large()))]).json()
    assert (body["tile_width"], body["rows"], body["columns"]) == (16, 2, 2)
    assert (body["p_value"], body["threshold"], body["is_ood"]) == (None, None, None)
    arrays = client.get("/jobs/job-0/result", headers={"accept": "application/x-npz"}).content
    assert set(np.load(io.BytesIO(arrays))) == {"view", "score", "box"}


def test_tiles_are_scored_in_the_generate_lane(client: TestClient, worker, info) -> None:
    worker.appear_as(info.model_copy(update={"lanes": (Lane.SCORE,)}))
    response = client.post("/score?tile=1", files=[part(to_png(large()))])
    assert response.status_code == 503
    assert "generate lane" in response.json()["detail"]


def test_verdicts_statistics_and_the_sanity_test_are_returned_on_request(client: TestClient) -> None:
    files = [part(flat(40)), part(flat(120))]
    [dark, light] = client.post("/score?statistics=all&sanity=1", files=files).json()["results"]
    assert light["ood"] == {
        "statistic": "multiscale", "score": 120, "p_value": 0.5, "threshold": 100, "is_ood": True,
        "calibration": "default", "calibration_version": "c0" * 32, "is_weak": False,
    }  # fmt: skip
    assert dark["statistics"] == {"multiscale": 40, "bpd": 40}
    assert dark["sanity"] == {"flipped_bpd": 41, "delta_bpd": 1}
    assert "map" not in dark
    [other] = client.post("/score?statistic=bpd&statistics=bpd, multiscale", files=files[:1]).json()["results"]
    assert (other["ood"]["statistic"], other["ood"]["threshold"]) == ("bpd", 50)
    assert other["statistics"] == {"multiscale": 40, "bpd": 40}
    [bare] = client.post("/score?ood=0", files=files[:1]).json()["results"]
    assert bare == {"bpd": 40, "log_likelihood": -1, "ood": None}
    url = "/score?statistics=bpd&sanity=1"
    arrays = np.load(io.BytesIO(client.post(url, files=files, headers={"accept": "application/x-npz"}).content))
    assert arrays["is_ood"].tolist() == [False, True]
    assert arrays["p_value"].tolist() == [0.5, 0.5]
    assert arrays["ood_score"].tolist() == arrays["statistic_bpd"].tolist() == [40, 120]
    assert arrays["flipped_bpd"].tolist() == [41, 121]


@pytest.mark.parametrize(
    ("name", "threshold", "is_weak"), [(None, 100, False), ("default", 100, False), ("weak", 200, True)]
)
def test_a_request_selects_its_calibration(
    client: TestClient, name: str | None, threshold: float, is_weak: bool
) -> None:
    query = f"?calibration={name}" if name else ""
    (result,) = client.post(f"/score{query}", files=[part(flat(150))]).json()["results"]
    assert result["ood"]["calibration"] == (name or "default")
    assert (result["ood"]["threshold"], result["ood"]["is_ood"]) == (threshold, threshold == 100)
    assert result["ood"]["is_weak"] == is_weak
    calibrations = client.get("/models/tiny").json()["calibrations"]
    assert result["ood"]["calibration_version"] == calibrations[name or "default"]["version"]


def test_models_describe_their_calibration(client: TestClient) -> None:
    descriptor = client.get("/models/tiny").json()
    calibration = descriptor["calibration"]
    assert calibration == descriptor["calibrations"]["default"]
    assert descriptor["calibrations"]["weak"]["weakness"] == "it ranks among 19 images"
    assert calibration["thresholds"] == {"multiscale": 100, "bpd": 50}
    assert calibration["threshold"] == calibration["thresholds"][calibration["statistic"]]
    assert calibration["histograms"] == {"bpd": {"edges": [0, 50, 100], "counts": [60, 39]}}
    tiles = descriptor["tiles"]
    assert (tiles["width"], tiles["threshold"], tiles["n_rank"]) == (8, 100, 20)


# /generate


def test_an_image_is_generated_as_png(client: TestClient, jobs) -> None:
    response = client.post("/generate?class=cat&seed=77")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "77"
    assert np.array_equal(pixels(response.content), np.full((8, 8, 3), 77))
    job = jobs["job-0"]
    assert isinstance(job, GenerateJob)
    assert (job.class_name, job.seed, job.n, job.noise, job.steps, job.solver) == ("cat", 77, 1, None, None, None)


def test_several_images_are_returned_as_a_grid_a_zip_json_or_arrays(client: TestClient) -> None:
    url = "/generate?n=3&seed=5"
    image = pixels(client.post(url).content)
    assert image.shape == (16, 16, 3)
    assert [image[0, 0, 0], image[0, 8, 0], image[8, 0, 0], image[8, 8, 0]] == [5, 6, 7, 0]
    body = client.post(url, headers={"accept": "application/json"}).json()
    assert [image["seed"] for image in body["images"]] == [5, 6, 7]
    assert [pixels(base64.b64decode(image["png"]))[0, 0, 0] for image in body["images"]] == [5, 6, 7]
    archive = zipfile.ZipFile(io.BytesIO(client.post(url, headers={"accept": "application/zip"}).content))
    assert archive.namelist() == ["00-seed-5.png", "01-seed-6.png", "02-seed-7.png", "job.json"]
    assert pixels(archive.read("01-seed-6.png"))[0, 0, 0] == 6
    assert json.loads(archive.read("job.json"))["images"] == [{"seed": 5}, {"seed": 6}, {"seed": 7}]
    arrays = np.load(io.BytesIO(client.post(url, headers={"accept": "application/x-npz"}).content))
    assert arrays["images"].shape == (3, 8, 8, 3)
    assert arrays["seeds"].tolist() == [5, 6, 7]


def test_a_zip_is_dated_by_the_end_of_its_job(client: TestClient, queue) -> None:
    """So it has the same bytes whenever it is requested."""
    client.post("/generate?n=2")
    queue.redis.hset(job_key("job-0"), "ended", 10**9)
    archive = zipfile.ZipFile(io.BytesIO(client.get("/jobs/job-0/result?format=zip").content))
    assert {file.date_time for file in archive.infolist()} == {(2001, 9, 9, 1, 46, 40)}


def test_every_setting_reaches_the_job(client: TestClient, jobs) -> None:
    settings = {"class": "dog", "n": 2, "seed": 9, "noise": 4.5, "steps": 12, "solver": "heun", "priority": "low"}
    settings |= {"guidance": 2.0, "temperature": 0.9}
    for arguments in ({"json": settings}, {"params": settings}, {"data": {k: str(v) for k, v in settings.items()}}):
        assert client.post("/generate", **arguments).status_code == 200
    for job in jobs.values():
        fields = {"class": job.class_name} | {name: getattr(job, name) for name in settings if name != "class"}
        assert fields == settings
    assert len(jobs) == 3


def test_without_a_seed_a_random_one_is_chosen(client: TestClient) -> None:
    seeds = {client.post("/generate").headers["x-seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= int(seed) < 2**32 for seed in seeds)


# /complete


def test_half_an_image_is_completed(client: TestClient, jobs) -> None:
    half = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    response = client.post("/complete?seed=3", files=[part(to_png(half))])
    assert response.status_code == 200, response.text
    full = pixels(response.content)
    assert np.array_equal(full[:4], half)
    assert np.all(full[4:] == 7)
    job = jobs["job-0"]
    assert isinstance(job, CompleteJob)
    assert (job.keep, job.seed) == ("top", 3)


def test_an_image_can_have_several_completions(client: TestClient) -> None:
    body = client.post("/complete?n=2&seed=3", files=[part(flat(5))], headers={"accept": "application/json"}).json()
    assert [image["seed"] for image in body["images"]] == [3, 4]


def test_a_half_that_the_model_cannot_complete_is_refused(client: TestClient) -> None:
    response = client.post("/complete?keep=left", files=[part(flat(5))])
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "keep"
    assert "top half is known" in response.json()["detail"]


# Waiting, and jobs


def test_a_job_longer_than_the_wait_gets_a_202(client: TestClient, worker) -> None:
    worker.pause()
    response = client.post("/generate?seed=1", headers={"prefer": "wait=0"})
    assert response.status_code == 202
    assert response.headers["location"] == "/jobs/job-0"
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["preference-applied"] == "wait=0"
    assert response.json()["status"] == "queued"
    worker.hold()
    eventually(lambda: client.get("/jobs/job-0").json()["status"] == "running")
    assert client.get("/jobs/job-0/result").status_code == 202
    worker.resume()
    result = client.get("/jobs/job-0/result", headers={"prefer": "wait=30"})
    assert result.status_code == 200
    assert result.headers["content-type"] == "image/png"
    assert client.get("/jobs/job-0").json()["status"] == "succeeded"
    assert client.get("/jobs/job-0/result", headers={"accept": "application/json"}).json()["images"][0]["seed"] == 1


def test_a_waiting_job_has_a_position_and_a_retry_after(client: TestClient, worker, info) -> None:
    worker.pause()
    worker.appear_as(info.model_copy(update={"pace": {Lane.GENERATE: 0.5}}))
    responses = [client.post("/generate", headers={"prefer": "respond-async"}) for _ in range(3)]
    assert [response.json()["position"] for response in responses] == [0, 1, 2]
    assert [response.headers["retry-after"] for response in responses] == ["2", "4", "6"]
    assert client.get("/jobs/job-2").json()["position"] == 2
    worker.hold()
    eventually(lambda: client.get("/jobs/job-2").json()["position"] is None)
    assert client.get("/jobs/job-2/result").headers["retry-after"] == "1"


def test_a_job_whose_wait_fails_is_accepted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue accepted the job, so it will be computed: a 503 would make the client send it again."""

    failures: list[datetime] = []

    async def wait(*_: object) -> None:
        failures.append(datetime.now(UTC))
        raise redis.ConnectionError("connection lost")

    monkeypatch.setattr(JobQueue, "wait", wait)
    response = client.post("/generate?n=2", headers={"x-request-id": "r-1"})
    assert response.status_code == 202
    assert response.headers["location"] == "/jobs/job-0"
    assert int(response.headers["retry-after"]) > 0
    body = response.json()
    assert (body["status"], body["task"], body["n"], body["request_id"]) == ("queued", "generate", 2, "r-1")
    assert datetime.fromisoformat(body["created_at"]) <= failures[0]
    monkeypatch.undo()
    eventually(lambda: client.get(response.headers["location"]).json()["status"] == "succeeded")


def test_the_streams_of_a_client_are_limited(new_client: Callable[..., TestClient]) -> None:
    client = new_client(max_streams=2)
    client.post("/generate")
    limit = client.app.state.jobs.streams
    with limit.hold("address:testclient"):
        with limit.hold("address:testclient"):
            refused = client.get("/jobs/job-0/events")
        assert refused.status_code == 429
        assert refused.json()["type"] == "urn:ncml:problem:too-many-streams"
        assert int(refused.headers["retry-after"]) > 0
        assert 'ncml_jobs_rejected_total{reason="too-many-streams"} 1.0' in client.get("/metrics").text
        for _ in range(3):  # each ends before the next one
            assert client.get("/jobs/job-0/events").status_code == 200


def test_respond_async_does_not_wait(client: TestClient, worker) -> None:
    worker.hold()
    started = time.monotonic()
    response = client.post("/score", files=[part(flat(1))], headers={"prefer": "respond-async"})
    assert time.monotonic() - started < 30
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"


def test_a_job_links_to_its_result_in_the_format_of_the_request(client: TestClient, worker) -> None:
    worker.hold()
    for query, suffix in (("", ""), ("?format=npz", "?format=npz")):
        job = client.post(f"/generate{query}", headers={"prefer": "respond-async"}).json()
        assert job["links"]["result"] == f"/jobs/{job['id']}/result{suffix}"
        assert client.get(job["links"]["self"]).json()["links"] == job["links"]


def test_the_operator_limits_the_wait(new_client: Callable[..., TestClient], worker) -> None:
    worker.hold()
    response = new_client(wait_s=0.1).post("/generate", headers={"prefer": "wait=500"})
    assert response.status_code == 202


def test_a_job_that_succeeded_is_complete(client: TestClient) -> None:
    """The last reported progress does not matter."""
    client.post("/generate?n=2")
    progress = client.get("/jobs/job-0").json()["progress"]
    assert (progress["step"], progress["total"], progress["done"], progress["n"]) == (2, 2, 2, 2)


def test_a_job_is_described_with_links_that_work(client: TestClient, jobs, worker) -> None:
    worker.hold()
    client.post("/generate?n=2", headers={"prefer": "respond-async", "x-request-id": "abc"})
    body = eventually(lambda: (body := client.get("/jobs/job-0").json())["progress"] and body)
    assert body["task"] == "generate"
    assert body["n"] == 2
    assert body["progress"] == {
        "stage": "refine", "step": 1, "total": 2, "done": 0, "n": 2, "preview": "/jobs/job-0/preview",
    }  # fmt: skip
    assert jobs["job-0"].request_id == body["request_id"] == "abc"
    preview = client.get(body["progress"]["preview"])
    assert preview.headers["x-progress"] == "stage=refine, step=1, total=2, done=0"
    assert pixels(preview.content).shape == (8, 16, 3)
    assert client.get(body["links"]["self"]).json()["id"] == "job-0"
    for _ in range(2):
        assert client.post(body["links"]["cancel"]).json()["status"] == "canceled"
    gone = client.get(body["links"]["result"])
    assert gone.status_code == 410
    assert gone.json()["detail"] == "The job was canceled on request; send the request again."


@pytest.mark.parametrize(
    ("reason", "status"), [("input", 422), ("model", 500), ("timeout", 504), ("expired", 504), ("engine", 500)]
)
def test_a_failed_job_gives_the_reason(client: TestClient, worker, reason: str, status: int) -> None:
    error = JobError(field="noise" if reason == "input" else None, detail="It went wrong.", reason=reason)
    worker.error = lambda job: error
    response = client.post("/generate")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"] == "It went wrong."
    assert response.json()["type"] == f"urn:ncml:problem:job-{reason}"
    assert [error["field"] for error in response.json()["errors"]] == (["noise"] if reason == "input" else [])


def test_the_remedy_of_a_failed_job_names_the_key_of_its_request(client: TestClient, worker) -> None:
    """The same key would return the failed job."""
    worker.error = lambda job: JobError(reason="worker", detail="it failed; send the request again")
    assert client.post("/generate").json()["detail"] == "It failed; send the request again."
    keyed = client.post("/generate", headers={"idempotency-key": "order-1"})
    assert keyed.json()["detail"] == "It failed; send the request again with a new Idempotency-Key."


def test_an_expired_result_is_404(client: TestClient, queue) -> None:
    client.post("/generate")
    assert queue.redis.delete(blob_key("job-0"))
    response = client.get("/jobs/job-0/result")
    assert (response.status_code, response.json()["type"]) == (404, "urn:ncml:problem:result-expired")


def test_events_are_streamed_and_resumed(client: TestClient) -> None:
    client.post("/generate", headers={"prefer": "respond-async"})

    def follow(**headers: str) -> list[tuple[str, str]]:
        text = client.get("/jobs/job-0/events", headers=headers).text
        blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
        return [(block["id"], block["event"]) for block in blocks if "event" in block]

    events = follow()
    assert [name for _, name in events] == ["queued", "running", "progress", "succeeded"]
    for i, (event_id, _) in enumerate(events[:-1]):
        assert follow(**{"last-event-id": event_id}) == events[i + 1 :]
    assert client.get("/jobs/job-0/events", headers={"last-event-id": events[-1][0]}).status_code == 204
    assert client.get("/jobs/job-0/events", headers={"last-event-id": "x"}).status_code == 422
    assert client.get("/jobs/nothing/events").status_code == 404


def test_the_head_of_a_stream_does_not_wait_for_the_end_of_the_job(client: TestClient, queue: JobQueue) -> None:
    job_id = queue.submit(GenerateJob(model="m"), held_s=60)
    head = client.head(f"/jobs/{job_id}/events")
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert "content-length" not in head.headers
    assert client.head("/jobs/nothing/events").status_code == 404


def test_a_stream_begins_at_once_and_an_idle_one_stays_open_through_proxies(
    client: TestClient, worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = JobQueue.events

    async def events(queue: JobQueue, *arguments: Any, **options: Any) -> AsyncGenerator[Event | None]:
        async for event in follow(queue, *arguments, **options, tick_s=0.05):
            yield event
            if event is None:  # the keep-alive has been sent
                worker.resume()

    monkeypatch.setattr(JobQueue, "events", events)
    worker.pause()
    client.post("/generate", headers={"prefer": "respond-async"})
    text = client.get("/jobs/job-0/events").text
    assert text.startswith(": hello\n\n")
    assert "\n\n: keep-alive\n\n" in text.partition("event: running")[0]


def test_a_stream_that_fails_is_cut_off_and_counted_as_it_began(
    queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The status was sent with the first event: a second one would be an error of the protocol."""

    async def events(*_: object, **__: object) -> AsyncGenerator[Event]:
        yield Event(id="1-0", kind="status", status=JobStatus.QUEUED)
        raise redis.ConnectionError("connection reset")

    monkeypatch.setattr(queue, "events", events)
    with served(create_app(Settings(), queue)) as url:
        httpx2.post(f"{url}/generate", headers={"prefer": "respond-async"})
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.get(f"{url}/jobs/job-0/events")
        metrics = httpx2.get(f"{url}/metrics").text
    assert re.search(r'ncml_http_requests_total{code="200",method="GET",route="/jobs/{job_id}/events"} 1', metrics)
    assert "a response was cut off: connection reset" in caplog.messages
    assert [record for record in caplog.records if record.exc_info] == []


def test_the_same_request_under_one_key_is_one_job(client: TestClient, jobs) -> None:
    key = {"idempotency-key": "order-1"}
    first = client.post("/score?class=cat", files=[part(flat(9))], headers=key)
    repeated = client.post("/score", files=[part(flat(9), "image")], data={"class": "cat"}, headers=key)
    raw = {"content": flat(9), "headers": key | {"content-type": "image/png"}}
    assert first.json() == repeated.json() == client.post("/score?class=cat", **raw).json()
    quoted = {"files": [part(flat(9))], "headers": {"idempotency-key": '"order-1"; a=1'}}
    assert client.post("/score?class=cat&format=npz", **quoted).headers["x-job-id"] == first.json()["id"]
    assert len(jobs) == 1
    seeds = {client.post("/generate", headers={"idempotency-key": "order-2"}).headers["x-seed"] for _ in range(3)}
    assert len(seeds) == 1
    for path, files in (("/score?class=dog", flat(9)), ("/score?class=cat", flat(8)), ("/complete?class=cat", flat(9))):
        response = client.post(path, files=[part(files)], headers=key)
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "Idempotency-Key"
    assert client.post("/generate", headers={"idempotency-key": "a b"}).status_code == 422
    assert len(jobs) == 2


@pytest.mark.parametrize("cancels_slowly", [False, True])
def test_repeating_a_canceled_request_needs_a_new_key(client: TestClient, worker, cancels_slowly: bool) -> None:
    worker.hold()
    worker.is_deaf = cancels_slowly
    key = {"idempotency-key": "order-1", "prefer": "respond-async"}
    links = client.post("/generate", headers=key).json()["links"]
    eventually(lambda: client.get(links["self"]).json()["status"] == "running")
    client.post(links["cancel"])
    gone = client.post("/generate", headers=key)
    assert gone.status_code == 410
    assert gone.json()["detail"].endswith("canceled on request; send the request again with a new Idempotency-Key.")


def test_a_job_is_shown_as_canceled_once_the_cancellation_is_accepted(client: TestClient, worker) -> None:
    """Its worker may not have stopped yet."""
    worker.hold()
    worker.is_deaf = True
    client.post("/generate", headers={"prefer": "respond-async"})
    eventually(lambda: client.get("/jobs/job-0").json()["status"] == "running")
    canceled = client.post("/jobs/job-0/cancel").json()
    assert (canceled["status"], canceled["error"]["reason"]) == ("canceled", "canceled")
    assert client.get("/jobs/job-0").json()["status"] == "canceled"
    for prefer in ("respond-async", "wait=30"):
        assert client.get("/jobs/job-0/result", headers={"prefer": prefer}).status_code == 410


def test_a_deleted_job_is_gone_immediately(client: TestClient, worker) -> None:
    worker.pause()
    client.post("/generate", headers={"prefer": "respond-async"})
    assert client.delete("/jobs/job-0").status_code == 204
    for path in ("/jobs/job-0", "/jobs/job-0/result"):
        assert client.get(path).status_code == 404
    assert client.delete("/jobs/job-0").status_code == 404


def test_a_job_that_is_still_stopping_cannot_be_deleted_yet(
    client: TestClient, jobs, worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.hold()
    worker.is_deaf = True
    client.post("/generate", headers={"prefer": "respond-async"})
    eventually(lambda: client.get("/jobs/job-0").json()["status"] == "running")
    wait = JobQueue.wait
    monkeypatch.setattr(JobQueue, "wait", lambda queue, job_id, timeout_s: wait(queue, job_id, 0))
    response = client.delete("/jobs/job-0")
    assert (response.status_code, response.json()["type"]) == (409, "urn:ncml:problem:running")
    assert jobs.keys() == {"job-0"}


# Models and readiness


def test_models_are_listed_and_looked_up(client: TestClient, model) -> None:
    described = json.loads(model.model_dump_json())
    served = described | {"calibration": described["calibrations"]["default"], "default": True}
    limits = {"max_images": 64, "max_judged_images": 4, "max_tiles": 4096, "max_body_bytes": 64 * 2**20}
    allowed = {"calibration_allowed": False, "webhooks_allowed": False}
    assert client.get("/models").json() == {"models": [served], "unusable": {}, "next": None} | allowed | limits
    for name in ("tiny", f"tiny@{model.version}", f"tiny@{model.version[:8]}"):
        assert client.get(f"/models/{name}").json()["classes"] == ["cat", "dog"]
    assert client.get("/models/other").status_code == 404


def test_models_that_workers_cannot_use_are_listed_with_the_reason(client: TestClient, worker, info) -> None:
    faults = {
        "valve": "valve/detector.json has format 4, not 5: make it again.",
        "tiny": "tiny/config.json is damaged.",
    }
    worker.appear_as(info.model_copy(update={"faults": faults}))
    assert client.get("/models").json()["unusable"] == {"valve": faults["valve"]}  # another worker may serve tiny
    scored = client.post("/score?model=valve@123456", files=[part(to_png(np.zeros((8, 8, 3), np.uint8)))])
    assert scored.status_code == 422
    assert scored.json()["detail"] == f"model: 'valve@123456' cannot be used: {faults['valve']}"
    shown = client.get("/models/valve")
    assert shown.status_code == 404
    assert shown.json()["detail"] == f"model: 'valve' cannot be used: {faults['valve']}"


def test_a_model_is_chosen_by_name_or_version(client: TestClient, jobs, worker, model) -> None:
    newer = model.model_copy(update={"version": "b2" * 32})
    worker.serve(model.model_copy(update={"name": "aaa"}), model, newer)
    for reference, name, version in [
        (None, "aaa", None),
        ("tiny", "tiny", None),
        ("tiny@a1a1a1", "tiny", model.version),
        (f"tiny@{newer.version}", "tiny", newer.version),
    ]:
        client.post("/generate", params={"model": reference} if reference else {})
        job = list(jobs.values())[-1]
        assert (job.model, job.version) == (name, version)
    for unknown in ("nobody", "tiny@c3c3c3", "tiny@a", "tiny@"):
        response = client.post("/generate", params={"model": unknown})
        assert response.status_code == 422
        assert "aaa" in response.json()["errors"][0]["detail"]


def test_models_are_listed_in_pages_of_names(client: TestClient, worker, model) -> None:
    models = [model.model_copy(update={"name": name}) for name in ("e", "a", "c", "b", "d")]
    worker.serve(*models, model.model_copy(update={"name": "b", "version": "b2" * 32}))
    pages, after = list[str](), ""
    while after is not None:
        page = client.get("/models", params={"limit": 2, "after": after}).json()
        pages.append("".join(served["name"] for served in page["models"]))
        after = page["next"]
    assert pages == ["abb", "cd", "e"]
    assert len(client.get("/models").json()["models"]) == 6
    assert client.get("/models?after=z").json()["models"] == []
    assert client.get("/models?limit=0").status_code == 422


def test_an_unknown_model_is_refused_with_some_of_hundreds_of_names(client: TestClient, worker, model) -> None:
    worker.serve(*(model.model_copy(update={"name": f"m{i:03}"}) for i in range(300)))
    detail = client.post("/generate?model=nobody").json()["errors"][0]["detail"]
    assert detail.endswith("m009, m009@a1a1a1a1a1a1 and 580 more.")


def test_an_unknown_model_is_answered_with_the_nearest_names(client: TestClient, worker, model) -> None:
    names = [f"line{line}-{part}" for line in range(1, 10) for part in ("housing-top", "flange-left", "valve-seat")]
    worker.serve(*(model.model_copy(update={"name": name}) for name in names))
    detail = client.post("/generate?model=line3-flange-lef").json()["detail"]
    assert detail.startswith("model: 'line3-flange-lef' is not available; did you mean line3-flange-left or line")
    assert client.get("/models/line3-flange-lef").json()["detail"] == detail
    assert "line1-flange-left@a1a1a1a1a1a1" in client.get("/models/line3-flange-left@c3c3c3").json()["detail"]


def test_models_that_have_not_changed_are_neither_described_nor_sent_again(
    client: TestClient, worker, info, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.serve(model)
    first = client.get("/models")
    assert first.headers["Cache-Control"] == "private, no-cache"
    unchanged = {"If-None-Match": f'"other", W/{first.headers["ETag"]}'}
    with monkeypatch.context() as patch:
        patch.setattr(models_route, "_page", None)
        response = client.get("/models", headers=unchanged)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["ETag"] == first.headers["ETag"]
        assert client.get("/models").content == first.content
    worker.appear_as(info.model_copy(update={"faults": {"valve": "valve/config.json is damaged."}}))
    changed = client.get("/models", headers=unchanged)
    assert (changed.status_code, list(changed.json()["unusable"])) == (200, ["valve"])
    worker.serve(model, model.model_copy(update={"name": "aaa"}))
    assert len(client.get("/models", headers=unchanged).json()["models"]) == 2
    page = client.get("/models?limit=1")
    assert client.get("/models?limit=1", headers={"If-None-Match": page.headers["ETag"]}).status_code == 304
    assert client.get("/models?limit=2", headers={"If-None-Match": page.headers["ETag"]}).status_code == 200


def test_the_operator_chooses_the_default_model(new_client: Callable[..., TestClient], jobs, worker, model) -> None:
    worker.serve(model, model.model_copy(update={"name": "aaa"}))
    new_client(default_model="tiny").post("/generate")
    assert jobs["job-0"].model == "tiny"
    client = new_client(default_model="absent")
    response = client.post("/generate")
    assert (response.status_code, response.json()["type"]) == (503, "urn:ncml:problem:no-model")
    assert "serves 'absent', the default model (NCML_DEFAULT_MODEL); the available models are aaa" in response.text
    assert client.post("/generate?model=absent").status_code == 422


@pytest.mark.parametrize(
    ("setting", "served", "default"),
    [
        ("", ["birds", "cifar10"], "cifar10"),
        ("", ["birds", "zebras"], "birds"),
        ("zebras", ["birds", "cifar10", "zebras"], "zebras"),
        ("absent", ["birds", "cifar10"], None),
    ],
)
def test_adding_a_model_does_not_change_the_default(
    new_client: Callable[..., TestClient], jobs, worker, model, setting: str, served: list[str], default: str | None
) -> None:
    worker.serve(*(model.model_copy(update={"name": name}) for name in served))
    client = new_client(default_model=setting)
    answer = client.post("/generate")
    assert [jobs["job-0"].model if answer.is_success else None] == [default]
    assert [m["name"] for m in client.get("/models").json()["models"] if m["default"]] == [default] * bool(default)
    assert client.get("/models/birds").json()["default"] == (default == "birds")


def test_the_service_is_ready_only_with_a_loaded_model_in_every_lane(
    new_client: Callable[..., TestClient], worker, info
) -> None:
    client = new_client()
    assert client.get("/readyz").json() == {"status": "ready", "lanes": {"score": 1, "generate": 1}}
    for infos in (
        [],
        [info.model_copy(update={"state": WorkerState.LOADING})],
        [info.model_copy(update={"models": ()})],
        [info.model_copy(update={"lanes": (Lane.SCORE,)})],
    ):
        worker.appear_as(*infos)
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").json() == {"status": "ok"}
    assert new_client(ready_lanes=("score",)).get("/readyz").status_code == 200


def test_the_queue_is_closed_with_the_application(
    new_client: Callable[..., TestClient], queue, valkey_server: Valkey
) -> None:
    def connections() -> list[str]:
        return [entry["cmd"] for entry in queue.redis.client_list() if entry["db"] == "1"]

    client = new_client(redis_url=f"redis://127.0.0.1:{valkey_server.port}/1")
    client.app.state.jobs.queue.submit(GenerateJob(model="tiny"))
    assert client.get("/models").status_code == 200
    assert client.get("/jobs/job-0/result", headers={"prefer": "wait=0"}).status_code == 202
    assert "subscribe" in connections()
    assert len(connections()) >= 3
    client.__exit__(None, None, None)
    eventually(lambda: not connections())
    client.__enter__()


def test_blanks_in_base64_take_no_memory() -> None:
    """A list of the pieces between them would take 24 times the text's."""
    text = "ab " * 10**6
    tracemalloc.start()
    try:
        assert len(_decode_base64(text, "image")) == 1_500_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(text)
