"""The renderer: one picture per seed, exact segmentation and offsets, people who look as they are said to."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from skimage.measure import label

from facediffuser.errors import InputError
from facediffuser.miniature.looks import SCENES, STYLES, Outfit, Setting
from facediffuser.miniature.people import Identity, identity_words
from facediffuser.miniature.render import Rendering, person, render
from facediffuser.scoring.face_detector import FaceDetector

PLAIN = Outfit()


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    first, again, other = (render([person(5), person(6)], seed) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.ids, again.ids)
    assert first.caption == again.caption and first.full_caption == again.full_caption
    assert asdict(first.setting) == asdict(again.setting)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [64, 128])
def test_sizes_share_the_layout(size):
    drawn = render([person(1)], 2, size, Setting("beach"), [PLAIN])
    assert drawn.image.shape == (size, size, 3) and drawn.image.dtype == np.uint8
    assert drawn.ids.shape == (size, size)
    x1, y1, x2, y2 = drawn.face_boxes[0]
    assert 0 < x1 < x2 < size and 0 < y1 < y2 < size


def test_a_size_the_world_is_not_made_for_is_refused():
    with pytest.raises(InputError, match="size 100"):
        render([person(1)], 0, 100)


def test_faces_are_large_in_the_frame(photos: list[Rendering]):
    for drawn in photos:
        x1, y1, x2, y2 = drawn.face_boxes[0]
        share = (y2 - y1) / drawn.image.shape[0]
        assert share >= (0.4 if len(drawn.people) == 1 else 0.3)


def test_segmentation_is_exactly_the_pixels_a_person_changes():
    """Painting someone over an empty scene changes the pixels marked with the person's number, and hardly any other.

    What is not part of a person (cup, balloon) is left out by giving nobody anything to hold; soft edges may show one
    pixel beyond.
    """
    from facediffuser.miniature.canvas import Canvas
    from facediffuser.miniature.figure import draw_person
    from facediffuser.miniature.looks import sample_pose

    for number in range(12):
        canvas = Canvas(64, np.random.default_rng(number))
        canvas.image[:] = (255, 0, 255)
        draw_person(canvas, person(number), Outfit(hat="cap"), sample_pose(canvas.rng, 0, 1), 1)
        changed = np.abs(canvas.image - np.array([255, 0, 255])).max(-1)
        assert (changed[canvas.ids == 1] > 20).all()
        assert (changed[canvas.ids == 0] > 160).mean() < 0.01


def test_each_person_is_one_large_segment_under_the_face(photos: list[Rendering]):
    for drawn in photos:
        assert set(np.unique(drawn.ids)) == set(range(len(drawn.people) + 1))
        for place, (x1, y1, x2, y2) in enumerate(drawn.face_boxes):
            mask = drawn.ids == place + 1
            assert mask[int((y1 + y2) / 2), int((x1 + x2) / 2)]
            pieces = label(mask)
            assert np.bincount(pieces[mask]).max() > 0.9 * mask.sum()
        if len(drawn.people) == 2:
            left, right = (np.nonzero(drawn.ids == number)[1].mean() for number in (1, 2))
            assert left < right


def test_caption_offsets_frame_the_class_words(photos: list[Rendering]):
    for drawn in photos:
        for caption in (drawn.caption, drawn.full_caption):
            assert [caption.text[start:end] for start, end in caption.spans] == [
                f"a {who.class_word}" for who in drawn.people
            ]


def test_only_the_full_caption_describes_looks(photos: list[Rendering]):
    for drawn in photos:
        for who in drawn.people:
            words = identity_words(who)
            assert words[0] in drawn.full_caption.text and words[1] in drawn.full_caption.text
            assert not any(word in drawn.caption.text for word in words)


def test_captions_name_what_is_worn_and_where():
    outfit = Outfit(hat="beanie", hat_colour="blue", shirt="red", expression="smiling", action="cup")
    place = Setting("snow", "sketch")
    texts = [render([person(9)], seed, setting=place, outfits=[outfit]).caption.text for seed in range(30)]
    assert all(text.startswith("a sketch of ") for text in texts)
    for words in ("blue beanie", "red shirt", "smiling", "holding a cup", "in the snow"):
        assert 10 < sum(words in text for text in texts)
    assert not any("top hat" in text or "beach" in text for text in texts)


def test_beards_are_on_men_only_and_both_class_words_occur():
    crowd = [person(number) for number in range(400)]
    assert {who.class_word for who in crowd} == {"man", "woman"}
    assert all(who.beard == "none" for who in crowd if who.class_word == "woman")
    assert len({tuple(identity_words(who)) for who in crowd}) > 350


@pytest.mark.parametrize(
    "change",
    [
        {"skin": "dark"},
        {"hair": "blond"},
        {"hair_style": "curly"},
        {"glasses": "red"},
        {"beard": "full"},
        {"face": "round", "face_width": 0.88, "face_height": 0.9},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_identity_trait_shows(change: dict):
    plain = replace(
        person(3),
        class_word="man",
        skin="pale",
        hair="black",
        hair_style="short",
        glasses="none",
        beard="none",
        face_width=0.72,
        face_height=1.05,
    )

    def draw(who: Identity) -> np.ndarray:
        return render([who], 1, setting=Setting("room"), outfits=[PLAIN]).image.astype(int)

    noise = np.abs(draw(plain) - draw(replace(plain, skin_shift=plain.skin_shift))).mean()
    assert noise == 0
    assert (np.abs(draw(plain) - draw(replace(plain, **change))).max(-1) > 40).sum() > 20


SETTINGS = [*(Setting(scene, "photo") for scene in SCENES), *(Setting("room", style) for style in STYLES[1:])]


def test_scenes_and_styles_can_be_distinguished():
    drawn = [render([person(3)], 1, setting=setting, outfits=[PLAIN]).image.astype(int) for setting in SETTINGS]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert np.abs(one - other).mean() > 8


def test_mtcnn_finds_exactly_the_people_in_nine_photos_of_ten(photos: list[Rendering]):
    found = FaceDetector().detect([Image.fromarray(drawn.image) for drawn in photos])
    right = [len(faces) == len(drawn.people) for faces, drawn in zip(found, photos, strict=True)]
    assert np.mean(right) >= 0.9


def test_face_boxes_agree_with_mtcnn(photos: list[Rendering]):
    detector = FaceDetector()
    overlaps = []
    for drawn in photos[:16]:
        faces = sorted(detector.detect([Image.fromarray(drawn.image)])[0], key=lambda face: face.box[0])
        if len(faces) == len(drawn.people):
            overlaps += [_overlap(face.box, box) for face, box in zip(faces, drawn.face_boxes, strict=True)]
    assert len(overlaps) >= 12 and np.mean(overlaps) > 0.7


def _overlap(a: tuple, b: tuple) -> float:
    inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(inner / (sum(area) - inner))
