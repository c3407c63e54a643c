"""What deploy/ says of the server is true of it. That its files are well formed, `make lint` checks."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from onebase_edge.cross_site import host_name
from onebase_edge.settings import Settings, load_settings
from onebase_route.options import REPLICA_KEY, route_parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".service"))
OTHERS = {"CACHE", "PORT", "API_KEY", "IMAGE", REPLICA_KEY.removeprefix("ONEBASE_")}
"""Of the cache, the image's own, of clients, of compose.yaml, and of `onebase route`."""
DRAIN = next(field.default for field in fields(Settings) if field.name == "drain_timeout")
USER = 10001


def manifest(kind: str) -> Any:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/cpu/onebase.yaml").read_text(encoding="utf-8"))
    return next(one for one in documents if one["kind"] == kind)


def test_there_are_files_for_compose_kubernetes_and_systemd() -> None:
    assert {"compose.yaml", "onebase.yaml", "onebase.service"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_each_setting_that_is_named_is_one_of_the_servers(path: Path) -> None:
    known = {field.name.upper() for field in fields(Settings)} | OTHERS
    named = set(re.findall(r"\bONEBASE_([A-Z_]+)\b", path.read_text(encoding="utf-8")))
    assert named <= known


def test_whoever_ends_the_server_waits_until_running_requests_have_finished() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= DRAIN + before + 10
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert int(compose["services"]["onebase"]["stop_grace_period"].removesuffix("s")) >= DRAIN + 10
    unit = (DEPLOY / "onebase.service").read_text(encoding="utf-8")
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) >= DRAIN + 10


def test_two_servers_in_compose_share_what_servers_share_and_are_known_to_the_route() -> None:
    made = yaml.safe_load((DEPLOY / "compose.servers.yaml").read_text(encoding="utf-8"))
    services = made["services"]
    servers = {name: one for name, one in services.items() if name.startswith("server-")}
    command = services["route"]["entrypoint"]
    options = route_parser().parse_args(command[2:])
    assert options.replica == [f"http://{name}:8000" for name in servers]
    assert {"--replica", "--host"} <= set(command)
    data = [one["volumes"][0].partition(":")[0] for one in servers.values()]
    assert len(set(data)) == len(servers) == 2  # a data folder each
    subnet = made["networks"]["default"]["ipam"]["config"][0]["subnet"]
    assert REPLICA_KEY in services["route"]["environment"]
    for one, url in zip(servers.values(), options.replica, strict=True):
        settings = one["environment"]
        allowed = load_settings({}, {"ONEBASE_ALLOWED_HOST": settings["ONEBASE_ALLOWED_HOST"]}).allowed_host
        assert host_name(url.partition("://")[2]) in allowed
        assert settings["ONEBASE_TRUSTED_PROXY"] == subnet
        assert settings["AWS_ENDPOINT_URL"] == "http://minio:9000"
        assert settings["ONEBASE_STORE"].startswith("s3://onebase/")
        assert int(one["stop_grace_period"].removesuffix("s")) >= DRAIN + 10


def test_a_process_that_is_killed_for_memory_does_not_end_the_service() -> None:
    assert "\nOOMPolicy=continue\n" in (DEPLOY / "onebase.service").read_text(encoding="utf-8")


def test_open_webui_is_not_given_the_admins_key() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert "ONEBASE_API_KEY" not in str(services["open-webui"])


def test_a_pod_runs_as_the_images_user_and_writes_only_where_the_image_keeps_things() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {USER}:{USER}" in image
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert {pod["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    kept = re.findall(r"^VOLUME (.+)$", image, re.MULTILINE)[0].split()
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {*kept, "/tmp"}


def test_the_names_by_which_pods_call_the_service_are_let_in() -> None:
    service = manifest("Service")["metadata"]["name"]
    allowed = manifest("ConfigMap")["data"]["ONEBASE_ALLOWED_HOST"].split(",")
    assert {service, f"{service}.onebase", f"{service}.onebase.svc"} <= set(allowed)


@pytest.mark.parametrize("name", ["onebase-1.0-py3-none-manylinux_2_28_x86_64.whl", "onebase-1.0.tar.gz"])
def test_a_release_installs_the_one_distribution_that_has_a_pytorch(tmp_path: Path, name: str) -> None:
    """Also next to a wheel for musl, which cibuildwheel builds as well."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / name).touch()
    if name.endswith(".whl"):
        (tmp_path / "dist/onebase-1.0-py3-none-musllinux_1_2_x86_64.whl").touch()
    script = next(step["run"] for step in workflow["jobs"]["serve"]["steps"] if "run" in step)
    installed = re.search(r"pip install (\"\$\(.*\[server\]\")", script)
    assert installed
    told = subprocess.run(
        ["sh", "-ec", f"printf %s {installed[1]}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == f"{tmp_path}/dist/{name}[server]"
