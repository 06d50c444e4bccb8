"""`make compose-test`: the compose file on a real engine, from the build to a trained model that is served.

These tests are skipped, with the reason, if no engine can run. The last lines report stand-ins for base images.
"""

import contextlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from ncml.images import to_png
from tests.conftest import eventually, free_port
from tests.deploy.engine import ROOT, Engine, NoEngine, engine, run, works
from tests.deploy.files import COMPOSE, base_images, expressions
from tests.detectors import good_image, without_disc
from tests.ncml import nets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CAT = ROOT / "docs" / "cat.jpg"


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class Stack:
    """The stack of the compose file, under a separate project name."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.port = free_port()
        self.name = f"ncml-test-{uuid.uuid4().hex[:8]}"
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "pictures").mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NCML_")}
        self.environment = (
            environment | engine.environment | {"PORT": str(self.port), "NCML_DATA": f"{folder}/pictures"}
        )
        # An engine without a network of its own builds in the host's.
        services = yaml.safe_load(COMPOSE.read_text())["services"]
        built = {name: {"build": {"network": "host"}} for name, spec in services.items() if "build" in spec}
        override = folder / "here.yml"
        override.write_text(yaml.safe_dump({"services": built}))
        files = ["--env-file", os.devnull, "-f", COMPOSE, "-f", override]
        self.command = ["docker", "compose", "-p", self.name, "--project-directory", ROOT, *files]

    def compose(self, *arguments: str, timeout: float = 180) -> str:
        return run([*self.command, *arguments], timeout=timeout, env=self.environment)

    def containers(self, *services: str) -> list[str]:
        return self.compose("ps", "--quiet", *services).split()

    def python(self, service: str, code: str) -> str:
        return self.compose("exec", "-T", service, "python", "-c", code)

    def ready(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def models(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in httpx2.get(f"{self.url}/models", timeout=10).json()["models"]}

    def score(self, image: Path, model: str = "") -> dict[str, Any]:
        query = {"model": model} if model else {}
        answer = httpx2.post(f"{self.url}/score", params=query, files={"image": image.read_bytes()}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clone's `docs`, in which README's requests run."""
    workspace = tmp_path_factory.mktemp("workspace")
    (workspace / "docs").symlink_to(ROOT / "docs")
    return workspace


@pytest.fixture(scope="module")
def stack(workspace: Path) -> Iterator[Stack]:
    """The stack, ready; everything that it creates is removed."""
    try:
        with engine() as docker_engine:
            print("\nhaving base images", flush=True)
            for image in base_images(profiles=()):
                docker_engine.provide(image)
            stack = Stack(docker_engine, workspace)
            try:
                print("building the images", flush=True)
                stack.compose("build", timeout=2400)
                print("starting the containers", flush=True)
                stack.compose("up", "--detach", "--wait", timeout=600)
                eventually(stack.ready, 90)
                yield stack
            finally:
                subprocess.run(
                    [*stack.command, "--profile", "*", "down", "--volumes", "--timeout", "5"],
                    env=stack.environment, capture_output=True, check=False, timeout=180,
                )  # fmt: skip
                if docker_engine.stand_ins:
                    print(f"\nRun on stand-ins, made here, for {', '.join(docker_engine.stand_ins)}.")
    except NoEngine as reason:
        pytest.skip(str(reason))


