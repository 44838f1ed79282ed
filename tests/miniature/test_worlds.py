"""Named worlds: what they show in which shares, captions that fit, earlier pictures as they were."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from facediffuser.errors import InputError
from facediffuser.flows.cli import main
from facediffuser.miniature import worlds
from facediffuser.miniature.looks import ACTIONS
from facediffuser.miniature.render import Rendering, person, render, render_set, render_world
from facediffuser.miniature.worlds import WORLDS, people_of, world_outfit, world_setting

FIRST = 40_500_000


def pictures(name: str, count: int = 60, **changes) -> list[Rendering]:
    """Pictures of unseen people as a set of the world would show them, with nobody where the world has nobody."""
    made = []
    for number in range(count):
        rng = np.random.default_rng((number, 3))
        world = WORLDS[name]
        people = 0 if rng.random() < world.empty else 1 + int(rng.random() < world.pairs)
        made.append(render_world(name, [person(FIRST + 2 * number + place) for place in range(people)], number))
    return made


def test_pictures_of_no_world_are_those_of_earlier_versions():
    drawn = render([person(5), person(6)], 3)
    told = json.dumps([drawn.caption.text, drawn.full_caption.text]).encode()
    assert hashlib.sha256(drawn.image.tobytes() + told).hexdigest()[:16] == EARLIER


EARLIER = "f65ccf4b63f7da01"


@pytest.mark.parametrize("name", WORLDS)
def test_offsets_frame_the_word_for_each_person_that_the_caption_names(name):
    named = 0
    for drawn in pictures(name):
        for caption in (drawn.caption, drawn.full_caption):
            assert len(caption.spans) == len(drawn.people)
            for who, (start, end) in zip(drawn.people, caption.spans, strict=True):
                article, _, word = caption.text[start:end].partition(" ")
                if end:
                    assert article == ("an" if word[0] in "aeiou" else "a")
                    assert word in WORLDS[name].words[who.class_word]
                    named += 1
                else:
                    assert len(drawn.people) == 2
    assert named > 60


def test_ffhq_is_photographs_of_faces_close_up_that_hardly_name_a_place():
    drawn = pictures("ffhq")
    assert all(one.setting.style == "photo" and one.people for one in drawn)
    for one in drawn:
        x1, y1, x2, y2 = max(one.face_boxes, key=lambda box: -abs(box[0] + box[2] - 64))
        assert (y2 - y1) / 64 > 0.55 and abs((x1 + x2) / 2 - 32) < 5
    placed = np.mean([" in " in f"{one.caption.text} " or " on " in one.caption.text for one in drawn])
    assert placed < 0.3 and not any(
        "sketch" in one.full_caption.text or "painting" in one.full_caption.text for one in drawn
    )


def test_broad_has_scenes_without_people_things_alone_and_every_style():
    drawn = pictures("broad", 100)
    empty = [one for one in drawn if not one.people]
    assert 5 < len(empty) < 30 and all(not one.ids.any() and one.face_boxes == () for one in empty)
    things = {word for one in empty for word in ("cup", "balloon", "book") if word in one.caption.text}
    assert things and any(not any(thing in one.caption.text for thing in ("cup", "balloon", "book")) for one in empty)
    assert {one.setting.style for one in drawn} == {"photo", "sketch", "painting"}
    words = " ".join(one.caption.text for one in drawn).split()
    assert {"person", "boy", "girl", "lady", "man", "woman"} <= set(words)


@pytest.mark.parametrize("name", WORLDS)
def test_shares_are_those_of_the_world(name):
    world, rng = WORLDS[name], np.random.default_rng(0)
    outfits = [world_outfit(world, rng) for _ in range(1500)]
    settings = [world_setting(world, rng) for _ in range(1500)]
    near = lambda found, share: abs(found - share) < 0.04  # noqa: E731
    assert near(np.mean([one.hat != "none" for one in outfits]), world.hats)
    assert near(np.mean([one.action != "none" for one in outfits]), world.actions)
    assert near(np.mean([one.expression == "smiling" for one in outfits]), world.expressions[1])
    assert near(np.mean([one.style == "photo" for one in settings]), world.photos)
    assert near(np.mean([one.scene == "room" for one in settings]), world.scenes[-1])


def test_ffhqs_people_have_ffhqs_glasses_beards_and_sexes():
    people = [person(number) for number in people_of(WORLDS["ffhq"], FIRST, 700)]
    men = [one for one in people if one.class_word == "man"]
    assert len(set(people)) == 700 and abs(len(men) / 700 - 0.445) < 0.06
    assert abs(np.mean([one.glasses != "none" for one in people]) - 0.184) < 0.05
    assert abs(np.mean([one.beard != "none" for one in men]) - 0.153) < 0.06


def test_a_second_person_of_a_close_up_is_cut_by_the_edge_and_said_by_half_of_the_captions(monkeypatch):
    monkeypatch.setitem(worlds.WORLDS, "ffhq", replace(WORLDS["ffhq"], pairs=1.0))
    drawn = pictures("ffhq", 40)
    named = [all(end for _, end in one.caption.spans) for one in drawn]
    assert 0.2 < np.mean(named) < 0.8
    for one in drawn:
        lefts = [np.nonzero(one.ids == place)[1].mean() for place in (1, 2) if (one.ids == place).any()]
        assert lefts == sorted(lefts)
        assert sum(x1 < 0 or x2 > 64 for x1, _, x2, _ in one.face_boxes) == 1


def test_a_set_of_a_world_has_its_layout_and_is_the_same_from_several_processes(tmp_path: Path):
    for workers in (1, 2):
        render_set(240, 7, tmp_path / str(workers), world="broad", workers=workers, subjects=0)
    one, two = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two
    records = [json.loads(data) for path, data in one.items() if path.suffix == ".json"]
    assert len(records) == 240
    empty = [record for record in records if "identity" not in record]
    assert 0.08 < len(empty) / 240 < 0.25 and all(record["segments"] == [] for record in empty)
    doing = np.mean([any(text in record["caption"] for text in ACTIONS.values() if text) for record in records])
    assert 0.2 < doing < 0.6


@pytest.mark.parametrize("option", ["--pairs", "--actions"])
def test_a_share_that_the_world_decides_is_refused(option, tmp_path, capsys):
    words = ["miniature", "render", "--count", "2", "--world", "ffhq", option, "0.5", "--output", str(tmp_path / "o")]
    assert main(words) == 2
    assert "leave --pairs and --actions out" in capsys.readouterr().err and not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="leave --pairs and --actions out"):
        render_set(2, 0, tmp_path / "o", pair_share=0.5, world="ffhq")
