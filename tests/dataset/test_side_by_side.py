"""Commands on a dataset that another command changes meanwhile, or to which rows are still being added."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset.finished import finish_dataset

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_settings import RetractSettings
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset.added_columns import write_added_columns
from facediffuser.dataset.certificate import summary_key
from facediffuser.dataset.manifest import (
    build_manifest,
    object_entries,
    read_manifest,
    read_sound_manifest,
    write_manifest,
)
from facediffuser.dataset.seal import seal
from facediffuser.dataset.verify import verify
from facediffuser.evaluation.add_columns import ColumnWorker, column_stage
from facediffuser.evaluation.image_sources import dataset_keys
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.flows.cli import exit_code, main
from facediffuser.storage import StorageError, open_store
from facediffuser.storage.local import LocalStore
from facediffuser.storage.reading import DamagedError
from facediffuser.tasks.local_driver import LocalDriver

pytestmark = pytest.mark.usefixtures("plain_plots")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A finished dataset of ada and bob, and one of cyd alone."""
    root = tmp_path_factory.mktemp("originals")
    finish_dataset(root / "dataset")
    finish_dataset(root / "more", names=("cyd",))
    return root


@pytest.fixture
def store(originals, tmp_path):
    shutil.copytree(originals / "dataset", tmp_path / "dataset")
    return open_store(tmp_path / "dataset")