def test_the_three_requests_of_the_readme(stack: Stack, workspace: Path) -> None:
    block = re.search(r"## Example requests\s+```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    lines = block[1].splitlines()
    assert len(lines) == 3
    for line in lines:
        command = line.replace("curl ", "curl -sS --fail-with-body ")
        command = command.replace("localhost:8000", f"127.0.0.1:{stack.port}")
        output = run(["bash", "-c", command], cwd=workspace, timeout=120)
        if "/score" in line:
            assert json.loads(output)["results"][0]["bpd"] > 0
    full, half, generated = (pixels(workspace / name) for name in ("full.png", "docs/half.png", "cat.png"))
    assert np.array_equal(full[:16], half)
    assert full.shape == generated.shape == (32, 32, 3)


def test_every_container_is_hardened_and_healthy(stack: Stack) -> None:
    descriptions = json.loads(stack.engine.docker("inspect", *stack.containers()))
    assert len(descriptions) == 4
    for container in descriptions:
        name, host = container["Name"], container["HostConfig"]
        assert container["State"]["Health"]["Status"] == "healthy", name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert container["Config"]["User"] not in {"", "0", "root"}, name
    published = [
        binding for c in descriptions for ports in c["NetworkSettings"]["Ports"].values() for binding in ports or ()
    ]
    assert published == [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]
    for service in ("service", "worker-score"):
        assert stack.python(service, "import os; print(os.getuid())").strip() == "10001"
        output = stack.python(service, "try: open('/app/x', 'w')\nexcept OSError as error: print(error.strerror)")
        assert output.strip() == "Read-only file system"
    absent = "from importlib.util import find_spec; print(find_spec('torch') is None)"
    assert stack.python("service", absent).strip() == "True"


def test_a_killed_worker_is_restarted_and_no_job_is_lost(stack: Stack) -> None:
    before = stack.score(CAT)["results"]
    submitted = httpx2.post(f"{stack.url}/generate?n=4&seed=1", headers={"Prefer": "respond-async"}, timeout=30)
    assert submitted.status_code == 202, submitted.text
    job = f"{stack.url}/jobs/{submitted.json()['id']}"
    eventually(lambda: httpx2.get(job, timeout=10).json()["status"] == "running", 30)
    (victim,) = stack.containers("worker-generate")
    started_at = json.loads(stack.engine.docker("inspect", victim))[0]["State"]["StartedAt"]
    # As the kernel would, not as an operator: what `docker kill` has ended stays so.
    stack.python("worker-generate", "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)")
    eventually(lambda: json.loads(stack.engine.docker("inspect", victim))[0]["State"]["StartedAt"] > started_at, 90)
    assert eventually(lambda: (view := httpx2.get(job, timeout=10).json())["status"] == "succeeded" and view, 180)
    eventually(stack.ready, 90)
    assert stack.score(CAT)["results"] == before


def test_a_lane_is_scaled_to_two(stack: Stack) -> None:
    stack.compose("up", "--detach", "--wait", "--scale", "worker-score=2", timeout=300)
    assert len(stack.containers("worker-score")) == 2
    assert eventually(lambda: httpx2.get(f"{stack.url}/readyz", timeout=5).json()["lanes"]["score"] == 2, 90)


def test_valkey_keeps_waiting_jobs_over_a_restart(stack: Stack) -> None:
    job_ids = [
        httpx2.post(f"{stack.url}/generate?seed={seed}", headers={"Prefer": "respond-async"}, timeout=30).json()["id"]
        for seed in range(6)
    ]
    time.sleep(1.5)  # the append-only file is written out every second
    stack.compose("kill", "--signal", "SIGKILL", "valkey")
    stack.compose("up", "--detach", "--wait", "valkey", timeout=120)

    def ended() -> bool:
        with contextlib.suppress(httpx2.TransportError, KeyError):
            views = [httpx2.get(f"{stack.url}/jobs/{one}", timeout=10).json()["status"] for one in job_ids]
            assert "failed" not in views
            return views == ["succeeded"] * len(job_ids)
        return False

    eventually(ended, 240)
    eventually(stack.ready, 90)


def test_a_trained_model_is_served(stack: Stack, workspace: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (workspace / "pictures" / name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(workspace / "pictures" / name / f"{i}.png")
    arguments = ["smoke", "--data", "/data", "--out", "/models/mine", "--max-images", "64", "--threads", "1", "--json"]
    output = stack.compose("run", "--rm", "-T", "train", *arguments, timeout=600)
    trained = json.loads(output[output.index("{") :])
    served = eventually(lambda: stack.models().get("mine"), 120)
    assert served["version"] == trained["model"]["version"]
    assert stack.score(workspace / "pictures" / "dark" / "0.png", "mine")["model"]["version"] == served["version"]
    assert stack.models().keys() == {"cifar10", "detector-base", "mine"}


def test_a_client_calibrates_a_model_where_that_is_allowed(stack: Stack) -> None:
    rng = np.random.default_rng(0)
    files = [("image", (f"{i}.png", to_png(rng.integers(0, 256, (8, 8, 3), np.uint8)))) for i in range(40)]
    address = f"{stack.url}/calibrate?name=ours&model=mine"
    assert httpx2.post(address, files=files, timeout=60).status_code == 403
    stack.command += ["-f", ROOT / "docker" / "compose.calibrate.yml"]
    stack.compose("up", "--detach", "--wait", timeout=600)
    eventually(stack.ready, 90)
    submitted = httpx2.post(address, files=files, headers={"Prefer": "respond-async"}, timeout=60)
    assert submitted.status_code == 202, submitted.text
    job = f"{stack.url}/jobs/{submitted.json()['id']}"
    eventually(lambda: httpx2.get(job, timeout=10).json()["status"] == "succeeded", 300)
    version = httpx2.get(f"{job}/result", timeout=10).json()["model"]["version"]
    served = eventually(lambda: stack.models().get("ours"), 120)
    assert served["version"] == version
    assert stack.score(CAT, "ours")["results"][0]["ood"]["p_value"] > 0
    writers = ("worker-score", "worker-generate")
    code = "import os; print(os.access('/models', os.W_OK), sorted(os.listdir('/models')))"
    assert [stack.python(name, code).split(" ", 1)[0] for name in writers] == ["False", "True"]
    assert "'ours'" in stack.python("worker-score", code)


def test_a_detector_is_made_and_updated(stack: Stack, workspace: Path) -> None:
    nets.save_images(workspace / "pictures" / "good", np.stack([good_image(seed) for seed in range(40)]))
    options = ["adapt", "/data/good", "--out", "/models/detector", "--keep-images", "--no-power"]
    stack.compose("run", "--rm", "-T", "--entrypoint", "ncml", "train", *options, timeout=600)
    eventually(lambda: "detector" in stack.models(), 120)
    flagged = workspace / "flagged.png"
    Image.fromarray(without_disc(1000)).save(flagged)
    scored = stack.score(flagged, "detector")
    assert scored["results"][0]["ood"]["is_ood"]
    data, files = {"job": scored["id"], "verdict": "good"}, {"image": flagged.read_bytes()}
    reviewed = httpx2.post(f"{stack.url}/models/detector/reviews", data=data, files=files, timeout=60)
    assert reviewed.status_code == 201, reviewed.text
    address = f"{stack.url}/update?model=detector&name=detector-2"
    submitted = httpx2.post(address, headers={"Prefer": "respond-async"}, timeout=60)
    assert submitted.status_code == 202, submitted.text
    job = f"{stack.url}/jobs/{submitted.json()['id']}"
    eventually(lambda: httpx2.get(job, timeout=10).json()["status"] not in {"queued", "running"}, 600)
    result = httpx2.get(f"{job}/result", timeout=10)
    assert result.status_code == 200, result.text
    eventually(lambda: "detector-2" in stack.models(), 120)


def test_prometheus_sees_every_container(stack: Stack) -> None:
    try:
        for image in base_images(profiles=("monitoring",)):
            if "prometheus" in image:
                stack.engine.provide(image)
    except NoEngine as reason:
        pytest.skip(str(reason))
    stack.score(CAT)
    stack.compose("--profile", "monitoring", "up", "--detach", "--wait", "prometheus", timeout=120)

    def ask(*paths: str) -> list[Any]:
        """Return a response of Prometheus, requested from the service's container because it has no published port."""
        addresses = [f"http://prometheus:9090/api/v1/{path}" for path in paths]
        code = "import json\nfrom urllib.request import urlopen\n"
        code += f"print(json.dumps([json.load(urlopen(address))['data'] for address in {addresses!r}]))"
        return json.loads(stack.python("service", code))

    def up() -> list[str]:
        targets = ask("targets")[0]["activeTargets"]
        return sorted(target["labels"]["job"] for target in targets if target["health"] == "up")

    workers = len(stack.containers("worker-score", "worker-generate"))
    eventually(lambda: up() == ["ncml-service", *workers * ["ncml-worker"]], 60)
    time.sleep(25)  # a rate needs two samples
    counted = "sum(ncml_score_bpd_count)"
    queries = [f"query?query={quote(expression)}" for expression in (*expressions(), counted)]
    *answers, count = ask(*queries)
    assert {answer["resultType"] for answer in answers} == {"vector"}
    assert sum(bool(answer["result"]) for answer in answers) > len(answers) / 2
    assert float(count["result"][0]["value"][1]) >= 1
    rules = [rule for group in ask("rules")[0]["groups"] for rule in group["rules"]]
    assert len(rules) > 5
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_grafana_shows_the_dashboard(stack: Stack) -> None:
    (image,) = [image for image in base_images(profiles=("monitoring",)) if "grafana" in image]
    if not works(["docker", "image", "inspect", image], stack.engine.environment):
        try:
            stack.engine.provide(image)
        except NoEngine as reason:
            pytest.skip(str(reason))
    port = free_port()
    stack.environment["GRAFANA_PORT"] = str(port)
    stack.compose("--profile", "monitoring", "up", "--detach", "--wait", "grafana", timeout=120)
    stored = httpx2.get(f"http://127.0.0.1:{port}/api/dashboards/uid/ncml", timeout=10).json()
    assert stored["dashboard"]["title"] == "ncml"
