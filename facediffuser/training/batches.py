"""Training batches: which rows, mirrored or not, with which caption, subjects and reference pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from facediffuser.subject import CLIP_MEAN, CLIP_STD, TokenizedPrompts, tokenize_with_markers
from facediffuser.training.augment import augmenter, face_reference, segment_reference
from facediffuser.training.conditioning import choose_told, mark_caption
from facediffuser.training.recipe import NO_AUGMENTATION, Recipe
from facediffuser.training.records import Records, decode_ids, square

TIMESTEPS = 1000


@dataclass
class Batch:
    """What one step is made of.

    latents (b, c, h, w) fp32, scaled; noise, of the same shape; times (b,) int64; masked (b,) bool, whose loss is over the
    subjects alone; tokens: the captions' ids, subject mask and counts; references (b, s, 3, side,
    side), CLIP-normalised, rows padded with zeros; areas (b, s, h, w) in [0, 1], each subject's area on the latent;
    faces (b, 1, h, w) in [0, 1], where faces are.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    masked: torch.Tensor
    tokens: TokenizedPrompts
    references: torch.Tensor
    areas: torch.Tensor
    faces: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tokens = self.tokens
        moved = (value.to(device) for value in (tokens.input_ids, tokens.subject_mask, tokens.subject_counts))
        chance = (self.latents.to(device), self.noise.to(device), self.times.to(device), self.masked.to(device))
        tensors = (self.references.to(device), self.areas.to(device), self.faces.to(device))
        return Batch(*chance, TokenizedPrompts(*moved, tokens.texts_without_markers), *tensors)


@dataclass
class _Item:
    latent: torch.Tensor
    noise: torch.Tensor
    time: int
    masked: bool
    faces: torch.Tensor
    caption: str
    references: list[torch.Tensor]
    areas: list[torch.Tensor]


class Batches:
    """Batches by step number.

    All chance about an image comes from torch's global generator, seeded for that image: it does not matter which worker
    has it, nor beside which others.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        records: Records,
        moments: np.ndarray,
        scale: float,
        tokenizer,
        reference_size: int = 0,
    ):
        self.recipe, self.seed, self.records, self.moments, self.scale = recipe, seed, records, moments, scale
        self.tokenizer, self.reference_size = tokenizer, reference_size
        self.augment = augmenter(recipe.augmentation, recipe.reference_resolution)
        self.plain = augmenter(recipe.augmentation.model_copy(update=NO_AUGMENTATION), recipe.reference_resolution)
        self._others = records.others() if recipe.reference_pairing == "other" and reference_size else {}
        self._epoch, self._order = -1, None

    def rows(self, first: int, count: int) -> list[int]:
        """The rows at places `first` to `first + count` of an endless sequence that visits all rows once an epoch."""
        return [self._row(place) for place in range(first, first + count)]

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, len(self.records))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.records), generator=generator).tolist()
        return self._order[within]

    def make(self, rows: list[int], seeds: list[int], plain: bool = False) -> Batch:
        """The batch of these rows, the chance about each from its own seed.

        With `plain` nothing is mirrored, dropped, masked or varied: what validation looks at.
        """
        items = [self._item(row, seed, plain) for row, seed in zip(rows, seeds, strict=True)]
        tokens = tokenize_with_markers(self.tokenizer, [item.caption for item in items], lost="drop")
        slots, size = max(1, max(len(item.references) for item in items)), self.reference_size or 1
        references = torch.zeros(len(rows), slots, 3, size, size)
        areas = torch.zeros(len(rows), slots, *items[0].latent.shape[-2:])
        for place, item in enumerate(items):
            for slot, (picture, area) in enumerate(zip(item.references, item.areas, strict=True)):
                references[place, slot], areas[place, slot] = picture, area
        return Batch(
            latents=torch.stack([item.latent for item in items]),
            noise=torch.stack([item.noise for item in items]),
            times=torch.tensor([item.time for item in items]),
            masked=torch.tensor([item.masked for item in items]),
            tokens=tokens,
            references=references,
            areas=areas,
            faces=torch.stack([item.faces for item in items]),
        )

    def _item(self, row: int, seed: int, plain: bool) -> _Item:
        torch.manual_seed(seed)
        record = self.records.row(row)
        flip = bool(torch.rand(()) < 0.5) and not plain
        mean, logvar = torch.from_numpy(self.moments[row, int(flip)].astype(np.float32)).chunk(2)
        latent = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape)) * self.scale
        noise = torch.randn(latent.shape)
        time = int(torch.randint(TIMESTEPS, ()))
        masked = bool(torch.rand(()) < self.recipe.masked_loss) and not plain
        side = latent.shape[-2:]
        told = self._told(row, record, flip, side, plain)
        return _Item(latent, noise, time, masked, self._faces(record, flip, side), *told)

    def _told(self, row: int, record: dict, flip: bool, side: tuple[int, int], plain: bool):
        """A row's caption with markers, its told subjects' references and areas, in the order of the markers."""
        subjects = sorted({one["end"]: one for one in record["subjects"]}.values(), key=lambda one: one["end"])
        subjects = subjects[: self.recipe.max_subjects] if self.reference_size else []
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        drop, keep = (0.0, 1.0) if plain else (self.recipe.caption_drop, self.recipe.subject_keep)
        told = choose_told(len(subjects), drop, keep, generator)
        if not told.caption:
            return "", [], []
        subjects = [subjects[number] for number in told.subjects]
        if not subjects:
            return record["caption"], [], []
        ids = decode_ids(record["segmentation"])
        vary = self.plain if plain else self.augment
        pictures = [self._reference(row, record, one, ids, plain) for one in subjects]
        references = [_normalised(vary(picture), self.reference_size) for picture in pictures]
        areas = [self._area(ids == one["segment_id"], flip, side) for one in subjects]
        return mark_caption(record["caption"], [one["end"] for one in subjects]), references, areas

    def _reference(self, row: int, record: dict, subject: dict, ids: np.ndarray, plain: bool) -> torch.Tensor:
        others = self._others.get(row, []) if len(record["subjects"]) == 1 and not plain else []
        if others:
            row = others[int(torch.randint(len(others), ()))]
            record = self.records.row(row)
            subject, ids = record["subjects"][0], decode_ids(record["segmentation"])
        image = self.records.image(row)
        if self.recipe.reference_source == "face" and 0 <= subject["face_index"] < len(record["faces"]):
            return face_reference(image, record["faces"][subject["face_index"]]["crop_box"])
        return segment_reference(image, ids, subject["segment_id"], subject["box"])

    def _area(self, inside: np.ndarray, flip: bool, side: tuple[int, int]) -> torch.Tensor:
        area = square(torch.from_numpy(inside.astype(np.float32))[None], self.recipe.resolution, nearest=True)
        area = F.interpolate(area[None], size=side, mode="area")[0, 0]
        return area.flip(-1) if flip else area

    def _faces(self, record: dict, flip: bool, side: tuple[int, int]) -> torch.Tensor:
        if not self.recipe.face_weight:
            return torch.zeros(1, *side)
        inside = np.zeros((record["height"], record["width"]), np.float32)
        for face in record["faces"]:
            x1, y1, x2, y2 = (max(0, round(value)) for value in face["box"])
            inside[y1:y2, x1:x2] = 1
        return self._area(inside, flip, side)[None]


def _normalised(picture: torch.Tensor, size: int) -> torch.Tensor:
    picture = F.interpolate(picture.clamp(0, 1)[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return (picture - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
