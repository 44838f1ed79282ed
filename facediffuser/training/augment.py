"""Reference pictures for training: cut out of an image and augmented, so that the SDM learns the person."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from facediffuser.faces import crop_turned
from facediffuser.training.recipe import Augmentation

BLUR_PX, BLUR_SIGMA = 5, (0.1, 2.0)


def segment_reference(image: Image.Image, ids: np.ndarray, segment_id: int, box: list[int]) -> torch.Tensor:
    """Return a segment's box with everything outside the segment replaced by uniform noise, (3, h, w) in [0, 1].

    Args:
        image: the training image, RGB.
        ids: segment id of each pixel, (H, W).
        segment_id: the subject's segment.
        box: x1, y1, x2, y2 in px; h = y2 - y1, w = x2 - x1.
    """
    x1, y1, x2, y2 = box
    pixels = TF.to_dtype(TF.to_image(image.crop((x1, y1, x2, y2))), torch.float32, scale=True)
    inside = torch.from_numpy(np.ascontiguousarray(ids[y1:y2, x1:x2] == segment_id))[None]
    return torch.where(inside, pixels, torch.rand(pixels.shape))


def face_reference(image: Image.Image, crop_box: list[int], crop_turn: float = 0.0) -> torch.Tensor:
    """Return the square around a face, turned upright, (3, h, h) in [0, 1].

    Args:
        image: the training image, RGB.
        crop_box: x1, y1, x2, y2 of the square in px.
        crop_turn: rotation that makes the face upright, degrees.
    """
    return TF.to_dtype(TF.to_image(crop_turned(image, crop_box, crop_turn)), torch.float32, scale=True)


def augmenter(augmentation: Augmentation, size: int) -> v2.Transform:
    """Return the transform from a reference (3, h, w) in [0, 1] to its augmented square (3, size, size).

    Random numbers come from torch's global generator.

    Args:
        augmentation: probability and strength of each change.
        size: side of the result, px.
    """
    strength = augmentation.jitter_strength
    return v2.Compose(
        [
            v2.RandomApply([_RandomZoom(augmentation.zoom_to)], augmentation.zoom),
            _PadToSquare(),
            v2.Resize((size, size), antialias=True),
            v2.RandomApply([v2.RandomRotation(augmentation.degrees)], augmentation.rotate),
            v2.RandomApply([v2.ColorJitter(strength, strength, strength, strength / 5)], augmentation.jitter),
            v2.RandomApply([v2.GaussianBlur(BLUR_PX, BLUR_SIGMA)], augmentation.blur),
            v2.RandomGrayscale(augmentation.grey),
            v2.RandomHorizontalFlip(augmentation.flip),
            v2.RandomApply([v2.ElasticTransform()], augmentation.elastic),
        ]
    )


class _PadToSquare(v2.Transform):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[-2:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        return TF.pad(picture, [left, top, side - width - left, side - height - top])


class _RandomZoom(v2.Transform):
    """Cuts out a random window, by a factor of 1 to `most` smaller than the picture."""

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[-2:]
        zoom = 1 + (self.most - 1) * float(torch.rand(()))
        rows, columns = max(1, int(height / zoom)), max(1, int(width / zoom))
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - columns + 1, ()))
        return picture[..., top : top + rows, left : left + columns]
