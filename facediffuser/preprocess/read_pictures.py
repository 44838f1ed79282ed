"""Reading one picture with suspicion: what cannot be used is told with its reason, what can becomes upright RGB."""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# MPO, some cameras' JPEG with further pictures behind it, is opened as JPEG; its first picture counts.
LOSSY = ("JPEG", "MPO", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ORIENTATION_TAG = 0x0112
JPEG_QUALITY = 95


class Rejection(Exception):
    """Why a picture cannot be prepared: a kind that is counted, and the detail of this picture."""

    def __init__(self, kind: str, detail: str = ""):
        self.kind, self.detail = kind, " ".join(detail.split())[:300]
        super().__init__(self.reason)

    @property
    def reason(self) -> str:
        """The kind and the detail in one line."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


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
    """Return the picture of a file's bytes; Rejection when it is not a usable picture.

    A file that is already upright 8-bit RGB or grey of the right size is kept byte for byte. Others are encoded
    again: turned by EXIF, CMYK, 16 bits, palette, transparent (laid on white), or shorter side above `size`.
    `pixel_md5`: FFHQ's checksum of the decoded pixels.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if not data:
        raise Rejection("empty file", "0 bytes")
    opened = _open(data, max_megapixels)
    kind, mode = opened.format, opened.mode
    # Pillow shows colour of 16 bits as 8-bit RGB: only how the file packs its pixels tells them apart.
    deep = any(";16" in str(tile[3]) for tile in opened.tile)
    _decode(opened)
    if pixel_md5 is not None and _pixel_md5(opened) != pixel_md5:
        raise Rejection("does not match its metadata", "the pixels' MD5 is not the one in ffhq-dataset-v2.json")
    turned = opened.getexif().get(ORIENTATION_TAG, 1) not in (0, 1)
    image = _to_rgb(ImageOps.exif_transpose(opened) if turned else opened)
    if min(image.size) < min_side:
        raise Rejection("too small", f"{image.width} x {image.height} px, the shorter side must have {min_side}")
    reduced = size is not None and min(image.size) > size
    if reduced:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    wanted = encode if encode != "same" else "jpeg" if kind in LOSSY else "png"
    plain = mode in ("RGB", "L") and not deep and "transparency" not in opened.info
    if plain and not turned and not reduced and (encode == "same" or wanted == str(kind).lower()):
        return Picture(image, data, path, sha256)
    stem = path.rsplit(".", 1)[0] if "." in path.rsplit("/", 1)[-1] else path
    return Picture(image, encode_image(image, wanted), f"{stem}.{'jpg' if wanted == 'jpeg' else 'png'}", sha256)


def _pixel_md5(image: Image.Image) -> str:
    return hashlib.md5(np.asarray(image).tobytes(), usedforsecurity=False).hexdigest()


def _open(data: bytes, max_megapixels: float) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow's own warning about large pictures: the limit here is ours and refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise Rejection("too large", str(error)) from error
        except Image.UnidentifiedImageError as error:
            raise Rejection("not a picture", f"none of {', '.join(FORMATS)}") from error
        except Exception as error:
            # Damaged headers make Pillow's readers raise nearly anything; all of it is a fact about this file.
            raise Rejection("damaged picture", f"{type(error).__name__}: {error}") from error
    width, height = opened.size
    if width * height > max_megapixels * 1e6:
        raise Rejection("too large", f"{width} x {height} px, at most {max_megapixels:g} megapixels are decoded")
    return opened


def _decode(opened: Image.Image) -> None:
    try:
        frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        if frames > 1:
            raise Rejection("moving picture", f"{frames} frames; give a single one")
        opened.load()
    except Rejection:
        raise
    except Exception as error:
        raise Rejection("damaged picture", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Rejection("unknown pixels", "floating point values without a range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def encode_image(image: Image.Image, encoding: str) -> bytes:
    """Return the picture as the bytes of a file: `png`, or `jpeg` of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if encoding == "jpeg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
