"""The files under test, read once, and helpers that several tests share."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SERVICE_ENV = ROOT / "docker" / "service.env"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "ncml.json"
ALERTS = ROOT / "docker" / "prometheus" / "alerts.yml"


def compose(path: Path = COMPOSE) -> dict[str, Any]:
    """Return a compose file as YAML, with merges resolved and variables unexpanded."""
    return yaml.safe_load(path.read_text())


def base_images(profiles: tuple[str, ...]) -> list[str]:
    """Return third-party images: those of services with one of the profiles, or of services without a profile."""
    specs = compose()["services"].values()
    started = [s for s in specs if (set(s.get("profiles", ())) & set(profiles) if profiles else "profiles" not in s)]
    images = {spec["image"] for spec in started if "build" not in spec}
    text = DOCKERFILE.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)$", text, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    if not profiles:
        froms = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        images |= {re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], name) for name in froms if name not in stages}
    return sorted(images)


def expressions() -> Iterator[str]:
    """Return every PromQL expression of the dashboard and the alerts, with Grafana's own variable replaced."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "1m")
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