def contents(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


def score(store) -> list[str]:
    return LocalDriver().run(column_stage(ScoreSettings(url=store.url, add=["sharpness"], device="cpu")))


def changed_by_another(store) -> None:
    """What another command does: a column is added and the manifest written anew."""
    ids = ["ada~p0~0", "ada~p1~0", "bob~p0~0", "bob~p1~0"]
    key = write_added_columns(store, "other", pa.table({"sample_id": ids, "other": [1.0] * 4}), {})
    manifest = read_sound_manifest(store)
    seal(store, manifest.model_copy(update={"made_from": {"models": "elsewhere"}}), [key])


def meanwhile(monkeypatch, key, store) -> None:
    """Let another command finish just before an object of the dataset is put."""
    put, waiting = LocalStore.put, [key]

    def watched(self, name, *given, **options):
        if waiting and name == waiting[0] and self.url == store.url:
            waiting.clear()
            changed_by_another(store)
        return put(self, name, *given, **options)

    monkeypatch.setattr(LocalStore, "put", watched)


# --- rows that are being added ----------------------------------------------------------------------------------------


@pytest.fixture
def growing(store, originals):
    """The dataset while rows of cyd are being added: their plan, one shard and their certificate are there."""
    more = open_store(originals / "more")
    part = read_manifest(more)
    added = part.as_part(name="p0002").layout
    store.put(added.part_key(0), more.get(part.layout.part_key(0)))
    store.put(added.shard_key(0), more.get(part.layout.shard_key(0)))
    store.put(summary_key("p0002"), json.dumps({"verdict": "rubbish"}).encode())
    return store


def test_card_columns_and_evaluation_are_of_the_rows_that_the_manifest_lists(growing):
    before = contents(growing)
    [begun] = verify(growing.url)
    assert "rows are being added" in begun
    rewrite_card(growing)
    assert contents(growing) == before
    keys = score(growing)
    assert pq.read_table(growing.url_of(keys[0]))["sample_id"].to_pylist() == [
        "ada~p0~0", "ada~p1~0", "bob~p0~0", "bob~p1~0"
    ]  # fmt: skip
    rewrite_card(growing, keys)
    assert verify(growing.url) == [begun] and "cyd" not in growing.get("README.md").decode()
    assert dataset_keys(growing) == [entry.key for entry in read_manifest(growing).shards]


def test_a_dataset_none_of_whose_listed_shards_is_there_is_one_line(growing, capsys):
    for entry in read_manifest(growing).shards:
        growing.delete(entry.key)
    before = contents(growing)
    for command in ("card", "score"):
        assert main([command, growing.url, "--quiet"]) == 2
        assert "none of the shards that its manifest.json lists" in capsys.readouterr().err
    assert contents(growing) == before


# --- another command meanwhile ----------------------------------------------------------------------------------------


def refused(command) -> None:
    with pytest.raises(StorageError, match="changed while this command ran.*run it again$") as caught:
        command()
    assert exit_code(caught.value) == 1


def test_a_card_does_not_undo_what_another_command_listed_meanwhile(store, monkeypatch):
    meanwhile(monkeypatch, "README.md", store)
    refused(lambda: rewrite_card(store))
    assert read_sound_manifest(store).made_from == {"models": "elsewhere"}
    rewrite_card(store)
    assert verify(store.url) == [] and "| other " in store.get("README.md").decode()


def test_a_retraction_does_not_undo_what_another_command_listed_meanwhile(store, monkeypatch):
    def retract():
        LocalDriver().run(retract_stage(RetractSettings(url=store.url, subject="ada")))

    read, calls = LocalStore.open, []

    def opened(self, key, *given, **options):
        if key == "manifest.json" and not calls:
            calls.append(key)
            with read(self, key, *given, **options) as file:
                data = file.read()
            changed_by_another(store)  # after it was read, before it is marked
            store.put("old", data)
            return read(self, "old", *given, **options)
        return read(self, key, *given, **options)

    monkeypatch.setattr(LocalStore, "open", opened)
    refused(retract)
    monkeypatch.setattr(LocalStore, "open", read)
    store.delete("old")
    assert not read_manifest(store).retracting
    retract()
    assert verify(store.url) == [] and read_manifest(store).retractions
    assert "ada" not in pq.read_table(store.url_of("scores/other.parquet"))["sample_id"].to_pylist()[0]


def test_every_manifest_is_put_only_in_the_place_of_the_one_it_was_derived_of(store):
    mine = read_sound_manifest(store)
    changed_by_another(store)
    now = store.get("manifest.json")
    built = build_manifest(mine.parts, object_entries(store, mine.planned_keys()))
    for late in (mine, mine.with_parts(mine.parts), mine.model_copy(update={"retracting": "x"}), built):
        refused(lambda late=late: write_manifest(store, late))
        refused(lambda late=late: seal(store, late))
    assert store.get("manifest.json") == now
    # The same bytes are no change: a request that is repeated because its answer was lost succeeds.
    theirs = read_sound_manifest(store)
    assert write_manifest(store, theirs) == theirs and store.get("manifest.json") == now
    # What is returned can be derived of.
    again = seal(store, seal(store, theirs.model_copy(update={"made_from": {"models": "x"}})))
    assert again == read_sound_manifest(store) and again.made_from == {"models": "x"}


def test_a_manifest_that_was_removed_meanwhile_is_not_put_back(store):
    manifest = read_sound_manifest(store)
    store.delete("manifest.json")
    refused(lambda: seal(store, manifest))
    assert not store.exists("manifest.json")


def test_columns_of_shards_that_were_replaced_meanwhile_are_not_written(store, monkeypatch):
    keys, put, scored = [entry.key for entry in read_manifest(store).shards], LocalStore.put, []
    real = ColumnWorker.score

    def counting(self, key):
        scored.append(key)
        found = real(self, key)
        if scored == keys:  # the first shard is replaced while the last one is looked at
            put(store, keys[0], store.get(keys[0]) + b"")
        return found

    monkeypatch.setattr(ColumnWorker, "score", counting)
    with pytest.raises(StorageError, match=f"{keys[0]}: changed by another command while this one ran; run it again"):
        score(store)
    assert not store.list("scores/")
    score(store)
    assert scored == [*keys, keys[0]] and not store.list("stats/scores-")


def test_a_shard_that_turns_out_damaged_loses_nothing_of_the_others(store, monkeypatch):
    keys, scored, real = [entry.key for entry in read_manifest(store).shards], [], ColumnWorker.score
    data = store.get(keys[1])

    def counting(self, key):
        scored.append(key)
        return real(self, key)

    monkeypatch.setattr(ColumnWorker, "score", counting)
    store.put(keys[1], data[:4] + b"\xff" * 64 + data[68:])  # the footer says nothing of it
    with pytest.raises(DamagedError):
        score(store)
    assert len(store.list("stats/scores-")) == 1
    store.put(keys[1], data)
    score(store)
    assert scored == [*keys, keys[1]] and not store.list("stats/scores-")
