"""POST /calibrate: a client's images or zips become a new model."""

import asyncio
import base64
import io
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from httpx2 import Response
from starlette.testclient import TestClient

from ncml.errors import InputError
from ncml.images import to_png
from service.app import create_app
from service.archives import read_archive
from service.decoders import DecoderPool
from service.keys import digest
from service.settings import Settings
from tests.conftest import eventually
from worker.contract import CalibrateJob


def image(seed: int) -> bytes:
    return to_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def archive(files: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, data in files:
            target.writestr(name, data)
    return buffer.getvalue()


def files(count: int) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (f"{i}.png", image(i))) for i in range(count)]


@pytest.fixture
def open_client(new_client: Callable[..., TestClient]) -> TestClient:
    return new_client(allow_calibration=True, max_calibration_images=45)


def test_calibration_is_off_by_default_and_the_refusal_names_both_remedies(client: TestClient) -> None:
    response = client.post("/calibrate?name=mine", files=files(40))
    assert response.status_code == 403
    assert response.json()["type"].endswith("calibration-off")
    assert "NCML_ALLOW_CALIBRATION=1" in response.json()["detail"]
    assert "ncml calibrate" in response.json()["detail"]
    assert client.get("/models").json()["calibration_allowed"] is False


def test_images_become_a_job_and_its_result_describes_the_new_model(open_client: TestClient, jobs) -> None:
    assert open_client.get("/models").json()["calibration_allowed"] is True
    response = open_client.post("/calibrate", data={"name": "mine"}, files=[*files(40), ("image", ("a.txt", b"no"))])
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"]["name"] == "mine"
    assert answer["calibration"]["n_rank"] == 20
    assert answer["skipped"] == [
        "a.txt is not an image in a supported format; send a PNG, JPEG, WebP, BMP, TIFF or GIF file."
    ]
    (job,) = jobs.values()
    assert isinstance(job, CalibrateJob)
    assert (job.name, job.images, job.model, job.false_positive_rate) == ("mine", 40, "tiny", 0.05)
    pixels = np.frombuffer(job.pixels, np.uint8).reshape(40, 8, 8, 3)
    np.testing.assert_array_equal(pixels[7], np.random.default_rng(7).integers(0, 256, (8, 8, 3), np.uint8))


def test_images_can_be_sent_in_json_up_to_the_limit(new_client: Callable[..., TestClient], jobs) -> None:
    client = new_client(allow_calibration=True, max_calibration_images=1500)
    url = f"data:image/png;base64,{base64.b64encode(image(0)).decode()}"
    response = client.post("/calibrate", json={"name": "mine", "image": [url] * 1500})
    assert response.status_code == 200, response.text
    (job,) = jobs.values()
    assert job.images == 1500


def test_parameters_in_json_are_checked(new_client: Callable[..., TestClient]) -> None:
    client = new_client(allow_calibration=True, max_calibration_images=20_000)
    boolean = client.post("/calibrate", json={"name": "mine", "false_positive_rate": True})
    assert boolean.status_code == 422
    expected = "false_positive_rate is true; it must be a number, not true or false."
    assert boolean.json()["detail"] == expected
    started = time.process_time()
    many = client.post("/calibrate", json=dict.fromkeys(map(str, range(40_000)), 0))
    assert "more than 32 parameters in the body" in many.json()["detail"]
    assert time.process_time() - started < 2  # 31 s if each name is counted in the list


def test_a_zip_is_unpacked_without_folders_and_hidden_files(open_client: TestClient, jobs) -> None:
    names = [("good/", b""), ("__MACOSX/good/._1.png", b"x"), ("good/.DS_Store", b"x"), ("good/a.txt", b"no")]
    data = archive([*names, *((f"good/{i}.png", image(i)) for i in range(40))])
    response = open_client.post("/calibrate?name=mine", files=[("image", ("good.zip", data))])
    assert response.status_code == 200, response.text
    assert [reason.split(" is")[0] for reason in response.json()["skipped"]] == ["good/a.txt"]
    (job,) = jobs.values()
    assert job.images == 40


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("../x", "name"), ("tiny", "a model 'tiny' already exists"), (".x", "name"), ("a" * 65, "name"), ("", "name")],
)
def test_an_unsafe_or_taken_name_is_refused(open_client: TestClient, jobs, name: str, sentence: str) -> None:
    response = open_client.post("/calibrate", data={"name": name}, files=files(40))
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "name"
    assert sentence in response.json()["detail"]
    assert not jobs.claimable


