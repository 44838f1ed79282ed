"""Pictures of the miniature world: one picture, or a photo set in the ffhq-fastcomposer layout."""

import csv
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.miniature.canvas import Canvas
from facediffuser.miniature.captions import Caption, write_captions, write_world_captions
from facediffuser.miniature.figure import draw_person
from facediffuser.miniature.looks import ACTION_SHARE, Outfit, Pose, Setting, sample_outfit, sample_pose, sample_setting
from facediffuser.miniature.objects import OBJECTS, draw_object
from facediffuser.miniature.people import Identity, sample_identity
from facediffuser.miniature.prompts import PAIR_PROMPTS, PROMPTS
from facediffuser.miniature.scenes import draw_scene
from facediffuser.miniature.styles import finish
from facediffuser.miniature.worlds import (
    WorldName,
    blur_background,
    people_of,
    world_of,
    world_outfit,
    world_poses,
    world_setting,
)

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
    """Return a picture of one or two people; what is not given (place, style, clothes, pose) follows from `seed`.

    Args:
        people: one or two.
        seed: the same seed gives the same picture.
        size: its side in px, 64 or 128.
        setting: place and style; None draws them.
        outfits: one for each person; None draws them.
        photo_share: the chance of a photo where the style is drawn; else it is a sketch or a painting.
        action_share: the chance that a person does something where the clothes are drawn.

    Raises:
        InputError: another size.
    """
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


