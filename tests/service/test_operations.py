"""Metrics, logs, headers, the OpenAPI document, settings, and imports."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import jsonschema
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.types import Message

from ncml.images import to_png
from ncml.options import OPTIONS
from service.answers import CalibrateAnswer, ImagesAnswer, JobAnswer, JobEnded, ScanAnswer, ScoreAnswer
from service.app import from_environment
from service.http.middleware import RequestLogFormatter, request_id
from service.http.protocol import MAX_HEAD_BYTES
from service.jobs import MAX_UNDELIVERED
from service.preparation import MAX_PREPARATIONS
from service.routes.models import Models, ServedModel
from service.service_metrics import Metrics
from service.settings import Settings, read_settings
from tests.conftest import Valkey, eventually, free_port
from tests.service.outcomes import DETECTOR, MODEL
from worker.contract import GenerateJob, JobStatus, Lane, Priority, ScanJob
from worker.job_results import EXPIRED
from worker.monitor import QueueMonitor
from worker.queue import JobQueue
from worker.redis_keys import job_key

ROOT = Path(__file__).resolve().parents[2]
IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))


def metrics(client: TestClient) -> dict[tuple[str, ...], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_late_jobs_that_nobody_follows_take_no_places_in_the_queue(
    new_client: Callable[..., TestClient], queue: JobQueue, worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends them, too, but not before it has ended its batch."""
    monkeypatch.setattr("service.jobs.EXPIRE_S", 0.02)
    worker.pause()
    client = new_client(start_within_s=0.1, max_waiting=1)
    for _ in range(2):
        assert client.post("/generate", headers={"Prefer": "respond-async"}).status_code == 202
        eventually(lambda: queue.monitor.depth(Lane.GENERATE) == 0)
    assert metrics(client)["ncml_jobs_finished_total", "tiny", "expired", "generate"] == 2


def test_requests_and_jobs_are_counted(client: TestClient, worker) -> None:
    client.post("/score", files=[("image", IMAGE)])
    client.post("/score?priority=high", files=[("image", IMAGE)])
    client.post("/score", files=[("image", b"x")])
    client.get("/jobs/job-0")
    client.get("/jobs/unknown")
    client.get("/nowhere")
    client.request("BREW", "/nowhere")
    for path in ("/studio/app.js", "/studio/nothing.js", "/openapi.json"):
        client.get(path)
    worker.appear_as()
    client.post("/generate")
    samples = metrics(client)
    assert samples["ncml_http_requests_total", "200", "POST", "/score"] == 2
    assert samples["ncml_http_requests_total", "422", "POST", "/score"] == 1
    assert samples["ncml_http_requests_total", "200", "GET", "/jobs/{job_id}"] == 1
    assert samples["ncml_http_requests_total", "404", "GET", "/jobs/{job_id}"] == 1
    assert samples["ncml_http_requests_total", "404", "GET", "unmatched"] == 1
    assert samples["ncml_http_requests_total", "404", "OTHER", "unmatched"] == 1
    assert samples["ncml_http_requests_total", "200", "GET", "/studio"] == 1
    assert samples["ncml_http_requests_total", "404", "GET", "/studio"] == 1
    assert samples["ncml_http_requests_total", "200", "GET", "/openapi.json"] == 1
    assert samples["ncml_http_request_duration_seconds_count", "200", "/score"] == 2
    assert samples["ncml_http_request_duration_seconds_count", "422", "/score"] == 1
    assert samples["ncml_jobs_enqueued_total", "tiny", "normal", "score"] == 1
    assert samples["ncml_jobs_enqueued_total", "tiny", "high", "score"] == 1
    assert samples["ncml_jobs_rejected_total", "no-worker"] == 1


