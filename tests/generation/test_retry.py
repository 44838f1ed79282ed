"""`retry-failed` and `repair --accept` on a dataset of two parts: whatever ends them, the manifest lists what is there."""

import dataclasses
import os
import shutil
import signal

import pyarrow.parquet as pq
import pytest
from test_repair import finish
from world import save_prompts

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_settings import MergeSettings
from facediffuser.curation.merge import merge_stage
from facediffuser.dataset.manifest import entry_of_shard, read_manifest, read_sound_manifest
from facediffuser.dataset.seal import seal
from facediffuser.dataset.shards import encode_table
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError, Stopped
from facediffuser.generation.generate_check import check_repair
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.generation.generate_stage import ShardWorker
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.storage import StorageError, open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.repair import find_damage, repair_damage, retry_failed_rows, update_manifest

pytestmark = pytest.mark.usefixtures("local_driver")


@pytest.fixture(scope="module")
def merged(world, made, tmp_path_factory):
    """A finished dataset of two parts: 12 rows in four shards, and two rows in one."""
    root = tmp_path_factory.mktemp("merged")
    shutil.copytree(made[0].output, root / "first")
    finish(open_store(root / "first"), dataclasses.replace(made[0], output=str(root / "first")))
    prompts = save_prompts(root / "night.jsonl", [{"prompt": "{subject} at night", "prompt_id": "night"}])
    prepared = prepare(world.settings(root / "second", prompts=str(prompts), images_per_prompt=1))
    prepared.write()
    ShardGenerator(prepared.job, made[1].pipeline, made[1].scorers)(0)
    finish(prepared.job.store(), prepared.job)
    LocalDriver().run(
        merge_stage(MergeSettings(urls=[str(root / "first"), str(root / "second")], output=str(root / "merged")))
    )
    return open_store(root / "merged")


@pytest.fixture(autouse=True)
def loaded_once(made, monkeypatch):
    """Workers take the models and scorers that are loaded already."""
    monkeypatch.setattr(ShardWorker, "load", lambda self, job: ShardGenerator(job, made[1].pipeline, made[1].scorers))


@pytest.fixture
def whole(merged, tmp_path):
    shutil.copytree(merged.root, tmp_path / "dataset")
    return open_store(tmp_path / "dataset")


@pytest.fixture(scope="module")
def failed(merged, tmp_path_factory):
    """The dataset with a failed row in two shards of its first part, and in the one of its second."""
    whole = open_store(shutil.copytree(merged.root, tmp_path_factory.mktemp("failed") / "dataset"))
    manifest, replaced = read_manifest(whole), {0: {}, 1: {}}
    for number, shard in ((0, 1), (0, 2), (1, 0)):
        part = manifest.parts[number]
        table = pq.read_table(whole.url_of(part.shards[shard].key))
        rows = table.to_pylist()
        rows[0] |= {"status": "failed", "error": "a bad day", "image": None, "image_sha256": None}
        data = encode_table(table.from_pylist(rows, schema=table.schema))
        whole.put(part.shards[shard].key, data)
        whole.delete(part.layout.stats_key(shard))
        entry = entry_of_shard(part.shards[shard].key, data).model_dump()
        replaced[number][shard] = entry | {"computed_with": part.computed_with(shard)}
    update_manifest(whole.url, manifest, replaced)
    rewrite_card(whole)
    assert read_manifest(whole).counts.failed == 3 and verify(whole.url) == []
    return whole


@pytest.fixture
def failing(failed, tmp_path):
    """A copy of it."""
    return open_store(shutil.copytree(failed.root, tmp_path / "dataset"))


def contents(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("stats/")}


def retry(store, **given) -> int:
    return retry_failed_rows.fn(RetrySettings(url=store.url, **given)).counts.failed


def moved(store, *numbers) -> None:
    """Let the manifest say that models of some parts lay elsewhere."""
    manifest = read_sound_manifest(store)
    places = {"models": "/nowhere/models", "scorers": manifest.made_from["scorers"]}
    parts = [
        part.as_part(made_from=places) if number in numbers else part for number, part in enumerate(manifest.parts)
    ]
    seal(store, manifest.with_parts(parts))


def as_made(store, merged) -> bool:
    """Whether shards and card are those of the undisturbed dataset, and all is listed."""
    of_shards = [entry.sha256 for entry in read_sound_manifest(store).all_shards]
    same = contents(store)["README.md"] == contents(merged)["README.md"].replace(b"merged", b"dataset")
    return same and of_shards == [entry.sha256 for entry in read_manifest(merged).all_shards]


def test_a_part_that_cannot_be_made_here_is_named_and_the_others_are_made(failing, merged, caplog, world):
    moved(failing, 1)
    assert retry(failing) == 1 and verify(failing.url) == []
    assert [part.failed for part in read_manifest(failing).parts] == [0, 1]
    assert "1 row stay failed" in caplog.text and "is given with --models" in caplog.text
    assert retry(failing, models=str(world.models)) == 0
    assert verify(failing.url) == [] and as_made(failing, merged)


def test_where_no_part_can_be_made_it_is_said_before_a_driver_is_started_and_nothing_is_written(failing, monkeypatch):
    moved(failing, 0, 1)
    before = contents(failing)
    monkeypatch.setattr("facediffuser.tasks.repair.chosen_driver", None)
    for _ in range(2):
        with pytest.raises(InputError, match="/nowhere/models.*is given with --models"):
            check_repair(RetrySettings(url=failing.url))
        with pytest.raises(InputError, match="/nowhere/models.*is given with --models"):
            retry(failing)
    assert contents(failing) == before


