"""`generate --extend`: rows are added to a finished dataset; those that are there keep ids, seeds and bytes."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from world import PROMPTS, save_prompts

from facediffuser.dataset.extension import NewRows, SampleIds
from facediffuser.dataset.manifest import Retraction, read_manifest, read_sound_manifest
from facediffuser.dataset.seal import seal
from facediffuser.dataset.spending import read_spent, total_spent
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import check_generate
from facediffuser.generation.generate_settings import RepairSettings
from facediffuser.generation.job import prepare
from facediffuser.storage import StorageError, open_store
from facediffuser.storage.local import LocalStore
from facediffuser.storage.output import put_folder
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.repair import find_damage, repair_damage

pytestmark = pytest.mark.usefixtures("local_driver")

MORE = [*PROMPTS, {"prompt": "{subject} at night", "prompt_id": "night"}]


def generate(settings) -> int:
    """Run the stages of the flow in this process; return how often a plan was made."""
    rounds = 0
    while True:
        rounds += 1
        prepared = plan_dataset.fn(settings)
        generate_shards.fn(prepared.job)
        finish_dataset.fn(prepared.job)
        if not prepared.resumes:
            return rounds


def contents(url, prefix="") -> dict[str, bytes]:
    store = open_store(url)
    return {info.key: store.get(info.key) for info in store.list(prefix)}


def rows(url) -> dict[str, dict]:
    table = pq.read_table(f"{url}/data").to_pylist()
    found = {row["sample_id"]: row for row in table}
    assert len(found) == len(table)
    return found


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A finished dataset of two subjects, two prompts and one image of each."""
    root = tmp_path_factory.mktemp("extend")
    prompts = save_prompts(root / "prompts.jsonl", PROMPTS[:2])
    generate(world.settings(root / "dataset", prompts=str(prompts), images_per_prompt=1, extend=True))
    return root