def test_a_name_is_required_in_words(open_client: TestClient) -> None:
    missing = open_client.post("/calibrate", files=files(2)).json()
    assert missing["detail"] == "name: it is required; add it."
    invalid = open_client.post("/calibrate?name=a/b", files=files(2)).json()["detail"]
    words = "it must have 1 to 64 letters, digits, dots, underscores and hyphens, beginning with a letter or digit."
    assert invalid == f"name is 'a/b'; {words}"


def test_a_request_repeated_with_its_key_returns_its_job_although_the_model_exists(
    open_client: TestClient, jobs, worker, model
) -> None:
    headers = {"Idempotency-Key": "bottles"}
    first = open_client.post("/calibrate?name=mine", files=files(40), headers=headers)
    worker.serve(model, model.model_copy(update={"name": "mine"}))
    again = open_client.post("/calibrate?name=mine", files=files(40), headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    assert len(jobs) == 1


def bomb() -> bytes:
    """A zip that unpacks to 200 MB."""
    return archive([("zeros.png", bytes(200_000_000))])


def understated() -> bytes:
    """The same zip, whose directory declares a size of 10 bytes."""
    data = bytearray(bomb())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        position = data.rfind(signature)
        data[position + offset : position + offset + 4] = struct.pack("<I", 10)
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(archive([("a.png", image(0))]))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rfind(signature) + offset] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(lambda: archive([("../a.png", image(0))]), "unsafe name '../a.png'", id="parent"),
        pytest.param(lambda: archive([("/etc/a.png", image(0))]), "unsafe name", id="absolute"),
        pytest.param(lambda: archive([("c:\\a.png", image(0))]), "unsafe name", id="drive"),
        pytest.param(lambda: archive([("a\x1b[2J.png", image(0))]), "rename the file", id="control character"),
        pytest.param(lambda: archive([(f"{i}.png", b"") for i in range(7)]), "more than 6 files", id="many"),
        pytest.param(bomb, "more than 67108864 bytes when unpacked", id="bomb"),
        pytest.param(understated, "is a zip that", id="understated bomb"),
        pytest.param(encrypted, "cannot be read", id="encrypted"),
        pytest.param(lambda: b"PK\x03\x04 and no more", "cannot be read", id="damaged"),
    ],
)
def test_a_hostile_zip_is_refused(open_client: TestClient, jobs, data: Callable[[], bytes], sentence: str) -> None:
    response = open_client.post("/calibrate?name=mine", files=[*files(39), ("image", ("a.zip", data()))])
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["field"] == "image[39]"
    assert sentence in response.json()["detail"]
    assert not jobs.claimable


def test_a_damaged_zip_alone_is_called_damaged(open_client: TestClient) -> None:
    """Its unknown number of files is not the reason."""
    response = open_client.post("/calibrate?name=mine", files=[("image", ("a.zip", b"PK\x03\x04 and no more"))])
    assert "is a zip that cannot be read" in response.json()["detail"]


def test_ordinary_names_in_a_zip_are_accepted() -> None:
    names = ["at 10.11.12\u202fAM.png", "from 2013 10:11:12.png", "a\u00a0b.png", "\u732b.png"]
    files = read_archive(archive([(name, image(0)) for name in names]), field="image", max_files=45, max_bytes=10**6)
    assert [name for name, _ in files] == names


def test_repeated_names_in_a_zip_are_refused() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = archive([("a.png", image(0)), ("a.png", image(1))])
    with pytest.raises(InputError, match="two files"):
        read_archive(data, field="image", max_files=45, max_bytes=10**6)


def test_a_directory_of_far_too_many_files_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive((f"{i}.png", b"") for i in range(400))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it is parsed"))
    with pytest.raises(InputError, match="more than 45 files"):
        read_archive(data, field="image", max_files=45, max_bytes=10**6)


def test_a_directory_with_a_false_number_of_files_is_refused() -> None:
    data = bytearray(archive([(f"{i}.png", b"x") for i in range(60)]))
    end = data.rfind(b"PK\x05\x06")
    data[end + 8 : end + 12] = struct.pack("<HH", 3, 3)
    with pytest.raises(InputError, match="more than 45 files"):
        read_archive(bytes(data), field="image", max_files=45, max_bytes=10**6)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_contents_are_refused(compression: int) -> None:
    data = bytearray(archive([("a.png", zlib.compress(image(0)) * 20)], compression))
    data[60:70] = bytes(10)
    with pytest.raises(InputError, match="cannot be read"):
        read_archive(bytes(data), field="image", max_files=45, max_bytes=10**6)


def test_a_damaged_name_is_refused() -> None:
    data = archive([("ä.png", image(0))]).replace("ä".encode(), b"\xc3\xc3")
    with pytest.raises(InputError, match="cannot be read"):
        read_archive(data, field="image", max_files=45, max_bytes=10**6)


