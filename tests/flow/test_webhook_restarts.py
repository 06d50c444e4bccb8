"""Webhooks are sent at least once while services and receivers are killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import eventually, free_port
from tests.receiver import Receiver, write_secret
from tests.service.conftest import new_queue, queue, receiver, worker
from worker.contract import GenerateJob
from worker.queue import JobQueue

__all__ = ["new_queue", "queue", "receiver", "worker"]

SERVICE = """
import sys
import worker.deliveries, service.webhooks.deliverer as deliverer
worker.deliveries.LEASE_S, deliverer.FIRST_PAUSE_S, deliverer.PAUSE_GROWTH, deliverer.POLL_S = 1.0, 0.05, 1, 0.05
from service.server import main
main(port=int(sys.argv[1]))
"""


@pytest.mark.parametrize("restarts", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_message_survives_killed_services_and_receivers(
    restarts: int, receiver: Receiver, queue: JobQueue, valkey_url: str, tmp_path: Path
) -> None:
    environment = {
        "NCML_REDIS_URL": valkey_url, "NCML_WEBHOOK_HOSTS": json.dumps([receiver.entry]),
        "NCML_WEBHOOK_SECRET_FILE": str(write_secret(tmp_path)),
    }  # fmt: skip
    receiver.delay_s = 0.02
    ids: set[str] = set()
    for restart in range(restarts + 1):
        port = free_port()
        service = subprocess.Popen([sys.executable, "-c", SERVICE, str(port)], env=environment)
        for _ in range(20):
            ids.add(queue.submit(GenerateJob(model="tiny", seed=1), webhook=receiver.url))
        sent = len(receiver.paths)
        eventually(lambda sent=sent: len(receiver.paths) > sent + 3)  # it is in the midst of sending
        if restart % 2:
            receiver.stop()
        if restart < restarts:
            service.kill()
        else:
            receiver.stop()
            receiver.start()
            eventually(lambda: len(receiver.counts) == len(ids))
            eventually(lambda: queue.deliveries.count_all() == 0)
            service.terminate()
        service.wait(60)
        if restart % 2 and restart < restarts:
            receiver.start()
    assert not receiver.faults
    assert {message["data"]["id"] for _, message in receiver.messages} == ids
    assert len(receiver.bodies) == len(ids)  # always the same id, and the same body
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values())
