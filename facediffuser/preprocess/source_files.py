"""The files of a source of photographs, by name: what a listing and a reader of archives share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from facediffuser.preprocess.splits import TEST, TRAIN

FFHQ_METADATA = "ffhq-dataset-v2.json"
FFHQ_FOLDERS = {
    "aligned": "images1024x1024",
    "in-the-wild": "in-the-wild-images",
    "thumbnails": "thumbnails128x128",
}
ID_LISTS = {"all": "image_ids.txt", TRAIN: "image_ids_train.txt", TEST: "image_ids_test.txt"}


@dataclass(frozen=True)
class Record:
    """One picture of a source, by the names of its files; `problem`: why it is rejected without being read."""

    image_id: str
    image: str
    annotation: str | None = None
    segmentation: str | None = None
    split: str | None = None
    licence: str | None = None
    author: str | None = None
    pixel_md5: str | None = None
    problem: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files to read."""
        return () if self.problem else tuple(key for key in (self.image, self.annotation, self.segmentation) if key)


@dataclass(frozen=True)
class FileTable:
    """The files of a source: `sizes` in bytes by name, how to `open` one of the root's, names that are `links`.

    `others`: names in a folder that are no files: links that lead nowhere, pipes and the like.

    `top`: the folder around all of an archive's files, which the names here leave off.
    """

    url: str
    sizes: dict[str, int]
    open: Callable[[str], AbstractContextManager[BinaryIO]]
    links: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    top: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.sizes
