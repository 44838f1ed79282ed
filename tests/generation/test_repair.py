"""Repair: what verify finds is made again with the manifest's bytes, failed rows get another try, one row is compared."""

import dataclasses
import json
import shutil

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.manifest import build_manifest, build_part, object_entries, read_manifest, shard_entry
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.dataset.seal import seal
from facediffuser.dataset.shards import encode_shard, finished_shards
from facediffuser.dataset.verify import find_problems, verify
from facediffuser.errors import InputError
from facediffuser.evaluation.copies import recorded_scorers
from facediffuser.flows.cli import main
from facediffuser.flows.repair_dataset import repair_dataset, retry_failed
from facediffuser.generation.generate_settings import RemakeSettings, RepairSettings, RetrySettings
from facediffuser.generation.job import Listed
from facediffuser.generation.repair import job_of_dataset, remake, sort_damage
from facediffuser.generation.shard_generator import failed_row
from facediffuser.storage import open_store


def finish(store, job) -> None:
    """Write card and manifest of a dataset as it is now."""
    infos = finished_shards(store, job.layout, job.fingerprint)
    entries = [shard_entry(store, job.layout, shard, infos[shard].info) for shard in sorted(infos)]
    marks = [infos[shard].marks.computed_with for shard in sorted(infos)]
    places = {"models": job.models, "scorers": job.scorers}
    objects = object_entries(store, [*job.layout.part_keys(), SUBJECTS_KEY])
    store.delete("manifest.json")
    write_card(store)
    part = build_part(job.fingerprint, job.run, job.layout, entries, places, marks)
    seal(store, build_manifest([part], objects))


@pytest.fixture
def finished(made, tmp_path):
    """(job, store) of a copy of the finished dataset with its manifest."""
    job, source = made[0], made[0].store()
    store = open_store(tmp_path / "copy")
    for info in source.list():
        store.put(info.key, source.get(info.key))
    finish(store, job)
    return dataclasses.replace(job, output=store.url), store


def contents(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("stats/")}


def damage(store, key) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def test_copies_are_looked_for_with_the_scorers_the_dataset_was_made_with(finished):
    job, store = finished
    assert recorded_scorers(store) == job.scorers
    store.delete("manifest.json")
    assert recorded_scorers(store) == "paper"
    store.put("manifest.json", b"{")
    with pytest.raises(InputError, match="not a manifest"):
        recorded_scorers(store)


def test_verify_finds_a_changed_plan_lost_references_and_a_run_that_is_not_the_fingerprints(finished):
    job, store = finished
    plan, subjects = job.layout.part_key(0), store.get(SUBJECTS_KEY)
    store.delete(SUBJECTS_KEY)
    assert verify(store.url) == [f"{SUBJECTS_KEY}: missing"]
    store.put(SUBJECTS_KEY, subjects)
    damage(store, plan)
    assert any(problem.startswith(f"{plan}: sha256") for problem in verify(store.url))
    document = json.loads(store.get("manifest.json"))
    document["run"]["settings"]["seed"] = 9
    store.put("manifest.json", json.dumps(document).encode())
    assert "manifest.json: its run is not the one of its fingerprint" in verify(store.url)


def test_repair_makes_what_is_damaged_again_with_the_same_bytes_and_touches_nothing_else(
    finished, prefect_harness, without_ray
):
    job, store = finished
    before = contents(store)
    keys = [job.layout.shard_key(shard) for shard in range(4)]
    store.delete(keys[0])
    damage(store, keys[2])
    store.delete(job.layout.part_key(0))
    # A plan and the shards of it cannot both be lost: the rows would be gone.
    with without_ray(), pytest.raises(InputError, match="both damaged"):
        repair_dataset(RepairSettings(url=store.url))
    store.put(job.layout.part_key(0), before[job.layout.part_key(0)])
    store.put("data/extra.parquet", b"x")
    whole = {info.key: info.version for info in store.list("data/") if info.key in (keys[1], keys[3])}
    with without_ray():
        result = repair_dataset(RepairSettings(url=store.url))
    assert len(result["found"]) == 3 and len(result["left"]) == 1 and "--remove-foreign" in result["left"][0]
    assert {info.key: info.version for info in store.list("data/") if info.key in whole} == whole
    assert repair_dataset(RepairSettings(url=store.url, remove_foreign=True))["left"] == []
    assert contents(store) == before
    assert verify(store.url) == []


def test_a_lost_plan_is_made_again_from_the_shards(finished, prefect_harness):
    job, store = finished
    before = contents(store)
    store.delete(job.layout.part_key(0))
    assert len(verify(store.url)) == 5  # the part, and the rows of four shards cannot be compared
    assert repair_dataset(RepairSettings(url=store.url))["left"] == []
    assert contents(store) == before


