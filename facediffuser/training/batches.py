"""Training batches: which rows, mirrored or not, with which caption, subjects and reference pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from facediffuser.subject import CLIP_MEAN, CLIP_STD, TokenizedPrompts, tokenize_with_markers
from facediffuser.training.augment import augmenter, face_reference, segment_reference
from facediffuser.training.conditioning import choose_told, mark_caption
from facediffuser.training.recipe import Recipe
from facediffuser.training.records import Records, decode_ids, square


@dataclass
class Batch:
    """What one step is made of.

    latents (b, c, h, w) fp32, scaled; tokens: the captions' ids, subject mask and counts; references (b, s, 3, side,
    side), CLIP-normalised, rows padded with zeros; areas (b, s, h, w) in [0, 1], each subject's area on the latent;
    faces (b, 1, h, w) in [0, 1], where faces are.
    """

    latents: torch.Tensor
    tokens: TokenizedPrompts
    references: torch.Tensor
    areas: torch.Tensor
    faces: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tokens = self.tokens
        moved = (value.to(device) for value in (tokens.input_ids, tokens.subject_mask, tokens.subject_counts))
        tensors = (self.references.to(device), self.areas.to(device), self.faces.to(device))
        return Batch(self.latents.to(device), TokenizedPrompts(*moved, tokens.texts_without_markers), *tensors)


@dataclass
class _Item:
    caption: str
    references: list[torch.Tensor]
    areas: list[torch.Tensor]


class Batches:
    """Batches by step number. All chance comes from torch's global generator, which the loop seeds for every step."""

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

    def make(self, rows: list[int]) -> Batch:
        """The batch of these rows."""
        mirrored = (torch.rand(len(rows)) < 0.5).tolist()
        moments = np.stack([self.moments[row, int(flip)] for row, flip in zip(rows, mirrored, strict=True)])
        mean, logvar = torch.from_numpy(moments.astype(np.float32)).chunk(2, dim=1)
        latents = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape)) * self.scale
        side = latents.shape[-2:]
        records = [self.records.row(row) for row in rows]
        items = [self._item(*one, side) for one in zip(rows, records, mirrored, strict=True)]
        tokens = tokenize_with_markers(self.tokenizer, [item.caption for item in items], lost="drop")
        slots, size = max(1, max(len(item.references) for item in items)), self.reference_size or 1
        references = torch.zeros(len(rows), slots, 3, size, size)
        areas = torch.zeros(len(rows), slots, *side)
        for place, item in enumerate(items):
            for slot, (picture, area) in enumerate(zip(item.references, item.areas, strict=True)):
                references[place, slot], areas[place, slot] = picture, area
        faces = torch.stack([self._faces(*one, side) for one in zip(records, mirrored, strict=True)])
        return Batch(latents, tokens, references, areas, faces)

    def _item(self, row: int, record: dict, flip: bool, side: tuple[int, int]) -> _Item:
        """A row's caption with markers, its told subjects' references and areas, in the order of the markers."""
        subjects = sorted({one["end"]: one for one in record["subjects"]}.values(), key=lambda one: one["end"])
        subjects = subjects[: self.recipe.max_subjects] if self.reference_size else []
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        told = choose_told(len(subjects), self.recipe.caption_drop, self.recipe.subject_keep, generator)
        if not told.caption:
            return _Item("", [], [])
        subjects = [subjects[number] for number in told.subjects]
        if not subjects:
            return _Item(record["caption"], [], [])
        ids = decode_ids(record["segmentation"])
        references = [
            _normalised(self.augment(self._reference(row, record, one, ids)), self.reference_size) for one in subjects
        ]
        areas = [self._area(ids == one["segment_id"], flip, side) for one in subjects]
        return _Item(mark_caption(record["caption"], [one["end"] for one in subjects]), references, areas)

    def _reference(self, row: int, record: dict, subject: dict, ids: np.ndarray) -> torch.Tensor:
        others = self._others.get(row, []) if len(record["subjects"]) == 1 else []
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
