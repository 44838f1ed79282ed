"""Rendered pictures in memory, with all that training the parts asks of them."""

import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from facediffuser.miniature.captions import looks_phrase
from facediffuser.miniature.looks import ACTION_SHARE
from facediffuser.miniature.render import person, render, render_world
from facediffuser.miniature.world_names import WorldName
from facediffuser.miniature.worlds import world_of

logger = logging.getLogger(__name__)

PER_PERSON = 6
PAIR_SHARE = 0.2


@dataclass(frozen=True)
class PhotoSet:
    """Pictures of people who each appear several times.

    images (n, s, s, 3) uint8; captions without and full_captions with the words for the looks; faces (n, 2, 4) float32, the
    face boxes x1, y1, x2, y2 in pixels (NaN where nobody is); who (n, 2) the people's numbers (-1: nobody);
    identity_texts: what is said of each person's looks, by number.
    """

    images: np.ndarray
    captions: list[str]
    full_captions: list[str]
    faces: np.ndarray
    who: np.ndarray
    identity_texts: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def people(self) -> int:
        """How many different people there are."""
        return len(self.identity_texts)

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures as (k, 3, s, s) float32 in [-1, 1]."""
        chosen = torch.from_numpy(self.images[index.numpy()])
        return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1

    def face_masks(self, index: torch.Tensor) -> torch.Tensor:
        """1 where a face is, grown by a tenth for brows and chin: (k, s, s) float32."""
        boxes = torch.from_numpy(np.nan_to_num(self.faces[index.numpy()], nan=-1e3))
        size = self.images.shape[1]
        centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * 0.6
        axis = torch.arange(size) + 0.5
        across = (axis - centre[..., :1]).abs() <= half[..., :1]
        down = (axis - centre[..., 1:]).abs() <= half[..., 1:]
        return (down[..., :, None] & across[..., None, :]).any(1).float()

    def face_crops(
        self, count: int, margin: float, side: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random jittered square crops around faces, half of them mirrored.

        `margin` grows the square by that share of the box's longer side, half on each end. Returns crops (count, 3, side,
        side) in [-1, 1] and the people's numbers (count,).
        """
        shown = torch.from_numpy(np.flatnonzero(self.who[:, 0] >= 0))
        index = shown[torch.randint(len(shown), (count,), generator=generator)]
        place = torch.rand(count, generator=generator).lt(0.5).long()
        place = torch.where(torch.from_numpy(self.who[index.numpy(), 1] >= 0), place, torch.zeros_like(place))
        boxes = torch.from_numpy(self.faces[index.numpy(), place.numpy()])
        span = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        centre = centre + span[:, None] * (torch.rand(count, 2, generator=generator) - 0.5) * 0.12
        half = span * (1 + margin) / 2 * (1 + (torch.rand(count, generator=generator) - 0.5) * 0.16)
        mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
        size = self.images.shape[1]
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = half / size * 2 * mirrored, half / size * 2
        theta[:, :, 2] = centre / size * 2 - 1
        grid = F.affine_grid(theta, (count, 3, side, side), align_corners=False)
        crops = F.grid_sample(self.pixels(index), grid, padding_mode="reflection", align_corners=False)
        return crops, torch.from_numpy(self.who[index.numpy(), place.numpy()])


def load_photos(
    count: int,
    first_person: int,
    cache: Path,
    workers: int = 2,
    photo_share: float = 0.8,
    pair_share: float = PAIR_SHARE,
    action_share: float = ACTION_SHARE,
    world: WorldName | None = None,
) -> PhotoSet:
    """Render `count` pictures of people numbered from `first_person`, or read them from `cache` if they are there.

    Sets with distant first persons share nobody. `photo_share` of the pictures are in the style of a photograph, on
    `pair_share` of them stand two people, and `action_share` of all people do something; a `world` has its own shares instead.
    """
    shown = world or f"{photo_share}-{pair_share}-{action_share}"
    path = cache / f"photos-{first_person}-{count}-{shown}.npz"
    if not path.exists():
        people = max(2, count // PER_PERSON)
        shares = photo_share, pair_share, action_share, world
        jobs = [(start, min(start + 500, count), people, first_person, *shares) for start in range(0, count, 500)]
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_render_some, jobs))
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
            identity_texts=np.array(_identity_texts(people, first_person)),
        )
        logger.info("%s: %d pictures of %d people", path.name, count, people)
    held = np.load(path)
    texts = {name: held[name].tolist() for name in ("captions", "full_captions", "identity_texts")}
    return PhotoSet(images=held["images"], faces=held["faces"], who=held["who"], **texts)


def _render_some(job: tuple[int, int, int, int, float, float, float, WorldName | None]) -> dict[str, np.ndarray]:
    start, stop, people, first, photo_share, pair_share, action_share, world = job
    if world is not None:
        pair_share = world_of(world).pairs
    columns = {name: [] for name in ("images", "captions", "full_captions", "faces", "who")}
    for index in range(start, stop):
        rng = np.random.default_rng((first, index, 19))
        numbers = [index % people]
        if rng.random() < pair_share:
            numbers.append((index + 1 + int(rng.integers(people - 1))) % people)
        if world is not None and rng.random() < world_of(world).empty:
            numbers = []
        shown, seed = [person(first + number) for number in numbers], int(rng.integers(2**31))
        if world is not None:
            drawn = render_world(world, shown, seed)
        else:
            drawn = render(shown, seed, photo_share=photo_share, action_share=action_share)
        columns["images"].append(drawn.image)
        columns["captions"].append(drawn.caption.text)
        columns["full_captions"].append(drawn.full_caption.text)
        boxes = list(drawn.face_boxes) + [(np.nan,) * 4] * (2 - len(numbers))
        columns["faces"].append(np.asarray(boxes, np.float32))
        columns["who"].append(numbers + [-1] * (2 - len(numbers)))
    return {name: np.asarray(values) for name, values in columns.items()}


def _identity_texts(people: int, first: int) -> list[str]:
    return [f"a {who.class_word}{looks_phrase(who)}" for who in (person(first + number) for number in range(people))]
