"""Honesty checks of a finished dataset: copied training faces, pasted references, near-duplicate images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.dataset.manifest import MANIFEST_KEY, find_manifest, listed_shards, read_manifest
from facediffuser.dataset.reading import read_columns, require_same_shards, row_groups
from facediffuser.dataset.schema import DATASET_SCHEMA
from facediffuser.evaluation.score_settings import CopySettings
from facediffuser.evaluation.similarity import THUMBNAIL, face_pixels, nearest_neighbours, pixel_similarity, thumbnail
from facediffuser.pictures import stored_picture
from facediffuser.storage import ObjectInfo, Store

# What copies are to be looked for in can be checked without torch, which takes seconds to import.
if TYPE_CHECKING:
    from facediffuser.evaluation.training_faces import TrainingFaces
    from facediffuser.scoring.identity import IdentityScorer

BATCH = 64
SMALLEST_ANGLE = 1e-3  # between two references, radians: those of one picture stored twice tell nothing
READ_COLUMNS = ("sample_id", "subject_ids", "status", "face_boxes", "image")


def recorded_scorers(store: Store) -> str:
    """Return the scorers a finished dataset was made with, as its manifest remembers them; `paper` without a manifest."""
    made_from = read_manifest(store).made_from if store.exists(MANIFEST_KEY) else {}
    return made_from.get("scorers", "paper")


def find_copies(
    store: Store,
    identity: "IdentityScorer",
    settings: CopySettings,
    training: "TrainingFaces | None",
    advance: Callable[[int], None] = lambda count: None,
) -> pa.Table:
    """Return a row per image of a dataset: how much it copies, of whom, and whether that is flagged.

    Args:
        store: the dataset.
        identity: finds and embeds the faces.
        settings: the limits from which on an image is flagged.
        training: the faces of the training set; None compares with none.
        advance: called with the number of rows done since the last call.

    Raises:
        StorageError: another command changed a shard meanwhile.
    """
    references = reference_faces(store, identity)
    ids: list[str] = []
    thumbnails: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    owners: list[int] = []
    pasted: list[float | None] = []
    copied: list[tuple[float, str] | None] = []
    several = any(len(faces) > 1 for faces in references.values())
    has_picture: list[bool] = []
    shards = listed_shards(store, find_manifest(store))
    for rows in _batches(store, shards):
        pictures = [_picture(row) for row in rows]
        crops: list[np.ndarray] = []
        for row, picture in zip(rows, pictures, strict=True):
            place = len(ids)
            ids.append(row["sample_id"])
            has_picture.append(picture is not None)
            boxes = (row["face_boxes"] or []) if picture else []
            if picture:
                crops += [identity.crop(picture, box, identity.crop_size) for box in boxes]
            owners += [place] * len(boxes)
            faces_of_row = [face.pixels for name in row["subject_ids"] for face in references.get(name, [])]
            values = [pixel_similarity(picture, box, faces_of_row) for box in boxes] if picture and faces_of_row else []
            pasted.append(max(values, default=None))
            thumbnails.append(thumbnail(picture) if picture else np.zeros(3 * THUMBNAIL**2, np.float32))
        if crops and (training is not None or several):
            vectors.append(identity.embed_crops(crops))
        copied += _copied_references(rows, pictures, vectors[-1] if crops and several else None, references)
        advance(len(rows))
    require_same_shards(store, shards)
    columns: dict[str, Sequence] = {"sample_id": ids}
    if training is not None:
        columns |= _training_columns(vectors, owners, len(ids), training, settings.face_threshold)
    columns |= {
        "paste_similarity": pa.array(pasted, pa.float32()),
        "pasted_reference": [None if value is None else value >= settings.paste_threshold for value in pasted],
        "copy_paste": pa.array([found and found[0] for found in copied], pa.float32()),
        "copy_paste_reference": pa.array([found and found[1] for found in copied], pa.string()),
    }
    return pa.table(columns | _duplicate_columns(ids, np.stack(thumbnails), has_picture, settings.duplicate_threshold))


def _training_columns(vectors, owners, count: int, training: "TrainingFaces", threshold: float) -> dict[str, Sequence]:
    best = np.full(count, np.nan, np.float32)
    names: list[str | None] = [None] * count
    if vectors:
        similarity, places = nearest_neighbours(training.vectors, np.concatenate(vectors), 1)
        for owner, value, place in zip(owners, similarity[:, 0], places[:, 0], strict=True):
            value = min(max(float(value), 0.0), 1.0)
            if np.isnan(best[owner]) or value > best[owner]:
                best[owner], names[owner] = value, training.names[place]
    return {
        "training_similarity": pa.array(best, from_pandas=True),
        "training_nearest": names,
        "training_copy": [None if np.isnan(value) else bool(value >= threshold) for value in best],
    }


def _duplicate_columns(
    ids: list[str], thumbnails: np.ndarray, has_picture: list[bool], threshold: float
) -> dict[str, Sequence]:
    present = np.flatnonzero(has_picture)
    best = np.full(len(ids), np.nan, np.float32)
    others: list[str | None] = [None] * len(ids)
    if len(present) > 1:
        similarity, places = nearest_neighbours(thumbnails[present], thumbnails[present], 2)
        for row, own in enumerate(present):
            # Of equal pictures the row itself need not be the first one found.
            other = 1 if places[row, 0] == row else 0
            if places[row, other] >= 0:
                best[own] = min(max(float(similarity[row, other]), 0.0), 1.0)
                others[own] = ids[present[places[row, other]]]
    return {
        "duplicate_similarity": pa.array(best, from_pandas=True),
        "duplicate_of": pa.array(others, pa.string()),
        "duplicate": [None if np.isnan(value) else bool(value >= threshold) for value in best],
    }


@dataclass(frozen=True)
class ReferenceFace:
    """The face of a reference picture: the picture's name, its pixels (24, 24, 3) uint8 and its unit vector (d,)."""

    name: str
    pixels: np.ndarray
    vector: np.ndarray


