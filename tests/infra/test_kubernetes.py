"""infra/kubernetes: every object by the schema of Kubernetes, and what they say of each other."""

import os
import re
import shlex
import shutil
import signal
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


@pytest.fixture(scope="module")
def submitter(objects) -> dict:
    return objects["RayJob"]["spec"]["submitterPodTemplate"]


@pytest.fixture
def ends(objects, tmp_path):
    """Starts the entrypoint's shell line with a stand-in for the command, as Ray's job runner does."""
    program = tmp_path / "bin" / "facediffuser"
    program.parent.mkdir()

    def start(body: str) -> subprocess.Popen[str]:
        program.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/called\n{body}\n')
        program.chmod(0o755)
        # The submitter's shell splits the line, `ray job submit` joins the words, Ray hands them to a shell.
        line = shlex.join(shlex.split(objects["RayJob"]["spec"]["entrypoint"]))
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            line, shell=True, start_new_session=True, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (1, 1), (2, 2), (3, 0), (137, 137), (143, 143)])
def test_a_limit_that_is_reached_is_no_failure_to_be_tried_again(ends, tmp_path, code, ended):
    said, _ = (process := ends(f"exit {code}")).communicate(timeout=60)
    assert process.returncode == ended and bool(said) == (code == 3)
    called = (tmp_path / "called").read_text().split()
    assert called == ["--log-format", "json", "generate", "--config", "/etc/face-diffuser/generate.yaml"]


def test_a_job_that_is_asked_to_end_waits_for_the_shards_in_hand(ends):
    process = ends("trap 'echo finished; exit 143' TERM; echo begun; while :; do read -t 0.05 < <(:); done")
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == "finished\n" and process.returncode == 143


def test_the_entrypoint_survives_the_shell_that_submits_it(objects):
    line = f"printf '%s\\n' {objects['RayJob']['spec']['entrypoint']} ; "
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said.startswith("exec\nbash\n-c\ntrap : TERM") and "|| code=$?" in said


def test_the_pod_that_submits_the_job_is_let_in_and_has_what_kuberay_fills_in(objects, pods, submitter):
    rules = objects["NetworkPolicy"]["spec"]["ingress"]
    (labels,) = [
        one["podSelector"]["matchLabels"]
        for rule in rules if {"port": 8265} in rule.get("ports", []) for one in rule["from"] if "podSelector" in one
    ]  # fmt: skip
    assert labels.items() <= submitter["metadata"]["labels"].items()
    assert (
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
        .items()
        .isdisjoint(submitter["metadata"]["labels"].items())
    )
    # KubeRay writes the command into the first container, unless there is one.
    (container,) = submitter["spec"]["containers"]
    assert "command" not in container and "args" not in container and submitter["spec"]["restartPolicy"] == "Never"
    assert {container["image"]} == {pod["spec"]["containers"][0]["image"] for pod in pods.values()}


def test_every_object_is_one_of_kubernetes(objects, pods, submitter):
    for kind, one in objects.items():
        if kind not in OWN:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
    for template in (*pods.values(), submitter):
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
    (wait,) = [int(one["value"]) for one in head["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert settings.stop_within < wait < pods["head"]["spec"]["terminationGracePeriodSeconds"]
    assert settings.metrics_port in {port["containerPort"] for port in head["ports"]}


def test_no_two_programs_of_a_pod_listen_at_one_port(objects):
    run = yaml.safe_load((FOLDER / "generate.yaml").read_text())
    cluster = yaml.safe_load((ROOT / "infra" / "kuberay" / "raycluster.yaml").read_text())
    heads = 0
    for spec in (objects["RayJob"]["spec"]["rayClusterSpec"], cluster["spec"]):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            ports = listening(group, head="groupName" not in group, run_metrics=run["metrics-port"])
            assert len(set(ports.values())) == len(ports), ports
            named = {
                port["name"]: port["containerPort"]
                for port in group["template"]["spec"]["containers"][0].get("ports", [])
            }
            assert {name: port for name, port in ports.items() if name in named}.items() <= named.items()
            heads += "gcs" in ports
    assert heads == 2


def listening(group: dict, head: bool, run_metrics: int) -> dict[str, int]:
    """Return the ports at which the programs of a group's container listen, those that KubeRay and Prefect choose too."""
    (container,) = group["template"]["spec"]["containers"]
    options, variables = group["rayStartParams"], {one["name"]: one.get("value") for one in container.get("env", [])}
    ports = {
        "ray-metrics": int(options.get("metrics-export-port", 8080)),
        "agent": int(options.get("dashboard-agent-listen-port", 52365)),
        "run-metrics": run_metrics,
    }
    if head:
        ports |= {"gcs": int(options.get("port", 6379)), "dashboard": int(options.get("dashboard-port", 8265)),
                  "client": int(options.get("ray-client-server-port", 10001))}  # fmt: skip
    if "--with-healthcheck" in " ".join(container.get("args", [])):
        ports["prefect"] = int(variables.get("PREFECT_WORKER_WEBSERVER_PORT", 8080))
    return ports


def test_what_is_scraped_is_let_in(objects, pods):
    ports = {
        port["name"]: port["containerPort"] for pod in pods.values() for port in pod["spec"]["containers"][0]["ports"]
    }
    monitoring = yaml.safe_load((ROOT / "infra" / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    job = {pod["metadata"]["labels"][objects["PodMonitor"]["spec"]["jobLabel"]] for pod in pods.values()}
    assert job == {monitoring[0]["job_name"]}
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
