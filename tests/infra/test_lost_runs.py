"""Nights on which the machine is lost under a run: the server ends the run by itself, and the next one goes on."""

import json
import time
from pathlib import Path

import pyarrow.dataset
import pytest
from machine import lose_machine

from facediffuser.dataset.verify import inspect
from facediffuser.miniature.render import render_set

PROMPTS, SHARD_SIZE = 12, 2
SHARDS = PROMPTS // SHARD_SIZE
POOL = "nights"


@pytest.fixture
def people(tmp_path) -> dict:
    """Settings of a dataset of one person, twelve prompts, six shards."""
    render_set(1, 0, tmp_path / "photos", subjects=1)
    person = min(path for path in (tmp_path / "photos" / "subjects").iterdir() if path.is_dir())
    (tmp_path / "people").mkdir()
    person.rename(tmp_path / "people" / person.name)
    scenes = [json.dumps({"prompt": f"a photo of {{subject}} in park {number}"}) for number in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(scenes) + "\n")
    return {
        "models": "miniature",
        "subjects": str(tmp_path / "people"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "dataset"),
        "steps": 8,
        "shard_size": SHARD_SIZE,
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_nights_with_a_lost_machine_and_a_fourth_that_finishes(prefect_house_on_postgres, people, summary_line):
    house = prefect_house_on_postgres
    done = house.command("--no-prompt", "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    house.call("POST", "work_pools/", {"name": POOL, "type": "process"})
    (deployment,) = house.call("POST", "deployments/filter", {"deployments": {"name": {"any_": ["generate-dataset"]}}})
    house.call("PATCH", f"deployments/{deployment['id']}", {"work_pool_name": POOL})
    dataset = Path(people["output"])

    def state(run: str) -> dict:
        return house.call("GET", f"flow_runs/{run}")["state"]

    def begin() -> str:
        path = f"deployments/{deployment['id']}/create_flow_run"
        return house.call("POST", path, {"parameters": {"settings": people}})["id"]

    def is_pending(run: str) -> bool:
        return state(run)["type"] == "PENDING"

    def has_a_shard(run: str) -> bool:
        return any(dataset.glob("data/shard-*.parquet"))

    def is_finishing(run: str) -> bool:
        return len(list(dataset.glob("data/shard-*.parquet"))) == SHARDS

    worker = ("worker", "start", "--pool", POOL, "--type", "process")
    for night, (reached, phase) in enumerate(
        [(is_pending, "PENDING"), (has_a_shard, "RUNNING"), (is_finishing, "RUNNING")], 1
    ):
        with house.process(f"worker-{night}", *worker) as process:
            run = begin()
            house.wait_for(f"run of night {night}", lambda run=run, reached=reached: reached(run))
            lose_machine(process)
        lost, before = time.monotonic(), state(run)
        assert before["type"] == phase, before
        assert not (dataset / "manifest.json").exists()
        crashed = house.wait_for("end of the lost run", lambda run=run: state(run)["type"] == "CRASHED" and state(run))
        assert "the next run with the same settings resumes it" in crashed["message"]
        summary_line(
            "lost runs",
            f"night {night}: {before['name']}, crashed after {time.monotonic() - lost:.0f} s: {crashed['message']}",
        )

    with house.process("worker-4", *worker):
        run = begin()
        begun = time.monotonic()
        house.wait_for("run of the last night", lambda: state(run)["type"] == "RUNNING")
        summary_line("lost runs", f"night 4: running after {time.monotonic() - begun:.0f} s")
        house.wait_for("finished dataset", lambda: state(run)["type"] == "COMPLETED")

    found = inspect(people["output"])
    rows = pyarrow.dataset.dataset(dataset / "data", format="parquet").to_table(["sample_id", "status"]).to_pydict()
    assert found.problems == []
    assert len(set(rows["sample_id"])) == len(rows["sample_id"]) == PROMPTS
    assert set(rows["status"]) == {"ok"}
    assert house.service_errors() == []
