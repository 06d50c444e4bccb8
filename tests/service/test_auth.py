"""API keys, owners of jobs, rate limits, host names and other origins."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from limits import WindowStats
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.testclient import TestClient

from ncml.images import to_png
from service.http.client_limits import address_name
from service.http.middleware import RequestLogFormatter
from service.keys import KeyFile, KeyFileError, digest
from service.keys import main as make_key
from tests.conftest import eventually
from worker.monitor import QueueMonitor

IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))
ANN, BOB = "ncml_ann-0123456789", "ncml_bob-0123456789"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# keys of the tests\nann:{digest(ANN)}\n\nbob:{digest(BOB)}\n")
    return path


@pytest.fixture
def guarded(new_client: Callable[..., TestClient], keys: Path) -> TestClient:
    return new_client(api_keys_file=keys)


# Keys


@pytest.mark.parametrize("headers", [bearer(ANN), {"x-api-key": ANN}, {"authorization": f"bearer {ANN}"}])
def test_a_valid_key_is_accepted(guarded: TestClient, queue, headers: dict[str, str]) -> None:
    assert guarded.post("/score", files=[("image", IMAGE)], headers=headers).status_code == 200
    assert guarded.get("/models", headers=headers).status_code == 200
    assert queue.view("job-0").owner == "ann"


def test_a_name_may_have_two_keys_while_one_replaces_the_other(guarded: TestClient, keys: Path) -> None:
    new = "ncml_ann-9876543210"
    keys.write_text(f"ann:{digest(ANN)}\nann:{digest(new)}\n")
    assert [guarded.get("/models", headers=bearer(key)).status_code for key in (ANN, new)] == [200, 200]
    keys.write_text(f"ann:{digest(new)}\n# the old key is removed\n")
    assert [guarded.get("/models", headers=bearer(key)).status_code for key in (ANN, new)] == [401, 200]


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("wrong"), bearer(digest(ANN)), {"x-api-key": ANN[:-1]}, {"authorization": f"Basic {ANN}"}],
)
def test_without_a_valid_key_everything_is_refused(guarded: TestClient, jobs, headers: dict[str, str]) -> None:
    for method, path in [
        ("POST", "/score"), ("POST", "/generate"), ("POST", "/complete"), ("POST", "/update"), ("GET", "/models"),
        ("GET", "/models/tiny"),
        ("GET", "/models/tiny/pictures"),
        ("GET", "/jobs/job-0"), ("GET", "/jobs/job-0/result"), ("GET", "/jobs/job-0/events"),
        ("GET", "/jobs/job-0/preview"), ("POST", "/jobs/job-0/cancel"), ("DELETE", "/jobs/job-0"),
    ]:  # fmt: skip
        response = guarded.request(method, path, headers=headers)
        assert response.status_code == 401, (method, path)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["type"] == "urn:ncml:problem:unauthorized"
    assert jobs == {}


def test_pages_and_operations_need_no_key(guarded: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/version", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path


def test_a_job_is_visible_to_its_own_key_only(guarded: TestClient, worker) -> None:
    worker.hold()
    guarded.post("/generate", headers=bearer(ANN) | {"prefer": "respond-async"})
    eventually(lambda: guarded.get("/jobs/job-0/preview", headers=bearer(ANN)).status_code == 200)
    for method, path in [
        ("GET", ""), ("GET", "/result"), ("GET", "/events"), ("GET", "/preview"), ("POST", "/cancel"), ("DELETE", ""),
    ]:  # fmt: skip
        response = guarded.request(method, f"/jobs/job-0{path}", headers=bearer(BOB))
        assert response.status_code == 404, path
        unknown = guarded.request(method, f"/jobs/job-9{path}", headers=bearer(BOB))
        # the response does not reveal that the job exists
        assert response.json() | {"request_id": ""} == unknown.json() | {"request_id": ""}
    assert guarded.get("/jobs/job-0", headers=bearer(ANN)).json()["status"] == "running"
    eventually(lambda: guarded.delete("/jobs/job-0", headers=bearer(ANN)).status_code == 204)


def test_the_log_names_the_owner_of_a_key_and_the_address_without_one(
    guarded: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="service"):
        guarded.get("/models", headers=bearer(ANN))
        guarded.get("/models", headers=bearer("ncml_unknown"))
    accepted, refused = (vars(record) for record in caplog.records if record.name == "service.access")
    assert (accepted["owner"], "client" in accepted) == ("ann", False)
    assert (refused["client"], "owner" in refused) == ("testclient", False)


def test_no_cache_keeps_the_response_to_a_key(guarded: TestClient, worker) -> None:
    job = guarded.post("/generate", headers={"x-api-key": ANN, "prefer": "respond-async"}).headers["x-job-id"]
    for path in (f"/jobs/{job}", f"/jobs/{job}/result", "/jobs/none"):
        assert guarded.get(path, headers={"x-api-key": ANN}).headers["cache-control"] == "no-store", path
    assert "private" in guarded.get("/models", headers={"x-api-key": ANN}).headers["cache-control"]
    for path in ("/", "/studio/app.js"):
        assert guarded.get(path).headers["cache-control"] == "no-cache", "a browser revalidates it"


def test_no_cache_keeps_the_response_to_a_client_without_a_key(client: TestClient) -> None:
    """Without keys, a proxy may decide who uses the service."""
    assert client.post("/generate", headers={"accept": "image/png"}).headers["cache-control"] == "no-store"


def test_idempotency_keys_are_separate_by_owner(guarded: TestClient, jobs) -> None:
    ids = [
        guarded.post(f"/generate?n={n}", headers=bearer(key) | {"idempotency-key": "order-1"}).headers["x-job-id"]
        for key, n in ((ANN, 1), (ANN, 1), (BOB, 2))
    ]
    assert ids[0] == ids[1] != ids[2]
    assert len(jobs) == 2


def test_keys_are_reloaded_when_their_file_changes(
    guarded: TestClient, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys.write_text(f"bob:{digest(BOB)}\n")
    assert guarded.get("/models", headers=bearer(ANN)).status_code == 401
    assert guarded.get("/models", headers=bearer(BOB)).status_code == 200
    keys.write_text("half a li")
    assert guarded.get("/models", headers=bearer(BOB)).status_code == 200
    assert "the former API keys stay valid, removed ones too: line 1 of " in caplog.text


def test_a_file_of_keys_that_could_not_be_read_is_read_as_soon_as_it_can_be(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its owner may have been wrong at first: without a further change, a revoked key is no longer valid."""

    def deny(_: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    key_file = KeyFile(keys)
    keys.write_text(f"bob:{digest(BOB)}\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", deny)
        assert [key_file.owner(key) for key in (ANN, ANN)] == ["ann", "ann"]
    assert [key_file.owner(key) for key in (ANN, BOB)] == [None, "bob"]
    assert [record.getMessage() for record in caplog.records if record.name == "service.keys"] == [
        f"the former API keys stay valid, removed ones too: {keys} cannot be read: "
        f"Permission denied for user {os.geteuid()}"
    ]


@pytest.mark.parametrize("new_text", ["", "# nobody\n", None])
def test_the_last_key_can_be_removed(
    guarded: TestClient, keys: Path, caplog: pytest.LogCaptureFixture, new_text: str | None
) -> None:
    text = keys.read_text()
    if new_text is None:
        keys.unlink()
    else:
        keys.write_text(new_text)
    for key in (ANN, BOB, ANN):
        assert guarded.get("/models", headers=bearer(key)).status_code == 401
    messages = [record.getMessage() for record in caplog.records if record.name == "service.keys"]
    assert messages == [f"no API key is valid: {keys} {'does not exist' if new_text is None else 'contains none'}"]
    new = keys.with_name("new")
    new.write_text(text)
    new.replace(keys)  # as editors do
    assert guarded.get("/models", headers=bearer(ANN)).status_code == 200


def test_a_key_is_shown_once_and_stored_as_a_digest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, new_client: Callable[..., TestClient]
) -> None:
    make_key("carol")
    out, err = capsys.readouterr()
    key = err.split()[-1]
    assert re.fullmatch(r"ncml_[A-Za-z0-9_-]{43}", key)
    assert key not in out
    (tmp_path / "keys").write_text(out)
    client = new_client(api_keys_file=tmp_path / "keys")
    assert client.get("/models", headers=bearer(key)).status_code == 200
    with pytest.raises(KeyFileError, match="'a:b' is invalid: use"):
        make_key("a:b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no key"),
        ("# nothing\n", "contains no key"),
        ("ann:ncml_secret", "line 1 of"),
        ("a b:" + "0" * 64, "name:digest"),
        (None, "cannot be read: No such file"),
    ],
)
def test_an_invalid_key_file_is_refused_with_a_reason(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KeyFileError, match=words) as caught:
        KeyFile(path)
    assert "secret" not in str(caught.value)