@pytest.fixture
def dataset(small, tmp_path):
    shutil.copytree(small / "dataset", tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.fixture(scope="module")
def more(world, small):
    """Settings with one more prompt and two images of each, and the dataset that they made of the small one."""
    prompts = save_prompts(small / "more.jsonl", [*PROMPTS[:2], MORE[-1]])
    shutil.copytree(small / "dataset", small / "extended")
    settings = world.settings(small / "extended", prompts=str(prompts), images_per_prompt=2, extend=True)
    assert generate(settings) == 1
    return settings


@pytest.fixture
def grown(more, dataset):
    """The same settings for a copy of the small dataset."""
    return more.model_copy(update={"output": str(dataset)})


@pytest.fixture
def extended(more, tmp_path):
    """A copy of the dataset that was extended, and the settings for it."""
    shutil.copytree(more.output, tmp_path / "extended")
    return tmp_path / "extended", more.model_copy(update={"output": str(tmp_path / "extended")})


def test_a_dataset_grows_and_what_was_there_stays_byte_for_byte(world, small, extended, tmp_path):
    before, data = rows(small / "dataset"), contents(small / "dataset", "data/")
    dataset, grown = extended
    after = rows(dataset)
    assert len(before) == 4 and len(after) == 12
    assert {name: after[name] for name in before} == before
    assert {key: value for key, value in contents(dataset, "data/").items() if key in data} == data
    assert verify(str(dataset)) == []
    manifest = read_manifest(open_store(dataset))
    assert [part.name for part in manifest.parts] == ["", "p0002"] and manifest.counts.rows == 12
    assert len({part.fingerprint for part in manifest.parts}) == 2
    # Hours are summed over the parts: in what the card shows, and for both parts in the manifest.
    assert read_spent(open_store(dataset)) == total_spent(part.spent for part in manifest.parts)
    assert [part.spent and part.spent["images"] for part in manifest.parts] == [4, 8]
    # A third person, a third time; seeds and ids are those of the whole made at once.
    people = tmp_path / "people"
    shutil.copytree(world.subjects, people)
    shutil.copytree(people / "bob", people / "cyd")
    third = grown.model_copy(update={"subjects": str(people)})
    generate(third)
    assert len(rows(dataset)) == 18 and verify(str(dataset)) == []
    whole = prepare(third.model_copy(update={"output": str(tmp_path / "whole"), "extend": False}))
    planned = {row["sample_id"]: row["seed"] for table in whole.plan.tables(100) for row in table.to_pylist()}
    assert {name: row["seed"] for name, row in rows(dataset).items()} == planned
    assert set(pq.read_table(dataset / "subjects.parquet")["subject_id"].to_pylist()) == {"ada", "bob", "cyd"}


def test_on_s3_it_grows_to_the_same_bytes(small, more, s3_bucket):
    url = f"{s3_bucket.url}/dataset"
    put_folder(open_store(url), small / "dataset", "manifest.json")
    generate(more.model_copy(update={"output": url}))
    assert contents(url, "data/") == contents(more.output, "data/")
    assert contents(url, "plan/") == contents(more.output, "plan/")
    assert verify(url) == []


def test_repeated_it_adds_nothing(extended):
    dataset, grown = extended
    before = contents(dataset)
    generate(grown)
    assert contents(dataset) == before
    # The command that made the first part finds it finished, and keeps the other.
    first = grown.model_copy(
        update={"prompts": str(dataset.parent / "first.jsonl"), "images_per_prompt": 1, "extend": False}
    )
    save_prompts(dataset.parent / "first.jsonl", PROMPTS[:2])
    generate(first)
    assert contents(dataset) == before


def test_an_interrupted_extension_is_finished_first_with_other_inputs_by_then(world, dataset, grown, tmp_path):
    prepared = plan_dataset.fn(grown)
    generator = prepared.job
    from facediffuser.generation.shard_generator import ShardGenerator

    ShardGenerator(generator)(0)
    assert any("is not finished; run `facediffuser generate --extend`" in line for line in verify(str(dataset)))
    prompts = save_prompts(tmp_path / "still-more.jsonl", [*PROMPTS[:2], MORE[-1], MORE[2]])
    assert generate(grown.model_copy(update={"prompts": str(prompts)})) == 2
    assert len(rows(dataset)) == 16 and verify(str(dataset)) == []
    assert not open_store(dataset).list("stats/subjects-")


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_at_any_write_the_same_command_ends_with_the_same_bytes(dataset, grown, more, monkeypatch):
    put, at = LocalStore.put, {"left": -1}

    def counted(self, *given, **options):
        if at["left"] == 0:
            raise Killed
        at["left"] -= 1
        return put(self, *given, **options)

    monkeypatch.setattr(LocalStore, "put", counted)
    expected = contents(more.output)
    writes = 0
    for number in range(100):
        at["left"] = 2 * number + 1
        try:
            generate(grown)
            break
        except Killed:
            writes += 1
    at["left"] = -1
    assert writes >= 3
    named = {
        key: data
        for key, data in contents(dataset).items()
        if not key.startswith(("stats/", "README", "card/", "manifest"))
    }
    assert named == {key: expected[key] for key in named} and verify(str(dataset)) == []


def test_finished_once_more_it_does_not_undo_what_another_command_wrote_meanwhile(world, small, dataset, monkeypatch):
    store, put = open_store(dataset), LocalStore.put
    first = world.settings(dataset, prompts=str(small / "prompts.jsonl"), images_per_prompt=1, extend=False)
    job, waiting = plan_dataset.fn(first).job, ["README.md"]

    def watched(self, key, *given, **options):
        if key in waiting:
            waiting.remove(key)
            manifest = read_sound_manifest(store)
            seal(store, manifest.model_copy(update={"retractions": [Retraction(subjects=1, rows=1)]}))
        return put(self, key, *given, **options)

    monkeypatch.setattr(LocalStore, "put", watched)
    with pytest.raises(StorageError, match="changed while this command ran"):
        finish_dataset.fn(job)
    assert not waiting and read_sound_manifest(store).retractions
    finish_dataset.fn(job)
    assert verify(str(dataset)) == [] and read_sound_manifest(store).retractions


def test_two_drivers_that_extend_a_dataset_at_once_both_end_well(grown, extended, monkeypatch):
    job, waiting, put = plan_dataset.fn(grown).job, ["README.md"], LocalStore.put
    store, made = job.store(), open_store(extended[0])
    for info in made.list():
        if job.layout.name in info.key and not store.exists(info.key):
            store.put(info.key, made.get(info.key))

    def watched(self, key, *given, **options):
        if key in waiting:
            waiting.remove(key)
            stats = json.loads(store.get(job.layout.stats_key(0)))
            stats["seconds"]["total"] += 1000.0
            store.put(job.layout.stats_key(0), json.dumps(stats).encode())
            store.delete("stats/spent.json")
            finish_dataset.fn(job)
        return put(self, key, *given, **options)

    monkeypatch.setattr(LocalStore, "put", watched)
    assert finish_dataset.fn(job).counts.ok == 12 and not waiting
    assert verify(store.url) == [] and len(read_manifest(store).parts) == 2


def test_other_settings_another_text_and_another_person_are_refused(world, dataset, grown, tmp_path):
    for other, said in (({"seed": 1}, "seed 0 there, 1 here"), ({"steps": 4}, "steps 3 there, 4 here"),
                        ({"image_format": "jpeg"}, "image_format")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            check_generate(grown.model_copy(update=other))
    changed = [{"prompt": "{subject} writing a book", "prompt_id": "book", "category": "action"}]
    with pytest.raises(InputError, match="prompt book is .*reading.* there, .*writing"):
        check_generate(grown.model_copy(update={"prompts": str(save_prompts(tmp_path / "changed.jsonl", changed))}))
    people = tmp_path / "people"
    shutil.copytree(world.subjects, people)
    (people / "bob" / "1.webp").write_bytes((people / "bob" / "1.webp").read_bytes() + b"\0")
    with pytest.raises(InputError, match="reference pictures differ: bob/1.webp with another content"):
        prepare(grown.model_copy(update={"subjects": str(people)}))
    (people / "subjects.csv").write_text("subject_id,class_word\nada,girl\n")
    with pytest.raises(InputError, match="class word of ada: woman there, girl here"):
        check_generate(grown.model_copy(update={"subjects": str(people)}))
    with pytest.raises(InputError, match="holds another run"):
        check_generate(grown.model_copy(update={"extend": False}))


def test_new_rows_are_those_of_the_plan_that_are_not_known(world, tmp_path):
    plan = check_generate(world.settings(tmp_path / "out")).plan
    ids = [row["sample_id"] for table in plan.tables(5) for row in table.to_pylist()]
    new = NewRows(plan, SampleIds(ids[::2]))
    tables = list(new.tables(4))
    assert [name for table in tables for name in table["sample_id"].to_pylist()] == ids[1::2]
    assert [table.num_rows for table in tables] == [4, 2] and len(new) == 6
    assert len(NewRows(plan, SampleIds(ids))) == 0 and len(NewRows(plan, SampleIds())) == len(ids)


def test_a_lost_manifest_is_written_again_with_all_parts(extended):
    dataset, grown = extended
    before = contents(dataset)
    (dataset / "manifest.json").unlink()
    generate(grown)
    after = contents(dataset)
    documents = [json.loads(one["manifest.json"]) for one in (before, after)]
    for document in documents:
        for part in (document, *document["more_parts"]):
            # Where the models were, and what the run took, stood in the manifest alone.
            part.pop("made_from", None)
            part.pop("spent", None)
        document.pop("digest")
    assert documents[0] == documents[1]
    assert verify(str(dataset)) == []


def test_damage_after_an_extension_is_repaired_in_every_part(extended):
    """A shard of each part and the plan of the added one: each comes back with the bytes that it had, faces included."""
    dataset, _ = extended
    store = open_store(dataset)
    before, parts = contents(dataset), read_manifest(store).parts
    first, second = (part.shards[0].key for part in parts)
    store.delete(first)
    store.put(second, before[second][:-100])
    settings = RepairSettings(url=store.url)
    manifest, problems = find_damage.fn(settings)
    assert {problem.key for problem in problems} == {first, second}
    assert repair_damage.fn(settings, manifest, problems) == []
    [plan] = parts[1].layout.part_keys()
    store.delete(plan)
    assert repair_damage.fn(settings, *find_damage.fn(settings)) == []
    after = contents(dataset)
    assert {key: after[key] for key in after if not key.startswith("stats/")} == {
        key: data for key, data in before.items() if not key.startswith("stats/")
    }
    assert "faces" in pq.read_schema(f"{dataset}/{second}").names and verify(str(dataset)) == []
