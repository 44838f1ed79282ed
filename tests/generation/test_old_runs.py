"""A dataset begun or finished by the code before provenance was kept apart from a run's identity.

old_dataset/ is what that code wrote (two rows in two shards, of old_inputs/): its fingerprint covers the versions of
libraries and code and the number of threads.
"""

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.reading import count_rows
from facediffuser.dataset.schema import COMPUTED_WITH_KEY, FINGERPRINT_KEY, RUN_KEY
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.generation.generate_settings import RepairSettings
from facediffuser.generation.job import prepare
from facediffuser.modelfolder import model_digests
from facediffuser.runs import canonical_json, fingerprint_of
from facediffuser.scoring.scorers import load_scorers
from facediffuser.storage import open_store
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.repair import find_damage, repair_damage

pytestmark = pytest.mark.usefixtures("local_driver")

HERE = Path(__file__).parent
SHARDS = ("data/shard-00000-of-00002.parquet", "data/shard-00001-of-00002.parquet")


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of the finished dataset."""
    return Path(shutil.copytree(HERE / "old_dataset", tmp_path / "old"))


@pytest.fixture
def begun(old, world) -> Path:
    """The dataset with its second shard and its manifest missing, marked as a run of this world's models and scorers."""
    (old / "manifest.json").unlink()
    (old / SHARDS[1]).unlink()
    for path in (old / "stats").iterdir():
        path.unlink()
    run = json.loads(pq.read_schema(next((old / "plan").iterdir())).metadata[RUN_KEY])
    run |= {"models": model_digests(world.models), "scorers": load_scorers(str(world.scorers), "cpu").digests}
    marks = {FINGERPRINT_KEY: fingerprint_of(run).encode(), RUN_KEY: canonical_json(run).encode()}
    for path in (*(old / "plan").iterdir(), old / "subjects.parquet", old / SHARDS[0]):
        file = pq.ParquetFile(io.BytesIO(path.read_bytes()))
        schema = file.schema_arrow.with_metadata({**file.schema_arrow.metadata, **marks})
        with pq.ParquetWriter(path, schema) as writer:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group).replace_schema_metadata(schema.metadata))
    return old


def settings(world, output: Path, **others):
    inputs = {"subjects": str(HERE / "old_inputs/subjects"), "prompts": str(HERE / "old_inputs/prompts.jsonl")}
    sizes = {"shard_size": 1, "height": 64, "width": 64, "scheduler": "pndm"}
    return world.settings(output, **inputs, **sizes | others)


def generate(given) -> dict:
    prepared = plan_dataset.fn(given)
    result = generate_shards.fn(prepared.job)
    finish_dataset.fn(prepared.job)
    return result


def test_a_finished_one_is_read_verified_and_carded(old):
    store = open_store(old)
    assert verify(str(old)) == [] and count_rows(store) == 2
    assert write_card(store) and (old / "README.md").exists()
    manifest = read_manifest(store)
    assert manifest.provenances == [] and manifest.computed_with(0) is None
    assert manifest.recorded_provenances()[0]["threads"] == 1


def test_a_half_finished_one_is_resumed_under_its_own_fingerprint_with_one_warning(begun, world, caplog):
    kept = (begun / SHARDS[0]).read_bytes()
    result = generate(settings(world, begun))
    assert (result["kept"], result["made"]) == (1, 1)
    assert (begun / SHARDS[0]).read_bytes() == kept
    manifest = read_manifest(open_store(begun))
    there, new = (pq.read_schema(begun / key).metadata for key in SHARDS)
    assert there[FINGERPRINT_KEY] == new[FINGERPRINT_KEY] == manifest.fingerprint.encode()
    assert COMPUTED_WITH_KEY not in there and json.loads(new[COMPUTED_WITH_KEY])["hardware"]
    assert verify(str(begun)) == []
    assert [one["shards"] for one in manifest.provenances] == [1, 1]
    assert (manifest.computed_with(0), manifest.computed_with(1)["threads"]) == (None, 1)


def test_other_hardware_is_warned_of_once_as_soon_as_a_shard_shows_it(world, tmp_path, caplog):
    output = tmp_path / "run"
    generate(settings(world, output))
    assert "different hardware" not in caplog.text
    (output / "manifest.json").unlink()
    (output / SHARDS[1]).unlink()
    table = pq.read_table(output / SHARDS[0])
    there = json.loads(table.schema.metadata[COMPUTED_WITH_KEY]) | {"hardware": "another CPU"}
    marks = table.schema.metadata | {COMPUTED_WITH_KEY: canonical_json(there).encode()}
    pq.write_table(table.replace_schema_metadata(marks), output / SHARDS[0])
    prepared = plan_dataset.fn(settings(world, output))
    generate_shards.fn(prepared.job)
    assert caplog.text.count("different hardware (hardware another CPU there") == 1


def test_one_without_a_named_scheduler_keeps_the_models_own_however_few_the_steps(begun, world):
    result = generate(settings(world, begun, scheduler=None))
    assert (result["kept"], result["made"]) == (1, 1) and verify(str(begun)) == []


def test_other_software_is_one_warning_or_refused_where_the_exact_is_asked_for(begun, world, monkeypatch, caplog):
    monkeypatch.setattr("facediffuser.runs.__version__", "99.0")
    with pytest.raises(InputError, match="code 0.1.0 there, 99.0 here.*leave --exact out"):
        generate(settings(world, begun, exact=True))
    assert not (begun / SHARDS[1]).exists()
    generate(settings(world, begun))
    assert sum("code 0.1.0 there, 99.0 here" in message for message in caplog.messages) == 1
    assert verify(str(begun)) == []


def test_another_run_is_refused_as_ever(begun, world):
    with pytest.raises(InputError, match="holds another run .*num_inference_steps 3 there, 5 here"):
        prepare(settings(world, begun, steps=5))


def test_a_lost_shard_is_repaired_to_the_manifests_bytes_although_the_code_is_another(begun, world, monkeypatch):
    generate(settings(world, begun))
    lost = (begun / SHARDS[1]).read_bytes()
    (begun / SHARDS[1]).unlink()
    monkeypatch.setattr("facediffuser.runs.__version__", "99.0")
    repair = RepairSettings(url=str(begun))
    with pytest.raises(InputError, match="leave --exact out"):
        repair_damage.fn(RepairSettings(url=str(begun), exact=True), *find_damage.fn(repair))
    assert repair_damage.fn(repair, *find_damage.fn(repair)) == []
    assert (begun / SHARDS[1]).read_bytes() == lost and verify(str(begun)) == []
