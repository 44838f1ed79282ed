"""`retract`: a person is taken out, nothing of them is left, and everybody else's bytes are as before."""

import hashlib
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.test_merge import Killed, contents, images, merge
from dataset.finished import ALONE, TOGETHER, finish_dataset
from PIL import Image

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_check import check_retract
from facediffuser.curation.curation_settings import RetractSettings
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset.added_columns import read_added_columns, write_added_columns
from facediffuser.dataset.certificate import CERTIFICATE_SCHEMA, encode_rows, part_keys
from facediffuser.dataset.image_files import encode_image
from facediffuser.dataset.inputs import Prompt
from facediffuser.dataset.manifest import read_manifest, read_sound_manifest, write_manifest
from facediffuser.dataset.mentions import Search, find_mentions, text_of_picture, without_mentions
from facediffuser.dataset.schema import with_marks
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.local_driver import LocalDriver


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Four people alone and in pairs; a column that names another row, and one with faces in it."""
    root = tmp_path_factory.mktemp("retract")
    store = finish_dataset(
        root / "dataset", names=("ada", "ada-2", "bob", "cyd"), prompts=(*ALONE, TOGETHER), shard_size=3
    )
    ids = list(images(store.root))
    faces = [[{"subject_id": name, "similarity": 0.5} for name in one.split("~")[0].split("+")] for one in ids]
    columns = {"sample_id": ids, "duplicate_of": [*ids[1:], ids[0]], "labels": faces, "sharpness": [1.0] * len(ids)}
    rewrite_card(store, [write_added_columns(store, "beside", pa.table(columns), {})])
    return store


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original.root, tmp_path / "dataset")
    return open_store(tmp_path / "dataset")


def retract(store, subject="ada"):
    return LocalDriver().run(retract_stage(RetractSettings(url=store.url, subject=subject)))


def test_nothing_is_left_and_the_others_are_untouched(store):
    before, shards = images(store.root), contents(store)
    assert len(find_mentions(store, "ada").mentions) > 8
    (store.root / "data" / ".shard-00000.x.partial").write_bytes(b"ada~p0~0")
    manifest = retract(store)
    absence = find_mentions(store, "ada")
    assert (absence.mentions, absence.notes) == ([], []) and absence.objects == len(store.list())
    assert not any(b"ada~" in path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    gone = {name for name in before if "ada" in name.split("~")[0].split("+")}
    assert len(gone) == 5 and images(store.root) == {name: data for name, data in before.items() if name not in gone}
    assert verify(store.url) == []
    touched = [entry.key for entry, old in zip(manifest.shards, read_old(shards).shards, strict=True) if entry != old]
    for key, data in contents(store).items():
        if key.startswith("data/") and key not in touched:
            assert data == shards[key]
    assert manifest.retractions[0].model_dump() == {"subjects": 1, "rows": 5}
    # The person with a longer name is another one.
    assert "ada-2" in pq.read_table(store.root / "subjects.parquet")["subject_id"].to_pylist()
    added = read_added_columns(store).tables[store.url_of("scores/beside.parquet")].to_pylist()
    assert len(added) == len(before) - 5 and sum(row["duplicate_of"] is None for row in added) >= 1


def read_old(shards):
    from facediffuser.dataset.manifest import Manifest

    return Manifest.model_validate_json(shards["manifest.json"])


def test_everybody_can_be_taken_out_one_after_another(store):
    for name, left in (("ada", 9), ("bob", 5), ("cyd", 2), ("ada-2", 0)):
        assert retract(store, name).counts.rows == left
        assert verify(store.url) == [] and find_mentions(store, name).mentions == []
    assert [one.subjects for one in read_manifest(store).retractions] == [1, 1, 1, 1]


def test_a_part_of_a_merged_dataset(store, tmp_path):
    finish_dataset(tmp_path / "other", names=("ada", "dan"), prompts=ALONE[:1], images=4)
    for info in open_store(tmp_path / "other").list("data/"):
        assert info.size
    ids = {name for name in images(tmp_path / "other")} & set(images(store.root))
    assert ids  # ada's first image is in both, so the two do not merge before it is taken out
    with pytest.raises(InputError, match="both have the row"):
        merge([store.url, tmp_path / "other"], tmp_path / "both")
    retract(store)
    merge([store.url, tmp_path / "other"], tmp_path / "both")
    both = open_store(tmp_path / "both")
    assert verify(both.url) == [] and read_manifest(both).counts.rows == 9 + 8
    manifest = retract(both)
    assert verify(both.url) == [] and find_mentions(both, "ada").mentions == []
    assert [one.rows for one in manifest.retractions] == [5, 4] and manifest.counts.rows == 9 + 4


def test_killed_at_any_write_it_goes_on(store, original, tmp_path, monkeypatch):
    shutil.copytree(original.root, tmp_path / "undisturbed")
    undisturbed = open_store(tmp_path / "undisturbed")
    retract(undisturbed)
    put, left = LocalStore.put, [0]

    def counted(self, *given, **options):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return put(self, *given, **options)

    monkeypatch.setattr(LocalStore, "put", counted)
    kills = 0
    for number in range(60):
        left[0] = 1 + number
        try:
            retract(store)
            break
        except Killed:
            kills += 1
            left[0] = -1
            assert any("is being taken out" in line for line in verify(store.url))
            with pytest.raises(InputError, match="run `facediffuser retract` with it again"):
                read_sound_manifest(store)
            with pytest.raises(InputError, match="another subject is being taken out"):
                check_retract(RetractSettings(url=store.url, subject="bob"))
    left[0] = -1
    assert kills > 3 and verify(store.url) == [] and find_mentions(store, "ada").mentions == []
    expected, found = contents(undisturbed), contents(store)
    for key in expected:
        if not key.startswith(("README", "card/", "manifest", "stats/")):
            assert found[key] == expected[key], key
    assert json.loads(found["manifest.json"])["shards"] == json.loads(expected["manifest.json"])["shards"]


def test_who_is_not_there_and_a_damaged_manifest_are_refused(store):
    with pytest.raises(InputError, match="no subject 'eve'"):
        check_retract(RetractSettings(url=store.url, subject="eve"))
    document = json.loads(store.get("manifest.json"))
    document["counts"]["rows"] += 1
    store.put("manifest.json", json.dumps(document).encode())
    with pytest.raises(InputError, match="changed since it was written"):
        check_retract(RetractSettings(url=store.url, subject="ada"))


def test_a_mention_is_found_wherever_it_is(store):
    retract(store)
    put = {
        "card/notes.html": b"<p>with ada, at sea</p>",
        "card/x.json": json.dumps({"who": ["ada"]}).encode(),
        "stats/odd.bin": b"\x00\x01ada+bob~p0~0\xff",
    }
    for key, data in put.items():
        store.put(key, data)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({"who": '{"a": ["ada"]}'}), sink)
    store.put("scores/marked.parquet", sink.getvalue().to_pybytes())
    found = find_mentions(store, "ada").mentions
    assert {line.partition(":")[0] for line in found} == {*put, "scores/marked.parquet"}
    search = Search("ada")
    for text in ("ada-2", "adam", "x.ada", "ada_1", "ada.png"):
        assert not search.in_text(text), text
    for text in ("ada", "ada~p0", "bob+ada~p", "(ada)", "ada.", "ada/1.png", "b, ada"):
        assert search.in_text(text), text


def test_a_face_of_another_keeps_all_but_the_likeness_to_the_person():
    face = {"subject_id": "bob", "box": [1.0, 2.0], "other_subject_id": "ada", "other_similarity": 0.3, "yaw": 4.0}
    assert without_mentions([face], "ada") == [face | {"other_subject_id": None, "other_similarity": None}]
    assert without_mentions(face, "bob") == dict.fromkeys(face)
    assert without_mentions({"duplicate_of": "ada+bob~p0~0", "n": 1}, "cyd") == {"duplicate_of": "ada+bob~p0~0", "n": 1}


def test_an_id_that_is_a_word_of_the_prompts(tmp_path):
    store = finish_dataset(tmp_path / "dataset", names=("sea", "bob"))
    retract(store, "sea")
    absence = find_mentions(store, "sea")
    assert absence.mentions == [] and "is a word of the prompts" in absence.notes[0]


@pytest.mark.parametrize("subject", ["1", "face-diffuser", "string"])
def test_an_id_that_is_an_id_or_a_setting_of_the_dataset(tmp_path, subject):
    prompts = (*ALONE, Prompt("1", "one", ("", " in a car"), (0,)), Prompt("a 1", None, ("", " and ", ""), (0, 1)))
    store = finish_dataset(tmp_path / "dataset", names=(subject, "2"), prompts=prompts, shard_size=3)
    others = [row for row in rows(store) if subject not in row["subject_ids"]]
    assert find_mentions(store, subject).mentions
    # An earlier version marked the dataset and failed at its first shard.
    marked = read_manifest(store)
    write_manifest(
        store,
        marked.model_copy(
            update={"retracting": hashlib.sha256(f"{marked.fingerprint}\0{subject}".encode()).hexdigest()}
        ),
    )
    retract(store, subject)
    assert verify(store.url) == [] and rows(store) == others and len(others) == 3
    assert find_mentions(store, subject).mentions == []


def rows(store):
    return pq.read_table(store.root / "data").to_pylist()


def test_a_part_of_a_certificate_that_shows_nobody_else(store):
    fingerprint, run = read_manifest(store).fingerprint, read_manifest(store).run
    keys = part_keys(2, 1)
    pictures = [row for row in rows(store) if row["sample_id"] in ("ada~p0~0", "bob~p0~0")]
    for key, row in zip(keys, pictures, strict=True):
        there = {name: row[name] for name in row if name in CERTIFICATE_SCHEMA.names}
        store.put(key, encode_rows([there], with_marks(CERTIFICATE_SCHEMA, fingerprint, run, True)))
    rewrite_card(store, keys)
    assert verify(store.url) == []
    for name, left in (("ada", [0, 1]), ("bob", [0, 0])):
        retract(store, name)
        assert [pq.read_table(store.root / key).num_rows for key in keys] == left and verify(store.url) == []


def test_an_added_column_that_allows_no_nulls(store):
    ids = list(images(store.root))
    schema = pa.schema([pa.field("sample_id", pa.string(), False), pa.field("likest", pa.string(), False)])
    table = pa.table({"sample_id": ids, "likest": ["ada"] * len(ids)}, schema=schema)
    rewrite_card(store, [write_added_columns(store, "likest", table, {})])
    retract(store)
    added = pq.read_table(store.root / "scores/likest.parquet")["likest"].to_pylist()
    assert added == [None] * 9 and verify(store.url) == [] and find_mentions(store, "ada").mentions == []


def test_a_prompt_id_is_no_subject_in_a_text():
    for search in (Search("1"), Search("1", common=True)):
        assert not search.in_text("2~1~0") and not search.in_bytes(b"<id>2+3~1~1</id>")
        assert search.in_text("1~2~0") and search.in_text("2+1~3~0") and search.in_text("1+2~3~0 ")
    assert not Search("sea", common=True).in_text("at sea") and Search("ada").in_text("~ada/x.png")


def test_what_lies_between_and_behind_the_scans_of_a_jpeg_is_read():
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for options in ({}, {"progressive": True}):
        noise.save(sink := io.BytesIO(), "JPEG", **options)
        data = sink.getvalue()
        scan = data.rindex(b"\xff\xda")
        between = data[:scan] + b"\xff\xfe\x00\x05ada" + data[scan:]
        behind = data + b"with bob" + data
        assert Search("ada").in_bytes(text_of_picture(between)) and Search("bob").in_bytes(text_of_picture(behind))
        assert len(text_of_picture(data)) < 50 < len(data)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_tables_of_a_picture_name_nobody(image_format):
    data = text_of_picture(encode_image(Image.new("RGB", (49, 49), (49, 49, 49)), image_format, "bob~p~0"))
    assert b"bob~p~0" in data and not any(Search(name).in_bytes(data) for name in "123AQq")
    assert b"at the end" in text_of_picture(encode_image(Image.new("RGB", (9, 9)), image_format, "x") + b"at the end")
