"""Reading one untrusted picture: what cannot be used is rejected with its reason, what can becomes upright RGB."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from facediffuser.pictures import Rejection, load_pixels, orientation, read_header, turned, without_exif

# MPO, some cameras' JPEG with further pictures behind it, is opened as JPEG; its first picture counts.
LOSSY = ("JPEG", "MPO", "WEBP")
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `image` upright 8-bit RGB; `data` its file, as it was or encoded again; `path` its name."""

    image: Image.Image
    data: bytes
    path: str
    sha256: str


def read_picture(
    data: bytes,
    path: str,
    min_side: int = 1,
    max_megapixels: float = 100.0,
    size: int | None = None,
    encode: str = "same",
    pixel_md5: str | None = None,
) -> Picture:
    """Return the picture of a file's bytes.

    A file that is already upright 8-bit RGB or grey of the right size is kept byte for byte. Others are encoded
    again: turned by EXIF, CMYK, 16 bits, palette, transparent (laid on white), or shorter side above `size`.

    Args:
        data: the file.
        path: its name, for the reason of a rejection.
        min_side: the least shorter side, in pixels.
        max_megapixels: the most pixels, in millions.
        size: what a longer shorter side is reduced to, in pixels; None keeps every size.
        encode: `same` keeps the file's format where it can, `png` or `jpeg` names the one of pictures encoded again.
        pixel_md5: FFHQ's checksum of the decoded pixels, to be compared; None compares nothing.

    Raises:
        Rejection: it is not a usable picture.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    opened = read_header(data, max_megapixels)
    kind, mode = opened.format, opened.mode
    # Pillow shows colour of 16 bits as 8-bit RGB: only how the file packs its pixels tells them apart.
    deep = any(";16" in str(tile[3]) for tile in getattr(opened, "tile", ()))
    # Pillow turns a TIFF when it decodes the pixels; the file itself stays as it lies.
    upright = kind != "TIFF" or orientation(opened) == 1
    load_pixels(opened)
    if pixel_md5 is not None and _pixel_md5(opened) != pixel_md5:
        raise Rejection("does not match its metadata", "the pixels' MD5 is not the one in ffhq-dataset-v2.json")
    # A damaged EXIF block makes readers of the prepared data raise: such a file is encoded again, without it.
    upright = upright and orientation(opened) == 1
    image = _to_rgb(turned(opened))
    if min(image.size) < min_side:
        raise Rejection("too small", f"{image.width} x {image.height} px, the shorter side must have {min_side}")
    reduced = False
    if size is not None and min(image.size) > size:
        reduced = True
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    wanted = encode if encode != "same" else "jpeg" if kind in LOSSY else "png"
    plain = mode in ("RGB", "L") and not deep and "transparency" not in opened.info
    if plain and upright and not reduced and (encode == "same" or wanted == str(kind).lower()):
        return Picture(image, data, path, sha256)
    stem = path.rsplit(".", 1)[0] if "." in path.rsplit("/", 1)[-1] else path
    return Picture(image, encode_image(image, wanted), f"{stem}.{'jpg' if wanted == 'jpeg' else 'png'}", sha256)


def _pixel_md5(image: Image.Image) -> str:
    return hashlib.md5(np.asarray(image).tobytes(), usedforsecurity=False).hexdigest()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Rejection("unknown pixels", "floating point values without a range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return without_exif(image.convert("RGB"))


def encode_image(image: Image.Image, encoding: str) -> bytes:
    """Return the picture as the bytes of a file: `png`, or `jpeg` of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if encoding == "jpeg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