def test_the_limits_on_files_and_bytes_apply_to_all_zips_of_a_request(
    new_client: Callable[..., TestClient], jobs
) -> None:
    client = new_client(allow_calibration=True, max_calibration_images=45, max_body_bytes=100_000)
    zeros = archive([("a.png", bytes(60_000)), *((f"{i}.txt", b"") for i in range(20))])
    response = client.post("/calibrate?name=mine", files=[("image", (f"{i}.zip", zeros)) for i in range(2)])
    assert response.status_code == 422
    assert "image[1] is a zip of more than 40000 bytes when unpacked" in response.json()["detail"]
    many = archive((f"{i}.txt", b"") for i in range(30))
    response = client.post("/calibrate?name=mine", files=[("image", (f"{i}.zip", many)) for i in range(2)])
    assert response.status_code == 422
    assert "image[1] is a zip of more than 15 files" in response.json()["detail"]
    assert not jobs.claimable


def test_too_many_images_and_bytes_are_refused(new_client: Callable[..., TestClient], jobs) -> None:
    client = new_client(allow_calibration=True, max_calibration_images=45, max_body_bytes=20_000)
    response = client.post("/calibrate?name=mine", files=files(46))
    assert response.status_code == 422
    assert "at most 45 images" in response.json()["detail"]
    both = archive((f"{i}.png", image(i)) for i in range(30))
    response = client.post("/calibrate?name=mine", files=[*files(20), ("image", ("a.zip", both))])
    assert response.status_code == 422
    assert "image[20] is a zip of more than 25 files" in response.json()["detail"]
    large = [("image", ("a.png", bytes(30_000)))]
    assert client.post("/calibrate?name=mine", files=large).status_code == 413
    assert not jobs.claimable


def test_more_images_than_a_job_can_hold_are_refused(open_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.routes.calibrate.MAX_PIXEL_BYTES", 39 * 8 * 8 * 3)
    response = open_client.post("/calibrate?name=mine", files=files(40))
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"field": "image", "detail": "image: 40 images of 8x8 do not fit into a job; send at most 39."}
    ]
    assert open_client.post("/calibrate?name=mine", files=files(39)).status_code == 200


def test_a_key_is_required_where_keys_exist(new_client: Callable[..., TestClient], tmp_path) -> None:
    (tmp_path / "keys").write_text(f"someone:{digest('ncml_key')}\n")
    client = new_client(allow_calibration=True, api_keys_file=tmp_path / "keys")
    assert client.post("/calibrate?name=mine", files=files(40)).status_code == 401


