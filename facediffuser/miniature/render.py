"""Pictures of the miniature world: one picture, or a photo set in the ffhq-fastcomposer layout."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.miniature.canvas import Canvas
from facediffuser.miniature.captions import Caption, write_captions
from facediffuser.miniature.figure import draw_person
from facediffuser.miniature.looks import ACTION_SHARE, Outfit, Pose, Setting, sample_outfit, sample_pose, sample_setting
from facediffuser.miniature.people import Identity, sample_identity
from facediffuser.miniature.prompts import PAIR_PROMPTS, PROMPTS
from facediffuser.miniature.scenes import draw_scene
from facediffuser.miniature.styles import finish

PER_PERSON = 6
PAIR_SHARE = 0.15
LOOKS_SHARE = 0.2
SUBJECTS, REFERENCES, TAKES = 15, 3, 20
FACE_BOX_TOP, FACE_BOX_WIDTH = 0.77, 0.92
SET_PEOPLE, SUBJECT_PEOPLE = 2_000_000, 3_000_000
"""First numbers of the people in photo sets and of their unseen subjects; the shipped parts were trained on others."""


@dataclass(frozen=True)
class Rendering:
    """A picture (s, s, 3) uint8 with all that is known of it; people stand from left to right.

    ids (s, s) int32: 1 for the first person's pixels, 2 for the second's, 0 elsewhere; face_boxes: x1, y1, x2, y2 in pixels.
    """

    image: np.ndarray
    ids: np.ndarray
    caption: Caption
    full_caption: Caption
    people: tuple[Identity, ...]
    outfits: tuple[Outfit, ...]
    setting: Setting
    face_boxes: tuple[tuple[float, float, float, float], ...]


def person(number: int) -> Identity:
    """The person with that number, always the same."""
    return sample_identity(np.random.default_rng((number, 7)))


def render(
    people: list[Identity],
    seed: int,
    size: int = 64,
    setting: Setting | None = None,
    outfits: list[Outfit] | None = None,
    photo_share: float = 0.8,
    action_share: float = ACTION_SHARE,
) -> Rendering:
    """A picture of one or two people; what is not given (place, style, clothes, pose) follows from `seed`."""
    if size not in (64, 128):
        raise InputError(f"size {size}: the miniature world is rendered at 64 or 128 px")
    rng = np.random.default_rng((seed, 11))
    setting = setting or sample_setting(rng, photo_share)
    outfits = outfits or [sample_outfit(rng, action_share=action_share) for _ in people]
    captions = write_captions(people, outfits, setting, rng)
    canvas = Canvas(size, rng)
    draw_scene(canvas, setting.scene)
    canvas.image *= rng.uniform(0.94, 1.04)
    boxes = []
    for place, (who, outfit) in enumerate(zip(people, outfits, strict=True)):
        pose = sample_pose(rng, place, len(people))
        draw_person(canvas, who, outfit, pose, place + 1)
        boxes.append(_face_box(who, pose, size))
    image, ids = finish(canvas, setting.style)
    return Rendering(image, ids, *captions, tuple(people), tuple(outfits), setting, tuple(boxes))


def _face_box(who: Identity, pose: Pose, size: int) -> tuple[float, float, float, float]:
    """Where a face detector puts its box, in pixels: from the brows to the chin, from cheek to cheek."""
    cx, width = pose.x + 0.8 * pose.yaw * pose.scale, who.face_width * FACE_BOX_WIDTH * pose.scale
    top, bottom = pose.y - FACE_BOX_TOP * pose.scale, pose.y + who.face_height * pose.scale
    left, upper, right, lower = (float((value + 1) * size / 2) for value in (cx - width, top, cx + width, bottom))
    return left, upper, right, lower


def render_set(
    count: int,
    seed: int,
    output: Path,
    size: int = 64,
    pair_share: float = PAIR_SHARE,
    action_share: float = ACTION_SHARE,
) -> None:
    """Write `count` pictures in the ffhq-fastcomposer layout, and people and prompts for `generate`, to a new folder.

    On `pair_share` of them stand two people, and `action_share` of all people do something. Besides that layout's files each
    JSON names who is in the picture (`identity`). Few captions tell a person's looks, so that a reference picture has something
    to add. `subjects/` has 15 people who are in no picture, `prompts.jsonl` prompts for one of them and `prompts_pairs.jsonl`
    for two. The same seed gives the same files.
    Raises InputError when the folder exists and is not empty.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: the folder is not empty; give a new one")
    write_subjects(output / "subjects", SUBJECT_PEOPLE + seed * 10_000, size)
    people = max(2, -(-count // PER_PERSON))
    first = SET_PEOPLE + seed * 10_000
    train: list[str] = []
    test: list[str] = []
    for index in range(count):
        rng = np.random.default_rng((seed, index, 13))
        numbers = [first + index % people]
        if rng.random() < pair_share:
            numbers.append(first + (index + 1 + int(rng.integers(people - 1))) % people)
        drawn = render(
            [person(number) for number in numbers], int(rng.integers(2**31)), size, action_share=action_share
        )
        image_id = f"{index:08d}"
        _write_picture(output / image_id[:5], image_id, drawn, numbers, with_looks=bool(rng.random() < LOOKS_SHARE))
        (test if index % people >= 0.9 * people else train).append(image_id)
    for name, ids in (("", sorted(train + test)), ("_train", train), ("_test", test)):
        (output / f"image_ids{name}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    for name, prompts in (("prompts.jsonl", PROMPTS), ("prompts_pairs.jsonl", PAIR_PROMPTS)):
        (output / name).write_text("".join(json.dumps(row) + "\n" for row in prompts))


def write_subjects(folder: Path, first: int, size: int = 64, count: int = SUBJECTS) -> None:
    """Write `count` people with three reference photographs each (no hat, nothing in hand), and `subjects.csv`.

    A photograph in which MTCNN finds no face, or two, is taken again: `generate` would refuse it.
    """
    from facediffuser.scoring.face_detector import FaceDetector

    detector, rows = FaceDetector(), []
    for place in range(count):
        who = person(first + place)
        name = f"{who.class_word}_{place:02d}"
        (folder / name).mkdir(parents=True)
        for number in range(REFERENCES):
            rng = np.random.default_rng((first + place, number, 17))
            for _ in range(TAKES):
                outfit = sample_outfit(rng, hats=False, action_share=0.0)
                setting = sample_setting(rng, photo_share=1.0)
                drawn = render([who], int(rng.integers(2**31)), size, setting, [outfit])
                picture = Image.fromarray(drawn.image)
                if len(detector.detect([picture])[0]) == 1:
                    break
            picture.save(folder / name / f"{number}.png")
        rows.append((name, who.class_word))
    with open(folder / "subjects.csv", "w", newline="") as file:
        csv.writer(file).writerows([("subject_id", "class_word"), *rows])


def _write_picture(folder: Path, image_id: str, drawn: Rendering, numbers: list[int], with_looks: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    caption = drawn.full_caption if with_looks else drawn.caption
    Image.fromarray(drawn.image).save(folder / f"{image_id}.jpg", quality=95, subsampling=0)
    np.save(folder / f"{image_id}.npy", drawn.ids)
    segments = []
    for place, (start, end) in enumerate(caption.spans):
        rows, columns = np.nonzero(drawn.ids == place + 1)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        segments.append({"id": place + 1, "coco_label": "person", "bbox": box, "start": start, "end": end})
    record = {"caption": caption.text, "segments": segments, "identity": "+".join(str(number) for number in numbers)}
    (folder / f"{image_id}.json").write_text(json.dumps(record))
