"""The reference pictures of a run, checked, cropped and measured once; the table goes into subjects.parquet."""

import io
import logging
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from PIL import Image

from facediffuser.dataset.consent import subjects_schema
from facediffuser.dataset.inputs import Subject
from facediffuser.faces import crop_square, face_crop_box
from facediffuser.number_words import counted
from facediffuser.pictures import open_picture
from facediffuser.scoring.identity import require_faces
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

ReferenceCrop = Literal["face", "whole"]
# Twice the side of the towers that read references: more is bytes without use.
LONGEST_SIDE = 512


def prepare_references(
    store: Store, subjects: Sequence[Subject], scorers, crop: ReferenceCrop, margin: float
) -> pa.Table:
    """Return the subjects' references as a table of SUBJECTS_SCHEMA, with their terms where they have any.

    Identity is measured on the picture before cropping.

    Args:
        store: the folder of subjects.
        subjects: those to prepare.
        scorers: its `identity` finds and embeds the faces.
        crop: "face": the square around the picture's first (largest) face; "whole": the picture.
        margin: how much wider than the face that square is on each side, as a share of the face's longer side.

    Raises:
        InputError: a picture cannot be read, or some have no face; the error names them.
    """
    rows, without = [], []
    for subject in subjects:
        for key in subject.references:
            row = _row(store, subject, key, scorers, crop, margin)
            if row is None:
                without.append(store.url_of(key))
            else:
                rows.append(row)
    require_faces(without)
    logger.info("%s of %s: a face in each", counted(len(rows), "reference"), counted(len(subjects), "subject"))
    return pa.Table.from_pylist(rows, schema=subjects_schema(subjects))


def _row(store: Store, subject: Subject, key: str, scorers, crop: ReferenceCrop, margin: float) -> dict | None:
    """Return the row of a reference; None where the picture shows no face."""
    picture, digest = open_picture(store, key)
    found = scorers.identity.embed_faces([picture])[0]
    if not found.faces:
        return None
    face = found.faces[0]
    box = face_crop_box(face.box, margin) if crop == "face" else (0, 0, *picture.size)
    shown = crop_square(picture, box) if crop == "face" else picture
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    shown.save(sink, "PNG")
    return {
        "subject_id": subject.subject_id,
        "class_word": subject.class_word,
        "reference": key,
        "source_sha256": digest,
        "image": {"bytes": sink.getvalue(), "path": key.replace("/", "_").rsplit(".", 1)[0] + ".png"},
        "crop_box": list(box),
        "face_box": list(face.box),
        "face_prob": face.prob,
        "identity": found.vectors[0].tolist(),
        **dict(subject.terms),
    }
