"""The reference pictures of a run: checked, cropped, measured once, and kept with the dataset in subjects.parquet."""

import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.inputs import Subject, open_picture
from facediffuser.dataset.schema import SUBJECTS_KEY, SUBJECTS_SCHEMA
from facediffuser.errors import InputError
from facediffuser.preprocess.faces import crop_square, face_crop_box
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

ReferenceCrop = Literal["face", "whole"]
# Twice the side of the towers that read references: more is bytes without use.
LONGEST_SIDE = 512
ROWS_PER_GROUP = 16


@dataclass(frozen=True)
class References:
    """What a worker needs of a subject: the pictures the model is shown and the unit vectors (k, d) of their faces."""

    images: list[Image.Image]
    identities: np.ndarray


def prepare_references(
    store: Store, subjects: Sequence[Subject], scorers, crop: ReferenceCrop, margin: float
) -> pa.Table:
    """Return the subjects' references as a table of SUBJECTS_SCHEMA.

    `crop` "face": the square around the picture's first (largest) face, `margin` times its longer side wider on each
    side; "whole": the picture. Identity is measured on the picture before cropping. `scorers.identity` finds and embeds
    the faces. Raises InputError for an unreadable picture and for one without a face, naming it.
    """
    rows = [_row(store, subject, key, scorers, crop, margin) for subject in subjects for key in subject.references]
    logger.info("%d references of %d subjects: a face in each", len(rows), len(subjects))
    return pa.Table.from_pylist(rows, schema=SUBJECTS_SCHEMA)


def _row(store: Store, subject: Subject, key: str, scorers, crop: ReferenceCrop, margin: float) -> dict:
    picture, digest = open_picture(store, key)
    found = scorers.identity.embed_faces([picture])[0]
    if not found.faces:
        raise InputError(f"{store.url_of(key)}: no face found; give a picture with one visible face")
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
    }


def references_digest(table: pa.Table) -> str:
    """Return the sha256 of who the subjects are and what their pictures hold."""
    digest = hashlib.sha256()
    for name in ("subject_id", "class_word", "reference", "source_sha256"):
        digest.update(("\0".join(table[name].to_pylist()) + "\n").encode())
    return digest.hexdigest()


def encode_references(table: pa.Table, schema: pa.Schema) -> bytes:
    """Return subjects.parquet; `schema` carries the run's marks."""
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(schema.metadata), sink, row_group_size=ROWS_PER_GROUP, compression="zstd",
        write_page_index=True,
    )  # fmt: skip
    return sink.getvalue()


def load_references(store: Store, subject_ids: Iterable[str]) -> dict[str, References]:
    """Return the references of the named subjects from a dataset's subjects.parquet, in the order of their names."""
    wanted = sorted(set(subject_ids))
    if not wanted:
        return {}
    with store.open(SUBJECTS_KEY) as source:
        chosen = pc.field("subject_id").isin(wanted)
        table = pq.read_table(source, columns=["subject_id", "image", "identity"], filters=chosen)
    found = references_of(table, wanted)
    for name in wanted:
        if name not in found:
            raise ValueError(f"{store.url_of(SUBJECTS_KEY)}: no subject {name!r}")
    return found


def references_of(table: pa.Table, subject_ids: Iterable[str]) -> dict[str, References]:
    """Return the references of the named subjects that are in a table of SUBJECTS_SCHEMA."""
    found: dict[str, References] = {}
    rows = table.select(["subject_id", "image", "identity"]).to_pylist()
    for name in subject_ids:
        own = [row for row in rows if row["subject_id"] == name]
        if not own:
            continue
        images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in own]
        found[name] = References(images, np.array([row["identity"] for row in own], np.float32))
    return found
