"""Training batches: the rows of each, and every random choice about them (mirroring, dropout, references, noise)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from facediffuser.errors import InputError
from facediffuser.pictures import CLIP_MEAN, CLIP_STD
from facediffuser.prompt_tokens import TokenizedPrompts, tokenize_with_markers
from facediffuser.prompts import ids_and_places
from facediffuser.training.augment import augmenter, face_reference, segment_reference
from facediffuser.training.conditioning import draw_condition_dropout, mark_caption, subjects_in_caption
from facediffuser.training.latent_cache import CaptionEmbeddings, pixels_of
from facediffuser.training.recipe import NO_AUGMENTATION, Recipe
from facediffuser.training.records import Records, square

TIMESTEPS = 1000


@dataclass
class Batch:
    """One worker's input of one forward pass: b images with up to s subjects that kept their reference.

    Attributes:
        moments: from the cache, mean and log variance of the latents, (b, 2c, h, w) float16; None without the cache.
        text: from the cache, the captions' embeddings, (b, n, d) float16; None without the cache.
        pixels: without the cache, the images, (b, 3, side, side) in [-1, 1]; else None.
        draw: standard normal numbers with which latents are sampled from the moments, (b, c, h, w).
        noise: the noise to predict, (b, c, h, w).
        times: timesteps 0..999, (b,) int64.
        masked: whether an image's loss covers its subjects only, (b,) bool.
        tokens: the captions' ids, subject mask and subject counts.
        references: CLIP-normalised reference pictures (k, 3, side, side), in the order of rows and markers.
        areas: share of each latent cell that a subject covers, (b, s, h, w) in [0, 1].
        faces: share of each latent cell that faces cover, (b, 1, h, w) in [0, 1].
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
        """Return the batch with all tensors on a device."""
        return self._map_tensors(lambda value: value.to(device, non_blocking=True))

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Keep the memory of all tensors, which are on a GPU, until what is queued on a stream by then is done."""
        for group in (self, self.tokens):
            for value in vars(group).values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (the name is DataLoader's)."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def mapped(group) -> dict[str, torch.Tensor]:
            values = ((field.name, getattr(group, field.name)) for field in fields(group))
            return {name: function(value) for name, value in values if isinstance(value, torch.Tensor)}

        return replace(self, **mapped(self), tokens=replace(self.tokens, **mapped(self.tokens)))


@dataclass
class _Item:
    """One image of a batch; fields as in Batch, `caption` with markers, `plain` without."""

    moments: torch.Tensor | None
    pixels: torch.Tensor | None
    draw: torch.Tensor
    noise: torch.Tensor
    time: int
    masked: bool
    faces: torch.Tensor
    caption: str
    plain: str
    references: list[torch.Tensor]
    areas: list[torch.Tensor]


class Batches:
    """The endless sequence of images that visits all rows once per epoch; `batches[position]` is the batch from there on.

    All random numbers about an image come from torch's global generator, seeded for that image: its content does not
    depend on the worker or process that prepares it, nor on the other images of its batch.

    Args:
        recipe: batch size, dropout probabilities, resolution, augmentation.
        seed: seed of the order and of every image.
        records: the split's rows.
        latent_shape: (c, h, w).
        tokenizer: the base model's CLIP tokenizer.
        reference_size: side of the image encoder's input, px; 0 for the TDM, which takes no references.
        moments: cached latents, (rows, 2, 2c, h, w) float16, or None to decode pictures.
        texts: cached caption embeddings, or None.
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
        self._other_pictures = (
            records.other_pictures() if recipe.reference_pairing == "other" and reference_size else {}
        )
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> Batch:
        size = self.recipe.batch_size
        seeds = [image_seed(self.seed, position + number) for number in range(size)]
        return self.collate(self.rows(position, size), seeds)

    def rows(self, first: int, count: int) -> list[int]:
        """Return the row numbers of the `count` images from position `first` of the endless sequence on."""
        return [self._row(position) for position in range(first, first + count)]

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, len(self.records))
        if epoch != self._epoch:
            # torch takes seeds below 2**64.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**64)
            self._epoch, self._order = epoch, torch.randperm(len(self.records), generator=generator).tolist()
        return self._order[within]

    def collate(self, rows: list[int], seeds: list[int], plain: bool = False) -> Batch:
        """Return the batch of the given rows.

        Args:
            rows: row numbers in the split.
            seeds: one seed per row, from which all its random choices follow.
            plain: for validation: no mirroring, dropout, loss mask or augmentation.

        Raises:
            InputError: a row's picture, segmentation or caption cannot be used.
        """
        items = [self._item(row, seed, plain) for row, seed in zip(rows, seeds, strict=True)]
        tokens = self._tokenize(rows, [item.caption for item in items])
        areas = torch.zeros(len(rows), max(1, int(tokens.subject_counts.max())), *self.latent_shape[1:])
        references = [torch.zeros(0, 3, *[self.reference_size or 1] * 2)]
        for number, (item, kept) in enumerate(zip(items, tokens.subject_counts.tolist(), strict=True)):
            references += [picture[None] for picture in item.references[:kept]]
            for slot, area in enumerate(item.areas[:kept]):
                areas[number, slot] = area
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

    def _tokenize(self, rows: list[int], captions: list[str]) -> TokenizedPrompts:
        try:
            return tokenize_with_markers(self.tokenizer, captions, lost="drop")
        except InputError:
            for row, caption in zip(rows, captions, strict=True):
                with self.records.naming(row):
                    ids_and_places(self.tokenizer, caption, "drop")
            raise

    def _item(self, row: int, seed: int, plain: bool) -> _Item:
        # Not torch.manual_seed: it seeds GPUs too and keeps a stack trace, which takes longer than the rest of some items.
        torch.default_generator.manual_seed(seed)
        record = self.records.row(row)
        flip = bool(torch.rand(()) < 0.5) and not plain
        draw, noise = torch.randn(self.latent_shape), torch.randn(self.latent_shape)
        time = int(torch.randint(TIMESTEPS, ()))
        masked = bool(torch.rand(()) < self.recipe.masked_loss) and not plain
        moments = pixels = None
        if self.moments is not None:
            # Copied: the array may be mapped from a file that is read only.
            moments = torch.from_numpy(np.array(self.moments[row, int(flip)]))
        else:
            pixels = pixels_of(self.records, row, self.recipe.resolution)
            pixels = pixels.flip(-1) if flip else pixels
        caption, references, areas = self._conditions(row, record, flip, plain)
        without_markers = record["caption"] if caption else ""
        faces = self._faces(record, flip)
        return _Item(moments, pixels, draw, noise, time, masked, faces, caption, without_markers, references, areas)

    def _conditions(self, row: int, record: dict, flip: bool, plain: bool):
        """Return the caption with markers and the kept subjects' references and areas, in the order of the markers."""
        subjects = subjects_in_caption(record, self.recipe.max_subjects if self.reference_size else 0)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        drop, keep = (0.0, 1.0) if plain else (self.recipe.caption_drop, self.recipe.subject_keep)
        kept = draw_condition_dropout(len(subjects), drop, keep, generator)
        if not kept.caption:
            return "", [], []
        subjects = [subjects[number] for number in kept.subjects]
        if not subjects:
            return record["caption"], [], []
        ids = self.records.ids(row)
        augment = self.plain if plain else self.augment
        pictures = [self._reference(row, record, subject, ids, plain) for subject in subjects]
        references = [_normalised(augment(picture), self.reference_size) for picture in pictures]
        areas = [self._area(ids == subject["segment_id"], flip) for subject in subjects]
        return mark_caption(record["caption"], [subject["end"] for subject in subjects]), references, areas

    def _reference(self, row: int, record: dict, subject: dict, ids: np.ndarray, plain: bool) -> torch.Tensor:
        others = self._other_pictures.get(row, []) if len(record["subjects"]) == 1 and not plain else []
        if others:
            row = others[int(torch.randint(len(others), ()))]
            record = self.records.row(row)
            subject, ids = record["subjects"][0], self.records.ids(row)
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


def image_seed(seed: int, position: int) -> int:
    """Return the seed, below 2**63, of all random choices about the image at a position of the endless sequence."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