@pytest.mark.parametrize("count", [2, 38])
def test_too_few_images_are_refused_before_they_are_decoded(
    open_client: TestClient, jobs, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    async def decode(*_: object) -> None:
        pytest.fail("a file was decoded")

    monkeypatch.setattr("service.decoders.DecoderPool.run", decode)
    zipped = [("image", ("good.zip", archive((f"{i}.png", image(i)) for i in range(count))))]
    sentence = f"image: {count} images are too few: use at least 39 good images, 20 to estimate and 19 to rank"
    for upload in (files(count), zipped):
        response = open_client.post("/calibrate?name=mine", files=upload, headers={"Prefer": "respond-async"})
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "image"
        assert response.json()["detail"].startswith(sentence)
    assert not jobs
    strict = open_client.post("/calibrate?name=mine&false_positive_rate=0.01", files=files(45))
    assert "use at least 119 good images" in strict.json()["detail"]


def test_a_zip_of_other_files_is_refused_with_a_reason(open_client: TestClient, jobs) -> None:
    others = archive((f"{i}.txt", b"x") for i in range(40))
    response = open_client.post("/calibrate?name=mine", files=[("image", ("a.zip", others))])
    assert response.status_code == 422
    assert "image: 0 images are too few" in response.json()["detail"]
    assert "40 other files are not usable: 0.txt is not an image" in response.json()["detail"]
    one = open_client.post("/calibrate?name=mine", files=[*files(38), ("image", ("a.txt", b"x"))])
    assert "1 other file is not usable: a.txt is not an image" in one.json()["detail"]
    assert not jobs.claimable


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return an event without which images are not decoded."""
    may_decode = threading.Event()
    run = DecoderPool.run

    async def decode(pool: DecoderPool, field: str, call: Callable[[], object]) -> object:
        while not may_decode.is_set():
            await asyncio.sleep(0.01)
        return await run(pool, field, call)

    monkeypatch.setattr(DecoderPool, "run", decode)
    yield may_decode
    may_decode.set()


ASYNC = {"Prefer": "respond-async"}


def test_a_client_that_does_not_wait_has_the_job_before_its_images_are_decoded(
    open_client: TestClient, jobs, decoding: threading.Event
) -> None:
    response = open_client.post("/calibrate?name=mine", files=files(40), headers=ASYNC)
    assert response.status_code == 202
    path = response.headers["Location"]
    assert open_client.get(path).json()["status"] == "queued"
    assert not jobs.claimable
    decoding.set()
    eventually(lambda: open_client.get(path).json()["status"] == "succeeded")
    (job,) = jobs.claimable
    assert (job.images, job.name) == (40, "mine")


def test_a_further_calibration_is_refused_until_there_is_a_place(
    open_client: TestClient, jobs, decoding: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.preparation.WAIT_S", 0.05)
    monkeypatch.setattr("service.jobs.client_name", lambda request: request.headers["X-Client"])

    def post(client: str, **headers: str) -> Response:
        return open_client.post(
            "/calibrate?name=mine", files=files(40), headers={**ASYNC, "X-Client": client, **headers}
        )

    assert post("a", **{"Idempotency-Key": "one"}).status_code == 202
    for client in ("a", "b", "c"):  # a client has one place, and all together two
        response = post(client)
        assert response.status_code == (202 if client == "b" else 503)
    assert response.json()["type"].endswith("no-room")
    assert response.headers["Retry-After"] == "10"
    again = post("a", **{"Idempotency-Key": "one"})  # returns its job, which has a place
    assert (again.status_code, again.headers["Location"]) == (202, f"/jobs/{next(iter(jobs))}")
    decoding.set()
    eventually(lambda: len(jobs.claimable) == 2)
    eventually(lambda: post("c").status_code == 202)


def test_a_calibration_that_the_queue_refuses_leaves_its_place(
    new_client: Callable[..., TestClient], worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.preparation.WAIT_S", 0.05)
    worker.pause()
    client = new_client(allow_calibration=True, max_waiting=1)
    waiting = client.post("/generate", headers=ASYNC).headers["Location"]
    for _ in range(2):
        refused = client.post("/calibrate?name=mine", files=files(40), headers=ASYNC)
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:ncml:problem:queue-full")
    assert client.delete(waiting).status_code == 204
    assert client.post("/calibrate?name=mine", files=files(40), headers=ASYNC).status_code == 202


def test_images_that_take_too_long_end_their_job(
    new_client: Callable[..., TestClient], jobs, decoding: threading.Event
) -> None:
    client = new_client(allow_calibration=True, decode_request_s=0.05)
    response = client.post("/calibrate?name=mine", files=files(40))
    assert response.status_code == 422
    assert response.json()["type"].endswith("job-input")
    assert response.json()["errors"][0]["field"] == "image"
    assert "decoding takes more than 0.05 s, the limit of a request" in response.json()["detail"]
    assert client.post("/score", files=files(1)).json()["detail"] == response.json()["detail"]
    decoding.set()
    assert not jobs.claimable


def test_a_canceled_calibration_stops_decoding_and_leaves_its_place(
    open_client: TestClient, jobs, decoding: threading.Event
) -> None:
    for _ in range(2):  # the second waits for the place of the first
        path = open_client.post("/calibrate?name=mine", files=files(40), headers=ASYNC).headers["Location"]
        assert open_client.post(f"{path}/cancel").json()["status"] == "canceled"
    assert not jobs.claimable


def test_a_service_that_stops_ends_the_jobs_that_it_prepares(queue, decoding: threading.Event) -> None:
    with TestClient(create_app(Settings(allow_calibration=True), queue), base_url="http://localhost") as client:
        path = client.post("/calibrate?name=mine", files=files(40), headers=ASYNC).headers["Location"]
    view = queue.view(path.removeprefix("/jobs/"))
    assert view.status == "expired"
    assert "the service stopped" in view.error.detail


def test_a_queue_without_room_for_the_images_ends_the_job(
    new_client: Callable[..., TestClient], worker, decoding: threading.Event
) -> None:
    worker.pause()
    client = new_client(allow_calibration=True, max_waiting_bytes=4096)
    path = client.post("/calibrate?name=mine", files=files(40), headers=ASYNC).headers["Location"]
    assert client.post("/generate", headers=ASYNC).status_code == 202  # a lane accepts one job of any size
    decoding.set()
    eventually(lambda: client.get(path).json()["status"] == "expired")
    assert "no room for the images" in client.get(path).json()["error"]["detail"]


def test_a_job_that_is_deleted_while_its_request_is_repeated_is_prepared(
    open_client: TestClient, jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_client.app.state.jobs, "_exists", lambda job_id: True)
    response = open_client.post("/calibrate?name=mine", files=files(40), headers={"Idempotency-Key": "bottles"})
    assert response.status_code == 200
    (job,) = jobs.values()
    assert (response.json()["model"]["name"], job.images) == ("mine", 40)
