"""The faces of a training set, for the question whether a generated face is one of them."""

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.inputs import PICTURE_SUFFIXES
from facediffuser.dataset.reading import read_footer
from facediffuser.errors import InputError
from facediffuser.storage import Store, open_store

if TYPE_CHECKING:  # what lies in a training set can be looked up without torch
    from facediffuser.scoring.identity import IdentityScorer

logger = logging.getLogger(__name__)

BATCH = 64


@dataclass(frozen=True)
class TrainingFaces:
    """Unit vectors (n, d) of the faces in a training set, and the picture each was found in."""

    vectors: np.ndarray
    names: list[str]


def training_faces(
    url: str, identity: "IdentityScorer", advance: Callable[[int], None] = lambda count: None
) -> TrainingFaces:
    """Return the faces of a training set: prepared Parquet, whose boxes are known, or a folder of pictures.

    InputError when there is neither, or no face in any picture.
    """
    store, prepared, pictures = training_keys(url)
    vectors, names = [], []
    batches = _prepared(store, prepared) if prepared else _photographs(store, pictures, identity)
    for batch in batches:
        crops = [identity.crop(picture, box, identity.crop_size) for _, picture, boxes in batch for box in boxes]
        names += [name for name, _, boxes in batch for _ in boxes]
        if crops:
            vectors.append(identity.embed_crops(crops))
        advance(len(batch))
    if not names:
        raise InputError(f"{url}: no face in any of its pictures; give the photographs the models were trained on")
    logger.info("%s: %d training faces", url, len(names))
    return TrainingFaces(np.concatenate(vectors), names)


def count_training(url: str) -> int:
    """Return how many pictures a training set holds; InputError when it holds none."""
    store, prepared, pictures = training_keys(url)
    if not prepared:
        return len(pictures)
    return sum(read_footer(store, key).num_rows for key in prepared)


def training_keys(url: str) -> tuple[Store, list[str], list[str]]:
    """Return a training set's store, the keys of its prepared Parquet, and of its pictures; InputError without both."""
    store = open_store(url)
    store.require_readable()
    keys = [info.key for info in store.list()]
    prepared = [key for key in keys if key.startswith(("train/", "test/")) and key.endswith(".parquet")]
    pictures = [key for key in keys if key.lower().endswith(PICTURE_SUFFIXES)]
    if not prepared and not pictures:
        raise InputError(f"{url}: no train/*.parquet and no pictures; give preprocess's output or the photographs")
    return store, prepared, pictures


def _prepared(store: Store, keys: list[str]) -> Iterator[list[tuple]]:
    for key in keys:
        with store.open(key) as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches(BATCH, columns=["image_id", "image", "faces"]):
                yield [
                    (
                        row["image_id"],
                        Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
                        [face["box"] for face in row["faces"] or []],
                    )
                    for row in batch.to_pylist()
                ]


def _photographs(store: Store, keys: list[str], identity: "IdentityScorer") -> Iterator[list[tuple]]:
    for start in range(0, len(keys), BATCH):
        some = keys[start : start + BATCH]
        pictures = [Image.open(io.BytesIO(store.get(key))).convert("RGB") for key in some]
        found = identity.detector.detect(pictures)
        yield [
            (key, picture, [face.box for face in faces])
            for key, picture, faces in zip(some, pictures, found, strict=True)
        ]
