"""The compose file is one by the Compose specification, and its services find each other."""

import json
import re
import string
from pathlib import Path
from urllib.parse import urlsplit

import compose_spec
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
FILE = INFRA / "docker-compose.yaml"
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)(?::\?[^}]*)?\}")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def services(compose) -> dict:
    return compose["services"]


def _environment(services: dict) -> dict[str, dict[str, str]]:
    return {name: service.get("environment", {}) for name, service in services.items()}


def _listening(services: dict) -> dict[str, set[int]]:
    """Return the ports that a service's command says it listens on."""
    found = {"postgres": {5432}}
    for name, service in services.items():
        words = " ".join(service.get("command", []))
        if "--address" not in words:
            found.setdefault(name, set()).update(int(port) for port in re.findall(r"port[= ](\d+)", words))
    return found


def _references(environment: dict[str, str]) -> list[tuple[str, int]]:
    """Return the (host, port) pairs that variables of a service name."""
    pairs = []
    for value in environment.values():
        plain = VARIABLE.sub("x", str(value))
        match = re.fullmatch(r"([a-z0-9-]+):(\d+)", plain)
        if match:
            pairs.append((match[1], int(match[2])))
        elif "://" in plain:
            url = urlsplit(plain)
            pairs.append((url.hostname, url.port))
    return pairs


def test_it_is_a_compose_file(compose):
    read = compose_spec.PyCompose.from_json(json.dumps(compose))
    assert set(read.service_names()) == set(compose["services"])


@pytest.mark.parametrize("mistake", [{"imagee": "x"}, {"ports": ["http"]}, {"depends_on": {"s3": {"condition": "up"}}}])
def test_the_specification_refuses_a_mistake(compose, mistake):
    broken = {**compose, "services": {**compose["services"], "s3": {**compose["services"]["s3"], **mistake}}}
    with pytest.raises(ValueError):
        compose_spec.PyCompose.from_json(json.dumps(broken))


def test_services_wait_for_services_that_say_when_they_are_ready(services):
    for name, service in services.items():
        for other, wish in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if wish["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}"
            else:
                assert wish["condition"] == "service_completed_successfully"
                assert services[other]["restart"] == "no", f"{other} never ends, and {name} waits for its end"


def test_addresses_in_variables_are_services_that_listen_there(services):
    listening, checked = _listening(services), 0
    for name, environment in _environment(services).items():
        for host, port in _references(environment):
            if host == "127.0.0.1":  # the browser's view: a port published on the loopback address
                assert f"127.0.0.1:{port}:{port}" in services[name]["ports"]
            else:
                assert port in listening.get(host, set()), f"{name} looks for {host}:{port}"
            checked += 1
    assert checked >= 8


def test_workers_join_the_ray_head_where_it_listens(services):
    addresses = re.findall(r"--address=([a-z-]+):(\d+)", " ".join(services["ray-gpu-worker"]["command"]))
    assert addresses == [("ray-head", "6379")]
    assert 6379 in _listening(services)["ray-head"]


def test_every_ray_node_knows_the_token(services):
    nodes = {name for name, service in services.items() if "ray, start" in ", ".join(service.get("command", []))}
    for name in nodes | {"prefect-worker"}:
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" in services[name]["environment"]
    assert nodes == {"ray-head", "ray-gpu-worker"}


def test_ports_are_published_on_the_loopback_address_only(services):
    published = [(name, port) for name, service in services.items() for port in service.get("ports", [])]
    assert published
    for name, port in published:
        host, outside, inside = port.split(":")
        assert host == "127.0.0.1"
        assert outside == inside
        assert int(inside) in _listening(services)[name]


def test_prefect_knows_the_variables(services, prefect_variables):
    named = {
        key for environment in _environment(services).values() for key in environment if key.startswith("PREFECT_")
    }
    assert {"PREFECT_API_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL"} <= named
    assert named <= prefect_variables


def test_secrets_come_from_the_env_file_and_an_absent_one_stops_the_start():
    text = FILE.read_text()
    used = set(VARIABLE.findall(text))
    example = dict(line.split("=", 1) for line in (INFRA / ".env.example").read_text().splitlines() if "=" in line)
    assert used == set(example)
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
    assert required == used
    assert ".env" in (INFRA / ".gitignore").read_text().splitlines()


def test_the_s3_servers_configuration_is_json_once_filled_in(compose):
    content = compose["configs"]["s3"]["content"]
    filled = json.loads(string.Template(content).substitute(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret"))
    (identity,) = filled["identities"]
    assert identity["credentials"] == [{"accessKey": "key", "secretKey": "secret"}]
    (source,) = compose["services"]["s3"]["configs"]
    assert f"-s3.config={source['target']}" in compose["services"]["s3"]["command"]


def test_our_services_share_one_image_and_one_builds_it(compose, services):
    ours = {name for name, service in services.items() if service["image"].startswith("face-diffuser")}
    assert len({services[name]["image"] for name in ours}) == 1
    (builder,) = [service for service in services.values() if "build" in service]
    context = (INFRA / builder["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / builder["build"]["dockerfile"]).is_file()
    assert ours >= {"prefect-server", "prefect-worker", "ray-head", "ray-gpu-worker", "deploy", "make-bucket"}


def test_every_named_volume_is_used_and_every_used_one_is_named(compose, services):
    mounted = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert mounted == set(compose["volumes"])


def test_all_that_run_flows_see_the_same_out_folder(services):
    for name in ("prefect-worker", "ray-head", "ray-gpu-worker"):
        assert "out:/app/out" in services[name]["volumes"]


def test_the_work_pool_is_the_one_of_prefect_yaml(services):
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (pool,) = {deployment["work_pool"]["name"] for deployment in deployments}
    assert f"work-pool create {pool} --type process" in " ".join(services["deploy"]["command"])
    assert f"--pool {pool} --type process" in (INFRA / "start_worker.sh").read_text()
