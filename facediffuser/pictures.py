"""Pictures of any kind made 8-bit RGB, upright."""

import numpy as np
from PIL import Image, ImageOps

from facediffuser.errors import InputError

# CLIP's own normalisation of RGB values in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    top = values.max()
    if values.min() < 0 or top > 65535 or not np.isfinite(values).all():
        raise InputError(f"reference of mode {image.mode} with values beyond 16 bits; give an 8- or 16-bit picture")
    # Files of mode I;16 hold 16 bits by definition; the modes I and F are read by what they hold.
    scale = 1 / 257 if image.mode.startswith("I;16") or top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8)).convert("RGB")
