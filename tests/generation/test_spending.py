"""What a run takes: shards of about a minute, hours, energy and money in stats, manifest and card."""

import ctypes
import json

import pytest
from pydantic import ValidationError

from facediffuser.batch_stage import Limits
from facediffuser.cards.card_facts import spent_lines
from facediffuser.dataset.manifest import Counts, read_manifest
from facediffuser.dataset.other_run import run_of_output
from facediffuser.dataset.plan import Layout
from facediffuser.dataset.spending import Spent, add_up, read_spent, total_spent
from facediffuser.dataset.verify import inspect
from facediffuser.flows import generate_dataset as flow
from facediffuser.generation.certify import certificate_stage
from facediffuser.generation.energy import EnergyMeter
from facediffuser.generation.estimate import shard_size_for
from facediffuser.generation.generate_stage import generate_stage, replacement_stage
from facediffuser.generation.job import GenerationJob, Prepared
from facediffuser.generation.measured_rate import Rate
from facediffuser.storage import open_store
from facediffuser.tasks.generate import Finished, finish_dataset, generate_shards, plan_dataset

pytestmark = pytest.mark.usefixtures("local_driver")

GPU_SHARD = {"rows": 500, "seconds": {"total": 1800.0}, "joules": 900_000.0}
CPU_SHARD = {"rows": 30, "seconds": {"total": 900.0}, "joules": None}


def test_hours_energy_and_cost_of_shards_are_added_up():
    spent = add_up([GPU_SHARD, GPU_SHARD], "gpu", 2.5)
    assert spent == Spent(
        images=1000, workers="gpu", worker_hours=1.0, images_per_hour=1000.0, energy_kwh=0.5, hour_price=2.5, cost=2.5
    )
    spent = add_up([CPU_SHARD, GPU_SHARD], "cpu", None)
    assert spent and (spent.energy_kwh, spent.cost) == (None, None)
    assert add_up([], "cpu", 1.0) is None


@pytest.mark.parametrize(("seconds", "size", "batch", "rows"), [
    (2.0, 1e6, 8, 16), (0.5, 1e6, 8, 80), (60.0, 1e6, 8, 8), (0.01, 1e6, 64, 320), (1e-5, 100.0, 64, 12_800),
])  # fmt: skip
def test_a_shard_takes_about_a_minute_and_fits_the_memory(seconds, size, batch, rows):
    assert shard_size_for(Rate(seconds, size, "cpu", "here"), batch) == rows
    # A rate that comes out a little different gives the same shards.
    assert shard_size_for(Rate(seconds * 0.97, size, "cpu", "here"), batch) == rows


def test_parts_are_summed_as_far_as_every_one_of_them_says():
    gpu, cpu = add_up([GPU_SHARD], "gpu", 2.0), add_up([CPU_SHARD, CPU_SHARD], "cpu", 0.5)
    assert gpu and cpu
    assert total_spent([None, gpu.model_dump()]) == gpu and total_spent([None]) is None
    twice = total_spent([gpu.model_dump()] * 2)
    assert twice and twice.cost and gpu.cost and gpu.energy_kwh
    assert (twice.images, twice.workers, twice.hour_price) == (2 * gpu.images, "gpu", 2.0)
    assert twice.worker_hours == pytest.approx(2 * gpu.worker_hours) and twice.cost == pytest.approx(2 * gpu.cost)
    assert twice.energy_kwh == pytest.approx(2 * gpu.energy_kwh)
    both = total_spent([gpu.model_dump(), cpu.model_dump()])
    assert both and (both.workers, both.hour_price, both.energy_kwh) == ("mixed", None, None)
    assert both.cost == pytest.approx((gpu.cost or 0) + (cpu.cost or 0))
    lines = dict(spent_lines(both))
    assert set(lines) == {"worker hours", "images per worker hour", "cost"} and "an hour" not in lines["cost"]


def test_cost_without_a_price_is_refused(world, tmp_path):
    with pytest.raises(ValidationError, match="gpu_hour_price"):
        world.settings(tmp_path / "out", max_cost=3.0)


def test_a_run_without_a_shard_size_measures_one_and_is_resumed_with_it(world, tmp_path):
    settings = world.settings(tmp_path / "out", shard_size=None, batch_size=1, gpu_hour_price=2.0)
    prepared = plan_dataset.fn(settings)
    size = prepared.job.layout.shard_size
    assert prepared.job.layout.rows > 8 and size > 1
    again = plan_dataset.fn(settings)
    assert (again.job.layout.shard_size, again.job.fingerprint) == (size, prepared.job.fingerprint)
    there = run_of_output(open_store(tmp_path / "out"))
    assert there and there.fingerprint == prepared.job.fingerprint

    generate_shards.fn(prepared.job)
    finish_dataset.fn(prepared.job)
    store = open_store(tmp_path / "out")
    spent = read_spent(store)
    assert spent and spent.images == prepared.job.layout.rows and spent.cost == round(spent.worker_hours * 2, 4)
    assert read_manifest(store).spent == spent.model_dump()
    assert "| CPU worker hours |" in store.get("README.md").decode()
    assert inspect(str(tmp_path / "out")).problems == []
    # Finished once more without a price it keeps the price it had.
    finish_dataset.fn(plan_dataset.fn(world.settings(tmp_path / "out", batch_size=1, shard_size=size)).job)
    assert json.loads(store.get("manifest.json"))["spent"]["hour_price"] == 2.0


class Nvml:
    """NVML's three calls, as its header declares them."""

    def __init__(self, code=0):
        self.code = code

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        assert uuid == b"GPU-1"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, energy):
        ctypes.cast(energy, ctypes.POINTER(ctypes.c_ulonglong))[0] = 12_345
        return self.code


def test_the_meter_counts_joules():
    assert EnergyMeter("GPU-1", Nvml()).joules() == 12.345
    with pytest.raises(OSError, match="NVML answers 3"):
        EnergyMeter("GPU-1", Nvml(3)).joules()


def test_all_stages_of_a_run_share_its_limits_and_what_was_begun_earlier_does_too(world, tmp_path, monkeypatch):
    settings = world.settings(tmp_path / "out", max_hours=8.0, max_cost=9.0, gpu_hour_price=2.0, stop_within=7.0)
    job = GenerationJob("out", "f", {"settings": {"device": "cpu"}}, Layout(4, 2), "miniature", "miniature")
    plans = iter([True, False])  # what was begun earlier is made first
    seen: list[Limits] = []
    done = {"made": 0, "kept": 0, "seconds": 0.0, "busy": 0.0}
    end = Finished(Counts(rows=0, ok=0, failed=0, shards=0), [])

    monkeypatch.setattr(flow, "plan_dataset", lambda settings: Prepared(job, None, None, resumes=next(plans)))
    monkeypatch.setattr(
        flow, "generate_shards", lambda job: seen.append(generate_stage(job, [0], print).limits) or done
    )
    monkeypatch.setattr(flow, "certify_dataset", lambda job: seen.append(certificate_stage(job, {}, []).limits))
    monkeypatch.setattr(
        flow, "finish_dataset", lambda job, _: seen.append(replacement_stage(job, "Retry", {}).limits) or end
    )
    flow.generate_dataset.fn(settings)
    assert len(seen) == 6 and {(one.hours, one.cost, one.hour_price, one.grace_s) for one in seen} == {
        (8.0, 9.0, 2.0, 7.0)
    }
    assert len({id(one.spending) for one in seen}) == 1 and seen[0].spending is not None
