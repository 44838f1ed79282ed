"""The files of a source of photographs, by name: what a listing and a reader of archives share."""

import posixpath
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO

from facediffuser.errors import InputError
from facediffuser.preprocess.splits import TEST, TRAIN

FFHQ_METADATA = "ffhq-dataset-v2.json"
FFHQ_FOLDERS = {
    "aligned": "images1024x1024",
    "in-the-wild": "in-the-wild-images",
    "thumbnails": "thumbnails128x128",
}
# Both are read whole, and become many objects each: FFHQ's own metadata has 255 MB, FastComposer's lists 630 kB.
MOST_METADATA_BYTES = 1 << 29
MOST_LIST_BYTES = 1 << 24
ID_LISTS = {"all": "image_ids.txt", TRAIN: "image_ids_train.txt", TEST: "image_ids_test.txt"}


@dataclass(frozen=True)
class Record:
    """One picture of a source, by the names of its files.

    problem: why it is rejected without being read.
    bytes: how many all of its files have; what they hold is the same, so it is not part of a listing's digest.
    """

    image_id: str
    image: str
    annotation: str | None = None
    segmentation: str | None = None
    split: str | None = None
    licence: str | None = None
    author: str | None = None
    pixel_md5: str | None = None
    problem: str | None = None
    bytes: int = field(default=0, repr=False, compare=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files to read."""
        return () if self.problem else tuple(key for key in (self.image, self.annotation, self.segmentation) if key)


@dataclass(frozen=True)
class FileTable:
    """The files of a source: `sizes` in bytes by name, how to `open` one of the root's, names that are `links`.

    `others`: names that are no files: links that lead nowhere, pipes and the like.

    `twice`: names that an archive holds more than once, of which unpacking it would keep the last.

    `top`: the folder around all of an archive's files, which the names here leave off.
    """

    url: str
    sizes: dict[str, int]
    open: Callable[[str], AbstractContextManager[BinaryIO]]
    links: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    twice: frozenset[str] = frozenset()
    top: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.sizes


def is_fastcomposer_path(key: str) -> bool:
    """Return whether a name is that of a file of FastComposer's copy: `<first 5 of id>/<id>.<ending>`."""
    folder, name = posixpath.split(key)
    return "/" not in folder and folder == name.rsplit(".", 1)[0][:5]


def has_triples(names: Collection[str]) -> bool:
    """Return whether there is a segmentation map with its annotation, each named as in FastComposer's copy.

    Args:
        names: the files of a source.
    """
    maps = (key for key in names if key.endswith(".npy"))
    return any(f"{key[:-4]}.json" in names and is_fastcomposer_path(key) for key in maps)


def require_list_size(url: str, name: str, size: int) -> None:
    """Check the size of a list of ids, or of FFHQ's metadata, before it is read.

    Args:
        url: the source, for the error.
        name: the file's name.
        size: its bytes.

    Raises:
        InputError: the file has more bytes than are read.
    """
    most = MOST_METADATA_BYTES if posixpath.basename(name) == FFHQ_METADATA else MOST_LIST_BYTES
    if size > most:
        raise InputError(f"{url}: {name} has {size:,} bytes, at most {most:,} are read; split the source")