def test_what_cannot_be_made_from_the_dataset_is_reported(finished):
    job, store = finished
    manifest = read_manifest(store)
    store.delete(SUBJECTS_KEY)
    assert sort_damage(store, manifest, find_problems(store, manifest)).references
    store.delete(job.layout.shard_key(1))
    with pytest.raises(InputError, match="run `generate` again"):
        sort_damage(store, manifest, find_problems(store, manifest))


def test_a_shard_that_comes_out_otherwise_is_not_put_unless_accepted(finished, made):
    job, store = finished
    generator = type(made[1])(job, made[1].pipeline, made[1].scorers)
    store.delete(job.layout.shard_key(1))
    assert generator.replace(1, Listed("0" * 64, None), changed=False)["put"] is False
    assert not store.exists(job.layout.shard_key(1))
    assert generator.replace(1)["put"] is True
    assert verify(store.url) == []


def test_other_models_than_the_datasets_are_refused(finished, tmp_path):
    manifest = read_manifest(finished[1])
    with pytest.raises(InputError, match="not the models of this dataset"):
        job_of_dataset(finished[1], manifest, "miniature", None, gpu=False)
    with pytest.raises(InputError, match="give --models"):
        job_of_dataset(finished[1], manifest.model_copy(update={"made_from": {}}), None, None, gpu=False)
    known = manifest.made_from
    for option in ("models", "scorers"):
        moved = manifest.model_copy(update={"made_from": {**known, option: str(tmp_path / "moved")}})
        with pytest.raises(InputError, match=f"moved.*lie now is given with --{option}"):
            job_of_dataset(finished[1], moved, None, None, gpu=False)
    with pytest.raises(InputError, match="was made on cpu"):
        job_of_dataset(finished[1], manifest, None, None, gpu=True)


def test_failed_rows_get_another_try_and_end_as_the_undisturbed_run(finished, prefect_harness, without_ray):
    job, store = finished
    before, shards = contents(store), read_manifest(store).shards
    key = job.layout.shard_key(1)
    rows = pq.read_table(f"{store.url}/{key}").to_pylist()
    planned = {name: rows[1][name] for name in list(rows[1])[:14]}
    store.put(key, encode_shard([rows[0], failed_row(planned, ValueError("a bad day")), rows[2]], job.shard_schema))
    store.delete(job.layout.stats_key(1))
    finish(store, job)
    assert read_manifest(store).counts.failed == 1 and verify(store.url) == []
    with without_ray():
        result = retry_failed(RetrySettings(url=store.url))
    assert (result["ok"], result["failed"]) == (12, 0)
    after = contents(store)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert read_manifest(store).shards == shards
    with without_ray():
        assert retry_failed(RetrySettings(url=store.url))["failed"] == 0


def test_one_image_is_made_again_from_its_row_and_compared(finished, capsys, tmp_path):
    job, store = finished
    settings = RemakeSettings(sample_id="bob~p00001~0", dataset=store.url)
    made = remake(settings, gpu=False)
    assert made.equal and made.batch_rows == 1
    out = str(tmp_path / "remade")
    assert main(["remake", "ada~book~0", "--dataset", store.url, "--output", out]) == 0
    assert "equal" in capsys.readouterr().out
    row = pq.read_table(f"{store.url}/data").to_pylist()[0]
    assert (tmp_path / "remade" / row["image"]["path"]).read_bytes() == row["image"]["bytes"]


def test_an_image_that_comes_out_otherwise_is_reported(finished, made, capsys):
    job, store = finished
    key = job.layout.shard_key(0)
    rows = pq.read_table(f"{store.url}/{key}").to_pylist()
    rows[1]["image"] = rows[0]["image"]
    store.put(key, encode_shard(rows, job.shard_schema))
    assert main(["remake", rows[1]["sample_id"], "--dataset", store.url]) == 1
    assert "differs in image" in capsys.readouterr().out
    assert main(["remake", "nobody~book~0", "--dataset", store.url]) == 2
    assert "no row 'nobody~book~0'" in capsys.readouterr().err


def test_an_image_is_made_again_only_with_its_models_and_scorers_and_where_it_can_be_put(
    finished, world, tmp_path, capsys, monkeypatch
):
    store = finished[1]
    before = contents(store)
    others = shutil.copytree(world.scorers, tmp_path / "scorers")
    weights = others / "identity" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    words = ["remake", "ada~book~0", "--dataset", store.url, "--quiet"]
    assert main([*words, "--scorers", str(others)]) == 2
    assert "not the scorers of this dataset" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("facediffuser.generation.repair.remake", None)  # to be refused before anything is made
    for output in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/x", "http://127.0.0.1:9/x", "n" * 300):
        assert main([*words, "--output", str(output)]) == 2, output
    assert len(capsys.readouterr().err.splitlines()) == 5 and contents(store) == before
