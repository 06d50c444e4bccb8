"""One trace leads from a request over the queue to the stages of the engine."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from ncml.errors import NcmlError
from ncml.images import to_png
from service.app import create_app
from service.http.middleware import RequestLogFormatter
from service.settings import Settings
from tests.worker.synthetic import load, write_model
from worker import traces
from worker.contract import Lane
from worker.messages import EngineSettings
from worker.queue import JobQueue
from worker.worker import BatchWorker, WorkerSettings

ROOT = Path(__file__).parents[2]
IMAGE = to_png(np.full((8, 8, 3), 90, np.uint8))
CLIENT_TRACE, CLIENT_SPAN = "ab" * 16, "cd" * 8

Requests = Callable[[TestClient], None]
Run = Callable[[Requests], list[ReadableSpan]]


@pytest.fixture
def run(valkey_url: str, tmp_path: Path) -> Run:
    """Run requests against a service and a worker in this process, and return the spans that they export."""

    def record(requests: Requests) -> list[ReadableSpan]:
        exporter, failures = InMemorySpanExporter(), list[BaseException]()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracer = provider.get_tracer("test")
        write_model(tmp_path / "models", batch_s=0.02, image_s=0.001)
        engine = EngineSettings(directories=(tmp_path / "models",), load=load, max_batch=16)
        queue = JobQueue.from_url(valkey_url)
        worker = BatchWorker(queue, WorkerSettings(lanes=(Lane.SCORE, Lane.GENERATE), engine=engine), tracer=tracer)

        def use_service() -> None:
            app = create_app(Settings(), JobQueue.from_url(valkey_url), tracer)
            try:
                with TestClient(app, base_url="http://localhost") as client:
                    deadline = time.monotonic() + 60
                    while client.get("/readyz").status_code != 200:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                    exporter.clear()
                    requests(client)
            except BaseException as error:
                failures.append(error)
            finally:
                worker._on_signal(signal.SIGTERM, None)

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        thread = threading.Thread(target=use_service)
        thread.start()
        try:
            worker.work()  # it handles signals, and so needs the main thread
        finally:
            thread.join()
            queue.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if failures:
            raise failures[0]
        return list(exporter.get_finished_spans())

    return record


def by_trace(spans: list[ReadableSpan]) -> dict[int, dict[str, ReadableSpan]]:
    """Return the spans of each trace, by name."""
    grouped: dict[int, dict[str, ReadableSpan]] = defaultdict(dict)
    for span in spans:
        grouped[span.context.trace_id][span.name] = span
    return grouped


def test_one_trace_leads_from_the_request_to_the_stages(run: Run) -> None:
    def requests(client: TestClient) -> None:
        headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "x-request-id": "mine"}
        assert client.post("/score", files={"image": IMAGE}, headers=headers).status_code == 200

    [trace] = by_trace(run(requests)).values()
    assert trace.keys() == {"POST /score", "queue", "compute score", "score"}
    request, waiting, compute, stage = (trace[name] for name in ("POST /score", "queue", "compute score", "score"))
    assert f"{request.context.trace_id:032x}" == CLIENT_TRACE
    assert f"{request.parent.span_id:016x}" == CLIENT_SPAN
    assert waiting.parent.span_id == compute.parent.span_id == request.context.span_id
    assert stage.parent.span_id == compute.context.span_id
    assert waiting.start_time <= waiting.end_time == compute.start_time == stage.start_time
    assert stage.end_time <= compute.end_time
    assert (stage.end_time - stage.start_time) / 1e9 >= 0.02
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["ncml.request.id"] == compute.attributes["ncml.request.id"] == "mine"
    assert (compute.attributes["ncml.job.status"], compute.attributes["ncml.batch.images"]) == ("succeeded", 1)


def test_jobs_of_one_batch_link_each_other(run: Run) -> None:
    def requests(client: TestClient) -> None:
        with ThreadPoolExecutor(12) as pool:
            responses = list(pool.map(lambda _: client.post("/score", files={"image": IMAGE}), range(12)))
        assert {response.status_code for response in responses} == {200}

    grouped = by_trace(run(requests))
    assert len(grouped) == 12
    for trace in grouped.values():
        compute = trace["compute score"]
        assert len(compute.links) == compute.attributes["ncml.batch.jobs"] - 1
        for link in compute.links:
            assert link.context.span_id == grouped[link.context.trace_id]["POST /score"].context.span_id
    assert any(trace["compute score"].links for trace in grouped.values())


def test_a_failed_job_is_an_error_and_a_refused_request_has_no_job(run: Run) -> None:
    def requests(client: TestClient) -> None:
        assert client.post("/generate?n=0").status_code == 422
        assert client.post("/generate?class=bad").status_code == 422

    refused, failed = sorted(by_trace(run(requests)).values(), key=len)
    assert refused.keys() == {"POST /generate"}
    assert failed["compute generate"].status.status_code is StatusCode.ERROR
    assert failed["compute generate"].attributes["ncml.job.status"] == "failed"


def test_logs_have_the_ids_of_the_request_and_its_trace(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[dict[str, str]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(RequestLogFormatter().format(record)))

    def requests(client: TestClient) -> None:
        headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "x-request-id": "mine"}
        client.post("/score", files={"image": IMAGE}, headers=headers)

    handler, root = Lines(), logging.getLogger()
    with caplog.at_level(logging.INFO):
        root.addHandler(handler)
        try:
            run(requests)
        finally:
            root.removeHandler(handler)
    ended = [line for line in lines if line["message"] in ("POST /score 200", "job ended")]
    assert [(line["request"], line["trace"]) for line in ended] == [("mine", CLIENT_TRACE)] * 2


# Switched on by the environment


def test_without_the_extra_traces_are_off_or_refused() -> None:
    """The SDK is not imported while traces are off: in this test it cannot be imported."""
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; import service.app, worker.worker; "
        "print(worker.traces.make_tracer('x'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "None\n"
    environment |= {"OTEL_TRACES_EXPORTER": "console"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    reason = "NcmlError: OTEL_* variables request traces: run pip install -e '.[traces]' in the clone of ncml."
    assert done.stderr.rstrip().endswith(reason)


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
    ],
)
def test_the_standard_variables_switch_traces_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_on: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces.are_requested() is is_on


def test_the_exporter_is_chosen_by_its_name() -> None:
    code = "from worker.traces import make_tracer; make_tracer('ncml-test').start_span('hello').end()"
    environment = os.environ | {"OTEL_TRACES_EXPORTER": "console", "OTEL_RESOURCE_ATTRIBUTES": "room=attic"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    span = json.loads(done.stdout)
    assert span["name"] == "hello"
    attributes = span["resource"]["attributes"]
    assert (attributes["service.name"], attributes["room"]) == ("ncml-test", "attic")


def test_an_unknown_exporter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "x")
    with pytest.raises(NcmlError, match="OTEL_TRACES_EXPORTER is 'pigeon', which is not installed"):
        traces.make_tracer("x")
