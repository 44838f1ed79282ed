"""`merge`: datasets become one by copying; nothing is lost, doubled or changed, whenever it is interrupted."""

import hashlib
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset.finished import ALONE, finish_dataset
from PIL import Image

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_check import check_merge
from facediffuser.curation.curation_settings import MergeSettings, RetractSettings
from facediffuser.curation.merge import merge_stage
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset.added_columns import read_added_columns, write_added_columns
from facediffuser.dataset.extension import read_references
from facediffuser.dataset.inputs import Prompt
from facediffuser.dataset.manifest import (
    EARLIER_FIELDS,
    entry_of_shard,
    object_entry,
    read_manifest,
    write_manifest,
)
from facediffuser.dataset.references import encode_references
from facediffuser.dataset.shards import encode_table
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.local_driver import LocalDriver

LATE = Prompt("late", "context", ("", " in the rain"), (0,))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    finish_dataset(root / "one")
    finish_dataset(root / "two", names=("bob", "cyd"), prompts=ALONE[:1], images=2).delete("stats/shard-00000.json")
    # Bob's rows of the first image are in both: leave him out here.
    finish_dataset(root / "other", names=("cyd", "dan"), images=3)
    return root


def contents(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


def images(url) -> dict[str, str]:
    table = pq.read_table(f"{url}/data", columns=["sample_id", "image"]).to_pylist()
    found = {row["sample_id"]: hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in table}
    assert len(found) == len(table)
    return found


def settings_of(urls, output):
    return MergeSettings(urls=[str(url) for url in urls], output=str(output))


def merge(urls, output):
    return LocalDriver().run(merge_stage(settings_of(urls, output)))


def test_two_become_one(originals, tmp_path):
    one, other = originals / "one", originals / "other"
    manifest = merge([one, other], tmp_path / "both")
    assert verify(str(tmp_path / "both")) == []
    assert images(tmp_path / "both") == images(one) | images(other)
    assert [part.name for part in manifest.parts] == ["", "p0002"] and manifest.counts.rows == 4 + 12
    people = pq.read_table(tmp_path / "both/subjects.parquet")["subject_id"].to_pylist()
    assert people == ["ada", "bob", "cyd", "dan"]
    before = contents(open_store(tmp_path / "both"))
    merge([one, other], tmp_path / "both")
    assert contents(open_store(tmp_path / "both")) == before
    # A merged one is merged like any other.
    finish_dataset(tmp_path / "third", names=("eve",))
    merge([tmp_path / "both", tmp_path / "third"], tmp_path / "all")
    assert verify(str(tmp_path / "all")) == [] and len(images(tmp_path / "all")) == 18
    assert [part.name for part in read_manifest(open_store(tmp_path / "all")).parts] == ["", "p0002", "p0003"]


def test_added_columns_come_along(originals, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(originals / name, tmp_path / name)
    for name in ("one", "other"):
        store = open_store(tmp_path / name)
        ids = list(images(tmp_path / name))
        key = write_added_columns(
            store, "sharpness", pa.table({"sample_id": ids, "sharpness": [1.0] * len(ids)}), {"sharpness": "1"}
        )
        rewrite_card(store, [key])
    key = write_added_columns(
        open_store(tmp_path / "one"), "extra", pa.table({"sample_id": ["ada~p0~0"], "extra": [2.0]}), {}
    )
    rewrite_card(open_store(tmp_path / "one"), [key])
    merge([tmp_path / "one", tmp_path / "other"], tmp_path / "both")
    added = read_added_columns(open_store(tmp_path / "both"))
    found = added.rows(pa.array(["ada~p0~0", "cyd~p0~0"])).to_pylist()
    assert found == [{"extra": 2.0, "sharpness": 1.0}, {"extra": None, "sharpness": 1.0}]
    assert added.digests()["sharpness"] == "1" and verify(str(tmp_path / "both")) == []


def test_what_does_not_fit_is_refused(originals, tmp_path):
    def check(*names, output=tmp_path / "out"):
        check_merge(MergeSettings(urls=[str(originals / name) for name in names], output=str(output)))

    with pytest.raises(InputError, match="both have the row 'bob~p0~0'"):
        check("one", "two")
    with pytest.raises(InputError, match="named twice"):
        check("one", "one")
    with pytest.raises(InputError, match="no manifest.json"):
        check("one", "nowhere/..")
    with pytest.raises(InputError, match="holds 'README.md'"):
        check("one", "other", output=originals / "two")
    finish_dataset(tmp_path / "stranger", names=("ada",), prompts=ALONE[1:], images=3)
    assert not (tmp_path / "out").exists()
    merge([originals / "one", originals / "other"], tmp_path / "out")
    with pytest.raises(InputError, match="a merge of other datasets"):
        check("other", "one")


def test_one_id_of_two_people_is_refused(originals, tmp_path, monkeypatch):
    from dataset import finished

    monkeypatch.setattr(finished, "WORDS", {"cyd": "girl"})
    finished.finish_dataset(tmp_path / "stranger", names=("cyd",), prompts=ALONE[:1], images=9)
    store = open_store(tmp_path / "stranger")
    store.delete("nothing")
    with pytest.raises(InputError, match="both have the row|subject 'cyd' has other pictures or another class word"):
        check_merge(MergeSettings(urls=[str(originals / "other"), store.url], output=str(tmp_path / "out")))


def test_a_damaged_source_is_named(originals, tmp_path):
    shutil.copytree(originals / "one", tmp_path / "one")
    shard = next((tmp_path / "one/data").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="is not as its manifest says"):
        merge([tmp_path / "one", originals / "other"], tmp_path / "both")


@pytest.fixture(scope="module")
def merged(originals, tmp_path_factory):
    """(URLs, folder) of a finished merge."""
    urls, folder = [originals / "one", originals / "other"], tmp_path_factory.mktemp("merged") / "both"
    merge(urls, folder)
    return urls, folder


def taken_out(store):
    LocalDriver().run(retract_stage(RetractSettings(url=store.url, subject="ada")))


def being_taken_out(store):
    write_manifest(store, read_manifest(store).model_copy(update={"retracting": "0" * 64}))


def added(store):
    manifest = read_manifest(store)
    part = manifest.parts[1]
    layout = part.as_part(name="p0003").layout
    shards = [entry.model_copy(update={"key": layout.shard_key(n)}) for n, entry in enumerate(part.shards)]
    write_manifest(store, manifest.with_parts([*manifest.parts, part.as_part(name="p0003", shards=shards)]))


def being_added(store):
    store.put("plan/part-p0003-00000-of-00001.parquet", store.get(read_manifest(store).layout.part_key(0)))


def made_again(store):
    """As `retry-failed` and `repair --accept` do."""
    manifest = read_manifest(store)
    key, part = manifest.more_parts[0].shards[0].key, manifest.more_parts[0]
    data = encode_table(pq.read_table(store.root / key).replace_schema_metadata({"other": "bytes"}))
    store.put(key, data)
    changed = part.as_part(shards=[entry_of_shard(key, data), *part.shards[1:]])
    write_manifest(store, manifest.with_parts([manifest.parts[0], changed]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (taken_out, "people were taken out of it"),
        (being_taken_out, "a subject is being taken out of it"),
        (added, "rows were added to it"),
        (being_added, "rows are being added to it"),
        (made_again, "data/shard-p0002-00000-of-00006.parquet is not the one of .*other"),
    ],
)
def test_what_was_done_to_a_merged_dataset_is_not_undone(merged, tmp_path, change, says):
    urls, folder = merged
    shutil.copytree(folder, tmp_path / "both")
    store = open_store(tmp_path / "both")
    change(store)
    before = contents(store)
    for begin in (merge, lambda *given: check_merge(settings_of(*given))):
        with pytest.raises(InputError, match=f"changed since it was merged \\({says}\\); give an empty output"):
            begin(urls, store.root)
    assert contents(store) == before


def test_what_a_finished_merge_lacks_is_copied_once_more(merged, tmp_path):
    urls, folder = merged
    shutil.copytree(folder, tmp_path / "both")
    store = open_store(tmp_path / "both")
    ids = list(images(folder))
    rewrite_card(store, [write_added_columns(store, "new", pa.table({"sample_id": ids, "new": [1.0] * len(ids)}), {})])
    before = contents(store)
    for key in ("subjects.parquet", "data/shard-00000-of-00002.parquet", "README.md"):
        store.delete(key)
        merge(urls, store.root)
        assert verify(store.url) == [] and contents(store).keys() == before.keys()
    # Columns that were added to it since are its own.
    assert contents(store)["scores/new.parquet"] == before["scores/new.parquet"]


def with_references(store, **columns):
    """Replace columns of a dataset's references, and list them as they are now."""
    table = read_references(store)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    store.put("subjects.parquet", data := encode_references(table, table.schema))
    manifest = read_manifest(store)
    objects = [entry for entry in manifest.objects if entry.key != "subjects.parquet"]
    write_manifest(store, manifest.model_copy(update={"objects": [*objects, object_entry("subjects.parquet", data)]}))


def picture(colour, **options):
    Image.new("RGB", (8, 8), colour).save(sink := io.BytesIO(), "PNG", **options)
    return {"bytes": sink.getvalue(), "path": "1.png"}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"crop_box": [[0, 0, 8, 8], [0, 0, 7, 8]]}, "another crop"),
        ({"crop_box": [[0, 0, 8, 8], None]}, "another crop"),
        ({"image": [picture("green"), picture("red")]}, "other pixels"),
        ({"identity": [[1.0, 0.0], [0.6, 0.8]]}, "another identity vector"),
        ({"identity": [[1.0, 0.0], [1.0, 0.0, 0.0]]}, "another identity vector"),
        ({"identity": [[1.0, 0.0], None]}, "another identity vector"),
        ({"source_sha256": ["2" * 64, "3" * 64]}, "other pictures or another class word"),
        ({"class_word": ["person", "boy"]}, "other pictures or another class word"),
    ],
)
def test_a_person_who_looks_otherwise_in_one_of_the_datasets_is_refused(originals, tmp_path, columns, says):
    store = finish_dataset(tmp_path / "late", names=("aaron", "dan"), prompts=[LATE])
    with_references(store, **columns)
    urls = [originals / "other", store.root]
    with pytest.raises(
        InputError, match=rf"other and .*late: subject 'dan' has {says}.* in each; generate one of them"
    ):
        check_merge(settings_of(urls, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_person_of_two_datasets_has_one_set_of_references(originals, tmp_path):
    store = finish_dataset(tmp_path / "late", names=("aaron", "dan"), prompts=[LATE])
    # Another file name, another version of the encoder, and other hardware.
    with_references(
        store, reference=["aaron/1.png", "dan/0.png"], image=[picture("green"), picture("green", compress_level=0)],
        identity=[[1.0, 0.0], [0.9999, 0.001]],
    )  # fmt: skip
    merge([originals / "other", store.root], tmp_path / "both")
    people = pq.read_table(tmp_path / "both/subjects.parquet")["reference"].to_pylist()
    assert people == ["cyd/1.png", "dan/1.png", "aaron/1.png"] and verify(str(tmp_path / "both")) == []


def test_terms_that_differ_are_said(tmp_path, caplog):
    for name, consent in (("one", "yes"), ("late", "no")):
        finish_dataset(tmp_path / name, names=("dan",), prompts=[LATE if name == "late" else ALONE[0]])
        store = open_store(tmp_path / name)
        table = read_references(store).append_column("consent", pa.array([consent]))
        store.put("subjects.parquet", data := encode_references(table, table.schema))
        with_references(store)
        assert data == store.get("subjects.parquet")
    check_merge(settings_of([tmp_path / "one", tmp_path / "late"], tmp_path / "both"))
    assert "what subject 'dan' agreed to is not what" in caplog.text


def test_a_manifest_of_the_earliest_kind_is_refused_before_anything_is_written(originals, tmp_path):
    shutil.copytree(originals / "one", tmp_path / "one")
    store = open_store(tmp_path / "one")
    document = json.loads(store.get("manifest.json"))
    kept = EARLIER_FIELDS - {"objects"}
    store.put("manifest.json", json.dumps({name: document[name] for name in document if name in kept}).encode())
    urls = [store.root, originals / "other"]
    for begin in (merge, lambda *given: check_merge(settings_of(*given))):
        with pytest.raises(InputError, match="lists neither plan nor references; run `facediffuser card .*one` first"):
            begin(urls, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    rewrite_card(store)
    merge(urls, tmp_path / "both")
    assert verify(str(tmp_path / "both")) == []


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_at_any_write_it_ends_with_the_same_bytes(originals, tmp_path, monkeypatch):
    urls = [originals / "one", originals / "other"]
    merge(urls, tmp_path / "undisturbed")
    expected = contents(open_store(tmp_path / "undisturbed"))
    put, left = LocalStore.put, [0]

    def counted(self, *given, **options):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return put(self, *given, **options)

    monkeypatch.setattr(LocalStore, "put", counted)
    kills = 0
    for number in range(1, 60):
        left[0] = number
        try:
            merge(urls, tmp_path / "both")
            break
        except Killed:
            kills += 1
    left[0] = -1
    assert kills > 3
    found = contents(open_store(tmp_path / "both"))
    different = [
        key
        for key in expected
        if found.get(key) != expected[key] and not key.startswith(("README", "card/", "manifest"))
    ]
    assert not different and verify(str(tmp_path / "both")) == []
