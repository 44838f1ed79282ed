"""prefect.yaml: what Prefect reads of it, and that its flows exist and take the parameters it gives them."""

import functools
import json
import re
from pathlib import Path

import pytest
import yaml
from prefect.automations import AutomationCore
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.templating import apply_values

from facediffuser.errors import InputError
from facediffuser.flows import lost_runs
from facediffuser.flows.stopping import report_stop, watch_process

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "prefect.yaml"
NAMES = ["preprocess-ffhq", "train", "rehearse", "generate-dataset", "evaluate",
         "merge", "retract", "export", "publish"]  # fmt: skip


@pytest.fixture(scope="module")
def raw() -> dict:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def deployments(raw) -> dict[str, DeploymentConfig]:
    return {each.name: each for each in PrefectYamlModel.model_validate(raw).deployments}


@functools.cache
def _load(entrypoint: str) -> Flow:
    return load_flow_from_entrypoint(f"{ROOT}/{entrypoint}")


def test_the_stages_their_rehearsal_and_what_follows_are_deployed(deployments):
    assert list(deployments) == NAMES


def test_prefect_reads_every_key(raw):
    # Prefect drops keys it does not know without a word, so a slip of the pen would stay unseen.
    assert raw.keys() - PrefectYamlModel.model_fields.keys() == {"definitions"}
    for deployment in raw["deployments"]:
        assert deployment.keys() <= DeploymentConfig.model_fields.keys()
        assert deployment["work_pool"].keys() <= WorkPoolConfig.model_fields.keys()
        for schedule in deployment.get("schedules", []):
            assert schedule.keys() <= RawScheduleConfig.model_fields.keys()


@pytest.mark.parametrize("name", NAMES)
def test_its_flow_exists_under_the_same_name(deployments, name):
    assert _load(deployments[name].entrypoint).name == name


@pytest.mark.parametrize("name", NAMES)
def test_its_run_says_when_it_was_stopped(deployments, name):
    flow = _load(deployments[name].entrypoint)
    assert watch_process in flow.on_running_hooks
    assert report_stop in flow.on_failure_hooks


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_are_what_the_flow_takes(deployments, name):
    flow = _load(deployments[name].entrypoint)
    parameters = deployments[name].parameters
    assert parameters.keys() == {"settings"}
    settings = flow.validate_parameters(parameters)["settings"]
    for field, value in parameters["settings"].items():
        assert str(getattr(settings, field)) == str(value)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(deployments, name):
    flow = _load(deployments[name].entrypoint)
    assert deployments[name].enforce_parameter_schema
    wrong = {"settings": {**deployments[name].parameters["settings"], "no_such_option": 1}}
    with pytest.raises(ParameterTypeError, match="no_such_option"):
        flow.validate_parameters(wrong)


def test_datasets_are_generated_every_night_and_nothing_else_runs_by_itself(deployments):
    assert [name for name, each in deployments.items() if each.schedules] == ["generate-dataset"]
    (schedule,) = deployments["generate-dataset"].schedules
    assert schedule.active is True
    assert CronSchedule(cron=schedule.cron, timezone=schedule.timezone).timezone == "UTC"


@pytest.mark.parametrize("name", ["generate-dataset", "retract"])
def test_two_runs_of_one_dataset_do_not_meet(deployments, name):
    assert deployments[name].concurrency_limit == 1


def test_every_deployment_is_one_that_the_automations_watch(raw, deployments):
    tag = _step_of_automations(raw)["tag"]
    assert [name for name, each in deployments.items() if tag not in each.tags] == []


def _step_of_automations(raw) -> dict:
    (given,) = [step for step in raw["build"] if "facediffuser.flows.lost_runs.deploy_automations" in step]
    return apply_values(given["facediffuser.flows.lost_runs.deploy_automations"], {})


class Server:
    """Takes automations as Prefect's client does."""

    def __init__(self):
        self.there: dict[str, AutomationCore] = {}

    def __call__(self, sync_client):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read_automations_by_name(self, name):
        return []

    def create_automation(self, automation):
        self.there[automation.name] = automation


@pytest.mark.parametrize(("given", "seconds"), [
    ({}, [90, 180]),
    ({"FACEDIFFUSER_PENDING_S": "900"}, [90, 900]),
    ({"FACEDIFFUSER_SILENT_S": "600", "FACEDIFFUSER_PENDING_S": ""}, [600, 180]),
])  # fmt: skip
def test_how_long_a_run_may_be_silent_or_pending_is_given_when_it_is_deployed(raw, monkeypatch, given, seconds):
    for name in ("FACEDIFFUSER_SILENT_S", "FACEDIFFUSER_PENDING_S"):
        monkeypatch.setenv(name, given[name]) if name in given else monkeypatch.delenv(name, raising=False)
    server = Server()
    monkeypatch.setattr(lost_runs, "get_client", server)
    lost_runs.deploy_automations(**_step_of_automations(raw))
    assert [one.trigger.within.total_seconds() for one in server.there.values()] == seconds
    env = raw["definitions"]["shared"]["work_pool"]["job_variables"]["env"]
    assert int(env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == lost_runs.HEARTBEAT_S


@pytest.mark.parametrize("given", [{"silent_s": "60"}, {"silent_s": "soon"}, {"pending_s": "-1"}, {"pending_s": "1.5"}])
def test_a_time_that_cannot_be_is_refused_before_anything_is_deployed(monkeypatch, given):
    monkeypatch.setattr(lost_runs, "get_client", None)
    ((name, value),) = given.items()
    with pytest.raises(InputError, match=f"FACEDIFFUSER_{name.upper()} '{value}': give whole seconds, at least"):
        lost_runs.deploy_automations("face-diffuser", **given)


def test_on_kubernetes_a_run_may_be_pending_for_as_long_as_its_pod_is_waited_for():
    pool = json.loads((ROOT / "infra" / "kubernetes" / "prefect" / "work-pool.json").read_text())
    waited = pool["variables"]["properties"]["pod_watch_timeout_seconds"]["default"]
    (given,) = re.findall(r"FACEDIFFUSER_PENDING_S=(\d+) prefect", (ROOT / "infra" / "README.md").read_text())
    assert int(given) > waited
