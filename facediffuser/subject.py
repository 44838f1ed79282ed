"""How a subject enters a prompt: markers in the text, reference pictures, and the fuser that joins the two.

A prompt names its subjects in words and marks each word: `a man <|image|> and a woman <|image|> in a park`. The marker
is no token of its own; it says that the token before it carries the reference picture's embedding.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageOps
from torch import nn

from facediffuser.errors import InputError

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<|image|>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_TOKENS = 77
# A picture whose short side is more than this many times the tower's is shrunk by a whole factor first, to save memory.
HUGE = 16


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as ids, with the places of their subjects.

    `input_ids` (b, n) int64 without markers; `subject_mask` (b, n) bool, true at the last token of a subject's words;
    `subject_counts` (b,) int64, true cells per row; `texts_without_markers` the prompts a scorer may read.
    """

    input_ids: torch.Tensor
    subject_mask: torch.Tensor
    subject_counts: torch.Tensor
    texts_without_markers: list[str]


def tokenize_with_markers(
    tokenizer, prompts: Sequence[str], lost: Literal["error", "drop"] = "error"
) -> TokenizedPrompts:
    """Return the prompts' ids, padded or cut to the tokenizer's length, and the places of their subjects.

    The ids are those of the tokenizer with the marker added as a special token, the marker's own ids left out; the
    tokenizer itself is not changed. A prompt that is too long is cut as the tokenizer cuts it, the end token kept, with
    a warning (the released code loses the end token there, in the fused embedding alone). Raises InputError for a
    marker at a prompt's start, two markers at one word, and a marker that is cut off; with `lost="drop"` a subject that
    is cut off is left out instead, and `subject_counts` says how many remain.
    """
    length = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else CLIP_TOKENS
    rows, masks = [], []
    for prompt in prompts:
        ids, places = _ids_and_places(tokenizer, prompt)
        ids, places = _cut(tokenizer, prompt, ids, places, length, lost)
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
        mask = torch.zeros(length, dtype=torch.bool)
        mask[places] = True
        masks.append(mask)
    subject_masks = torch.stack(masks)
    return TokenizedPrompts(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        subject_mask=subject_masks,
        subject_counts=subject_masks.sum(dim=1),
        texts_without_markers=[without_markers(prompt) for prompt in prompts],
    )


def without_markers(prompt: str) -> str:
    """Return the prompt as a reader would write it, without markers: `a man <|image|>, smiling` is `a man, smiling`."""
    marker = re.escape(IMAGE_MARKER)
    spaced = re.sub(rf"\s*{marker}(?=\w)", " ", prompt)
    return re.sub(rf"\s*{marker}", "", spaced).strip()


def count_markers(prompt: str) -> int:
    """Return how many subjects the prompt marks."""
    return prompt.count(IMAGE_MARKER)


def _ids_and_places(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    # A special token splits the text before anything else happens to it, so the pieces between give the same ids.
    pieces = prompt.split(IMAGE_MARKER)
    ids, places = [tokenizer.bos_token_id], []
    for number, piece in enumerate(pieces):
        ids += tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False).input_ids if piece else []
        if number == len(pieces) - 1:
            break
        if len(ids) == 1:
            raise InputError(f"{prompt!r}: {IMAGE_MARKER} at the start; put it after the word that names the subject")
        if places and places[-1] == len(ids) - 1:
            raise InputError(f"{prompt!r}: two {IMAGE_MARKER} after one word; give each subject a word of its own")
        places.append(len(ids) - 1)
    return [*ids, tokenizer.eos_token_id], places


def _cut(tokenizer, prompt: str, ids: list[int], places: list[int], length: int, lost: str):
    if len(ids) <= length:
        return ids, places
    kept = [place for place in places if place < length - 1]
    if len(kept) < len(places) and lost == "error":
        raise InputError(
            f"{prompt!r}: subject {len(kept) + 1} stands behind token {length - 2}, where the text encoder's input "
            "ends; shorten the prompt or name the subject earlier"
        )
    logger.warning("prompt of %d tokens is cut to %d: %r", len(ids), length, prompt)
    return [*ids[: length - 1], tokenizer.eos_token_id], kept


# --- reference pictures -----------------------------------------------------------------------------------------------


