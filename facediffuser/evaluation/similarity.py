"""Similarity of pictures by their pixels, and the nearest neighbours of vectors."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

THUMBNAIL = 16
FACE_SIDE = 24
SEARCH_MARGIN, SEARCH_SIDES = 0.15, (27, 29, 30, 32, 34, 36)
MAX_EXACT = 50_000
POINTS_PER_CLUSTER = 39  # training points of each cluster that faiss asks for


def nearest_neighbours(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors that are nearest to each query.

    Exact up to 50,000 vectors; of more, faiss searches the nearest clusters, which finds almost all of what an exact search
    would.

    Args:
        vectors: unit vectors (n, d).
        queries: unit vectors (q, d).
        count: how many for each query.

    Returns:
        Cosines (q, count), highest first, and indices into `vectors` (q, count), -1 where there are fewer vectors.
    """
    import faiss

    vectors, queries = (np.ascontiguousarray(values, np.float32) for values in (vectors, queries))
    size = vectors.shape[1]
    index: faiss.Index = faiss.IndexFlatIP(size)
    if len(vectors) > MAX_EXACT:
        clusters = int(min(4 * len(vectors) ** 0.5, len(vectors) / POINTS_PER_CLUSTER))
        inverted = faiss.IndexIVFFlat(index, size, clusters, faiss.METRIC_INNER_PRODUCT)
        inverted.train(vectors)
        inverted.nprobe = 32
        index = inverted
    index.add(vectors)
    return index.search(queries, count)


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Return what two pictures are compared by: 16 x 16 pixels less each channel's mean.

    Another size, another encoding, another brightness or contrast hardly changes it.

    Args:
        picture: a picture of any size.

    Returns:
        A unit vector (768,).
    """
    small = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return _unit(np.asarray(small, np.float32).transpose(2, 0, 1))


def pixel_similarity(picture: Image.Image, box: Sequence[float], faces: Sequence[np.ndarray]) -> float:
    """Return how similar the pixels of a face are to those of the most similar reference face.

    It is the highest correlation over the shifts and sizes by which two detections of one face differ; a person drawn anew
    in another light and turn stays well below a pasted one.

    Args:
        picture: the picture.
        box: of the face, (x1, y1, x2, y2), px.
        faces: reference faces (24, 24, 3), uint8.

    Returns:
        0..1.
    """
    wanted = np.stack([_unit(face.astype(np.float32).transpose(2, 0, 1)) for face in faces])
    around, best = _expanded_box(box, SEARCH_MARGIN), 0.0
    for side in SEARCH_SIDES:
        pixels = np.asarray(_resized_crop(picture, around, side), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (FACE_SIDE, FACE_SIDE), axis=(0, 1))
        windows = windows.reshape(-1, 3, FACE_SIDE * FACE_SIDE)
        windows = (windows - windows.mean(-1, keepdims=True)).reshape(len(windows), -1)
        lengths = np.maximum(np.linalg.norm(windows, axis=1, keepdims=True), 1e-6)
        best = max(best, float((windows @ wanted.T / lengths).max()))
    return min(best, 1.0)


def face_pixels(picture: Image.Image, box: Sequence[float]) -> np.ndarray:
    """Return the picture inside a face box.

    Args:
        picture: the picture.
        box: (x1, y1, x2, y2), px.

    Returns:
        (24, 24, 3), uint8.
    """
    return np.asarray(_resized_crop(picture, box, FACE_SIDE))


def _resized_crop(picture: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    # `resize` takes fractions of pixels, so that a box's rounding does not shift what is compared.
    width, height = picture.size
    left, top = (min(max(box[axis], 0.0), picture.size[axis] - 1.0) for axis in (0, 1))
    right, bottom = max(min(box[2], width), left + 1.0), max(min(box[3], height), top + 1.0)
    inside = (left, top, min(right, width), min(bottom, height))
    return picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=inside)


def _expanded_box(box: Sequence[float], share: float) -> tuple[float, float, float, float]:
    across, down = (box[2] - box[0]) * share, (box[3] - box[1]) * share
    return box[0] - across, box[1] - down, box[2] + across, box[3] + down


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels (3, h, w) as a unit vector, each channel less its mean."""
    vector = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).ravel()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)
