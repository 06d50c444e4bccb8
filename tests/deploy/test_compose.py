"""The compose files and the Dockerfile: what they start, as which user, and that every name in them exists."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from prometheus_client import generate_latest

from ncml.cli.main import parse
from service import server
from service.settings import Settings
from tests.deploy.engine import NO_COMPOSE, run, works
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, SERVICE_ENV, base_images, compose
from worker.contract import Lane
from worker.metrics import WorkerMetrics

SERVICES = compose()["services"]
OURS = ["service", "train", "worker-generate", "worker-score"]
OVERRIDES = sorted((ROOT / "docker").glob("compose.*.yml"))
DOCKER = DOCKERFILE.read_text()


def stage(name: str) -> str:
    """Return the part of the Dockerfile that builds a target."""
    match = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKER, re.MULTILINE | re.DOTALL)
    assert match
    return match[1]


def instruction(name: str, keyword: str) -> list[str]:
    """Return a JSON-form instruction of a stage."""
    match = re.search(rf"^{keyword} (\[.*?\])$", stage(name), re.MULTILINE | re.DOTALL)
    return yaml.safe_load(match[1].replace("\\\n", "")) if match else []


def filled(command: list[str]) -> list[str]:
    """Return a command with the defaults of its variables."""
    return [re.sub(r"\$\{\w+:-(\w*)\}", r"\1", word) for word in command]


def ncml(arguments: list[str]) -> None:
    """Parse a command of the worker's image; nothing is run."""
    assert arguments[0] == "ncml"
    if "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            parse(arguments[1:])
        assert not end.value.code
    else:
        assert callable(parse(arguments[1:]))


def service(arguments: list[str]) -> None:
    """Parse a command of the service's image; nothing is run."""
    assert arguments[:3] == ["python", "-m", "service"]

    @functools.wraps(server.main)
    def parsed(*_: Any, **__: Any) -> None: ...

    tyro.cli(parsed, args=arguments[3:])


def test_base_images_are_pinned_to_a_release() -> None:
    images = base_images(()) + base_images(("monitoring",))
    assert len(images) == 4
    for image in images:
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(-[\w-]+)?(@sha256:[0-9a-f]{64})?", image), image


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name: str) -> None:
    spec = SERVICES[name]
    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"]
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert not spec.keys() & {"privileged", "cap_add", "network_mode", "pid", "devices", "userns_mode"}


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_runs_as_root(name: str) -> None:
    spec = SERVICES[name]
    if "build" in spec:
        users = re.findall(r"^USER (\S+)$", stage(spec["build"]["target"]), re.MULTILINE)
        assert users == ["10001"]  # a number, so that Kubernetes can check it
    elif name == "grafana":  # its image sets 472
        assert "user" not in spec
    else:
        assert spec["user"] not in {"root", "0"}


def test_one_port_is_open_by_default_and_only_to_this_host() -> None:
    opened = {name: spec["ports"] for name, spec in SERVICES.items() if "ports" in spec and "profiles" not in spec}
    assert opened == {"service": ["127.0.0.1:${PORT:-8000}:8000"]}
    for spec in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in spec.get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_limits_of_memory_cores_and_processes(name: str) -> None:
    spec = SERVICES[name]
    memory, cores = (re.sub(r"\$\{\w+:-([\w.]+)\}", r"\1", str(spec[key])) for key in ("mem_limit", "cpus"))
    assert re.fullmatch(r"\d+[mg]", memory)
    assert 0 < float(cores) <= 2
    assert 32 <= spec["pids_limit"] <= 4096


@pytest.mark.parametrize("name", SERVICES)
def test_the_log_of_every_container_is_limited(name: str) -> None:
    logging = SERVICES[name]["logging"]
    assert logging["driver"] == "json-file"  # other drivers refuse these options
    assert logging["options"] == {"max-size": "10m", "max-file": "5"}


def test_only_service_and_workers_reach_the_queue() -> None:
    networks = compose()["networks"]
    members = {name: {service for service, spec in SERVICES.items() if name in spec["networks"]} for name in networks}
    assert members == {
        "queue": {"valkey", "service", "worker-score", "worker-generate"},
        "web": {"service"},
        "monitoring": {"service", "worker-score", "worker-generate", "prometheus", "grafana"},
        "train": {"train"},
    }
    assert networks["queue"] == {"internal": True}


