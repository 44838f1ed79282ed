"""A square picture painted with soft-edged shapes: coordinates, distance fields, and the canvas itself.

All shapes are signed distances (negative inside). Coordinates run from -1 to 1 to the right and downwards.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

Array = np.ndarray
Colour = Array | tuple[float, float, float]


@lru_cache(maxsize=8)
def pixel_grid(size: int) -> tuple[Array, Array]:
    """The x and y coordinates of the pixel centres: two (size, size) float32 arrays, not to be written to."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def inside(distance: Array, softness: float) -> Array:
    """How much of each pixel lies inside a shape, 0 to 1, blending over twice `softness` around its edge."""
    return np.clip(0.5 - distance / (2 * softness), 0, 1)


def glow(x: Array, y: Array, cx: float, cy: float, sx: float, sy: float) -> Array:
    """A Gaussian spot of height 1 at (cx, cy)."""
    return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)


def ellipse(x: Array, y: Array, cx: float, cy: float, a: float, b: float) -> Array:
    """Distance (exact on the edge) to an axis-parallel ellipse with half axes a, b."""
    return (np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2) - 1) * min(a, b)


def box(x: Array, y: Array, cx: float, cy: float, a: float, b: float) -> Array:
    """Distance to an axis-parallel rectangle with half sides a, b."""
    return np.maximum(np.abs(x - cx) - a, np.abs(y - cy) - b)


def blend(first: Colour, second: Colour, t: Array) -> Array:
    """Colours (h, w, 3) running from `first` where t = 0 to `second` where t = 1."""
    t = np.clip(t, 0, 1)[..., None]
    return np.asarray(first, np.float32) * (1 - t) + np.asarray(second, np.float32) * t


@dataclass
class Canvas:
    """A picture being painted: `image` (size, size, 3) in 0..255, and `ids` (size, size), the person at each pixel."""

    size: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.x, self.y = pixel_grid(self.size)
        self.image = np.zeros((self.size, self.size, 3), np.float32)
        self.ids = np.zeros((self.size, self.size), np.int32)
        self.softness = 0.6 * 2 / self.size

    def paint(self, mask: Array, colour: Colour) -> None:
        """Lay a colour over the picture.

        Args:
            mask: the opacity of each pixel, (size, size), 0 to 1.
            colour: red, green, blue in 0..255: one, or one per pixel, (size, size, 3).
        """
        self.image += mask[..., None] * (np.asarray(colour, np.float32) - self.image)

    def noise(self, sigma: float) -> Array:
        """Smooth random texture (size, size) of mean about 0 and deviation 1; sigma in 1/64 of the picture."""
        field = self.rng.standard_normal((self.size, self.size), dtype=np.float32)
        field = gaussian_filter(field, sigma * self.size / 64, mode="reflect")
        return field / (field.std() + 1e-6)
