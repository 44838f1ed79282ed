"""The reference pictures of a run: checked, cropped, measured once, and kept with the dataset in subjects.parquet."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.dataset.reading import read_chosen, readable_parquet
from facediffuser.dataset.schema import FINGERPRINT_KEY, SUBJECTS_KEY
from facediffuser.errors import InputError
from facediffuser.pictures import stored_picture
from facediffuser.runs import canonical_json
from facediffuser.storage import Store
from facediffuser.storage.reading import DamagedError, parse_json

ROWS_PER_GROUP = 16
# The runs of a dataset of several parts, in the footer of its references.
PARTS_KEY = b"facediffuser_parts"


@dataclass(frozen=True)
class References:
    """What a worker needs of a subject: the pictures the model is shown and the unit vectors (k, d) of their faces."""

    images: list[Image.Image]
    identities: np.ndarray


def references_digest(table: pa.Table) -> str:
    """Return the SHA-256 of who the subjects are and what their pictures hold; `table` is one of SUBJECTS_SCHEMA."""
    digest = hashlib.sha256()
    for name in ("subject_id", "class_word", "reference", "source_sha256"):
        digest.update(("\0".join(table[name].to_pylist()) + "\n").encode())
    return digest.hexdigest()


def encode_references(table: pa.Table, schema: pa.Schema, parts: Sequence[str] = ()) -> bytes:
    """Return the bytes of subjects.parquet.

    Args:
        table: rows of SUBJECTS_SCHEMA and perhaps of terms.
        schema: carries the run's marks.
        parts: the fingerprints of all runs, where there are several.
    """
    marks = dict(schema.metadata or {})
    if len(parts) > 1:
        marks[PARTS_KEY] = canonical_json(list(parts)).encode()
    return parquet_bytes(table.replace_schema_metadata(marks), row_group_size=ROWS_PER_GROUP)


def references_marks(store: Store, key: str = SUBJECTS_KEY) -> list[str]:
    """Return the fingerprints of the runs whose references a file holds; none when it is missing or not whole."""
    try:
        with readable_parquet(store, key), store.open(key) as source:
            metadata = pq.read_metadata(source).metadata or {}
            first, parts = metadata.get(FINGERPRINT_KEY, b"").decode(), parse_json(metadata.get(PARTS_KEY, b"[]"))
    except (DamagedError, FileNotFoundError):
        return []
    return [*(parts if isinstance(parts, list) else []), *([first] if first else [])]


def load_references(store: Store, subject_ids: Iterable[str], key: str = SUBJECTS_KEY) -> dict[str, References]:
    """Return the references of the named subjects from a file of a dataset's references, in the order of their names.

    Args:
        store: the dataset.
        subject_ids: the subjects; one named twice is loaded once.
        key: the file.

    Raises:
        InputError: a subject is not in the file.
    """
    wanted = sorted(set(subject_ids))
    if not wanted:
        return {}
    table = read_chosen(store, key, ("subject_id", "image", "identity"), "subject_id", wanted)
    found = references_of(table, wanted)
    for name in wanted:
        if name not in found:
            raise InputError(f"{store.url_of(key)}: no subject {name!r}; put the file back")
    return found


def references_of(table: pa.Table, subject_ids: Iterable[str]) -> dict[str, References]:
    """Return the references of the named subjects that are in a table of SUBJECTS_SCHEMA; others are left out."""
    found: dict[str, References] = {}
    rows = table.select(["subject_id", "image", "identity"]).to_pylist()
    for name in subject_ids:
        own = [row for row in rows if row["subject_id"] == name]
        if not own:
            continue
        images = [stored_picture(row["image"]["bytes"], f"{SUBJECTS_KEY}: {name}") for row in own]
        found[name] = References(images, np.array([row["identity"] for row in own], np.float32))
    return found
