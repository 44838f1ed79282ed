"""Honesty checks of a finished dataset: copied training faces, pasted references, near-duplicate images."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from facediffuser.dataset.inputs import PICTURE_SUFFIXES
from facediffuser.dataset.survey import row_groups
from facediffuser.errors import InputError
from facediffuser.scoring.identity import IdentityScorer
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

THUMBNAIL = 16
FACE_SIDE = 24
SEARCH_MARGIN, SEARCH_SIDES = 0.15, (27, 29, 30, 32, 34, 36)
EXACT = 50_000
BATCH = 64
SEEN_COLUMNS = ("sample_id", "subject_ids", "status", "face_boxes", "image")
FEW_CLUSTERS = 39  # training points of each cluster that faiss asks for


class CopySettings(BaseModel):
    """Flag copies in a finished dataset: of training faces, of the references' pixels, of other images in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="the dataset: a folder or s3://bucket/prefix")
    training: str | None = Field(
        None,
        description="what the models were trained on: `preprocess`'s output, or a folder of pictures; without it no "
        "training faces are looked for",
    )
    scorers: str = Field(
        "paper", description="whose face network: paper, miniature, or a folder with identity/, prompt/"
    )
    face_threshold: float = Field(0.9, ge=0, le=1, description="flag faces with a training face this alike (cosine)")
    paste_threshold: float = Field(
        0.92, ge=0, le=1, description="flag faces whose pixels are a reference's (correlation)"
    )
    duplicate_threshold: float = Field(
        0.99, ge=0, le=1, description="flag images with another this alike (correlation)"
    )
    device: str = Field("auto", description="where the face network runs: auto, cpu, cuda, ...")


@dataclass(frozen=True)
class TrainingFaces:
    """Unit vectors (n, d) of the faces in a training set, and the picture each was found in."""

    vectors: np.ndarray
    names: list[str]


def find_copies(
    store: Store,
    identity: IdentityScorer,
    settings: CopySettings,
    training: TrainingFaces | None,
    advance: Callable[[int], None] = lambda count: None,
) -> pa.Table:
    """Return a row per image of a dataset: how much it copies, of whom, and whether that is flagged.

    Columns: sample_id; with `training`: training_similarity (the highest cosine of its faces to a training face, 0..1),
    training_nearest (the picture that face is in), training_copy; paste_similarity (the highest correlation of a face's
    pixels with a reference's of the same row, 0..1), pasted_reference; duplicate_similarity (of the whole picture to the
    most alike other one, 0..1), duplicate_of (its sample_id), duplicate. Null where there is nothing to compare. Memory
    grows by about 3 KB an image and 2 KB a face.
    """
    references = reference_faces(store, identity)
    ids: list[str] = []
    thumbnails: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    owners: list[int] = []
    pasted: list[float | None] = []
    seen: list[bool] = []
    for rows in _batches(store):
        pictures = [_picture(row) for row in rows]
        crops: list[np.ndarray] = []
        for row, picture in zip(rows, pictures, strict=True):
            place = len(ids)
            ids.append(row["sample_id"])
            seen.append(picture is not None)
            boxes = (row["face_boxes"] or []) if picture else []
            crops += [identity.crop(picture, box, identity.crop_size) for box in boxes]
            owners += [place] * len(boxes)
            theirs = [face for name in row["subject_ids"] for face in references.get(name, [])]
            values = [pixel_likeness(picture, box, theirs) for box in boxes] if theirs else []
            pasted.append(max(values, default=None))
            thumbnails.append(thumbnail(picture) if picture else np.zeros(3 * THUMBNAIL**2, np.float32))
        if crops and training is not None:
            vectors.append(identity.embed_crops(crops))
        advance(len(rows))
    columns: dict[str, Sequence] = {"sample_id": ids}
    if training is not None:
        columns |= _nearest_training(vectors, owners, len(ids), training, settings.face_threshold)
    columns |= {
        "paste_similarity": pa.array(pasted, pa.float32()),
        "pasted_reference": [None if value is None else value >= settings.paste_threshold for value in pasted],
    }
    return pa.table(columns | _duplicates(ids, np.stack(thumbnails), seen, settings.duplicate_threshold))


