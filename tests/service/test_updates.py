"""POST /update: the reviews of a key become a job that makes a new version of a detector."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.keys import digest
from tests.service.outcomes import DETECTOR, MODEL
from tests.service.test_reviews import ANN, BOB, FLAGGED, PASSED, bearer, flat, review, score
from worker.contract import UpdateJob


@pytest.fixture(autouse=True)
def keeping(worker: Any) -> None:
    """The model `tiny` is a detector that keeps its images."""
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR.model_copy(update={"keeps_images": True})}))


@pytest.fixture
def client(new_client: Callable[..., TestClient]) -> TestClient:
    return new_client(allow_calibration=True)


def update(client: TestClient, name: str = "tiny-2", **options: Any) -> Any:
    return client.post("/update", params={"model": "tiny", "name": name}, **options)


def test_reviews_become_a_job_and_its_result_says_what_became_of_them(client: TestClient, jobs: Any) -> None:
    job = score(client, FLAGGED, PASSED)
    first = review(client, FLAGGED, job).json()
    second = review(client, PASSED, job, "defective").json()
    response = update(client)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"]["name"] == "tiny-2"
    assert answer["calibration"]["reviews"] == {
        "good": 1, "still_flagged": 0, "defective": 1, "found": 1, "added": 1, "found_added": 1, "found_before": 0
    }  # fmt: skip
    submitted = jobs[answer["id"]]
    assert isinstance(submitted, UpdateJob)
    assert (submitted.model, submitted.name) == ("tiny", "tiny-2")
    assert [(image.name, image.file) for image in submitted.reviewed] == [(f"{first['id']}-part.png", FLAGGED)]
    assert [(image.name, image.file) for image in submitted.defective] == [(f"{second['id']}-part.png", PASSED)]
    assert client.get(f"/jobs/{answer['id']}").json()["task"] == "update"
    assert client.get(f"/jobs/{answer['id']}/result").json() == answer
    assert len(client.get("/models/tiny/reviews").json()["reviews"]) == 2  # they are kept


def test_defective_images_suffice_for_an_update(client: TestClient, jobs: Any) -> None:
    review(client, PASSED, score(client, PASSED), "defective")
    submitted = jobs[update(client).json()["id"]]
    assert (submitted.reviewed, [image.file for image in submitted.defective]) == ((), [PASSED])


def test_names_of_files_are_safe(client: TestClient, jobs: Any) -> None:
    job = score(client, FLAGGED)
    data = {"job": job, "verdict": "good"}
    client.post("/models/tiny/reviews", data=data, files=[("image", ("../ä b/" + "x" * 74 + ".png", FLAGGED))])
    submitted = jobs[update(client).json()["id"]]
    [image] = submitted.reviewed
    assert image.name.endswith("b_" + "x" * 74 + ".png")
    assert len(image.name) <= 100
    assert image.scene_name == "../ä b/" + "x" * 74 + ".png"


def test_only_reviews_of_the_same_key_are_used(
    new_client: Callable[..., TestClient], tmp_path: Path, jobs: Any
) -> None:
    (tmp_path / "keys").write_text(f"ann:{digest(ANN)}\nbob:{digest(BOB)}\n")
    client = new_client(allow_calibration=True, api_keys_file=tmp_path / "keys")
    review(client, FLAGGED, score(client, FLAGGED, headers=bearer(ANN)), headers=bearer(ANN))
    refused = update(client, headers=bearer(BOB))
    assert refused.status_code == 422
    assert refused.json()["detail"] == (
        "model: this key has no reviews for tiny; score images with it and review them first."
    )
    review(client, flat(210), score(client, flat(210), headers=bearer(BOB)), headers=bearer(BOB))
    submitted = jobs[update(client, headers=bearer(BOB)).json()["id"]]
    assert [image.file for image in submitted.reviewed] == [flat(210)]
    assert update(client).status_code == 401


def test_reviews_are_read_for_one_request_at_a_time_and_others_do_not_wait(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    review(client, FLAGGED, score(client, FLAGGED))
    service = client.app.state.jobs
    find, submit, reads = service.queue.reviews.find, service.queue.submit, []
    submitting, resume = threading.Event(), threading.Event()

    def submit_late(*args: Any, **options: Any) -> str:
        submitting.set()
        assert resume.wait(60)
        return submit(*args, **options)

    monkeypatch.setattr(service.queue.reviews, "find", lambda *args: reads.append(args) or find(*args))
    monkeypatch.setattr(service.queue, "submit", submit_late)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(update, client, "tiny-2")
        assert submitting.wait(60)
        try:
            refused = update(client, "tiny-3")
        finally:
            resume.set()
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:ncml:problem:no-room")
    assert int(refused.headers["retry-after"]) > 0
    assert (first.result().status_code, len(reads)) == (200, 1)
    assert update(client, "tiny-3").status_code == 200


def test_updates_need_permission_a_detector_with_images_and_a_new_name(
    client: TestClient, new_client: Callable[..., TestClient], worker: Any, detector: Any
) -> None:
    off = update(new_client())
    assert (off.status_code, off.json()["type"]) == (403, "urn:ncml:problem:calibration-off")
    assert "ncml adapt FOLDER --update NAME" in off.json()["detail"]
    old = update(client)  # the fixture serves a detector without images
    assert old.json()["detail"] == (
        "model: tiny keeps no good images; name one that was made with ncml adapt --keep-images."
    )
    worker.serve(MODEL)
    assert "model: tiny is not a detector" in update(client).json()["detail"]
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR.model_copy(update={"keeps_images": True})}))
    review(client, FLAGGED, score(client, FLAGGED))
    assert "a model 'tiny' already exists" in update(client, "tiny").json()["detail"]
    assert update(client, "../x").json()["errors"][0]["field"] == "name"
    assert client.post("/update?model=tiny").json()["errors"][0]["field"] == "name"
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    assert update(client, headers=foreign).json()["type"] == "urn:ncml:problem:cross-site"
