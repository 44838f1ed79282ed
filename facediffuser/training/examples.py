"""One training example from one prepared row: everything that is random about it comes from one generator."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from facediffuser.errors import InputError
from facediffuser.storage import Store
from facediffuser.subject import tokenize_with_markers
from facediffuser.training.conditioning import Told, choose_told, mark_caption
from facediffuser.training.frame import Frame
from facediffuser.training.prepared import (
    COLUMNS,
    MappedRows,
    Prepared,
    decode_image,
    decode_segmentation,
    read_part,
)
from facediffuser.training.recipe import Recipe, Role
from facediffuser.training.references import augment, clip_normalised, face_reference, segment_reference

TIMESTEPS = 1000
FACE_GROWTH = 0.1


@dataclass(frozen=True)
class Batch:
    """Examples as tensors: b images, up to s subjects each, k references in all.

    latents, noise (b, c, h, w); timesteps (b,); text (b, n, d), the plain caption's; mask (b, 1, h, w), the union of the
    subjects for those images whose loss is masked and 1 for others; emphasis (b, 1, h, w) or None. For the SDM:
    references (k, 3, size, size), CLIP-normalised; reference_of (k, 2), the image and the subject's place in it;
    subject_mask (b, n) bool; subject_tokens (b, s), subject_masks (b, s, side, side), subjects_present (b, s) bool.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None = None
    emphasis: torch.Tensor | None = None
    references: torch.Tensor | None = None
    reference_of: torch.Tensor | None = None
    subject_mask: torch.Tensor | None = None
    subject_tokens: torch.Tensor | None = None
    subject_masks: torch.Tensor | None = None
    subjects_present: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        moved = {
            name: value if value is None else value.to(device, non_blocking=True) for name, value in vars(self).items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Geometry:
    """What the models' configurations say: latents (c, h, w) and their scale, the vision tower's size, the fuser's limit."""

    latents: tuple[int, int, int]
    latent_scale: float
    encoder_size: int | None
    max_subjects: int


class Examples:
    """The prepared rows of a split with their cached latents and embeddings."""

    def __init__(
        self,
        prepared: Prepared,
        cache: Store,
        split: str,
        role: Role,
        recipe: Recipe,
        geometry: Geometry,
        tokenizer,
        empty_text: torch.Tensor,
        limit: int | None = None,
    ):
        keys = [part.key for part in prepared.parts[split]]
        # The TDM's loss needs no picture, so its pixels stay where they are.
        columns = [name for name in COLUMNS if role == "sdm" or name not in ("image", "segmentation")]
        if role == "tdm":
            columns.append("width")
            columns.append("height")
        self.rows = MappedRows(batch for key in keys for batch in read_part(prepared.store, key, columns))
        self.cached = MappedRows(
            batch for key in keys for batch in read_part(cache, key, ["image_id", "moments", "text"])
        )
        if len(self.rows) != len(self.cached):
            raise InputError(f"{cache.url}: the cache has other rows than the data; remove it and run again")
        self.count = min(len(self.rows), limit or len(self.rows))
        self.role, self.recipe, self.geometry, self.tokenizer = role, recipe, geometry, tokenizer
        self.empty_text = empty_text.float()
        self._others = self._pictures_of_identities() if recipe.reference_pairing == "other" else {}

    def __len__(self) -> int:
        return self.count

    def _pictures_of_identities(self) -> dict[str, list[tuple[int, int]]]:
        """By identity: the rows and subjects that show it. A row tells its identities from left to right, as its subjects."""
        found: dict[str, list[tuple[int, int]]] = {}
        identities = self.rows.table.column("identity").to_pylist()
        faces = [[s["face_index"] for s in subjects] for subjects in self.rows.table.column("subjects").to_pylist()]
        for row, (identity, subjects) in enumerate(zip(identities, faces, strict=True)):
            names = identity.split("+") if identity else []
            if len(names) == len(subjects):
                for place, (name, face) in enumerate(zip(names, subjects, strict=True)):
                    if face >= 0 or self.recipe.reference_source == "segment":
                        found.setdefault(name, []).append((row, place))
        return found

    # --- one example --------------------------------------------------------------------------------------------------

    def example(self, index: int, generator: torch.Generator, plain: bool = False, timestep: int | None = None) -> dict:
        """Return one row as a dict of tensors; with `plain` nothing is dropped, mirrored, masked or augmented."""
        row = self.rows.row(index)
        recipe = self.recipe
        flipped = bool(torch.rand((), generator=generator) < 0.5) and not plain
        latents, text = self._latents(index, flipped, generator), self._text(index)
        noise = torch.randn(latents.shape, generator=generator)
        drawn = int(torch.randint(TIMESTEPS, (), generator=generator))
        usable = self._usable(row) if self.role == "sdm" else []
        told = choose_told(len(usable), recipe.caption_drop, recipe.subject_keep, generator)
        if plain:
            told = Told(True, tuple(range(len(usable))))
        made = {
            "latents": latents,
            "noise": noise,
            "timesteps": torch.tensor(drawn if timestep is None else timestep),
            "text": text if told.caption else self.empty_text,
        }
        masked = bool(torch.rand((), generator=generator) < recipe.masked_loss) and not plain
        if recipe.face_weight:
            made["emphasis"] = self._emphasis(row, flipped)
        if self.role == "sdm":
            made |= self._subjects(
                row, [usable[place] for place in told.subjects], usable, flipped, masked, generator, plain
            )
        return made

    def _latents(self, index: int, flipped: bool, generator: torch.Generator) -> torch.Tensor:
        channels, height, width = self.geometry.latents
        moments = torch.from_numpy(self.cached.values(index, "moments").astype(np.float32))
        mean, log_variance = moments.view(2, 2, channels, height, width)[int(flipped)]
        deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
        return (mean + deviation * torch.randn(mean.shape, generator=generator)) * self.geometry.latent_scale

    def _text(self, index: int) -> torch.Tensor:
        text = torch.from_numpy(self.cached.values(index, "text").astype(np.float32))
        return text.view(self.empty_text.shape)

    def _usable(self, row: dict) -> list[dict]:
        """The subjects that can carry a reference: one for each phrase, and a face where a face is asked for."""
        by_phrase = {subject["end"]: subject for subject in reversed(row["subjects"])}
        chosen = [by_phrase[end] for end in sorted(by_phrase)]
        if self.recipe.reference_source == "face":
            chosen = [subject for subject in chosen if subject["face_index"] >= 0]
        return chosen[: min(self.recipe.max_subjects, self.geometry.max_subjects)]

    def _emphasis(self, row: dict, flipped: bool) -> torch.Tensor:
        _, height, width = self.geometry.latents
        size = (row["width"], row["height"]) if self.role == "tdm" else decode_image(row["image"]["bytes"]).size
        weights = torch.zeros(height, width)
        for face in row["faces"]:
            x1, y1, x2, y2 = (
                value / self.recipe.resolution for value in Frame(*size, self.recipe.resolution).scaled(face["box"])
            )
            grow_x, grow_y = (x2 - x1) * FACE_GROWTH, (y2 - y1) * FACE_GROWTH
            across = _covered(x1 - grow_x, x2 + grow_x, width)
            down = _covered(y1 - grow_y, y2 + grow_y, height)
            weights = torch.maximum(weights, down[:, None] * across[None, :])
        weights = 1 + self.recipe.face_weight * weights[None]
        return weights.flip(-1) if flipped else weights

    def _subjects(self, row, kept, usable, flipped, masked, generator, plain) -> dict:
        picture, segmentation = decode_image(row["image"]["bytes"]), decode_segmentation(row["segmentation"])
        frame = Frame(*picture.size, self.recipe.resolution)
        masks = [frame.mask(segmentation == subject["segment_id"]) for subject in usable]
        masks = [mask.flip(-1) if flipped else mask for mask in masks]
        _, height, width = self.geometry.latents
        union = torch.ones(1, height, width)
        if masked and masks:
            joined = torch.stack(masks).amax(dim=0)[None, None]
            union = F.interpolate(joined, size=(height, width), mode="bilinear", antialias=True)[0]
        tokens = tokenize_with_markers(
            self.tokenizer, [mark_caption(row["caption"], [subject["end"] for subject in kept])], lost="drop"
        )
        # A subject behind the end of the text encoder's input has no token, so it takes no reference either.
        kept = kept[: int(tokens.subject_counts[0])]
        references = [self._reference(row, picture, segmentation, subject, generator, plain) for subject in kept]
        return {
            "mask": union,
            "references": references,
            "subject_mask": tokens.subject_mask[0],
            "subject_tokens": tokens.subject_mask[0].nonzero()[:, 0].tolist(),
            "subject_masks": [masks[usable.index(subject)] for subject in kept],
        }

    def _reference(self, row, picture, segmentation, subject, generator, plain) -> torch.Tensor:
        pairing = torch.rand((), generator=generator)
        if self._others and not plain:
            row, picture, segmentation, subject = self._other(row, picture, segmentation, subject, float(pairing))
        if self.recipe.reference_source == "face":
            pixels = face_reference(picture, row["faces"][subject["face_index"]]["crop_box"])
        else:
            pixels = segment_reference(picture, segmentation, subject["segment_id"], subject["box"], generator)
        how = self.recipe.augmentation.model_copy(update=_NOTHING) if plain else self.recipe.augmentation
        pixels = augment(pixels, self.recipe.reference_resolution, how, generator)
        return clip_normalised(pixels, self.geometry.encoder_size)

    def _other(self, row, picture, segmentation, subject, draw: float):
        """Another picture of the same person, where there is one."""
        names = (row["identity"] or "").split("+")
        if len(names) != len(row["subjects"]):
            return row, picture, segmentation, subject
        place = row["subjects"].index(subject)
        choices = [choice for choice in self._others.get(names[place], []) if self._id(choice[0]) != row["image_id"]]
        if not choices:
            return row, picture, segmentation, subject
        number, place = choices[min(int(draw * len(choices)), len(choices) - 1)]
        other = self.rows.row(number)
        return (
            other, decode_image(other["image"]["bytes"]), decode_segmentation(other["segmentation"]),
            other["subjects"][place],
        )  # fmt: skip

    def _id(self, index: int) -> str:
        return self.rows.table.column("image_id")[index].as_py()


_NOTHING = dict(zoom=0.0, rotate=0.0, jitter=0.0, blur=0.0, grey=0.0, flip=0.0, elastic=0.0)


def _covered(low: float, high: float, cells: int) -> torch.Tensor:
    """How much of each of `cells` equal cells of [0, 1] lies between `low` and `high`."""
    edges = torch.arange(cells + 1) / cells
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * cells).clamp(0, 1)


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(examples: list[dict], encoder_size: int | None) -> Batch:
    """Return examples as a batch. One without any reference holds a black one that nothing refers to.

    Every trained part thus takes part in every step, as distributed training asks.
    """
    stacked = {
        name: torch.stack([example[name] for example in examples])
        for name in ("latents", "noise", "timesteps", "text", "mask", "emphasis", "subject_mask")
        if name in examples[0]
    }
    if "references" not in examples[0]:
        return Batch(**stacked)
    most = max(1, *(len(example["references"]) for example in examples))
    places = [(i, k) for i, example in enumerate(examples) for k in range(len(example["references"]))]
    references = [pixels for example in examples for pixels in example["references"]]
    tokens = torch.zeros(len(examples), most, dtype=torch.int64)
    present = torch.zeros(len(examples), most, dtype=torch.bool)
    side = next((mask.shape[-1] for example in examples for mask in example["subject_masks"]), 1)
    masks = torch.zeros(len(examples), most, side, side)
    for i, example in enumerate(examples):
        for k, (token, mask) in enumerate(zip(example["subject_tokens"], example["subject_masks"], strict=True)):
            tokens[i, k], present[i, k], masks[i, k] = token, True, mask
    if not references:
        references = [torch.zeros(3, encoder_size, encoder_size)]
        places = [(0, 0)]
    return Batch(
        **stacked,
        references=torch.stack(references),
        reference_of=torch.tensor(places),
        subject_tokens=tokens,
        subject_masks=masks,
        subjects_present=present,
    )


def generator_of(*words: object) -> torch.Generator:
    """Return a generator seeded by a hash of words: the same words, the same numbers, on any worker."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
