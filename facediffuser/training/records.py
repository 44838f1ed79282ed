"""Prepared Parquet in memory, by row."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.training.train_check import require_prepared

READ_BYTES = 8 << 20
COLUMNS = [
    "image_id",
    "image",
    "image_sha256",
    "width",
    "height",
    "caption",
    "faces",
    "subjects",
    "segmentation",
    "identity",
]


class Records:
    """The rows of one split, compressed as they are in Parquet (a 512 px FFHQ takes about 5 GB), by number."""

    def __init__(self, url: str, split: str):
        store = open_store(url)
        require_prepared(url, store, split)
        tables = []
        for key in [info.key for info in store.list(f"{split}/") if info.key.endswith(".parquet")]:
            with store.open(key, READ_BYTES) as source:
                tables.append(pq.read_table(source, columns=COLUMNS))
        self.table = pa.concat_tables(tables)
        if not len(self.table):
            raise InputError(f"{url}: {split}/ has no rows; prepare pictures with a person in them")
        self._described = self.table.drop_columns(["image"])

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict:
        """One row as Python values, without its picture."""
        return self._described.slice(index, 1).to_pylist()[0]

    def image(self, index: int) -> Image.Image:
        """The decoded picture of a row, RGB."""
        return decode(self.table["image"][index]["bytes"].as_py())

    def others(self) -> dict[int, list[int]]:
        """For each row of one known person, the other rows of that person alone."""
        rows: dict[str, list[int]] = {}
        for row, (who, subjects) in enumerate(
            zip(self.table["identity"].to_pylist(), self.table["subjects"].to_pylist(), strict=True)
        ):
            if who and "+" not in who and len(subjects) == 1:
                rows.setdefault(who, []).append(row)
        return {row: [other for other in same if other != row] for same in rows.values() for row in same}

    def captions(self) -> list[str]:
        """All captions and the empty one, each once, in order."""
        return sorted({"", *self.table["caption"].to_pylist()})

    def digest(self) -> str:
        """A digest of the pictures and their order."""
        digest = hashlib.sha256()
        for value in self.table["image_sha256"]:
            digest.update(str(value.as_py()).encode())
        return digest.hexdigest()


def decode(data: bytes) -> Image.Image:
    """Return the picture in some bytes as RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_ids(data: bytes) -> np.ndarray:
    """Return a segmentation PNG as (h, w) int array of segment ids."""
    return np.asarray(Image.open(io.BytesIO(data)))


def square(picture: torch.Tensor, size: int, nearest: bool = False) -> torch.Tensor:
    """Return (c, h, w) with its shorter side resized to `size` and its middle square cut out."""
    mode = TF.InterpolationMode.NEAREST if nearest else TF.InterpolationMode.BILINEAR
    return TF.center_crop(TF.resize(picture, [size], interpolation=mode, antialias=not nearest), [size, size])
