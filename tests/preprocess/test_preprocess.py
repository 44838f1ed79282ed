"""The whole stage: everything that goes in comes out, as a prepared row or as a rejected one, whatever happens."""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from preprocess.conftest import COUNT, contents, prepare
from preprocess.tiny_models import tiny_blip, tiny_clip, tiny_mask2former
from skimage import data

from facediffuser.errors import InputError
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA, REJECTED_SCHEMA, SCHEMA_KEY, SCHEMA_VERSION
from facediffuser.preprocess.preprocess_stage import PartWorker
from facediffuser.preprocess.segment_maps import decode_map
from facediffuser.tasks.ray_driver import RayDriver


def rows(output: Path, *folders: str) -> list[dict]:
    return [
        row
        for folder in folders or ("train", "test")
        for path in sorted((output / folder).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def damage(photos: Path) -> dict[str, str]:
    """Damage some pictures of a set, one way each; return the expected kind of rejection by id."""
    ids = (photos / "image_ids.txt").read_text().split()
    stem = {image_id: photos / image_id[:5] / image_id for image_id in ids}
    a, b, c, d, e, f, *_ = ids
    stem[a].with_suffix(".jpg").write_bytes(stem[a].with_suffix(".jpg").read_bytes()[:-300])
    stem[b].with_suffix(".jpg").write_bytes(b"")
    said = json.loads(stem[c].with_suffix(".json").read_text())
    said["segments"][0]["end"] = 9999
    stem[c].with_suffix(".json").write_text(json.dumps(said))
    said = json.loads(stem[d].with_suffix(".json").read_text())
    said["segments"][0]["id"] = 77
    stem[d].with_suffix(".json").write_text(json.dumps(said))
    np.save(stem[e].with_suffix(".npy"), np.zeros((5, 5), int))
    stem[f].with_suffix(".json").unlink()
    return {
        a: "damaged picture",
        b: "empty file",
        c: "annotation does not match",
        d: "annotation does not match",
        e: "segmentation map does not fit",
        f: "missing file",
    }


def test_what_ray_prepares_is_whole_and_the_same_bytes_as_without_ray(photos, tmp_path, ray_session):
    bad = damage(photos)
    result = prepare(photos, tmp_path / "out", RayDriver(), workers=2)
    prepared, rejected = rows(tmp_path / "out"), rows(tmp_path / "out", "rejected")
    assert {row["image_id"]: row["reason"].split(":")[0] for row in rejected} == bad
    assert len(prepared) + len(rejected) == COUNT == result["pictures"]
    assert (result["train"], result["test"], result["rejected"]) == (*_split_counts(prepared), len(bad))
    assert result["rejected_by_reason"] == Counter(bad.values())
    prepare(photos, tmp_path / "again", workers=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def _split_counts(prepared: list[dict]) -> tuple[int, int]:
    counts = Counter(row["split"] for row in prepared)
    return counts["train"], counts["test"]


@pytest.fixture(scope="module")
def prepared(rendered, tmp_path_factory) -> Path:
    """The rendered set, prepared without Ray."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(rendered, output)
    return output


def test_a_row_says_what_the_source_says(rendered, prepared):
    found = {row["image_id"]: row for row in rows(prepared)}
    assert sorted(found) == sorted((rendered / "image_ids.txt").read_text().split())
    test = (rendered / "image_ids_test.txt").read_text().split()
    for image_id, row in found.items():
        stem = rendered / image_id[:5] / image_id
        said = json.loads(stem.with_suffix(".json").read_text())
        assert row["image"]["bytes"] == stem.with_suffix(".jpg").read_bytes()
        assert row["caption"] == said["caption"] and row["identity"] == said["identity"]
        assert row["split"] == ("test" if image_id in test else "train") and row["source"] == "ffhq-fastcomposer"
        np.testing.assert_array_equal(decode_map(row["segmentation"]), np.load(stem.with_suffix(".npy")))
        assert len(row["subjects"]) == len(said["segments"])
        for subject in row["subjects"]:
            assert row["caption"][subject["start"] : subject["end"]] == subject["phrase"]
            assert subject["end"] in {segment["end"] for segment in said["segments"]}
            x1, y1, x2, y2 = subject["box"]
            assert (decode_map(row["segmentation"])[y1:y2, x1:x2] == subject["segment_id"]).any()


def test_faces_are_found_and_belong_to_subjects(prepared):
    every = rows(prepared)
    assert sum(bool(row["faces"]) for row in every) >= 0.8 * len(every)
    for row in every:
        used = [subject["face_index"] for subject in row["subjects"] if subject["face_index"] >= 0]
        assert len(set(used)) == len(used) and all(index < len(row["faces"]) for index in used)
        assert len(used) == min(len(row["subjects"]), len(row["faces"]))
        for face in row["faces"]:
            x1, y1, x2, y2 = face["crop_box"]
            assert x2 - x1 == y2 - y1 > 0 and len(face["landmarks"]) == 5 and 0.7 <= face["prob"] <= 1


def test_the_files_are_of_the_schema_and_open_everywhere(prepared):
    import datasets
    import duckdb

    for path in prepared.glob("t*/*.parquet"):
        assert pq.read_schema(path).remove_metadata().equals(PREPARED_SCHEMA.remove_metadata())
        assert pq.read_schema(path).metadata[SCHEMA_KEY] == SCHEMA_VERSION.encode()
        columns = pq.ParquetFile(path).metadata.row_group(0)
        kinds = {columns.column(i).path_in_schema: columns.column(i).compression for i in range(columns.num_columns)}
        assert kinds["image.bytes"] == kinds["segmentation"] == "UNCOMPRESSED" and kinds["caption"] == "ZSTD"
    manifest = json.loads((prepared / "manifest.json").read_text())
    total = ds.dataset([str(path) for path in prepared.glob("t*/*.parquet")]).count_rows()
    assert total == manifest["counts"]["pictures"] == COUNT
    assert duckdb.sql(f"from '{prepared}/*/*.parquet'").count("*").fetchall() == [(COUNT,)]
    loaded = datasets.load_dataset(str(prepared), cache_dir=str(prepared.parent / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {
        name: manifest["counts"][name] for name in ("train", "test")
    }
    assert loaded["train"][0]["image"].size == (64, 64)
    assert isinstance(loaded["train"][0]["faces"], list)


def test_the_manifest_names_every_file_with_its_checksum(prepared):
    import hashlib

    manifest = json.loads((prepared / "manifest.json").read_text())
    there = {path.relative_to(prepared).as_posix() for path in prepared.rglob("*.parquet")}
    assert set(manifest["files"]) == there
    for key, file in manifest["files"].items():
        content = (prepared / key).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        assert pq.read_metadata(prepared / key).num_rows == file["rows"]
    assert sum(manifest["facts"]["faces"].values()) == COUNT


def test_the_card_shows_pictures(prepared):
    assert Image.open(prepared / "card/contact-sheet.png").size[0] == 6 * 192
    assert Image.open(prepared / "card/histograms.png").size[0] > 500
    text = (prepared / "README.md").read_text()
    assert f"{COUNT:,} pictures" in text and "card/contact-sheet.png" in text


class Interrupted(PartWorker):
    """A worker that is interrupted when it has written its second part."""

    parts = 0

    def __call__(self, unit):
        counts = super().__call__(unit)
        self.parts += 1
        if self.parts == 2:
            raise KeyboardInterrupt
        return counts


def test_a_run_stopped_in_the_middle_resumes_to_the_same_bytes(rendered, prepared, tmp_path, here):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(rendered, output, worker=Interrupted)
    # As a killed worker leaves it: files of a part without its summary, a summary whose file is not whole.
    assert not (output / "manifest.json").exists() and (output / "parts/part-00000.json").exists()
    (output / "parts/part-00001.json").unlink()
    (output / "train/part-00001.parquet").write_bytes(b"half a file")
    result = prepare(rendered, output)
    assert result["parts_kept"] == 1
    assert contents(output) == contents(prepared)
    made = prepare(rendered, output)
    assert made["parts_kept"] == 0 and made["worker_seconds"] == {} and made["train"] == result["train"]
    assert contents(output) == contents(prepared)


def test_a_part_whose_file_is_cut_short_is_made_again(rendered, prepared, tmp_path, here):
    output = Path(shutil.copytree(prepared, tmp_path / "out"))
    (output / "manifest.json").unlink()
    (output / "train/part-00000.parquet").write_bytes(b"half")
    (output / "parts/part-00001.json").write_bytes(b"{")
    assert prepare(rendered, output)["parts_kept"] == 1
    assert contents(output) == contents(prepared)


def test_a_damaged_check_is_made_again_and_a_damaged_manifest_is_named(tmp_path, here):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (0, 9 * number, 0)).save(photos / f"{number}.png")
    prepare(photos, output, part_size=1)
    before = contents(output)
    with open(output / "manifest.json", "r+") as file:
        file.truncate(99)
    with pytest.raises(InputError, match="manifest.json: not readable as JSON .*; remove it and run the same command"):
        prepare(photos, output, part_size=1)
    (output / "manifest.json").unlink()
    (output / "parts/part-00004.json").unlink()
    fingerprint = json.dumps(json.loads(before["run.json"])["fingerprint"])
    for part, text in enumerate(("{", "[]", "{}", f'{{"fingerprint": {fingerprint}, "hashes": ["zz"]}}')):
        (output / f"checks/part-0000{part}.json").write_text(text)
    assert prepare(photos, output, part_size=1)["parts_kept"] == 4
    assert contents(output) == before


def test_another_run_in_the_output_is_refused_with_the_difference(rendered, prepared, photos, here):
    before = contents(prepared)
    with pytest.raises(InputError, match=r"settings.size None there, 48 here\); give a new --output"):
        prepare(rendered, prepared, size=48)
    (photos / "00000" / "00000000.jpg").write_bytes(b"other")
    with pytest.raises(
        InputError, match=r"20 pictures there, 20 now\): the pictures have the same names, their files,"
    ):
        prepare(photos, prepared)
    for path in photos.glob("image_ids*.txt"):
        path.write_text(path.read_text().replace("00000003", "00000077"))
    with pytest.raises(
        InputError, match=r"\(20 pictures there, 20 now\): 00000003 is only there, 00000077 is only in the"
    ):
        prepare(photos, prepared)
    assert contents(prepared) == before


def test_earlier_data_is_refused_for_a_source_with_splits(rendered, prepared, tmp_path, here):
    with pytest.raises(InputError, match="has splits of its own"):
        prepare(rendered, tmp_path / "out", earlier=str(prepared))


@pytest.mark.parametrize(
    "wrong",
    ["holds something else", "inside of the source", "no such model", "no files there", "leads out of the archive"],
)
def test_wrong_input_is_refused_and_nothing_written(rendered, tmp_path, here, wrong):
    output, settings = tmp_path / "out", {}
    source = rendered
    if wrong == "holds something else":
        output.mkdir()
        (output / "thesis.txt").write_text("precious")
    elif wrong == "inside of the source":
        output = rendered / "prepared"
    elif wrong == "no files there":
        source = tmp_path / "empty"
        source.mkdir()
    elif wrong == "leads out of the archive":
        source = tmp_path / "set.tgz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(rendered / "image_ids.txt", "../image_ids.txt")
    else:
        source = tmp_path / "plain"
        source.mkdir()
        (source / "a.png").write_bytes(b"x")
        settings = {"captioner": str(tmp_path / "none")}
    before = contents(tmp_path)
    with pytest.raises(InputError, match=wrong):
        prepare(source, output, **settings)
    assert contents(tmp_path) == before and not (rendered / "prepared").exists()


def _pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "photos")
    return archive


def _same_rows(first: Path, second: Path) -> bool:
    one, two = (sorted(rows(folder), key=lambda row: row["image_id"]) for folder in (first, second))
    return one == two


def test_an_archive_gives_the_same_rows_as_its_folder(rendered, prepared, tmp_path, here):
    result = prepare(_pack(rendered, tmp_path / "photos.tgz"), tmp_path / "out")
    assert result["pictures"] == COUNT and result["rejected"] == 0
    assert _same_rows(tmp_path / "out", prepared)


@pytest.mark.slow
def test_an_archive_is_read_by_ray_even_when_actors_have_every_core(rendered, prepared, tmp_path, ray_session):
    import ray

    cores = int(ray.cluster_resources()["CPU"])
    result = prepare(
        _pack(rendered, tmp_path / "photos.tgz"), tmp_path / "out", RayDriver(), workers=2, cpus_per_worker=cores // 2
    )
    assert result["pictures"] == COUNT and _same_rows(tmp_path / "out", prepared)


def test_pictures_are_reduced_with_all_that_is_measured_on_them(rendered, tmp_path, here):
    prepare(rendered, tmp_path / "out", size=48)
    for row in rows(tmp_path / "out"):
        assert (row["width"], row["height"]) == (48, 48) == Image.open(io.BytesIO(row["image"]["bytes"])).size
        assert decode_map(row["segmentation"]).shape == (48, 48)
        assert all(max(subject["box"]) <= 48 for subject in row["subjects"])
        assert all(max(face["box"]) <= 52 for face in row["faces"])


def couple(photos: Path, orientation: int = 1, **more) -> Path:
    """A set of one picture, upright 512 x 384 px: a man at its left, a woman at its lower right, each with its `bbox`."""
    boxes = {3: (20, 30, 220, 384), 7: (350, 100, 510, 384)}
    ids = np.zeros((384, 512), int)
    for segment, (x1, y1, x2, y2) in boxes.items():
        ids[y1:y2, x1:x2] = segment
    stem = photos / "00000" / "00000001"
    stem.parent.mkdir(parents=True)
    np.save(stem.with_suffix(".npy"), ids)
    image = Image.fromarray(np.repeat((ids * 30)[..., None], 3, 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    turned.save(stem.with_suffix(".jpg"), quality=95, exif=exif)
    segments = [
        {"id": segment, "coco_label": "person", "bbox": list(box), "end": end}
        for (segment, box), end in zip(boxes.items(), (5, 17), strict=True)
    ]
    stem.with_suffix(".json").write_text(json.dumps({"caption": "a man and a woman", "segments": segments} | more))
    return photos


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [None, 192, 96])
def test_subjects_far_from_the_upper_left_are_reduced_with_their_picture(tmp_path, here, orientation, size):
    prepare(couple(tmp_path / "photos", orientation), tmp_path / "out", size=size, test_share=0)
    (row,) = rows(tmp_path / "out")
    scale = (size or 384) / 384
    assert (row["width"], row["height"]) == (512 * scale, 384 * scale)
    ids = decode_map(row["segmentation"])
    shown = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L")).astype(int)
    assert ids.shape == shown.shape == (row["height"], row["width"])
    assert np.mean(np.abs(shown - 30 * ids) < 15) > 0.95, "the map lies on the picture's people"
    man, woman = row["subjects"]
    assert (man["phrase"], man["segment_id"], woman["phrase"], woman["segment_id"]) == ("a man", 3, "a woman", 7)
    np.testing.assert_allclose(man["box"], np.array([20, 30, 220, 384]) * scale, atol=1)
    np.testing.assert_allclose(woman["box"], np.array([350, 100, 510, 384]) * scale, atol=1)


def test_a_bbox_elsewhere_is_found_before_the_picture_is_reduced(tmp_path, here):
    # At half the size the man's segment would lie under it.
    wrong = {"id": 3, "coco_label": "person", "bbox": [0, 0, 19, 29], "end": 5}
    prepare(couple(tmp_path / "photos", segments=[wrong]), tmp_path / "out", size=192)
    (row,) = rows(tmp_path / "out", "rejected")
    assert row["reason"].endswith("segment 3 is in [20, 30, 220, 384] of the map, its bbox [0, 0, 19, 29] is elsewhere")


@pytest.fixture
def plain(rendered, tmp_path) -> Path:
    """A plain folder of pictures with odd names, twins and bad files."""
    root = tmp_path / "plain"
    (root / "deep er").mkdir(parents=True)
    astronaut = Image.fromarray(data.astronaut()).resize((128, 128))
    astronaut.save(root / "ästronaut.png")
    astronaut.resize((96, 96)).save(root / "deep er" / "the same, again.jpg", quality=80)
    for number, path in enumerate(sorted(rendered.glob("0*/*.jpg"))[:6]):
        shutil.copy(path, root / f"person {number}.jpg")
    (root / "text.png").write_text("no picture")
    (root / "empty.jpg").touch()
    (root / "person 0.txt").write_text("a young woman on the beach")
    os.symlink(root / "nowhere.png", root / "dangling.png")
    return root


def test_a_plain_folder_is_captioned_segmented_and_matched(plain, tmp_path, here):
    models = {
        "captioner": str(tiny_blip(tmp_path / "blip")),
        "segmenter": str(tiny_mask2former(tmp_path / "mask2former")),
        "matcher": str(tiny_clip(tmp_path / "clip")),
    }
    result = prepare(plain, tmp_path / "out", test_share=0.5, caption_tokens=4, **models)
    found = {row["image_id"]: row for row in rows(tmp_path / "out")}
    rejected = {row["path"]: row["reason"] for row in rows(tmp_path / "out", "rejected")}
    assert result["pictures"] == len(found) + len(rejected)
    assert rejected["text.png"].startswith("not a picture: ") and rejected["empty.jpg"].startswith("empty file: ")
    assert found["ästronaut.png"]["split"] == found["deep er/the same, again.jpg"]["split"]
    assert found["person 0.jpg"]["caption"] == "a young woman on the beach"
    assert all(row["segmentation"] and row["identity"] is None for row in found.values())
    (subject,) = found["person 0.jpg"]["subjects"]
    assert subject["phrase"] == "a young woman" and subject["segment_id"] > 0
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    prepare(plain, tmp_path / "out", test_share=0.5, caption_tokens=4, **models)
    assert contents(tmp_path / "out") == before


def test_a_grown_set_keeps_the_sides_it_had(plain, tmp_path, here):
    first, second = tmp_path / "first", tmp_path / "second"
    prepare(plain, first, test_share=0.7)
    before = {row["image_id"]: row["split"] for row in rows(first)}
    assert set(before.values()) == {"train", "test"}
    for name in list(before):
        twin = plain / f"twin of {name.replace('/', ' ')}"
        Image.open(plain / name).save(twin.with_suffix(".png"))
    with pytest.raises(InputError, match="no finished output"):
        prepare(plain, second, test_share=0.7, earlier=str(plain))
    prepare(plain, second, test_share=0.7, earlier=str(first))
    after = {row["image_id"]: row["split"] for row in rows(second)}
    assert {name: after[name] for name in before} == before and len(after) == 2 * len(before)
    for name in before:
        twin = f"twin of {name.replace('/', ' ')}".rsplit(".", 1)[0] + ".png"
        assert after[twin] == before[name]


def test_a_plain_folder_without_models_still_has_its_faces(plain, tmp_path, here):
    prepare(plain, tmp_path / "out")
    (row,) = [row for row in rows(tmp_path / "out") if row["image_id"] == "ästronaut.png"]
    assert row["faces"] and row["caption"] == "" and row["segmentation"] is None and row["subjects"] == []


def test_ffhq_keeps_licence_and_author_and_rejects_what_is_not_as_described(tmp_path, here):
    import hashlib

    root = tmp_path / "ffhq"
    metadata = {}
    for number, image_id in enumerate(["00000", "00001", "60000"]):
        path = root / "images1024x1024" / f"{image_id[:2]}000" / f"{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.roll(data.astronaut()[:256, 96:352], number, 0))
        image.save(path)
        metadata[str(int(image_id))] = {
            "category": "validation" if number == 2 else "training",
            "metadata": {"author": f"author {number}", "license": "CC BY 2.0"},
            "image": {"pixel_md5": hashlib.md5(np.asarray(image).tobytes()).hexdigest() if number != 1 else "0"},
        }
    (root / "ffhq-dataset-v2.json").write_text(json.dumps(metadata))
    prepare(root, tmp_path / "out", reference_crop="ffhq")
    found = {row["image_id"]: row for row in rows(tmp_path / "out")}
    assert {key: (row["split"], row["author"], row["licence"]) for key, row in found.items()} == {
        "00000": ("train", "author 0", "CC BY 2.0"),
        "60000": ("test", "author 2", "CC BY 2.0"),
    }
    (face,) = found["00000"]["faces"]
    assert -10 < face["crop_turn"] < 10 and face["crop_turn"] != 0
    (rejected,) = rows(tmp_path / "out", "rejected")
    assert rejected["image_id"] == "00001" and rejected["reason"].startswith("does not match its metadata: ")


def test_a_set_of_only_bad_pictures_is_all_rejected(tmp_path, here):
    root = tmp_path / "bad"
    root.mkdir()
    for number in range(9):
        (root / f"{number}.png").write_bytes(bytes(number))
    result = prepare(root, tmp_path / "out")
    assert (result["train"], result["test"], result["rejected"]) == (0, 0, 9)
    assert pq.read_schema(tmp_path / "out/rejected/part-00000.parquet").names == REJECTED_SCHEMA.names


def test_the_flow_runs_and_a_bad_source_is_the_users_error(photos, tmp_path, here, prefect_harness):
    from facediffuser.flows.preprocess_ffhq import preprocess_ffhq
    from facediffuser.preprocess.preprocess_settings import PreprocessSettings

    result = preprocess_ffhq(PreprocessSettings(source=str(photos), output=str(tmp_path / "out")))
    assert result["pictures"] == COUNT and (tmp_path / "out/manifest.json").exists()
    with pytest.raises(InputError, match="no such folder"):
        preprocess_ffhq(PreprocessSettings(source=str(tmp_path / "none"), output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
