"""The one place where picture files are opened: what is accepted, and pictures of any kind made 8-bit RGB, upright."""

import ctypes
import hashlib
import io
import logging
import posixpath
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from facediffuser.errors import InputError, first_few
from facediffuser.number_words import counted
from facediffuser.storage import Store

# What Pillow may take a file for, whatever its name says. Its other readers are not for untrusted files: the one
# for EPS starts Ghostscript, which runs the file as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# The names that are read as pictures, by every command; anything else is counted and named.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# A picture's file is read whole: one of more bytes is no picture, but a way to fill the memory.
MOST_FILE_BYTES = 1 << 30
# Of several files read at once, together; decoded they may take ten times as much.
MOST_BATCH_BYTES = 1 << 28
MOST_MEGAPIXELS = 100.0
ORIENTATION_TAG = 0x0112
# CLIP's own normalisation of RGB values in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Item = TypeVar("Item")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow looks for an orientation.
_EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class Rejection(Exception):
    """Why a picture cannot be used: a kind that is counted, and the detail of this picture."""

    def __init__(self, kind: str, detail: str = ""):
        self.kind, self.detail = kind, " ".join(detail.split())[:300]
        super().__init__(self.reason)

    @property
    def reason(self) -> str:
        """The kind and the detail in one line."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def _silence_readers() -> None:
    """Keep Pillow's readers from writing to the terminal: what is wrong with a file is a Rejection here, one line."""
    # Once and for the whole process: filters set around each call would race in threads. One of the warnings is about
    # large pictures, which our own limit refuses; none says which file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    # Pillow leaves libtiff's own handlers, which print, in place; the library is found through Pillow's extension.
    library = ctypes.CDLL(Image.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if setter := getattr(library, name, None):  # a Pillow without libtiff, or with hidden symbols
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)


_silence_readers()


# --- names ------------------------------------------------------------------------------------------------------------


def is_picture_name(key: str) -> bool:
    """Return whether a file's name is that of a picture: one of EXTENSIONS, and not hidden.

    Args:
        key: a key or path.
    """
    name = posixpath.basename(key)
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def left_out_line(names: Iterable[str]) -> str:
    """Return one line that says how many files are left out as no pictures, and names the first of them."""
    names = sorted(names)
    return f"{counted(len(names), 'other file')} left out: {first_names(names)} (pictures are named {' '.join(EXTENSIONS)})"


def first_names(names: Iterable[str]) -> str:
    """Return the first names of files in their order, on one line, and how many more there are."""
    # Names of files may hold anything: newlines, and bytes that are no text.
    shown = [name if name.isprintable() else name.encode("unicode_escape").decode() for name in sorted(names)]
    return first_few(shown)


def batches_of_files(items: Sequence[Item], count: int, bytes_of: Callable[[Item], int]) -> list[list[Item]]:
    """Return items that stand for files in batches, in their order.

    Args:
        items: the items.
        count: the most items of a batch.
        bytes_of: returns the size of an item's files; a batch has at most MOST_BATCH_BYTES, unless one item has more.
    """
    batches: list[list[Item]] = []
    size = 0
    for item in items:
        if not batches or len(batches[-1]) == count or size + bytes_of(item) > MOST_BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(item)
        size += bytes_of(item)
    return batches


# --- files ------------------------------------------------------------------------------------------------------------


def decode_picture(data: bytes) -> Image.Image:
    """Return the decoded picture of a file, neither turned upright nor converted.

    Args:
        data: the file's bytes.

    Raises:
        Rejection: it cannot be used.
    """
    opened = read_header(data)
    load_pixels(opened)
    return opened


def read_header(data: bytes, max_megapixels: float = MOST_MEGAPIXELS) -> Image.Image:
    """Return the picture of a file, its pixels not yet decoded.

    Args:
        data: the file's bytes.
        max_megapixels: the largest picture that is accepted, millions of pixels.

    Raises:
        Rejection: the file is empty, none of FORMATS, damaged or too large.
    """
    if not data:
        raise Rejection("empty file", "0 bytes")
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


