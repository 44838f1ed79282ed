"""Segments: maps of ids over a picture, read from the source or made by Mask2Former, and stored as PNG."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facediffuser.preprocess.read_pictures import Rejection

PERSON_LABELS = ("person",)
LARGEST_ID = 65_535
# Mask2Former's maps are drawn at most so large and then stretched: each of its masks takes 4 bytes a pixel at once.
MOST_MAP_PIXELS = 4_000_000


@dataclass(frozen=True)
class Segment:
    """One segment: its id in the map, what it is, its box (x1, y1, x2, y2; px, far edges exclusive)."""

    id: int
    label: str
    box: tuple[int, int, int, int]


def read_map(data: bytes, height: int, width: int) -> np.ndarray:
    """Return the map of a .npy file: (height, width) int32 ids from 0; ids below 0 (no segment) become 0.

    Raises Rejection when the file is no integer array or not as large as its picture.
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
            "segmentation map does not fit", f"{' x '.join(map(str, shape))}, the picture has {height} rows x {width}"
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
    """Return the map as PNG bytes: grey of 8 bits, or of 16 when an id is above 255."""
    wide = int(ids.max(initial=0)) > 255
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16 if wide else np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_map(data: bytes) -> np.ndarray:
    """Return the map of PNG bytes written by `encode_map`: (height, width) int32."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image).astype(np.int32)


def resize_map(ids: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the map at another size; each cell takes the id at its centre."""
    if ids.shape == (height, width):
        return ids
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids[rows[:, None], columns[None, :]]


def segment_box(ids: np.ndarray, segment_id: int) -> tuple[int, int, int, int] | None:
    """Return the box around a segment's pixels, far edges exclusive; None when the map has none of them."""
    inside = ids == segment_id
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Segmenter:
    """Panoptic segments by a Mask2Former in transformers layout (a folder or a hub id)."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.device = torch.device(device)
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(model).to(self.device).eval()

    def segment(self, images: Sequence[Image.Image]) -> list[tuple[np.ndarray, list[Segment]]]:
        """Return for each picture its map, (height, width) int32 with 0 for no segment, and the map's segments."""
        # Only pictures of one size together: the processor pads a mixed batch, and stretches the padding back with it.
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.size].append(index)
        results: dict[int, tuple[np.ndarray, list[Segment]]] = {}
        for members in groups.values():
            results.update(zip(members, self._segment([images[index] for index in members]), strict=True))
        return [results[index] for index in range(len(images))]

    @torch.no_grad()
    def _segment(self, images: list[Image.Image]) -> list[tuple[np.ndarray, list[Segment]]]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        width, height = images[0].size
        scale = min(1.0, (MOST_MAP_PIXELS / (width * height)) ** 0.5)
        drawn = (max(1, round(height * scale)), max(1, round(width * scale)))
        results = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=[drawn] * len(images))
        return [self._read(result, width, height) for result in results]

    def _read(self, result: dict, width: int, height: int) -> tuple[np.ndarray, list[Segment]]:
        raw = resize_map(result["segmentation"].cpu().numpy().astype(np.int32), width, height)
        infos = sorted(result["segments_info"], key=lambda info: info["id"])
        # Numbered anew from 1, since versions of the library differ in the first id and in the mark for no segment.
        ids = np.zeros_like(raw)
        segments = []
        for info in infos:
            ids[raw == info["id"]] = len(segments) + 1
            box = segment_box(ids, len(segments) + 1)
            if box is not None:
                label = self.model.config.id2label.get(int(info["label_id"]), str(info["label_id"]))
                segments.append(Segment(len(segments) + 1, label, box))
        return ids, segments
