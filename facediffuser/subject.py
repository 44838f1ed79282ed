"""How a subject enters a prompt: reference pictures as CLIP reads them, and the fuser that joins them to marked words."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.pictures import CLIP_MEAN, CLIP_STD, to_rgb

# A picture whose short side is more than this many times the tower's is shrunk by a whole factor first, to save memory.
HUGE = 16


# --- reference pictures -----------------------------------------------------------------------------------------------


def preprocess_references(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Return reference pictures as the CLIP vision tower takes them.

    Each is turned upright (EXIF), made RGB (`to_rgb`), scaled to 0..1, resized to a square (bilinear, antialiased; a
    picture that is not square is stretched, see `pad_to_square`), and normalised by CLIP's mean and deviation.

    Args:
        images: k pictures of any sizes.
        size: the tower's side, px.

    Returns:
        (k, 3, size, size), float32.

    Raises:
        InputError: something is no picture.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = [_resized(to_rgb(image), size) for image in images]
    return (torch.cat(pixels) - mean) / std if pixels else torch.zeros(0, 3, size, size)


def encode_references(image_encoder, images: Sequence[Image.Image]) -> torch.Tensor:
    """Return one embedding per reference picture.

    Args:
        image_encoder: a transformers.CLIPVisionModelWithProjection.
        images: k pictures of any sizes.

    Returns:
        (k, d).
    """
    pixels = preprocess_references(images, image_encoder.config.image_size)
    return image_encoder(pixels.to(image_encoder.device, image_encoder.dtype)).image_embeds


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

        Args:
            text_embeds: (b, n, d).
            image_embeds: (b, s, d); rows with fewer subjects are padded with any values.
            subject_mask: (b, n) bool; a row's k-th true token takes its k-th image embedding.
            subject_counts: (b,), how many image embeddings of a row are real; tokens beyond keep their text embedding.

        Raises:
            InputError: s is larger than the configuration's `max_subjects`.
        """
        slots = image_embeds.shape[1]
        if slots > self.config.max_subjects:
            raise InputError(
                f"{counted(slots, 'subject')} in one prompt; this model takes up to {self.config.max_subjects}"
            )
        order = subject_mask.long().cumsum(dim=1) - 1
        filled = subject_mask & (order < slots)
        if subject_counts is not None:
            filled = filled & (order < subject_counts.to(order.device)[:, None])
        rows, tokens = filled.nonzero(as_tuple=True)
        text = text_embeds[rows, tokens]
        fused = self.mlp1(torch.cat([text, image_embeds[rows, order[rows, tokens]].to(text.dtype)], dim=-1)) + text
        fused = self.layer_norm(fused + self.mlp2(fused))
        return text_embeds.index_put((rows, tokens), fused.to(text_embeds.dtype))