def test_neither_keys_nor_images_are_logged(guarded: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (ANN, "ncml_wrong-key"):
            guarded.post(f"/score?model={'x' * 30}", content=b"secret pixels", headers=bearer(key))
    lines = [record for record in caplog.records if record.name == "service.access"]
    assert [getattr(line, "owner", None) for line in lines] == ["ann", None]
    records = [record for record in caplog.records if not record.name.startswith("httpx")]
    log = "\n".join(map(RequestLogFormatter().format, records))
    assert "POST /score 401" in log
    assert not any(word in log for word in (ANN, "wrong-key", "secret pixels", "xxx", digest(ANN)))


def test_the_openapi_document_requires_keys_where_the_service_does(guarded: TestClient, client: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    assert document["paths"]["/score"]["post"]["security"] == [{"bearer": []}, {"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "security" not in client.get("/openapi.json").json()["paths"]["/score"]["post"]


# Rate limits


def test_a_quota_is_counted_reported_and_enforced(new_client: Callable[..., TestClient], valkey_url: str) -> None:
    client = new_client(redis_url=valkey_url, rate_limit="100/day; 3/minute")
    for remaining in (2, 1, 0):
        query = "?n=0" if remaining == 1 else ""  # a refused request counts, too
        response = client.post(f"/generate{query}")
        assert response.headers["ratelimit-policy"] == '"minute";q=3;w=60, "day";q=100;w=86400'
        minute, day = response.headers["ratelimit"].split(", ")
        assert re.fullmatch(rf'"minute";r={remaining};t=\d+', minute)
        assert re.fullmatch(rf'"day";r={97 + remaining};t=\d+', day)
    refused = client.post("/score", files=[("image", IMAGE)])
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:ncml:problem:quota-exceeded"
    assert "The quota of 3 requests per minute is exhausted" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert '"minute";r=0' in refused.headers["ratelimit"]
    assert client.get("/models").status_code == 200  # reading does not count
    assert "ratelimit" not in client.get("/models").headers


@pytest.mark.parametrize("delay_s", [0, 5])
def test_a_window_that_has_just_begun_lasts_its_whole_length(
    new_client: Callable[..., TestClient], valkey_url: str, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    client = new_client(redis_url=valkey_url, rate_limit="1/minute")
    limiter = SlidingWindowCounterRateLimiter
    monkeypatch.setattr(limiter, "get_window_stats", lambda *_: WindowStats(time.time() - delay_s, 0))
    assert client.post("/generate").headers["ratelimit"] == '"minute";r=0;t=60'
    assert client.post("/generate").headers["retry-after"] == "60"


def test_a_quota_is_per_owner_and_shared_by_instances(
    new_client: Callable[..., TestClient], valkey_url: str, keys: Path
) -> None:
    first, second = (new_client(redis_url=valkey_url, rate_limit="2/hour", api_keys_file=keys) for _ in range(2))
    codes = [client.post("/generate", headers=bearer(ANN)).status_code for client in (first, second, first)]
    assert codes == [200, 200, 429]
    assert second.post("/generate", headers=bearer(BOB)).status_code == 200
    assert first.post("/generate").status_code == 401  # before it is counted


# Other origins


def test_pages_of_other_origins_need_a_setting(new_client: Callable[..., TestClient]) -> None:
    origin = {"origin": "https://example.org"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    closed, opened = new_client(), new_client(cors_origins=["https://example.org"])
    assert "access-control-allow-origin" not in closed.get("/healthz", headers=origin).headers
    assert closed.options("/score", headers=preflight).status_code == 403
    response = opened.get("/jobs/none", headers=origin)
    assert response.headers["access-control-allow-origin"] == "https://example.org"
    assert "Retry-After" in response.headers["access-control-expose-headers"]
    assert opened.options("/score", headers=preflight).status_code == 200
    unlisted = {"origin": "https://example.com"}
    assert "access-control-allow-origin" not in opened.get("/healthz", headers=unlisted).headers


def test_errors_can_be_read_by_pages_of_other_origins(
    new_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = new_client(cors_origins=["https://example.org"], max_body_bytes=4096)
    monkeypatch.delattr(QueueMonitor, "models")
    headers = {"origin": "https://example.org", "x-request-id": "r-1"}
    for response, status in (
        (client.post("/score", content=bytes(5000), headers=headers), 413),
        (client.get("/models", headers=headers), 500),
        (client.options("/score", headers=headers | {"access-control-request-method": "POST"}), 200),
    ):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        assert response.headers["x-request-id"] == "r-1"
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000", "images.org", "a.b.test:1"],
)
def test_allowed_hosts_are_served(new_client: Callable[..., TestClient], host: str) -> None:
    client = new_client(allowed_hosts=["localhost", "127.0.0.1", "[::1]", "images.org", "*.b.test"])
    assert client.get("/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:80", "", "[::2]", "x@localhost"]
)
def test_a_host_name_that_is_not_allowed_is_refused(client: TestClient, jobs, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/models"), ("POST", "/generate"), ("GET", "/docs")):
        response = client.request(method, path, headers={"host": host})
        assert response.status_code == 421, path
        assert response.json()["type"] == "urn:ncml:problem:unknown-host"
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path, headers={"host": host}).status_code == 200, path
    assert jobs == {}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://localhost:3000"}, 403),  # another program of this machine
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://localhost:3000"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "origin": "null"}, 403),  # a form
        ({"sec-fetch-site": "cross-site", "origin": "https://friend.example"}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "https://localhost"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "https://localhost"}, 200),  # a proxy that ends TLS
        ({}, 200),
    ],
)
def test_pages_of_other_sites_cannot_submit_jobs(
    new_client: Callable[..., TestClient], jobs, headers: dict[str, str], status: int
) -> None:
    client = new_client(cors_origins=["https://friend.example"])
    response = client.post("/generate", headers=headers)
    assert response.status_code == status
    assert len(jobs) == (status == 200)
    if status == 403:
        assert response.json()["type"] == "urn:ncml:problem:cross-site"


def test_links_of_other_sites_open_the_pages(client: TestClient) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    embedded = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/jobs/job-0/preview", headers=embedded).status_code == 403


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.7", "address:192.0.2.7"),
        ("2001:db8:1:2:3::4", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "address:2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "address:192.0.2.7"),
        ("testclient", "address:testclient"),
        ("", "address:"),
    ],
)
def test_an_ipv6_client_counts_with_its_network(host: str, name: str) -> None:
    assert address_name(host) == name


def test_high_priority_can_be_reserved(new_client: Callable[..., TestClient], jobs, keys: Path) -> None:
    client = new_client(api_keys_file=keys, high_priority_keys=["ann"])
    assert client.post("/generate?priority=high", headers=bearer(ANN)).status_code == 200
    refused = client.post("/generate?priority=high", headers=bearer(BOB))
    assert refused.status_code == 403
    assert refused.json()["type"] == "urn:ncml:problem:priority"
    assert refused.json()["errors"][0]["field"] == "priority"
    assert client.post("/generate?priority=low", headers=bearer(BOB)).status_code == 200
    assert len(jobs) == 2