def test_requests_refused_for_lack_of_memory_have_their_own_reason(client: TestClient, queue, configure) -> None:
    configure(maxmemory=queue.monitor.memory()[0] * 5 // 4)  # four fifths of it are used
    response = client.post("/generate")
    assert response.status_code == 429
    assert response.json()["type"] == "urn:ncml:problem:queue-full"
    samples = metrics(client)
    assert samples["ncml_jobs_rejected_total", "queue-memory"] == 1
    assert ("ncml_jobs_rejected_total", "queue-full") not in samples


def test_the_queue_is_measured_when_metrics_are_requested(
    new_client: Callable[..., TestClient], client: TestClient, queue, worker, info, model, configure
) -> None:
    worker.pause()
    configure(maxmemory=2**30)
    ids = [queue.submit(ScanJob(model="tiny", file=IMAGE, height=8, width=8, priority=Priority.LOW)) for _ in range(3)]
    queue.redis.hincrbyfloat(job_key(ids[0]), "submitted", -3600)
    samples = metrics(client)
    assert samples[("ncml_redis_up",)] == 1
    assert samples["ncml_queue_depth", "ncml:generate:low"] == 3
    assert samples["ncml_queue_depth", "ncml:score:high"] == 0
    assert samples["ncml_queue_oldest_age_seconds", "ncml:generate:low"] >= 3600
    assert samples["ncml_longest_wait_seconds", "scan"] >= 3600
    assert samples["ncml_longest_wait_seconds", "score"] == 0
    assert 0 < samples[("ncml_queue_memory_bytes",)] < samples[("ncml_queue_memory_limit_bytes",)] == 2**30
    assert samples["ncml_workers", "score", "idle"] == 1
    assert samples["ncml_workers", "score", "busy"] == 0
    assert samples["ncml_model_info", "tiny", model.version] == 1
    assert ("ncml_lane_jobs_per_second", "score") not in samples  # no job has run yet
    worker.appear_as(*(info.model_copy(update={"name": name, "pace": {Lane.GENERATE: 0.5}}) for name in ("w1", "w2")))
    assert metrics(client)["ncml_lane_jobs_per_second", "generate"] == 1
    down = metrics(new_client(redis_url=f"redis://127.0.0.1:{free_port()}"))
    assert down[("ncml_redis_up",)] == 0
    assert not any(name[0] == "ncml_queue_depth" for name in down)


def test_only_lanes_that_need_workers_or_have_one_are_measured(
    new_client: Callable[..., TestClient], worker, info
) -> None:
    client = new_client(ready_lanes=("score",))

    def lanes() -> set[str]:
        return {labels[0] for name, *labels in metrics(client) if name == "ncml_workers"}

    worker.appear_as()
    assert lanes() == {"score"}
    worker.appear_as(info)
    assert lanes() == {"score", "generate"}


def test_jobs_that_expire_while_their_client_waits_are_counted_and_logged(
    valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service")
    with contextlib.closing(JobQueue.from_url(valkey_url)) as queue:
        measurements = Metrics(queue)
        job_id = queue.submit(GenerateJob(model="m", start_within_s=0.01, request_id="r-1"))
        time.sleep(1.1)  # the server's clock is read in whole seconds
        for _ in range(2):
            assert queue.view(job_id).status is JobStatus.EXPIRED
        labels = {"task": "generate", "model": "m", "outcome": "expired"}
        assert measurements.registry.get_sample_value("ncml_jobs_finished_total", labels) == 1
    request_id.set("r-2")  # of the client that noticed it
    (entry,) = (json.loads(RequestLogFormatter().format(record)) for record in caplog.records)
    expected = {"message": "job ended", "job": job_id, "request": "r-1", "status": "expired", "reason": "expired"}
    assert entry.items() >= expected.items()


def test_a_service_whose_queue_refuses_jobs_is_not_ready(client: TestClient, queue, configure) -> None:
    configure(maxmemory=queue.monitor.memory()[0] * 5 // 4)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["type"] == "urn:ncml:problem:not-ready"
    assert response.json()["detail"] == "The queue refuses new jobs: it is short of memory."
    assert not any(name == "ncml_jobs_rejected_total" for name, *_ in metrics(client))  # probes are not counted
    configure(maxmemory=0)
    assert client.get("/readyz").status_code == 200


NO_WRITES = {"min_replicas_to_write": 1}
"""A setting with which a server refuses all writes, as on a full disk."""
REFUSAL = "NOREPLICAS Not enough good replicas to write"


def test_workers_that_cannot_publish_to_a_full_disk_are_not_called_missing(
    client: TestClient, worker, configure
) -> None:
    worker.appear_as()
    configure(**NO_WRITES)
    responses = client.post("/score", files=[("image", IMAGE)]), client.get("/models"), client.get("/models/m")
    for response in responses:
        assert response.status_code == 503
        assert response.json()["type"] == "urn:ncml:problem:queue-down"
        assert response.json()["detail"] == f"The queue refuses new jobs: {REFUSAL}."
    configure(min_replicas_to_write=0)
    assert client.post("/score", files=[("image", IMAGE)]).json()["type"] == "urn:ncml:problem:no-worker"
    assert client.get("/models").json()["models"] == []


def test_a_command_that_the_queue_refuses_is_explained(client: TestClient, configure) -> None:
    configure(**NO_WRITES)
    response = client.post("/score", files=[("image", IMAGE)])
    assert response.status_code == 503
    assert response.json()["detail"] == f"The queue refuses the request: {REFUSAL}."


def test_every_route_reports_within_seconds_that_the_server_hangs(
    new_client: Callable[..., TestClient], new_valkey: Callable[..., Valkey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.MONITOR_TIMEOUT_S", 0.1)
    server = new_valkey()
    assert server.process
    client = new_client(redis_url=server.url, allow_calibration=True)
    form = {"files": {"image": ("a.png", IMAGE)}, "data": {"job": "a", "verdict": "good"}}
    model, review = "/models/tiny", "/models/tiny/reviews/0123456789abcdef"
    os.kill(server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        responses = [
            *(client.get(path) for path in ("/readyz", "/models", model, f"{model}/pictures", f"{model}/reviews")),
            *(client.get(f"/jobs/a{part}") for part in ("", "/result", "/events", "/preview")),
            *(client.delete(path) for path in ("/jobs/a", review)),
            client.post("/jobs/a/cancel"),
            client.get(f"{review}/thumbnail"),
            client.post(f"{model}/reviews", **form),
            client.post("/score", files={"image": IMAGE}),
            client.post("/generate"),
            client.post("/update?name=tiny"),
        ]
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert time.monotonic() - started < 25  # calls for one job wait for 30 s
    problems = {(response.status_code, response.json()["type"]) for response in responses}
    assert problems == {(503, "urn:ncml:problem:queue-down")}


def test_what_operators_probe_needs_no_thread_of_the_requests(client: TestClient) -> None:
    threads = client.portal.call(anyio.to_thread.current_default_thread_limiter)
    places = range(int(threads.total_tokens))
    for i in places:  # as by requests that wait for a queue which does not answer
        client.portal.call(threads.acquire_on_behalf_of, i)
    assert client.get("/readyz").status_code == 200
    assert metrics(client)[("ncml_redis_up",)] == 1
    for i in places:
        client.portal.call(threads.release_on_behalf_of, i)


def test_a_slash_at_the_end_leads_nowhere_else(client: TestClient) -> None:
    """The address of a redirection would lack the path below which a proxy serves the application."""
    for response in client.get("/docs/"), client.post("/generate/"), client.get("/studio"):
        assert response.status_code == 404
        assert response.json()["detail"].endswith("does not exist; /docs lists the endpoints.")


def test_two_applications_have_separate_metrics(new_client: Callable[..., TestClient]) -> None:
    first, second = new_client(), new_client()
    first.get("/healthz")
    assert ("ncml_http_requests_total", "200", "GET", "/healthz") not in metrics(second)


def test_each_request_has_a_line_in_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="service"):
        client.post("/score?class=cat", files=[("image", IMAGE)], headers={"x-request-id": "r-1"})
    lines = [record for record in caplog.records if record.name == "service.access"]
    assert [line.getMessage() for line in lines] == ["POST /score 200"]
    token = request_id.set("r-1")
    try:
        line = json.loads(RequestLogFormatter().format(lines[0]))
    finally:
        request_id.reset(token)
    assert line["request"] == "r-1"
    assert line["seconds"] > 0
    assert line["level"] == "info"
    assert line["client"] == "testclient"


def test_an_unexpected_error_is_logged_with_its_traceback(
    client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(QueueMonitor, "models")
    client.get("/models")
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "AttributeError" in json.loads(RequestLogFormatter().format(record))["traceback"]


@pytest.mark.parametrize("media", ["image/png", "application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_disconnects_while_sending_is_not_an_error(
    client: TestClient, caplog: pytest.LogCaptureFixture, media: str
) -> None:
    messages = iter([{"type": "http.request", "body": b"--x", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"host", b"localhost"), (b"content-type", media.encode())]
    scope = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": headers}
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))
    assert sent == []
    assert metrics(client)["ncml_http_requests_total", "499", "POST", "/score"] == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_version_is_that_of_the_document(client: TestClient) -> None:
    version = client.get("/version").json()
    assert version == {"name": "ncml", "version": client.get("/openapi.json").json()["info"]["version"]}


def test_head_requests_match_get_requests(client: TestClient) -> None:
    for path in ("/", "/healthz", "/readyz", "/models", "/docs", "/jobs/unknown"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code, path
        assert head.headers["content-length"] == get.headers["content-length"], path
    assert metrics(client)["ncml_http_requests_total", "200", "HEAD", "/healthz"] == 1


def test_every_response_has_security_headers(client: TestClient) -> None:
    for path in ("/healthz", "/docs", "/nowhere", "/openapi.json"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert ("'unsafe-inline'" in policy["style-src"]) == (path == "/docs")
        assert "access-control-allow-origin" not in headers


def test_the_documentation_works_offline(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page
    for source in ("docs/assets/swagger-ui.css", "docs/assets/swagger-ui-bundle.js", "docs/start.js"):
        assert source in page
        assert client.get(f"/{source}").status_code == 200
    assert "<script>" not in page


def test_the_document_describes_requests_and_responses(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operations = {op["operationId"]: op for path in document["paths"].values() for op in path.values()}
    assert operations.keys() == {
        "score", "generate", "complete", "calibrate", "update",
        "get_job", "get_job_result", "cancel_job", "delete_job", "get_job_preview", "follow_job",
        "list_models", "get_model", "get_pictures", "review", "list_reviews", "get_review_thumbnail", "delete_review",
        "health", "readiness", "metrics", "version",
    }  # fmt: skip
    assert {p["name"] for p in operations["generate"]["parameters"]} == {
        "model", "class", "priority", "webhook", "format", "n", "seed", "noise", "steps", "solver", "guidance",
        "temperature", "Prefer", "Idempotency-Key", "X-Request-Id",
    }  # fmt: skip
    assert operations["score"]["requestBody"]["content"].keys() == {
        "application/json", "multipart/form-data", "image/*", "application/octet-stream",
    }  # fmt: skip
    fields = {media: operations["score"]["requestBody"]["content"][media]["schema"]["properties"]
              for media in ("application/json", "multipart/form-data")}  # fmt: skip
    listed = {"type": "array", "items": {"type": "string"}}
    assert listed in fields["application/json"]["statistics"]["anyOf"]
    assert fields["multipart/form-data"]["statistics"]["type"] == "string"
    assert "application/x-www-form-urlencoded" in operations["generate"]["requestBody"]["content"]
    assert "Prefer" in {p["name"] for p in operations["get_job_result"]["parameters"]}
    for media in ("application/json", "multipart/form-data"):
        assert operations["calibrate"]["requestBody"]["content"][media]["schema"]["required"] == ["image", "name"]
    results = operations["get_job_result"]["responses"]["200"]["content"]["application/json"]
    assert {answer["$ref"].rsplit("/", 1)[-1] for answer in results["schema"]["anyOf"]} == {
        "ScoreAnswer", "ScanAnswer", "ImagesAnswer", "CalibrateAnswer",
    }  # fmt: skip
    properties = {name: schema["properties"] for name, schema in document["components"]["schemas"].items()
                  if name in ("ServedModel", "ImagesAnswer")}  # fmt: skip
    for field in (properties["ServedModel"]["generates"], properties["ImagesAnswer"]["model"]):
        assert "like those that its weights were trained on" in field["description"]
    assert {tag["name"] for tag in document["tags"]} == {tag for op in operations.values() for tag in op["tags"]}
    assert document["servers"][0]["url"] == ".", "relative to the document, also below a proxy's path"
    assert operations["generate"]["responses"]["200"]["content"].keys() == {
        "application/json", "image/png", "application/zip", "application/x-npz",
    }  # fmt: skip
    for operation in operations.values():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert response["content"].keys() == {"application/problem+json"}
    message = document["webhooks"]["job-ended"]["post"]
    assert message["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/JobEnded")
    assert [parameter["name"] for parameter in message["parameters"]] == [
        "webhook-id", "webhook-timestamp", "webhook-signature",
    ]  # fmt: skip
    text = json.dumps(document)
    for operation in operations.values():
        assert "curl " in operation["description"], operation["operationId"]
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for media, body in (
            (media, body) for content in contents for media, body in content.get("content", {}).items()
        ):
            name = body["schema"].get("$ref", "").rsplit("/", 1)[-1]
            schema = document["components"]["schemas"].get(name, {})
            assert "example" in body or "examples" in body or "example" in schema, (operation["operationId"], media)
            if "additionalProperties" in body["schema"]:  # the fields of a request
                fields, required = body["schema"]["properties"].keys(), set(body["schema"].get("required", []))
                assert required <= body["example"].keys() <= fields, (operation["operationId"], media)
                if media == "multipart/form-data" and "image" in fields:
                    is_list = body["schema"]["properties"]["image"]["type"] == "array"
                    assert isinstance(body["example"]["image"], list if is_list else str)
            if media == "application/problem+json":
                examples = [example["value"] for example in body["examples"].values()]
                assert len({example["type"] for example in examples}) == len(examples)
                assert len({example["status"] for example in examples}) == 1
    names = {ref.split('"')[0] for ref in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()
    for name in ("ScoreAnswer", "ImagesAnswer", "JobAnswer", "JobEnded", "ProblemDetails"):
        assert "example" in document["components"]["schemas"][name]


def test_the_examples_of_documents_are_valid(client: TestClient) -> None:
    """FastAPI removes members that are null, although they are required."""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    answered = (JobAnswer, JobEnded, ScoreAnswer, ScanAnswer, CalibrateAnswer, ImagesAnswer, Models, ServedModel)
    for document in answered:
        document.model_validate(schemas[document.__name__]["example"])


def test_the_document_requires_exactly_the_members_that_are_always_sent(client: TestClient, worker) -> None:
    """Otherwise generated clients declare members as missing that are at most null."""
    document = client.get("/openapi.json").json()
    schemas = {name: schema for name, schema in document["components"]["schemas"].items() if "properties" in schema}
    optional = {name: schema["properties"].keys() - schema["required"] for name, schema in schemas.items()}
    assert {name: members for name, members in optional.items() if members} == {
        "Score": {"file", "statistics", "sanity", "map", "detection"}, "Detection": {"map"}, "ScanAnswer": {"tiles"},
        "JobAnswer": {"webhook"},
    }  # fmt: skip
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR}))
    part = to_png(np.full((40, 40, 3), 200, np.uint8))
    job_id = client.post("/generate").headers["X-Job-Id"]
    answers = {
        "ScoreAnswer": client.post("/score", files={"image": part}),
        "ScanAnswer": client.post("/score?tile=1", files={"image": part}),
        "ImagesAnswer": client.post("/generate?format=json"),
        "JobAnswer": client.get(f"/jobs/{job_id}"),
        "Models": client.get("/models"),
        "ServedModel": client.get("/models/tiny"),
        "Readiness": client.get("/readyz"),
        "ProblemDetails": client.get("/models/none"),
    }
    for name, response in answers.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(response.json(), schema, jsonschema.Draft202012Validator)


def test_the_document_has_the_headers_of_jobs_and_results(client: TestClient, worker) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    def documented(path: str, method: str, status: str) -> set[str]:
        return {name.lower() for name in paths[path][method]["responses"][status]["headers"]}

    result, preferring = {"x-job-id", "preference-applied"}, {"Prefer": "wait=5"}
    score = client.post("/score", files={"image": IMAGE}, headers=preferring)
    assert documented("/score", "post", "200") == result <= score.headers.keys()
    images = client.post("/generate", headers=preferring)
    assert documented("/generate", "post", "200") == result | {"x-seed"} <= images.headers.keys()
    path = f"/jobs/{images.headers['x-job-id']}"
    again = client.get(f"{path}/result", headers=preferring)
    assert documented("/jobs/{job_id}/result", "get", "200") == result | {"x-seed"} <= again.headers.keys()
    assert documented("/jobs/{job_id}", "get", "200") == {"x-job-id"} <= client.get(path).headers.keys()
    canceled = client.post(f"{path}/cancel")
    assert documented("/jobs/{job_id}/cancel", "post", "200") == {"x-job-id"} <= canceled.headers.keys()
    worker.error = lambda job: EXPIRED
    failed = client.post("/generate")
    assert documented("/generate", "post", "504") == {"x-job-id"} <= failed.headers.keys()
    assert documented("/generate", "post", "401") == {"www-authenticate"}
    worker.pause()
    accepted = client.post("/generate", headers={"Prefer": "respond-async"})
    expected = result | {"location", "retry-after"}
    assert documented("/generate", "post", "202") == expected <= accepted.headers.keys()


def test_the_document_has_the_headers_of_conditional_and_resumed_requests(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    models, events = paths["/models"]["get"], paths["/jobs/{job_id}/events"]["get"]
    assert {parameter["name"] for parameter in models["parameters"]} == {"limit", "after", "If-None-Match"}
    assert models["responses"]["200"]["headers"].keys() == models["responses"]["304"]["headers"].keys() == {"ETag"}
    assert [parameter["name"] for parameter in events["parameters"]] == ["job_id", "Last-Event-ID"]


def test_the_document_has_the_limits_of_options_and_the_kinds_of_files(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/generate", "/complete"):
        schemas = {parameter["name"]: parameter["schema"] for parameter in paths[path]["post"]["parameters"]}
        for name in ("guidance", "temperature"):
            assert (schemas[name]["minimum"], schemas[name]["maximum"]) == OPTIONS[name].range
    for path, is_zip in (("/score", False), ("/calibrate", True)):
        form = paths[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert ("zip" in form["properties"]["image"]["items"]["description"]) == is_zip


def test_the_document_describes_members_in_terms_of_json(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        for member, value in schema.get("properties", {}).items():
            assert not re.search(r"\bNone\b|\(\)", value.get("description", "")), (name, member)


API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table in docs/api.md whose first heading is `heading`."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", API, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_api_page_lists_every_kind_of_problem(client: TestClient) -> None:
    before_the_application = {408, 431}  # from the server, for connections
    documented = {
        (int(status), f"urn:ncml:problem:{kind}")
        for statuses, kinds, _ in rows("Status")
        for status in statuses.split(", ")
        if int(status) not in before_the_application
        for kind in re.findall(r"`([a-z-]+)`", kinds)
    }
    document = client.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    refusals = [
        response["content"]["application/problem+json"]["examples"].values()
        for operation in operations
        for status, response in operation["responses"].items()
        if int(status) >= 400
    ]
    examples = {(item["value"]["status"], item["value"]["type"]) for refusal in refusals for item in refusal}
    assert documented == examples - {(500, "about:blank")}
    assert client.post("/generate?n=0").json()["detail"] in API


def test_the_api_page_lists_the_default_limits() -> None:
    default = {name: field.default for name, field in Settings.model_fields.items()}

    def mib(name: str) -> str:
        return f"{default[name] // 2**20} MiB"

    headers, body = (f"{default[f'{part}_timeout_s']:g} s" for part in ("header", "body"))
    assert [value for _, value, _ in rows("Limit")] == [
        mib("max_body_bytes"),
        mib("max_image_bytes"),
        f"{default['max_image_pixels']:,}",
        str(default["max_images"]),
        str(default["max_tiles"]),
        str(default["max_calibration_images"]),
        f"1; {MAX_PREPARATIONS}",
        "1",  # JobService.updating
        f"{default['decode_request_s']:g} s",
        f"{default['max_waiting']}; {mib('max_waiting_bytes')}",
        f"{MAX_UNDELIVERED:,}",
        f"{default['max_review_bytes'] // 2**22} MiB; {mib('max_review_bytes')}",
        str(default["max_streams"]),
        f"{default['max_receiving_bytes'] // 2**21} MiB; {mib('max_receiving_bytes')}",
        str(default["max_connections"]),
        f"{MAX_HEAD_BYTES // 2**10} KiB",
        f"{headers}; {body}",
        body,
        f"{default['idle_timeout_s']:g} s",
        f"{default['wait_s']:g} s",
        f"{default['start_within_s']:g} s; {default['job_timeout_s']:g} s",
    ]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCML_WAIT_S", "5")
    monkeypatch.setenv("NCML_READY_LANES", '["score"]')
    settings = Settings()
    assert settings.wait_s == 5
    assert settings.ready_lanes == ("score",)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """Return a function that starts the service with a variable, and returns what it prints before it exits."""
    monkeypatch.setattr("service.app.log_to_stderr", lambda level: None)  # this process keeps its own log

    def start(name: str, value: str) -> str:
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            from_environment()
        assert end.value.code == 2
        return capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WAIT_S", "soon", " is 'soon'; it must be a number."),
        ("WAIT_S", "601", " is '601'; it must be at most 600."),
        ("LOG_LEVEL", "loud", " is 'loud'; it must be 'DEBUG', "),
        ("RATE_LIMIT", "often", " is 'often'; it must be like 60/minute"),
        ("RATE_LIMIT", "0/minute", " is '0/minute'; it allows no requests"),
        ("CORS_ORIGINS", '["http://*{ge}"]', " is '[\"http://*{ge}\"]'; each origin must be like https://"),
        ("CORS_ORIGINS", "https://example.org", " is 'https://example.org'; it must be a JSON list"),
        ("ALLOWED_HOSTS", '["example.org:8000"]', " is '[\"example.org:8000\"]'; each host must be like example.org"),
        ("READY_LANES", "score", " is 'score'; it must be a JSON list"),
        ("HIGH_PRIORITY_KEYS", '["ann"]', " is '[\"ann\"]'; it requires NCML_API_KEYS_FILE, which names the keys."),
        ("API_KEYS_FILE", "", " is ''; it is empty: name a file of keys, or omit it."),
        ("READY_LANES", '["draw"]', ".0 is 'draw'; it must be 'score' or 'generate'."),
        ("API_KEYS_FILE", "/nowhere/keys", ": /nowhere/keys cannot be read: No such file"),
    ],
)
def test_an_invalid_setting_stops_the_process_with_one_line(
    refusal: Callable[[str, str], str], name: str, value: str, words: str
) -> None:
    message = refusal(f"NCML_{name}", value)
    assert message.startswith(f"ncml: NCML_{name}{words}")
    assert message.count("\n") == 1


def test_a_misspelt_setting_stops_the_process_because_it_would_open_the_service(
    refusal: Callable[[str, str], str],
) -> None:
    assert refusal("NCML_API_KEY_FILE", "keys") == (
        "ncml: NCML_API_KEY_FILE is not a setting: did you mean NCML_API_KEYS_FILE?\n"
    )


def test_variables_of_compose_files_and_of_kubernetes_are_no_misspelt_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [ROOT / "docker-compose.yml", *(ROOT / "docker").glob("*.yml"), ROOT / "docs" / "configuration.md"]
    named = {name for file in files for name in re.findall(r"NCML_[A-Z_]*[A-Z]", file.read_text())}
    others = {name for name in named if name.removeprefix("NCML_").lower() not in Settings.model_fields}
    assert {"NCML_API_KEY", "NCML_QUEUE_MEMORY"} < others
    for name in others | {"NCML_PORT", "NCML_SERVICE_HOST", "NCML_SERVICE_PORT_HTTP"}:
        monkeypatch.setenv(name, "")
    assert read_settings() == Settings()


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_stops_the_process(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    code = "from service.app import from_environment; from_environment()"
    environment = os.environ | {"TMPDIR": str(folder)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2
    assert run.stderr == f"ncml: TMPDIR: {folder} is too long for a socket's path; name another folder\n"


@pytest.mark.parametrize(
    ("hosts", "keys", "warns"),
    [
        (["localhost", "127.0.0.1", "[::1]", "service"], False, False),
        (["localhost", "images.example.org"], False, True),
        (["localhost", "images.example.org"], True, False),
    ],
)
def test_a_service_that_others_use_without_keys_warns_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hosts: list[str],
    keys: bool,
    warns: bool,
) -> None:
    monkeypatch.setattr("service.app.log_to_stderr", lambda level: None)  # this process keeps its own log
    monkeypatch.setenv("NCML_ALLOWED_HOSTS", json.dumps(hosts))
    if keys:
        (tmp_path / "keys").write_text(f"ann:{'0' * 64}\n")
        monkeypatch.setenv("NCML_API_KEYS_FILE", str(tmp_path / "keys"))
    from_environment()
    assert ("no API key is required" in caplog.text) == warns


@pytest.mark.parametrize("url", ["localhost", "redis://user:pass#word@host:6379/0"])
def test_an_invalid_queue_address_stops_the_process_without_revealing_its_password(
    refusal: Callable[[str, str], str], url: str
) -> None:
    message = refusal("NCML_REDIS_URL", url)
    assert message.startswith("ncml: NCML_REDIS_URL: ")
    assert message.count("\n") == 1
    assert "pass#" not in message
    assert "'pass'" not in message


def test_the_service_imports_no_torch_and_no_worker_process() -> None:
    code = """
import sys
from service.answers import CalibrateAnswer, ImagesAnswer, JobAnswer, JobEnded, ScanAnswer, ScoreAnswer
from service.app import from_environment
app = from_environment()
app.openapi()
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("worker.")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = (
        "address",
        "changes",
        "contract",
        "deliveries",
        "descriptors",
        "job_results",
        "logs",
        "monitor",
        "outages",
        "queue",
        "records",
        "redis_keys",
        "review_store",
        "traces",
    )
    assert run.stdout.strip() == str([f"worker.{name}" for name in modules])
