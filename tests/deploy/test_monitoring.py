"""Dashboard and alerts query existing metrics, and Prometheus' own tools confirm that alerts fire when they should."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.service_metrics import Metrics
from tests.deploy.engine import run
from tests.deploy.files import ALERTS, DASHBOARD, ROOT, compose, expressions
from tests.deploy.test_kubernetes import FOLDER
from tests.packages import lacking
from worker.metrics import WorkerMetrics
from worker.queue import JobQueue

PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
"""Labels and series that Prometheus adds."""


def measured(*registries: CollectorRegistry) -> dict[str, set[str]]:
    """Return every series by name, with its labels."""
    labels_of_series: dict[str, set[str]] = {}
    for registry in registries:
        for collector in registry._collector_to_names:
            names = {family.name: family.type for family in collector.collect()}
            labels = set(getattr(collector, "_labelnames", ()))
            for family in collector.collect():
                labels |= {label for sample in family.samples for label in sample.labels} - {"le"}
            for name, kind in names.items():
                suffixes = {"counter": ("_total",), "histogram": ("_sum", "_count", "_bucket")}.get(kind, ("",))
                for suffix in suffixes:
                    extra = {"le"} if suffix == "_bucket" else set()
                    labels_of_series.setdefault(name + suffix, {"job", "instance"}).update(labels | extra)
    return labels_of_series


@pytest.fixture(scope="module")
def series(valkey_server: Any) -> dict[str, set[str]]:
    """Return all series of the service and the workers."""
    queue = JobQueue.from_url(valkey_server.url)
    series = measured(Metrics(queue).registry, WorkerMetrics().registry)
    queue.close()
    return series


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Return the series that an expression queries."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs"):
        if (child := getattr(node, name, None)) is not None and not isinstance(child, str):
            yield from selectors(child)
    for argument in getattr(node, "args", ()) or ():
        yield from selectors(argument)


def labels_of(node: promql_parser.VectorSelector) -> set[str]:
    return {matcher.name for matcher in node.matchers.matchers}


def scaling() -> Iterator[str]:
    for document in yaml.safe_load_all((FOLDER / "keda" / "scaledobjects.yaml").read_text()):
        yield from (trigger["metadata"]["query"] for trigger in document["spec"]["triggers"])


def test_every_expression_queries_existing_metrics(series: dict[str, set[str]]) -> None:
    labels_of_series = series | PROMETHEUS
    queried: set[str] = set()
    for expression in (*expressions(), *scaling()):
        nodes = list(selectors(promql_parser.parse(expression)))
        mentioned = set(re.findall(r"\bncml_\w+", re.sub(r'"[^"]*"', "", expression)))
        assert mentioned <= {node.name for node in nodes}, expression  # no selector was overlooked
        for node in nodes:
            assert node.name in labels_of_series, f"{node.name} is not measured: {expression}"
            assert labels_of(node) <= labels_of_series[node.name], expression
        grouped = {
            word for group in re.findall(r"by \(([^)]*)\)", expression) for word in group.replace(",", " ").split()
        }
        assert grouped <= set().union(*(labels_of_series[node.name] for node in nodes)), expression
        queried |= {node.name for node in nodes}
    families = {re.sub(r"_(sum|count|bucket)$", "", name) for name in queried}
    unseen = {re.sub(r"_(sum|count|bucket)$", "", name) for name in series} - families
    assert unseen <= {"ncml_worker_state"}, "measured, but on no dashboard"


def test_a_metric_that_does_not_exist_is_detected(series: dict[str, set[str]]) -> None:
    (node,) = selectors(promql_parser.parse('sum by (le) (rate(ncml_job_waits_bucket{task="score"}[5m]))'))
    assert node.name not in series
    assert labels_of(node) == {"task"}


def test_queried_label_values_occur(series: dict[str, set[str]]) -> None:
    metrics = WorkerMetrics()
    metrics.ood_p_value.labels("m").observe(0.5)
    [family] = [f for f in metrics.registry.collect() if f.name == "ncml_ood_p_value"]
    bounds = {sample.labels["le"] for sample in family.samples if "le" in sample.labels}
    text = "\n".join(expressions())
    queried = set(re.findall(r'le="([\d.]+)"', text))
    assert queried
    assert queried <= bounds
    sources = "\n".join(path.read_text() for folder in ("worker", "service") for path in (ROOT / folder).rglob("*.py"))
    for label in ("reason", "verdict", "outcome", "state"):
        for values in re.findall(rf'\b{label}!?=~?"([\w|-]+)"', text):
            assert all(re.search(rf'"{value}"', sources) for value in values.split("|")), values


def provisioned(kind: str) -> list[dict[str, Any]]:
    """Return the data sources, or the dashboard providers, of Grafana's provisioning."""
    (path,) = (ROOT / "docker" / "grafana" / "provisioning" / kind).iterdir()
    return yaml.safe_load(path.read_text())["datasources" if kind == "datasources" else "providers"]


def test_grafana_accepts_the_dashboard() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    (source,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    mounts = dict(mount.split(":")[:2] for mount in compose()["services"]["grafana"]["volumes"])
    (provider,) = provisioned("dashboards")
    assert mounts[f"./{DASHBOARD.parent.relative_to(ROOT)}"] == provider["options"]["path"]
    home = compose()["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert {t["datasource"]["uid"] for t in panel["targets"]} == {source["uid"]}
    titles = " ".join(panel["title"] for panel in panels).lower()
    topics = ("queue", "latency", "batch", "gpu", "bits per dimension", "out-of-distribution")
    assert all(topic in titles for topic in topics)


def test_targets_are_the_containers_and_their_ports() -> None:
    configuration = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    services = compose()["services"]
    for job in configuration["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        for name in discovery["names"]:
            spec = services[name]
            if name == "service":
                assert spec["ports"][0].endswith(f":{discovery['port']}")
            else:
                assert spec["command"][spec["command"].index("--metrics-port") + 1] == str(discovery["port"])
    assert configuration["rule_files"] == [ALERTS.name]
    (source,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"


def test_alerts_have_a_remedy() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    operate = (ROOT / "docs" / "operate.md").read_text()
    for rule in rules:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"].endswith(".")
        assert f"`{rule['alert']}`" in operate, "every alert is explained"
    assert set(re.findall(r"`(Ncml\w+)`", operate)) == {rule["alert"] for rule in rules}


def promtool() -> str:
    program = shutil.which("promtool")
    if not program:
        pytest.skip(lacking("promtool is missing", "prometheus"))
    return program


def test_prometheus_accepts_the_configuration() -> None:
    output = run([promtool(), "check", "config", ROOT / "docker" / "prometheus" / "prometheus.yml"])
    assert "SUCCESS: 15 rules found" in output


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    cases = tmp_path / "cases.yml"
    text = Path(__file__).with_name("alerts_test.yml").read_text()
    cases.write_text(text.replace("alerts.yml", str(ALERTS)))
    tried = set(re.findall(r"alertname: (\w+)", text))
    assert tried == {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert "SUCCESS" in run([promtool(), "test", "rules", cases])
