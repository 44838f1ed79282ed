"""The KubeRay cluster: its pods by the schemas of Kubernetes, its own fields by KubeRay's documented ones."""

import copy
import re
import string
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra" / "kuberay" / "raycluster.yaml"
KUBERNETES = "1.33"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}  # Ray's start options are text, numbers too
COUNT = {"type": "integer", "minimum": 0}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}  # its inside is checked by Kubernetes' schema

# The fields of ray.io/v1 RayCluster as KubeRay's API reference lists them; an unknown field would be dropped unseen.
HEAD_GROUP = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayStartParams", "template"],
    "properties": {
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "headService": {"type": "object"},
        "enableIngress": {"type": "boolean"},
        "labels": TEXTS,
        "resources": TEXTS,
    },
}
WORKER_GROUP = {
    "type": "object",
    "additionalProperties": False,
    "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    "properties": {
        "groupName": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "numOfHosts": {"type": "integer", "minimum": 1},
        "idleTimeoutSeconds": COUNT,
        "suspend": {"type": "boolean"},
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
        "scaleStrategy": {"type": "object"},
        "labels": TEXTS,
        "resources": TEXTS,
    },
}
AUTOSCALER = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "version": {"enum": ["v1", "v2"]},
        "idleTimeoutSeconds": COUNT,
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
        "image": {"type": "string"},
        "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
        "resources": {"type": "object"},
        "securityContext": {"type": "object"},
        "env": {"type": "array"},
        "envFrom": {"type": "array"},
        "volumeMounts": {"type": "array"},
    },
}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["headGroupSpec"],
            "properties": {
                "rayVersion": {"type": "string"},
                "enableInTreeAutoscaling": {"type": "boolean"},
                "autoscalerOptions": AUTOSCALER,
                "headGroupSpec": HEAD_GROUP,
                "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
                "headServiceAnnotations": TEXTS,
                "gcsFaultToleranceOptions": {"type": "object"},
                "authOptions": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "mode": {"enum": ["disabled", "token"]},
                        "secretName": {"type": "string"},
                        "enableK8sTokenAuth": {"type": "boolean"},
                    },
                },
                "managedBy": {"type": "string"},
                "suspend": {"type": "boolean"},
            },
        },
    },
}


@pytest.fixture
def cluster() -> dict:
    # What envsubst does with the one variable that the file's head names.
    return yaml.safe_load(FILE.read_text().replace("$IMAGE", "your-registry/face-diffuser:latest"))


def _groups(cluster: dict) -> dict[str, dict]:
    workers = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"], **workers}


def _containers(cluster: dict) -> dict[str, dict]:
    return {name: group["template"]["spec"]["containers"][0] for name, group in _groups(cluster).items()}


def _validate_pod(template: dict) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_it_is_a_raycluster(cluster):
    jsonschema.Draft202012Validator(RAY_CLUSTER).validate(cluster)


@pytest.mark.parametrize("name", ["head", "prefect", "gpu"])
def test_its_pods_are_pods(cluster, name):
    _validate_pod(_groups(cluster)[name]["template"])


def test_mistakes_are_seen(cluster):
    numbers = copy.deepcopy(cluster)
    numbers["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    unknown = copy.deepcopy(cluster)
    unknown["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    for broken in (numbers, unknown):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAY_CLUSTER)
    pod = copy.deepcopy(_groups(cluster)["gpu"]["template"])
    pod["spec"]["toleration"] = pod["spec"].pop("tolerations")
    with pytest.raises(kubernetes_validate.ValidationError):
        _validate_pod(pod)


def test_its_ray_is_the_ray_of_the_environment(cluster):
    assert cluster["spec"]["rayVersion"] == version("ray")


def test_the_cluster_asks_for_a_token(cluster):
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_the_heads_books_are_in_the_redis_beside_it(cluster):
    beside = list(yaml.safe_load_all((FILE.parent / "redis.yaml").read_text()))
    for one in beside:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    redis = {one["kind"]: one for one in beside}
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    (port,) = redis["Service"]["spec"]["ports"]
    assert options["redisAddress"] == f"{redis['Service']['metadata']['name']}:{port['port']}"
    (container,) = redis["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    password = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert all(one["valueFrom"]["secretKeyRef"] == password for one in container["env"])
    (rule,) = redis["NetworkPolicy"]["spec"]["ingress"]
    let_in = rule["from"][0]["podSelector"]["matchLabels"].items()
    assert all(let_in <= group["template"]["metadata"]["labels"].items() for group in _groups(cluster).values())


def test_replicas_stand_between_their_bounds(cluster):
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_gpu_workers_grow_from_none_and_ask_for_their_gpu(cluster):
    group = _groups(cluster)["gpu"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    resources = _containers(cluster)["gpu"]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    assert any(each["key"] == "nvidia.com/gpu" for each in group["template"]["spec"]["tolerations"])


def test_every_container_starts_ray_as_kuberay_generated_it(cluster):
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for container in _containers(cluster).values():
        assert container["command"] == ["/bin/bash", "-c"]
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]


def test_the_prefect_worker_joins_the_pool_and_finds_ray(cluster):
    container = _containers(cluster)["prefect"]
    assert "exec prefect worker start --pool face-diffuser --type process" in container["args"][0]
    assert {"name": "RAY_ADDRESS", "value": "auto"} in container["env"]
    assert _groups(cluster)["prefect"]["rayStartParams"]["num-cpus"] == "0"


def test_pods_run_as_the_images_user(cluster):
    (user,) = set(re.findall(r"^USER (\d+)$", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE))
    for group in _groups(cluster).values():
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(user)


def test_volume_mounts_have_volumes(cluster):
    for name, group in _groups(cluster).items():
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
        mounted = {mount["name"] for mount in _containers(cluster)[name].get("volumeMounts", [])}
        assert mounted == volumes


def test_the_image_is_the_only_thing_to_fill_in():
    found = {match["named"] or match["braced"] for match in string.Template.pattern.finditer(FILE.read_text())}
    assert found - {None, "KUBERAY_GEN_RAY_START_CMD"} == {"IMAGE"}
