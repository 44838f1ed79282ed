"""A deployment's schedule on a real server: the server schedules its runs, and a worker runs them, by themselves."""

from pathlib import Path

import pytest

INTERVAL_S = 4
FLOW = """
from prefect import flow


@flow(name="scheduled")
def scheduled():
    pass
"""


def _deploy(house, folder: Path) -> str:
    """Deploy a flow that does nothing, with a short interval, and return the deployment's id."""
    (folder / "scheduled.py").write_text(FLOW)
    flow = house.call("POST", "flows/", {"name": "scheduled"})
    deployment = house.call(
        "POST",
        "deployments/",
        {
            "name": "often",
            "flow_id": flow["id"],
            "path": str(folder),
            "entrypoint": "scheduled.py:scheduled",
            "work_pool_name": "face-diffuser",
            "schedules": [{"schedule": {"interval": INTERVAL_S}, "active": True}],
            # On a busy machine a run takes longer than the interval: then the next ones are left out.
            "concurrency_limit": 1,
            "concurrency_options": {"collision_strategy": "CANCEL_NEW"},
        },
    )
    return deployment["id"]


def _require_scheduled_runs(house, folder: Path) -> None:
    deployment = _deploy(house, folder)
    wanted = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }

    def twice() -> list[dict]:
        assert house.server_errors() == []
        runs = house.call("POST", "flow_runs/filter", wanted)
        return runs if len(runs) >= 2 else []

    try:
        runs = house.wait_for("two runs by schedule", twice)
    finally:
        house.call("DELETE", f"deployments/{deployment}")
    assert all(run["auto_scheduled"] for run in runs)
    assert len({run["expected_start_time"] for run in runs}) == len(runs)


def test_a_schedule_is_run_by_server_and_worker_on_sqlite(prefect_house, tmp_path):
    _require_scheduled_runs(prefect_house, tmp_path)


@pytest.mark.slow
def test_a_schedule_is_run_by_server_and_worker_on_postgresql(prefect_house_on_postgres, tmp_path):
    _require_scheduled_runs(prefect_house_on_postgres, tmp_path)