def preprocess_references(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Return pictures as the CLIP vision tower reads them, (k, 3, size, size) float32.

    Each is turned upright (EXIF), made RGB (`to_rgb`), scaled to [0, 1], resized to a square (bilinear, antialiased; a
    picture that is not square is stretched, see `pad_to_square`), and normalised by CLIP's mean and deviation. Raises
    InputError for what is no picture.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = [_resized(to_rgb(image), size) for image in images]
    return (torch.cat(pixels) - mean) / std if pixels else torch.zeros(0, 3, size, size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture upright in 8-bit RGB: alpha over white, 16-bit grey scaled down, any other mode converted."""
    if not isinstance(image, Image.Image):
        raise InputError(f"reference of type {type(image).__name__}; give a PIL.Image")
    if min(image.size) == 0:
        raise InputError(f"reference of {image.width} x {image.height} pixels is empty; give a picture")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pad_to_square(image: Image.Image, fill: str = "black") -> Image.Image:
    """Return the picture upright in RGB, centred in the smallest square that holds it (as training pads its crops)."""
    image = to_rgb(image)
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def encode_references(image_encoder, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return one embedding per picture, (k, d), from a transformers.CLIPVisionModelWithProjection."""
    pixels = preprocess_references(images, image_encoder.config.image_size)
    return image_encoder(pixels.to(image_encoder.device, image_encoder.dtype)).image_embeds


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    top = values.max()
    if values.min() < 0 or top > 65535 or not np.isfinite(values).all():
        raise InputError(f"reference of mode {image.mode} with values beyond 16 bits; give an 8- or 16-bit picture")
    # Files of mode I;16 hold 16 bits by definition; the modes I and F are read by what they hold.
    scale = 1 / 257 if image.mode.startswith("I;16") or top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8)).convert("RGB")


def _resized(image: Image.Image, size: int) -> torch.Tensor:
    factor = min(image.size) // (HUGE * size)
    if factor > 1:
        image = image.reduce(factor)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float() / 255
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


# --- the fuser --------------------------------------------------------------------------------------------------------


class _Mlp(nn.Module):
    """LayerNorm, Linear, GELU, Linear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, outputs)
        self.fc2 = nn.Linear(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(x))))


class SubjectFuser(ModelMixin, ConfigMixin):
    """Writes reference pictures into a prompt's embedding, at the subjects' tokens and nowhere else.

    At such a token, with text embedding t and image embedding o: x = MLP1([t; o]) + t, x = x + MLP2(x), LayerNorm(x).
    Parameter names are those of the released checkpoints (`postfuse_module`).
    """

    @register_to_config
    def __init__(self, embed_dim: int = 768, max_subjects: int = 4):
        super().__init__()
        self.mlp1 = _Mlp(2 * embed_dim, embed_dim)
        self.mlp2 = _Mlp(embed_dim, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        text_embeds: torch.Tensor,
        image_embeds: torch.Tensor,
        subject_mask: torch.Tensor,
        subject_counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the fused embedding, (b, n, d), a new tensor of the text embedding's type.

        `text_embeds` (b, n, d); `image_embeds` (b, s, d), rows padded with anything; `subject_mask` (b, n) bool: the
        k-th true token of a row takes the row's k-th image embedding; `subject_counts` (b,): how many image embeddings
        of a row are real (tokens beyond keep their text). Raises InputError when s is more than `max_subjects`.
        """
        slots = image_embeds.shape[1]
        if slots > self.config.max_subjects:
            raise InputError(f"{slots} subjects in one prompt; this model takes up to {self.config.max_subjects}")
        order = subject_mask.long().cumsum(dim=1) - 1
        filled = subject_mask & (order < slots)
        if subject_counts is not None:
            filled = filled & (order < subject_counts.to(order.device)[:, None])
        rows, tokens = filled.nonzero(as_tuple=True)
        text = text_embeds[rows, tokens]
        fused = self.mlp1(torch.cat([text, image_embeds[rows, order[rows, tokens]].to(text.dtype)], dim=-1)) + text
        fused = self.layer_norm(fused + self.mlp2(fused))
        return text_embeds.index_put((rows, tokens), fused.to(text_embeds.dtype))
