"""Training batches: which rows, mirrored or not, with which caption, subjects and reference pictures."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from facediffuser.prompt_tokens import TokenizedPrompts, tokenize_with_markers
from facediffuser.subject import CLIP_MEAN, CLIP_STD
from facediffuser.training.augment import augmenter, face_reference, segment_reference
from facediffuser.training.conditioning import choose_told, mark_caption
from facediffuser.training.frozen import CaptionEmbeddings, pixels_of
from facediffuser.training.recipe import NO_AUGMENTATION, Recipe
from facediffuser.training.records import Records, decode_ids, square

TIMESTEPS = 1000


@dataclass
class Batch:
    """What one step is made of, for b images with up to s told subjects.

    From the cache, `moments` (b, 2c, h, w) fp16, the latents' mean and log variance, and `text` (b, n, d) fp16, the
    captions' embeddings; without it, `pixels` (b, 3, side, side) in [-1, 1]. `draw`, what the latents are drawn with, and
    `noise`, both (b, c, h, w); `times` (b,) int64; `masked` (b,) bool, whose loss is over the subjects alone; `tokens`: the
    captions' ids, subject mask and counts; `references` (k, 3, side, side), CLIP-normalised, those of all told subjects in the
    order of rows and markers; `areas` (b, s, h, w) in [0, 1], each subject's area on the latent; `faces` (b, 1, h, w) in
    [0, 1], where faces are.
    """

    moments: torch.Tensor | None
    text: torch.Tensor | None
    pixels: torch.Tensor | None
    draw: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    masked: torch.Tensor
    tokens: TokenizedPrompts
    references: torch.Tensor
    areas: torch.Tensor
    faces: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same in memory from which it can be copied to a GPU beside other work."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def changed(of) -> dict[str, torch.Tensor]:
            values = ((field.name, getattr(of, field.name)) for field in fields(of))
            return {name: change(value) for name, value in values if isinstance(value, torch.Tensor)}

        return replace(self, **changed(self), tokens=replace(self.tokens, **changed(self.tokens)))


@dataclass
class _Item:
    moments: torch.Tensor | None
    pixels: torch.Tensor | None
    draw: torch.Tensor
    noise: torch.Tensor
    time: int
    masked: bool
    faces: torch.Tensor
    caption: str
    """With markers."""
    plain: str
    references: list[torch.Tensor]
    areas: list[torch.Tensor]


class Batches:
    """Batches by their place in an endless sequence of images that visits all rows once an epoch.

    All chance about an image comes from torch's global generator, seeded for that image: it does not matter which worker
    or which of its processes has it, nor beside which others. `batches[place]` is the batch of the images from there on.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        records: Records,
        latent_shape: tuple[int, int, int],
        tokenizer,
        reference_size: int = 0,
        moments: np.ndarray | None = None,
        texts: CaptionEmbeddings | None = None,
    ):
        self.recipe, self.seed, self.records, self.latent_shape = recipe, seed, records, latent_shape
        self.tokenizer, self.reference_size, self.moments, self.texts = tokenizer, reference_size, moments, texts
        self.augment = augmenter(recipe.augmentation, recipe.reference_resolution)
        self.plain = augmenter(recipe.augmentation.model_copy(update=NO_AUGMENTATION), recipe.reference_resolution)
        self._others = records.others() if recipe.reference_pairing == "other" and reference_size else {}
        self._epoch, self._order = -1, None

    def __getitem__(self, place: int) -> Batch:
        size = self.recipe.batch_size
        return self.make(self.rows(place, size), [image_seed(self.seed, place + number) for number in range(size)])

    def rows(self, first: int, count: int) -> list[int]:
        """The rows at places `first` to `first + count` of the sequence."""
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
        areas = torch.zeros(len(rows), max(1, int(tokens.subject_counts.max())), *self.latent_shape[1:])
        references = [torch.zeros(0, 3, *[self.reference_size or 1] * 2)]
        for place, (item, told) in enumerate(zip(items, tokens.subject_counts.tolist(), strict=True)):
            references += [picture[None] for picture in item.references[:told]]
            for slot, area in enumerate(item.areas[:told]):
                areas[place, slot] = area
        texts = self.texts
        return Batch(
            moments=None if self.moments is None else torch.stack([item.moments for item in items]),
            text=None if texts is None else torch.from_numpy(np.stack([texts[item.plain] for item in items])),
            pixels=None if self.moments is not None else torch.stack([item.pixels for item in items]),
            draw=torch.stack([item.draw for item in items]),
            noise=torch.stack([item.noise for item in items]),
            times=torch.tensor([item.time for item in items]),
            masked=torch.tensor([item.masked for item in items]),
            tokens=tokens,
            references=torch.cat(references),
            areas=areas,
            faces=torch.stack([item.faces for item in items]),
        )

    def _item(self, row: int, seed: int, plain: bool) -> _Item:
        # Not torch.manual_seed, which takes longer than the rest of some items: it tells GPUs, and keeps a stack trace.
        torch.default_generator.manual_seed(seed)
        record = self.records.row(row)
        flip = bool(torch.rand(()) < 0.5) and not plain
        draw, noise = torch.randn(self.latent_shape), torch.randn(self.latent_shape)
        time = int(torch.randint(TIMESTEPS, ()))
        masked = bool(torch.rand(()) < self.recipe.masked_loss) and not plain
        moments = pixels = None
        if self.moments is not None:
            moments = torch.from_numpy(self.moments[row, int(flip)])
        else:
            pixels = pixels_of(self.records, row, self.recipe.resolution)
            pixels = pixels.flip(-1) if flip else pixels
        caption, references, areas = self._told(row, record, flip, plain)
        told = record["caption"] if caption else ""
        faces = self._faces(record, flip)
        return _Item(moments, pixels, draw, noise, time, masked, faces, caption, told, references, areas)

    def _told(self, row: int, record: dict, flip: bool, plain: bool):
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
        areas = [self._area(ids == one["segment_id"], flip) for one in subjects]
        return mark_caption(record["caption"], [one["end"] for one in subjects]), references, areas

    def _reference(self, row: int, record: dict, subject: dict, ids: np.ndarray, plain: bool) -> torch.Tensor:
        others = self._others.get(row, []) if len(record["subjects"]) == 1 and not plain else []
        if others:
            row = others[int(torch.randint(len(others), ()))]
            record = self.records.row(row)
            subject, ids = record["subjects"][0], decode_ids(record["segmentation"])
        image = self.records.image(row)
        if self.recipe.reference_source == "face" and 0 <= subject["face_index"] < len(record["faces"]):
            face = record["faces"][subject["face_index"]]
            return face_reference(image, face["crop_box"], face["crop_turn"])
        return segment_reference(image, ids, subject["segment_id"], subject["box"])

    def _area(self, inside: np.ndarray, flip: bool) -> torch.Tensor:
        area = square(torch.from_numpy(inside.astype(np.float32))[None], self.recipe.resolution, nearest=True)
        area = F.interpolate(area[None], size=self.latent_shape[1:], mode="area")[0, 0]
        return area.flip(-1) if flip else area

    def _faces(self, record: dict, flip: bool) -> torch.Tensor:
        if not self.recipe.face_weight:
            return torch.zeros(1, *self.latent_shape[1:])
        inside = np.zeros((record["height"], record["width"]), np.float32)
        for face in record["faces"]:
            x1, y1, x2, y2 = (max(0, round(value)) for value in face["box"])
            inside[y1:y2, x1:x2] = 1
        return self._area(inside, flip)[None]


def _normalised(picture: torch.Tensor, size: int) -> torch.Tensor:
    picture = F.interpolate(picture.clamp(0, 1)[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return (picture - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def image_seed(seed: int, place: int) -> int:
    """Return the seed of all chance about the image at a place in the endless sequence of images."""
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
