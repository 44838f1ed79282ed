"""Segment maps: ids over a picture, read from a source's .npy and stored as PNG; no model and no torch."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from facediffuser.pictures import Rejection, stored_ids

PERSON_LABELS = ("person",)
LARGEST_ID = 65_535


@dataclass(frozen=True)
class Segment:
    """One segment: its id in the map, what it is, its box (x1, y1, x2, y2; px, far edges exclusive)."""

    id: int
    label: str
    box: tuple[int, int, int, int]


def read_map(data: bytes, height: int, width: int) -> np.ndarray:
    """Return the map of a .npy file.

    Args:
        data: the file.
        height: rows of its picture.
        width: columns of its picture.

    Returns:
        (height, width) int32 ids from 0; ids below 0 (no segment) become 0.

    Raises:
        Rejection: the file is no array of integers, is not as large as its picture, or has an id above LARGEST_ID.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except (ValueError, EOFError) as error:
        raise Rejection("damaged segmentation map", str(error)) from error
    # Looked at before the array is made: a header of a few bytes may ask for any amount of memory.
    if tuple(shape) != (height, width):
        raise Rejection(
            "segmentation map does not fit", f"{' x '.join(map(str, shape))}, the picture is {height} x {width}"
        )
    if dtype.kind not in "iub":
        raise Rejection("damaged segmentation map", f"holds {dtype}, not integers")
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Rejection("damaged segmentation map", str(error)) from error
    largest = int(values.max(initial=0))
    if largest > LARGEST_ID:
        raise Rejection("damaged segmentation map", f"segment id {largest} is above {LARGEST_ID}")
    return np.maximum(values, 0).astype(np.int32)


def encode_map(ids: np.ndarray) -> bytes:
    """Return a map of ids, (height, width), as PNG bytes: grey of 8 bits, or of 16 when an id is above 255."""
    wide = int(ids.max(initial=0)) > 255
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16 if wide else np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_map(data: bytes) -> np.ndarray:
    """Return the map of PNG bytes written by `encode_map`: (height, width) int32."""
    return stored_ids(data).astype(np.int32)


def resize_map(ids: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a map of ids at another size, in pixels; each cell takes the id at its centre, so no new ids arise."""
    if ids.shape == (height, width):
        return ids
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids[rows[:, None], columns[None, :]]


def segment_box(ids: np.ndarray, segment_id: int) -> tuple[int, int, int, int] | None:
    """Return the box around a segment's pixels, or None when the map has none of them.

    Args:
        ids: the map, (height, width).
        segment_id: the segment.

    Returns:
        left, top, right, bottom in pixels, right and bottom exclusive.
    """
    inside = ids == segment_id
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
