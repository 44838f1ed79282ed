"""The flow on Prefect and Ray: from settings to a verified dataset, kept, mended or refused when run again."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from facediffuser.batch_stage import WorkerPool
from facediffuser.dataset.reading import open_dataset
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.flows.generate_dataset import generate_dataset
from facediffuser.generation.estimate import estimate
from facediffuser.generation.measured_rate import Rate, rate_of_dataset
from facediffuser.storage import open_store
from facediffuser.tasks.generate import FailedRowsError, finish_dataset


@pytest.fixture(scope="module")
def flow_run(world, tmp_path_factory, prefect_harness, ray_session):
    """(settings, result) of the flow run once."""
    settings = world.settings(tmp_path_factory.mktemp("flow") / "dataset", workers=2)
    return settings, generate_dataset(settings)


@pytest.fixture(scope="module")
def dry_run(world, tmp_path_factory, prefect_harness, without_ray):
    """What a dry run returned; its output is `unwritten`."""
    output = tmp_path_factory.mktemp("dry") / "out"
    with without_ray():
        return generate_dataset(world.settings(output, dry_run=True)) | {"unwritten": output}


def test_a_dry_run_shows_what_would_be_made_and_writes_nothing(dry_run):
    result = dry_run
    assert (result["rows"], result["shards"], len(result["examples"])) == (12, 4, 3)
    assert not result["unwritten"].exists()


def test_a_dry_run_estimates_hours_bytes_and_cost_from_a_batch_it_made_in_memory(dry_run):
    assert dry_run["measured_by"] == "a sample of 2 images" and dry_run["worker_hours"] > 0
    assert 12 * 500 < dry_run["bytes"] < 12 * 50_000


def test_an_estimate_says_the_time_by_the_clock(dry_run):
    assert dry_run["wall_time"].endswith("with 1 worker, after the models are loaded")
    assert dry_run["wall_hours"] == dry_run["worker_hours"]  # one worker makes all four shards
    rate = Rate(36.0, 100.0, "cpu", "a test", 72.0)
    shared = estimate(100, rate, None, workers=4)
    assert (shared["worker_hours"], shared["wall_hours"]) == (1.0, 0.25)
    # Of ten shards the worker that ends last makes three; the certificate's rows are shared, too.
    found = estimate(100, rate, None, certificate_rows=10, workers=4, shard_size=10)
    assert (found["worker_hours"], found["wall_hours"]) == (1.2, 0.35)
    assert found["wall_time"] == "21 min 00 s with 4 workers, after the models are loaded"
    assert WorkerPool(workers=3, cpus=1).at_once(gpus=0, cpus=2, units=9) == 2
    assert WorkerPool(gpu=True).at_once(gpus=8, cpus=64, units=3) == 3
    assert WorkerPool(fewest=1, most=64, gpu=True).at_once(gpus=8, cpus=64, units=99) == 8


def test_an_estimate_follows_the_measured_rate_of_a_dataset(flow_run):
    stats = [json.loads(open_store(flow_run[0].output).get(f"stats/shard-0000{n}.json")) for n in range(4)]
    rate = rate_of_dataset(flow_run[0].output)
    assert rate.bytes_per_image == sum(one["bytes"] for one in stats) / 12
    hours = sum(one["seconds"]["total"] for one in stats) / 12 * 1_000_000 / 3600
    found = estimate(1_000_000, rate, hour_price=2.0)
    assert found["worker_hours"] == pytest.approx(hours, abs=1e-3)
    assert found["cost"] == pytest.approx(2 * hours, abs=0.01)
    assert "cost" not in estimate(1, rate, None)


def test_the_flow_ends_with_a_dataset_that_verifies(flow_run):
    settings, result = flow_run
    assert (result["rows"], result["ok"], result["shards_made"]) == (12, 12, 4)
    assert verify(settings.output) == []
    assert "face-diffuser" in result["table"]
    assert open_store(settings.output).exists("README.md")


def test_workers_do_not_change_the_bytes(flow_run, made):
    settings, _ = flow_run
    stores = open_store(settings.output), made[0].store()
    one, other = ({info.key: store.get(info.key) for info in store.list("data/")} for store in stores)
    assert one == other


def test_run_again_it_keeps_what_is_finished_and_generates_what_is_missing(flow_run, without_ray):
    settings, _ = flow_run
    store = open_store(settings.output)
    before = {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("stats/")}
    store.delete("data/shard-00002-of-00004.parquet")
    store.delete("manifest.json")
    with without_ray():
        result = generate_dataset(settings)
    assert (result["shards_kept"], result["shards_made"]) == (3, 1)
    assert {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("stats/")} == before


def test_another_run_on_the_same_output_is_refused_by_the_flow(flow_run):
    settings, _ = flow_run
    before = open_store(settings.output).list()
    with pytest.raises(InputError, match="holds another run"):
        generate_dataset(settings.model_copy(update={"guidance_scale": 7.5}))
    assert open_store(settings.output).list() == before


def test_more_failures_than_allowed_fail_the_run_after_the_manifest(flow_run, made, tmp_path):
    job, source = made[0], made[0].store()
    store = open_store(tmp_path / "out")
    for info in source.list():
        store.put(info.key, source.get(info.key))
    key = job.layout.stats_key(0)
    stats = json.loads(store.get(key))
    store.put(key, json.dumps(stats | {"ok": 2, "failed": 1}).encode())
    moved = dataclasses.replace(job, output=store.url, max_failed=0.01)
    with pytest.raises(FailedRowsError, match="1 of 12 rows failed"):
        finish_dataset.fn(moved)
    assert json.loads(store.get("manifest.json"))["counts"]["failed"] == 1


def test_rows_that_are_not_finite_are_failed_rows_and_count_for_max_failed(
    world, tmp_path, prefect_harness, without_ray
):
    models = shutil.copytree(world.models, tmp_path / "models")
    path = models / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    # Each value is finite, what the decoder makes of them is not.
    state["decoder.conv_in.weight"] = torch.full_like(state["decoder.conv_in.weight"], 3e38)
    save_file(state, path, metadata={"format": "pt"})
    settings = world.settings(tmp_path / "out", models=str(models), images_per_prompt=1, max_failed=0.5)
    failed = pytest.raises(FailedRowsError, match="6 of 6 rows failed, more than --max-failed 0.5")
    with without_ray(), failed:
        generate_dataset(settings)
    rows = open_dataset(settings.output).to_table(columns=["status", "error", "image", "ip"]).to_pylist()
    assert {row["error"] for row in rows} == {"NotFiniteError: the decoded image is not finite"}
    assert all(row["status"] == "failed" and row["image"] is None and row["ip"] is None for row in rows)
    assert verify(settings.output) == []


def test_a_run_with_missing_shards_does_not_finish(flow_run, made, tmp_path):
    job, source = made[0], made[0].store()
    store = open_store(tmp_path / "out")
    for info in source.list("plan/"):
        store.put(info.key, source.get(info.key))
    moved = dataclasses.replace(job, output=store.url, max_failed=0.01)
    with pytest.raises(RuntimeError, match="4 shards missing"):
        finish_dataset.fn(moved)
    assert not store.exists("manifest.json")
