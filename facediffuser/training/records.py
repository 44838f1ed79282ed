"""The rows of prepared Parquet data, in memory."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from facediffuser.errors import InputError
from facediffuser.pictures import stored_picture
from facediffuser.storage import open_store
from facediffuser.storage.reading import reading
from facediffuser.training.train_check import FIX, require_prepared

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
    """The rows of one split by number, pictures compressed as in the files (FFHQ at 512 px takes about 5 GB).

    Args:
        url: folder or s3:// URL that `facediffuser preprocess` wrote.
        split: `train` or `test`.

    Raises:
        InputError: the data is incomplete, has no such split or no rows, or another schema version.
    """

    def __init__(self, url: str, split: str):
        store = open_store(url)
        require_prepared(url, store, split)
        tables = []
        for key in [info.key for info in store.list(f"{split}/") if info.key.endswith(".parquet")]:
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
        """Return the decoded picture of a row, RGB."""
        return stored_picture(self.table["image"][index]["bytes"].as_py())

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
        """Return the sha256 over the pictures' digests in row order."""
        return pictures_digest(self.table)


def distinct_captions(rows: pa.Table) -> list[str]:
    """Return the distinct captions of prepared rows and the empty one, sorted."""
    return sorted({"", *rows["caption"].to_pylist()})


def pictures_digest(rows: pa.Table) -> str:
    """Return the sha256 over the pictures' digests of prepared rows, in their order."""
    return hashlib.sha256("".join(map(str, rows["image_sha256"].to_pylist())).encode()).hexdigest()


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