def test_the_password_of_the_queue_is_random_by_default_and_only_in_a_file(tmp_path: Path) -> None:
    command = SERVICES["valkey"]["command"]
    assert command[:2] == ["sh", "-euc"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "bin" / "valkey-server").write_text('#!/bin/sh\necho "$@"; cat; env\n')
    (tmp_path / "bin" / "valkey-server").chmod(0o755)
    script = command[2].replace("$$", "$").replace("/run/queue", f"{tmp_path}/run").replace("/data", str(tmp_path))

    def start(password: str) -> str:
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        output = run(["sh", "-euc", script, *command[3:]], env={"PATH": path, "QUEUE_PASSWORD": password})
        arguments, config, *other_lines = output.splitlines()
        assert arguments.startswith("- --appendonly yes --appendfsync everysec")
        stored = (tmp_path / "run" / "password").read_text()
        assert config == f"requirepass {stored}"
        assert stored not in arguments + "".join(other_lines)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["password"]
        return stored

    first = start("")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert start("") == first  # the other containers have read it
    assert start("own") == start("") == "own"
    for password in ('a"b', "a b", "a\nport 1"):
        with pytest.raises(AssertionError, match="NCML_REDIS_PASSWORD may have letters and digits only") as error:
            start(password)
        assert password not in str(error.value).partition("NCML_REDIS_PASSWORD")[2]
    assert start("") == "own"


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "train"])
def test_every_permanent_container_has_a_health_check_and_is_restarted(name: str) -> None:
    spec = SERVICES[name]
    assert spec["restart"] == "unless-stopped"
    test = spec["healthcheck"]["test"] if "healthcheck" in spec else None
    if test is None:
        assert re.search(r"^HEALTHCHECK .*\n +CMD \[", stage(spec["build"]["target"]), re.MULTILINE)
    else:
        assert test[0] == "CMD"
        if "python" in test:
            compile(test[-1], name, "exec")


Responses = tuple[int, dict[str, tuple[int, str]]]
"""The port of a server, and the status and the text of its response to each path."""


