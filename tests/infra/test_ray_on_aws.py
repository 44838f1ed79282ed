"""The Ray cluster file for AWS: by Ray's own schema, as Ray's launcher fills it in."""

import ast
import copy
import json
import shlex
import string
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra" / "aws" / "ray-cluster.yaml"
RAY_SCHEMA = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
FILLED_IN = {
    "AWS_REGION": "eu-central-1",
    "IMAGE": "your-registry/face-diffuser:latest",
    "AMI": "ami-0123456789abcdef0",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
}


@pytest.fixture
def cluster() -> dict:
    # What envsubst does with the variables that the file's head names; Ray's own, $RAY_HEAD_IP, stays.
    return yaml.safe_load(string.Template(FILE.read_text()).safe_substitute(FILLED_IN))


def _workers(cluster: dict) -> dict[str, dict]:
    return {name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def _validate(cluster: dict) -> None:
    jsonschema.validate(cluster, json.loads(RAY_SCHEMA.read_text()))


def test_it_is_a_ray_cluster_file(cluster):
    _validate(cluster)


def test_a_mistake_is_seen(cluster):
    broken = copy.deepcopy(cluster)
    broken["max_worker"] = broken.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        _validate(broken)


def test_rays_launcher_fills_it_in(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == cluster["available_node_types"].keys()
    assert prepared["docker"]["image"] == FILLED_IN["IMAGE"]


def test_no_worker_stands_idle_and_the_whole_has_a_bound(cluster):
    workers = _workers(cluster)
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert 0 < sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]


def test_workers_have_gpus_and_the_first_are_spot(cluster):
    assert all(node["node_config"]["InstanceType"].startswith(("g", "p")) for node in _workers(cluster).values())
    assert all(node["resources"]["GPU"] == 1 for node in _workers(cluster).values())
    spot = cluster["available_node_types"]["gpu-spot"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert spot["max_workers"] > 0


def test_every_node_has_a_role_and_no_key_is_written(cluster):
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"] == {"Name": "face-diffuser-ray"}
    assert "AWS_SECRET" not in FILE.read_text()
    assert "KeyName" not in FILE.read_text()


def test_the_head_takes_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert any("--head" in line and "--num-cpus=0" in line for line in cluster["head_start_ray_commands"])


def test_the_cluster_asks_for_its_token(cluster):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert f"--env RAY_AUTH_TOKEN={FILLED_IN['RAY_AUTH_TOKEN']}" in cluster["docker"]["run_options"]


def test_head_and_workers_meet_at_one_port(cluster):
    assert any("--head --port=6379" in line for line in cluster["head_start_ray_commands"])
    assert any("--address=$RAY_HEAD_IP:6379" in line for line in cluster["worker_start_ray_commands"])


def test_what_is_to_be_filled_in_is_what_the_head_of_the_file_says():
    text = FILE.read_text()
    found = {match["named"] or match["braced"] for match in string.Template.pattern.finditer(text)} - {None}
    assert found - {"RAY_HEAD_IP"} == set(FILLED_IN)
    (line,) = [line for line in text.splitlines() if "envsubst" in line]
    assert all(f"${name}" in line for name in FILLED_IN)


def test_what_every_node_imports_is_in_the_package(cluster):
    found = []
    for line in cluster["setup_commands"]:
        words = shlex.split(line)
        assert words[:2] == ["python", "-c"]
        found += [
            name.name for one in ast.walk(ast.parse(words[2])) if isinstance(one, ast.Import) for name in one.names
        ]
    own = [name for name in found if (ROOT / name.split(".")[0]).is_dir()]
    # A wheel has no other module of its own at its top than this one, wherever the node's Python stands.
    assert own and {name.split(".")[0] for name in own} == {"facediffuser"}
    assert all(find_spec(name) for name in found)