def render_world(name: WorldName, people: list[Identity], seed: int, size: int = 64) -> Rendering:
    """A picture of a world (`worlds.WORLDS`) with nobody, one or two people; all the rest of it follows from `seed`."""
    if size not in (64, 128):
        raise InputError(f"size {size}: the miniature world is rendered at 64 or 128 px")
    world, rng = world_of(name), np.random.default_rng((seed, 37))
    setting = world_setting(world, rng)
    outfits = [world_outfit(world, rng) for _ in people]
    poses = world_poses(world, people, rng)
    thing = str(rng.choice(OBJECTS)) if not people and rng.random() < 0.6 else ""
    framed = int(np.argmin([abs(pose.x) for pose in poses])) if poses else 0
    captions = write_world_captions(people, outfits, setting, world, rng, thing, framed)
    canvas = Canvas(size, rng)
    draw_scene(canvas, setting.scene)
    blur_background(canvas, world, rng)
    canvas.image *= rng.uniform(0.94, 1.04)
    if thing:
        draw_object(canvas, thing)
    # Whoever is in the middle of a close-up is in front.
    for place in sorted(range(len(people)), key=lambda place: -abs(poses[place].x)):
        draw_person(canvas, people[place], outfits[place], poses[place], place + 1)
    boxes = [_face_box(who, pose, size) for who, pose in zip(people, poses, strict=True)]
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
    pair_share: float | None = None,
    action_share: float | None = None,
    world: WorldName | None = None,
    workers: int = 1,
    subjects: int = SUBJECTS,
) -> None:
    """Write pictures in the ffhq-fastcomposer layout, and people and prompts for `generate`, to a new folder.

    Besides that layout's files each JSON names who is in the picture (`identity`). Few captions tell a person's looks,
    so that a reference picture has something to add. `subjects/` has people who are in no picture, `prompts.jsonl`
    prompts for one of them and `prompts_pairs.jsonl` for two. The same seed gives the same files, however many
    `workers` write them.

    Args:
        count: how many pictures.
        seed: the seed.
        output: the folder.
        size: their side in px, 64 or 128.
        pair_share: on how many of them two people stand, 0 to 1; None for PAIR_SHARE.
        action_share: how many people do something, 0 to 1; None for ACTION_SHARE.
        world: a world of `worlds.WORLDS`, which has its own shares.
        workers: how many processes write.
        subjects: how many people `subjects/` has, at most 15: of those that it has otherwise the first men and women in
            turn.

    Raises:
        InputError: the folder is not empty, or a share is given that the world decides.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: the folder is not empty; give a new one")
    if world is not None and (pair_share is not None or action_share is not None):
        raise InputError(f"world {world} has shares of its own of pairs and actions; leave --pairs and --actions out")
    output.mkdir(parents=True, exist_ok=True)
    people = max(2, -(-count // PER_PERSON))
    first = SET_PEOPLE + seed * 10_000
    numbers = list(range(first, first + people)) if world is None else people_of(world_of(world), first, people)
    shares = (
        (PAIR_SHARE if pair_share is None else pair_share),
        (ACTION_SHARE if action_share is None else action_share),
    )
    job = _SetJob(seed, output, size, *shares, world, tuple(numbers))
    if workers > 1:
        parts = [range(start, min(start + 200, count)) for start in range(0, count, 200)]
        # Before the detector below: a process that is forked after torch has started its threads may wait for ever.
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(job.write, parts))
    else:
        job.write(range(count))
    write_subjects(output / "subjects", SUBJECT_PEOPLE + seed * 10_000, size, kept=subjects)
    ids = [f"{index:08d}" for index in range(count)]
    tested = [index % people >= 0.9 * people for index in range(count)]
    train = [image_id for image_id, test in zip(ids, tested, strict=True) if not test]
    test = [image_id for image_id, test in zip(ids, tested, strict=True) if test]
    for name, some in (("", ids), ("_train", train), ("_test", test)):
        (output / f"image_ids{name}.txt").write_text("".join(f"{image_id}\n" for image_id in some))
    for name, prompts in (("prompts.jsonl", PROMPTS), ("prompts_pairs.jsonl", PAIR_PROMPTS)):
        (output / name).write_text("".join(json.dumps(row) + "\n" for row in prompts))


@dataclass(frozen=True)
class _SetJob:
    """What decides each picture of a set."""

    seed: int
    output: Path
    size: int
    pair_share: float
    action_share: float
    world: WorldName | None
    people: tuple[int, ...]

    def write(self, indices: Sequence[int]) -> None:
        """Write the pictures with these numbers."""
        for index in indices:
            rng = np.random.default_rng((self.seed, index, 13))
            drawn, numbers = self._of_world(index, rng) if self.world else self._plain(index, rng)
            looks = LOOKS_SHARE if self.world is None else world_of(self.world).looks
            image_id = f"{index:08d}"
            _write_picture(self.output / image_id[:5], image_id, drawn, numbers, with_looks=bool(rng.random() < looks))

    def _plain(self, index: int, rng: np.random.Generator) -> tuple[Rendering, list[int]]:
        numbers = self._numbers(index, rng, self.pair_share)
        people = [person(number) for number in numbers]
        return render(people, int(rng.integers(2**31)), self.size, action_share=self.action_share), numbers

    def _of_world(self, index: int, rng: np.random.Generator) -> tuple[Rendering, list[int]]:
        assert self.world is not None
        world = world_of(self.world)
        nobody = rng.random() < world.empty
        numbers = [] if nobody else self._numbers(index, rng, world.pairs)
        people = [person(number) for number in numbers]
        return render_world(self.world, people, int(rng.integers(2**31)), self.size), numbers

    def _numbers(self, index: int, rng: np.random.Generator, pair_share: float) -> list[int]:
        count = len(self.people)
        numbers = [self.people[index % count]]
        if rng.random() < pair_share:
            numbers.append(self.people[(index + 1 + int(rng.integers(count - 1))) % count])
        return numbers


def write_subjects(folder: Path, first: int, size: int = 64, count: int = SUBJECTS, kept: int | None = None) -> None:
    """Write people with three reference photographs each (no hat, nothing in hand), and `subjects.csv`.

    A photograph in which MTCNN finds no face, or two, is taken again: `generate` would refuse it.

    Args:
        folder: where they go.
        first: the number of the first of them.
        size: the pictures' side in px.
        count: how many there are.
        kept: how many of these are written, the first by name of each class word in turn; None for all.
    """
    from facediffuser.scoring.face_detector import FaceDetector

    people = {f"{who.class_word}_{place:02d}": place for place in range(count) if (who := person(first + place))}
    by_word = [list(names) for _, names in groupby(sorted(people), key=lambda name: name.partition("_")[0])]
    in_turn = [name for names in zip_longest(*by_word) for name in names if name]
    written = set(in_turn[:kept])
    detector, rows = FaceDetector() if written else None, []
    for name, place in people.items():
        if detector is None or name not in written:
            continue
        who = person(first + place)
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
    folder.mkdir(exist_ok=True)
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
        if not len(rows):  # the edge or somebody in front left nothing of them
            continue
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        phrase = {"start": start, "end": end} if end else {}
        segments.append({"id": place + 1, "coco_label": "person", "bbox": box} | phrase)
    record = {"caption": caption.text, "segments": segments}
    if numbers:
        record["identity"] = "+".join(str(number) for number in numbers)
    (folder / f"{image_id}.json").write_text(json.dumps(record))
