"""How a finished canvas becomes a photo, a sketch or a painting."""

import numpy as np
from scipy.ndimage import gaussian_filter

from facediffuser.miniature.canvas import Canvas


def finish(canvas: Canvas, style: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture in a style of `looks.STYLES`: (size, size, 3) uint8, and its person ids (size, size) int32."""
    image, ids = np.clip(canvas.image, 0, 255), canvas.ids
    if style == "sketch":
        image = _sketch(canvas, image)
    elif style == "painting":
        image, ids = _painting(canvas, image)
    else:
        blur = canvas.size / 64 * 0.25
        image = gaussian_filter(image, (blur, blur, 0))
        image += 1.5 * canvas.rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).round().astype(np.uint8), ids


def _sketch(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """Pencil: a colour dodge of the picture with its blurred negative, over a faint grey tone."""
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    blurred = gaussian_filter(255 - grey, canvas.size / 64 * 2.4)
    dodge = np.clip(grey * 255 / (256 - blurred), 0, 255)
    pencil = 0.62 * dodge + 0.38 * grey + 3 * canvas.noise(0.5)
    return pencil[..., None] * np.array([1.0, 0.985, 0.95], np.float32)


def _painting(canvas: Canvas, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oil: strokes displace pixels (and ids with them), colours are fewer and richer."""
    reach, size = canvas.size / 64 * 0.6, canvas.size
    rows = np.arange(size)[:, None] + canvas.noise(1.3) * reach
    columns = np.arange(size)[None] + canvas.noise(1.3) * reach
    rows, columns = (np.clip(np.round(part), 0, size - 1).astype(int) for part in (rows, columns))
    image = image[rows, columns]
    image = np.round(image / 24) * 24
    grey = image.mean(-1, keepdims=True)
    image = np.clip(grey + (image - grey) * 1.4, 0, 255)
    blur = canvas.size / 64 * 0.3
    return gaussian_filter(image, (blur, blur, 0)), canvas.ids[rows, columns]