def _nearest_training(vectors, owners, count: int, training: TrainingFaces, threshold: float) -> dict[str, Sequence]:
    best = np.full(count, np.nan, np.float32)
    names: list[str | None] = [None] * count
    if vectors:
        likeness, places = nearest(training.vectors, np.concatenate(vectors), 1)
        for owner, value, place in zip(owners, likeness[:, 0], places[:, 0], strict=True):
            value = min(max(float(value), 0.0), 1.0)
            if np.isnan(best[owner]) or value > best[owner]:
                best[owner], names[owner] = value, training.names[place]
    return {
        "training_similarity": pa.array(best, from_pandas=True),
        "training_nearest": names,
        "training_copy": [None if np.isnan(value) else bool(value >= threshold) for value in best],
    }


def _duplicates(ids: list[str], thumbnails: np.ndarray, seen: list[bool], threshold: float) -> dict[str, Sequence]:
    there = np.flatnonzero(seen)
    best = np.full(len(ids), np.nan, np.float32)
    others: list[str | None] = [None] * len(ids)
    if len(there) > 1:
        likeness, places = nearest(thumbnails[there], thumbnails[there], 2)
        for row, own in enumerate(there):
            # Of equal pictures the row itself need not be the first one found.
            other = 1 if places[row, 0] == row else 0
            if places[row, other] >= 0:
                best[own] = min(max(float(likeness[row, other]), 0.0), 1.0)
                others[own] = ids[there[places[row, other]]]
    return {
        "duplicate_similarity": pa.array(best, from_pandas=True),
        "duplicate_of": pa.array(others, pa.string()),
        "duplicate": [None if np.isnan(value) else bool(value >= threshold) for value in best],
    }


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines (q, count), highest first, and places (q, count) of the `vectors` nearest to `queries`.

    All rows are unit vectors. Exact up to 50,000 vectors; of more, faiss searches the clusters that lie nearest, which
    finds almost all of what an exact search would. A place is -1 where there are fewer vectors.
    """
    import faiss

    vectors, queries = (np.ascontiguousarray(values, np.float32) for values in (vectors, queries))
    size = vectors.shape[1]
    index = faiss.IndexFlatIP(size)
    if len(vectors) > EXACT:
        clusters = int(min(4 * len(vectors) ** 0.5, len(vectors) / FEW_CLUSTERS))
        index = faiss.IndexIVFFlat(index, size, clusters, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = 32
    index.add(vectors)
    return index.search(queries, count)


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Return what two pictures are told alike by: 16 x 16 pixels less each channel's mean, as a unit vector (768,).

    Another size, another encoding, another brightness or contrast change it hardly.
    """
    small = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return _unit(np.asarray(small, np.float32).transpose(2, 0, 1))


def pixel_likeness(picture: Image.Image, box: Sequence[float], faces: Sequence[np.ndarray]) -> float:
    """Return how much the face in `box` has the pixels of any reference's face (24, 24, 3) of `faces`, 0..1.

    It is the highest correlation over the shifts and sizes by which two finds of one face differ; a person drawn anew
    in another light and turn stays well below a pasted one.
    """
    wanted = np.stack([_unit(face.astype(np.float32).transpose(2, 0, 1)) for face in faces])
    around, best = _grown(box, SEARCH_MARGIN), 0.0
    for side in SEARCH_SIDES:
        pixels = np.asarray(_cut(picture, around, side), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (FACE_SIDE, FACE_SIDE), axis=(0, 1))
        windows = windows.reshape(-1, 3, FACE_SIDE * FACE_SIDE)
        windows = (windows - windows.mean(-1, keepdims=True)).reshape(len(windows), -1)
        lengths = np.maximum(np.linalg.norm(windows, axis=1, keepdims=True), 1e-6)
        best = max(best, float((windows @ wanted.T / lengths).max()))
    return min(best, 1.0)


def face_pixels(picture: Image.Image, box: Sequence[float]) -> np.ndarray:
    """Return the picture inside a face box as (24, 24, 3) uint8."""
    return np.asarray(_cut(picture, box, FACE_SIDE))


def _cut(picture: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    # `resize` takes fractions of pixels, so that a box's rounding does not shift what is compared.
    width, height = picture.size
    left, top = (min(max(box[axis], 0.0), picture.size[axis] - 1.0) for axis in (0, 1))
    right, bottom = max(min(box[2], width), left + 1.0), max(min(box[3], height), top + 1.0)
    inside = (left, top, min(right, width), min(bottom, height))
    return picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=inside)


