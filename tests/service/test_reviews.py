"""/models/{name}/reviews: only an image that was judged for a key is reviewed with it, within limits and for a time."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from ncml.images import open_image, to_png
from service.keys import digest
from worker.redis_keys import REVIEWS, review_key
from worker.review_store import NoRoomForReview, Review

ANN, BOB = "ncml_ann-0123456789", "ncml_bob-0123456789"
REVIEWS_PATH = "/models/tiny/reviews"


def flat(level: int, side: int = 40) -> bytes:
    return to_png(np.full((side, side, 3), level, np.uint8))


FLAGGED, PASSED = flat(200), flat(50)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def score(client: TestClient, *images: bytes, **options: Any) -> str:
    """Return the id of the job that judged the images."""
    response = client.post(
        "/score", files=[("image", (f"{i}.png", image)) for i, image in enumerate(images)], **options
    )
    assert response.status_code == 200, response.text
    return response.headers["x-job-id"]


def review(client: TestClient, image: bytes, job: str, verdict: str = "good", **options: Any) -> Any:
    data = {"job": job, "verdict": verdict}
    return client.post(REVIEWS_PATH, data=data, files=[("image", ("part.png", image))], **options)


@pytest.fixture
def client(new_client: Callable[..., TestClient], detector: Any) -> TestClient:
    return new_client()


@pytest.fixture
def guarded(new_client: Callable[..., TestClient], detector: Any, tmp_path: Path) -> TestClient:
    (tmp_path / "keys").write_text(f"ann:{digest(ANN)}\nbob:{digest(BOB)}\n")
    return new_client(api_keys_file=tmp_path / "keys")


def test_a_judged_image_is_reviewed_listed_and_deleted(client: TestClient, queue: Any) -> None:
    job = score(client, PASSED, FLAGGED)
    kept = review(client, FLAGGED, job)
    assert kept.status_code == 201, kept.text
    answer = kept.json()
    assert {name: answer[name] for name in ("model", "verdict", "file", "is_ood", "p_value", "size")} == {
        "model": "tiny", "verdict": "good", "file": "part.png", "is_ood": True, "p_value": 0.5, "size": len(FLAGGED)
    }  # fmt: skip
    assert review(client, PASSED, job, "defective").json()["is_ood"] is False
    listed = client.get(REVIEWS_PATH).json()["reviews"]
    assert [entry["verdict"] for entry in listed] == ["good", "defective"]
    assert listed[0] == answer
    assert client.get("/models/other/reviews").json() == {"reviews": []}
    assert queue.reviews.image("", answer["id"]) == FLAGGED
    path = f"{REVIEWS_PATH}/{answer['id']}"
    assert client.delete(path.replace("tiny", "other")).status_code == 404
    assert client.delete(path).status_code == 204
    again = client.delete(path)
    assert (again.status_code, again.json()["type"]) == (404, "urn:ncml:problem:no-such-review")
    assert len(client.get(REVIEWS_PATH).json()["reviews"]) == 1
    assert queue.redis.zcard(REVIEWS) == 1
    assert queue.reviews.image("", answer["id"]) is None


def test_a_reviewed_image_has_a_thumbnail(client: TestClient, queue: Any) -> None:
    rng = np.random.default_rng(0)
    large = to_png(np.kron(rng.integers(190, 255, (10, 20, 3), np.uint8), np.ones((20, 20, 1), np.uint8)))
    kept = review(client, large, score(client, large)).json()
    response = client.get(f"{REVIEWS_PATH}/{kept['id']}/thumbnail")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
    assert response.headers["cache-control"] == "no-store", "its deletion must leave no copy"
    thumbnail, original = open_image(response.content), open_image(large)
    assert thumbnail.shape == (64, 128, 3)
    assert abs(thumbnail.mean((0, 1)) - original.mean((0, 1))).max() < 2
    [member] = queue.redis.zrange(REVIEWS, 0, -1)
    assert member.decode() == f":{kept['id']}:{len(large) + len(response.content)}"  # what it counts
    assert client.get(f"/models/other/reviews/{kept['id']}/thumbnail").status_code == 404
    client.delete(f"{REVIEWS_PATH}/{kept['id']}")
    missing = client.get(f"{REVIEWS_PATH}/{kept['id']}/thumbnail")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:ncml:problem:no-such-review")


def test_a_later_review_of_an_image_replaces_the_earlier_one(client: TestClient) -> None:
    job = score(client, FLAGGED)
    first, second = review(client, FLAGGED, job).json(), review(client, FLAGGED, job, "defective").json()
    assert first["id"] == second["id"]
    assert [entry["verdict"] for entry in client.get(REVIEWS_PATH).json()["reviews"]] == ["defective"]


def keep(queue: Any, thumbnail: int, owner_bytes: int = 12_000, keep_s: float = 100) -> Review:
    """Keep a review of one image of ann, with a thumbnail of this many bytes."""
    return queue.reviews.add(
        "ann", "tiny", "good", bytes(6000), thumbnail=bytes(thumbnail), file="part.png", is_ood=True, p_value=0.5,
        keep_s=keep_s, owner_bytes=owner_bytes, all_bytes=12_000,
    )  # fmt: skip


def counted(queue: Any) -> list[int]:
    """Return the bytes that each review counts."""
    return [int(member.rpartition(b":")[2]) for member in queue.redis.zrange(REVIEWS, 0, -1)]


def test_a_review_that_counts_other_bytes_replaces_the_earlier_one(queue: Any) -> None:
    """Another version may make another thumbnail of the same image."""
    keep(queue, 10)
    keep(queue, 20)
    assert counted(queue) == [6020]
    keep(queue, 0, owner_bytes=5000)  # it counts less than before
    assert counted(queue) == [6000]
    with pytest.raises(NoRoomForReview):
        keep(queue, 10, owner_bytes=6005)
    assert counted(queue) == [6000]
    assert len(queue.reviews.find("ann", "tiny")) == 1


def test_a_review_is_returned_even_if_it_is_gone_already(queue: Any) -> None:
    kept = keep(queue, 0)
    assert queue.reviews.find("ann", "tiny") == [kept]
    assert keep(queue, 0, keep_s=0).id == kept.id
    assert queue.reviews.find("ann", "tiny") == []


def test_reviews_expire_by_the_clock_of_the_server(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(queue, 0)
    monkeypatch.setattr(time, "time", lambda: kept.expires_at + 1)
    assert queue.reviews.find("ann", "tiny") == [kept]


def test_no_bytes_stay_counted_if_a_review_is_sent_again_while_it_is_deleted(
    queue: Any, new_queue: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, sizes = new_queue(), itertools.count(10)
    kept = keep(other, next(sizes))
    execute = queue.redis.execute_command

    def execute_and_keep(*command: Any, **options: Any) -> Any:
        answer = execute(*command, **options)
        keep(other, next(sizes))
        return answer

    monkeypatch.setattr(queue.redis, "execute_command", execute_and_keep)
    assert queue.reviews.remove("ann", "tiny", kept.id)
    assert len(counted(other)) == len(other.reviews.find("ann", "tiny"))


def test_an_image_that_the_model_never_judged_is_refused(client: TestClient, worker: Any) -> None:
    job = score(client, FLAGGED)
    other = review(client, flat(201), job)
    assert other.status_code == 422
    assert other.json()["detail"] == (
        "image: tiny did not judge this file as a detector in the job; score it first, and send it again."
    )
    undetected = score(client, FLAGGED, params={"ood": 0})
    assert "did not judge" in review(client, FLAGGED, undetected).json()["detail"]
    of_another_model = client.post(
        "/models/other/reviews", data={"job": job, "verdict": "good"}, files=[("image", FLAGGED)]
    )
    assert "image: other did not judge" in of_another_model.json()["detail"]
    unknown = review(client, FLAGGED, "job-99")
    assert (unknown.status_code, unknown.json()["type"]) == (404, "urn:ncml:problem:no-such-job")
    assert "score the image again" in unknown.json()["detail"]
    worker.pause()
    waiting = client.post("/score", files=[("image", flat(202))], headers={"prefer": "respond-async"})
    early = review(client, flat(202), waiting.json()["id"])
    assert early.status_code == 422
    assert "has not succeeded, so there is no verdict to review" in early.json()["detail"]
    assert client.get(REVIEWS_PATH).json() == {"reviews": []}


def test_only_a_flagged_image_is_reviewed_as_good(client: TestClient) -> None:
    refused = review(client, PASSED, score(client, PASSED))
    assert refused.status_code == 422
    detail = "verdict: tiny did not flag this image; only flagged images can be reviewed as good."
    assert refused.json()["detail"] == detail


@pytest.mark.parametrize("fields", [{"job": "job-0"}, {"verdict": "good"}, {"job": "job-0", "verdict": "bad"}])
def test_job_and_verdict_are_required(client: TestClient, fields: dict[str, str]) -> None:
    score(client, FLAGGED)
    response = client.post(REVIEWS_PATH, data=fields, files=[("image", FLAGGED)])
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == ("verdict" if "job" in fields else "job")


def test_reviews_belong_to_the_key_that_sent_them(guarded: TestClient) -> None:
    job = score(guarded, FLAGGED, headers=bearer(ANN))
    foreign = review(guarded, FLAGGED, job, headers=bearer(BOB))
    unknown = review(guarded, FLAGGED, "job-99", headers=bearer(BOB))
    assert foreign.status_code == 404
    assert foreign.json() | {"request_id": ""} == unknown.json() | {"request_id": ""}
    kept = review(guarded, FLAGGED, job, headers=bearer(ANN)).json()
    assert guarded.get(REVIEWS_PATH, headers=bearer(BOB)).json() == {"reviews": []}
    assert guarded.delete(f"{REVIEWS_PATH}/{kept['id']}", headers=bearer(BOB)).status_code == 404
    thumbnail = f"/{kept['id']}/thumbnail"
    assert guarded.get(REVIEWS_PATH + thumbnail, headers=bearer(BOB)).status_code == 404
    assert guarded.get(REVIEWS_PATH + thumbnail, headers=bearer(ANN)).status_code == 200
    assert guarded.get(REVIEWS_PATH, headers=bearer(ANN)).json() == {"reviews": [kept]}
    for method, path in [("GET", ""), ("POST", ""), ("GET", thumbnail), ("DELETE", f"/{kept['id']}")]:
        assert guarded.request(method, REVIEWS_PATH + path).status_code == 401


def test_an_invalid_review_id_is_refused(client: TestClient) -> None:
    detail = client.delete(f"{REVIEWS_PATH}/5F0C").json()["detail"]
    assert detail == "review_id is '5F0C'; it must have 16 hexadecimal digits, as in the list of reviews."


def test_reviews_of_other_sites_are_refused(client: TestClient) -> None:
    job = score(client, FLAGGED)
    refused = review(client, FLAGGED, job, headers={"origin": "https://evil.example", "sec-fetch-site": "cross-site"})
    assert (refused.status_code, refused.json()["type"]) == (403, "urn:ncml:problem:cross-site")


def test_one_key_may_use_a_quarter_of_the_room(
    new_client: Callable[..., TestClient], detector: Any, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"ann:{digest(ANN)}\nbob:{digest(BOB)}\n")
    client = new_client(api_keys_file=tmp_path / "keys", max_review_bytes=2**16)
    images = [flat(200 + i) for i in range(5)]  # each counts 4096 bytes
    jobs = [score(client, image, headers=bearer(ANN)) for image in images]
    kept = [review(client, image, job, headers=bearer(ANN)) for image, job in zip(images[:4], jobs, strict=False)]
    assert [response.status_code for response in kept] == [201] * 4
    refused = review(client, images[4], jobs[4], headers=bearer(ANN))
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:ncml:problem:too-many-reviews")
    assert refused.json()["detail"] == (
        "Your reviews and thumbnails would take more than 16384 bytes; delete some reviews."
    )
    assert "retry-after" in refused.headers
    assert review(client, images[0], jobs[0], "defective", headers=bearer(ANN)).status_code == 201  # it is replaced
    assert review(client, images[0], score(client, images[0], headers=bearer(BOB)), headers=bearer(BOB)).is_success
    client.delete(f"{REVIEWS_PATH}/{kept[0].json()['id']}", headers=bearer(ANN))
    assert review(client, images[4], jobs[4], headers=bearer(ANN)).status_code == 201


def test_all_keys_together_have_a_limit(client: TestClient, queue: Any) -> None:
    queue.redis.zadd(REVIEWS, {f"bob:{'0' * 16}:{64 * 2**20 - 4000}": time.time() + 100})
    refused = review(client, FLAGGED, score(client, FLAGGED))
    assert (refused.status_code, refused.json()["detail"]) == (
        429, "The reviews of all clients use all the space for reviews; retry later."
    )  # fmt: skip
    queue.redis.zadd(REVIEWS, {f"bob:{'0' * 16}:{64 * 2**20 - 4000}": time.time() - 1})  # it has expired
    assert review(client, FLAGGED, score(client, FLAGGED)).status_code == 201


def test_reviews_leave_the_last_quarter_of_the_memory_to_jobs(
    client: TestClient, queue: Any, configure: Callable[..., None]
) -> None:
    job = score(client, FLAGGED)
    configure(maxmemory=int(queue.redis.info("memory")["used_memory"] * 1.3))
    refused = review(client, FLAGGED, job)
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:ncml:problem:queue-full")
    assert refused.json()["detail"] == "The queue is short of memory until earlier results expire; retry in 60 s."
    assert refused.headers["retry-after"] == "60"


def test_a_review_expires(new_client: Callable[..., TestClient], detector: Any, queue: Any) -> None:
    client = new_client(review_days=2 / 86_400)
    kept = review(client, FLAGGED, score(client, FLAGGED)).json()
    assert 0 < queue.redis.pttl(review_key("", kept["id"])) <= 2000
    deadline = time.monotonic() + 20
    while client.get(REVIEWS_PATH).json()["reviews"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert queue.reviews.image("", kept["id"]) is None