def test_repair_makes_the_parts_that_it_can_and_names_the_shards_of_the_others(whole, merged):
    moved(whole, 1)
    before = contents(whole)
    first, second = (part.shards[0].key for part in read_manifest(whole).parts)
    for key in (first, second):
        whole.delete(key)
    settings = RepairSettings(url=whole.url)
    [left] = repair_damage.fn(settings, *find_damage.fn(settings))
    assert left.startswith(f"{second}: ") and left.endswith("is given with --models")
    assert contents(whole) == {key: data for key, data in before.items() if key != second}
    moved(whole, 0, 1)
    before = contents(whole)
    with pytest.raises(InputError, match="is given with --models"):
        repair_damage.fn(settings, *find_damage.fn(settings))
    assert contents(whole) == before


def test_what_repair_accepts_is_listed_although_another_part_is_still_damaged(whole, monkeypatch):
    manifest = read_sound_manifest(whole)
    listed = manifest.shards[0].model_copy(update={"sha256": "0" * 64})  # as if made on other hardware
    parts = [manifest.parts[0].as_part(shards=[listed, *manifest.shards[1:]]), manifest.parts[1]]
    seal(whole, manifest.with_parts(parts))
    second, real = parts[1].shards[0].key, ShardGenerator.replace
    whole.put(second, whole.get(second)[:-100])

    def replace(self, shard, **given):
        if self.job.layout.name:
            raise StorageError("the store did not answer")
        return real(self, shard, **given)

    settings = RepairSettings(url=whole.url, accept=True)
    with monkeypatch.context() as patch:
        patch.setattr(ShardGenerator, "replace", replace)
        with pytest.raises(StorageError, match="did not answer"):
            repair_damage.fn(settings, *find_damage.fn(settings))
    assert read_sound_manifest(whole).all_shards[:4] == manifest.all_shards[:4]
    named = verify(whole.url)  # the card cannot be of a damaged shard; it is written once that is whole
    assert any(line.startswith(f"{second}: ") for line in named)
    assert {line.split(":")[0].split("/")[0] for line in named} == {"data", "README.md", "card"}
    assert repair_damage.fn(settings, *find_damage.fn(settings)) == []
    assert verify(whole.url) == [] and read_sound_manifest(whole).all_shards == manifest.all_shards


def stopped_by_sigterm(shard):
    os.kill(os.getpid(), signal.SIGTERM)


def store_away(shard):
    raise StorageError("the store did not answer")


@pytest.mark.parametrize(("ends", "error"), [(stopped_by_sigterm, Stopped), (store_away, StorageError)])
def test_ended_midway_it_lists_what_it_put(failing, monkeypatch, ends, error):
    real, tried = ShardGenerator.replace, []

    def replace(self, shard, **given):
        tried.append(shard)
        if ends is store_away and len(tried) == 2:
            ends(shard)
        found = real(self, shard, **given)
        if ends is stopped_by_sigterm and len(tried) == 1:
            ends(shard)
        return found

    monkeypatch.setattr(ShardGenerator, "replace", replace)
    with pytest.raises(error):
        retry(failing)
    assert verify(failing.url) == [] and read_manifest(failing).counts.failed == 2


def no_better_than(store):
    """Return what stands for `ShardGenerator.replace`: the rows fail again as they did in the dataset of `store`."""

    def replace(self, shard, fewer_failed_than, manifest):
        key = self.job.layout.shard_key(shard)
        data = store.get(key)
        entry = entry_of_shard(key, data)
        part = next(part for part in read_manifest(store).parts if part.name == self.job.layout.name)
        stats = {**entry.model_dump(), "shard": shard, "computed_with": part.computed_with(shard)}
        if put := entry.failed < fewer_failed_than:
            self.store.delete(self.job.layout.stats_key(shard))
            self.store.put(key, data)
        return stats | {"put": put}

    return replace


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize(
    ("writes", "listed"),
    [(1, 3), (4, 1), (5, 1)],
    ids=["a shard without its stats", "shards, not listed", "shards, listed, and no card"],
)
def test_killed_it_is_mended_by_the_same_command_also_when_nothing_gets_better_then(
    failing, failed, monkeypatch, writes, listed
):
    put, left = LocalStore.put, [writes]

    def put_until(self, *given, **options):
        if left[0] <= 0:  # nothing is written after the end of a process
            raise Killed
        left[0] -= 1
        put(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", put_until)
        with pytest.raises(Killed):
            retry(failing)
    assert verify(failing.url)
    monkeypatch.setattr(ShardGenerator, "replace", no_better_than(failed))
    assert retry(failing) == listed and verify(failing.url) == []
    assert f"| failed rows | {listed} |" in failing.get("README.md").decode()


def test_another_command_meanwhile_is_not_undone_and_the_next_run_ends_well(failing, merged, monkeypatch):
    real, tried = ShardGenerator.replace, []

    def replace(self, shard, **given):
        tried.append(shard)
        if len(tried) == 2:
            moved(failing, 1)
        return real(self, shard, **given)

    monkeypatch.setattr(ShardGenerator, "replace", replace)
    second = failing.get(read_manifest(failing).shards[2].key)
    with pytest.raises(StorageError, match="changed while this command ran.*run it again"):
        retry(failing)
    manifest = read_sound_manifest(failing)
    assert manifest.parts[1].made_from["models"] == "/nowhere/models" and manifest.counts.failed == 3
    assert failing.get(manifest.shards[2].key) == second  # once the manifest is another, nothing more is put
    assert retry(failing) == 1 and verify(failing.url) == []
    assert tried == [1, 2, 2]  # the shard that was put is listed, not made once more
