"""A rendered photo set has the ffhq-fastcomposer layout, with unseen subjects and prompts beside it."""

import csv
import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.miniature.looks import ACTIONS
from facediffuser.miniature.render import render_set
from facediffuser.scoring.face_detector import FaceDetector

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "set"
    render_set(COUNT, 3, path)
    return path


def _ids(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split()


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_every_listed_picture_has_its_three_files(folder: Path):
    every = _ids(folder, "image_ids.txt")
    assert len(every) == len(set(every)) == COUNT
    train, test = (_ids(folder, f"image_ids_{split}.txt") for split in ("train", "test"))
    assert train and test and sorted(train + test) == every
    for image_id in every:
        for ending in ("jpg", "npy", "json"):
            assert (folder / image_id[:5] / f"{image_id}.{ending}").is_file()


def test_segments_agree_with_map_and_caption(folder: Path):
    pairs = 0
    for image_id in _ids(folder, "image_ids.txt"):
        path = folder / image_id[:5] / image_id
        record, ids = json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npy"))
        assert Image.open(path.with_suffix(".jpg")).size == ids.shape == (64, 64)
        assert len(record["identity"].split("+")) == len(record["segments"])
        pairs += len(record["segments"]) == 2
        for segment in record["segments"]:
            h1, w1, h2, w2 = segment["bbox"]
            inside = ids[w1:w2, h1:h2] == segment["id"]
            assert inside.sum() == (ids == segment["id"]).sum() > 0
            assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all()
            assert segment["coco_label"] == "person"
            assert record["caption"][segment["start"] : segment["end"]] in ("a man", "a woman")
    assert 0 < pairs < COUNT / 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_say_how_many_pictures_have_two_people_and_how_many_people_do_something(share: float, tmp_path: Path):
    render_set(COUNT, 4, tmp_path / "set", pair_share=share, action_share=share, subjects=0)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("set/00000/*.json")]
    assert {len(record["segments"]) for record in records} == {1 + int(share)}
    doing = np.mean([any(words in record["caption"] for words in ACTIONS.values() if words) for record in records])
    assert doing == 0 if share == 0 else doing > 0.9


def test_about_a_fifth_of_the_captions_describe_looks(folder: Path):
    captions = [json.loads(path.read_text())["caption"] for path in folder.glob("00000/*.json")]
    assert 0.1 < np.mean([" skin" in caption for caption in captions]) < 0.3


def test_people_come_back_in_several_pictures(folder: Path):
    records = [json.loads(path.read_text()) for path in folder.glob("00000/*.json")]
    people = [who for record in records for who in record["identity"].split("+")]
    assert len(people) / len(set(people)) >= 4


def test_subjects_and_prompts_are_ready_for_generate(folder: Path):
    rows = list(csv.DictReader((folder / "subjects" / "subjects.csv").open()))
    assert len(rows) == 15 and all(row["class_word"] in ("man", "woman") for row in rows)
    for row in rows:
        pictures = [Image.open(path) for path in (folder / "subjects" / row["subject_id"]).glob("*.png")]
        assert len(pictures) >= 2 and all(len(faces) == 1 for faces in FaceDetector().detect(pictures))
    single = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(single) == len({row["prompt_id"] for row in single}) == 30
    assert {row["category"] for row in single} == {"accessory", "style", "context", "action"}
    assert all(row["prompt"].count("{subject}") == 1 for row in single)
    pairs = [json.loads(line) for line in (folder / "prompts_pairs.jsonl").read_text().splitlines()]
    assert pairs and all("{subject_1}" in row["prompt"] and "{subject_2}" in row["prompt"] for row in pairs)


def test_fewer_subjects_are_the_first_men_and_women_of_the_whole_set(folder: Path, tmp_path: Path):
    render_set(1, 3, tmp_path / "set", subjects=2)
    every = sorted(path.name for path in (folder / "subjects").iterdir() if path.is_dir())
    names = [next(name for name in every if name.startswith(word)) for word in ("man", "woman")]
    table = (folder / "subjects" / "subjects.csv").read_text().splitlines()
    assert (tmp_path / "set/subjects/subjects.csv").read_text().splitlines() == [
        line for line in table if line.split(",")[0] in ("subject_id", *names)
    ]
    pictures = [path for path in _files(tmp_path / "set/subjects") if path.suffix == ".png"]
    assert pictures == [Path(name, f"{number}.png") for name in names for number in range(3)]
    same = filecmp.cmpfiles(folder / "subjects", tmp_path / "set/subjects", pictures, shallow=False)[0]
    assert same == pictures


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path):
    render_set(COUNT, 3, tmp_path / "again")
    names, same = _files(folder), _files(tmp_path / "again")
    assert names == same
    assert filecmp.cmpfiles(folder, tmp_path / "again", names, shallow=False)[0] == names


def test_a_folder_in_use_is_refused_untouched(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        render_set(2, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
