"""The reference pictures of a run: checked, cropped, measured once, and kept with the dataset in subjects.parquet."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.dataset.reading import readable_parquet
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.pictures import stored_picture
from facediffuser.storage import Store

ROWS_PER_GROUP = 16


@dataclass(frozen=True)
class References:
    """What a worker needs of a subject: the pictures the model is shown and the unit vectors (k, d) of their faces."""

    images: list[Image.Image]
    identities: np.ndarray


def references_digest(table: pa.Table) -> str:
    """Return the sha256 of who the subjects are and what their pictures hold."""
    digest = hashlib.sha256()
    for name in ("subject_id", "class_word", "reference", "source_sha256"):
        digest.update(("\0".join(table[name].to_pylist()) + "\n").encode())
    return digest.hexdigest()


def encode_references(table: pa.Table, schema: pa.Schema) -> bytes:
    """Return subjects.parquet; `schema` carries the run's marks."""
    return parquet_bytes(table.replace_schema_metadata(schema.metadata), row_group_size=ROWS_PER_GROUP)


def load_references(store: Store, subject_ids: Iterable[str]) -> dict[str, References]:
    """Return the references of the named subjects from a dataset's subjects.parquet, in the order of their names."""
    wanted = sorted(set(subject_ids))
    if not wanted:
        return {}
    with readable_parquet(store, SUBJECTS_KEY), store.open(SUBJECTS_KEY) as source:
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
        images = [stored_picture(row["image"]["bytes"], f"{SUBJECTS_KEY}: {name}") for row in own]
        found[name] = References(images, np.array([row["identity"] for row in own], np.float32))
    return found
