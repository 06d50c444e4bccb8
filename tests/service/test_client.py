"""`ncml.client` against the application, and against responses of an overloaded or failing service."""

import asyncio
import base64
import gzip
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ncml.client import AsyncClient, Client, Generated, JobProgress, Scan, uploads
from ncml.errors import InputError, ServiceError
from ncml.images import reading, to_png
from service.app import create_app
from service.keys import digest
from service.settings import Settings
from tests.conftest import free_port
from tests.service.live import served
from worker.job_results import JobError


def flat(level: int, h: int = 8, w: int = 8) -> np.ndarray:
    return np.full((h, w, 3), level, np.uint8)


@pytest.fixture
def url(queue) -> Iterator[str]:
    with served(create_app(Settings(), queue)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect the pauses of a client instead of waiting."""
    pauses: list[float] = []
    monkeypatch.setattr(Client, "_pause", lambda self, seconds: pauses.append(seconds))
    return pauses


def test_every_kind_of_image_is_scored(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(to_png(flat(1)))
    large = Image.new("CMYK", (20, 16), (0, 0, 0, 0))
    images = [path, str(path), path.read_bytes(), Image.fromarray(flat(2)), flat(3), flat(4)[:, :, 0], large]
    scores = client.score(images)
    assert [score.bpd for score in scores] == [1, 1, 1, 2, 3, 4, 255]
    assert [score.file for score in scores] == [str(path), str(path), None, None, None, None, None]
    assert scores[0].ood is not None
    assert (scores[0].ood.statistic, scores[0].ood.is_ood, scores[-1].ood.is_ood) == ("multiscale", False, True)
    assert scores[0].ood.calibration_version == client.model("tiny")["calibration"]["version"]
    assert client.score(path)[0].bpd == 1
    assert [score.bpd for score in client.score(np.stack([flat(5), flat(6)]))] == [5, 6]


def test_an_image_whose_file_name_is_not_utf_8_is_scored(client: Client, tmp_path: Path) -> None:
    (path := tmp_path / os.fsdecode(b"Pr\xfcfling.png")).write_bytes(to_png(flat(3)))
    (score,) = client.score(path)
    assert (score.bpd, score.file) == (3, str(tmp_path / r"Pr\xfcfling.png"))


def test_a_folder_is_scored_and_the_scores_make_a_table(client: Client, tmp_path: Path) -> None:
    for level in (3, 4):
        (tmp_path / f"{level}.png").write_bytes(to_png(flat(level)))
    (tmp_path / "notes.txt").write_text("not an image")
    scores = client.score(tmp_path, map=True, statistics=["multiscale"])
    assert repr(scores[0]).startswith(f"Score(file='{tmp_path / '3.png'}', bpd=3, log_likelihood=")
    assert '<img src="data:image/png;base64,' in scores[0]._repr_html_()
    table = pd.DataFrame(scores)
    assert list(table.columns) == [
        "file", "bpd", "log_likelihood", "statistic", "score", "p_value", "is_ood", "multiscale",
    ]  # fmt: skip
    assert table["bpd"].tolist() == [3, 4]
    assert scores[0].to_dict() == table.iloc[0].to_dict()


def test_a_pil_image_is_rotated_like_its_file(client: Client, jobs, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(20 * 16 * 3, dtype=np.uint8).reshape(20, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    client.score([tmp_path / "turned.png", Image.open(tmp_path / "turned.png"), pixels])
    [job] = jobs.values()
    from_file, from_image, unturned = job.images
    assert from_file == from_image != unturned


def test_more_images_than_a_request_accepts_are_sent_in_several_requests(client: Client, jobs) -> None:
    scores = client.score([flat(i) for i in range(70)], idempotency_key="mine")
    assert [score.bpd for score in scores] == list(range(70))
    assert [job.n for job in jobs.values()] == [64, 6]


def test_more_bytes_than_a_request_accepts_are_sent_in_several_requests(
    client: Client, jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", int(3.5 * len(to_png(flat(1)))))
    scores = client.score([flat(i) for i in range(7)], idempotency_key="mine")
    assert [score.bpd for score in scores] == list(range(7))
    assert [job.n for job in jobs.values()] == [3, 3, 1]


def test_options_of_score(client: Client, jobs) -> None:
    [score] = client.score(
        flat(9), class_="cat", noise=2.0, map=True, statistics=["multiscale"], calibration="weak", priority="low"
    )
    assert score.statistics == {"multiscale": 9}
    assert score.map is not None
    assert np.allclose(score.map, 9)
    [job] = jobs.values()
    assert (job.class_name, job.noise, job.calibration, job.priority) == ("cat", 2, "weak", "low")
    [sane] = client.score(flat(9), sanity=True, ood=False)
    assert (sane.flipped_bpd, sane.ood) == (10, None)


def test_a_scan_has_its_box_and_map(client: Client) -> None:
    image = np.zeros((20, 24, 3), np.uint8)
    image[8:16, 4:12] = 200
    scan = client.scan(image, tile_size=8, map=True)
    assert (scan.view, scan.score, scan.is_ood, tuple(scan.box)) == ("worst_tile", 200, True, (4, 8, 8, 8))
    assert (scan.tiles, scan.map.shape) == (20, (20, 24))
    assert '<img src="data:image/png;base64,' in scan._repr_html_()
    without_map = client.scan(image, tile_size=8)
    assert repr(without_map) == repr(scan)
    assert without_map.to_dict() == scan.to_dict()
    assert "<img" not in without_map._repr_html_()
    with pytest.raises(InputError, match="map=True"):
        _ = without_map.map


def test_a_model_is_calibrated_on_images_and_zips(queue, jobs, tmp_path: Path) -> None:
    for level in range(40):
        (tmp_path / f"{level}.png").write_bytes(to_png(flat(level)))
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "0.png")
    images = [tmp_path, tmp_path / "good.zip"]
    with served(create_app(Settings(allow_calibration=True), queue)) as url, Client(url) as client:
        answer = client.calibrate(images, "mine", false_positive_rate=0.1)
        assert (answer["model"]["name"], answer["calibration"]["n_rank"]) == ("mine", 21)
        with pytest.raises(InputError, match="noise is not an option of calibrate"):
            client.calibrate(images, "mine", noise=1)  # type: ignore[call-arg]
    [job] = jobs.values()
    assert (job.images, job.false_positive_rate) == (41, 0.1)


def test_images_are_generated_and_completed(client: Client) -> None:
    generated = client.generate(2, class_="cat", seed=np.int64(7), noise=np.float32(2.5))
    assert (generated.seeds, generated.model) == ((7, 8), "tiny")
    assert np.array_equal(generated.images, [flat(7), flat(8)])
    assert generated.pil[1].size == (8, 8)
    assert repr(generated).startswith("Generated(seeds=(7, 8), model='tiny', version=")
    png = generated._repr_png_()
    assert png is not None
    assert Image.open(io.BytesIO(png)).size == (2 * 256, 256)
    [image] = client.complete(flat(100), keep="top").images
    assert np.array_equal(image[:4], flat(100)[:4])
    assert np.array_equal(image[4:], flat(7)[4:])


def test_a_long_job_is_awaited_and_its_progress_reported(client: Client, worker) -> None:
    worker.hold()
    steps: list[JobProgress] = []

    def end_job(step: JobProgress) -> None:
        steps.append(step)
        worker.resume()

    assert client.generate(on_progress=end_job).seeds
    assert [(step.stage, step.step) for step in steps] == [("refine", 1), ("refine", 2)]
    assert client.generate(seed=1).seeds == (1,)


def test_only_the_asynchronous_client_awaits_on_progress(client: Client, worker) -> None:
    async def show(step: JobProgress) -> None:
        raise AssertionError("this coroutine is never run")

    worker.hold()
    with pytest.raises(InputError, match="must not be asynchronous, unless you use AsyncClient") as caught:
        client.generate(on_progress=show)
    assert caught.value.field == "on_progress"
    worker.resume()


def test_jobs_are_looked_up_canceled_and_deleted(client: Client, jobs) -> None:
    client.generate(idempotency_key="mine")
    [job_id] = jobs
    assert client.job(job_id).status == "succeeded"
    assert client.cancel(job_id).has_ended
    client.delete(job_id)
    with pytest.raises(ServiceError, match="does not exist") as caught:
        client.job(job_id)
    assert (caught.value.status, caught.value.kind) == (404, "no-such-job")


def test_the_result_of_any_job_is_fetched_by_its_id(client: Client, jobs) -> None:
    scores = client.score([flat(3), flat(4)], map=True)
    scan = client.scan(flat(9, 16, 16), map=True)
    images = client.generate(2, seed=5, noise=0)
    fetched, scanned, generated = map(client.result, jobs)
    assert isinstance(fetched, list)
    sent_as = {"file": "image"}
    assert [score.to_dict() for score in fetched] == [sent_as | score.to_dict() for score in scores]
    assert np.array_equal(fetched[0].map, scores[0].map)
    assert isinstance(scanned, Scan)
    assert scanned.to_dict() == scan.to_dict()
    assert isinstance(generated, Generated)
    assert np.array_equal(generated.images, images.images)
    assert generated.seeds == images.seeds
    with pytest.raises(ServiceError, match="does not exist"):
        client.result("absent")


def test_the_result_of_a_running_job_is_awaited(url: str, worker) -> None:
    worker.hold()
    job_id = httpx2.post(f"{url}/generate?seed=3", headers={"Prefer": "respond-async"}).json()["id"]
    resuming = threading.Timer(0.5, worker.resume)
    resuming.start()
    with Client(url, timeout_s=1) as client:  # which asks for the result without waiting for it
        result = client.result(job_id)
    resuming.join()
    assert isinstance(result, Generated)
    assert result.seeds == (3,)


def test_the_asynchronous_client_reads_images_outside_the_event_loop(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding large arrays takes seconds, in which the loop could do nothing else."""
    threads: list[threading.Thread] = []

    def read_pil(*arguments: Any) -> Image.Image:
        threads.append(threading.current_thread())
        return reading.read_pil(*arguments)

    async def ask() -> None:
        async with AsyncClient(url) as client:
            await client.score([flat(1), flat(2)])
            await client.scan(flat(1, 16, 16))
            await client.complete(flat(1))

    monkeypatch.setattr("ncml.client.uploads.read_pil", read_pil)
    asyncio.run(ask())
    assert len(threads) == 4
    assert threading.current_thread() not in threads


def test_a_problem_without_a_kind_has_an_empty_one(url: str) -> None:
    with Client(f"{url}/elsewhere") as client, pytest.raises(ServiceError, match="does not exist") as caught:
        client.version()
    assert (caught.value.status, caught.value.kind) == (404, "")


def test_models_and_the_version_are_returned(client: Client) -> None:
    assert [model["name"] for model in client.models()] == ["tiny"]
    assert client.model("tiny")["default"]
    assert client.version()


def test_the_asynchronous_client_does_the_same(url: str, jobs, worker) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            scores = await asyncio.gather(*(client.score(flat(level)) for level in range(5)))
            assert [score.bpd for [score] in scores] == list(range(5))
            worker.hold()
            steps: list[JobProgress] = []

            async def end_job(step: JobProgress) -> None:
                steps.append(step)
                await asyncio.sleep(0)
                worker.resume()

            assert (await client.generate(seed=3, on_progress=end_job)).seeds == (3,)
            assert [step.step for step in steps] == [1, 2]
            assert (await client.complete(flat(1))).images.shape == (1, 8, 8, 3)
            assert (await client.scan(flat(1, 9, 9))).score == 1
            assert (await client.models())[0] == await client.model("tiny")
            job_id = list(jobs)[-1]
            assert (await client.job(job_id)).id == (await client.cancel(job_id)).id == job_id
            assert isinstance(await client.result(job_id), Scan)
            await client.delete(job_id)
            assert await client.version()
            with pytest.raises(ServiceError, match="its classes are cat, dog"):
                await client.generate(class_="unicorn")

    asyncio.run(run())


# Refusals and retries


def test_a_refusal_names_the_field(client: Client) -> None:
    with pytest.raises(ServiceError, match="its classes are cat, dog") as caught:
        client.generate(class_="unicorn")
    error = caught.value
    assert (error.status, error.kind, error.field) == (422, "invalid-input", "class")
    assert error.request_id


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nowhere.png", "nowhere.png cannot be read: No such file"),
        (np.zeros((8, 8, 3)), r"must be uint8 .* not float64 \[8, 8, 3\]"),
        (np.zeros((8, 8, 2), np.uint8), r"not uint8 \[8, 8, 2\]"),
        (5, "a path, bytes, a PIL image or a uint8 array, not 5"),
        (Image.new("F", (8, 8)), "no agreed range"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused_before_it_is_sent(
    client: Client, jobs, image: object, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        client.score([image])  # type: ignore[list-item]
    assert caught.value.field == "image"
    assert not jobs
    with pytest.raises(InputError, match="there is no image"):
        client.score([])


def test_the_service_s_refusal_names_the_image(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("hello")
    for images in (path, [flat(1), path]):
        with pytest.raises(ServiceError, match=rf"^{path} is not an image") as caught:
            client.score(images)
        assert (caught.value.field, caught.value.status) == (str(path), 422)
    with pytest.raises(ServiceError, match=r"^image\[65\] is not an image"):
        client.score([flat(1)] * 65 + [b"hello", flat(1)])


def test_an_image_that_the_worker_refuses_is_named(client: Client, worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "dark.png"
    path.write_bytes(to_png(flat(1)))
    detail = "image[1] has a score places that is not finite: save it again as PNG."
    worker.error = lambda job: JobError(reason="input", field="image[1]", detail=detail)
    with pytest.raises(ServiceError, match=rf"^{path} has a score places that is not finite") as caught:
        client.score([flat(1), path])
    assert (caught.value.field, caught.value.kind) == (str(path), "job-input")
    document = {"status": 422, "detail": detail, "errors": [{"field": "image[1]", "detail": detail}]}
    late = httpx2.Response(422, json=document | {"type": "urn:ncml:problem:job-input"}, headers=PROBLEM)
    slow, _ = scripted(httpx2.Response(202, json={"id": "1"}), late)
    with pytest.raises(ServiceError, match=rf"^{path} has a score places that is not finite"):
        slow.score([flat(1), path])


def test_a_refusal_of_an_image_that_was_not_sent_is_a_refusal() -> None:
    detail = "image[7] is not an image."
    document = {"type": "about:blank", "status": 422, "detail": detail, "errors": [{"field": "image[7]"}]}
    client, _ = scripted(*[httpx2.Response(422, json=document, headers=PROBLEM)] * 2)
    for call in (lambda: client.score([flat(1)]), lambda: client.update("new", model="bottles")):
        with pytest.raises(ServiceError, match=r"^image\[7\] is not an image"):
            call()


def test_values_that_are_invalid_in_a_header_are_refused(client: Client) -> None:
    for key in ("secret\n", "geheimnis \xfc"):
        with pytest.raises(InputError, match="the API key has a space, a line break"):
            Client("http://localhost", api_key=key)
    for key in ("\xfc", 17):
        with pytest.raises(InputError, match="idempotency_key must be ASCII"):
            client.score(flat(1), idempotency_key=key)
    for name in ("", "models/cifar10", "hf://owner/model"):
        with pytest.raises(InputError, match="model must be the name of a model that the service has"):
            client.model(name)


@pytest.mark.parametrize("key", ["my order 17", '"quoted"', "back\\slash", "order-17"])
def test_any_printable_idempotency_key_identifies_a_call(client: Client, jobs, key: str) -> None:
    first, second = (client.generate(idempotency_key=key, seed=1) for _ in range(2))
    assert np.array_equal(first.images, second.images)
    assert len(jobs) == 1


def test_an_option_of_another_type_is_named(client: Client, jobs) -> None:
    for name, value in (("model", Path("m")), ("statistics", ["bpd", 1]), ("calibration", b"default")):
        with pytest.raises(InputError, match=f"^{name} must be text, a number or a list of texts, not ") as caught:
            client.score(flat(1), **{name: value})
        assert caught.value.field == name
    assert not jobs


def test_an_option_that_a_method_does_not_have_is_refused_before_anything_is_sent(client: Client, jobs) -> None:
    def refuse(words: str, call: Callable[..., object], *arguments: object, **options: object) -> None:
        with pytest.raises(InputError, match=words) as caught:
            call(*arguments, **options)
        assert caught.value.field in options

    refuse("^tile is not an option of score: use scan$", client.score, flat(1), tile=True)
    names = "choose from model, priority, idempotency_key, on_progress, webhook, class_, noise, map, "
    refuse(f"^format is not an option of score: {names}", client.score, flat(1), format="png")
    refuse("^classes is not an option of score: did you mean class_", client.score, flat(1), classes="cat")
    refuse("^seeds is not an option of generate: did you mean seed", client.generate, seeds=[1])
    refuse("^noise is not an option of scan: choose from ", client.scan, flat(1, 9, 9), noise=1)
    assert not jobs


def test_a_wrong_key_is_refused_in_one_sentence(queue, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{digest('secret')}\n")
    with served(create_app(Settings(api_keys_file=keys), queue)) as url:
        with Client(url, api_key="secret") as client:
            assert client.score(flat(1))
        with Client(url, api_key="wrong") as client, pytest.raises(ServiceError, match="API key") as caught:
            client.score(flat(1))
    assert caught.value.status == 401


def test_an_address_without_a_service_is_reported_in_one_sentence(pauses: list[float]) -> None:
    message = r"^http://127.0.0.1:\d+ cannot be reached .* check the address"
    url = f"http://user:sec:r@t@127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(ServiceError, match=message) as caught:
        client.models()
    assert caught.value.status == 0
    assert len(pauses) == 3
    for url in ("localhost:8000", "ftp://localhost", "", "http://", "http://localhost:abc", "http://[::1"):
        with pytest.raises(InputError, match="give one like http://localhost:8000"):
            Client(url)
    with pytest.raises(InputError, match=r"^'http://localhost:abc' is not"):
        Client("http://user:secret@localhost:abc")


def scripted(
    *answers: httpx2.Response | Exception, timeout_s: float = 90, patience_s: float = 100
) -> tuple[Client, list[httpx2.Request]]:
    """Return a client whose requests get these responses in order, and a list of the requests."""
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        reply = answers[len(requests) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    transport = httpx2.MockTransport(answer)
    return Client("http://service", transport=transport, patience_s=patience_s, timeout_s=timeout_s), requests


PROBLEM = {"content-type": "application/problem+json"}


def problem(status: int, kind: str, **headers: str) -> httpx2.Response:
    document = {"type": f"urn:ncml:problem:{kind}", "status": status, "detail": f"{kind}.", "request_id": "r"}
    return httpx2.Response(status, json=document, headers=PROBLEM | headers)


MODELS = httpx2.Response(200, json={"models": []})


def test_a_busy_service_is_retried_after_its_retry_after(pauses: list[float]) -> None:
    client, requests = scripted(
        problem(429, "queue-full", **{"retry-after": "7"}),
        problem(503, "no-room", **{"retry-after": "2"}),
        httpx2.ReadError("reset"),
        httpx2.Response(502, text="<html>"),
        httpx2.Response(200, json={"results": [{"bpd": 1.5, "log_likelihood": -1.0, "ood": None, "new": 1}]}),
    )
    [score] = client.score(flat(1))
    assert (score.bpd, score.ood) == (1.5, None)
    assert pauses[:2] == [7, 2]
    assert len({request.headers["idempotency-key"] for request in requests}) == 1


def test_a_deletion_whose_response_was_lost_succeeds(pauses: list[float]) -> None:
    client, requests = scripted(httpx2.ReadError("reset"), problem(404, "no-such-job"))
    client.delete("job-0")
    assert [request.method for request in requests] == ["DELETE", "DELETE"]
    with pytest.raises(ServiceError, match="no-such-job"):
        scripted(problem(429, "quota-exceeded"), problem(404, "no-such-job"))[0].delete("job-0")


SCORED = httpx2.Response(200, json={"results": [{"bpd": 1.5, "log_likelihood": -1.0, "ood": None}]})
QUEUED = httpx2.Response(202, json={"id": "job-0"})


def test_a_job_that_the_queue_has_lost_is_submitted_again_once(pauses: list[float]) -> None:
    lost = problem(404, "no-such-job")
    client, requests = scripted(QUEUED, lost, SCORED)
    assert client.score(flat(1))[0].bpd == 1.5
    assert [request.method for request in requests] == ["POST", "GET", "POST"]
    assert requests[0].headers["idempotency-key"] == requests[2].headers["idempotency-key"]
    assert len(requests[0].content) == len(requests[2].content) > 100  # with another boundary
    client, requests = scripted(lost, QUEUED, lost)
    with pytest.raises(ServiceError, match="no-such-job"):
        client.score(flat(1))
    assert [request.method for request in requests] == ["POST", "POST", "GET"]


def test_a_key_is_sent_beside_the_user_and_password_of_an_address() -> None:
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return MODELS

    transport = httpx2.MockTransport(answer)
    for url in ("http://user:secret@service", "http://service"):
        Client(url, api_key="key", transport=transport).models()
    assert [request.headers.get("x-api-key") for request in requests] == ["key", None]
    assert requests[0].headers["authorization"].startswith("Basic ")
    assert requests[1].headers["authorization"] == "Bearer key"


def test_a_service_that_stays_busy_is_retried_until_patience_ends(pauses: list[float]) -> None:
    client, _ = scripted(*[problem(429, "queue-full", **{"retry-after": "1"})] * 1500, MODELS, patience_s=1800)
    assert client.models() == []
    assert pauses[-1] < 2


@pytest.mark.parametrize(
    ("answers", "words", "pause_count"),
    [
        ([problem(429, "queue-full", **{"retry-after": "60"})] * 3, "queue-full", 1),
        ([problem(503, "no-worker", **{"retry-after": "20"})] * 5, "no-worker", 3),
        ([problem(504, "job-timeout")], "job-timeout", 0),
        ([problem(404, "result-expired")], "result-expired", 0),
        ([httpx2.Response(404, text="not here")], "answered 404, but not as an ncml service", 0),
        ([httpx2.Response(200, json={"data": []})], "answered 200, but not as an ncml service", 0),
        ([httpx2.Response(200, json=[])], "answered 200, but not as an ncml service", 0),
        ([httpx2.Response(400, json={"title": "Bad Request"}, headers=PROBLEM)], "^Bad Request$", 0),
        ([httpx2.Response(400, json={}, headers=PROBLEM)], "answered 400, but not as an ncml service", 0),
        ([httpx2.Response(200, text='{"a":' + "[" * 100_000)], "answered 200, but not as an ncml service", 0),
        ([httpx2.Response(200, text="<html>")], "answered 200, but not as an ncml service", 0),
        ([httpx2.ReadTimeout("")] * 4, "cannot be reached .ReadTimeout.", 3),
    ],
)
def test_retries_end(answers: list, words: str, pause_count: int, pauses: list[float]) -> None:
    client, _ = scripted(*answers)
    with pytest.raises(ServiceError, match=words) as refused:
        client.models()
    assert len(pauses) == pause_count
    last = answers[-1]
    stated_s = last.headers.get("retry-after", 0) if isinstance(last, httpx2.Response) else 0
    assert refused.value.retry_after_s == float(stated_s)


def test_a_service_that_restarts_is_waited_for_if_it_has_answered_before(pauses: list[float]) -> None:
    restarting = [httpx2.ConnectError("refused")] * 9
    client, requests = scripted(MODELS, *restarting, MODELS, *restarting, *restarting)
    client.models()
    assert client.models() == []
    assert 45 < sum(pauses) <= 60
    with pytest.raises(ServiceError, match=r"cannot be reached .refused."):
        client.models()
    assert len(requests) == 1 + 10 + 10
    client, requests = scripted(MODELS, *restarting, patience_s=0)
    client.models()
    with pytest.raises(ServiceError, match=r"cannot be reached .refused."):
        client.models()
    assert len(requests) == 1 + 4


def test_a_response_that_cannot_be_decoded_is_refused() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(b"not gzip"))

    async def ask() -> None:
        async with AsyncClient("http://service", transport=httpx2.MockTransport(answer)) as client:
            await client.models()

    message = "^http://service answered, but not as an ncml service does: check the address"
    with pytest.raises(ServiceError, match=message):
        Client("http://service", transport=httpx2.MockTransport(answer)).models()
    with pytest.raises(ServiceError, match=message):
        asyncio.run(ask())


class Endless(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body of blanks without end, of which `sent` counts the parts; it ends after 100 for a client that reads on."""

    def __init__(self) -> None:
        self.sent = 0

    def __iter__(self) -> Iterator[bytes]:
        while self.sent < 100:
            self.sent += 1
            yield bytes(2**16)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_response_that_is_too_large_is_refused_before_all_of_it_is_read(
    coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.client.exchange.MAX_RESPONSE_BYTES", 2**20)
    bodies: list[Endless] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(Endless())
        body = httpx2.ByteStream(gzip.compress(bytes(2**24))) if coding == "gzip" else bodies[-1]
        return httpx2.Response(200, headers={"content-encoding": coding}, stream=body)

    async def ask() -> None:
        async with AsyncClient("http://service", transport=httpx2.MockTransport(answer)) as client:
            await client.models()

    for call in (Client("http://service", transport=httpx2.MockTransport(answer)).models, lambda: asyncio.run(ask())):
        with pytest.raises(ServiceError, match=r"^http://service answered, but not as an ncml service does"):
            call()
    assert max(body.sent for body in bodies) < 20


@pytest.mark.parametrize("form", ["EPS", "text", "PNG of 36 megapixels"])
def test_only_images_of_the_formats_of_a_service_are_opened(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")  # Ghostscript, with which Pillow reads EPS
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    file = io.BytesIO(b"text")
    if form == "EPS":
        Image.new("RGB", (8, 8)).save(file, "EPS")
    elif form != "text":
        Image.new("1", (6000, 6000)).save(file, "PNG")
    generated = [{"png": base64.b64encode(file.getvalue()).decode(), "seed": 1}]
    response = httpx2.Response(200, json={"images": generated, "model": {"name": "m", "version": "v"}})
    with pytest.raises(ServiceError, match="not as an ncml service"):
        scripted(response)[0].generate()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("timeout_s", "wait"), [(90, 30), (10, 5), (1, 0)])
def test_a_job_may_take_longer_than_the_timeout(timeout_s: float, wait: int, pauses: list[float]) -> None:
    """The service is asked to answer within half of the timeout; it may answer at once."""
    accepted = httpx2.Response(202, json={"id": "1"})
    scores = httpx2.Response(200, json={"results": [{"bpd": 1.5, "log_likelihood": -1.0}]})
    client, requests = scripted(accepted, accepted, scores, timeout_s=timeout_s)
    assert client.score(flat(1))[0].bpd == 1.5
    assert [request.headers["prefer"] for request in requests] == [f"wait={wait}"] * 3
    assert pauses == [0.25, 0.25]


@pytest.mark.parametrize("year", [2015, 99999, 10**20])
def test_retry_after_may_be_a_date(pauses: list[float], year: int) -> None:
    client, _ = scripted(problem(429, "queue-full", **{"retry-after": f"Wed, 21 Oct {year} 07:28:00 GMT"}), MODELS)
    assert client.models() == []
    assert 0 < pauses[0] < 1


def test_the_client_imports_no_torch() -> None:
    code = "import sys, ncml.client; assert not {'torch', 'fastapi', 'redis'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
