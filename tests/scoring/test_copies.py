"""Honesty checks on constructed copies: what is copied is flagged and said of whom, what is not is left alone."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scoring.small_world import beside, png, row, write_dataset

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.added_columns import write_added_columns
from facediffuser.errors import InputError
from facediffuser.evaluation import similarity
from facediffuser.evaluation.copies import copy_paste, find_copies
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.evaluator import Evaluator
from facediffuser.evaluation.score_settings import CopySettings
from facediffuser.evaluation.similarity import nearest_neighbours, thumbnail
from facediffuser.evaluation.training_faces import training_faces
from facediffuser.flows.cli import main
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA
from facediffuser.storage import open_store

pytestmark = pytest.mark.usefixtures("plain_plots")


def again(picture: Image.Image) -> Image.Image:
    """The picture as it comes back from elsewhere: a little smaller, brighter, as a JPEG."""
    buffer = io.BytesIO()
    smaller = picture.resize((picture.width * 9 // 10, picture.height * 9 // 10), Image.Resampling.LANCZOS)
    ImageEnhance.Brightness(smaller).enhance(1.1).save(buffer, "jpeg", quality=85)
    return Image.open(buffer)


def turned(face: Image.Image) -> Image.Image:
    """The same face anew: mirrored, tilted, from further away."""
    return ImageOps.mirror(face).rotate(14, Image.Resampling.BICUBIC, fillcolor=(120, 120, 120)).resize((90, 116))


def pictured(number: int, picture: Image.Image, scorers, **values) -> dict:
    boxes = [list(face.box) for face in scorers.identity.detector.detect([picture])[0]]
    return row(number, picture, face_boxes=boxes, face_count=len(boxes), **values)


@pytest.fixture(scope="module")
def found(scorers, people, tmp_path_factory):
    """(store, sample number -> row of copies.parquet) of a dataset of ada and bob with copies in it."""
    folder = tmp_path_factory.mktemp("copies")
    ada, bob, eve = (beside(people[name]) for name in ("ada", "bob", "eve"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    rows = [
        pictured(0, beside(turned(people["ada"])), scorers),  # made anew
        pictured(1, again(ada), scorers),  # the reference itself
        pictured(2, beside(turned(people["bob"]), size=200), scorers, subject_ids=["bob"]),
        pictured(3, again(beside(turned(people["bob"]), size=200)), scorers, subject_ids=["bob"]),  # row 2 again
        pictured(
            4, ImageEnhance.Brightness(eve).enhance(0.95), scorers, subject_ids=["bob"]
        ),  # a face of the training set
        row(5, noise, face_boxes=[], face_count=0),  # no face
        row(6, None),
    ]
    store = open_store(write_dataset(folder / "dataset", rows, {"ada": ada, "bob": bob}))
    (folder / "photos").mkdir()
    eve.save(folder / "photos" / "eve.png")
    noise.save(folder / "photos" / "noise.png")
    training = training_faces(str(folder / "photos"), scorers.identity)
    seen = []
    table = find_copies(store, scorers.identity, CopySettings(url=store.url), training, seen.append)
    assert sum(seen) == 7
    return store, table


def flagged(table: pa.Table, name: str) -> list[int]:
    return [number for number, value in enumerate(table[name].to_pylist()) if value]


def test_a_copied_training_face_is_flagged_with_the_picture_it_is_in(found):
    table = found[1].to_pylist()
    assert flagged(found[1], "training_copy") == [4]
    assert table[4]["training_nearest"] == "eve.png" and table[4]["training_similarity"] > 0.95


def test_a_pasted_reference_is_flagged_and_the_person_generated_anew_is_not(found):
    values = found[1]["paste_similarity"].to_pylist()
    assert flagged(found[1], "pasted_reference") == [1]
    assert values[1] > 0.95 and values[0] < 0.8


def test_a_picture_that_is_another_one_again_is_flagged_with_the_other(found):
    table = found[1].to_pylist()
    assert flagged(found[1], "duplicate") == [2, 3]
    assert (table[2]["duplicate_of"], table[3]["duplicate_of"]) == ("sample-00003", "sample-00002")


def test_without_a_face_or_an_image_there_is_nothing_to_compare(found):
    no_face, failed = found[1].to_pylist()[5:]
    assert no_face["training_copy"] is None and no_face["paste_similarity"] is None
    assert no_face["duplicate"] is False
    assert {name for name, value in failed.items() if value is not None} == {"sample_id"}


def test_the_same_dataset_gives_the_same_table_and_without_training_less_columns(found, scorers):
    store, table = found
    less = find_copies(store, scorers.identity, CopySettings(url=store.url), None)
    assert less.column_names == [name for name in table.column_names if not name.startswith("training")]
    assert less.equals(table.select(less.column_names))


def test_card_and_evaluate_read_what_was_found(found):
    store, table = found
    write_added_columns(store, "copies", table, {"copies_identity": "e" * 64})
    write_card(store)
    text, page = store.get("README.md").decode(), store.get("card/index.html").decode()
    assert "| faces like one of the training set | 1 of 5 images flagged |" in text
    assert "| images like another of the dataset | 2 of 6 images flagged |" in text
    assert "like eve.png" in page and "Flagged: faces with a reference" in page
    images = Evaluator(EvaluateSettings(dataset=store.url)).run()
    assert images.images["duplicate_of"].to_pylist()[3] == "sample-00002"
    share = next(line for line in images.table if line.metric == "duplicate" and line.category == "all")
    assert (share.mean, share.n) == (pytest.approx(2 / 6), 6)


def test_the_commands_add_their_files_and_report_what_was_flagged(
    people, scorers_folder, tmp_path, capsys, prefect_harness
):
    ada = beside(people["ada"])
    folder = write_dataset(tmp_path / "dataset", [row(0, ada, face_boxes=[[81, 69, 173, 187]])], {"ada": ada})
    (tmp_path / "photos").mkdir()
    ada.save(tmp_path / "photos" / "1.png")
    training = ["--training", str(tmp_path / "photos"), "--scorers", str(scorers_folder), "--device", "cpu"]
    assert main(["copies", str(folder), *training]) == 0
    told = capsys.readouterr().out
    assert "training_copy: 1\npasted_reference: 1\nduplicate: 0" in told
    assert main(["score", str(folder)]) == 0
    assert f"{folder}/scores/sharpness.parquet" in capsys.readouterr().out
    assert {info.key for info in open_store(folder).list("scores/")} == {
        "scores/copies.parquet", "scores/sharpness.parquet"
    }  # fmt: skip
    assert "sharpness" in (folder / "README.md").read_text()
    assert main(["score", str(tmp_path / "photos")]) == 2 and "no data/*.parquet" in capsys.readouterr().err


def test_prepared_parquet_serves_as_the_training_set_with_its_own_boxes(scorers, people, tmp_path):
    picture = beside(people["eve"], people["bob"])
    faces = scorers.identity.detector.detect([picture])[0]
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    prepared = {
        "image_id": "00007",
        "image": {"bytes": buffer.getvalue()},
        "faces": [{"box": face.box, "prob": 1.0} for face in faces],
    }
    (tmp_path / "train").mkdir()
    pq.write_table(pa.Table.from_pylist([prepared], PREPARED_SCHEMA), tmp_path / "train" / "part-00000.parquet")
    known = training_faces(str(tmp_path), scorers.identity)
    assert known.names == ["00007", "00007"]
    assert np.allclose(known.vectors, scorers.identity.embed_faces([picture])[0].vectors, atol=1e-5)


def test_a_training_picture_that_cannot_be_used_is_named_and_left_out(scorers, people, tmp_path, caplog):
    picture = beside(people["eve"])
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "phone.webp", exif=b"Exif\0\0Exif\0\0II", lossless=True)
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "scan.HEIC").write_bytes(b"x")
    assert training_faces(str(tmp_path), scorers.identity).names == ["good.png", "phone.webp"]
    others, unusable = (text for text in caplog.messages if "left out" in text)
    assert "1 other file left out: scan.HEIC" in others
    assert "2 of 4 pictures left out: " in unusable and "0.png: not a usable" in unusable and "cut.png: " in unusable


def test_a_training_set_without_faces_or_pictures_is_refused(scorers, tmp_path):
    with pytest.raises(InputError, match="no train/.* and no pictures"):
        training_faces(str(tmp_path), scorers.identity)
    beside().save(tmp_path / "empty.png")
    with pytest.raises(InputError, match="no face in any of its pictures"):
        training_faces(str(tmp_path), scorers.identity)


def test_of_many_vectors_almost_all_nearest_ones_are_found(monkeypatch):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((4000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = (vectors[:200] @ vectors.T).argmax(1)
    assert (nearest_neighbours(vectors, vectors[:200], 1)[1][:, 0] == exact).all()
    monkeypatch.setattr(similarity, "MAX_EXACT", 1000)
    noisy = vectors[:200] + 0.05 * generator.standard_normal((200, 32)).astype(np.float32)
    assert (nearest_neighbours(vectors, noisy, 1)[1][:, 0] == (noisy @ vectors.T).argmax(1)).mean() > 0.95


def test_a_thumbnail_recognises_a_picture_and_distinguishes_two(photograph):
    same = thumbnail(photograph) @ thumbnail(again(photograph))
    assert same > 0.995
    assert thumbnail(photograph) @ thumbnail(ImageOps.mirror(photograph)) < 0.9


def test_copy_paste_is_one_at_a_reference_and_none_between_them():
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    between = (one + two) / np.linalg.norm(one + two)
    assert copy_paste(one, [one, two]) == (pytest.approx(1), 0)
    assert copy_paste(two, [one, two]) == (pytest.approx(1), 1)
    assert copy_paste(between, [one, two])[0] == pytest.approx(0, abs=1e-9)
    assert copy_paste(np.array([np.cos(0.3), np.sin(0.3)]), [one, two])[0] == pytest.approx(
        (np.pi / 2 - 0.6) / (np.pi / 2)
    )
    assert copy_paste(one, [one, one])[0] == 0  # the same picture twice


def test_which_of_several_references_was_copied_is_named(scorers, people, tmp_path):
    ada, mirrored = beside(people["ada"]), beside(turned(people["ada"]), size=200)
    rows = [
        pictured(0, again(ada), scorers),
        pictured(1, again(mirrored), scorers),
        pictured(2, ada, scorers, subject_ids=["bob"]),
    ]
    folder = write_dataset(tmp_path / "dataset", rows, {"ada": ada, "bob": beside(people["bob"])})
    path = folder / "subjects.parquet"
    table = pq.read_table(path)
    second = table.slice(0, 1).to_pylist()[0] | {
        "reference": "ada/2.png",
        "image": {"bytes": png(mirrored), "path": None},
    }
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([second], schema=table.schema)]), path)
    found = find_copies(open_store(folder), scorers.identity, CopySettings(url=str(folder)), None).to_pydict()
    assert found["copy_paste_reference"] == ["ada/1.png", "ada/2.png", None]
    assert min(found["copy_paste"][:2]) > 0.5 and found["copy_paste"][2] is None
