"""Every refusal is a problem document that names the field and the remedy."""

import base64
import gzip
import io
import re
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from starlette.testclient import TestClient

from ncml.images import to_png
from service.http.problems import RETRY_AFTER_S
from tests.conftest import free_port
from tests.service.hostile import corpus
from worker.contract import Lane
from worker.monitor import QueueMonitor

IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))


def assert_problem(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body.keys() == {"type", "title", "status", "detail", "request_id", "errors"}
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["detail"].endswith(".")
    assert ("retry-after" in response.headers) == (status in (429, 503))
    return body


@pytest.mark.parametrize(
    ("path", "params", "field", "words"),
    [
        ("/generate", {"n": 0}, "n", "at least 1"),
        ("/generate", {"n": 10**9}, "n", "at most 64"),
        ("/generate", {"n": "many"}, "n", "whole number"),
        ("/generate", {"n": 1.5}, "n", "whole number"),
        ("/generate", {"steps": -1}, "steps", "at least 1"),
        ("/generate", {"steps": 1001}, "steps", "at most 1000"),
        ("/generate", {"seed": "seven"}, "seed", "whole number"),
        ("/generate", {"seed": -1}, "seed", "at least 0"),
        ("/generate", {"seed": 2**32}, "seed", "at most 4294967295"),
        ("/generate", {"seed": 2**32 - 1, "n": 2}, "seed", "at most 4294967294"),
        ("/generate", {"noise": -0.1}, "noise", "at least 0"),
        ("/generate", {"noise": 10.5}, "noise", "0 to 10 grey levels"),
        ("/generate", {"noise": "nan"}, "noise", "finite"),
        ("/generate", {"noise": "inf"}, "noise", "finite"),
        ("/generate", {"solver": "magic"}, "solver", "choose from heun, tweedie"),
        ("/generate", {"class": "unicorn"}, "class", "its classes are cat, dog"),
        ("/generate", {"model": "other"}, "model", "the available models are tiny"),
        ("/generate", {"priority": "urgent"}, "priority", "'high', 'normal' or 'low'"),
        ("/generate", {"clas": "cat"}, "clas", "the parameters are model, priority, webhook, class, format, n"),
        ("/generate", {"class": ["cat", "dog"]}, "class", "more than once"),
        ("/complete", {"keep": "middle"}, "keep", "'top', 'bottom', 'left' or 'right'"),
        ("/complete", {"keep": "bottom"}, "keep", "top half is known"),
        ("/score", {"noise": 11}, "noise", "0 to 10 grey levels"),
        ("/score", {"map": "perhaps"}, "map", "it must be 1 or 0"),
        ("/score", {"class": "unicorn"}, "class", "its classes are cat, dog"),
        ("/score", {"n": 3}, "n", "n is not a parameter of this endpoint; the parameters are image, model, priority"),
        ("/score", {"images": 3}, "images", "the parameters are image, "),
        ("/generate", {"query": 1}, "query", "query is not a parameter of this endpoint; the parameters are "),
        ("/score", {"image": "a.png"}, "image", "image is in the query; send it as a file (curl -F image=@cat.png)."),
        ("/generate", {"image": "a.png"}, "image", "image is not a parameter of this endpoint; the parameters are "),
        ("/score", {"format": "gif"}, "format", "it must be 'json', 'png' or 'npz'."),
        ("/score", {"map": 0, "format": "png"}, "map", "map=0 cannot be combined with a PNG, which shows the map"),
        ("/score", {"statistic": "luck"}, "statistic", "it has multiscale, bpd"),
        ("/score", {"calibration": "strict"}, "calibration", "has no calibration 'strict'; it has default, weak"),
        (
            "/score",
            {"calibration": "weak", "ood": 0},
            "calibration",
            "cannot be combined with ood=0; omit one of the two",
        ),
        ("/score", {"calibration": "weak", "statistic": "bpd"}, "statistic", "it has multiscale."),
        ("/score", {"tile": 1, "calibration": "weak"}, "calibration", "omit calibration"),
        ("/score", {"statistics": "bpd,luck"}, "statistics", "no statistic 'luck'; it has multiscale, bpd"),
        ("/score", {"statistics": "all,bpd"}, "statistics", "no statistic 'all'"),
        ("/score", {"statistic": "bpd", "ood": 0}, "statistic", "cannot be combined with ood=0; omit one of the two"),
        ("/score", {"statistics": "all", "ood": 0}, "statistics", "cannot be combined with ood=0; omit one of the two"),
        ("/score", {"sanity": 1, "noise": 2}, "sanity", "without noise and class"),
        ("/score", {"sanity": 1, "class": "cat"}, "sanity", "without noise and class"),
        ("/score", {"tile": "perhaps"}, "tile", "it must be 1 or 0"),
        ("/score", {"tile_size": 16}, "tile_size", "tile_size requires tile=1; add it, or omit tile_size"),
        ("/score", {"tile": 0, "tile_size": 16}, "tile_size", "requires tile=1"),
        ("/score", {"tile": 1, "tile_size": 0}, "tile_size", "at least 1"),
        ("/score", {"tile": 1, "tile_size": 10**9}, "tile_size", "at most 1000000"),
        (
            "/score",
            {"tile": 1, "tile_size": 4},
            "tile_size",
            "side of a tile must be at least the model's 8 pixels, not 4",
        ),
        ("/score", {"tile": 1, "tile_size": 16}, "tile_size", "Tiles were calibrated at 8 x 8 pixels"),
        ("/score", {"tile": 1, "class": "cat"}, "class", "cannot be combined with tile=1; omit class or tile"),
        ("/score", {"tile": 1, "statistics": "all"}, "statistics", "omit statistics"),
        ("/generate", {"tile": 1}, "tile", "not a parameter of this endpoint"),
        ("/generate", {"solver": "tweedie", "steps": 2}, "steps", "takes exactly 1"),
        ("/generate", {"guidance": 2}, "guidance", "needs a class: name a class"),
        ("/generate", {"guidance": 0.1, "class": "cat"}, "guidance", "0.5 to 10"),
        ("/complete", {"temperature": 2}, "temperature", "0.5 to 1.5"),
        ("/complete", {"solver": "tweedie", "steps": 2}, "steps", "takes exactly 1"),
    ],
)
def test_a_parameter_out_of_range_is_named(client, path: str, params: dict, field: str, words: str) -> None:
    files = None if path == "/generate" else [("image", IMAGE)]
    body = assert_problem(client.post(path, params=params, files=files), 422)
    assert [error["field"] for error in body["errors"]] == [field]
    assert words in body["errors"][0]["detail"]


def test_an_empty_field_is_ignored(client, jobs) -> None:
    assert client.post("/generate", data=dict.fromkeys(["class", "n", "seed", "noise", "model"], "")).status_code == 200
    assert client.post("/complete?keep=&steps=&class=", files=[("image", IMAGE)]).status_code == 200
    files = [("image", ("", b"")), ("image", ("cat.png", IMAGE))]
    assert len(client.post("/score", data={"image": ""}, files=files).json()["results"]) == 1
    assert [job.n for job in jobs.values()] == [1, 1, 1]


def test_every_field_at_fault_is_named_at_once(client) -> None:
    body = assert_problem(client.post("/generate?n=0&steps=-1&seed=x"), 422)
    assert {error["field"] for error in body["errors"]} == {"n", "steps", "seed"}


def test_a_parameter_in_query_and_body_is_refused(client) -> None:
    body = assert_problem(client.post("/generate?n=1", json={"n": 2}), 422)
    assert body["errors"][0]["field"] == "n"


def test_the_operator_limits_the_images_of_a_request(new_client) -> None:
    client = new_client(max_images=2)
    assert client.post("/generate?n=2").status_code == 200
    assert "at most 2" in assert_problem(client.post("/generate?n=3"), 422)["errors"][0]["detail"]
    assert "at most 2" in assert_problem(client.post("/score", files=[("image", IMAGE)] * 3), 422)["detail"]


def test_a_class_is_refused_by_a_model_without_classes(client, worker, model) -> None:
    worker.serve(model.model_copy(update={"classes": ()}))
    assert "it has no classes" in assert_problem(client.post("/generate?class=cat"), 422)["detail"]


@pytest.mark.parametrize("path", ["/generate", "/complete?keep=top"])
def test_images_are_refused_by_a_model_that_only_scores(client, worker, model, path: str) -> None:
    worker.serve(model.model_copy(update={"generates": False}))
    assert client.get("/models").json()["models"][0]["generates"] is False
    files = None if path == "/generate" else [("image", IMAGE)]
    body = assert_problem(client.post(path, files=files), 422)
    assert body["errors"][0]["field"] == "model"
    assert "only scores images" in body["detail"]
    assert client.post("/score", files=[("image", IMAGE)]).status_code == 200


def test_statistics_are_refused_by_a_model_that_is_not_calibrated(client, worker, model) -> None:
    worker.serve(model.model_copy(update={"calibrations": {}}))
    for name in ("statistic", "statistics"):
        body = assert_problem(client.post(f"/score?{name}=bpd", files=[("image", IMAGE)]), 422)
        assert body["errors"][0]["field"] == name
        assert "not calibrated" in body["detail"]
    assert client.post("/score", files=[("image", IMAGE)]).status_code == 200


def test_an_image_that_cannot_be_tiled_is_refused_at_once(new_client, jobs, worker, model) -> None:
    client = new_client(max_tiles=6, max_image_pixels=1000)

    def refusal(height: int, width: int, status: int = 422, **params: object) -> dict:
        file = to_png(np.zeros((height, width, 3), np.uint8))
        return assert_problem(client.post("/score", params={"tile": 1, **params}, files=[("image", file)]), status)

    assert client.post("/score?tile=1", files=[("image", to_png(np.zeros((12, 16, 3), np.uint8)))]).status_code == 200
    body = refusal(12, 20)
    assert body["errors"][0]["field"] == "image"
    detail = "image is 20 x 12 pixels, which makes 8 tiles of 8 x 8; at most 6 are scored, so send it in parts."
    assert body["detail"] == detail
    assert "An image of 6 x 9 pixels is smaller than a tile of 8 x 8" in refusal(9, 6)["detail"]
    assert "at most 1000 pixels" in refusal(32, 32, 413)["detail"]
    for files, words in (
        ([("image", IMAGE)] * 2, "send one at a time"),
        ([("image", IMAGE[:-30])], "damaged"),
    ):
        assert words in assert_problem(client.post("/score?tile=1", files=files), 422)["detail"]
    worker.serve(model.model_copy(update={"tiles": None}))
    body = refusal(20, 20)
    assert body["errors"][0]["field"] == "image"
    assert body["detail"].endswith("makes 16 tiles of 8 x 8; at most 6 are scored, so set tile_size to at least 13.")
    params = {"tile": 1, "tile_size": 13}
    file = to_png(np.zeros((20, 20, 3), np.uint8))
    assert client.post("/score", params=params, files=[("image", file)]).status_code == 200
    assert "send it in parts" in refusal(8, 100)["detail"]
    worker.serve(model.model_copy(update={"tiles": None, "calibrations": {}}))
    body = refusal(8, 8)
    assert body["errors"][0]["field"] == "tile"
    assert "tiny is not calibrated; omit tile, or calibrate the model" in body["detail"]
    assert len(jobs) == 2


@pytest.mark.parametrize(
    ("request_kwargs", "status", "words"),
    [
        ({}, 422, "image is missing"),
        ({"json": {}}, 422, "image is missing"),
        ({"data": {"image": "text"}, "files": [("other", b"x")]}, 422, "image"),
        ({"files": [("photo", IMAGE)]}, 422, "photo"),
        ({"data": {"image": "text", "class": "cat"}, "files": [("image", IMAGE)]}, 422, "image is text"),
        ({"files": [("image", ("cat.png", b""))]}, 422, "zero bytes"),
        ({"json": {"image": "!!!"}}, 422, "base64"),
        ({"json": {"image": 5}}, 422, "base64"),
        ({"json": {"image": []}}, 422, "image is missing"),
        ({"json": {"image": ["", 5]}}, 422, "image[1] is not base64"),
        ({"json": [1]}, 422, "not an object"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"content": b"[" * 10**5, "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"content": b'{"\\ud800": 1}', "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"content": b'{"class": "\\ud800"}', "headers": {"content-type": "application/json"}}, 422, "class"),
        ({"content": b'{"noise": 1e999}', "headers": {"content-type": "application/json"}}, 422, "noise"),
        ({"content": '{"n": 1}'.encode("utf-16"), "headers": {"content-type": "application/json"}}, 400, "not valid"),
        ({"content": b'{"noise": 1, "noise": 1}', "headers": {"content-type": "application/json"}}, 422, "more than"),
        ({"content": b'{"noise": NaN}', "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "text/plain"),
        ({"content": b"x"}, 415, "without a Content-Type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "form"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400, "form"),
        ({"content": b"--a--", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 422, "missing"),
        ({"content": IMAGE[:-30], "headers": {"content-type": "image/png"}}, 422, "damaged"),
        ({"content": b"", "headers": {"content-type": "image/png"}}, 422, "zero bytes"),
        ({"files": [("image", IMAGE)] * 65}, 422, "at most 64 images"),
        (
            {"files": [("image", IMAGE)] * 66},
            422,
            "image: too many images were sent; this endpoint accepts at most 64",
        ),
        (
            {"data": {"image": "text" * 2000}, "files": [("other", b"x")]},
            422,
            "send an image as a file (curl -F image=@",
        ),
        ({"data": {"class": "c" * 5000}, "files": [("image", IMAGE)]}, 422, "class has more than 4096 characters"),
        ({"json": {"image": ["AA=="] * 65}}, 422, "at most 64 images"),
        ({"files": [("image", IMAGE), ("image", b"GIF89a")]}, 422, "image[1] is"),
    ],
)
def test_an_invalid_body_is_refused_with_a_reason(client, request_kwargs: dict, status: int, words: str) -> None:
    assert words in assert_problem(client.post("/score", **request_kwargs), status)["detail"]


@pytest.mark.parametrize(
    ("charset", "status", "words"),
    [
        ('"UTF-8"', 422, "image is missing"),
        ("us-ascii", 422, "image is missing"),
        ("punycode", 400, "The charset 'punycode' is not accepted"),  # takes quadratic time
        ("undefined", 400, "The charset 'undefined' is not accepted"),  # always raises
        ("latin-1", 400, "The charset 'latin-1' is not accepted"),
    ],
)
def test_the_text_of_a_form_is_utf_8(client, charset: str, status: int, words: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=a; charset={charset}"}
    content = b'--a\r\nContent-Disposition: form-data; name="class"\r\n\r\ncat\r\n--a--\r\n'
    body = assert_problem(client.post("/score", content=content, headers=headers), status)
    assert words in body["detail"]


def test_an_image_sent_as_a_form_gets_a_hint_and_is_not_repeated(client) -> None:
    """As `curl --data-binary` sends it by default."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (
        "Content-Type: image/png"
        in assert_problem(client.post("/score", content=to_png(noise), headers=headers), 415)["detail"]
    )
    response = client.post("/generate", content=to_png(noise)[:2000], headers=headers)
    assert response.status_code in (400, 422)
    assert len(response.content) < 1000


@pytest.mark.parametrize("image_count", [2, 3, 66])
def test_one_image_is_completed_at_a_time(client, image_count: int) -> None:
    body = assert_problem(client.post("/complete", files=[("image", IMAGE)] * image_count), 422)
    assert body["detail"] == "image: too many images were sent; this endpoint accepts one image."
    assert body["errors"][0]["field"] == "image"


def test_more_parameters_than_any_endpoint_has_are_refused(client) -> None:
    parameters = {f"a{i}": "1" for i in range(10_000)}
    requests = (
        ({"json": dict(list(parameters.items())[:500])}, "in the body"),
        ({"params": dict(list(parameters.items())[:40])}, "in the query"),
        ({"data": parameters}, "in the form"),
        ({"data": parameters, "files": [("image", IMAGE)]}, "in the form"),
    )
    for path in ("/generate", "/score"):
        for request, place in requests:
            if path == "/score" and request.keys() == {"data"}:
                continue
            response = client.post(path, **request)
            detail = f"There are more than 32 parameters {place}; send only those of this endpoint."
            body = assert_problem(response, 422)
            assert body["detail"] == detail
            assert body["errors"][0]["field"] == place.removeprefix("in the ")
            assert len(response.content) < 1000
        for body in (parameters, {"image": ["AA=="] * 2000}, {"n": [0] * 100_000}, [0] * 100_000):
            detail = "The body has more than 1000 values; send only the parameters of this endpoint."
            assert assert_problem(client.post(path, json=body), 422)["detail"] == detail


def test_problems_repeat_only_the_beginning_of_long_input(client) -> None:
    long = "x" * 100_000
    for response, status in (
        (client.post("/generate", headers={"accept": f"text/html, {long}"}), 406),
        (client.post("/generate", headers={"accept": "text/html," * 10_000}), 406),
        (client.post("/generate", headers={"content-encoding": long}), 415),
        (client.post("/score", content=b"x", headers={"content-type": long}), 415),
        (client.get(f"/{long[:60_000]}"), 404),
        (client.request("BREW" * 1000, "/score"), 405),
    ):
        assert_problem(response, status)
        assert len(response.content) < 1000


def test_an_upload_without_disk_space_is_503(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    body = assert_problem(client.post("/score", files=[("image", bytes(3 * 2**20))]), 503)
    assert body["detail"] == "There is no space for another upload; retry in a few seconds."
    assert body["type"] == "urn:ncml:problem:no-room"
    assert client.post("/score", files=[("image", IMAGE)]).status_code == 200


def test_generate_accepts_no_image(client) -> None:
    for image_count in (1, 2):
        body = assert_problem(client.post("/generate", files=[("image", IMAGE)] * image_count), 422)
        assert body["detail"] == "image: this endpoint accepts no image; omit it."
    assert_problem(client.post("/generate", content=IMAGE, headers={"content-type": "image/png"}), 422)
    assert_problem(client.post("/generate", json={"image": "AA=="}), 422)


@pytest.mark.parametrize("size", [(16000, 16000), (8000, 8000)])
def test_an_image_of_too_many_pixels_is_413(client, size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.new("1", size).save(out, "PNG")
    body = assert_problem(client.post("/score", files=[("image", out.getvalue())]), 413)
    assert body["errors"][0]["field"] == "image"
    assert "pixels" in body["detail"]


def test_a_file_of_too_many_bytes_is_413(new_client) -> None:
    client = new_client(max_image_bytes=2000)
    body = assert_problem(client.post("/score", files=[("image", IMAGE + bytes(2000))]), 413)
    assert "at most 2000" in body["errors"][0]["detail"]


def test_a_body_is_counted_before_and_while_it_arrives(new_client) -> None:
    client = new_client(max_body_bytes=4096)

    def without_length() -> Iterator[bytes]:
        yield from [bytes(1024)] * 5

    for path in ("/score", "/complete", "/generate", "/nowhere"):
        assert_problem(client.post(path, content=bytes(5000)), 413)
        assert_problem(client.post(path, files=[("image", bytes(5000))]), 413)
    for media in ("image/png", "application/json", "multipart/form-data; boundary=a"):
        assert_problem(client.post("/score", content=without_length(), headers={"content-type": media}), 413)


def test_the_space_for_uploads_holds_the_largest_body_of_one_client(new_client) -> None:
    with pytest.raises(ValidationError, match="at least 8192, twice NCML_MAX_BODY_BYTES"):
        new_client(max_body_bytes=4096, max_receiving_bytes=8191)
    client = new_client(max_body_bytes=4096, max_receiving_bytes=8192)
    assert_problem(client.post("/score", content=bytes(4096), headers={"content-type": "image/png"}), 422)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "about:blank"),
        ("GET", "/jobs/unknown", 404, "urn:ncml:problem:no-such-job"),
        ("GET", "/jobs/unknown/result", 404, "urn:ncml:problem:no-such-job"),
        ("POST", "/jobs/unknown/cancel", 404, "urn:ncml:problem:no-such-job"),
        ("GET", "/jobs/" + "x" * 65, 422, "urn:ncml:problem:invalid-input"),
        ("GET", "/jobs/..%2f..", 404, "about:blank"),
        ("GET", "/models/unknown", 404, "urn:ncml:problem:no-such-model"),
        ("GET", "/score", 405, "about:blank"),
        ("DELETE", "/generate", 405, "about:blank"),
        ("BREW", "/complete", 405, "about:blank"),
        ("GET", "/docs/assets/none.js", 404, "about:blank"),
        ("POST", "/docs/assets/swagger-ui.css", 405, "about:blank"),
        ("DELETE", "/studio/studio.css", 405, "about:blank"),
    ],
)
def test_an_unknown_path_or_method_is_a_problem(client, method: str, path: str, status: int, kind: str) -> None:
    assert assert_problem(client.request(method, path), status)["type"] == kind


def test_allow_names_every_method_of_a_path(client) -> None:
    assert client.options("/jobs/job-0").headers["allow"] == "DELETE, GET, HEAD"
    assert client.get("/score").headers["allow"] == "POST"
    assert client.head("/score").headers["allow"] == "POST"
    for path in ("/studio/any.js", "/docs/assets/any.js"):
        response = client.post(path)
        assert response.headers["allow"] == "GET, HEAD"
        assert response.json()["detail"] == f"{path} does not support POST; it supports GET, HEAD."


@pytest.mark.parametrize("event", ["99999999999999999999", "1-99999999999999999999", "1-", "x", "-1", "1" * 5000])
def test_an_invalid_event_id_is_refused(client, event: str) -> None:
    client.post("/generate")
    body = assert_problem(client.get("/jobs/job-0/events", headers={"last-event-id": event}), 422)
    assert body["errors"][0]["field"] == "Last-Event-ID"
    assert "it must be the id of an event that this service sent, such as 1767268800115-0." in body["detail"]


def test_accept_is_negotiated(client) -> None:
    for accept in ("text/html", "application/json;q=0", "application/zip"):
        body = assert_problem(client.post("/score", files=[("image", IMAGE)], headers={"accept": accept}), 406)
        assert "application/json or application/x-npz or image/png" in body["detail"]
    for accept, media in [
        ("*/*", "image/png"),
        ("", "image/png"),
        ("image/*", "image/png"),
        ("application/json", "application/json"),
        ("application/*", "application/json"),
        ("image/png;q=0.5, application/zip", "application/zip"),
        ("text/html, */*;q=0.1", "image/png"),
        ("*/*, image/png;q=0", "application/json"),
        ("garbage;;q=x,,image/png", "image/png"),
    ]:
        assert client.post("/generate", headers={"accept": accept}).headers["content-type"] == media, accept


def test_repeated_header_lines_form_one_list(client) -> None:
    client.post("/generate")
    lines = [
        ("accept", "text/html"),
        ("accept", "application/json"),
        ("prefer", "return=minimal"),
        ("prefer", "wait=3"),
    ]
    for method, path in (
        ("POST", "/generate"),
        ("POST", "/complete"),
        ("POST", "/score"),
        ("GET", "/jobs/job-0/result"),
    ):
        files = [("image", IMAGE)] if path in ("/complete", "/score") else None
        response = client.request(method, path, files=files, headers=lines)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == "application/json"
        assert response.headers["preference-applied"] == "wait=3"


def test_a_preference_that_cannot_be_used_is_ignored(client) -> None:
    for prefer in ("wait=soon", "wait=-1", "wait", "wait=1e3", "wait=\u0665", "return=minimal, foo", ',"', '"\\'):
        response = client.post("/generate", headers={"prefer": prefer.encode()})
        assert response.status_code == 200, prefer
        assert "preference-applied" not in response.headers
    for prefer, applied in (
        ("wait=5, wait=3", "wait=5"),
        ('foo="a, wait=1", wait=2', "wait=2"),
        ("wait=9999999999999999999999", "wait=30"),
        ("wait=5, respond-async", "respond-async, wait=5"),
        ("respond-async, wait=soon", "respond-async"),
    ):
        assert client.post("/generate", headers={"prefer": prefer}).headers["preference-applied"] == applied


def test_a_compressed_body_is_refused(client) -> None:
    for path, content in (("/score", gzip.compress(IMAGE)), ("/generate", gzip.compress(b'{"n": 2}'))):
        media = "image/png" if path == "/score" else "application/json"
        headers = {"content-type": media, "content-encoding": "gzip"}
        response = client.post(path, content=content, headers=headers)
        assert "send it without Content-Encoding" in assert_problem(response, 415)["detail"]
        assert response.headers["accept-encoding"] == "identity"
    headers = {"content-type": "image/png", "content-encoding": "identity"}
    assert client.post("/score", content=IMAGE, headers=headers).status_code == 200


def test_a_format_that_is_not_offered_is_refused(client) -> None:
    response = client.post("/score?format=zip", files=[("image", IMAGE)])
    assert assert_problem(response, 422)["detail"] == "format is 'zip'; it must be 'json', 'png' or 'npz'."
    assert_problem(client.post("/generate?format=gif"), 422)
    client.post("/score", files=[("image", IMAGE)])
    body = assert_problem(client.get("/jobs/job-0/result?format=zip"), 422)
    assert body["detail"] == "format is 'zip'; here it must be json or png or npz."


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"n": 1, "n": 2}', "n"),
        ('{"n": 1, "class": "cat", "\\u006e": 1}', "n"),
        ('{"n": true}', "n"),
        ('{"seed": false}', "seed"),
        ('{"noise": true}', "noise"),
        ('{"noise": 0, "solver": "heun"}', "solver"),
    ],
)
def test_ambiguous_json_is_refused(client, body: str, field: str) -> None:
    response = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert [error["field"] for error in assert_problem(response, 422)["errors"]] == [field]


def test_a_boolean_is_refused_where_a_number_or_text_is_expected(client) -> None:
    details = {
        "n": "n is true; it must be a number, not true or false.",
        "class": "class is true; it must be text.",
        "priority": "priority is true; it must be 'high', 'normal' or 'low'.",
    }
    for name, detail in details.items():
        assert assert_problem(client.post("/generate", json={name: True}), 422)["detail"] == detail
    response = client.post("/score", json={"image": base64.b64encode(IMAGE).decode(), "statistics": ["bpd", 1]})
    assert assert_problem(response, 422)["detail"] == "statistics: it must be text."


@pytest.mark.parametrize("key", ["", '""', '"', '"a', "a b", '"a"b', "x" * 256, "\u00e9"])
def test_an_invalid_idempotency_key_is_refused(client, key: str) -> None:
    body = assert_problem(client.post("/generate", headers={"idempotency-key": key.encode()}), 422)
    assert body["errors"][0]["field"] == "Idempotency-Key"


def test_a_long_text_field_is_named(client) -> None:
    for length in (5_000, 100_000):
        response = client.post("/score", data={"class": "c" * length}, files=[("image", IMAGE)])
        assert [error["field"] for error in assert_problem(response, 422)["errors"]] == ["class"]
        body = {"class": "c" * length, "image": base64.b64encode(IMAGE).decode()}
        assert assert_problem(client.post("/score", json=body), 422)["errors"][0]["field"] == "class"


def test_without_a_worker_the_response_is_an_immediate_503(client, jobs, worker, info) -> None:
    worker.appear_as(info.model_copy(update={"lanes": (Lane.GENERATE,)}))
    response = client.post("/score", files=[("image", IMAGE)])
    assert "score lane" in assert_problem(response, 503)["detail"]
    assert client.post("/generate").status_code == 200
    assert len(jobs) == 1


def test_while_no_model_is_loaded_the_response_is_a_503(client, worker) -> None:
    worker.serve()
    assert (
        assert_problem(client.get("/models/x"), 404)["detail"] == "model: 'x' is not available; no models are served."
    )
    response = client.post("/generate")
    assert "loading" in assert_problem(response, 503)["detail"]


def test_an_unknown_model_is_refused_for_good_only_by_workers_that_have_loaded_all_of_theirs(
    client, worker, info
) -> None:
    def responses():
        scored = client.post("/score?model=next", files=[("image", IMAGE)])
        return [scored, client.get("/models/next"), client.get("/models/next/pictures")]

    worker.appear_as(info, info.model_copy(update={"name": "w2", "has_all_models": False}))
    for response in responses():
        problem = assert_problem(response, 503)
        assert problem["type"] == "urn:ncml:problem:no-model"
        assert "No worker serves 'next' yet" in problem["detail"]
    assert client.post("/score?model=tiny", files=[("image", IMAGE)]).status_code == 200
    worker.appear_as(info)
    assert [response.status_code for response in responses()] == [422, 404, 404]


def test_without_the_queue_the_response_is_a_503(new_client) -> None:
    client = new_client(redis_url=f"redis://127.0.0.1:{free_port()}")
    for method, path in [("POST", "/generate"), ("GET", "/jobs/a"), ("GET", "/models"), ("GET", "/readyz")]:
        response = client.request(method, path)
        assert "queue is unreachable" in assert_problem(response, 503)["detail"]
        assert client.get("/healthz").status_code == 200
    assert "ncml_redis_up 0.0" in client.get("/metrics").text


def test_a_full_queue_is_429(new_client, worker, info) -> None:
    worker.pause()
    client = new_client(max_waiting=2)
    codes = [client.post("/generate", headers={"prefer": "respond-async"}).status_code for _ in range(2)]
    assert codes == [202, 202]
    for rate, seconds in ((0, RETRY_AFTER_S), (0.05, 20), (0.0001, 3600), (100, 1)):
        worker.appear_as(info.model_copy(update={"pace": {Lane.GENERATE: rate}}))
        response = client.post("/generate", headers={"prefer": "respond-async"})
        body = assert_problem(response, 429)
        assert "2 jobs are waiting" in body["detail"]
        assert body["type"] == "urn:ncml:problem:queue-full"
        assert response.headers["retry-after"] == str(seconds), "half of the queue is done by then"


def test_an_unexpected_error_is_a_500_that_does_not_reveal_its_cause(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(QueueMonitor, "models")
    body = assert_problem(client.get("/models"), 500)
    assert "QueueMonitor" not in str(body)


def test_a_request_id_is_accepted_or_generated(client) -> None:
    assert client.get("/healthz", headers={"x-request-id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    for invalid in ("", "a b", "x" * 129, "<script>"):
        generated = client.get("/healthz", headers={"x-request-id": invalid}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", generated)


def test_the_corpus_has_many_small_files() -> None:
    assert len(corpus()) >= 200
    assert max(map(len, corpus().values())) < 2**20


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "SGI", "DDS"])
def test_unneeded_decoders_are_disabled(client: TestClient, form: str) -> None:
    body = assert_problem(client.post("/score", files=[("image", corpus()[f"{form}-whole"])]), 422)
    assert "send a PNG, JPEG, WebP, BMP, TIFF or GIF file" in body["detail"]


@pytest.mark.parametrize("path", ["/score", "/score?tile=1", "/complete"])
def test_no_hostile_upload_is_answered_5xx(client: TestClient, path: str) -> None:
    refused = 0
    for i, (name, data) in enumerate(corpus().items()):
        requests = (
            {"files": [("image", (name, data, "image/png"))]},
            {"content": data, "headers": {"content-type": "image/png"}},
            {"json": {"image": base64.b64encode(data).decode()}},
        )
        response = client.post(path, **requests[(i + (path == "/score")) % 3])  # a different way for each path
        if response.status_code == 200:
            continue
        assert response.status_code in (413, 422), (name, response.text)
        body = assert_problem(response, response.status_code)
        assert body["errors"][0]["field"] in ("image", "keep"), name
        refused += 1
    assert refused > len(corpus()) / 2


def test_hostile_names_of_files_and_fields_are_harmless(client: TestClient) -> None:
    for name in ("../../etc/passwd", "a\0b", "x" * 5000, "\r\nX-Evil: 1", "<script>", "画像.png"):
        response = client.post("/score", files=[("image", (name, IMAGE, "image/png"))])
        assert response.status_code < 500
        assert "x-evil" not in response.headers
        assert client.post("/score", files=[(name, ("a.png", IMAGE, "image/png"))]).status_code in (400, 422)
        assert client.post("/generate", params={name: "1"}).status_code == 422
