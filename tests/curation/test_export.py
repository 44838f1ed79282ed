"""`export`: each format is read back by its own reader; the split leaks nobody; whenever interrupted, the same bytes."""

import hashlib
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.test_merge import Killed, contents, images
from dataset.finished import ALONE, TOGETHER, finish_dataset
from PIL import Image
from skimage import data

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.curation.curation_check import check_export
from facediffuser.curation.curation_settings import ExportSettings
from facediffuser.curation.export import export_stage
from facediffuser.curation.face_crops import FaceCrops
from facediffuser.curation.selection import split_subjects
from facediffuser.dataset.added_columns import write_added_columns
from facediffuser.dataset.reading import open_dataset
from facediffuser.errors import InputError
from facediffuser.faces import ALIGNED_LANDMARKS, aligned_crop
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore
from facediffuser.tasks.local_driver import LocalDriver

LANDMARKS = [[20.0, 24.0], [44.0, 24.0], [32.0, 36.0], [22.0, 46.0], [42.0, 46.0]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four people alone and in pairs, 14 rows of 64 px with a face for each subject; `sharpness` stands beside."""
    root = tmp_path_factory.mktemp("export") / "dataset"
    names, prompts = ("ada", "bob", "cyd", "d.an"), (*ALONE, TOGETHER)
    store = finish_dataset(root, names=names, prompts=prompts, side=64, shard_size=4, labels=faces_of, embedding_size=3)
    ids = list(images(root))
    columns = {"sample_id": ids, "sharpness": [float(n) for n in range(len(ids))]}
    rewrite_card(store, [write_added_columns(store, "beside", pa.table(columns), {})])
    return store


def faces_of(row):
    measured = {name: 1.0 for name in ("probability", "yaw", "pitch", "roll", "size", "sharpness")}
    known = {"box": [8.0, 8.0, 56.0, 60.0], "landmarks": LANDMARKS, "similarity": 0.5, "embedding": [0.6, 0.8, 0.0]}
    return {"faces": [{"subject_id": one, **known, **measured} for one in row["subject_ids"]]}


def export(dataset, output, to, **others):
    settings = ExportSettings(url=dataset.url, to=to, output=str(output), **({"rows_per_file": 3} | others))
    check_export(settings)
    return LocalDriver().run(export_stage(settings))


def listed(output, manifest):
    store = open_store(output)
    assert {info.key for info in store.list()} == {entry["key"] for entry in manifest["objects"]} | {"manifest.json"}
    for entry in manifest["objects"]:
        assert hashlib.sha256(store.get(entry["key"])).hexdigest() == entry["sha256"]


def test_webdataset_reads_it(dataset, tmp_path):
    import webdataset

    manifest = export(
        dataset,
        tmp_path / "out",
        "webdataset",
        where="pc > 0.1 and not list_contains(subject_ids, 'bob') and faces[1].embedding[2] > 0.5",
    )
    listed(tmp_path / "out", manifest)
    tars = sorted(str(path) for path in (tmp_path / "out").glob("train-*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil"))
    expected = {name: digest for name, digest in images(dataset.root).items() if "bob" not in name}
    assert [sample["json"]["sample_id"] for sample in samples] == list(expected)
    assert all(sample["png"].size == (64, 64) and sample["txt"] == sample["json"]["prompt"] for sample in samples)
    faces = samples[0]["json"]["faces"]
    assert [face["subject_id"] for face in faces] == samples[0]["json"]["subject_ids"]
    assert faces[0]["landmarks"] == LANDMARKS and faces[0]["similarity"] == 0.5
    assert samples[0]["json"]["sharpness"] == 0.0 and len({sample["__key__"] for sample in samples}) == len(samples)
    assert manifest["counts"]["rows"] == len(expected) and manifest["left_out"]["condition"] == 14 - len(expected)


def test_torchvision_and_datasets_read_the_folders(dataset, tmp_path):
    from datasets import load_dataset
    from torchvision.datasets import ImageFolder

    manifest = export(dataset, tmp_path / "out", "imagefolder", test_share=0.25)
    listed(tmp_path / "out", manifest)
    train, test = (ImageFolder(tmp_path / "out" / side) for side in ("train", "test"))
    assert len(manifest["subjects"]["test"]) == 1 and test.classes == manifest["subjects"]["test"]
    assert len(train) == 3 * 2 + 3 and len(test) == 2 and manifest["left_out"]["both_sides"] == 3
    assert "ada+bob" in train.classes or "ada" in test.classes or "bob" in test.classes
    for side in ("train", "test"):
        rows = load_dataset(
            "imagefolder", data_dir=str(tmp_path / "out"), split=side, cache_dir=str(tmp_path / "cache")
        )
        assert {name for row in rows for name in row["subject_ids"]} <= set(manifest["subjects"][side])
        assert all(row["image"].size == (64, 64) and row["prompt"] for row in rows)


def test_lmdb_reads_it(dataset, tmp_path):
    import lmdb

    listed(tmp_path / "out", export(dataset, tmp_path / "out", "lmdb", rows_per_file=5))
    found = {}
    for path in sorted((tmp_path / "out").glob("train-*.lmdb")):
        with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as rows:
            for number in range(int(rows.get(b"num-samples"))):
                meta = json.loads(rows.get(f"meta-{number:09d}".encode()))
                found[meta["sample_id"]] = hashlib.sha256(rows.get(f"image-{number:09d}".encode())).hexdigest()
                assert rows.get(f"label-{number:09d}".encode()).decode() == meta["sample_id"].split("~")[0]
    assert found == images(dataset.root)


@pytest.mark.parametrize("to", ["faces", "faces-lmdb"])
def test_faces_are_aligned_crops_by_identity_without_leakage(dataset, tmp_path, to):
    manifest = export(dataset, tmp_path / "out", to, test_share=0.5)
    listed(tmp_path / "out", manifest)
    # Two rows of each alone, three in pairs: a pair of both sides gives a crop to each side.
    assert manifest["counts"]["samples"] == 4 * (2 + 3) and manifest["counts"]["without_face"] == 0
    rows = {
        row["sample_id"]: row for row in open_dataset(dataset.url).to_table(columns=["sample_id", "image"]).to_pylist()
    }
    seen = {"train": set(), "test": set()}
    for side, name, crop in crops(tmp_path / "out", to):
        seen[side].add(name.partition("@")[2] or name.split("~")[0])
        image = Image.open(io.BytesIO(rows[name.partition("@")[0]]["image"]["bytes"]))
        assert crop.size == (112, 112)
        assert np.array_equal(np.asarray(crop), np.asarray(aligned_crop(image, LANDMARKS)))
    assert {side: sorted(names) for side, names in seen.items()} == manifest["subjects"]


def crops(output, to):
    if to == "faces":
        from torchvision.datasets import ImageFolder

        for side in ("train", "test"):
            for path, _ in ImageFolder(output / side).samples:
                yield side, path.rsplit("/", 1)[1].removesuffix(".png"), Image.open(path)
        return
    import lmdb

    for path in sorted(output.glob("*.lmdb")):
        with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as rows:
            for number in range(int(rows.get(b"num-samples"))):
                meta = json.loads(rows.get(f"meta-{number:09d}".encode()))
                name = meta["sample_id"] + (f"@{meta['subject_id']}" if "+" in meta["sample_id"] else "")
                yield path.name.split("-")[0], name, Image.open(io.BytesIO(rows.get(f"image-{number:09d}".encode())))


def test_a_crop_has_its_landmarks_where_recognisers_expect_them():
    photo = Image.fromarray(data.astronaut())
    marks = np.array([[201, 110], [246, 112], [223, 140], [203, 155], [243, 157]], float)
    crop = aligned_crop(photo, marks)
    # A dot painted at each landmark comes out near the template's place.
    for point, place in zip(marks, ALIGNED_LANDMARKS, strict=True):
        dotted = Image.new("RGB", photo.size)
        dotted.paste((255, 255, 255), tuple(int(v) - 2 for v in point) + tuple(int(v) + 3 for v in point))
        spot = np.argwhere(np.asarray(aligned_crop(dotted, marks))[..., 0] > 128).mean(0)[::-1]
        assert np.abs(spot - place).max() < 8
    assert crop.size == (112, 112)


def test_without_the_column_the_scorer_finds_the_faces(dataset):
    class Embedded:
        def __init__(self, faces, vectors):
            self.faces, self.vectors = faces, vectors

    class Face:
        landmarks = LANDMARKS

    class Identity:
        def embed_faces(self, pictures):
            return [Embedded([Face(), Face()], np.array([[0.0, 1.0], [1.0, 0.0]], np.float32))]

    scorers = type("Scorers", (), {"identity": Identity()})
    table = open_dataset(dataset.url).to_table()
    rows = {row["sample_id"]: row | {"faces": None} for row in table.to_pylist()}
    found = FaceCrops(dataset, scorers)(rows["ada~p0~0"], ["ada"])
    assert [sample.label for sample in found] == ["ada"] and found[0].facts["similarity"] == 1.0
    assert FaceCrops(dataset, None)(rows["ada~p0~0"], ["ada"]) == []


class TestInterrupted:
    @pytest.mark.parametrize("to", ["webdataset", "imagefolder", "lmdb", "faces"])
    def test_killed_at_any_write_it_ends_with_the_same_bytes(self, dataset, tmp_path, monkeypatch, to):
        export(dataset, tmp_path / "undisturbed", to)
        put, left, kills = LocalStore.put, [-1], 0

        def counted(self, *given, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return put(self, *given, **options)

        monkeypatch.setattr(LocalStore, "put", counted)
        for number in range(100):
            left[0] = 1 + number
            try:
                export(dataset, tmp_path / "out", to)
                break
            except Killed:
                kills += 1
        left[0] = -1
        assert kills >= 3
        assert contents(open_store(tmp_path / "out")) == contents(open_store(tmp_path / "undisturbed"))
        export(dataset, tmp_path / "out", to)
        assert contents(open_store(tmp_path / "out")) == contents(open_store(tmp_path / "undisturbed"))


def test_nobody_is_on_both_sides_and_newcomers_change_little():
    names = [f"person-{n}" for n in range(200)]
    sides = split_subjects(names, 0.1, 0)
    assert list(sides.values()).count("test") == 20 and split_subjects(reversed(names), 0.1, 0) == sides
    more = split_subjects([*names, "newcomer"], 0.1, 0)
    assert sum(more[name] != side for name, side in sides.items()) <= 1
    assert split_subjects(names, 0.1, 1) != sides
    assert set(split_subjects(["a", "b"], 0.01, 0).values()) == {"train", "test"}
    assert set(split_subjects(["a"], 0.5, 0).values()) == set(split_subjects(names, 0.0, 0).values()) == {"train"}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("beauty > 1", "beauty"),
        ("ip >", "syntax error"),
        ("ip > 'x'", "x"),
        ("1 = 1); drop table dataset_rows; --", "--where"),
        ("1 = 1) or (1 = 1", "syntax error"),
        ("ip > 0; select 1", "more than one statement"),
        ("exists(select * from read_csv('/etc/passwd'))", "subquery is no condition on a row"),
        ("(select count(*) from range(10000000000)) > 0", "subquery is no condition on a row"),
        ("random() > 0.5", "random is no condition on a row"),
        ("now() > '2020-01-01'", "now is no condition on a row"),
        ("current_date > DATE '2020-01-01'", "current_date is no condition on a row"),
        ("row_number() over () > 1", "row_number is no condition on a row"),
        ("ip > $1", "parameter is no condition on a row"),
        ("columns('i.*') > 0", "star is no condition on a row"),
        ("count(*) > 1", "count_star is no condition on a row"),
        ("unnest(subject_ids) = 'ada'", "not one thing of each row"),
        ("repeat('a', 100000000000) = 'a'", "string"),
        ("(" * 3000 + "1 = 1" + ")" * 3000, "depth"),
    ],
)
def test_what_is_no_condition_is_one_line(dataset, tmp_path, where, said):
    with pytest.raises(InputError, match=said) as error:
        check_export(ExportSettings(url=dataset.url, to="lmdb", output=str(tmp_path / "out"), where=where))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_image_that_is_not_the_rows_is_not_exported(dataset, tmp_path):
    shutil.copytree(dataset.root, tmp_path / "dataset")
    path = sorted((tmp_path / "dataset" / "data").iterdir())[1]
    data, image = path.read_bytes(), pq.read_table(path)["image"][1]["bytes"].as_py()
    place = data.index(image) + len(image) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(InputError, match="has no image, or another than its sha256 says"):
        export(open_store(tmp_path / "dataset"), tmp_path / "out", "lmdb")
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="bytes, the manifest says"):
        export(open_store(tmp_path / "dataset"), tmp_path / "out", "lmdb")


@pytest.mark.parametrize("key", ["manifest.json", "parts/export.json"])
def test_a_damaged_mark_in_the_output_is_another_export(dataset, tmp_path, key):
    export(dataset, tmp_path / "out", "lmdb")
    (tmp_path / "out" / key).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / key).write_bytes(b"[" * 100_000)
    with pytest.raises(InputError, match="holds another export"):
        export(dataset, tmp_path / "out", "lmdb")


def test_another_export_or_a_changed_dataset_is_refused(dataset, tmp_path):
    export(dataset, tmp_path / "out", "lmdb")
    with pytest.raises(InputError, match="holds another export"):
        export(dataset, tmp_path / "out", "lmdb", where="ip > 0.9")
    with pytest.raises(InputError, match="holds"):
        export(dataset, dataset.root / "data", "lmdb")
