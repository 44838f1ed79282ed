"""A scheduled run whose bucket is away for a minute and which then loses a Ray node: retried later and later, it completes."""

import json
import os
import re
import time

import pytest

from facediffuser.dataset import open_dataset
from facediffuser.dataset.verify import inspect
from facediffuser.miniature.render import render_set
from facediffuser.storage import open_store

PROMPTS, SHARD_SIZE = 24, 2
SHARDS = PROMPTS // SHARD_SIZE
OUTAGE_S = 60.0
POOL = "outages"
RETRY = re.compile(r"Retry \d/4 will start ([\d.]+) second")  # the pauses are jittered


@pytest.fixture
def settings(s3_bucket, tmp_path) -> dict:
    """One person, 24 prompts, 12 shards, into the bucket."""
    render_set(8, 0, tmp_path / "photos")
    person = min(path for path in (tmp_path / "photos" / "subjects").iterdir() if path.is_dir())
    (tmp_path / "people").mkdir()
    person.rename(tmp_path / "people" / person.name)
    scenes = [json.dumps({"prompt": f"a photo of {{subject}} in park {number}"}) for number in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(scenes) + "\n")
    return {
        "models": "miniature",
        "subjects": str(tmp_path / "people"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "output": f"{s3_bucket.url}/dataset",
        "steps": 25,
        "workers": 1,
        "cpus_per_worker": 1,
        "shard_size": SHARD_SIZE,
    }


def _shards(url: str) -> int:
    try:
        return len(open_store(url).list("data/"))
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_bucket_that_is_away_and_a_node_that_is_lost(prefect_house, s3_server, settings, summary_line):
    from ray.cluster_utils import Cluster

    house, url = prefect_house, settings["output"]
    done = house.command("--no-prompt", "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    house.call("POST", "work_pools/", {"name": POOL, "type": "process"})
    (deployment,) = house.call("POST", "deployments/filter", {"deployments": {"name": {"any_": ["generate-dataset"]}}})
    house.call("PATCH", f"deployments/{deployment['id']}", {"work_pool_name": POOL})

    def state(run: str) -> dict:
        return house.call("GET", f"flow_runs/{run}")["state"]

    def retries(run: str) -> list[float]:
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"}
        found = [RETRY.search(line["message"]) for line in house.call("POST", "logs/filter", wanted)]
        return [round(float(match[1]), 1) for match in found if match]

    def shards(more_than: int) -> bool:
        if _shards(url) > more_than:
            return True
        assert state(run)["type"] not in ("FAILED", "CRASHED"), state(run)
        time.sleep(1)
        return False

    place = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **place})
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {
        "RAY_ADDRESS": cluster.address,
        "RAY_LOG_TO_DRIVER": "1",
        "FACEDIFFUSER_LOG_FORMAT": "json",
    }
    try:
        node = cluster.add_node(num_cpus=1, **place)
        with house.process(POOL, "worker", "start", "--pool", POOL, "--type", "process", **variables):
            body = {"parameters": {"settings": settings}}
            run = house.call("POST", f"deployments/{deployment['id']}/create_flow_run", body)["id"]
            house.wait_for("first shards", lambda: shards(1), 600)
            begun = time.monotonic()
            with s3_server.away():
                house.wait_for("retry", lambda: retries(run) and time.monotonic() > begun + OUTAGE_S, 600)
            delays, there = retries(run), _shards(url)
            house.wait_for("shards after the outage", lambda: shards(there), 600)
            cluster.add_node(num_cpus=1, **place)
            cluster.remove_node(node, allow_graceful=False)
            lost_at = _shards(url)
            end = house.wait_for(
                "end", lambda: state(run)["type"] in ("COMPLETED", "FAILED", "CRASHED") and state(run), 900
            )
    finally:
        cluster.shutdown()
    assert end["type"] == "COMPLETED", f"{end}\n{house.log(POOL)}"
    assert lost_at < SHARDS
    assert delays == sorted(delays)

    found, rows = inspect(url), open_dataset(url).to_table(["sample_id", "status"]).to_pydict()
    assert found.problems == []
    assert len(set(rows["sample_id"])) == len(rows["sample_id"]) == PROMPTS
    assert set(rows["status"]) == {"ok"}
    lines = _json_lines((house.folder / f"{POOL}.log").read_text(errors="replace"))
    assert any({"run", "shard", "worker"} <= line.keys() for line in lines)
    summary_line(
        "outages of a deployed run",
        f"away for {OUTAGE_S:.0f} s after {there} shards, retried after {delays} s; node lost after {lost_at} shards; "
        f"{end['type']}, {len(lines)} lines of JSON",
    )


def _json_lines(log: str) -> list[dict]:
    """The lines of the product; Ray puts the worker's name before those of its workers."""
    return [json.loads(text) for text in re.findall(r'\{"time".*\}', log)]