def _grown(box: Sequence[float], share: float) -> tuple[float, float, float, float]:
    across, down = (box[2] - box[0]) * share, (box[3] - box[1]) * share
    return box[0] - across, box[1] - down, box[2] + across, box[3] + down


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels (3, h, w) as a unit vector, each channel less its mean."""
    vector = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).ravel()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def reference_faces(store: Store, identity: IdentityScorer) -> dict[str, list[np.ndarray]]:
    """Return subject id -> the faces (24, 24, 3) of a dataset's reference pictures; empty without subjects.parquet."""
    if not store.exists("subjects.parquet"):
        return {}
    filesystem, base = store.arrow()
    found: dict[str, list[np.ndarray]] = {}
    for row in pq.read_table(f"{base}/subjects.parquet", filesystem=filesystem).to_pylist():
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        for face in identity.detector.detect([picture])[0][:1]:
            found.setdefault(row["subject_id"], []).append(face_pixels(picture, face.box))
    return found


def _batches(store: Store) -> Iterator[list[dict]]:
    keys = [info.key for info in store.list("data/") if info.key.endswith(".parquet")]
    if not keys:
        raise InputError(f"{store.url}: no data/*.parquet there; give the URL that `generate` wrote to")
    for _, _, table in row_groups(store, keys, SEEN_COLUMNS):
        for start in range(0, table.num_rows, BATCH):
            yield table.slice(start, BATCH).to_pylist()


def _picture(row: Mapping) -> Image.Image | None:
    data = (row["image"] or {}).get("bytes")
    return Image.open(io.BytesIO(data)).convert("RGB") if data else None


# --- the training set -------------------------------------------------------------------------------------------------


def training_faces(
    url: str, identity: IdentityScorer, advance: Callable[[int], None] = lambda count: None
) -> TrainingFaces:
    """Return the faces of a training set: prepared Parquet, whose boxes are known, or a folder of pictures.

    InputError when there is neither, or no face in any picture.
    """
    store, prepared, pictures = _training_keys(url)
    vectors, names = [], []
    batches = _prepared(store, prepared) if prepared else _photographs(store, pictures, identity)
    for batch in batches:
        crops = [identity.crop(picture, box, identity.crop_size) for _, picture, boxes in batch for box in boxes]
        names += [name for name, _, boxes in batch for _ in boxes]
        if crops:
            vectors.append(identity.embed_crops(crops))
        advance(len(batch))
    if not names:
        raise InputError(f"{url}: no face in any of its pictures; give the photographs the models were trained on")
    logger.info("%s: %d training faces", url, len(names))
    return TrainingFaces(np.concatenate(vectors), names)


def count_training(url: str) -> int:
    """Return how many pictures a training set holds; InputError when it holds none."""
    store, prepared, pictures = _training_keys(url)
    filesystem, base = store.arrow()
    if not prepared:
        return len(pictures)
    return sum(pq.read_metadata(f"{base}/{key}", filesystem=filesystem).num_rows for key in prepared)


def _training_keys(url: str) -> tuple[Store, list[str], list[str]]:
    """The store, its prepared Parquet, its pictures."""
    store = open_store(url)
    store.require_readable()
    keys = [info.key for info in store.list()]
    prepared = [key for key in keys if key.startswith(("train/", "test/")) and key.endswith(".parquet")]
    pictures = [key for key in keys if key.lower().endswith(PICTURE_SUFFIXES)]
    if not prepared and not pictures:
        raise InputError(f"{url}: no train/*.parquet and no pictures; give preprocess's output or the photographs")
    return store, prepared, pictures


def _prepared(store: Store, keys: list[str]) -> Iterator[list[tuple]]:
    filesystem, base = store.arrow()
    for key in keys:
        with filesystem.open_input_file(f"{base}/{key}") as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches(BATCH, columns=["image_id", "image", "faces"]):
                yield [
                    (
                        row["image_id"],
                        Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
                        [face["box"] for face in row["faces"] or []],
                    )
                    for row in batch.to_pylist()
                ]


def _photographs(store: Store, keys: list[str], identity: IdentityScorer) -> Iterator[list[tuple]]:
    for start in range(0, len(keys), BATCH):
        some = keys[start : start + BATCH]
        pictures = [Image.open(io.BytesIO(store.get(key))).convert("RGB") for key in some]
        found = identity.detector.detect(pictures)
        yield [
            (key, picture, [face.box for face in faces])
            for key, picture, faces in zip(some, pictures, found, strict=True)
        ]