def load_pixels(opened: Image.Image) -> None:
    """Decode the pixels of a picture that `read_header` returned.

    Args:
        opened: the picture.

    Raises:
        Rejection: it is damaged or has several frames.
    """
    try:
        # MPO, some cameras' JPEG with further pictures behind it, is opened as JPEG; its first picture counts.
        frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        if frames > 1:
            raise Rejection("moving picture", f"{frames} frames; give a single one")
        opened.load()
    except Rejection:
        raise
    except Exception as error:
        raise Rejection("damaged picture", f"{type(error).__name__}: {error}") from error


def rgb_picture(data: bytes, name: str) -> Image.Image:
    """Return a user's picture, upright in 8-bit RGB.

    Args:
        data: the file's bytes.
        name: named in the error.

    Raises:
        InputError: it cannot be used.
    """
    try:
        return to_rgb(decode_picture(data))
    except Rejection as rejection:
        raise InputError(f"{name}: not a usable picture ({rejection.reason}); replace or remove it") from rejection
    except MemoryError:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: not a usable picture ({detail}); replace or remove it") from error


def open_picture(store: Store, key: str) -> tuple[Image.Image, str]:
    """Return a user's picture, upright in 8-bit RGB, and the sha256 of its file.

    Args:
        store: where it lies.
        key: its key.

    Raises:
        InputError: it is missing or cannot be used.
    """
    data = read_picture_file(store, key)
    return rgb_picture(data, store.url_of(key)), hashlib.sha256(data).hexdigest()


def read_picture_file(store: Store, key: str) -> bytes:
    """Return the bytes of a picture's file.

    Args:
        store: where it lies.
        key: its key.

    Raises:
        InputError: it is missing, may not be read, or is larger than MOST_FILE_BYTES.
    """
    name = store.url_of(key)
    try:
        with store.open(key) as file:
            data = file.read(MOST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file; give a picture") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); give a picture") from error
    if len(data) > MOST_FILE_BYTES:
        raise InputError(f"{name}: file too large, at most {MOST_FILE_BYTES:,} bytes are read; replace or remove it")
    return data


def stored_picture(data: bytes, name: str = "picture") -> Image.Image:
    """Return the RGB picture in a cell of a dataset or of prepared data.

    Args:
        data: the encoded picture.
        name: named in the error.

    Raises:
        InputError: it is damaged.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"{name}: image cannot be read ({type(error).__name__}); restore the file that holds it"
        ) from error


def stored_ids(data: bytes) -> np.ndarray:
    """Return the segmentation map in a cell of prepared data; raises Pillow's errors when it is damaged.

    Args:
        data: a PNG file.

    Returns:
        An array (height, width) of segment ids.
    """
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)


# --- pixels -----------------------------------------------------------------------------------------------------------


def orientation(image: Image.Image) -> int | None:
    """Return how EXIF says a picture is to be turned, 1 (as it is) to 8; None when its EXIF block is damaged.

    Args:
        image: a picture as opened.
    """
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return None  # Pillow raises nearly anything at bytes that are no TIFF: such a picture has no EXIF
    return value if value in _TURNS else 1


def turned(image: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF says, as it is where EXIF is damaged; the EXIF block itself is left in place.

    Args:
        image: a picture as opened.
    """
    image.load()  # Pillow turns a TIFF by itself when its pixels are decoded
    turn = orientation(image)
    # Not ImageOps.exif_transpose: it parses and writes the whole block, any damage of which raises.
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def without_exif(image: Image.Image) -> Image.Image:
    """Remove the orientation from `image.info`, so that the picture is not turned twice.

    Args:
        image: a picture that is upright.

    Returns:
        The same picture.
    """
    for key in _EXIF_KEYS:
        image.info.pop(key, None)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture upright in 8-bit RGB: alpha over white, 16-bit grey scaled down, any other mode converted.

    Args:
        image: a picture of any mode.

    Raises:
        InputError: it is no PIL.Image, empty, or has values beyond 16 bits.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"reference of type {type(image).__name__}; give a PIL.Image")
    if min(image.size) == 0:
        raise InputError(f"reference of {image.width} x {image.height} pixels is empty; give a picture")
    image = turned(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return without_exif(image.convert("RGB"))


def pad_to_square(image: Image.Image, fill: str = "black") -> Image.Image:
    """Return a picture upright in RGB, centred in the smallest square that holds it, as training pads its crops.

    Args:
        image: a picture of any mode.
        fill: colour of the padding.
    """
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
