"""The factory as deployments, on a real Prefect server with real workers: deployed, run, refused, by schedule, stopped."""

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import yaml
from PIL import Image

from facediffuser.flows.stopping import KILLED, STOPPED
from facediffuser.miniature.render import render_set

ROOT = Path(__file__).resolve().parents[2]
RUN = "generate-dataset/generate-dataset"
RUN_TIMEOUT_S = 400


@pytest.fixture(scope="module")
def deployed(prefect_house):
    done = prefect_house.command("--no-prompt", "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    return prefect_house


def _run(house, name: str, settings: dict) -> tuple[int, str]:
    """Run the deployment and return the exit code of the command that watched it, and what the run said at its end."""
    done = house.command(
        *("deployment", "run", RUN, "--flow-run-name", name, "--param", f"settings={json.dumps(settings)}"),
        *("--watch", "--watch-timeout", str(RUN_TIMEOUT_S)),
        timeout=RUN_TIMEOUT_S + 60,
    )
    (run,) = house.call("POST", "flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    return done.returncode, f"{run['state_type']}: {run['state']['message']}"


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> dict:
    """The settings of the smallest dataset: one person, one prompt, four denoising steps."""
    folder = tmp_path_factory.mktemp("inputs")
    render_set(1, 0, folder / "photos", subjects=1)
    people = sorted((folder / "photos" / "subjects").iterdir())
    person = next(path for path in people if path.is_dir())
    (folder / "subjects").mkdir()
    person.rename(folder / "subjects" / person.name)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a photo of {subject} in a park"}) + "\n")
    return {
        "models": "miniature",
        "subjects": str(folder / "subjects"),
        "prompts": str(folder / "prompts.jsonl"),
        "output": str(folder / "dataset"),
        "steps": 4,
        "fusion_start": 1,
        "fusion_end": 3,
        "seed": 1,
    }


def test_deploy_all_makes_the_deployments_of_prefect_yaml(deployed):
    expected = {each["name"] for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    found = {each["name"]: each for each in deployed.call("POST", "deployments/filter", {})}
    assert set(found) == expected
    assert {each["work_pool_name"] for each in found.values()} == {"face-diffuser"}
    # Relative paths are of the clone that was deployed, wherever it stands.
    directories = [step.values() for each in found.values() for step in each["pull_steps"]]
    assert {options["directory"] for (options,) in directories} == {str(ROOT)}
    (schedule,) = found["generate-dataset"]["schedules"]
    assert schedule["active"] is True


def test_a_deployed_run_makes_the_dataset(deployed, smallest):
    code, end = _run(deployed, "smallest", smallest)
    assert code == 0, f"{end}\n{deployed.log('worker')}"

    manifest = json.loads((Path(smallest["output"]) / "manifest.json").read_text())
    table = pyarrow.dataset.dataset(Path(smallest["output"]) / "data", format="parquet").to_table()
    assert table.num_rows == 1
    assert table["status"].to_pylist() == ["ok"]
    assert sum(shard["rows"] for shard in manifest["shards"]) == 1

    artifacts = deployed.call("POST", "artifacts/filter", {})
    assert {"progress", "markdown"} <= {each["type"] for each in artifacts}


def test_an_unknown_option_makes_no_run(deployed, smallest):
    before = len(deployed.call("POST", "flow_runs/filter", {}))
    wrong = json.dumps({**smallest, "no_such_option": 1})
    done = deployed.command("deployment", "run", RUN, "--param", f"settings={wrong}")
    assert done.returncode != 0
    assert len(deployed.call("POST", "flow_runs/filter", {})) == before


@pytest.mark.slow  # tests/flows/test_bad_input.py shows the same without a deployment.
def test_a_run_with_bad_input_fails_with_its_one_line(deployed, smallest, tmp_path):
    (tmp_path / "subjects" / "nobody").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "subjects" / "nobody" / "0.png")
    wrong = {**smallest, "subjects": str(tmp_path / "subjects"), "output": str(tmp_path / "dataset")}
    code, end = _run(deployed, "faceless", wrong)
    assert code != 0
    assert end.startswith("FAILED")
    assert "nobody/0.png: no face" in end
    assert not (tmp_path / "dataset").exists()


SCHEDULED = """
from prefect import flow


@flow(name="scheduled")
def scheduled():
    pass
"""
INTERVAL_S = 4

STOPPING = """
import threading
from pathlib import Path

from prefect import flow

from facediffuser.errors import Stopped
from facediffuser.flows.stopping import report_stop, watch_process


@flow(name="stopping", on_running=[watch_process], on_failure=[report_stop])
def stopping(wait: bool):
    if not wait:
        raise Stopped("3 left; run the same command again")
    Path("waits").touch()
    threading.Event().wait()
"""


def _deploy(house, folder: Path, name: str, text: str, **more: Any) -> str:
    """Deploy the flow `name` of a file with this text, and return the deployment's id."""
    (folder / f"{name}.py").write_text(text)
    flow = house.call("POST", "flows/", {"name": name})
    deployment = {
        "name": name,
        "flow_id": flow["id"],
        "entrypoint": f"{name}.py:{name}",
        "work_pool_name": "face-diffuser",
        "concurrency_limit": 1,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
    }
    return house.call("POST", "deployments/", deployment | more)["id"]


def _require_scheduled_runs(house, folder: Path) -> None:
    deployment = _deploy(
        *(house, folder, "scheduled", SCHEDULED),
        schedules=[{"schedule": {"interval": INTERVAL_S}, "active": True}],
        # On a busy machine a run takes longer than the interval: then the next ones are left out.
        concurrency_options={"collision_strategy": "CANCEL_NEW"},
    )
    wanted = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }

    def twice() -> list[dict]:
        assert house.service_errors() == []
        runs = house.call("POST", "flow_runs/filter", wanted)
        return runs if len(runs) >= 2 else []

    try:
        runs = house.wait_for("two runs by schedule", twice)
    finally:
        house.call("PATCH", f"deployments/{deployment}", {"paused": True})
    assert all(run["auto_scheduled"] for run in runs)
    assert len({run["expected_start_time"] for run in runs}) == len(runs)


@pytest.mark.slow
def test_a_schedule_is_run_by_server_and_worker_on_sqlite(prefect_house, tmp_path):
    _require_scheduled_runs(prefect_house, tmp_path)


@pytest.mark.slow
def test_a_schedule_is_run_by_server_and_worker_on_postgresql(prefect_house_on_postgres, tmp_path):
    _require_scheduled_runs(prefect_house_on_postgres, tmp_path)


def test_a_run_whose_worker_is_stopped_ends_and_leaves_its_slot_to_the_next(prefect_house, tmp_path):
    house = prefect_house
    house.call("POST", "work_pools/", {"name": "stopping", "type": "process"})
    deployment = _deploy(house, tmp_path, "stopping", STOPPING, work_pool_name="stopping")

    def start(wait: bool) -> str:
        path = f"deployments/{deployment}/create_flow_run"
        return house.call("POST", path, {"parameters": {"wait": wait}})["id"]

    def stopped(run: str) -> dict | None:
        state = house.call("GET", f"flow_runs/{run}")["state"]
        return state if state["name"] == STOPPED else None

    worker = ("worker", "start", "--pool", "stopping", "--type", "process")
    with house.process("stopped-worker", *worker) as process:
        run = start(wait=True)
        house.wait_for("run that waits", (tmp_path / "waits").exists)
        process.send_signal(signal.SIGTERM)
        state = house.wait_for("run that was killed with its worker", lambda: stopped(run))
    assert (state["type"], state["message"]) == ("CRASHED", KILLED)

    with house.process("next-worker", *worker):
        run = start(wait=False)
        state = house.wait_for("run that stopped by itself", lambda: stopped(run))
    assert (state["type"], state["message"]) == ("CRASHED", "3 left; run the same command again")
