"""The rows of prepared Parquet data, in memory."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from facediffuser.errors import InputError
from facediffuser.pictures import stored_ids, stored_picture
from facediffuser.preprocess.parts import MANIFEST
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json, reading
from facediffuser.training.train_check import FIX, require_prepared

READ_BYTES = 8 << 20
COLUMNS = [
    "image_id",
    "image",
    "width",
    "height",
    "caption",
    "faces",
    "subjects",
    "segmentation",
    "identity",
]


class Records:
    """The rows of one split by number, pictures compressed as in the files (FFHQ at 512 px takes about 5 GB).

    Args:
        url: folder or s3:// URL that `facediffuser preprocess` wrote.
        split: `train` or `test`.

    Raises:
        InputError: the data is incomplete, has no such split or no rows, or another schema version.
    """

    def __init__(self, url: str, split: str):
        self.url, self.split = url, split
        store = open_store(url)
        require_prepared(url, store, split)
        tables = []
        for key in split_keys(store, split):
            with reading(store.url_of(key), "Parquet", FIX), store.open(key, READ_BYTES) as source:
                tables.append(pq.read_table(source, columns=COLUMNS))
        self.table = pa.concat_tables(tables)
        if not len(self.table):
            raise InputError(f"{url}: {split}/ has no rows; prepare pictures with a person in them")
        self._described = self.table.drop_columns(["image"])

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict:
        """Return one row as Python values, without its picture."""
        return self._described.slice(index, 1).to_pylist()[0]

    def image(self, index: int) -> Image.Image:
        """Return the decoded picture of a row, RGB; raises InputError when it is damaged."""
        return stored_picture(self.table["image"][index]["bytes"].as_py(), self.name(index))

    def ids(self, index: int) -> np.ndarray:
        """Return the segmentation map of a row, an array (height, width); raises InputError when it is damaged."""
        try:
            return stored_ids(self.table["segmentation"][index].as_py())
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises nearly anything at a broken PNG
            raise InputError(
                f"{self.name(index)}: segmentation cannot be read ({type(error).__name__}); {FIX}"
            ) from error

    def name(self, index: int) -> str:
        """Return how errors name a row."""
        return f"{self.url}: {self.split} picture {self.table['image_id'][index].as_py()}"

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Put the row's name before the text of an InputError that the block raises."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error

    def other_pictures(self) -> dict[int, list[int]]:
        """Return, for each row that shows one known person alone, the other rows that show that person alone."""
        rows: dict[str, list[int]] = {}
        for row, (who, subjects) in enumerate(
            zip(self.table["identity"].to_pylist(), self.table["subjects"].to_pylist(), strict=True)
        ):
            if who and "+" not in who and len(subjects) == 1:
                rows.setdefault(who, []).append(row)
        return {row: [other for other in same if other != row] for same in rows.values() for row in same}

    def captions(self) -> list[str]:
        """Return the distinct captions and the empty one, sorted."""
        return distinct_captions(self.table)

    def digest(self) -> str:
        """Return the digest of the split, see `split_digest`."""
        return split_digest(open_store(self.url), self.split)


def distinct_captions(rows: pa.Table) -> list[str]:
    """Return the distinct captions of prepared rows and the empty one, sorted."""
    return sorted({"", *rows["caption"].to_pylist()})


def split_keys(store: Store, split: str) -> list[str]:
    """Return the keys of a split's files, in the order of its rows."""
    return [info.key for info in store.list(f"{split}/") if info.key.endswith(".parquet")]


def split_digest(store: Store, split: str) -> str:
    """Return the sha256 over the files of a split, which hold its pictures as they are trained on.

    The rows' `image_sha256` would not do: it is that of the source's file, whatever size was made of it.

    Args:
        store: prepared data.
        split: `train` or `test`.
    """
    files = parse_json(store.get(MANIFEST))["files"]
    digest = hashlib.sha256()
    for key in split_keys(store, split):
        known = files.get(key, {}).get("sha256")
        if not known:
            whole = hashlib.sha256()
            with store.open(key, READ_BYTES) as source:
                while block := source.read(READ_BYTES):
                    whole.update(block)
            known = whole.hexdigest()
        digest.update(f"{key} {known}\n".encode())
    return digest.hexdigest()


def square(picture: torch.Tensor, size: int, nearest: bool = False) -> torch.Tensor:
    """Return the centre square of a picture, its shorter side resized.

    Args:
        picture: (c, h, w).
        size: the side of the square in px.
        nearest: take the nearest pixel, as maps of ids need it, instead of interpolating.

    Returns:
        (c, size, size).
    """
    mode = TF.InterpolationMode.NEAREST if nearest else TF.InterpolationMode.BILINEAR
    return TF.center_crop(TF.resize(picture, [size], interpolation=mode, antialias=not nearest), [size, size])
