"""Scorers of a dataset's rows: those that look at pictures alone, and those that need to know the dataset.

`faces` needs everyone whom the dataset shows, `face-quality` what is known of the faces; both are added to datasets only.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
from PIL import Image

from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.dataset.reading import read_columns, shard_schema
from facediffuser.dataset.schema import FACES, SUBJECTS_KEY, face_fields
from facediffuser.errors import InputError
from facediffuser.evaluation.copies import recorded_scorers
from facediffuser.evaluation.image_sources import recorded_digests
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.prompts import without_markers
from facediffuser.scoring.columns import ColumnScorer, column_scores, find_scorer, load_columns
from facediffuser.storage import Store

FACE_QUALITY = "face-quality"
OF_DATASETS = (FACES, FACE_QUALITY)
UNKNOWN_LICENCE = "not stated"
# A face of this size and sharpness loses nothing: 112 px is what recognisers are trained on, and the sharpness is that of
# a photograph of that size.
FULL_SIZE, FULL_SHARPNESS = 112.0, 300.0

Row = dict[str, Any]


class DatasetScorer(Protocol):
    """What adds columns to rows: `columns`, the `digest` of weights and method, their `licence`.

    `reads_faces`: whether rows must have what the column `faces` holds.
    """

    columns: pa.Schema
    digest: str
    licence: str
    reads_faces: bool

    def score_rows(
        self, rows: Sequence[Row], images: Sequence[Image.Image], references: Mapping[str, Sequence[Image.Image]]
    ) -> pa.Table:
        """Return a table of `columns`, a row per row.

        Args:
            rows: sample_id, subject_ids, prompt and, where they are read, faces.
            images: their pictures.
            references: subject id -> reference pictures.
        """


class PictureScorer:
    """A scorer of pictures as one of rows."""

    reads_faces = False

    def __init__(self, name: str, scorer: ColumnScorer):
        self.name, self.scorer = name, scorer
        self.columns, self.digest = scorer.columns, scorer.digest
        self.licence = getattr(scorer, "licence", UNKNOWN_LICENCE)

    def score_rows(self, rows, images, references) -> pa.Table:
        shown = [[references.get(name, []) for name in row["subject_ids"]] for row in rows]
        return column_scores({self.name: self.scorer}, images, shown, [without_markers(row["prompt"]) for row in rows])


class FaceColumns:
    """`faces` and `ip_margin` for a dataset of an earlier version, as `generate` writes them today."""

    reads_faces = False

    def __init__(self, store: Store, settings: ScoreSettings, device: str = "cpu"):
        from facediffuser.scoring.face_labels import gallery_of
        from facediffuser.scoring.scorers import load_identity_scorer

        name = settings.scorers or recorded_scorers(store)
        self.identity, digests = load_identity_scorer(name, device)
        recorded = recorded_digests(shard_schema(store))
        for part, digest in digests.items():
            if recorded.get(part, digest) != digest:
                raise InputError(
                    f"{store.url}: scored with another {part} ({recorded[part][:12]}) than {name} has ({digest[:12]}); "
                    "give --scorers those of the dataset"
                )
        self.gallery = gallery_of(read_columns(store, SUBJECTS_KEY, ["subject_id", "identity"]).to_pylist())
        size = self.gallery.vectors.shape[1] if settings.embeddings else 0
        self.columns = pa.schema(face_fields(size))
        method = f"{digests} {size} {hashlib.sha256(self.gallery.vectors.tobytes()).hexdigest()} {self.gallery.ids}"
        self.digest = hashlib.sha256(method.encode()).hexdigest()
        self.licence = "as the dataset's scorers"

    def score_rows(self, rows, images, references) -> pa.Table:
        import numpy as np

        from facediffuser.scoring.face_labels import label_faces
        from facediffuser.scoring.matching import identity_preservation

        found = []
        for row, image, faces in zip(rows, images, self.identity.embed_faces(images), strict=True):
            wanted = [self.gallery.vectors[self.gallery.places[name]] for name in row["subject_ids"]]
            chosen = identity_preservation(faces.vectors, np.stack(wanted))[2]
            labels = label_faces(image, faces, row["subject_ids"], chosen, self.gallery)
            found.append({"faces": labels.faces, "ip_margin": labels.ip_margin})
        return pa.Table.from_pylist(found, schema=self.columns)


class FaceQuality:
    """`face_quality`, 0..1: the least, over the subjects' faces, of what is measured of a face, as one number.

    It is the product of MTCNN's probability, of the size (1 from 112 px on), of the sharpness (its square root, 1 from
    300 on) and of how far the head faces the camera (cosine of yaw times cosine of pitch). Null without a subject's face.
    """

    columns = pa.schema([("face_quality", pa.float32())])
    digest = hashlib.sha256(
        b"probability x size / 112 x sqrt(sharpness / 300) x cos yaw x cos pitch, least, 1"
    ).hexdigest()
    licence = "Apache-2.0"
    reads_faces = True

    def score_rows(self, rows, images, references) -> pa.Table:
        each = ([face for face in row[FACES] or [] if face["subject_id"] is not None] for row in rows)
        return pa.table([[min(map(face_quality, faces), default=None) for faces in each]], schema=self.columns)


def face_quality(face: Mapping[str, Any]) -> float:
    """Return the quality of one face, 0..1.

    Args:
        face: an element of the column `faces`: probability 0..1, size in px, sharpness (variance), yaw and pitch in
            degrees.
    """
    facing = max(0.0, math.cos(math.radians(face["yaw"]))) * max(0.0, math.cos(math.radians(face["pitch"])))
    sharp = min(1.0, math.sqrt(face["sharpness"] / FULL_SHARPNESS))
    return face["probability"] * min(1.0, face["size"] / FULL_SIZE) * sharp * facing


def check_row_scorers(settings: ScoreSettings, store: Store) -> None:
    """Check the scorers that `score --add` names, without loading them.

    Args:
        settings: with the names.
        store: the dataset.

    Raises:
        InputError: a scorer is not to be found, or the dataset has its column, or lacks what it reads.
    """
    names: list[str] | None = None
    for name in settings.add:
        if name not in OF_DATASETS:
            find_scorer(name)
            continue
        names = names or shard_schema(store).names
        if name == FACES and FACES in names:
            raise InputError(f"{store.url}: has the column faces; leave it out of --add")
        if not store.exists(SUBJECTS_KEY):
            raise InputError(f"{store.url_of(SUBJECTS_KEY)}: missing; {name} needs the dataset's references")
        if name == FACE_QUALITY and FACES not in names and FACES not in read_added_columns(store).schema.names:
            raise InputError(f"{store.url}: has no column faces; run `facediffuser score --add faces` before {name}")


def load_row_scorers(settings: ScoreSettings, store: Store, device: str = "cpu") -> dict[str, DatasetScorer]:
    """Return the scorers named in the settings, loaded, by name.

    Args:
        settings: with the names.
        store: the dataset.
        device: where their models run.

    Raises:
        InputError: one cannot be used on the dataset.
    """
    check_row_scorers(settings, store)
    others = load_columns([name for name in settings.add if name not in OF_DATASETS], device)
    found: dict[str, DatasetScorer] = {}
    for name in dict.fromkeys(settings.add):
        if name == FACES:
            found[name] = FaceColumns(store, settings, device)
        elif name == FACE_QUALITY:
            found[name] = FaceQuality()
        else:
            found[name] = PictureScorer(name, others[name])
    return found


def score_dataset_rows(
    scorers: Mapping[str, DatasetScorer],
    rows: Sequence[Row],
    open_image: Callable[[Row], Image.Image],
    references: Mapping[str, Sequence[Image.Image]],
) -> list[Row]:
    """Return the values of all scorers' columns for each row.

    Args:
        scorers: by name.
        rows: dictionaries by column of a dataset.
        open_image: decodes a row's image.
        references: the reference pictures by subject id.

    Returns:
        A dictionary by column for each row, empty for a row without an image.
    """
    indices = [index for index, row in enumerate(rows) if row["image"] and row["image"]["bytes"]]
    shown = [rows[index] for index in indices]
    images = [open_image(row) for row in shown]
    values: list[Row] = [{} for _ in rows]
    for scorer in scorers.values():
        for index, found in zip(indices, scorer.score_rows(shown, images, references).to_pylist(), strict=True):
            values[index] |= found
    return values
