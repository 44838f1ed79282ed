"""Prepared photographs as training reads them: which files there are, and their rows, mapped from disk."""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.preprocess.schema import SCHEMA_KEY, SCHEMA_VERSION
from facediffuser.storage import Store, open_store

COLUMNS = ["image_id", "image", "caption", "faces", "subjects", "segmentation", "identity"]


@dataclass(frozen=True)
class PreparedPart:
    """A Parquet file of prepared rows: its key in the store and a word that changes with its content."""

    key: str
    version: str


@dataclass(frozen=True)
class Prepared:
    """Prepared data: its store, its files by split, and one digest of them all."""

    store: Store
    parts: dict[str, list[PreparedPart]]
    digest: str


def open_prepared(url: str) -> Prepared:
    """Return the prepared data at a URL; InputError when there is none, none to train from, or of another schema."""
    store = open_store(url)
    store.require_readable()
    parts = {
        split: [
            PreparedPart(info.key, str(info.size)) for info in store.list(f"{split}/") if info.key.endswith("parquet")
        ]
        for split in ("train", "test")
    }
    if not parts["train"]:
        raise InputError(f"{url}: no train/*.parquet there; give the output of `facediffuser preprocess`")
    if not store.exists("manifest.json"):
        raise InputError(f"{url}: no manifest.json there, so it is not whole; let `facediffuser preprocess` finish")
    _require_schema(store, parts["train"][0].key)
    sizes = repr([(part.key, part.version) for split in parts.values() for part in split]).encode()
    return Prepared(store, parts, hashlib.sha256(store.get("manifest.json") + sizes).hexdigest())


def _require_schema(store: Store, key: str) -> None:
    system, root = store.arrow()
    try:
        with system.open_input_file(f"{root}/{key}") as file:
            schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{store.url_of(key)}: no Parquet file; prepare the data again") from error
    version = (schema.metadata or {}).get(SCHEMA_KEY, b"").decode() or "none"
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{store.url_of(key)}: prepared by schema version {version}, this is {SCHEMA_VERSION}; prepare it again"
        )
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise InputError(f"{store.url_of(key)}: column {missing[0]} is missing; prepare the data again")


def read_part(store: Store, key: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file's rows, some at a time."""
    system, root = store.arrow()
    with system.open_input_file(f"{root}/{key}") as file:
        yield from pq.ParquetFile(file).iter_batches(batch_size=100, columns=columns)


class MappedRows:
    """Rows of an Arrow table that lie in an unnamed file on the local disk, so that memory does not grow with them."""

    def __init__(self, batches: Iterable[pa.RecordBatch]):
        descriptor, path = tempfile.mkstemp(prefix="facediffuser-rows-", suffix=".arrow")
        os.close(descriptor)
        try:
            writer = None
            for batch in batches:
                writer = writer or pa.ipc.new_file(path, batch.schema)
                writer.write_batch(batch)
            if writer is None:
                raise InputError("no rows to train from; prepare more photographs")
            writer.close()
            # The mapping keeps the file's content alive after its name is gone.
            self._file = pa.memory_map(path)
            self.table = pa.ipc.open_file(self._file).read_all()
        finally:
            Path(path).unlink()
        self._starts = np.cumsum([0, *(len(batch) for batch in self.table.to_batches())])
        self._batches = self.table.to_batches()

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as Python values."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = index - int(self._starts[number])
        batch = self._batches[number]
        return {name: batch.column(name)[place].as_py() for name in batch.schema.names}

    def values(self, index: int, column: str) -> np.ndarray:
        """Return one row's fixed-size list of numbers without copying it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        array = self._batches[number].column(column)
        width = array.type.list_size
        start = (index - int(self._starts[number]) + array.offset) * width
        return array.values.to_numpy(zero_copy_only=True)[start : start + width]


def decode_image(content: bytes) -> Image.Image:
    """Return an image file's picture in RGB."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def decode_segmentation(content: bytes) -> np.ndarray:
    """Return a PNG of segment ids as (h, w) int32."""
    return np.asarray(Image.open(io.BytesIO(content))).astype(np.int32)