def reference_faces(store: Store, identity: "IdentityScorer") -> dict[str, list[ReferenceFace]]:
    """Return the faces of a dataset's reference pictures by subject id; empty without subjects.parquet.

    A picture without a face contributes none.
    """
    if not store.exists("subjects.parquet"):
        return {}
    found: dict[str, list[ReferenceFace]] = {}
    for row in read_columns(store, "subjects.parquet", ["subject_id", "reference", "image"]).to_pylist():
        picture = stored_picture(row["image"]["bytes"], store.url_of("subjects.parquet"))
        [embedded] = identity.embed_faces([picture])
        if embedded.faces:
            face = ReferenceFace(row["reference"], face_pixels(picture, embedded.faces[0].box), embedded.vectors[0])
            found.setdefault(row["subject_id"], []).append(face)
    return found


def copy_paste(face: np.ndarray, references: Sequence[np.ndarray]) -> tuple[float, int]:
    """Return how much a face lies at one reference rather than at the person, 0..1, and the place of that reference.

    The measure of MultiID-Bench (arXiv 2510.14975), on angles between unit vectors: how much nearer the face lies to the
    reference than to another picture of the person, as a share of the angle between those two. Which reference a model
    followed is not known here, since it was shown all: the nearest one counts, against the mean of the others, so it is
    never below 0. 0: as near to every reference; 1: at one of them.

    Args:
        face: unit vector (d,).
        references: unit vectors (d,) of two pictures of the person or more.
    """
    vectors = np.stack(references).astype(np.float64)
    angles = np.arccos(np.clip(vectors @ face.astype(np.float64), -1, 1))
    between = np.arccos(np.clip(vectors @ vectors.T, -1, 1))
    nearest = int(np.argmin(angles))
    others = [place for place in range(len(vectors)) if place != nearest]
    shares = (angles[others] - angles[nearest]) / np.maximum(between[nearest, others], SMALLEST_ANGLE)
    return float(np.clip(shares, 0, 1).mean()), nearest


def _copied_references(
    rows: Sequence[Mapping],
    pictures: Sequence[Image.Image | None],
    vectors: np.ndarray | None,
    references: Mapping[str, Sequence[ReferenceFace]],
) -> Iterator[tuple[float, str] | None]:
    """Yield for each row the highest `copy_paste` of its subjects with the reference's name, None without one."""
    from facediffuser.scoring.identity import subject_embedding
    from facediffuser.scoring.matching import identity_preservation

    start = 0
    for row, picture in zip(rows, pictures, strict=True):
        count = len(row["face_boxes"] or []) if picture else 0
        names = [name for name in row["subject_ids"] if name in references]
        if vectors is None or not count or not any(len(references[name]) > 1 for name in names):
            start += count
            yield None
            continue
        faces = vectors[start : start + count]
        start += count
        people = np.stack([subject_embedding(np.stack([one.vector for one in references[name]])) for name in names])
        best: tuple[float, str] | None = None
        for name, place in zip(names, identity_preservation(faces, people)[2], strict=True):
            if place >= 0 and len(references[name]) > 1:
                share, reference = copy_paste(faces[place], [one.vector for one in references[name]])
                if best is None or share > best[0]:
                    best = share, references[name][reference].name
        yield best


def _batches(store: Store, shards: Sequence[ObjectInfo]) -> Iterator[list[dict]]:
    keys = [info.key for info in shards]
    # All columns are read, and so looked at: the card reads others, after the hours of work.
    for _, _, read in row_groups(store, keys, DATASET_SCHEMA.names):
        table = read.select([name for name in READ_COLUMNS if name in read.column_names])
        for start in range(0, table.num_rows, BATCH):
            yield table.slice(start, BATCH).to_pylist()


def _picture(row: Mapping) -> Image.Image | None:
    data = (row["image"] or {}).get("bytes")
    return stored_picture(data, row["sample_id"]) if data else None