class Health(http.server.BaseHTTPRequestHandler):
    """Sends the response that `response_by_path` has for a path."""

    response_by_path: dict[str, tuple[int, str]]

    def do_GET(self) -> None:
        status, text = self.response_by_path[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def health() -> Iterator[Responses]:
    """Return a server on this machine, whose responses a test sets."""
    handler = type("Handler", (Health,), {"response_by_path": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], handler.response_by_path
        server.shutdown()


def is_healthy(code: str, port: int) -> bool:
    """Return whether a health check succeeds on another port, with the variables of a proxy that does not exist."""
    code, replaced = re.subn(r'("127\.0\.0\.1"|\'127\.0\.0\.1\'), \d+', rf"\1, {port}", code)
    assert replaced == 1
    proxies = {f"{scheme}_proxy": "http://127.0.0.1:1" for scheme in ("http", "https", "all")}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | proxies, check=False, capture_output=True)
    return done.returncode == 0


def test_the_health_check_of_the_service_uses_no_proxy(health: Responses) -> None:
    port, responses = health
    check = re.search(r"^HEALTHCHECK .*?\bCMD (\[.*?\])$", stage("service"), re.MULTILINE | re.DOTALL)
    assert check
    *command, code = json.loads(check[1].replace("\\\n", ""))
    assert command == ["python", "-c"]
    for status in (200, 503):
        responses["/healthz"] = status, ""
        assert is_healthy(code, port) == (status == 200)


def test_the_health_check_of_workers_needs_models_and_a_recent_heartbeat(health: Responses) -> None:
    port, responses = health
    (code,) = {SERVICES[f"worker-{lane}"]["healthcheck"]["test"][-1] for lane in Lane}
    for loading, silence_s, healthy in ((0, 1, True), (1, 1, False), (0, 90, False), (0, time.time(), False)):
        metrics = WorkerMetrics()
        metrics.state.labels("loading").set(loading)
        metrics.heartbeat.set(time.time() - silence_s)
        responses["/metrics"] = 200, generate_latest(metrics.registry).decode()
        assert is_healthy(code, port) == healthy


def test_the_clients_of_the_queue_are_restarted_when_it_is_recreated() -> None:
    clients = {name: spec for name, spec in SERVICES.items() if "NCML_REDIS_PASSWORD_FILE" in environment(spec)}
    assert clients.keys() == {"service", "worker-score", "worker-generate"}
    for spec in clients.values():
        assert spec["depends_on"] == {"valkey": {"condition": "service_healthy", "restart": True}}


def environment(spec: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in spec.get("environment", {}).items() if name.startswith("NCML_")}


def test_every_variable_is_read_by_a_program() -> None:
    settings = {f"NCML_{name.upper()}" for name in Settings.model_fields}
    sources = [path.read_text() for folder in ("ncml", "worker") for path in (ROOT / folder).rglob("*.py")]
    elsewhere = {name for text in sources for name in re.findall(r"\"(NCML_[A-Z_]+)\"", text)}
    for path in (COMPOSE, *OVERRIDES):
        for name, spec in compose(path)["services"].items():
            assert environment(spec).keys() <= (settings if name == "service" else elsewhere), (path.name, name)
    assert environment(SERVICES["worker-score"]).keys() == {"NCML_REDIS_URL", "NCML_REDIS_PASSWORD_FILE"}
    assert environment(SERVICES["service"]).keys() == {"NCML_REDIS_URL", "NCML_REDIS_PASSWORD_FILE"}
    image = dict(re.findall(r"(\w+)=(\S+)", re.findall(r"^ENV (.*)$", stage("worker"), re.MULTILINE)[0]))
    assert "NCML_MODELS" in elsewhere
    assert image["NCML_MODELS"].split(":") == ["/app/models", "/models"]  # those shipped come first


def test_every_command_is_parsed_by_its_program() -> None:
    service(instruction("service", "CMD"))
    entrypoint = instruction("worker", "ENTRYPOINT")
    ncml(entrypoint + instruction("worker", "CMD"))
    count = 0
    for path in (COMPOSE, ROOT / "docker" / "compose.gpu.yml"):
        for name, spec in compose(path)["services"].items():
            if name in OURS and ("command" in spec or "entrypoint" in spec):
                command = spec.get("command", SERVICES[name]["command"])
                ncml(filled(spec.get("entrypoint", entrypoint) + command))
                count += 1
    assert count == 6


def test_workers_on_gpus_have_the_same_options() -> None:
    for name, spec in compose(ROOT / "docker" / "compose.gpu.yml")["services"].items():
        if name != "train":
            assert spec["command"] == [*SERVICES[name]["command"], "--device", "cuda"]


def test_training_has_as_many_threads_as_cores() -> None:
    """PyTorch would start one for each core of the host, which wait for each other within the limit on cores."""
    threads, cores = SERVICES["train"]["environment"]["OMP_NUM_THREADS"], SERVICES["train"]["cpus"]
    assert (threads, cores) == ("${NCML_TRAIN_THREADS:-2}", "${NCML_TRAIN_CPUS:-2}")


def test_models_are_written_by_training_and_read_by_workers() -> None:
    assert "models:/models" in SERVICES["train"]["volumes"]
    for lane in ("score", "generate"):
        assert SERVICES[f"worker-{lane}"]["volumes"] == ["models:/models:ro", "password:/run/queue:ro"]
    assert "models" not in str(SERVICES["service"])


def test_overrides_change_existing_services() -> None:
    names = ["calibrate", "external", "gpu", "hosts", "keys", "webhooks"]
    assert [path.name for path in OVERRIDES] == [f"compose.{name}.yml" for name in names]
    for path in OVERRIDES:
        assert compose(path)["services"].keys() <= SERVICES.keys()


@pytest.mark.parametrize("arguments", ["", *(path.name for path in OVERRIDES)])
def test_compose_itself_accepts_the_files(arguments: str, tmp_path: Path) -> None:
    if not works(["docker", "compose", "version"]):
        pytest.skip(NO_COMPOSE)
    files = [COMPOSE, *(path for path in OVERRIDES if path.name == arguments)]
    url = "rediss://queue.example:6379/0" if arguments == "compose.external.yml" else ""
    settings = {"NCML_REDIS_PASSWORD": "secret", "NCML_QUEUE_ADDRESS": "192.0.2.1", "NCML_API_KEYS": str(tmp_path)}
    settings |= {"NCML_REDIS_URL": url, "NCML_QUEUE_SECRETS": str(tmp_path), "NCML_WEBHOOK_SECRETS": str(tmp_path)}
    command = ["docker", "compose", *(word for path in files for word in ("-f", path)), "--profile", "*", "config"]
    config = yaml.safe_load(run([*command], env=os.environ | settings, cwd=ROOT))
    assert config["services"].keys() == SERVICES.keys()
    for name in ("service", "worker-score", "worker-generate"):
        variables = config["services"][name]["environment"]
        assert variables["NCML_REDIS_URL"] == (url or "redis://valkey:6379/0")
        mounts = [mount["target"] for mount in config["services"][name]["volumes"]]
        assert str(Path(variables["NCML_REDIS_PASSWORD_FILE"]).parent) in mounts
    assert config["services"]["valkey"]["environment"] == {"QUEUE_PASSWORD": "secret"}
    image = "ncml-worker:cuda" if arguments == "compose.gpu.yml" else "ncml-worker"
    assert {config["services"][name]["image"] for name in OURS[1:]} == {image}


def test_a_queue_for_other_hosts_is_not_opened_without_a_password() -> None:
    if not works(["docker", "compose", "version"]):
        pytest.skip(NO_COMPOSE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NCML_")}
    environment["NCML_QUEUE_ADDRESS"] = "192.0.2.1"
    hosts = ROOT / "docker" / "compose.hosts.yml"
    command = ["docker", "compose", "-f", COMPOSE, "-f", hosts, "config"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode
    assert "needs a password" in done.stderr


def test_only_the_worker_that_calibrates_writes_models() -> None:
    services = compose(ROOT / "docker" / "compose.calibrate.yml")["services"]
    for spec in services.values():
        assert spec["environment"] == {"NCML_ALLOW_CALIBRATION": "1"}
    assert {name: spec["volumes"] for name, spec in services.items() if "volumes" in spec} == {
        "worker-generate": ["models:/models"]
    }


def test_keys_are_mounted_by_their_folder() -> None:
    """A file that an editor replaces is noticed only in a mounted folder."""
    service = compose(ROOT / "docker" / "compose.keys.yml")["services"]["service"]
    (mount,) = service["volumes"]
    assert (mount["type"], mount["read_only"], mount["bind"]) == ("bind", True, {"create_host_path": False})
    assert service["environment"] == {"NCML_API_KEYS_FILE": f"{mount['target']}/keys"}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert mount["source"] == "${NCML_API_KEYS:-./api-keys}"
    assert "/api-keys" in ignored


def test_the_secret_of_webhooks_is_mounted_for_the_service_alone() -> None:
    services = compose(ROOT / "docker" / "compose.webhooks.yml")["services"]
    assert services.keys() == {"service"}
    (mount,) = services["service"]["volumes"]
    assert (mount["type"], mount["read_only"], mount["bind"]) == ("bind", True, {"create_host_path": False})
    assert services["service"]["environment"] == {"NCML_WEBHOOK_SECRET_FILE": f"{mount['target']}/secret"}
    assert mount["source"] == "${NCML_WEBHOOK_SECRETS:-./webhook-secrets}"


def test_secret_and_large_files_are_not_copied_into_the_images() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKER, re.MULTILINE) for word in line.split()}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    secrets = {"/ncml.env", ".env", "/api-keys", "/queue-secrets", "/webhook-secrets"}
    assert secrets <= set((ROOT / ".gitignore").read_text().split())


def test_the_service_accepts_its_own_host_names() -> None:
    default = re.search(r"^NCML_ALLOWED_HOSTS=\$\{NCML_ALLOWED_HOSTS:-(.*)\}$", SERVICE_ENV.read_text(), re.MULTILINE)
    assert default
    assert Settings(allowed_hosts=default[1]).allowed_hosts == ("localhost", "127.0.0.1", "[::1]", "service")


def test_settings_in_ncml_env_take_precedence(tmp_path: Path) -> None:
    assert SERVICES["service"]["env_file"][-1]["path"] == "ncml.env"
    if not works(["docker", "compose", "version"]):
        pytest.skip(NO_COMPOSE)
    (tmp_path / "docker").mkdir()
    for path in (COMPOSE, SERVICE_ENV):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NCML_")}

    def allowed_hosts(**more: str) -> str:
        config = yaml.safe_load(run(["docker", "compose", "config"], env=variables | more, cwd=tmp_path))
        return config["services"]["service"]["environment"]["NCML_ALLOWED_HOSTS"]

    assert allowed_hosts() == '["localhost", "127.0.0.1", "[::1]", "service"]'
    assert allowed_hosts(NCML_ALLOWED_HOSTS='["shell.example", "b"]') == '["shell.example", "b"]'
    (tmp_path / "ncml.env").write_text('NCML_ALLOWED_HOSTS=["file.example", "c"]\n')
    assert allowed_hosts(NCML_ALLOWED_HOSTS='["shell.example"]') == '["file.example", "c"]'
