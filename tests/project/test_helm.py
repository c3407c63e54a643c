"""The Helm chart: linted and rendered by Helm itself, each object held to Kubernetes' schemas."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from onebase_edge.cross_site import host_name
from onebase_edge.settings import Settings, load_settings
from onebase_route.options import REPLICA_KEY, route_parser

helm = pytest.importorskip(
    "helm_python", reason="Helm's library is not installed: pip install helm-python-sdk"
)

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/onebase"
EVERYTHING = {
    "ingress": {"enabled": True, "host": "llm.example.com", "tlsSecret": "tls", "className": "nginx"},
    "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 5},
    "podMonitor": {"enabled": True},
    "alerts": {"enabled": True},
    "externalSecret": {
        "enabled": True,
        "store": {"name": "vault"},
        "data": {
            "PGPASSWORD": {"key": "onebase", "property": "pgpassword"},
            "ONEBASE_REPLICA_KEY": {"key": "onebase/admin"},
        },
    },
    "s3": {"endpoint": "http://minio.minio:9000", "port": 9000},
    "postgres": {"port": 6432},
    "settings": {"max_sequences": 128, "kv_dtype": "int8"},
    "pullSecrets": [{"name": "registry"}],
    "server": {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"operator": "Exists"}]},
    "route": {"replicas": 2},
}
Objects = dict[str, dict[str, Any]]


def rendered(values: dict[str, Any] | None = None) -> Objects:
    """Objects by kind and name."""
    files = helm.Chart.load(str(CHART)).render(values or {}, name="onebase", namespace="models")
    found: Objects = defaultdict(dict)
    for path, text in files.items():
        if path.endswith(".yaml"):
            for one in filter(None, yaml.safe_load_all(text)):
                found[one["kind"]][one["metadata"]["name"]] = one
    return found


def pod(objects: Objects, kind: str, name: str) -> Any:
    return objects[kind][name]["spec"]["template"]["spec"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["plain", "everything"])
def test_helm_finds_nothing_to_say_and_kubernetes_knows_every_object(values: dict[str, Any]) -> None:
    report = helm.lint(str(CHART), values, strict=True, namespace="models")
    found = [one for one in report.get("messages") or [] if one["severity"] > 1]
    assert (found, report.get("errors") or []) == ([], [])
    objects = rendered(values)
    own = {"PodMonitor", "PrometheusRule", "ExternalSecret"}  # of other operators
    for kind, named in objects.items():
        for one in named.values():
            if kind not in own:
                kubernetes_validate.validate(one, "1.34", strict=True)
    assert (own <= objects.keys()) == bool(values)


def test_the_route_knows_every_server_that_there_may_be_by_a_name_that_its_pod_has() -> None:
    for values, servers in (({}, 2), (EVERYTHING, 5)):
        objects = rendered(values)
        (stateful,) = objects["StatefulSet"].values()
        container = pod(objects, "Deployment", "onebase-route")["containers"][0]
        options = route_parser().parse_args(container["args"])
        name, service = stateful["metadata"]["name"], stateful["spec"]["serviceName"]
        assert options.replica == [f"http://{name}-{number}.{service}:8000" for number in range(servers)]
        assert objects["Service"][service]["spec"]["clusterIP"] == "None"
        assert {"onebase", "onebase.models.svc"} <= set(options.allowed_host)
        assert ("replicas" in stateful["spec"]) == (not values)


@pytest.mark.parametrize("own", [[], ["llm.example.com", "other"]])
def test_each_server_is_let_in_by_the_name_by_which_the_route_calls_it(own: list[str]) -> None:
    objects = rendered(EVERYTHING | {"settings": {"allowed_host": ",".join(own)} if own else {}})
    route, server = (
        pod(objects, kind, name)["containers"][0]
        for kind, name in (("Deployment", "onebase-route"), ("StatefulSet", "onebase"))
    )
    environment = {one["name"]: one for one in server["env"]}
    assert environment["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert list(environment).index("POD_NAME") < list(environment).index("ONEBASE_ALLOWED_HOST")
    for number, url in enumerate(route_parser().parse_args(route["args"]).replica):
        value = environment["ONEBASE_ALLOWED_HOST"]["value"].replace("$(POD_NAME)", f"onebase-{number}")
        data = objects["ConfigMap"]["onebase"]["data"] | {"ONEBASE_ALLOWED_HOST": value}
        assert load_settings({}, data).allowed_host == (host_name(url.partition("://")[2]), *own)


def test_the_route_gets_the_admins_key_and_believes_the_proxies_that_are_named() -> None:
    for values, proxies in (({}, None), ({"route": {"trustedProxies": ["10.0.0.0/8", "10.9.0.1"]}}, 2)):
        container = pod(rendered(values), "Deployment", "onebase-route")["containers"][0]
        assert [one["name"] for one in container["env"]] == [REPLICA_KEY]
        trusted = route_parser().parse_args(container["args"]).trusted_proxy
        assert (None if trusted is None else len(trusted)) == proxies


VAULT: dict[str, Any] = EVERYTHING["externalSecret"]


def test_a_vault_fills_the_secret_that_servers_and_the_route_read() -> None:
    objects = rendered(EVERYTHING)
    (asked,) = objects["ExternalSecret"].values()
    assert asked["apiVersion"] == "external-secrets.io/v1"
    spec = asked["spec"]
    assert spec["secretStoreRef"] == {"kind": "ClusterSecretStore", "name": "vault"}
    assert {one["secretKey"]: one["remoteRef"] for one in spec["data"]} == VAULT["data"]
    server = pod(objects, "StatefulSet", "onebase")["containers"][0]
    (route,) = pod(objects, "Deployment", "onebase-route")["containers"][0]["env"]
    assert {"secretRef": {"name": spec["target"]["name"]}} in server["envFrom"]
    key = route["valueFrom"]["secretKeyRef"]
    assert key["name"] == spec["target"]["name"]
    assert key["key"] in VAULT["data"]


@pytest.mark.parametrize(("missing", "value"), [("store", {"name": ""}), ("data", {})])
def test_a_vault_without_a_store_or_keys_is_refused(missing: str, value: dict[str, str]) -> None:
    with pytest.raises(Exception, match=f"externalSecret.{missing}"):
        rendered({"externalSecret": VAULT | {missing: value}})


def test_servers_get_settings_that_they_know_and_the_time_to_drain() -> None:
    objects = rendered(EVERYTHING)
    data = objects["ConfigMap"]["onebase"]["data"]
    known = {f"ONEBASE_{field.name.upper()}" for field in fields(Settings)}
    assert {name for name in data if name.startswith("ONEBASE_")} <= known
    settings = load_settings({}, data)
    assert (settings.max_sequences, settings.kv_dtype) == (128, "int8")
    assert data["AWS_ENDPOINT_URL"] == "http://minio.minio:9000"
    for kind, name in (("StatefulSet", "onebase"), ("Deployment", "onebase-route")):
        spec = pod(objects, kind, name)
        before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] >= settings.drain_timeout + before + 10
        confined = spec["containers"][0]["securityContext"]
        assert confined["readOnlyRootFilesystem"]
        assert not confined["allowPrivilegeEscalation"]
        assert spec["securityContext"]["runAsNonRoot"]


def test_servers_are_let_out_to_the_store_and_the_database_where_they_are() -> None:
    for values, wanted in (({}, {443, 5432}), (EVERYTHING, {443, 9000, 6432})):
        policies = rendered(values)["NetworkPolicy"]
        ports = [
            one["port"] for rule in policies["onebase-servers"]["spec"]["egress"] for one in rule["ports"]
        ]
        assert wanted <= set(ports)
        assert len(ports) == len({*ports, "UDP"})  # each once, but names by UDP too
    assert "NetworkPolicy" not in rendered({"networkPolicy": {"enabled": False}})


def test_a_change_replaces_one_server_at_a_time_and_never_the_last_route() -> None:
    objects = rendered(EVERYTHING)
    assert objects["StatefulSet"]["onebase"]["spec"]["updateStrategy"] == {"type": "RollingUpdate"}
    route = objects["Deployment"]["onebase-route"]["spec"]
    assert route["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert {one["spec"]["maxUnavailable"] for one in objects["PodDisruptionBudget"].values()} == {1}
    before, after = (
        rendered({"settings": {"max_sequences": rows}})["StatefulSet"]["onebase"]["spec"]["template"][
            "metadata"
        ]
        for rows in (1, 2)
    )
    assert before["annotations"] != after["annotations"]  # or pods would not get new settings


def test_metrics_that_alerts_and_scaling_ask_for_are_those_of_the_dashboard() -> None:
    objects = rendered(EVERYTHING)
    text = yaml.safe_dump([objects["PrometheusRule"], objects["HorizontalPodAutoscaler"]])
    asked = set(re.findall(r"\b(?:vllm:|onebase_)\w+", text))
    dashboard = (ROOT / "deploy/grafana/onebase.json").read_text(encoding="utf-8")
    assert asked
    assert {name for name in asked if name not in dashboard} == set()


@pytest.mark.parametrize("missing", ["registry", "store"])
def test_what_servers_share_has_to_be_named(missing: str) -> None:
    with pytest.raises(Exception, match=f"{missing}: servers share"):
        rendered({missing: ""})
