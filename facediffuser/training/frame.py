"""How a photograph becomes a training image: its shorter side to the resolution, then the square in the middle."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Frame:
    """The square cut from a photograph of `width` x `height` px and its side after resizing, px."""

    width: int
    height: int
    side: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The square (x1, y1, x2, y2) in pixels of the photograph."""
        shorter = min(self.width, self.height)
        left, top = (self.width - shorter) / 2, (self.height - shorter) / 2
        return left, top, left + shorter, top + shorter

    def image(self, picture: Image.Image) -> torch.Tensor:
        """Return the training image, (3, side, side) float32 in [-1, 1]."""
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC, box=self.box)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1

    def mask(self, mask: np.ndarray) -> torch.Tensor:
        """Return a boolean mask of the photograph, cut the same way, (side, side) float32 in [0, 1]."""
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.BILINEAR, box=self.box)
        return torch.from_numpy(np.array(picture)).float() / 255

    def scaled(self, box) -> tuple[float, float, float, float]:
        """Return a box of the photograph in pixels of the training image."""
        left, top, right, _ = self.box
        scale = self.side / (right - left)
        return tuple((value - start) * scale for value, start in zip(box, (left, top, left, top), strict=True))
