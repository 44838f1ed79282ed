"""infra/kubernetes: every object by the schema of Kubernetes, and what they say of each other."""

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from facediffuser.generation.generate_settings import GenerateSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kubernetes"
KUBERNETES = "1.33"
OWN = ("RayJob", "PodMonitor")  # kinds of operators, whose pods alone have a schema here


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    files = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    read = [yaml.safe_load((FOLDER / name).read_text()) for name in files]
    return {one["kind"]: one for one in read}


@pytest.fixture(scope="module")
def pods(objects) -> dict[str, dict]:
    spec = objects["RayJob"]["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"], **{one["groupName"]: one for one in spec["workerGroupSpecs"]}}
    return {name: group["template"] for name, group in groups.items()}


def test_every_object_is_one_of_kubernetes(objects, pods):
    for kind, one in objects.items():
        if kind not in OWN:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
    for template in pods.values():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_pods_are_unprivileged_have_probes_and_the_runs_identity(objects, pods):
    (user,) = set(re.findall(r"^USER (\d+)$", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE))
    for template in pods.values():
        spec, (container,) = template["spec"], template["spec"]["containers"]
        assert spec["securityContext"]["runAsUser"] == int(user)
        assert spec["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["livenessProbe"]["exec"]["command"][:2] == ["python", "infra/healthy.py"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        claims = {
            one["persistentVolumeClaim"]["claimName"] for one in spec["volumes"] if "persistentVolumeClaim" in one
        }
        assert claims == {objects["PersistentVolumeClaim"]["metadata"]["name"]}


def test_the_run_stops_within_the_notice_and_its_settings_are_those_of_generate(pods):
    given = yaml.safe_load((FOLDER / "generate.yaml").read_text())
    settings = GenerateSettings(**{name.replace("-", "_"): value for name, value in given.items()})
    for template in pods.values():
        assert settings.stop_within < template["spec"]["terminationGracePeriodSeconds"]
    (head,) = pods["head"]["spec"]["containers"]
    assert settings.metrics_port in {port["containerPort"] for port in head["ports"]}


def test_what_is_scraped_is_let_in(objects, pods):
    ports = {
        port["name"]: port["containerPort"] for pod in pods.values() for port in pod["spec"]["containers"][0]["ports"]
    }
    scraped = {ports[one["port"]] for one in objects["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    let_in = {port["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for port in rule.get("ports", [])}
    assert scraped <= let_in
    labels = objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert all(labels.items() <= pod["metadata"]["labels"].items() for pod in pods.values())


@pytest.mark.slow
def test_kustomize_renders_the_base():
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {one["kind"] for one in rendered} == {
        "ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy", "PodMonitor", "RayJob",
    }  # fmt: skip
    assert {one["metadata"]["namespace"] for one in rendered} == {"face-diffuser"}
