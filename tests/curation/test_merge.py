"""`merge`: datasets become one by copying; nothing is lost, doubled or changed, whenever it is interrupted."""

import hashlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset.finished import ALONE, finish_dataset

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_check import check_merge
from facediffuser.curation.curation_settings import MergeSettings
from facediffuser.curation.merge import merge_stage
from facediffuser.dataset.added_columns import read_added_columns, write_added_columns
from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.local_driver import LocalDriver


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


def merge(urls, output):
    return LocalDriver().run(merge_stage(MergeSettings(urls=[str(url) for url in urls], output=str(output))))


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
