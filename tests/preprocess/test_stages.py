"""Each stage is done again only when what decides it changed: settings, model, pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from preprocess.conftest import contents, prepare
from preprocess.tiny_models import tiny_blip, tiny_blip2, tiny_clip, tiny_mask2former
from skimage import data

from facediffuser.errors import InputError
from facediffuser.preprocess import photo_stages as stages
from facediffuser.preprocess.photo_stages import Captions, Faces, Item, Job, Segments, Subjects
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.read_pictures import Picture
from facediffuser.preprocess.segment_maps import Segment
from facediffuser.preprocess.source_files import Record

ASTRONAUT = Image.fromarray(data.astronaut()).crop((96, 0, 352, 256))


def rows(output: Path) -> dict[str, dict]:
    paths = [path for folder in ("train", "test") for path in (output / folder).glob("*.parquet")]
    return {row["image_id"]: row for path in paths for row in pq.read_table(path).to_pylist()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "captioner": str(tiny_blip(root / "blip")),
        "segmenter": str(tiny_mask2former(root / "mask2former")),
        "matcher": str(tiny_clip(root / "clip")),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures in two parts of three; one has a caption of two people."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        ASTRONAUT.rotate(number).resize((96, 96)).save(root / f"{number}.png")
    (root / "1.txt").write_text("a young woman and a man")
    return root


@pytest.fixture
def ran(monkeypatch) -> dict[str, list[str]]:
    """The pictures that each stage was run on."""
    told: dict[str, list[str]] = {}
    for stage in (Faces, Captions, Segments, Subjects):
        told[stage.name] = []

        def run(self, items, real=stage.run):
            told[self.name].extend(item.record.image_id for item in items)
            real(self, items)

        monkeypatch.setattr(stage, "run", run)
    return told


def test_a_run_with_another_captioner_needs_captions_and_subjects_only(folder, tmp_path, here, models, ran):
    settings = {**models, "part_size": 3, "caption_tokens": 4}
    prepare(folder, tmp_path / "first", **settings)
    every = ["0.png", "1.png", "2.png", "3.png"]
    assert ran == {"faces": every, "segments": every, "captions": ["0.png", "2.png", "3.png"], "subjects": every}
    for pictures in ran.values():
        pictures.clear()
    other = {**settings, "captioner": str(tiny_blip2(tmp_path / "blip2"))}
    prepare(folder, tmp_path / "second", **other, stages=str(tmp_path / "first/stages"))
    assert ran == {
        "faces": [],
        "segments": [],
        "captions": ["0.png", "2.png", "3.png"],
        "subjects": every[:1] + every[2:],
    }
    prepare(folder, tmp_path / "alone", **other)
    one, two = (contents(tmp_path / name) for name in ("second", "alone"))
    assert one == {key: value for key, value in two.items() if not key.startswith("stages/")}


def test_what_was_kept_gives_the_same_bytes_as_what_was_found(folder, tmp_path, here, models, ran):
    prepare(folder, tmp_path / "out", **models, caption_tokens=4)
    before = contents(tmp_path / "out")
    assert {key.split("/")[1] for key in before if key.startswith("stages/")} == set(ran)
    # As it is after a kill between a part's stages and its rows: the stages are there and nothing else of the part.
    for name in ("train", "test", "parts", "card", "checks"):
        shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
    for name in ("manifest.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    for pictures in ran.values():
        pictures.clear()
    prepare(folder, tmp_path / "out", **models, caption_tokens=4)
    assert contents(tmp_path / "out") == before and not any(ran.values())


def test_a_changed_picture_a_changed_setting_and_a_damaged_file_are_computed_again(folder, tmp_path, here, models, ran):
    kept = {"stages": str(tmp_path / "stages"), "segmenter": models["segmenter"]}
    prepare(folder, tmp_path / "first", **kept)
    ASTRONAUT.resize((80, 80)).save(folder / "2.png")
    for pictures in ran.values():
        pictures.clear()
    prepare(folder, tmp_path / "second", **kept)
    assert ran["faces"] == ran["segments"] == ["2.png"]
    assert rows(tmp_path / "second")["2.png"]["width"] == 80
    prepare(folder, tmp_path / "third", **kept, face_search_side=200)
    assert ran["faces"][1:] == ["0.png", "1.png", "2.png", "3.png"] and ran["segments"] == ["2.png"]
    for path in (tmp_path / "stages/segments").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    prepare(folder, tmp_path / "fourth", **kept, face_margin=0.5)
    assert len(ran["segments"]) == 5 and len(ran["faces"]) == 5, "the margin is no business of the search"


def test_a_captioner_may_write_markers_and_an_earlier_version_may_have_kept_them():
    class Marking:
        def caption(self, images):
            return ["a man <|image|> outside" for _ in images]

    settings = PreprocessSettings(source="photos", output="out", captioner="marking")
    stage = Captions(Job(settings, "folder", "f", models={"captioner": "d"}), "cpu")
    stage.captioner = Marking()
    made, kept = (Item(Record("a", "a.png"), Picture(ASTRONAUT, b"", "a.png", "s")) for _ in range(2))
    assert stage.wants(made)
    stage.run([made])
    stage.unpack(kept, "a man <|image|> outside", None)
    assert made.caption == kept.caption == "a man outside"


def test_a_caption_of_thousands_of_people_does_not_fill_the_memory_of_the_matcher():
    class Counting:
        def similarity(self, crops, phrases):
            seen.append(len(phrases))
            return np.arange(len(phrases) * len(crops), dtype=float).reshape(len(phrases), len(crops))

    seen: list[int] = []
    stage = Subjects(Job(PreprocessSettings(source="photos", output="out"), "folder", "f"), "cpu")
    stage.matcher = Counting()
    people = [Segment(number, "person", (number, 0, number + 9, 9)) for number in (1, 2)]
    item = Item(
        Record("a", "a.png"), Picture(ASTRONAUT, b"", "a.png", "s"), segments=people, caption="a man, " * 10_000
    )
    stage.run([item])
    assert seen == [stages.MOST_PHRASES] and len(item.subjects) == 2


def test_weights_that_changed_in_their_folder_are_another_model(folder, tmp_path, here, models):
    mine = Path(shutil.copytree(models["segmenter"], tmp_path / "mine"))
    prepare(folder, tmp_path / "out", segmenter=str(mine))
    assert set(json.loads((tmp_path / "out/run.json").read_text())["models"]) == {"segmenter"}
    (mine / "notes.txt").write_text("finetuned")
    with pytest.raises(InputError, match="the segmenter is another model"):
        prepare(folder, tmp_path / "out", segmenter=str(mine))


def test_a_place_for_stages_in_the_source_or_not_to_be_written_is_refused(folder, tmp_path, here):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="--stages .*: lies inside of the source"):
        prepare(folder, tmp_path / "out", stages=str(folder / "stages"))
    with pytest.raises(InputError, match="is a file, not a folder"):
        prepare(folder, tmp_path / "out", stages=str(tmp_path / "file/stages"))
    assert not (tmp_path / "out").exists()


def test_findings_of_another_version_are_not_used(folder, tmp_path, here, monkeypatch, ran):
    prepare(folder, tmp_path / "first", stages=str(tmp_path / "stages"))
    monkeypatch.setattr(stages, "VERSION", stages.VERSION + 1)
    prepare(folder, tmp_path / "second", stages=str(tmp_path / "stages"))
    assert len(ran["faces"]) == 8
