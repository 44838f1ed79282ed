"""infra/kubernetes/prefect: the jobs that Prefect's Kubernetes worker makes of runs, and the worker itself."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kubernetes" / "prefect"
KUBERNETES = "1.33"


@pytest.fixture(scope="module")
def template() -> dict:
    # What envsubst does with the one variable.
    return json.loads((FOLDER / "work-pool.json").read_text().replace("$IMAGE", "registry/face-diffuser:1"))


@pytest.fixture(scope="module")
def job(template) -> dict:
    """The job of a run, as the worker fills it in: with the pool's defaults and what the worker itself gives."""
    given = {
        name: field["default"] for name, field in template["variables"]["properties"].items() if "default" in field
    }
    given |= {"name": "run", "labels": {"prefect.io/flow-run-name": "run"}}
    made = apply_values(
        template["job_configuration"]["job_manifest"], given | {"command": ["prefect", "flow-run", "execute"]}
    )
    assert isinstance(made, dict)
    return made


@pytest.fixture(scope="module")
def worker() -> dict[str, dict]:
    files = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    return {one["kind"]: one for name in files for one in yaml.safe_load_all((FOLDER / name).read_text())}


def test_a_run_is_a_job_of_kubernetes(job):
    # Prefect's worker demands these two of a pod, where Kubernetes knows no such fields and drops them.
    pod = job["spec"]["template"]["spec"]
    known = {name: value for name, value in pod.items() if name not in ("parallelism", "completions")}
    assert len(known) == len(pod) - 2
    template = job["spec"]["template"] | {"spec": known}
    kubernetes_validate.validate(job | {"spec": job["spec"] | {"template": template}}, KUBERNETES, strict=True)
    assert "{{" not in json.dumps(job) and "$" not in json.dumps(job)


def test_every_variable_is_used_and_every_one_that_is_used_is_there(template):
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_a_run_is_a_driver_on_a_node_of_the_cluster_of_kuberay(job):
    cluster = yaml.safe_load((ROOT / "infra" / "kuberay" / "raycluster.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert (ROOT / container["command"][0]).is_file()
    variables = {one["name"]: one for one in container["env"]}
    # KubeRay's names for the head's service and for the secret of the token.
    assert variables["RAY_ADDRESS"]["value"] == f"{cluster['metadata']['name']}-head-svc:6379"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": cluster["metadata"]["name"],
        "key": "auth_token",
    }
    assert cluster["spec"]["authOptions"]["mode"] == variables["RAY_AUTH_MODE"]["value"]


def test_a_run_fits_the_objects_of_the_base(job):
    base = {one["kind"]: one for one in map(yaml.safe_load, ((ROOT / "infra/kubernetes" / name).read_text() for name in
            ("service-account.yaml", "models-claim.yaml", "network-policy.yaml", "pod-monitor.yaml")))}  # fmt: skip
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert template["spec"]["serviceAccountName"] == base["ServiceAccount"]["metadata"]["name"]
    (volume,) = template["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == base["PersistentVolumeClaim"]["metadata"]["name"]
    for kind in ("NetworkPolicy", "PodMonitor"):
        selector = base[kind]["spec"].get("podSelector") or base[kind]["spec"]["selector"]
        assert selector.get("matchLabels", {}).items() <= template["metadata"]["labels"].items()
    assert "run-metrics" in {port["name"] for port in container["ports"]}


def test_the_worker_is_of_kubernetes_has_probes_and_may_make_jobs(worker):
    for one in worker.values():
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    (container,) = worker["Deployment"]["spec"]["template"]["spec"]["containers"]
    # Server, worker and runs speak one version.
    assert container["image"].startswith(f"prefecthq/prefect:{version('prefect')}-")
    assert "--with-healthcheck" in container["args"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert any("jobs" in rule["resources"] and "create" in rule["verbs"] for rule in worker["Role"]["rules"])


def test_secrets_are_not_those_of_the_operator():
    """KubeRay puts the token into a secret of the cluster's name; one that is there already has none, and no pod starts."""
    cluster = yaml.safe_load((ROOT / "infra" / "kuberay" / "raycluster.yaml").read_text())
    text = (ROOT / "infra" / "README.md").read_text()
    made = re.findall(r"kubectl create secret generic (\S+)", text)
    assert made and cluster["metadata"]["name"] not in made
    used = re.findall(r"secretRef: \{name: (\S+)\}", (ROOT / "infra/kuberay/raycluster.yaml").read_text())
    assert set(used) <= set(made)
