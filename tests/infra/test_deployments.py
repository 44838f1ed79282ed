"""prefect.yaml: what Prefect reads of it, and that its flows exist and take the parameters it gives them."""

import functools
from pathlib import Path

import pytest
import yaml
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint

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
    (given,) = [step for step in raw["build"] if "facediffuser.flows.lost_runs.deploy_automations" in step]
    tag = given["facediffuser.flows.lost_runs.deploy_automations"]["tag"]
    assert [name for name, each in deployments.items() if tag not in each.tags] == []
