"""Reference pictures in training: cut from a photograph, and changed so that the picture cannot simply be copied."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from facediffuser.preprocess.faces import crop_square
from facediffuser.subject import CLIP_MEAN, CLIP_STD
from facediffuser.training.recipe import Augmentation

BILINEAR = InterpolationMode.BILINEAR
BLUR_SIZE, BLUR_DEVIATION = 5, (0.1, 2.0)
ELASTIC_SHIFT, ELASTIC_SMOOTHNESS = 50.0, 5.0


def segment_reference(
    picture: Image.Image, segmentation: np.ndarray, segment: int, box: list[int], generator: torch.Generator
) -> torch.Tensor:
    """Return the subject in its box, (3, h, w) float32 in [0, 1], with noise instead of all that is not it."""
    x1, y1, x2, y2 = _inside(box, picture.size)
    pixels = _pixels(picture.crop((x1, y1, x2, y2)))
    inside = torch.from_numpy(segmentation[y1:y2, x1:x2] == segment)
    noise = torch.rand(pixels.shape, generator=generator)
    return torch.where(inside, pixels, noise)


def face_reference(picture: Image.Image, crop_box: list[int]) -> torch.Tensor:
    """Return the square around a face, (3, s, s) float32 in [0, 1]."""
    return _pixels(crop_square(picture, crop_box))


def augment(pixels: torch.Tensor, size: int, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Return a reference picture changed at random and padded to a square, (3, size, size) float32 in [0, 1].

    Same generator state, same picture; nothing else is random.
    """

    def draw(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if draw() < how.zoom:
        pixels = _zoom(pixels, draw(1.0, how.zoom_to), draw(), draw())
    pixels = _square(pixels, size)
    if draw() < how.rotate:
        pixels = T.rotate(pixels, draw(-how.degrees, how.degrees), BILINEAR)
    if draw() < how.jitter:
        pixels = _jitter(pixels, how.jitter_strength, draw)
    if draw() < how.blur:
        pixels = T.gaussian_blur(pixels, [BLUR_SIZE, BLUR_SIZE], [draw(*BLUR_DEVIATION)] * 2)
    if draw() < how.grey:
        pixels = T.rgb_to_grayscale(pixels, num_output_channels=3)
    if draw() < how.flip:
        pixels = pixels.flip(-1)
    if draw() < how.elastic:
        pixels = T.elastic(pixels, _displacement(size, generator), BILINEAR)
    return pixels.clamp(0, 1)


def clip_normalised(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Return pictures in [0, 1], (..., 3, h, w), at the vision tower's size and normalised by CLIP's mean and deviation."""
    if pixels.shape[-2:] != (size, size):
        pixels = T.resize(pixels, [size, size], BILINEAR, antialias=True)
    return T.normalize(pixels, list(CLIP_MEAN), list(CLIP_STD))


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _inside(box: list[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    x1, y1 = min(max(box[0], 0), size[0] - 1), min(max(box[1], 0), size[1] - 1)
    return x1, y1, min(max(box[2], x1 + 1), size[0]), min(max(box[3], y1 + 1), size[1])


def _zoom(pixels: torch.Tensor, factor: float, across: float, down: float) -> torch.Tensor:
    """A random part of the picture, its sides shorter by `factor`."""
    height, width = (max(1, round(side / factor)) for side in pixels.shape[-2:])
    top, left = round((pixels.shape[-2] - height) * down), round((pixels.shape[-1] - width) * across)
    return pixels[..., top : top + height, left : left + width]


def _square(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The picture with its longer side at `size`, centred on black."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = T.resize(pixels, [height, width], BILINEAR, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return T.pad(resized, [left, top, size - width - left, size - height - top])


def _jitter(pixels: torch.Tensor, strength: float, draw) -> torch.Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    pixels = T.adjust_brightness(pixels, draw(low, high))
    pixels = T.adjust_contrast(pixels, draw(low, high))
    pixels = T.adjust_saturation(pixels, draw(low, high))
    return T.adjust_hue(pixels, draw(-strength / 5, strength / 5))


def _displacement(size: int, generator: torch.Generator) -> torch.Tensor:
    """A smooth random field, (1, size, size, 2), in units of half the picture."""
    field = torch.rand(2, 1, size, size, generator=generator) * 2 - 1
    kernel = 2 * math.ceil(4 * ELASTIC_SMOOTHNESS) + 1
    kernel = min(kernel, size - 1 + size % 2)  # odd, and the blur's reflection needs it no larger than the picture
    smooth = T.gaussian_blur(field, [kernel, kernel], [ELASTIC_SMOOTHNESS] * 2)
    return smooth.squeeze(1).permute(1, 2, 0).unsqueeze(0) * ELASTIC_SHIFT / size
