"""Everything that docs/operate.md names exists: files, variables, metrics, endpoints, commands of Compose.

tests/docs checks its settings, targets, and commands of ncml, like those of every page.
"""

import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from service import server
from service.app import create_app
from service.settings import Settings
from tests.deploy.engine import NO_COMPOSE, run, works
from tests.deploy.files import COMPOSE, ROOT, SERVICE_ENV, compose
from tests.deploy.test_compose import OVERRIDES
from tests.packages import require
from worker.main import main as worker
from worker.queue import JobQueue

TEXT = (ROOT / "docs" / "operate.md").read_text()
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
LINES = [
    re.sub(r"\s{2,}#.*", "", line.strip()) for language, block in BLOCKS if not language for line in block.splitlines()
]
VARIABLES = {name for path in (COMPOSE, SERVICE_ENV, *OVERRIDES) for name in re.findall(r"\$\{(\w+)", path.read_text())}
SERVICES = compose()["services"]


def shell(first: str) -> list[list[str]]:
    """Return the commands that begin with a word, in blocks and in sentences, split, without variables before them."""
    commands = [re.sub(r"^(\w+=\S+ )+", "", line) for line in (*LINES, *QUOTED)]
    return [shlex.split(line) for line in commands if line.startswith(f"{first} ")]


def test_exactly_the_variables_of_the_compose_files_are_documented() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", TEXT, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)} == VARIABLES


def test_every_file_exists() -> None:
    named = [
        word for text in (*QUOTED, *LINES) for word in re.findall(r"(?<![\w/.-])(?:docker|tests|docs)/[\w./-]+", text)
    ]
    named += re.findall(r"\b(docker-compose\.yml|CHANGELOG\.md)\b", TEXT)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_and_target_of_the_report_exists() -> None:
    report = (ROOT / "docs" / "report" / "service.md").read_text()
    modules = re.findall(r"python -m (tests[\w.]+)", report)
    files = re.findall(r"tests/[\w./]+", report) + [f"{module.replace('.', '/')}.py" for module in modules]
    assert len(files) > 4
    assert [name for name in files if not (ROOT / name).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make ([a-z-]+)`", report))


def test_every_service_profile_and_volume_exists() -> None:
    profiles = {profile for spec in SERVICES.values() for profile in spec.get("profiles", ())}
    assert set(re.findall(r"profile[s]? `(\w+)`|--profile (\w+)", TEXT)) <= {(p, "") for p in profiles} | {
        ("", p) for p in profiles
    }
    for name in re.findall(r"[Vv]olume `(\w+)`", TEXT):
        assert name in compose()["volumes"]
    for words in shell("docker"):
        if words[1] == "compose":
            operands = [w for w in words if w in SERVICES or re.fullmatch(r"worker-\w+(=\d+)?", w)]
            assert {operand.partition("=")[0] for operand in operands} <= SERVICES.keys()


def test_every_compose_command_exists() -> None:
    if not works(["docker", "compose", "version"]):
        pytest.skip(NO_COMPOSE)
    environment = os.environ | {"NCML_REDIS_PASSWORD": "secret", "NCML_QUEUE_ADDRESS": "192.0.2.1"}
    count = 0
    for words in shell("docker"):
        if words[1] == "compose":
            # Its own word for "understood" is --help after the options; nothing is started.
            done = subprocess.run(
                [*words, "--help"] if "run" not in words else [*words[: words.index("train")], "--help"],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
            count += 1
    assert count > 8


def test_every_metric_and_endpoint_exists() -> None:
    sources = "\n".join(path.read_text() for folder in ("worker", "service") for path in (ROOT / folder).glob("*.py"))
    named = set(re.findall(r"`(ncml_\w+)`", TEXT))
    assert named
    assert [name for name in named if f'"{name}"' not in sources] == []
    paths = create_app(Settings(), JobQueue.from_url("redis://localhost")).openapi()["paths"]
    assert set(re.findall(r"`(/\w+z|/metrics)`", TEXT)) == {"/healthz", "/readyz", "/metrics"}
    assert {"/healthz", "/readyz", "/metrics"} <= paths.keys()


def test_manifests_in_the_text_are_those_of_the_folder() -> None:
    (block,) = [block for language, block in BLOCKS if language == "yaml"]
    example = yaml.safe_load(block)
    for path in example["resources"] + example["components"]:
        assert (ROOT / path.removeprefix("ncml/") / "kustomization.yaml").exists()
    base = yaml.safe_load((ROOT / "docker" / "k8s" / "base" / "kustomization.yaml").read_text())
    assert [image["name"] for image in example["images"]] == [image["name"] for image in base["images"]]


def test_workers_are_upgraded_before_the_service_and_rolled_back_after_it() -> None:
    upgrade, rollback = TEXT.partition("## Upgrades")[2].partition("\n## ")[0].split("To roll back, set")
    assert re.findall(r"rollout status deployment/([\w-]+)", upgrade) == ["worker-score", "worker-generate"]
    assert re.findall(r"new tag of `([\w-]+)`", upgrade) == ["ncml-worker", "ncml-service"]
    assert re.findall(r"old tag of `([\w-]+)`", rollback) == ["ncml-service", "ncml-worker"]
    assert re.findall(r"rollout status deployment/([\w-]+)", rollback) == ["ncml-service"]


def test_the_certificates_of_the_queue_pass_strict_verification(tmp_path: Path) -> None:
    """Python 3.13 and newer verify strictly."""
    require("openssl")
    for line in LINES:
        if line.startswith(("openssl ", "printf ")):
            run(["bash", "-c", line], cwd=tmp_path)
    verify = ["openssl", "verify", "-x509_strict", "-verify_hostname", "queue.example", "-CAfile", "ca.pem"]
    assert run([*verify, "server.pem"], cwd=tmp_path) == "server.pem: OK\n"


def test_the_requirements_of_a_queue_elsewhere_are_those_of_the_containers() -> None:
    (section,) = re.findall(r"^## Queue\n(.*?)^## ", (ROOT / "docs" / "configuration.md").read_text(), re.M | re.S)
    assert "Redis 7 or newer" in section
    assert any(path.read_text().startswith("#!lua flags=") for path in (ROOT / "worker" / "lua").glob("*.lua"))
    for option in ("maxmemory-policy noeviction", "appendonly yes"):
        assert f"`{option}`" in section
        assert f"--{option}" in SERVICES["valkey"]["command"]


def test_the_variable_of_the_proxy_is_read() -> None:
    assert "`FORWARDED_ALLOW_IPS`" in TEXT
    assert '"FORWARDED_ALLOW_IPS"' in inspect.getsource(server)


def test_figures_are_those_of_the_code() -> None:
    from worker.queue import RESULT_TTL_S
    from worker.worker import WorkerSettings

    lease_s = WorkerSettings.__dataclass_fields__["lease_s"].default
    assert f"the job's lease expires after {lease_s:g} s" in TEXT
    assert RESULT_TTL_S == 3600
    assert "Results expire one hour after their job ends" in TEXT
    assert f"up to `--max-batch` images ({worker.__kwdefaults__['max_batch']})" in TEXT
    assert f"(after {worker.__kwdefaults__['drain_s']:g} s, its jobs return to the queue)" in TEXT
